"""Reading again after an error that may pass, writing through to the disk, and sizes as text."""
import contextlib
import errno
import json
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any, TypeVar

from equivariant_ssl.errors import INPUT_OUTPUT, UserError, passing

PAUSES = (.1, 1., 4.)  # seconds before the second, the third and the last try
# The errors of a file system that cannot flush a directory, or cannot flush at all.
NO_FLUSH = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
Value = TypeVar('Value')


def unreadable(path: str | pathlib.Path, why: str) -> UserError:
  """Return the error for a path that could not be read in any try. why: what the system says."""
  return UserError(f'{path} could not be read in {len(PAUSES) + 1} tries: {why}.',
                   'Nothing was moved or changed. Check the disk or its mount (df, dmesg), then '
                   'type the same command again.', INPUT_OUTPUT)


def retry(call: Callable[[], Value], path: str | pathlib.Path) -> Value:
  """Return `call()`. Try again after each of PAUSES if it raises an error that may pass.

  Raises UserError INPUT_OUTPUT, which names `path`, if the last try fails too.
  """
  for pause in (*PAUSES, None):
    try:
      return call()
    except OSError as error:
      if not passing(error):
        raise
      if pause is None:
        raise unreadable(path, passing(error)) from error
    time.sleep(pause)
  raise AssertionError('the last try returns or raises')


def read_json_or_empty(path: pathlib.Path) -> dict[str, Any]:
  """Return the JSON object in a file, or {} where the file is missing or holds no such object.

  Raises UserError INPUT_OUTPUT if the disk fails to read it.
  """
  try:
    value = json.loads(retry(lambda: path.read_text(encoding='utf-8'), path))
  except (OSError, ValueError, RecursionError):
    return {}
  return value if isinstance(value, dict) else {}


def read_through(path: pathlib.Path) -> None:
  """Read every file in `path` to its end.

  Raises OSError if one cannot be read (EACCES, EIO, ESTALE). That says nothing about its content.
  """
  for part in (path, *path.rglob('*')):
    with contextlib.suppress(FileNotFoundError, IsADirectoryError), part.open('rb') as file:
      while file.read(1 << 24):
        pass


def flush(path: str | pathlib.Path) -> None:
  """Ask the disk to keep a file, or the names in a directory, through a loss of power.

  Raises OSError if the disk fails to.
  """
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  except OSError as error:
    if error.errno not in NO_FLUSH:
      raise
  finally:
    os.close(descriptor)


def flush_all(folder: pathlib.Path) -> None:
  """Flush a folder, its name, and everything in it."""
  for name in (folder.parent, folder, *folder.rglob('*')):
    flush(name)


def size_text(count: int | float) -> str:
  """Return a number of bytes in KiB, MiB or GiB."""
  if count < .1 * 2**20:
    return f'{count / 2**10:.1f} KiB'
  return f'{count / 2**30:.2f} GiB' if count >= 2**30 else f'{count / 2**20:.1f} MiB'

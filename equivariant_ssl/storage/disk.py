"""Errors of files that pass, told from what stays wrong; and what is on the disk, not only on its way there."""
import contextlib
import errno
import os
import pathlib
import time
from collections.abc import Callable
from typing import TypeVar

from equivariant_ssl.errors import INPUT_OUTPUT, UserError, passing

PAUSES = (.1, 1., 4.)  # seconds before the second, third and last try
# What a file system answers that cannot flush (a directory, or at all).
NO_FLUSH = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
Value = TypeVar('Value')


def unread(path: str | pathlib.Path, why: str) -> UserError:
  return UserError(f'{path} could not be read in {len(PAUSES) + 1} tries: {why}.',
                   'Nothing was moved or changed. See to the disk or its mount (df, dmesg), then type the same again.',
                   INPUT_OUTPUT)


def again(call: Callable[[], Value], path: str | pathlib.Path) -> Value:
  """`call()`, tried again after PAUSES where it raises an error that may pass; UserError INPUT_OUTPUT where it stays."""
  for pause in (*PAUSES, None):
    try:
      return call()
    except OSError as error:
      if not passing(error):
        raise
      if pause is None:
        raise unread(path, passing(error)) from error
    time.sleep(pause)


def read_through(path: pathlib.Path) -> None:
  """OSError where a file of `path` cannot be read (EACCES, EIO, ESTALE): that says nothing about what is in it."""
  for part in (path, *path.rglob('*')):
    with contextlib.suppress(FileNotFoundError, IsADirectoryError), part.open('rb') as file:
      while file.read(1 << 24):
        pass


def flush(path: str | pathlib.Path) -> None:
  """Ask the disk to hold a file, or a directory's names, through a power loss; OSError where it fails to."""
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  except OSError as error:
    if error.errno not in NO_FLUSH:
      raise
  finally:
    os.close(descriptor)


def flush_all(folder: pathlib.Path) -> None:
  """`flush` of a folder, its name, and all in it."""
  for name in (folder.parent, folder, *folder.rglob('*')):
    flush(name)

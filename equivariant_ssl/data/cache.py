"""Decoded canvases that are kept on disk, so that small data are decoded only once.

A file of the cache is named by the content from which it was computed.
"""
import hashlib
import os
import pathlib
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

VERSION = 3           # raise it when decoding changes its results
MOST = 2**30          # bytes: of the files that are hashed, and of the canvases that are kept

Arrays = dict[str, np.ndarray]


def cache_folder() -> pathlib.Path:
  """$XDG_CACHE_HOME/equivariant_ssl, else ~/.cache/equivariant_ssl.

  Where there is no home, it is a path at which no file can exist.
  """
  base = os.path.expanduser(os.environ.get('XDG_CACHE_HOME') or '~/.cache')
  return pathlib.Path(os.devnull if base.startswith('~') else base, 'equivariant_ssl')


def cached(files: Iterable[pathlib.Path], settings: object,
           compute: Callable[[], tuple[Arrays, bool]], stamped: bool = False,
           beside: pathlib.Path | None = None) -> Arrays:
  """The arrays that `compute()` makes from `files` under `settings`, or the ones kept on disk.

  Files of more than `MOST` bytes together are not hashed, and their arrays are not kept. A damaged
  file of the cache (its CRC is checked) is computed again. Where a file of the cache cannot be
  written, there is none. Two processes may do this at the same time: each writes its own file and
  renames it.

  compute: the function that returns the arrays, and whether they may be kept.
  stamped: recognize the files by name, size and time instead of by content, where they are too
           large to be hashed.
  beside:  a folder in which to keep the arrays, if it can be written, so that all machines that see
           the folder have them.
  """
  files = sorted(files)
  if not stamped and sum(file.stat().st_size for file in files) > MOST:
    return compute()[0]
  digest = hashlib.sha256(repr((VERSION, settings)).encode())
  for file in files:
    identity = _stamp(file) if stamped else _content_hash(file)
    digest.update(f'{file.name} {identity}\n'.encode())
  name = f'{digest.hexdigest()[:40]}.npz'
  paths = [*([beside / f'.eqssl-{name}'] if beside else []), cache_folder() / name]
  for path in paths:
    try:
      # np.load by itself would leave a damaged file open.
      with open(path, 'rb') as file, np.load(file) as stored:
        return dict(stored)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
      pass
  arrays, keep = compute()
  if keep and sum(array.nbytes for array in arrays.values()) <= MOST:
    any(_store(path, arrays) for path in paths)  # at the first path that can be written
  return arrays


def _content_hash(file: pathlib.Path) -> str:
  with open(file, 'rb') as stream:
    return hashlib.file_digest(stream, 'sha256').hexdigest()


def _stamp(file: pathlib.Path) -> str:
  status = file.stat()
  return f'{status.st_size} {status.st_mtime_ns}'


def _store(path: pathlib.Path, arrays: Arrays) -> bool:
  """Write the whole file or nothing of it, and return whether it was written.

  Where the disk is full or read-only, the next run computes the arrays again, and nothing else
  happens.
  """
  temporary, named_arrays = None, dict[str, Any](arrays)
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix='.tmp', delete=False) as file:
      temporary = file.name
      np.savez(file, **named_arrays)
    os.replace(temporary, path)
    return True
  except OSError:
    if temporary and os.path.exists(temporary):
      os.unlink(temporary)
    return False

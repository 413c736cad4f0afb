"""Decoded canvases kept on disk, so that small data are decoded once: keyed by the content they came from."""
import hashlib
import os
import pathlib
import tempfile
import zipfile
from collections.abc import Callable, Iterable

import numpy as np

VERSION = 3           # raise it when decoding changes what it gives
MOST = 2**30          # bytes, of the files that are hashed and of the canvases that are kept

Arrays = dict[str, np.ndarray]


def folder() -> pathlib.Path:
  """$XDG_CACHE_HOME/equivariant_ssl, else ~/.cache/equivariant_ssl; without a home a place where nothing can be."""
  base = os.path.expanduser(os.environ.get('XDG_CACHE_HOME') or '~/.cache')
  return pathlib.Path(os.devnull if base.startswith('~') else base, 'equivariant_ssl')


def cached(files: Iterable[pathlib.Path], settings: object, compute: Callable[[], tuple[Arrays, bool]],
           stamped: bool = False, beside: pathlib.Path | None = None) -> Arrays:
  """`compute()`'s arrays, from disk if they were computed from files of this content under these settings; `stamped`: of
  this name, size and time instead, for files that are too many bytes to hash. beside: a folder to keep them in where it may
  be written, so that all machines that see it have them.

  compute: () -> (arrays, whether they may be kept). A file of the cache that is damaged (its CRC is checked) is
  computed again; one that cannot be written is done without. Two processes may do this at once: both write their
  own file and rename it. Files of more than `MOST` bytes together are not hashed, nor their arrays kept.
  """
  files = sorted(files)
  if not stamped and sum(f.stat().st_size for f in files) > MOST:
    return compute()[0]
  digest = hashlib.sha256(repr((VERSION, settings)).encode())
  for file in files:
    digest.update(f'{file.name} {_stamp(file) if stamped else _content(file)}\n'.encode())
  name = f'{digest.hexdigest()[:40]}.npz'
  paths = [*([beside / f'.eqssl-{name}'] if beside else []), folder() / name]
  for path in paths:
    try:
      with open(path, 'rb') as file, np.load(file) as stored:   # np.load would leave a damaged file open
        return dict(stored)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
      pass
  arrays, keep = compute()
  if keep and sum(a.nbytes for a in arrays.values()) <= MOST:
    any(_store(path, arrays) for path in paths)  # the first that can be
  return arrays


def _content(file: pathlib.Path) -> str:
  with open(file, 'rb') as f:
    return hashlib.file_digest(f, 'sha256').hexdigest()


def _stamp(file: pathlib.Path) -> str:
  found = file.stat()
  return f'{found.st_size} {found.st_mtime_ns}'


def _store(path: pathlib.Path, arrays: Arrays) -> bool:
  """Write all of a file or none of it, and say which; a full or read-only disk costs the next run its time, nothing else."""
  temporary = None
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix='.tmp', delete=False) as f:
      temporary = f.name
      np.savez(f, **arrays)
    os.replace(temporary, path)
    return True
  except OSError:
    if temporary and os.path.exists(temporary):
      os.unlink(temporary)
    return False

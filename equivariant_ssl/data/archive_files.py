"""The official archives of data sets: where they are, and what to say of a broken one."""
import contextlib
import os
import pathlib
import posixpath
import tarfile
import zipfile
import zlib
from collections.abc import Iterator

from equivariant_ssl.errors import UserError

# What a broken archive may raise.
BROKEN = (OSError, EOFError, ValueError, KeyError, tarfile.TarError, zipfile.BadZipFile, zlib.error)
# Bytes that an archive may unpack to. The official ones have a third of it or more.
UNPACKED = {'cifar10': 2**29, 'cifar100': 2**29, 'stl10': 2**32}
IMAGENET = {'train': 'ILSVRC2012_img_train.tar', 'validation': 'ILSVRC2012_img_val.tar'}
ADDRESSES = {
    'imagenet': 'https://image-net.org (an account is needed): ' + ', '.join(IMAGENET.values()),
    'cifar10': 'https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz',
    'cifar100': 'https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz',
    'stl10': 'http://ai.stanford.edu/~acoates/stl10/stl10_binary.tar.gz',
    'tiny-imagenet': 'http://cs231n.stanford.edu/tiny-imagenet-200.zip'}


def source_paths(src: str) -> list[pathlib.Path]:
  """The paths in `src`, which are joined by commas, or the one path that has commas in its name.

  Raises UserError where one does not exist, and where there is none.
  """
  one = pathlib.Path(src.strip()).expanduser()
  if src.strip() and os.path.exists(one):
    return [one]
  paths = [pathlib.Path(path.strip()).expanduser() for path in src.split(',') if path.strip()]
  for path in paths:
    if not path.exists():
      raise UserError(f'{str(path)!r} does not exist.',
                      '--src takes folders and archives, joined by commas.')
  if not paths:
    raise UserError('--src names nothing.', 'e.g. --src FOLDER')
  return paths


def source_path(src: str, name: str, fix: str) -> pathlib.Path:
  """The one path in `src`. Raises UserError with `fix` for several. name: the data set."""
  path, *others = source_paths(src)
  if others:
    raise UserError(f'--src names {1 + len(others)} paths, and {name} is made from one.', fix)
  return path


@contextlib.contextmanager
def archive_errors(path: pathlib.Path, name: str) -> Iterator[None]:
  """Turn whatever a broken archive raises into a UserError. name: the data set."""
  try:
    yield
  except BROKEN as error:
    text = str(getattr(error, 'strerror', None) or error)
    reason = ' '.join(text.split()) or type(error).__name__
    raise UserError(f'{path} cannot be read as {name}: {reason}.',
                    f'The archive is at {ADDRESSES[name]}') from error


def archive_file(src: str, name: str) -> pathlib.Path:
  """The archive of the data set `name`: the file `src`, or a file in the folder `src`."""
  path = source_path(src, name, 'Name the archive, or the folder that it is in.')
  file = path / posixpath.basename(ADDRESSES[name]) if path.is_dir() else path
  if not file.is_file():
    raise UserError(f'{str(file)!r} does not exist.', f'The archive is at {ADDRESSES[name]}')
  return file

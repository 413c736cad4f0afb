"""Where prepared TFDS data sets are on disk, how one is opened safely, and how one is prepared."""
import functools
import json
import os
import pathlib
import re
import shlex
from collections.abc import Iterable
from typing import Any

from equivariant_ssl.data.tfds_claims import SAFE, unsafe_class
from equivariant_ssl.errors import UserError
from equivariant_ssl.storage import disk

# What this package prepares itself: {name: the command}.
PREPARED_HERE = {'cifar10': 'eqssl data prepare cifar10 [--archive FILE]',
                 'cifar100': 'eqssl data prepare cifar100 --src ARCHIVE',
                 'stl10': 'eqssl data prepare stl10 --src ARCHIVE',
                 'tiny_imagenet': 'eqssl data prepare tiny-imagenet --src ARCHIVE',
                 'imagenet2012': 'eqssl data prepare imagenet --src FOLDER'}


class NotPrepared(UserError):  # noqa: N818
  """A data set is not on disk, but it can be prepared."""


def default_root(root: str = '') -> pathlib.Path:
  """`root`, or the folder in which TFDS keeps its data sets."""
  folder = root or os.environ.get('TFDS_DATA_DIR') or '~/tensorflow_datasets'
  return pathlib.Path(os.path.expanduser(folder))


@functools.cache
def preparable_names() -> frozenset[str]:
  """The names of the data sets that can be prepared: TFDS's, and those of PREPARED_HERE."""
  import tensorflow_datasets as tfds
  return frozenset({*tfds.list_builders(with_community_datasets=False), *PREPARED_HERE})


def is_path(dataset: str) -> bool:
  """Whether a data set is named by the directory of one of its versions."""
  return (pathlib.Path(os.path.expanduser(dataset)) / 'dataset_info.json').is_file()


def find_version(dataset: str, root: str = '', option: str = '--config.data.root=DIR'
                 ) -> pathlib.Path:
  """The directory of one prepared version of a data set.

  option: the option that sets `root`. Raises NotPrepared, or another UserError, where there is
  none.
  """
  if is_path(dataset):
    return pathlib.Path(os.path.expanduser(dataset))
  name, _, version = dataset.partition(':')
  base = default_root(root) / name
  versions = _versions(base)
  if version in versions or (versions and not version):
    return base / (version or versions[-1])
  configs = sorted(path.name for path in base.iterdir() if _versions(path)) if base.is_dir() else []
  if configs and not versions:
    raise UserError(f'{dataset!r} has configurations.',
                    f'Name one: {", ".join(f"{name}/{config}" for config in configs)}.')
  others = f' (there are versions {", ".join(versions)})' if versions else ''
  if (name.split('/')[0] not in preparable_names()
      and (os.sep in dataset or pathlib.Path(dataset).is_file())):
    raise no_data_error(dataset)
  if name.split('/')[0] not in preparable_names() and not versions:
    raise NotPrepared(f'{dataset!r} is no folder here, and no data set that is prepared under '
                      f'{default_root(root)}.',
                      'Check the name of the folder; a data set may be elsewhere: '
                      f'{option}; and it is made once: {prepare_command(name, root)}')
  raise NotPrepared(f'{dataset!r} is not prepared under {default_root(root)}{others}.',
                    f'Prepare it once: {prepare_command(name, root)}; or say where it is: {option}')


def prepare_command(name: str, root: str = '') -> str:
  """What to type to prepare a data set of this name. root: where; '' for the default folder."""
  place = str(default_root(root)) if root else ''
  if name in PREPARED_HERE or name.split('/')[0] not in preparable_names():
    command = PREPARED_HERE.get(name) or f'eqssl data prepare {shlex.quote(name)} --src FOLDER'
    return command + (f' --root {shlex.quote(place)}' if place else '')
  return (f"in Python, tensorflow_datasets.builder('{name}', file_format='array_record'"
          + (f', data_dir={place!r}' if place else '') + ').download_and_prepare()')


def no_data_error(name: str) -> UserError:
  """The error for a path that holds no prepared data set."""
  path = pathlib.Path(os.path.expanduser(name))
  if path.is_dir():
    return UserError(f'{name!r} is a folder, but it holds no prepared data set.',
                     'Read a folder of images with --config.data.name=folder '
                     '--config.data.path=DIR')
  return UserError(f'{name!r} is {"a file, not a folder" if path.exists() else "not there"}.',
                   'Name a folder of images, or a prepared data set.')


def split_arguments(splits: Iterable[str]) -> list[str]:
  """The arguments of `eqssl train` that give a test split, for a data set with these splits."""
  if 'validation' in splits:  # choices are made on it, and not on the test split
    return ['--config.data.test=validation']
  if 'test' in splits:
    return []
  return ['--config.data.train=train[:80%]', '--config.data.test=train[80%:]']


def split_hint(splits: Iterable[str]) -> str:
  """Advice for a missing test split: another split, or a part of one, that can take its place."""
  arguments = split_arguments(splits)
  if not arguments:
    return ''
  return f' Say {shlex.join(arguments)}, or --config.data.test= for no test images.'


def _versions(base: pathlib.Path) -> list[str]:
  """The prepared versions in a directory, oldest first."""
  names = [path.parent.name for path in base.glob('*/dataset_info.json')]
  versions = [name for name in names if re.fullmatch(r'\d+\.\d+\.\d+', name)]
  return sorted(versions, key=lambda version: [int(part) for part in version.split('.')])


def open_directory(path: pathlib.Path) -> Any:
  """The TFDS builder of a prepared directory. Raises UserError.

  What TFDS would import for it is checked before it is opened.
  """
  try:
    text = disk.retry(lambda: (path / 'features.json').read_text(encoding='utf-8'), path)
    unsafe = unsafe_class(json.loads(text))
  except (OSError, ValueError, RecursionError) as error:
    raise UserError(f'{path} is not a readable TFDS data set: features.json: {error}',
                    'Prepare it again.') from error
  if unsafe is not None:
    raise UserError(f'{path} was refused: its features.json names {unsafe!r}, and opening it would '
                    'import that code.', f'Only features of {SAFE}* are read.')
  import tensorflow_datasets as tfds  # takes half a second; it does not import TensorFlow
  try:
    builder = tfds.builder_from_directory(path)
    kind = builder.info.file_format.value if builder.info.file_format else None
  except Exception as error:
    raise UserError(f'{path} is not a readable TFDS data set: {error}'.splitlines()[0],
                    'Prepare it again.') from error
  if kind != 'array_record':
    raise UserError(f'{path} holds {kind} files, which cannot be read at random without '
                    'TensorFlow.', "Prepare it again with file_format='array_record'.")
  return builder

"""Any TFDS data set that is already prepared as array_record, read without TensorFlow."""
import functools
import json
import os
import pathlib
import re
import shlex
import sys
import time
from collections.abc import Iterable
from typing import Any

import numpy as np

from equivariant_ssl.data.cache import MOST, cached
from equivariant_ssl.data.decode import BadImage, Reading, reading
from equivariant_ssl.data.source import (
  REPLACED,
  Moments,
  Records,
  Source,
  Split,
  fits,
  in_chunks,
  listed,
  listing,
  load,
  measured,
)
from equivariant_ssl.data.stream import lazy_split, sample
from equivariant_ssl.data.tfds_claims import SAFE, check_counts, unsafe_class
from equivariant_ssl.errors import UserError, passing
from equivariant_ssl.storage import disk

FILE = 'file_name'   # the feature that names a record
OWN = {'cifar10': 'eqssl data prepare cifar10 [--archive FILE]',   # what this package prepares itself
       **{n: f'eqssl data prepare {n} --src ARCHIVE' for n in ('cifar100', 'stl10')},
       'tiny_imagenet': 'eqssl data prepare tiny-imagenet --src ARCHIVE',
       'imagenet2012': 'eqssl data prepare imagenet --src FOLDER'}


# The (mean, std) that its users normalise by, where a stream would have to be measured.
USUAL = {'imagenet2012': ((.485, .456, .406), (.229, .224, .225))}


def make(dataset: str = 'cifar10', root: str = '', train: str = 'train', test: str = 'test', size: int = 0,
         stream: bool = False, labelled: str = '', background: str = 'black', bits: int = 16) -> Source:
  """The image and the class label of every record of two splits.

  dataset: 'name' or 'name/config', either with ':version' (else the newest), or the path of a prepared version.
  root: where TFDS data sets are kept ('': $TFDS_DATA_DIR, else ~/tensorflow_datasets). train, test: splits in TFDS's
  notation ('train[:10%]'), test='' for none. size: side of the canvas; 0 = the images' own, where all are one square.
  Labels are None where there is no class label, or some are negative. `mean` and `std` are measured on `train`.
  What does not fit in memory decoded is streamed; with `stream` all is. labelled: a split whose labels an evaluation reads
  where the training split has images without (STL-10's 'train', of 'train+unlabelled'). background, bits: as
  `data.folder.make`.
  """
  how = reading(background, bits)
  found = source(dataset, root, train, test, size, stream=stream, how=how)
  if not labelled:
    return found
  return found._replace(labelled=source(dataset, root, labelled, '', size, found[4:6], stream, how).train)


def source(dataset: str, root: str, train: str, test: str, size: int, normal: Moments | None = None,
           stream: bool = False, how: Reading = Reading()) -> Source:
  """`make`, with the (mean, std) given if they are known."""
  path = find(dataset, root)
  builder = open_directory(path)
  image, label = keys(dataset, builder.info)
  size = size or _own_size(dataset, builder.info.features[image].shape)
  classes = tuple(builder.info.features[label].names) if label else None
  parts = [records(builder, split, image, label, _hint(builder.info.splits), how) if split else None
           for split in (train, test)]
  place = ('dataset', os.path.abspath(path)) if _is_path(dataset) else ('root', os.path.abspath(default_root(root)))
  about = {'files': tuple(contents(builder, split) for split in (train, test)), 'place': (place,)}
  if stream or not fits(sum(p.count for p in parts if p), size):
    known = [p and labels(path, split, p) for split, p in zip((train, test), parts, strict=True)]
    splits = [p and lazy_split(str(path), p, size, told['labels']) for p, told in zip(parts, known, strict=True)]
    normal, odd = measured(normal or USUAL.get(builder.info.name), lambda: sample(splits[0].images))
    return Source(builder.info.name, *splits, classes, *normal, odd, _names(known[0]['files']), **about)
  problems = ()

  def decoded() -> tuple[dict[str, np.ndarray], bool]:
    nonlocal problems
    *splits, replaced = load(str(path), *parts, size)
    problems = listed(REPLACED, replaced)
    arrays = {f'{part}_{field}': array for part, split in zip(('train', 'test'), splits, strict=True) if split
              for field, array in split._asdict().items() if array is not None}
    return arrays | ({'files': parts[0].files.astype(str)} if parts[0].files is not None else {}), not problems

  arrays = cached((f for f in path.iterdir() if f.is_file()), (train, test, size, image, label, tuple(how)), decoded)
  splits = [Split(*(arrays.get(f'{part}_{field}') for field in Split._fields)) for part in ('train', 'test')]
  normal, odd = measured(normal, lambda: splits[0].images)
  return Source(builder.info.name, splits[0], splits[1] if test else None, classes, *normal, problems + odd,
                _names(arrays.get('files')), **about)


def contents(builder: Any, split: str) -> str:
  """A digest of the shards that a split is read from: name, size in bytes, records of it, which of them; '' of no split."""
  parts = builder.info.splits[split].file_instructions if split else ()
  of = lambda p: (p.basename(), os.path.getsize(p.filename), p.examples_in_shard, p.skip, p.take)
  return listing(map(of, parts)) if parts else ''


def _names(files: np.ndarray | None) -> tuple[str, ...] | None:
  return None if files is None else tuple(files.tolist())


def labels(path: pathlib.Path, split: str, found: Records) -> dict[str, np.ndarray | None]:
  """{'labels': [N], 'files': [N] file names} of all records of a split that is not decoded, None of what it has not: every
  record is read once, and these are kept beside the data."""
  if found.labels is None and found.files is None:
    return {'labels': None, 'files': None}

  def read() -> tuple[dict[str, np.ndarray], bool]:
    print(f'{path.parent.name} {split}: reading {found.count:,} labels, once', file=sys.stderr)
    bad = in_chunks(lambda rows: [i for i, r in zip(rows, found.read(rows), strict=True) if isinstance(r, BadImage)],
                    found.count)
    have = {'labels': found.labels, 'files': None if found.files is None else found.files.astype(str)}
    return {k: v for k, v in have.items() if v is not None}, not bad
  files = (f for f in path.iterdir() if f.is_file() and f.name[0] != '.')
  kept = cached(files, ('labels', split), read, stamped=True, beside=path)
  known = kept.get('labels')
  return {'labels': None if known is None or (known < 0).any() else known, 'files': kept.get('files')}


def remember(path: pathlib.Path) -> None:
  """Read the labels of the prepared data set in `path` that are too many to decode, so that no training has to."""
  builder = open_directory(path)
  image, label = keys(path.parent.name, builder.info)
  if builder.info.dataset_size > MOST:
    for split in builder.info.splits:
      labels(path, split, records(builder, split, image, label))


def default_root(root: str = '') -> pathlib.Path:
  """`root`, or where TFDS keeps its data sets."""
  return pathlib.Path(os.path.expanduser(root or os.environ.get('TFDS_DATA_DIR') or '~/tensorflow_datasets'))


class NotPrepared(UserError):  # noqa: N818
  """A data set that is not on disk, and could be."""


@functools.cache
def known() -> frozenset[str]:
  """The names that can be prepared: TFDS's."""
  import tensorflow_datasets as tfds
  return frozenset({*tfds.list_builders(with_community_datasets=False), *OWN})


def _is_path(dataset: str) -> bool:
  """Whether a data set is named by the directory of one of its versions."""
  return (pathlib.Path(os.path.expanduser(dataset)) / 'dataset_info.json').is_file()


def find(dataset: str, root: str = '', option: str = '--config.data.root=DIR') -> pathlib.Path:
  """The directory of one prepared version; NotPrepared or another UserError if there is none. option: what sets `root`."""
  if _is_path(dataset):
    return pathlib.Path(os.path.expanduser(dataset))
  name, _, version = dataset.partition(':')
  base = default_root(root) / name
  found = _versions(base)
  if version in found or (found and not version):
    return base / (version or found[-1])
  configs = sorted(d.name for d in base.iterdir() if _versions(d)) if base.is_dir() else []
  if configs and not found:
    raise UserError(f'{dataset!r} has configurations.', f'Name one: {", ".join(f"{name}/{c}" for c in configs)}.')
  there = f' (there are versions {", ".join(found)})' if found else ''
  if name.split('/')[0] not in known() and (os.sep in dataset or pathlib.Path(dataset).is_file()):
    raise no_data(dataset)
  raise NotPrepared(f'{dataset!r} is not prepared under {default_root(root)}{there}.',
                    f'Prepare it once: {how_to_make(name)}; or say where it is: {option}')


def how_to_make(name: str) -> str:
  """What to type to prepare a data set of this name."""
  if name in OWN or name.split('/')[0] not in known():
    return OWN.get(name) or f'eqssl data prepare {shlex.quote(str(name))} --src FOLDER'
  return f"in Python, tensorflow_datasets.builder('{name}', file_format='array_record').download_and_prepare()"


def no_data(name: str) -> UserError:
  """The error for a path that holds no prepared data set."""
  path = pathlib.Path(os.path.expanduser(name))
  if path.is_dir():
    return UserError(f'{name!r} is a folder, but not of a prepared data set.',
                     'A folder of images is read with --config.data.name=folder --config.data.path=DIR')
  return UserError(f'{name!r} is {"a file, not a folder" if path.exists() else "not there"}.',
                   'Name a folder of images, or a prepared data set.')


def splitting(splits: Iterable[str]) -> list[str]:
  """The arguments of `eqssl train` that give a test split, of a data set with these splits."""
  if 'validation' in splits:  # what choices are made on is not the test split
    return ['--config.data.test=validation']
  if 'test' in splits:
    return []
  return ['--config.data.train=train[:80%]', '--config.data.test=train[80%:]']


def _versions(base: pathlib.Path) -> list[str]:
  """The prepared versions in a directory, oldest first."""
  found = [p.parent.name for p in base.glob('*/dataset_info.json') if re.fullmatch(r'\d+\.\d+\.\d+', p.parent.name)]
  return sorted(found, key=lambda n: [int(part) for part in n.split('.')])


def open_directory(path: pathlib.Path) -> Any:
  """The TFDS builder of a prepared directory, after a look at what it would import. Raises UserError."""
  try:
    bad = unsafe_class(json.loads((path / 'features.json').read_text(encoding='utf-8')))
  except (OSError, ValueError, RecursionError) as e:
    raise UserError(f'{path} is not a readable TFDS data set: features.json: {e}', 'Prepare it again.') from e
  if bad is not None:
    raise UserError(f'{path} refused: its features.json names {bad!r}, and opening it would import that code.',
                    f'Only features of {SAFE}* are read.')
  import tensorflow_datasets as tfds  # half a second that other data do not need; it does not import TensorFlow
  try:
    builder = tfds.builder_from_directory(path)
    kind = builder.info.file_format.value if builder.info.file_format else None
  except Exception as e:
    raise UserError(f'{path} is not a readable TFDS data set: {e}'.splitlines()[0], 'Prepare it again.') from e
  if kind != 'array_record':
    raise UserError(f'{path} holds {kind} files, which cannot be read at random without TensorFlow.',
                    "Prepare it again with file_format='array_record'.")
  return builder


def keys(dataset: str, info: Any) -> tuple[str, str | None]:
  """The names of the image and of the class label among the features: the supervised ones if they are said."""
  import tensorflow_datasets as tfds
  def pick(kind: type, usual: str, supervised: str | None) -> str | None:
    found = [k for k, f in info.features.items() if isinstance(f, kind)]
    return next((k for k in (supervised, usual) if k in found), found[0] if found else None)

  said = info.supervised_keys if info.supervised_keys and len(info.supervised_keys) == 2 else (None, None)
  said = [s if isinstance(s, str) else None for s in said]
  image = pick(tfds.features.Image, 'image', said[0])
  if image is None or np.dtype(info.features[image].np_dtype) != np.uint8:
    raise UserError(f'{dataset!r} has no 8-bit image among its features: {", ".join(info.features)}.')
  return image, pick(tfds.features.ClassLabel, 'label', said[1])


def _own_size(dataset: str, shape: tuple[int | None, ...]) -> int:
  if shape[0] is None or shape[0] != shape[1]:
    raise UserError(f'The images of {dataset!r} are not all one square.', 'Say the canvas: --config.data.size=64')
  return shape[0]


def _hint(splits: Iterable[str]) -> str:
  """What to say of a test split that is not there, where the name of another, or a part of one, would do."""
  found = splitting(splits)
  return f' Say {shlex.join(found)}, or --config.data.test= for no test images.' if found else ''


def records(builder: Any, split: str, image: str, label: str | None, hint: str = '', how: Reading = Reading()) -> Records:
  """The records of one split; `labels` and `files` are filled in as the records are read. hint: if it is not there."""
  import tensorflow_datasets as tfds
  images = [k for k, f in builder.info.features.items() if isinstance(f, tfds.features.Image)]
  check_counts(builder, split)
  try:
    rows = builder.as_data_source(split, decoders={k: tfds.decode.SkipDecoding() for k in images})
    count = len(rows)
  except Exception as e:
    raise UserError(f'{builder.info.name} has no split {split!r} that can be read: {str(e).splitlines()[0]}',
                    f'It has: {", ".join(builder.info.splits)}.{hint}') from e
  labels = np.zeros(count, np.int32) if label else None
  files = np.full(count, '', object) if FILE in builder.info.features else None

  def one(i: int) -> dict[str, Any] | BadImage:
    try:
      return rows[i]
    except Exception as e:  # array_record checks a hash of each record
      if passing(e):
        raise disk.unread(f'{split} record {i}', passing(e)) from e
      return BadImage(f'cannot be read: {str(e).splitlines()[0]}')

  def read(indices: range) -> Iterable[bytes | BadImage]:
    try:
      batch = rows.__getitems__(list(indices))
    except Exception as e:
      if passing(e):
        time.sleep(disk.PAUSES[-1])
      batch = [one(i) for i in indices]
    for i, row in zip(indices, batch, strict=True):
      if label and not isinstance(row, BadImage):
        labels[i] = row[label]
      if files is not None and not isinstance(row, BadImage):
        files[i] = os.fsdecode(row[FILE])
      yield row if isinstance(row, BadImage) else row[image]

  return Records(lambda i: f'{split} record {i}', read, labels, count, files, how)

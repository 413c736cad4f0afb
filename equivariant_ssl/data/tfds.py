"""A TFDS data set that is already prepared as array_record, read without TensorFlow."""
import functools
import os
import pathlib
from typing import Any

import numpy as np

from equivariant_ssl.data.cache import MOST, cached
from equivariant_ssl.data.channel_moments import Moments, measure_moments
from equivariant_ssl.data.decode import PixelRules, pixel_rules
from equivariant_ssl.data.source import (
  REPLACED,
  Records,
  Source,
  Split,
  counted_list,
  decode_splits,
  files_digest,
  fits_in_memory,
)
from equivariant_ssl.data.stream import lazy_split, sample
from equivariant_ssl.data.tfds_claims import check_counts
from equivariant_ssl.data.tfds_folders import (
  default_root,
  find_version,
  is_path,
  open_directory,
  split_hint,
)
from equivariant_ssl.data.tfds_records import FILE_FEATURE, RowReader, read_labels, record_name
from equivariant_ssl.errors import UserError

# The (mean, std) that the users of a data set normalize by, where a stream would be measured.
USUAL_MOMENTS: dict[str, Moments] = {'imagenet2012': ((.485, .456, .406), (.229, .224, .225))}


def make(dataset: str = 'cifar10', root: str = '', train: str = 'train', test: str = 'test',
         size: int = 0, stream: bool = False, labeled: str = '', background: str = 'black',
         bits: int = 16) -> Source:
  """The image and the class label of every record of two splits.

  dataset:  'name' or 'name/config', either with ':version' (else the newest version), or the path
            of a prepared version.
  root:     the folder of TFDS data sets; '' for $TFDS_DATA_DIR, else ~/tensorflow_datasets.
  train, test: splits in TFDS's notation ('train[:10%]'); test='' for no test split.
  size:     the side of the canvas; 0 for the images' own size, where all are one square.
  stream:   decode images as they are needed. Data that do not fit in memory are always streamed.
  labeled:  the split whose labels an evaluation reads, where the training split has images without
            labels (STL-10's 'train', of 'train+unlabelled').
  background, bits: as in `data.folder.make`.

  There are no labels where there is no class label, or where some labels are negative. The mean and
  the standard deviation are measured on `train`.
  """
  rules = pixel_rules(background, bits)
  data = read_tfds(dataset, root, train, test, size, stream=stream, rules=rules)
  if not labeled:
    return data
  moments = data.mean, data.std
  bank = read_tfds(dataset, root, labeled, '', size, moments, stream, rules).train
  return data._replace(labeled=bank)


def read_tfds(dataset: str, root: str, train: str, test: str, size: int,
              moments: Moments | None = None, stream: bool = False,
              rules: PixelRules = PixelRules()) -> Source:
  """`make`, with the moments if they are known. rules: how the pixels become 8-bit RGB."""
  path = find_version(dataset, root)
  builder = open_directory(path)
  image, label = image_and_label(dataset, builder.info)
  size = size or _common_size(dataset, builder.info.features[image].shape)
  classes = tuple(builder.info.features[label].names) if label else None
  hint = split_hint(builder.info.splits)
  train_records = split_records(builder, train, image, label, hint, rules)
  test_records = split_records(builder, test, image, label, hint, rules) if test else None
  count = train_records.count + (test_records.count if test_records else 0)
  if is_path(dataset):
    place = 'dataset', os.path.abspath(path)
  else:
    place = 'root', os.path.abspath(default_root(root))
  if stream or not fits_in_memory(count, size):
    train_split, names = _lazy_split(path, train, train_records, size)
    test_split = _lazy_split(path, test, test_records, size)[0] if test_records else None
    moments, lines = measure_moments(moments or USUAL_MOMENTS.get(builder.info.name),
                                     lambda: sample(train_split.images))
  else:
    settings = train, test, size, image, label, tuple(rules)
    train_split, test_split, names, problems = _decode_cached(
        path, settings, train_records, test_records, size)
    moments, remarks = measure_moments(moments, lambda: train_split.images)
    lines = problems + remarks
  return Source(builder.info.name, train_split, test_split, classes, *moments, lines, names,
                files=(shards_digest(builder, train), shards_digest(builder, test)), place=(place,))


def _lazy_split(path: pathlib.Path, split: str, records: Records, size: int
                ) -> tuple[Split, tuple[str, ...] | None]:
  """A split as a stream, and the names of its files."""
  labels, files = read_labels(path, split, records)
  return lazy_split(str(path), records, size, labels), _names(files)


def _decode_cached(path: pathlib.Path, settings: tuple, train: Records, test: Records | None,
                   size: int
                   ) -> tuple[Split, Split | None, tuple[str, ...] | None, tuple[str, ...]]:
  """Both splits in memory, the names of the training files, and a list of what was replaced.

  They are decoded, or read from the cache, where the files in `path` and `settings` are the same.
  """
  problems: tuple[str, ...] = ()

  def decode() -> tuple[dict[str, np.ndarray], bool]:
    nonlocal problems
    train_split, test_split, replaced = decode_splits(str(path), train, test, size)
    problems = counted_list(REPLACED, replaced)
    arrays = {f'{part}_{field}': array
              for part, split in (('train', train_split), ('test', test_split)) if split
              for field, array in split._asdict().items() if array is not None}
    if train.files is not None:
      arrays['files'] = train.files.astype(str)
    return arrays, not problems

  arrays = cached((file for file in path.iterdir() if file.is_file()), settings, decode)

  def stored(part: str) -> Split:
    return Split(arrays[f'{part}_images'], arrays[f'{part}_sizes'], arrays.get(f'{part}_labels'))

  test_split = stored('test') if test else None
  return stored('train'), test_split, _names(arrays.get('files')), problems


def shards_digest(builder: Any, split: str) -> str:
  """A digest of the shards from which a split is read; '' for no split.

  For each shard it holds the name, the size in bytes, the number of records, and which of them
  belong to the split.
  """
  shards = builder.info.splits[split].file_instructions if split else ()
  if not shards:
    return ''
  return files_digest((shard.basename(), os.path.getsize(shard.filename), shard.examples_in_shard,
                       shard.skip, shard.take) for shard in shards)


def _names(files: np.ndarray | None) -> tuple[str, ...] | None:
  return None if files is None else tuple(files.tolist())


def keep_labels(path: pathlib.Path) -> None:
  """Read the labels of a prepared data set that is too large to decode, before any training."""
  builder = open_directory(path)
  image, label = image_and_label(path.parent.name, builder.info)
  if builder.info.dataset_size > MOST:
    for split in builder.info.splits:
      read_labels(path, split, split_records(builder, split, image, label))


def image_and_label(dataset: str, info: Any) -> tuple[str, str | None]:
  """The names of the features that are the image and the class label.

  They are the supervised ones, where the data set names them.
  """
  import tensorflow_datasets as tfds

  def pick(kind: type, usual: str, supervised: str | None) -> str | None:
    names = [name for name, feature in info.features.items() if isinstance(feature, kind)]
    preferred = [name for name in (supervised, usual) if name in names]
    return next(iter(preferred + names), None)

  supervised = info.supervised_keys
  if not supervised or len(supervised) != 2:
    supervised = None, None
  supervised_image, supervised_label = (
      name if isinstance(name, str) else None for name in supervised)
  image = pick(tfds.features.Image, 'image', supervised_image)
  if image is None or np.dtype(info.features[image].np_dtype) != np.uint8:
    raise UserError(f'{dataset!r} has no 8-bit image among its features: '
                    f'{", ".join(info.features)}.')
  return image, pick(tfds.features.ClassLabel, 'label', supervised_label)


def _common_size(dataset: str, shape: tuple[int | None, ...]) -> int:
  """The side of the images, where the features declare one square for all of them."""
  height, width = shape[:2]
  if height is None or height != width:
    raise UserError(f'The images of {dataset!r} are not all one square.',
                    'Say the size of the canvas: --config.data.size=64')
  return height


def split_records(builder: Any, split: str, image: str, label: str | None, hint: str = '',
                  rules: PixelRules = PixelRules()) -> Records:
  """The records of one split. Their `labels` and `files` are filled in as the records are read.

  image, label: the names of the features. hint: advice for the error where the split is not there.
  """
  import tensorflow_datasets as tfds
  images = [name for name, feature in builder.info.features.items()
            if isinstance(feature, tfds.features.Image)]
  check_counts(builder, split)
  try:
    rows = builder.as_data_source(split,
                                  decoders={name: tfds.decode.SkipDecoding() for name in images})
    count = len(rows)
  except Exception as error:
    reason = str(error).splitlines()[0]
    raise UserError(f'{builder.info.name} has no split {split!r} that can be read: {reason}',
                    f'It has: {", ".join(builder.info.splits)}.{hint}') from error
  labels = np.zeros(count, np.int32) if label else None
  files = np.full(count, '', object) if FILE_FEATURE in builder.info.features else None

  read = RowReader(rows, split, image, label, labels, files)
  return Records(functools.partial(record_name, split), read, labels, count, files, rules)

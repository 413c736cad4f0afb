"""Any labeled images as a TFDS data set in array_record, without TensorFlow.

The images are streamed, and the data set is written as a whole or not at all. Its order is TFDS's
own, by a hash of each record's key. So `train[:10%]` is a random tenth, and of an official data set
it is the same tenth for everybody.
"""
import contextlib
import functools
import itertools
import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from equivariant_ssl.data import encode
from equivariant_ssl.data.ahead import map_in_order, with_progress
from equivariant_ssl.data.decode import PixelRules
from equivariant_ssl.data.folder_index import printable
from equivariant_ssl.data.image_header import DAMAGED, BadImage
from equivariant_ssl.data.key_order import in_key_order, spread
from equivariant_ssl.data.source import counted_list, too_many_unreadable, unreadable_error
from equivariant_ssl.errors import BAD_DATA, USAGE, UserError
from equivariant_ssl.storage.record import lock_folder

SPARE = 1.03          # bytes on disk for one byte of the sources
YOUNG = 60.           # seconds for which a new folder may not be locked yet
UNITS = {'GiB': 2**30, 'MiB': 2**20, 'KiB': 2**10}
OTHER_ROOT = 'Give another folder: --root DIR'

Log = Callable[[str], Any]


class Example(NamedTuple):
  """One image of a data set.

  key:  its file name within its split, else its number.
  data: the encoded image, or a BadImage that says why there is none.
  more: the values of other features.
  """
  key: int | str
  data: bytes | BadImage
  label: int
  more: dict[str, Any] = {}


class Dataset(NamedTuple):
  """A data set that can be written.

  classes:   the class names in the order of the labels. None where there are no labels, or where
             TFDS has the names.
  splits:    {name: the function that returns the examples}.
  bytes:     the size of the sources; 0 where it is unknown.
  more:      {feature: its class names}, for further features.
  official:  whether TFDS has a data set of this name, whose features are used.
  side:      the side of all images, in pixels; 0 where they differ.
  published: {split: how many images there should be}.
  places:    {split: its folder}, by which messages name the images.
  fix:       what to do where many images are broken.
  notes:     what was left out and what is odd, in one line each.
  """
  name: str
  version: str
  classes: tuple[str, ...] | None
  splits: dict[str, Callable[[], Iterable[Example]]]
  bytes: int = 0
  more: dict[str, tuple[str, ...]] = {}
  official: bool = False
  side: int = 0
  published: dict[str, int] = {}
  places: dict[str, str] = {}
  fix: str = 'The archive may be incomplete: download it again, and try again.'
  notes: tuple[str, ...] = ()


def amount(count: int) -> str:
  """A number of bytes, for a reader."""
  unit = next((unit for unit in UNITS if count >= UNITS[unit]), 'KiB')
  return f'{count / UNITS[unit]:.1f} {unit}'


def encoded(example: Example, shrink: int, rules: PixelRules) -> Example:
  """The example with its image as it is written.

  Where `shrink` is 0 the image stays as it is; else it is made smaller. An image that cannot be
  decoded becomes the BadImage that says why.
  """
  try:
    data = (encode.shrunk_jpeg(example.data, shrink, rules) if shrink
            else encode.readable(example.data, rules))
  except BadImage as error:
    data = error
  return example._replace(data=data)


@contextlib.contextmanager
def scratch_folder(root: pathlib.Path, name: str) -> Iterator[pathlib.Path]:
  """A hidden folder in `root` for a data set that is not complete yet. It is removed at the end.

  Folders that killed processes have left are removed too.
  """
  for old in root.glob(f'.preparing-{name}-*'):
    with contextlib.suppress(UserError, OSError):  # another process may hold it or remove it
      if time.time() - old.stat().st_mtime > YOUNG:
        with lock_folder(old):
          shutil.rmtree(old)
  with (tempfile.TemporaryDirectory(prefix=f'.preparing-{name}-', dir=root) as place,
        lock_folder(place)):
    yield pathlib.Path(place)


def write(data: Dataset, root: pathlib.Path, shrink: int = 0, log: Log = print,
          rules: PixelRules = PixelRules()) -> pathlib.Path:
  """Write `root`/NAME/VERSION, which `tfds.data_source` reads, and return its path.

  An image that cannot be decoded is left out and listed; more than 1 % of them are an error. A data
  set that is already there stays as it is, and none that is written in part ever has that name.
  Raises UserError.

  shrink: where it is positive, all images are encoded anew, with a short side of at most so many
          pixels.
  rules:  how pixels become 8-bit RGB.
  """
  target = root / data.name / data.version
  for line in data.notes:
    log(line)
  if target.exists():
    log(f'{target} is already there and stays as it is. (To make it anew, move it away.)')
    return target
  try:
    root.mkdir(parents=True, exist_ok=True)
    with scratch_folder(root, data.name) as scratch:
      free, need = shutil.disk_usage(root).free, 0 if shrink else int(SPARE * data.bytes)
      if need > free:
        raise UserError(f'{data.name} takes {amount(need)}, and {root} has {amount(free)} left.',
                        f'{OTHER_ROOT}; or make the images smaller: --shrink 256')
      info, bad = build(data, scratch, shrink, log, rules)
      target.parent.mkdir(exist_ok=True)
      publish(pathlib.Path(info.data_dir), target)
  except OSError as error:
    raise UserError(f'{data.name} cannot be written in {root}: {error.strerror or error}.',
                    OTHER_ROOT) from error
  for line in counted_list('left out, because they cannot be read:', bad, len(bad)):
    log(line)
  log(f'Prepared {target}')
  return target


def build(data: Dataset, scratch: pathlib.Path, shrink: int, log: Log,
          rules: PixelRules = PixelRules()) -> tuple[Any, list[str]]:
  """Write the data set in `scratch`.

  Returns its TFDS DatasetInfo, whose data_dir is where it was written, and a line for each image
  that was left out.
  """
  from tensorflow_datasets.core import example_serializer, splits
  info, bad = _dataset_info(data, scratch), []
  place = pathlib.Path(info.data_dir)
  place.mkdir(parents=True)
  serializer = example_serializer.ExampleSerializer(info.features.get_serialized_info())
  work = functools.partial(encoded, shrink=shrink, rules=rules)

  def serialized(split: str) -> Iterator[tuple[int | str, bytes]]:
    good, damaged, lines = 0, [], []
    for example in map_in_order(work, data.splits[split]()):
      if isinstance(example.data, BadImage):
        name = os.path.join(data.places.get(split, split), str(example.key))
        lines.append(f'{printable(name)}: {example.data}')
        if example.data.reason == DAMAGED:
          damaged.append(lines[-1])
        continue
      good += 1
      values = {'image': example.data, 'file_name': str(example.key), 'label': example.label,
                **example.more}
      features = {name: values[name] for name in info.features}
      yield example.key, serializer.serialize_example(info.features.encode_example(features))
    bad.extend(lines)
    if not good:
      raise UserError(f'{data.name} {split}: no image {"can be read" if lines else "is there"}.',
                      'Check that this is the right archive or folder.',
                      BAD_DATA if damaged else USAGE)
    if too_many_unreadable(len(damaged), good + len(damaged)):
      raise unreadable_error(f'{data.name} {split}', len(damaged), good + len(damaged),
                             damaged[0], data.fix)

  infos = [_write_split(place, data, split, serialized(split), log) for split in data.splits]
  info.set_splits(splits.SplitDict(infos))
  info.write_to_directory(place)
  return info, bad


def _dataset_info(data: Dataset, scratch: pathlib.Path) -> Any:
  """The DatasetInfo of what will be written.

  It is the official one, or has an image, a file name and class labels as features.
  """
  import tensorflow_datasets as tfds
  from tensorflow_datasets.core import dataset_info
  class_features = {} if data.classes is None else {'label': data.classes, **data.more}
  if data.official:
    builder: Any = tfds.builder_cls(data.name)  # pyright does not know the arguments of a builder
    info = builder(data_dir=scratch, version=data.version, file_format='array_record').info
    for feature, names in class_features.items():
      info.features[feature].names = list(names)
    return info
  side = data.side or None
  features = tfds.features.FeaturesDict({
      'image': tfds.features.Image(shape=(side, side, 3)), 'file_name': tfds.features.Text(),
      **{name: tfds.features.ClassLabel(names=list(names))
         for name, names in class_features.items()}})
  identity = dataset_info.DatasetIdentity(
      name=data.name, version=tfds.core.Version(data.version), module_name=__name__,
      data_dir=os.fspath(scratch / data.name / data.version))
  info = tfds.core.DatasetInfo(builder=identity, features=features,
                               supervised_keys=('image', 'label') if class_features else None)
  info.set_file_format('array_record')
  return info


def _write_split(place: pathlib.Path, data: Dataset, split: str,
                 records: Iterable[tuple[int | str, bytes]], log: Log) -> Any:
  """Write a split in TFDS's order and in TFDS's number of files; returns its SplitInfo."""
  from array_record.python.array_record_module import ArrayRecordWriter
  from tensorflow_datasets.core import naming, splits
  from tensorflow_datasets.core.utils import shard_utils
  name = f'{data.name} {split}'
  buckets, count, size = spread(place, split, with_progress(name, records))
  ordered = with_progress(f'{name}, in order', in_key_order(buckets))
  shards = shard_utils.ShardConfig().get_number_shards(size, count)
  ends = [0, *shard_utils.get_shard_boundaries(count, shards)]
  lengths = [int(stop - start) for start, stop in itertools.pairwise(ends)]
  directory: Any = place  # TFDS takes a plain path too
  template = naming.ShardedFileTemplate(data_dir=directory, dataset_name=data.name, split=split,
                                        filetype_suffix='array_record')
  for i, length in enumerate(lengths):
    path = template.sharded_filepath(shard_index=i, num_shards=shards)
    writer = ArrayRecordWriter(str(path), 'group_size:1')
    for record in itertools.islice(ordered, length):
      writer.write(record)
    writer.close()
  next(ordered, None)  # so that the last bucket is deleted
  published = data.published.get(split, count)
  rest = f' of {published:,} that were published' if published != count else ''
  log(f'{name}: {count:,} images{rest}')
  return splits.SplitInfo(name=split, shard_lengths=lengths, num_bytes=size,
                          filename_template=template)


def publish(source: pathlib.Path, target: pathlib.Path) -> None:
  """Rename the folder `source` to `target`, after all of it is on disk.

  Where another process was first, its folder stays, and `source` is deleted.
  """
  for file in (*source.iterdir(), source):
    fd = os.open(file, os.O_RDONLY)
    try:
      os.fsync(fd)
    finally:
      os.close(fd)
  try:
    os.rename(source, target)
  except OSError:
    if not target.is_dir():
      raise
    shutil.rmtree(source)

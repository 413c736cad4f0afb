"""Any labelled images as a TFDS data set in array_record, streamed, without TensorFlow: whole, or not at all.

The order is TFDS's own, by a hash of each record's key, so that `train[:10%]` is a random tenth, and of the official data
sets the same tenth as everybody's.
"""
import collections
import contextlib
import functools
import itertools
import os
import pathlib
import shutil
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from equivariant_ssl.data import encode
from equivariant_ssl.data.decode import DAMAGED, BadImage, Reading
from equivariant_ssl.data.folder import printable
from equivariant_ssl.data.source import hopeless_data, listed, threads, too_many
from equivariant_ssl.errors import BAD_DATA, USAGE, UserError
from equivariant_ssl.storage.record import lock

BUCKETS = 200         # open files while a split is read; one of them at a time is in memory when it is put in order
SPARE = 1.03          # bytes on disk for one of the sources
YOUNG = 60.           # seconds in which a folder may be made and not locked yet
UNITS = {'GiB': 2**30, 'MiB': 2**20, 'KiB': 2**10}
HEAD = struct.Struct('>16sQ')   # before a record in a bucket: the hash of its key, its length

Log = Callable[[str], Any]


class Example(NamedTuple):
  """key: its file name within its split, else its number. data: the encoded image, or why there is none. more: other
  features."""
  key: int | str
  data: bytes | BadImage
  label: int
  more: dict[str, Any] = {}


class Dataset(NamedTuple):
  """classes: names in the order of the labels; None: unlabelled, or TFDS has them. splits: {name: () -> its examples}.
  bytes: of the sources, 0 where they are not known. more: {feature: its class names}. official: TFDS has it by this name,
  and its features are taken. side: of all images, 0 where they differ. published: {split: how many there should be}. places:
  {split: its folder}, to name images by. fix: what to do where many are broken. notes: what was left out and is odd, a line
  each."""
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
  fix: str = 'Is it whole? Get it anew, and try again.'
  notes: tuple[str, ...] = ()


def amount(count: int) -> str:
  """So many bytes, to be read."""
  unit = next((u for u in UNITS if count >= UNITS[u]), 'KiB')
  return f'{count / UNITS[unit]:.1f} {unit}'


def worked(example: Example, shrink: int, how: Reading) -> Example:
  """The example with its image made smaller, or as it is where it can be decoded; else with the reason why not."""
  try:
    return example._replace(data=encode.shrunk(example.data, shrink, how) if shrink
                            else encode.whole(example.data, how))
  except BadImage as e:
    return example._replace(data=e)


def in_order(work: Callable[[Example], Example], examples: Iterable[Example]) -> Iterator[Example]:
  """`work` of each, in threads, in the order of `examples`, a few ahead."""
  with ThreadPoolExecutor(threads()) as pool:
    ahead, rest = collections.deque(), iter(examples)
    for example in itertools.islice(rest, 4 * threads()):
      ahead.append(pool.submit(work, example))
    while ahead:
      yield ahead.popleft().result()
      ahead.extend(pool.submit(work, e) for e in itertools.islice(rest, 1))


def ticking(what: str, items: Iterable[Any]) -> Iterator[Any]:
  """The `items`, with a line every five seconds of how many there were, and how fast."""
  start = said = time.monotonic()
  for n, item in enumerate(items, 1):
    yield item
    if (now := time.monotonic()) - said > 5.:
      said = now
      print(f'{what}: {n:,} images, {n / (now - start):.0f} images/s', file=sys.stderr, flush=True)


@contextlib.contextmanager
def scratch(root: pathlib.Path, name: str) -> Iterator[pathlib.Path]:
  """A hidden folder in `root` for what is not whole yet; it goes, and so do those that killed processes have left."""
  for left in root.glob(f'.preparing-{name}-*'):
    with contextlib.suppress(UserError, OSError):  # another process is at it
      if time.time() - left.stat().st_mtime > YOUNG:
        with lock(left):
          shutil.rmtree(left)
  with tempfile.TemporaryDirectory(prefix=f'.preparing-{name}-', dir=root) as place, lock(place):
    yield pathlib.Path(place)


def write(data: Dataset, root: pathlib.Path, shrink: int = 0, log: Log = print, how: Reading = Reading()) -> pathlib.Path:
  """Write `root`/NAME/VERSION, which `tfds.data_source` reads; returns its path. shrink: > 0: the short side of every
  image, at most, all encoded anew. An image that cannot be decoded is left out and listed; more than 1 % are an error.
  What is there is kept; nothing half-written has that name. Raises UserError."""
  target = root / data.name / data.version
  for line in data.notes:
    log(line)
  if target.exists():
    log(f'{target} is there already: kept. (To make it anew, move it away.)')
    return target
  try:
    root.mkdir(parents=True, exist_ok=True)
    with scratch(root, data.name) as place:
      room, need = shutil.disk_usage(root).free, 0 if shrink else int(SPARE * data.bytes)
      if need > room:
        raise UserError(f'{data.name} takes {amount(need)}, and {root} has {amount(room)} left.',
                        'Say another place: --root DIR; or make the images smaller: --shrink 256')
      info, bad = build(data, place, shrink, log, how)
      target.parent.mkdir(exist_ok=True)
      publish(pathlib.Path(info.data_dir), target)
  except OSError as e:
    raise UserError(f'cannot write {data.name} under {root}: {e.strerror or e}.', 'Say another place: --root DIR') from e
  for line in listed('left out, for they cannot be read:', bad, len(bad)):
    log(line)
  log(f'Prepared {target}')
  return target


def build(data: Dataset, scratch: pathlib.Path, shrink: int, log: Log, how: Reading = Reading()) -> tuple[Any, list[str]]:
  """Write the data set below `scratch`. Returns its TFDS DatasetInfo, whose data_dir it is, and the images left out."""
  from tensorflow_datasets.core import example_serializer, splits
  info, bad = _info(data, scratch), []
  place = pathlib.Path(info.data_dir)
  place.mkdir(parents=True)
  serializer = example_serializer.ExampleSerializer(info.features.get_serialized_info())
  work = functools.partial(worked, shrink=shrink, how=how)

  def serialized(split: str) -> Iterator[tuple[int | str, bytes]]:
    good, damaged, names = 0, [], []
    for example in in_order(work, data.splits[split]()):
      if isinstance(example.data, BadImage):
        name = os.path.join(data.places.get(split, split), str(example.key))
        names.append(f'{printable(name)}: {example.data}')
        damaged += names[-1:] if example.data.reason == DAMAGED else []
        continue
      good += 1
      values = {'image': example.data, 'file_name': str(example.key), 'label': example.label, **example.more}
      yield example.key, serializer.serialize_example(info.features.encode_example(
          {k: values[k] for k in info.features}))
    bad.extend(names)
    if not good:
      raise UserError(f'{data.name} {split}: no image {"can be read" if names else "was found"}.',
                      'Is it the right archive or folder?', BAD_DATA if damaged else USAGE)
    if too_many(len(damaged), good + len(damaged)):
      raise hopeless_data(f'{data.name} {split}', len(damaged), good + len(damaged), damaged[0], data.fix)

  done = [_split(place, data, split, serialized(split), log) for split in data.splits]
  info.set_splits(splits.SplitDict(done))
  info.write_to_directory(place)
  return info, bad


def _info(data: Dataset, scratch: pathlib.Path) -> Any:
  """The DatasetInfo of what will be written: the official one, else of an image, a file name and class labels."""
  import tensorflow_datasets as tfds
  from tensorflow_datasets.core import dataset_info
  named = {} if data.classes is None else {'label': data.classes, **data.more}
  if data.official:
    info = tfds.builder_cls(data.name)(data_dir=scratch, version=data.version, file_format='array_record').info
    for feature, names in named.items():
      info.features[feature].names = list(names)
    return info
  side = data.side or None
  features = tfds.features.FeaturesDict({
      'image': tfds.features.Image(shape=(side, side, 3)), 'file_name': tfds.features.Text(),
      **{k: tfds.features.ClassLabel(names=list(names)) for k, names in named.items()}})
  who = dataset_info.DatasetIdentity(name=data.name, version=tfds.core.Version(data.version), module_name=__name__,
                                     data_dir=os.fspath(scratch / data.name / data.version))
  info = tfds.core.DatasetInfo(builder=who, features=features, supervised_keys=('image', 'label') if named else None)
  info.set_file_format('array_record')
  return info


def _split(place: pathlib.Path, data: Dataset, split: str, records: Iterable[tuple[int | str, bytes]], log: Log) -> Any:
  """Write a split in TFDS's order and in TFDS's number of files; what TFDS says of it."""
  from array_record.python.array_record_module import ArrayRecordWriter
  from tensorflow_datasets.core import naming, splits
  from tensorflow_datasets.core.utils import shard_utils
  buckets, count, size = _spread(place, split, ticking(f'{data.name} {split}', records))
  ordered = ticking(f'{data.name} {split}, in order', _ordered(buckets))
  shards = shard_utils.ShardConfig().get_number_shards(size, count)
  ends = [0, *shard_utils.get_shard_boundaries(count, shards)]
  lengths = [int(stop - start) for start, stop in itertools.pairwise(ends)]
  template = naming.ShardedFileTemplate(data_dir=place, dataset_name=data.name, split=split, filetype_suffix='array_record')
  for i, length in enumerate(lengths):
    writer = ArrayRecordWriter(str(template.sharded_filepath(shard_index=i, num_shards=shards)), 'group_size:1')
    for record in itertools.islice(ordered, length):
      writer.write(record)
    writer.close()
  next(ordered, None)  # the last bucket goes
  there = data.published.get(split, count)
  log(f'{data.name} {split}: {count:,} images' + f' of {there:,} that were published' * (there != count))
  return splits.SplitInfo(name=split, shard_lengths=lengths, num_bytes=size, filename_template=template)


def _spread(place: pathlib.Path, split: str, records: Iterable[tuple[int | str, bytes]]) -> tuple[list, int, int]:
  """Put the (key, record)s of a split in files by the rank of the hashes of their keys; (files, records, their bytes)."""
  from tensorflow_datasets.core import hashing
  hasher, count, size = hashing.Hasher(split), 0, 0
  paths = [place / f'{split}-{i}.bucket' for i in range(BUCKETS)]
  with contextlib.ExitStack() as stack:
    files = [stack.enter_context(open(path, 'wb')) for path in paths]
    for key, record in records:
      rank = hasher.hash_key(key)
      file = files[rank * BUCKETS >> 128]
      file.write(HEAD.pack(rank.to_bytes(16, 'big'), len(record)))
      file.write(record)
      count, size = count + 1, size + len(record)
  return paths, count, size


def _ordered(buckets: list[pathlib.Path]) -> Iterator[bytes]:
  """The records by the hashes of their keys, one bucket in memory at a time; each bucket is deleted when it was read."""
  for path in buckets:
    found, at, held = [], 0, memoryview(path.read_bytes())
    while at < len(held):
      rank, size = HEAD.unpack_from(held, at)
      found.append((rank, at + HEAD.size, at + HEAD.size + size))
      at = found[-1][2]
    found.sort()
    if any(a[0] == b[0] for a, b in itertools.pairwise(found)):
      raise UserError('two images of a split have the same name.', 'Is a file in the archive twice?')
    yield from (bytes(held[start:stop]) for _, start, stop in found)
    path.unlink()


def publish(made: pathlib.Path, target: pathlib.Path) -> None:
  """Give `made` its name, all at once and only when it is on disk; another process that was first is left alone."""
  for file in (*made.iterdir(), made):
    fd = os.open(file, os.O_RDONLY)
    try:
      os.fsync(fd)
    finally:
      os.close(fd)
  try:
    os.rename(made, target)
  except OSError:
    if not target.is_dir():
      raise
    shutil.rmtree(made)

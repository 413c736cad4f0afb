"""Any labelled images as a TFDS data set in array_record, streamed, without TensorFlow: whole, or not at all."""
import collections
import io
import itertools
import pathlib
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from PIL import Image

from equivariant_ssl.data.decode import BadImage, decode, open_image
from equivariant_ssl.data.source import hopeless_data, listed
from equivariant_ssl.data.stream import threads
from equivariant_ssl.errors import UserError

SHARD = 200 * 2**20   # bytes of a file, about
QUALITY = 95          # of a JPEG that is encoded anew
SPARE = 1.02          # bytes on disk for one of the sources


class Example(NamedTuple):
  """file_name: within its split. data: the encoded image, or why there is none. more: other features."""
  file_name: str
  data: bytes | BadImage
  label: int
  more: dict[str, Any] = {}


class Dataset(NamedTuple):
  """classes: names in the order of the labels; None: unlabelled. splits: {name: () -> its examples}. bytes: of the
  sources, 0 where they are not known. more: {feature: its class names} beside image, label and file_name."""
  name: str
  version: str
  classes: tuple[str, ...] | None
  splits: dict[str, Callable[[], Iterable[Example]]]
  bytes: int = 0
  more: dict[str, tuple[str, ...]] = {}


def shrunk(example: Example, side: int) -> Example:
  """The image in RGB with its short side `side` at most, as a JPEG; only ever smaller."""
  if isinstance(example.data, BadImage):
    return example
  try:
    pixels, _ = decode(example.data, None)
  except BadImage as e:
    return example._replace(data=e)
  image, short = Image.fromarray(pixels), min(pixels.shape[:2])
  if short > side:
    image = image.resize([round(n * side / short) for n in image.size], Image.Resampling.BICUBIC)
  out = io.BytesIO()
  image.save(out, 'JPEG', quality=QUALITY)
  return example._replace(data=out.getvalue())


def headed(example: Example) -> Example:
  """The example as it is, if its header is an image's."""
  if not isinstance(example.data, BadImage):
    try:
      open_image(io.BytesIO(example.data)).close()
    except BadImage as e:
      return example._replace(data=e)
  return example


def in_order(work: Callable[[Example], Example], examples: Iterable[Example]) -> Iterator[Example]:
  """`work` of each, in threads, in the order of `examples`, a few ahead."""
  with ThreadPoolExecutor(threads()) as pool:
    ahead, rest = collections.deque(), iter(examples)
    for example in itertools.islice(rest, 4 * threads()):
      ahead.append(pool.submit(work, example))
    while ahead:
      yield ahead.popleft().result()
      ahead.extend(pool.submit(work, e) for e in itertools.islice(rest, 1))


def write(data: Dataset, root: pathlib.Path, shrink: int = 0, log: Callable[[str], Any] = print) -> pathlib.Path:
  """Write `root`/NAME/VERSION, which `tfds.data_source` reads; returns its path. shrink: > 0: the short side of every
  image, at most, all encoded anew. An image that cannot be read is left out and listed; more than 1 % are an error. What
  is there is kept; nothing half-written has that name. Raises UserError."""
  target = root / data.name / data.version
  if target.exists():
    log(f'{target} is there already: kept. (To make it anew, move it away.)')
    return target
  try:
    target.parent.mkdir(parents=True, exist_ok=True)
    room, need = shutil.disk_usage(root).free, 0 if shrink else int(SPARE * data.bytes)
    if need > room:
      raise UserError(f'{data.name} takes {need / 2**30:.1f} GiB, and {root} has {room / 2**30:.1f} left.',
                      'Say another place: --root DIR; or make the images smaller: --shrink 256')
    with tempfile.TemporaryDirectory(prefix=f'.preparing-{data.name}-', dir=root) as scratch:
      place, bad = pathlib.Path(scratch) / 'made', []
      place.mkdir()
      work = (lambda e: shrunk(e, shrink)) if shrink else headed
      features, serializer = _features(data)
      splits = [_split(place, data, name, in_order(work, examples()), features, serializer, bad, log)
                for name, examples in data.splits.items()]
      _describe(place, data, features, splits)
      from equivariant_ssl.data.prepare import publish
      publish(place, target)
  except OSError as e:
    raise UserError(f'cannot write {data.name} under {root}: {e.strerror or e}.', 'Say another place: --root DIR') from e
  for line in listed('left out, for they cannot be read:', bad, len(bad)):
    log(line)
  log(f'Prepared {target}')
  return target


def _features(data: Dataset):
  import tensorflow_datasets as tfds
  from tensorflow_datasets.core import example_serializer
  named = {} if data.classes is None else {'label': data.classes}
  features = tfds.features.FeaturesDict({
      'image': tfds.features.Image(), 'file_name': tfds.features.Text(),
      **{k: tfds.features.ClassLabel(names=list(names)) for k, names in {**named, **data.more}.items()}})
  return features, example_serializer.ExampleSerializer(features.get_serialized_info())


def _split(place: pathlib.Path, data: Dataset, split: str, examples: Iterable[Example], features, serializer, bad: list[str],
           log: Callable[[str], Any]):
  """Write a split, a file after the other; what TFDS says of it."""
  from array_record.python.array_record_module import ArrayRecordWriter
  from tensorflow_datasets.core import naming, splits
  lengths, total, size, writer, start, said, wrong = [], 0, 0, None, time.monotonic(), time.monotonic(), 0
  for n, example in enumerate(examples, 1):
    if isinstance(example.data, BadImage):
      wrong += 1
      bad.append(f'{split}/{example.file_name}: {example.data}')
      continue
    if writer is None or size >= SHARD:
      if writer:
        writer.close()
      writer, size = ArrayRecordWriter(str(place / f'part-{split}-{len(lengths)}'), 'group_size:1'), 0
      lengths.append(0)
    label = {} if data.classes is None else {'label': example.label}
    record = serializer.serialize_example(features.encode_example(
        {'image': example.data, 'file_name': example.file_name, **label, **example.more}))
    writer.write(record)
    lengths[-1] += 1
    size, total = size + len(record), total + len(record)
    if (now := time.monotonic()) - said > 5.:
      said = now
      print(f'{data.name} {split}: {n:,} images, {n / (now - start):.0f} images/s', file=sys.stderr, flush=True)
  if writer:
    writer.close()
  count = sum(lengths)
  if not count or wrong > max(1, .01 * (count + wrong)):
    if wrong:
      raise hopeless_data(f'{data.name} {split}', wrong, count + wrong, bad[-wrong])
    raise UserError(f'{data.name} {split}: no image was found.', 'Is it the right archive or folder?')
  for i in range(len(lengths)):
    (place / f'part-{split}-{i}').rename(place / f'{data.name}-{split}.array_record-{i:05d}-of-{len(lengths):05d}')
  log(f'{data.name} {split}: {count:,} images in {len(lengths)} files')
  template = naming.ShardedFileTemplate(data_dir=place, dataset_name=data.name, split=split, filetype_suffix='array_record')
  return splits.SplitInfo(name=split, shard_lengths=lengths, num_bytes=total, filename_template=template)


def _describe(place: pathlib.Path, data: Dataset, features, found: list) -> None:
  """dataset_info.json and features.json, as TFDS writes them."""
  import tensorflow_datasets as tfds
  from tensorflow_datasets.core import dataset_info, splits
  who = dataset_info.DatasetIdentity(name=data.name, version=tfds.core.Version(data.version), data_dir=place,
                                     module_name=__name__)
  info = tfds.core.DatasetInfo(builder=who, features=features,
                               supervised_keys=None if data.classes is None else ('image', 'label'))
  info.set_file_format('array_record')
  info.set_splits(splits.SplitDict(found))
  info.write_to_directory(place)

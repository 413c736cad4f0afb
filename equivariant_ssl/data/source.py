"""What a data set is in memory, and how canvases are filled when some records turn out to be unreadable."""
import hashlib
import shlex
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from equivariant_ssl.data.decode import BadImage, Reading, decode
from equivariant_ssl.errors import BAD_DATA, UserError
from equivariant_ssl.parallel import sharding

MEMORY = 8 * 2**30   # bytes of canvases that one data set may take
CHUNK = 256          # records that a thread takes at a time, at most
LISTED = 20          # problems written out one by one
REPLACED = 'unreadable when decoded, another record of the split in the place of each:'
FLOOR = 1 / 255      # under a channel's standard deviation: one that is constant stays finite when it is normalised
FLAT = 2             # of 255: an image whose channels all vary by less shows nothing

Moments = tuple[tuple[float, ...], tuple[float, ...]]   # (mean, std) of the channels


class Split(NamedTuple):
  """`images` uint8 [N S S 3], `sizes` float32 [N 2] the true (height, width), `labels` int32 [N] or None. images, sizes:
  arrays, or, of data that do not fit in memory, `stream.Canvases` and its sizes, which are decoded as they are asked for."""
  images: Any
  sizes: Any
  labels: np.ndarray | None


class Source(NamedTuple):
  """A data set: `mean` and `std` (red, green, blue) normalise pixels in [0, 1]; `problems` says in a line each
  what was left out or replaced. names: the file of each training image, where they have one, else None. files: a digest
  of the names and sizes in bytes of each split's files (training, test), '' where it has none. place: (field, value) of the
  config's `data` that find these data from any folder. labelled: a split whose labels an evaluation reads in the place of
  the training split's, of which some images have none (STL-10). left_out: how many files and folders were left out or
  replaced, by reason: an extension, or words such as 'damaged'."""
  name: str
  train: Split
  test: Split | None
  classes: tuple[str, ...] | None
  mean: tuple[float, float, float]
  std: tuple[float, float, float]
  problems: tuple[str, ...] = ()
  names: tuple[str, ...] | None = None
  files: tuple[str, str] = ('', '')
  place: tuple[tuple[str, str], ...] = ()
  labelled: Split | None = None
  left_out: dict[str, int] = {}

  @property
  def bank(self) -> Split:
    """The training images whose labels an evaluation reads."""
    return self.labelled or self.train


class Records(NamedTuple):
  """N records not yet decoded: `read(indices)` gives the encoded image of each, or the BadImage why not. names: what to
  call one; files: their file names, where the data set has them. labels and files may be known only when all are read. how:
  their pixels are read."""
  names: Callable[[int], str]
  read: Callable[[range], Iterable[bytes | BadImage]]
  labels: np.ndarray | None
  count: int
  files: np.ndarray | None = None
  how: Reading = Reading()


def moments(images: np.ndarray) -> Moments:
  """Mean and standard deviation of each channel of uint8 [N S S C], in [0, 1]; exact, from histograms; the deviation FLOOR
  at least."""
  counts = np.zeros((images.shape[-1], 256))
  for start in range(0, len(images), CHUNK):
    for c, channel in enumerate(counts):
      channel += np.bincount(images[start:start + CHUNK, ..., c].reshape(-1), minlength=256)
  values, weights = np.arange(256) / 255., counts / counts.sum(axis=1, keepdims=True)
  mean = weights @ values
  variance = (weights * (values - mean[:, None])**2).sum(axis=1)
  return tuple(mean.tolist()), tuple(np.maximum(np.sqrt(variance), FLOOR).tolist())


class Content(NamedTuple):
  """What there is to see in images: how many, how many of them are of one colour throughout, the largest value of all, and
  the mean of each channel and of its square, in [0, 1]."""
  count: int
  flat: int
  most: int
  mean: np.ndarray
  square: np.ndarray


def content(images: np.ndarray, normal: Moments) -> Content:
  """The Content of uint8 [N S S C], whose `moments` are known."""
  flat, most, (mean, std) = 0, 0, np.asarray(normal)
  for start in range(0, len(images), CHUNK):
    rows = images[start:start + CHUNK]
    high, low = rows.max(axis=(1, 2)), rows.min(axis=(1, 2))
    flat, most = flat + int((high - low <= FLAT).all(axis=1).sum()), max(most, int(high.max()))
  return Content(len(images), flat, most, mean, std**2 + mean**2)


def together(found: Sequence[Content]) -> Content:
  """The Content of several sets of as many images."""
  count, flat, most, mean, square = zip(*found, strict=True)
  return Content(sum(count), sum(flat), max(most), np.mean(mean, 0), np.mean(square, 0))


def remarks(found: Content, options: str = '--config.data.') -> tuple[str, ...]:
  """What a user would want to know of images that hardly show anything, a line each. options: what goes before the names of
  `background` and `bits`."""
  still = np.sqrt(np.maximum(found.square - found.mean**2, 0.)) <= 1.01 * FLOOR
  still = [name for name, one in zip(('red', 'green', 'blue'), still, strict=True) if one]
  lines = []
  if found.flat:
    lines.append(f'{found.flat:,} of {found.count:,} images are of one colour throughout and show nothing; where they are '
                 f'drawn in transparency, a colour under it shows them: {options}background=white')
  if 0 < found.most < 1.15 * 64:  # a sharp edge that is resized goes so far beyond its values
    bits = next(b for b in (10, 12, 14) if b >= 8 + int(found.most / 1.15).bit_length())
    lines.append(f'no pixel is brighter than {found.most} of 255; where grey images hold {bits} bits in 16, '
                 f'{options}bits={bits} makes them as bright as they are')
  if still and found.most:
    lines.append(f'the {" and ".join(still)} {"channel is" if len(still) == 1 else "channels are"} the same in all pixels, '
                 'or nearly: normalised by 1/255, not by a deviation of nothing')
  return tuple(lines)


def measured(normal: Moments | None, images: Callable[[], np.ndarray]) -> tuple[Moments, tuple[str, ...]]:
  """(the (mean, std) that are known, else those of `images`; what is odd about these, a line each)."""
  if normal:
    return normal, ()
  seen = images()
  found = moments(seen)
  return found, remarks(content(seen, found))


def listing(files: Iterable[tuple]) -> str:
  """A short digest of the files of a split in their order: their names, whatever form of Unicode a disk gives them, and
  numbers, the size in bytes first."""
  found = hashlib.sha256()
  for name, *numbers in files:
    found.update(f'{unicodedata.normalize("NFC", name)}\0{numbers}\n'.encode('utf-8', 'surrogateescape'))
  return found.hexdigest()[:16]


def fits(count: int, size: int) -> bool:
  """Whether `count` canvases of side `size` may be kept in memory."""
  return count * size * size * 3 <= MEMORY


def threads() -> int:
  """How many decode: they do so without the interpreter lock."""
  return min(32, max(2, sharding.count_cores()))


def in_chunks(work: Callable[[range], list], count: int) -> list:
  """`work` on the ranges that make up `count` records, in threads, its lists joined in order.

  Chunks, because handing over one small record costs as much as it.
  """
  chunk = max(1, min(CHUNK, count // (4 * threads())))
  with ThreadPoolExecutor(threads()) as pool:
    parts = pool.map(work, (range(start, min(start + chunk, count)) for start in range(0, count, chunk)))
    return [item for part in parts for item in part]


def others(i: int, count: int) -> Iterator[int]:
  """The records, of `count`, to read in the place of record i, in turn: drawn from its own index, the same in every run."""
  draws = np.random.default_rng(i)
  while True:
    yield int(draws.integers(count))


def substitutes(bad: Iterable[int], count: int) -> dict[int, int]:
  """For each unreadable record, the first of its `others` among the `count` that is not."""
  bad = set(bad)
  if len(bad) == count:
    return {}
  return {i: next(j for j in others(i, count) if j not in bad) for i in sorted(bad)}


def fill(records: Records, size: int) -> tuple[Split, list[tuple[int, str]]]:
  """Decode every record to a canvas of side `size`; an unreadable one gets another in its place.

  Returns the split, and (index, reason) of those replaced.
  """
  images = np.zeros((records.count, size, size, 3), np.uint8)
  sizes = np.ones((records.count, 2), np.float32)

  def work(indices: range) -> list[tuple[int, str]]:
    bad = []
    for i, data in zip(indices, records.read(indices), strict=True):
      try:
        images[i], sizes[i] = decode(data, size, records.how)
      except BadImage as e:
        bad.append((i, str(e)))
    return bad

  bad = in_chunks(work, records.count)
  labels = None if records.labels is None else records.labels.copy()
  for i, j in substitutes((i for i, _ in bad), records.count).items():
    images[i], sizes[i] = images[j], sizes[j]
    if labels is not None:
      labels[i] = labels[j]
  if labels is not None and (labels < 0).any():
    labels = None
  return Split(images, sizes, labels), bad


def too_many(bad: int, total: int) -> bool:
  """Whether so many images that cannot be read end a command: more than 1 %, and more than one."""
  return bad > max(1, .01 * total) or bad == total > 0


def hopeless_data(name: str, bad: int, total: int, first: str, fix: str) -> UserError:
  """The error of data of which more than 1 % cannot be decoded."""
  return UserError(f'{name}: {bad:,} of {total:,} images cannot be decoded, more than 1 %; '
                   f'the first is {first.removesuffix(".")}.', fix, BAD_DATA)


def to_check(what: str) -> str:
  """The advice on broken images. what: a folder, or the directory of a prepared data set."""
  return f'Run `eqssl data check {shlex.quote(what)}` to list them, and remove or repair them.'


def listed(what: str, lines: list[str], most: int = LISTED) -> tuple[str, ...]:
  """`what`, counted, then the first `most` of `lines`; nothing where there are none."""
  if not lines:
    return ()
  rest = [f'  and {len(lines) - most:,} more'] if len(lines) > most else []
  return (f'{len(lines):,} {what}', *(f'  {line}' for line in lines[:most]), *rest)


def load(name: str, train: Records, test: Records | None, size: int, lost: Sequence[str] = ()
         ) -> tuple[Split, Split | None, list[str]]:
  """Decode both splits of `name`, the path of the data. lost: images that are left out already, for they cannot be read, a
  line each. Returns the splits, and a line for each image replaced; more than 1 % unreadable (and more than one image) are
  a UserError with the code BAD_DATA."""
  total = train.count + (test.count if test else 0) + len(lost)
  splits, lines, hopeless = [], [], False
  for records in (train, test):
    split, bad = fill(records, size) if records else (None, [])
    splits.append(split)
    lines += [f'{records.names(i)}: {reason}' for i, reason in bad]
    hopeless |= bool(bad) and len(bad) == records.count
  every = [*lost, *lines]
  if hopeless or too_many(len(every), total):
    raise hopeless_data(name, len(every), total, every[0], to_check(name))
  return *splits, lines

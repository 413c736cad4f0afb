"""What a data set is in memory, and how canvases are filled when some records turn out to be unreadable."""
import hashlib
import shlex
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from equivariant_ssl import shard
from equivariant_ssl.data.decode import BadImage, decode
from equivariant_ssl.errors import BAD_DATA, UserError

MEMORY = 8 * 2**30   # bytes of canvases that one data set may take
CHUNK = 256          # records that a thread takes at a time, at most
LISTED = 20          # problems written out one by one

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
  the training split's, of which some images have none (STL-10)."""
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

  @property
  def bank(self) -> Split:
    """The training images whose labels an evaluation reads."""
    return self.labelled or self.train


class Records(NamedTuple):
  """N records not yet decoded: `read(indices)` gives the encoded image of each, or the BadImage why not. names: what to
  call one; files: their file names, where the data set has them. labels and files may be known only when all are read."""
  names: Callable[[int], str]
  read: Callable[[range], Iterable[bytes | BadImage]]
  labels: np.ndarray | None
  count: int
  files: np.ndarray | None = None


def moments(images: np.ndarray) -> Moments:
  """Mean and standard deviation of each channel of uint8 [N S S C], in [0, 1]; exact, from histograms."""
  counts = np.zeros((images.shape[-1], 256))
  for start in range(0, len(images), CHUNK):
    for c, channel in enumerate(counts):
      channel += np.bincount(images[start:start + CHUNK, ..., c].reshape(-1), minlength=256)
  values, weights = np.arange(256) / 255., counts / counts.sum(axis=1, keepdims=True)
  mean = weights @ values
  variance = (weights * (values - mean[:, None])**2).sum(axis=1)
  return tuple(mean.tolist()), tuple(np.sqrt(variance).tolist())


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
  return min(32, max(2, shard.cores()))


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
        images[i], sizes[i] = decode(data, size)
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


def load(name: str, train: Records, test: Records | None, size: int) -> tuple[Split, Split | None, tuple[str, ...]]:
  """Decode both splits of `name`, the path of the data. Returns them and the problems; more than 1 % unreadable (and more
  than one record) is a UserError with the code BAD_DATA."""
  total = train.count + (test.count if test else 0)
  splits, lines, hopeless = [], [], False
  for records in (train, test):
    split, bad = fill(records, size) if records else (None, [])
    splits.append(split)
    lines += [f'{records.names(i)}: {reason}' for i, reason in bad]
    hopeless |= bool(bad) and len(bad) == records.count
  if hopeless or len(lines) > max(1, .01 * total):
    raise hopeless_data(name, len(lines), total, lines[0], to_check(name))
  return *splits, listed('unreadable when decoded, another record of the split in the place of each:', lines)

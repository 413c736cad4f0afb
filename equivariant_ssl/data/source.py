"""What a data set is in memory, and how its records are decoded when some are unreadable."""
import hashlib
import itertools
import shlex
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from equivariant_ssl.data.decode import BadImage, PixelRules, decode
from equivariant_ssl.errors import BAD_DATA, UserError
from equivariant_ssl.parallel import sharding

MEMORY = 8 * 2**30   # bytes of canvases that one data set may take
CHUNK = 256          # records that a thread takes at a time, at most
TRIES = 100          # records that are tried in place of one before the data are given up
LISTED = 20          # problems that are written out one by one
REPLACED = 'unreadable when decoded, each replaced by another image of its split:'


class Split(NamedTuple):
  """The images of one split.

  images: uint8 [N S S 3]. sizes: float32 [N 2], the true (height, width). Both are arrays, or, for
          data that do not fit in memory, a `stream.Canvases` and its `stream.Sizes`, which decode
          the rows that are indexed.
  labels: int32 [N], or None.

  >>> es.Split(np.zeros((2, 16, 16, 3), 'uint8'), np.full((2, 2), 16, 'float32'), None).labels
  """
  images: Any
  sizes: Any
  labels: np.ndarray | None


class Source(NamedTuple):
  """A data set.

  mean, std: (red, green, blue), by which pixels in [0, 1] are normalized.
  problems:  what was left out or replaced, in one line each.
  names:     the file of each training image, or None where they have no files.
  files:     a digest of the names and the sizes in bytes of the files of the training and the test
             split; '' for a split without files.
  place:     the (field, value)s of the config's `data` that find these data from any folder.
  labeled:   the split whose labels an evaluation reads in place of the training split's, where some
             training images have no label (STL-10).
  left_out:  how many files and folders were left out or replaced, by reason. A reason is a file
             extension, or words such as 'damaged'.

  >>> images, sizes = np.zeros((4, 16, 16, 3), 'uint8'), np.full((4, 2), 16, 'float32')
  >>> train = es.Split(images, sizes, np.array([0, 1, 0, 1], 'int32'))
  >>> mine = es.Source('mine', train, None, ('cat', 'dog'), (.5, .5, .5), (.25, .25, .25))
  >>> mine.bank.images.shape
  (4, 16, 16, 3)
  """
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
  labeled: Split | None = None
  left_out: dict[str, int] = {}

  @property
  def bank(self) -> Split:
    """The training images whose labels an evaluation reads."""
    return self.labeled or self.train


class Records(NamedTuple):
  """N records that are not yet decoded.

  names:  the function from an index to what the record is called.
  read:   the function from a range of indices to the encoded images; a BadImage stands in the place
          of one that cannot be read, and says why.
  labels: int32 [N], or None. They may be known only after all records are read.
  count:  N.
  files:  [N] the file names, or None. They may be known only after all records are read.
  rules:  how their pixels become 8-bit RGB.
  """
  names: Callable[[int], str]
  read: Callable[[range], Iterable[bytes | BadImage]]
  labels: np.ndarray | None
  # The field hides a method of tuple that nobody calls.
  count: int  # pyright: ignore[reportIncompatibleMethodOverride]
  files: np.ndarray | None = None
  rules: PixelRules = PixelRules()


def files_digest(files: Iterable[tuple]) -> str:
  """A short digest of the files of a split, in their order: 16 hexadecimal digits.

  files: (name, numbers ...) of each file; the first number is its size in bytes. The digest does
  not depend on the form of Unicode in which a disk stores the names.
  """
  digest = hashlib.sha256()
  for name, *numbers in files:
    line = f'{unicodedata.normalize("NFC", name)}\0{numbers}\n'
    digest.update(line.encode('utf-8', 'surrogateescape'))
  return digest.hexdigest()[:16]


def fits_in_memory(count: int, size: int) -> bool:
  """Whether `count` canvases of side `size` may be kept in memory."""
  return count * size * size * 3 <= MEMORY


def thread_count() -> int:
  """The number of threads that decode. Decoders release the interpreter lock."""
  return min(32, max(2, sharding.count_cores()))


def map_chunks(work: Callable[[range], list], count: int) -> list:
  """The joined results of `work` on the ranges of indices that make up `count` records, in order.

  The ranges are worked on in threads. They are chunks, because it takes as long to hand one small
  record to a thread as to decode it.
  """
  chunk = max(1, min(CHUNK, count // (4 * thread_count())))
  ranges = (range(start, min(start + chunk, count)) for start in range(0, count, chunk))
  with ThreadPoolExecutor(thread_count()) as pool:
    return [item for part in pool.map(work, ranges) for item in part]


def replacements(index: int, count: int) -> Iterator[int]:
  """The records to try, one after the other, in place of record `index` of `count`.

  They are drawn from the index alone, so that they are the same in every run.
  """
  draws = np.random.default_rng(index)
  while True:
    yield int(draws.integers(count))


class Decoded(NamedTuple):
  """What was decoded in the place of one record.

  canvas: uint8 [S S 3], or None where TRIES records in a row cannot be read.
  size:   the true (height, width).
  index:  the record that was decoded: the one that was asked for, or the one that replaces it.
  bad:    (index, reason) of each record that cannot be read.
  waited: seconds that the storage took to give the records, without the work of the processor.
  """
  canvas: np.ndarray | None
  size: tuple[int, int]
  # The field hides a method of tuple that nobody calls.
  index: int  # pyright: ignore[reportIncompatibleMethodOverride]
  bad: tuple[tuple[int, str], ...] = ()
  waited: float = 0.


def decode_record(records: Records, size: int, first: int) -> Decoded:
  """Decode record `first` to a canvas of side `size`, or else the first readable replacement."""
  bad, waited = [], 0.
  for index in itertools.chain((first,), itertools.islice(replacements(first, records.count),
                                                          TRIES - 1)):
    try:
      start, busy = time.perf_counter(), time.thread_time()
      data, = records.read(range(index, index + 1))
      waited += max(time.perf_counter() - start - (time.thread_time() - busy), 0.)
      canvas, shape = decode(data, size, records.rules)
      return Decoded(canvas, shape, index, tuple(bad), waited)
    except BadImage as error:
      bad.append((index, str(error)))
  return Decoded(None, (0, 0), first, tuple(bad), waited)


def substitutes(bad: Iterable[int], count: int) -> dict[int, int]:
  """{index of an unreadable record: the first of its `replacements` that is readable}."""
  bad = set(bad)
  if len(bad) == count:
    return {}
  return {i: next(j for j in replacements(i, count) if j not in bad) for i in sorted(bad)}


def decode_records(records: Records, size: int) -> tuple[Split, list[tuple[int, str]]]:
  """Decode every record to a canvas of side `size`, and replace each unreadable one by another.

  Returns the split, and the (index, reason) of each record that was replaced.
  """
  images = np.zeros((records.count, size, size, 3), np.uint8)
  sizes = np.ones((records.count, 2), np.float32)

  def work(indices: range) -> list[tuple[int, str]]:
    bad = []
    for i, data in zip(indices, records.read(indices), strict=True):
      try:
        images[i], sizes[i] = decode(data, size, records.rules)
      except BadImage as error:
        bad.append((i, str(error)))
    return bad

  bad = map_chunks(work, records.count)
  labels = None if records.labels is None else records.labels.copy()
  for i, j in substitutes((i for i, _ in bad), records.count).items():
    images[i], sizes[i] = images[j], sizes[j]
    if labels is not None:
      labels[i] = labels[j]
  if labels is not None and (labels < 0).any():
    labels = None
  return Split(images, sizes, labels), bad


def too_many_unreadable(bad: int, total: int) -> bool:
  """Whether `bad` unreadable images of `total` end a command: more than 1 %, and more than one."""
  return bad > max(1, .01 * total) or bad == total > 0


def unreadable_error(name: str, bad: int, total: int, first: str, fix: str) -> UserError:
  """The error for data of which more than 1 % cannot be decoded. first: the first problem."""
  return UserError(f'{name}: {bad:,} of {total:,} images cannot be decoded, which is more than '
                   f'1 %. The first is {first.removesuffix(".")}.', fix, BAD_DATA)


def check_advice(path: str) -> str:
  """The advice on broken images. path: a folder of images, or a prepared data set's directory."""
  return (f'Run `eqssl data check {shlex.quote(path)}` to list the broken images, and remove or '
          'repair them.')


def counted_list(title: str, lines: list[str], most: int = LISTED) -> tuple[str, ...]:
  """The number of `lines` and `title`, then the first `most` lines. Empty where there are none."""
  if not lines:
    return ()
  rest = [f'  and {len(lines) - most:,} more'] if len(lines) > most else []
  return (f'{len(lines):,} {title}', *(f'  {line}' for line in lines[:most]), *rest)


def decode_splits(name: str, train: Records, test: Records | None, size: int,
                  lost: Sequence[str] = ()) -> tuple[Split, Split | None, list[str]]:
  """Decode the training and the test split to canvases of side `size`.

  name: the path of the data. lost: one line for each image that is already left out because it
  cannot be read. Returns both splits, and one line for each image that was replaced. Raises
  UserError (BAD_DATA) where more than 1 % of the images, and more than one, are unreadable.
  """
  total = train.count + (test.count if test else 0) + len(lost)
  splits, replaced, hopeless = [], [], False
  for records in (train, test):
    if records is None:
      splits.append(None)
      continue
    split, bad = decode_records(records, size)
    splits.append(split)
    replaced += [f'{records.names(i)}: {reason}' for i, reason in bad]
    hopeless |= bool(bad) and len(bad) == records.count
  problems = [*lost, *replaced]
  if hopeless or too_many_unreadable(len(problems), total):
    raise unreadable_error(name, len(problems), total, problems[0], check_advice(name))
  return splits[0], splits[1], replaced

"""Data that do not fit in memory: their canvases are decoded when they are needed.

Training reads them in batches, which threads decode ahead of the step (see assembly).
"""
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding

from equivariant_ssl.data.assembly import Assembly, Decoders
from equivariant_ssl.data.source import (
  MEMORY,
  TRIES,
  Decoded,
  Records,
  Split,
  check_advice,
  decode_record,
  fits_in_memory,
  thread_count,
  too_many_unreadable,
  unreadable_error,
)
from equivariant_ssl.errors import BAD_DATA, UserError
from equivariant_ssl.parallel.sharding import flatten_canvases

AHEAD = 2          # batches on the device before they are needed
MOMENTS = 4096     # canvases from which the mean and the deviation of a stream are measured
REPORTED = 5       # unreadable records that are named


class Canvases:
  """uint8 canvases [N S S 3] that are decoded when they are indexed: `images[rows]`, as an array.

  An unreadable record is replaced by another one. It is drawn from the record's own index, so that
  it is the same in every run, and its label goes into `labels` and `row_labels`.

  name:   the path of the data.
  rows:   the indices of the records; all records by default.
  labels: int32, one label for each record, or None.
  lost:   the number of images that were left out before. They count where too many are unreadable.
  row_labels: the labels of `rows`, which follow `labels`; None for none.
  """
  dtype, ndim = np.dtype(np.uint8), 4

  def __init__(self, name: str, records: Records, size: int, rows: np.ndarray | None = None,
               labels: np.ndarray | None = None, lost: int = 0,
               row_labels: np.ndarray | None = None):
    self.name, self.records, self.side, self.labels = name, records, size, labels
    self.lost, self.row_labels = lost, row_labels
    self.rows = np.arange(records.count) if rows is None else rows
    self.bad: dict[int, str] = {}
    self.lock = threading.Lock()
    self.last: tuple[np.ndarray, tuple[np.ndarray, np.ndarray]] | None = None

  def __len__(self) -> int:
    return len(self.rows)

  @property
  def shape(self) -> tuple[int, int, int, int]:
    return len(self), self.side, self.side, 3

  def part(self, rows: np.ndarray, row_labels: np.ndarray | None = None) -> 'Canvases':
    """The canvases at `rows` (indices or a mask), not yet decoded. row_labels: their labels."""
    return Canvases(self.name, self.records, self.side, self.rows[rows], self.labels, self.lost,
                    row_labels)

  def one(self, i: int) -> tuple[np.ndarray, np.ndarray]:
    """Canvas i [S S 3] and its true (height, width) float32.

    Raises UserError (BAD_DATA) where too many records are unreadable.
    """
    first = int(self.rows[i])
    return self.accept(first, decode_record(self.records, self.side, first))

  def accept(self, first: int, decoded: Decoded) -> tuple[np.ndarray, np.ndarray]:
    """The canvas and the size of what was decoded for record `first`.

    What cannot be read is reported, and the label is set of a record that another one replaces.
    Raises UserError (BAD_DATA) where too many records are unreadable.
    """
    for index, why in decoded.bad:
      self.report(index, why)
    if decoded.canvas is None:
      raise UserError(f'{self.name}: {TRIES} records in a row cannot be read.',
                      check_advice(self.name), BAD_DATA)
    if self.labels is not None and decoded.index != first:
      self.labels[first] = self.labels[decoded.index]
      if self.row_labels is not None:
        self.row_labels[self.rows == first] = self.labels[first]
    return decoded.canvas, np.asarray(decoded.size, np.float32)

  def report(self, index: int, why: str) -> None:
    """Note that a record is unreadable, and print it once.

    Raises UserError where more than 1 % of the records are unreadable.
    """
    with self.lock:
      if index in self.bad:
        return
      self.bad[index] = why
      bad, total = len(self.bad) + self.lost, self.records.count + self.lost
      if too_many_unreadable(bad, total):
        first = next(iter(self.bad))
        raise unreadable_error(self.name, bad, total,
                               f'{self.records.names(first)}: {self.bad[first]}',
                               check_advice(self.name))
      if len(self.bad) <= REPORTED:
        print(f'{self.records.names(index)}: {why}; another record replaces it', file=sys.stderr)

  def read(self, rows) -> tuple[np.ndarray, np.ndarray]:
    """The canvases [n S S 3] and the true sizes [n 2] of a slice, of indices or of a mask.

    They are decoded in threads.
    """
    indices = np.arange(len(self))[rows]
    with self.lock:
      last = self.last
    if last is not None and np.array_equal(last[0], indices):  # images[rows], then sizes[rows]
      return last[1]
    if not fits_in_memory(len(indices), self.side):
      raise UserError(
          f'{self.name}: this needs {len(indices):,} decoded images in memory at once.',
          f'At most {MEMORY / 2**30:.0f} GiB are kept: use a smaller --config.data.size, or fewer '
          'images.')
    with ThreadPoolExecutor(thread_count()) as pool:
      decoded = list(pool.map(self.one, indices))
    if decoded:
      images = np.stack([canvas for canvas, _ in decoded])
      sizes = np.stack([size for _, size in decoded])
    else:
      images, sizes = np.zeros((0, *self.shape[1:]), np.uint8), np.zeros((0, 2), np.float32)
    with self.lock:
      self.last = indices, (images, sizes)
    return images, sizes

  def fetch(self, rows) -> tuple[np.ndarray, np.ndarray]:
    """`one` for a number, `read` for any other index."""
    if np.ndim(rows) == 0 and not isinstance(rows, slice):
      return self.one(int(rows))
    return self.read(rows)

  def __getitem__(self, rows) -> np.ndarray:
    return self.fetch(rows)[0]

  def __array__(self, dtype=None, copy=None) -> np.ndarray:
    return self[:].astype(dtype or np.uint8, copy=False)


class Sizes:
  """The true sizes [N 2] of `canvases`, which are read when they are indexed."""
  dtype, ndim = np.dtype(np.float32), 2

  def __init__(self, canvases: Canvases):
    self.canvases, self.shape = canvases, (len(canvases), 2)

  def __len__(self) -> int:
    return len(self.canvases)

  def __getitem__(self, rows) -> np.ndarray:
    return self.canvases.fetch(rows)[1]

  def __array__(self, dtype=None, copy=None) -> np.ndarray:
    return self[:].astype(dtype or np.float32, copy=False)


def is_stream(images: Any) -> bool:
  """Whether `images` are a stream, whose rows are decoded when they are indexed."""
  return isinstance(images, Canvases | Sizes)


def take_rows(split: Split, rows: np.ndarray) -> Split:
  """The part of a split at `rows`; the images of a stream are not decoded."""
  labels = None if split.labels is None else split.labels[rows]
  if not is_stream(split.images):
    return Split(split.images[rows], split.sizes[rows], labels)
  images = split.images.part(rows, labels)
  return Split(images, Sizes(images), labels)


def lazy_split(name: str, records: Records, size: int, labels: np.ndarray | None,
               lost: int = 0) -> Split:
  """The split of `records` as a stream of canvases of side `size`.

  lost: the number of images that were left out before.
  """
  canvases = Canvases(name, records, size, labels=labels, lost=lost)
  return Split(canvases, Sizes(canvases), labels)


def sample(canvases: Canvases) -> np.ndarray:
  """MOMENTS of the canvases, or all where they are fewer, chosen by a fixed draw.

  The mean and the standard deviation of a stream are measured on them.
  """
  count = min(MOMENTS, len(canvases))
  rows = np.random.default_rng(0).choice(len(canvases), count, replace=False)
  return canvases[np.sort(rows)]


def batches(split: Split, rows: Callable[[int], np.ndarray], start: int, stop: int,
            decoders: Decoders | None = None
            ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
  """The batches of the steps from `start` to `stop`, decoded ahead in threads (see assembly).

  rows:     the function from a step to the rows [n] of its batch. It is called in a thread.
  decoders: how many threads and processes decode; None where this is measured as they work. The
            batches are the same in any case.

  A batch is images [n S S 3], sizes [n 2] and labels [n] int32, which are 0 where there are none.
  The position in the data is the step, so there is nothing to save.
  """
  if start >= stop:
    return
  assembly = Assembly(split.images, rows, range(start, stop), decoders)
  try:
    for _ in range(start, stop):
      taken, images, sizes = assembly.take()
      labels = np.zeros(len(taken), np.int32) if split.labels is None else split.labels[taken]
      yield images, sizes, labels.astype(np.int32, copy=False)
  finally:
    assembly.close()


class Rows(NamedTuple):
  """The data of one step of an evaluation.

  Its batch is `order[start:start + batch]` of the images, the sizes and the labels. The images are
  `sharding.flatten_canvases` of the canvases.
  """
  images: Any
  sizes: Any
  labels: Any
  order: Any
  start: int


def epoch_rows(split: Split, order: Callable[[int], np.ndarray], batch: int, per_epoch: int,
               steps: int, place: Callable) -> Iterator[Rows]:
  """The Rows of `steps` steps.

  Data in memory are placed on the devices once, with the order of each epoch. Of a stream only the
  step's batch is placed.

  order: the function from an epoch to the order [>= per_epoch x batch] of its images.
  place: the function that puts a pytree of arrays on the devices.
  """
  order = lru_cache(2)(order)
  if not is_stream(split.images):
    images, sizes, labels = place((flatten_canvases(split.images), *split[1:]))
    for epoch in range(-(-steps // per_epoch)):
      placed_order = place(order(epoch))
      for n in range(min(per_epoch, steps - epoch * per_epoch)):
        yield Rows(images, sizes, labels, placed_order, n * batch)
    return
  in_order = place(np.arange(batch, dtype=np.int32))

  def rows(step: int) -> np.ndarray:
    n = step % per_epoch
    return order(step // per_epoch)[n * batch:(n + 1) * batch]

  for arrays in batches(split, rows, 0, steps):
    images, sizes, labels = place((flatten_canvases(arrays[0]), *arrays[1:]))
    yield Rows(images, sizes, labels, in_order, 0)


def process_rows(sharding: NamedSharding, batch: int) -> np.ndarray:
  """The positions in a global batch of the rows that this process holds, in order."""
  slices = set()
  for index in sharding.addressable_devices_indices_map((batch,)).values():
    rows, = index if index is not None else (slice(None),)
    slices.add((rows.start or 0, batch if rows.stop is None else rows.stop))
  return np.concatenate([np.arange(start, stop) for start, stop in sorted(slices)])


def place_batches(arrays: Iterator, sharding: NamedSharding, batch: int) -> Iterator:
  """Pytrees of this process's rows as global arrays of `batch` rows.

  AHEAD of them are on their way to the devices before they are needed.
  """
  def to_global(rows: np.ndarray) -> jax.Array:
    shape = (batch, *rows.shape[1:])
    return jax.make_array_from_process_local_data(sharding, rows, shape)

  put = partial(jax.tree.map, to_global)
  queue = []
  for tree in arrays:
    queue.append(put(tree))
    if len(queue) > AHEAD:
      yield queue.pop(0)
  yield from queue

"""Data that do not fit in memory: canvases decoded as they are asked for, and through grain ahead of the step."""
import itertools
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding

from equivariant_ssl.data.decode import BadImage, decode
from equivariant_ssl.data.source import MEMORY, Records, Split, fits, hopeless_data, others, threads, to_check, too_many
from equivariant_ssl.errors import BAD_DATA, UserError

TRIES = 100        # records that are asked in the place of one before the data are given up
AHEAD = 2          # batches on the device before they are needed
MOMENTS = 4096     # canvases from which the mean and the deviation of a stream are measured
SAID = 5           # unreadable records that are named


class Canvases:
  """uint8 canvases [N S S 3] that `images[rows]` decodes, as an array would index them. An unreadable record gives
  another in its place, drawn from its own index: the same in every run, and of the `labels` that one's. name: the path of
  the data. rows: of the records, all by default. lost: images left out before, which count where too many cannot be read."""
  dtype, ndim = np.dtype(np.uint8), 4

  def __init__(self, name: str, records: Records, size: int, rows: np.ndarray | None = None,
               labels: np.ndarray | None = None, lost: int = 0):
    self.name, self.records, self.side, self.labels, self.lost = name, records, size, labels, lost
    self.rows = np.arange(records.count) if rows is None else rows
    self.bad, self.lock, self.last = {}, threading.Lock(), (None, None)

  def __len__(self) -> int:
    return len(self.rows)

  @property
  def shape(self) -> tuple[int, int, int, int]:
    return len(self), self.side, self.side, 3

  def part(self, rows: np.ndarray) -> 'Canvases':
    """Those at `rows` (indices or a mask), not yet decoded."""
    return Canvases(self.name, self.records, self.side, self.rows[rows], lost=self.lost)

  def one(self, i: int) -> tuple[np.ndarray, np.ndarray]:
    """Canvas i [S S 3] and its true (height, width) float32. Raises UserError (BAD_DATA) where too many cannot be read."""
    first = int(self.rows[i])
    for at in itertools.chain((first,), itertools.islice(others(first, self.records.count), TRIES - 1)):
      try:
        data, = self.records.read(range(at, at + 1))
        canvas, size = decode(data, self.side, self.records.how)
        if self.labels is not None and at != first:
          self.labels[first] = self.labels[at]
        return canvas, np.asarray(size, np.float32)
      except BadImage as e:
        self.trouble(at, str(e))
    raise UserError(f'{self.name}: {TRIES} records in turn cannot be read.', to_check(self.name), BAD_DATA)

  def trouble(self, i: int, why: str) -> None:
    """Keep that record i is unreadable, and say so once; the run ends where more than 1 % are."""
    with self.lock:
      if i in self.bad:
        return
      self.bad[i] = why
      if too_many(len(self.bad) + self.lost, self.records.count + self.lost):
        first = next(iter(self.bad))
        raise hopeless_data(self.name, len(self.bad) + self.lost, self.records.count + self.lost,
                            f'{self.records.names(first)}: {self.bad[first]}', to_check(self.name))
      if len(self.bad) <= SAID:
        print(f'{self.records.names(i)}: {why}; another record is in its place', file=sys.stderr)

  def read(self, rows) -> tuple[np.ndarray, np.ndarray]:
    """The canvases [n S S 3] and true sizes [n 2] of a slice, of indices or of a mask, decoded in threads."""
    which = np.arange(len(self))[rows]
    with self.lock:
      known, found = self.last
    if known is not None and np.array_equal(known, which):  # images[rows], then sizes[rows]
      return found
    if not fits(len(which), self.side):
      raise UserError(f'{self.name}: this needs {len(which):,} decoded images in memory at once.',
                      f'At most {MEMORY / 2**30:.0f} GiB are kept: use a smaller --config.data.size, or fewer images.')
    with ThreadPoolExecutor(threads()) as pool:
      parts = list(pool.map(self.one, which))
    found = (np.stack([canvas for canvas, _ in parts]) if parts else np.zeros((0, *self.shape[1:]), np.uint8),
             np.stack([size for _, size in parts]) if parts else np.zeros((0, 2), np.float32))
    with self.lock:
      self.last = which, found
    return found

  def at(self, rows) -> tuple[np.ndarray, np.ndarray]:
    """`one` of a number, `read` of all else."""
    return self.one(int(rows)) if np.ndim(rows) == 0 and not isinstance(rows, slice) else self.read(rows)

  def __getitem__(self, rows) -> np.ndarray:
    return self.at(rows)[0]

  def __array__(self, dtype=None, copy=None) -> np.ndarray:
    return self[:].astype(dtype or np.uint8, copy=False)


class Sizes:
  """The true sizes [N 2] of `canvases`, read as they are."""
  dtype, ndim = np.dtype(np.float32), 2

  def __init__(self, canvases: Canvases):
    self.canvases, self.shape = canvases, (len(canvases), 2)

  def __len__(self) -> int:
    return len(self.canvases)

  def __getitem__(self, rows) -> np.ndarray:
    return self.canvases.at(rows)[1]

  def __array__(self, dtype=None, copy=None) -> np.ndarray:
    return self[:].astype(dtype or np.float32, copy=False)


def lazy(images) -> bool:
  """Whether `images` are decoded as they are asked for."""
  return isinstance(images, Canvases | Sizes)


def part(images, rows: np.ndarray):
  """images[rows], of a stream without decoding them."""
  return images.part(rows) if isinstance(images, Canvases) else images[rows]


def some(split: Split, rows: np.ndarray) -> Split:
  """The images at `rows` of a split, of a stream without decoding them."""
  images = part(split.images, rows)
  return Split(images, Sizes(images) if lazy(images) else split.sizes[rows],
               None if split.labels is None else split.labels[rows])


def lazy_split(name: str, records: Records, size: int, labels: np.ndarray | None, lost: int = 0) -> Split:
  """`records` as canvases of side `size` that are decoded as they are asked for. lost: images left out before."""
  canvases = Canvases(name, records, size, labels=labels, lost=lost)
  return Split(canvases, Sizes(canvases), labels)


def sample(canvases: Canvases) -> np.ndarray:
  """MOMENTS of the canvases, chosen by a fixed draw, or all: what the mean and the deviation of a stream are measured on."""
  count = min(MOMENTS, len(canvases))
  return canvases[np.sort(np.random.default_rng(0).choice(len(canvases), count, replace=False))]


def batches(split: Split, rows: Callable[[int], np.ndarray], start: int, stop: int
            ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
  """(images [n S S 3], sizes [n 2], labels [n] int32, 0 where there are none) of `rows(step)` [n] for each step from
  `start` to `stop`, decoded ahead in grain's threads. Position is the step: there is nothing to save. rows: called in a
  thread; of the same n for every step."""
  import grain
  n = len(rows(start)) if start < stop else 1
  rows = lru_cache(4)(rows)

  def one(e: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    i = int(rows(start + e // n)[e % n])
    return *split.images.one(i), np.int32(0 if split.labels is None else split.labels[i])
  data = grain.MapDataset.range((stop - start) * n).map(one)
  options = grain.ReadOptions(num_threads=threads(), prefetch_buffer_size=max(2 * n, 2 * threads()))
  yield from data.to_iter_dataset(options).batch(n, drop_remainder=True)


class Rows(NamedTuple):
  """What a step of an evaluation is given: `order[start:start + batch]` of images, sizes and labels are its batch."""
  images: Any
  sizes: Any
  labels: Any
  order: Any
  start: int


def epochs(split: Split, order: Callable[[int], np.ndarray], batch: int, per_epoch: int, steps: int, place: Callable
           ) -> Iterator[Rows]:
  """The batches of `steps` steps in the order [>= per_epoch x batch] of each epoch: of data in memory all of them, placed
  once, with each epoch's order; of a stream that batch alone. place: puts a pytree of arrays on the devices."""
  order = lru_cache(2)(order)
  if not lazy(split.images):
    data = place(tuple(split))
    for n in range(steps):
      if n % per_epoch == 0:
        at = place(order(n // per_epoch))
      yield Rows(*data, at, n % per_epoch * batch)
    return
  here = place(np.arange(batch, dtype=np.int32))
  rows = lambda n: order(n // per_epoch)[n % per_epoch * batch:(n % per_epoch + 1) * batch]
  for images, sizes, labels in batches(split, rows, 0, steps):
    yield Rows(*place((images, sizes, labels)), here, 0)


def own(sharding: NamedSharding, batch: int) -> np.ndarray:
  """The positions in a global batch of which this process holds the rows, in order."""
  slices = {(s[0].start or 0, batch if s[0].stop is None else s[0].stop)
            for s in sharding.addressable_devices_indices_map((batch,)).values()}
  return np.concatenate([np.arange(*s) for s in sorted(slices)])


def placed(arrays: Iterator, sharding: NamedSharding, batch: int) -> Iterator:
  """Pytrees of this process's rows as global arrays of `batch` rows, AHEAD of them on their way to the devices."""
  put = partial(jax.tree.map, lambda a: jax.make_array_from_process_local_data(sharding, a, (batch, *a.shape[1:])))
  queue = []
  for one in arrays:
    queue.append(put(one))
    if len(queue) > AHEAD:
      yield queue.pop(0)
  yield from queue

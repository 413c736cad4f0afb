"""Batches that are decoded ahead of the training, in their order, by threads.

A thread takes the next few rows of the newest batch, decodes them into the arrays of the batch, and
comes back for more. So an image costs the same in a batch of any size, and nothing is copied to
make a batch of images. How many threads work, and whether they let other processes decode, is
measured while they work (`decoders.choose`); the batches are the same in any case.
"""
import collections
import contextlib
import math
import mmap
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np

from equivariant_ssl.data.decode_processes import DecodeProcesses
from equivariant_ssl.data.decoders import PERIOD, Decoders, DecodeTimes, choose
from equivariant_ssl.data.source import decode_record, thread_count
from equivariant_ssl.parallel import sharding

CHUNK = 8       # rows that a thread decodes before it comes back, where each is quick
QUICK = 1e-3    # seconds
AHEAD = 256     # images that are decoded ahead, or 8 a thread, or two batches if that is more
FORGET = 15     # looks at the choice of the decoders after which threads are tried again
FAREWELL = 30.  # seconds in which the threads must end after the last batch


class _Memory:
  """Arrays for images, whose memory is used again when nothing refers to them any more.

  It takes longer to get new memory from the system than to fill it. And what threads allocate and
  free in the usual way stays with the process, thread by thread.
  """

  def __init__(self):
    self.free: list[mmap.mmap] = []

  def array(self, shape: tuple[int, ...]) -> np.ndarray:
    """An array uint8 of this shape, with any content. All are of one shape."""
    size = math.prod(shape)
    if not size:
      return np.zeros(shape, np.uint8)
    try:
      memory = self.free.pop()
    except IndexError:
      memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
      if hasattr(mmap, 'MADV_HUGEPAGE'):
        with contextlib.suppress(OSError):  # not every kernel has huge pages
          memory.madvise(mmap.MADV_HUGEPAGE)
    array = np.frombuffer(memory, np.uint8)  # parts of it, and what jax makes of it, refer to it
    weakref.finalize(array, self.free.append, memory).atexit = False
    return array.reshape(shape)


class _PendingBatch:
  """A batch that is being decoded: its rows [n], images [n S S 3] and sizes [n 2].

  begun:   the number of rows that threads have taken.
  missing: the number of rows that are not decoded yet.
  errors:  {first row of a chunk: what was raised in decoding it}.
  """

  def __init__(self, rows: np.ndarray, side: int, memory: _Memory):
    self.rows, self.begun, self.missing = rows, 0, len(rows)
    self.images = memory.array((len(rows), side, side, 3))
    self.sizes = np.empty((len(rows), 2), np.float32)
    self.errors: dict[int, BaseException] = {}


class Assembly:
  """The batches of some steps, in their order; `take` gives the next one, and `close` ends it all.

  canvases: a `stream.Canvases`.
  rows:     the function from a step to the rows [n] of its batch. It is called in a thread.
  decoders: how many threads and processes decode, or None where it is to be measured.
  """

  def __init__(self, canvases: Any, rows: Callable[[int], np.ndarray], steps: range,
               decoders: Decoders | None = None):
    self.canvases, self.rows, self.steps = canvases, rows, iter(steps)
    self.unopened = len(steps)
    self.decoders, self.measures = decoders or Decoders(thread_count()), decoders is None
    self.lock = threading.Lock()
    self.room, self.ready = threading.Condition(self.lock), threading.Condition(self.lock)
    self.batches: collections.deque[_PendingBatch] = collections.deque()  # begun, and not taken yet
    self.opening = self.closed = False
    self.memory = _Memory()
    self.threads: list[threading.Thread] = []
    self.processes: DecodeProcesses | None = None
    self.measured, self.starved = DecodeTimes(), DecodeTimes()
    self.tried: dict[Decoders, float] = {}
    self.looks = 0
    self._use(self.decoders)

  def take(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The rows [n], images [n S S 3] and sizes [n 2] of the next batch.

    Raises what was raised in a thread.
    """
    with self.lock:
      began, before = time.perf_counter(), self.measured
      while not self.batches or self.batches[0].missing:
        self.ready.wait()
      batch = self.batches.popleft()
      self.room.notify()  # the thread that begins the next batch wakes others
      # Only while somebody waits for a batch is the work as fast as it can be.
      waited = DecodeTimes(time.perf_counter() - began) - before + self.measured
      self.starved = self.starved + waited
    if batch.errors:
      raise batch.errors[min(batch.errors)]
    if self.processes and not self.processes.ready:
      self.starved = DecodeTimes()
    if self.measures and self.starved.seconds > PERIOD:
      self.looks += 1
      if self.looks % FORGET == 0:  # the storage may have become another one
        self.tried = {d: rate for d, rate in self.tried.items() if d.processes}
      decoders = choose(self.tried, self.decoders, self.starved, sharding.count_cores())
      self.starved = DecodeTimes()
      if decoders != self.decoders:
        self._use(decoders)
    return batch.rows, batch.images, batch.sizes

  def close(self) -> None:
    """End the threads and the processes. A thread first ends the record that it is reading."""
    with self.lock:
      self.closed = True
      self.room.notify_all()
    end = time.perf_counter() + FAREWELL
    for thread in self.threads:
      thread.join(max(end - time.perf_counter(), 0.))
    if self.processes:
      self.processes.close()

  def _use(self, decoders: Decoders) -> None:
    """Let so many threads and processes decode from now on."""
    former = None if decoders.processes else self.processes
    if decoders.processes and not self.processes:
      self.processes = DecodeProcesses.start(self.canvases, decoders, CHUNK)
    elif former:
      self.processes = None
      former.close()
    with self.lock:
      self.decoders = decoders
      self.room.notify_all()  # threads that are too many end
    self.threads = [thread for thread in self.threads if thread.is_alive()]
    names = {thread.name for thread in self.threads}
    for number in range(decoders.threads):
      if f'decoder {number}' not in names:
        thread = threading.Thread(target=self._work, args=(number,), daemon=True,
                                  name=f'decoder {number}')
        self.threads.append(thread)
        thread.start()

  def _work(self, number: int) -> None:
    """Decode chunks until there are none, or until this thread is one too many."""
    while chunk := self._next_chunk(number):
      batch, start, stop = chunk
      measured, error = DecodeTimes(), None
      try:
        measured = self._decode(number, batch, start, stop)
      except BaseException as raised:  # whoever takes the batch gets it
        error = raised
      with self.lock:
        self.measured = self.measured + measured
        if error:
          batch.errors[start] = error
        batch.missing -= stop - start
        if not batch.missing:
          self.ready.notify()

  def _next_chunk(self, number: int) -> tuple[_PendingBatch, int, int] | None:
    """A batch, and the first and the last row + 1 that the thread is to decode of it."""
    with self.lock:
      while not self.closed and number < self.decoders.threads:
        batch = self.batches[-1] if self.batches else None
        if batch and batch.begun < len(batch.rows):
          quick = self.measured.worked < QUICK * self.measured.images
          start = batch.begun
          batch.begun = min(start + (CHUNK if quick else 1), len(batch.rows))
          if batch.begun == len(batch.rows):
            self.room.notify()
          return batch, start, batch.begun
        if self.opening or self._full():
          self.room.wait()
        elif self.unopened:
          self._open()
        else:
          break
      self.room.notify()  # this thread may have been woken in place of one that goes on
    return None

  def _full(self) -> bool:
    """Whether enough batches are begun."""
    if len(self.batches) < 2:
      return False
    ahead = max(AHEAD, 8 * self.decoders.threads)
    return len(self.batches) * len(self.batches[0].rows) >= ahead

  def _open(self) -> None:
    """Begin the next batch. The lock is held when this is called, and let go in between."""
    self.opening, step = True, next(self.steps)
    self.unopened -= 1
    self.lock.release()
    try:
      batch = _PendingBatch(np.asarray(self.rows(step)), self.canvases.side, self.memory)
    except BaseException as error:  # whoever takes the batch gets it
      batch = _PendingBatch(np.zeros(0, int), self.canvases.side, self.memory)
      batch.errors[0] = error
    finally:
      self.lock.acquire()
    self.opening = False
    self.batches.append(batch)
    self.room.notify(max(batch.missing, 1))
    if not batch.missing:
      self.ready.notify()

  def _decode(self, number: int, batch: _PendingBatch, start: int, stop: int) -> DecodeTimes:
    """Decode some rows of a batch, here or in a process, and return how long it took."""
    canvases, images, sizes = self.canvases, batch.images[start:stop], batch.sizes[start:stop]
    records = canvases.rows[batch.rows[start:stop]].tolist()
    began, busy, waited = time.perf_counter(), time.thread_time(), 0.
    processes = self.processes
    decoded = processes.decode(number, records, images) if processes else None
    for i, record in enumerate(records):
      result = decoded[i] if decoded else decode_record(canvases.records, canvases.side, record)
      canvas, sizes[i] = canvases.accept(record, result)
      if not decoded:
        images[i] = canvas
      waited += result.waited
    return DecodeTimes(0., stop - start, time.perf_counter() - began, waited,
                       time.thread_time() - busy)

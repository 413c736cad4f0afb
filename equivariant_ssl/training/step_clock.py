"""How long the steps of a training take, apart from what else happens between them.

A device works on while Python does something else. What Python waits for costs time only from the
moment at which the device has nothing left to do, so a thread notes when each step is computed.
"""
import contextlib
import queue
import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

FAREWELL = 1.  # seconds in which the thread must end; a device that hangs must not hold up an error


class Spent(NamedTuple):
  """The time since the clock was last read.

  seconds: all of it. steps: the steps that were computed, without the first one of the process.
  idle:    {what the devices waited for: seconds}.
  """
  seconds: float
  steps: int
  idle: dict[str, float]


class StepClock:
  """Measures the time of steps. `launch` each step, and put a `span` around all else that waits."""

  def __init__(self):
    self.start = time.perf_counter()
    self.spans: list[tuple[str, float, float, int]] = []
    self.launched = self.counted = self.computed = 0
    self.end = self.start  # when the last step was computed
    self.ends: dict[int, float] = {}
    self.steps: queue.SimpleQueue = queue.SimpleQueue()
    self.changed = threading.Condition()
    self.thread = threading.Thread(target=self._watch, daemon=True, name='eqssl step clock')

  def __enter__(self) -> 'StepClock':
    self.thread.start()
    return self

  def __exit__(self, *error) -> None:
    self.steps.put(None)
    self.thread.join(FAREWELL)

  def launch(self, result: Any) -> None:
    """Note that a step was launched. result: arrays that the step computes."""
    self.launched += 1
    self.steps.put(result)

  @contextlib.contextmanager
  def span(self, what: str) -> Iterator[None]:
    """Measure what happens in this context, by the name `what`."""
    start, launched = time.perf_counter(), self.launched
    try:
      yield
    finally:
      self.spans.append((what, start, time.perf_counter(), launched))

  def read(self) -> Spent:
    """The time since this was last read. All steps that were launched must be computed."""
    with self.changed:
      self.changed.wait_for(lambda: self.computed == self.launched, FAREWELL)
      ends, self.ends = self.ends, {self.launched: self.end}
    now = time.perf_counter()
    idle: dict[str, float] = {}
    for what, start, end, launched in self.spans:
      idle_since = max(start, ends.get(launched, start))
      idle[what] = idle.get(what, 0.) + max(end - idle_since, 0.)
    spent = Spent(now - self.start, self.launched - self.counted, idle)
    self.start, self.counted, self.spans = now, self.launched, []
    return spent

  def _watch(self) -> None:
    """Note when each step is computed."""
    while (result := self.steps.get()) is not None:
      with contextlib.suppress(Exception):  # the main thread gets it too
        jax.block_until_ready(result)
      with self.changed:
        self.computed += 1
        self.end = self.ends[self.computed] = time.perf_counter()
        self.changed.notify_all()

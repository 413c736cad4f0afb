"""How many threads decode a stream, and whether processes do: chosen by what was measured."""
import math
from typing import NamedTuple

PERIOD = 2.          # seconds of waiting for batches after which the choice is looked at again
GAIN = 1.1           # by how much more images a second a choice must be better to be kept
MOST_THREADS = 256
CORES = 4            # cores from which one interpreter may be too few
THREADS_A_PROCESS = 4


class Decoders(NamedTuple):
  """How many threads decode. With processes, each thread lets one of them decode for it."""
  threads: int
  processes: int = 0


class DecodeTimes(NamedTuple):
  """What was measured while a batch was waited for. Two of them can be added or subtracted.

  seconds: how long it was.
  images:  how many images were decoded in this time.
  worked:  seconds that the threads decoded, all together, whatever they waited for in between.
  waited:  seconds that the threads waited for the storage, all together.
  busy:    seconds that the threads kept a processor busy, all together.
  """
  seconds: float = 0.
  images: int = 0
  worked: float = 0.
  waited: float = 0.
  busy: float = 0.

  def __add__(self, other: tuple) -> 'DecodeTimes':
    return DecodeTimes(*(a + b for a, b in zip(self, other, strict=True)))

  def __sub__(self, other: tuple) -> 'DecodeTimes':
    return DecodeTimes(*(a - b for a, b in zip(self, other, strict=True)))


def choose(tried: dict[Decoders, float], now: Decoders, measured: DecodeTimes, cores: int
           ) -> Decoders:
  """The decoders for the next seconds, where the training waits for the ones there are now.

  tried: {decoders: images a second} of this run so far; what was measured of `now` goes into it.

  Where threads wait for the storage, there will be up to four times as many, up to the number at
  which `cores` would be busy. Where threads wait for each other instead, one interpreter may be the
  limit, and processes are tried. What is not better by GAIN than fewer threads is given up.
  """
  # Threads that had no room to go on, while one of them met a stall, do not count as slow; but no
  # number of threads is faster than all cores.
  tried[now] = measured.images * min(now.threads / max(measured.worked, 1e-9),
                                     cores / max(measured.busy, 1e-9))
  best = min(tried)
  for decoders in sorted(tried):
    if tried[decoders] > GAIN * tried[best]:
      best = decoders
  share = measured.waited / max(measured.busy, 1e-9)
  threads = min(int(cores * (1 + share)), 4 * now.threads, MOST_THREADS)
  more = Decoders(threads, now.processes)
  worth_trying = threads >= 1.5 * now.threads and more not in tried
  if best == now and not now.processes and worth_trying:
    return more
  idle = measured.busy * now.threads < .8 * cores * measured.worked
  others = Decoders(best.threads, math.ceil(cores / THREADS_A_PROCESS))
  if cores >= CORES and idle and not any(d.processes for d in tried):
    return others
  return best

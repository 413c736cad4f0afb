"""All arms of a demonstration side by side, a process a core, with progress while they work."""
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import contextmanager
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from equivariant_ssl.demo.arms import ArmSpec, Budget, TrainedArm, costs, show_mean, train_arm
from equivariant_ssl.evaluate.statistics import quantity
from equivariant_ssl.parallel import sharding

QUIET = 20.      # seconds between two lines of progress where there is no terminal
ESTIMATED = .03  # the share of the work from which on the rest is estimated

Report = Callable[[float], None]


def _clock(seconds: float) -> str:
  return f'{int(seconds) // 60}:{int(seconds) % 60:02d}'


def remaining(done: float, seconds: float, compiling: float) -> str:
  """Return how far a demonstration is and how long it will take, in words.

  done: the share of the work. seconds: since it began. compiling: the seconds of these before the
  first work was done.
  """
  if done < ESTIMATED:
    return f'{_clock(seconds)} gone, the programs are being compiled'
  return f'{_clock(seconds)} gone, about {_clock((seconds - compiling) * (1 - done) / done)} left'


@contextmanager
def show_progress(quiet: float = QUIET) -> Iterator[tuple[Report, Callable[[str], None]]]:
  """Give (a function of the share of the work that is done, a function that prints a line).

  Both write to stderr: a terminal has a bar, anything else gets a line every `quiet` seconds.
  """
  console = Console(stderr=True, soft_wrap=True)
  bar = Progress(BarColumn(30), TextColumn('{task.percentage:3.0f} %  {task.fields[note]}'),
                 console=console, transient=True, disable=not console.is_terminal)
  start = last_line = first = time.monotonic()
  task = bar.add_task('', total=1., note='starting')

  def report(done: float) -> None:
    nonlocal last_line, first
    now = time.monotonic()
    first = first if done else now
    note = remaining(done, now - start, first - start)
    bar.update(task, completed=done, note=note)
    if not console.is_terminal and now - last_line >= quiet:
      last_line = now
      say(f'{100 * done:3.0f} %  {note}')

  def say(line: str) -> None:
    console.print(line, markup=False, highlight=False)
    sys.stderr.flush()
  with bar:
    yield report, say


_work_done: Any = None  # of a worker process: the cost of what all workers have done


def _advance(cost: int) -> None:
  if _work_done is not None:
    with _work_done.get_lock():
      _work_done.value += cost


def _begin(work_done: Any, cache: str | None) -> None:
  """Set up a worker process."""
  global _work_done
  _work_done = work_done
  signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback
  jax.config.update('jax_compilation_cache_dir', cache)


def _work(name: str, spec: ArmSpec, budget: Budget) -> dict[str, TrainedArm]:
  return train_arm(name, spec, budget, _advance)


def _arm_line(name: str, arm: TrainedArm, seconds: float) -> str:
  return (f'{name}: {quantity(len(arm.losses), "seed")} after {_clock(seconds)}; turn '
          f'{show_mean(arm.readouts["turn"])} %, class {show_mean(arm.readouts["linear"])} %')


def train_all(specs: dict[str, ArmSpec], budget: Budget) -> dict[str, TrainedArm]:
  """Train every arm, in the order of `specs`, in a process for each core.

  Steps this small do not keep two cores busy, but two arms do. Progress goes to stderr.
  """
  per_arm = {name: costs(spec, budget) for name, spec in specs.items()}
  total = budget.seeds * sum(steps * step + readout * (1 + specs[name].untrained)
                             for name, (steps, step, readout) in per_arm.items())
  spawn = multiprocessing.get_context('spawn')
  work_done: Any = spawn.Value('q', 0)
  flags = os.environ.get('XLA_FLAGS', '')
  os.environ |= {'XLA_FLAGS': f'{flags} --xla_cpu_multi_thread_eigen=false',
                 'JAX_PLATFORMS': 'cpu'}
  start, workers = time.monotonic(), min(sharding.count_cores(), len(specs))
  arms: dict[str, TrainedArm] = {}
  cache: Any = jax.config
  initargs = work_done, cache.jax_compilation_cache_dir
  with (ProcessPoolExecutor(workers, spawn, _begin, initargs) as pool,
        show_progress() as (report, say)):
    waiting = {pool.submit(_work, name, spec, budget): name for name, spec in specs.items()}
    while waiting:
      for future in wait(waiting, timeout=.2, return_when=FIRST_COMPLETED).done:
        name = waiting.pop(future)
        arms |= future.result()
        say(_arm_line(name, arms[name], time.monotonic() - start))
      report(min(work_done.value / total, 1.))
  return {key: arms[key] for key in ('untrained', *specs) if key in arms}

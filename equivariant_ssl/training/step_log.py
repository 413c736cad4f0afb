"""The log of a training: rows of metrics, a line of progress, and a watch for collapse."""
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from equivariant_ssl.errors import NOT_FINITE, UserError
from equivariant_ssl.parallel import processes
from equivariant_ssl.training.runs import Run
from equivariant_ssl.training.step_clock import Spent, StepClock

COLLAPSED = .3  # a smaller spread is a collapse; embeddings that fill a sphere have 1
STEPS = 10        # between two rows, where these take LOG_SECONDS or longer
SHORTEST = 1e-3   # seconds that a row mentions
LOG_SECONDS = 1.  # between two rows, at least, where the config does not say how many steps
# What a row says of the time beside the steps: the share of it that the devices waited for data,
# and seconds of the first step of the process, with its compilation; of measuring; of saving.
DATA_WAIT, FIRST_STEP, MONITOR, SAVE = 'data_wait', 'first_step_s', 'monitor_s', 'save_s'


class LogWindow(NamedTuple):
  """The steps since the last row of the log.

  pending: (number, metrics) of each of these steps; the metrics are still on the device.
  every:   a row is written at the multiples of this number of steps.
  timed:   whether `every` is settled.
  warned:  whether the user was warned of a collapse already.
  """
  pending: list[tuple[int, dict[str, Any]]]
  every: int
  timed: bool
  warned: bool = False


class LogOutputs(NamedTuple):
  """Where the log goes.

  write:     (step, values) writes a row of metrics.jsonl.
  show:      (step, terms, images_per_s, data_wait) shows the progress.
  say:       prints a line.
  last_good: () -> the step of the newest checkpoint, or None.
  """
  write: Callable
  show: Callable
  say: Callable
  last_good: Callable[[], int | None]


def start_window(log_every: int) -> LogWindow:
  """Return the window of a log that begins now.

  log_every: the steps between two rows; 0 where the time of a step is to say so.
  """
  return LogWindow([], log_every or STEPS, bool(log_every))


def _steps_between_rows(spent: Spent) -> int:
  """Return how many steps make LOG_SECONDS: STEPS, or 2, 4, 8 ... times as many.

  All processes of a job get the same number, so that all of them look at the same metrics.
  """
  own_seconds = spent.seconds - sum(spent.idle.values())
  rows = LOG_SECONDS * spent.steps / max(own_seconds, 1e-3) / STEPS
  return processes.gather(STEPS * 2 ** max(math.ceil(math.log2(rows)), 0))[0]


def _raise_if_not_finite(step: int, metrics: dict[str, Any], last_good: Callable) -> None:
  """Raise UserError NOT_FINITE if a metric of a step is not a finite number."""
  bad = [k for k, v in metrics.items() if not math.isfinite(v)]
  if bad:
    good = last_good()
    raise UserError(
        f'step {step}: {", ".join(bad)} not finite. '
        f'Last good checkpoint: {"none" if good is None else f"step {good}"}.',
        'Try a lower --config.optimizer.lr, a longer warm-up, or --config.dtype=float32, '
        'in a new --workdir.', NOT_FINITE)


def _speed(batch: int, spent: Spent) -> dict[str, float]:
  """Return what a row says of the time of its steps.

  images_per_s counts the steps and what they waited for data, data_wait is the share of that wait.
  Where the row has no step but the first one of the process, both are missing. What happened
  between the steps is in seconds, each by its name.
  """
  between = {name: seconds for name, seconds in spent.idle.items()
             if name != DATA_WAIT and seconds >= SHORTEST}
  if not spent.steps:
    return between
  seconds = max(spent.seconds - sum(between.values()), 1e-9)
  return between | {'images_per_s': batch * spent.steps / seconds,
                    DATA_WAIT: spent.idle.get(DATA_WAIT, 0.) / seconds}


def flush_log(run: Run, window: LogWindow, outputs: LogOutputs, clock: StepClock,
              measured: dict[str, float]) -> LogWindow:
  """Write one row for the steps of a window, and return the window that begins after it.

  clock:    the clock of these steps.
  measured: values that were measured beside the step's metrics; they go into the same row.

  Raises UserError NOT_FINITE at the first metric that is not finite, and at a collapse if the
  config says so. Otherwise a collapse is reported once.
  """
  numbers = [number for number, _ in window.pending]
  fetched = jax.device_get([metrics for _, metrics in window.pending])
  for number, metrics in zip(numbers, fetched, strict=True):
    _raise_if_not_finite(number, metrics, outputs.last_good)
  step = numbers[-1]
  values = {k: float(v) for k, v in fetched[-1].items()} | measured
  spent = clock.read()
  values |= _speed(run.recipe.batch, spent)
  values['epoch'] = step / run.recipe.steps_per_epoch
  memory = run.mesh.local_devices[0].memory_stats()  # None on CPU
  if memory:
    values['memory_gib'] = memory['peak_bytes_in_use'] / 2 ** 30
  outputs.write(step, values)
  terms = ('loss', 'invariance', *run.recipe.equivariances, 'std', 'probe_top1', 'knn_top1')
  outputs.show(step, {k: values[k] for k in terms if k in values}, values.get('images_per_s'),
               values.get(DATA_WAIT))
  warned = window.warned
  if values['std'] < COLLAPSED and step > 10 and not warned:
    line = (f'step {step}: the embeddings are collapsing: their spread is {values["std"]:.2f} '
            f'of a full sphere\'s (under {COLLAPSED}).')
    if run.config.on_collapse == 'stop':
      raise UserError(line, 'Try a lower learning rate or temperature; '
                      '--config.on_collapse=warn trains on regardless.', NOT_FINITE)
    outputs.say(line)
    warned = True
  every = window.every
  if settle := bool(not window.timed and spent.steps):
    every = _steps_between_rows(spent)
  return LogWindow([], every, window.timed or settle, warned)

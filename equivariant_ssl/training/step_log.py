"""The log of a training: rows of metrics, a line of progress, and a watch for collapse."""
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from equivariant_ssl.errors import NOT_FINITE, UserError
from equivariant_ssl.training.runs import Run

COLLAPSED = .3  # a smaller spread is a collapse; embeddings that fill a sphere have 1


class LogWindow(NamedTuple):
  """The steps since the last row of the log.

  pending:       (number, metrics) of each of these steps; the metrics are still on the device.
  start_time:    when the last row was written, in seconds of `time.perf_counter`.
  start_step:    the step of the last row.
  waited:        seconds that these steps waited for their data.
  warned:        whether the user was warned of a collapse already.
  """
  pending: list[tuple[int, dict[str, Any]]]
  start_time: float
  start_step: int
  waited: float = 0.
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


def start_window(step: int) -> LogWindow:
  """Return the window of a log that begins now, at `step`."""
  return LogWindow([], time.perf_counter(), step)


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


def flush_log(run: Run, window: LogWindow, outputs: LogOutputs, measured: dict[str, float]
              ) -> LogWindow:
  """Write one row for the steps of a window, and return the window that begins after it.

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
  now = time.perf_counter()
  elapsed = max(now - window.start_time, 1e-9)
  values['images_per_s'] = run.recipe.batch * (step - window.start_step) / elapsed
  values['data_wait'] = window.waited / elapsed
  values['epoch'] = step / run.recipe.steps_per_epoch
  memory = run.mesh.local_devices[0].memory_stats()  # None on CPU
  if memory:
    values['memory_gib'] = memory['peak_bytes_in_use'] / 2 ** 30
  outputs.write(step, values)
  terms = ('loss', 'invariance', *run.recipe.equivariances, 'std', 'probe_top1', 'knn_top1')
  outputs.show(step, {k: values[k] for k in terms if k in values}, values['images_per_s'],
               values['data_wait'])
  warned = window.warned
  if values['std'] < COLLAPSED and step > 10 and not warned:
    line = (f'step {step}: the embeddings are collapsing: their spread is {values["std"]:.2f} '
            f'of a full sphere\'s (under {COLLAPSED}).')
    if run.config.on_collapse == 'stop':
      raise UserError(line, 'Try a lower learning rate or temperature; '
                      '--config.on_collapse=warn trains on regardless.', NOT_FINITE)
    outputs.say(line)
    warned = True
  return LogWindow([], now, step, warned=warned)

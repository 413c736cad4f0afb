"""The training loop. It logs, saves checkpoints, and can be stopped and resumed at any step."""
import contextlib
import pathlib
import shlex
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from equivariant_ssl.config import config_to_json, read_config
from equivariant_ssl.data import card, stream
from equivariant_ssl.data.card import Card
from equivariant_ssl.errors import OTHER_CONFIG, PREEMPTED, UserError
from equivariant_ssl.evaluate.online import monitor
from equivariant_ssl.parallel import processes
from equivariant_ssl.storage import checkpoint, record
from equivariant_ssl.storage.checkpoint import Checkpoints, Restored
from equivariant_ssl.training import stop
from equivariant_ssl.training.feeds import resident, streamed
from equivariant_ssl.training.progress import progress
from equivariant_ssl.training.recipe import warmup_warning
from equivariant_ssl.training.run_config import (
  DATA_PATH_OPTION,
  data_flag,
  fit_batch,
  free_fields,
  keep_rules,
  longer_flag,
)
from equivariant_ssl.training.runs import (
  Run,
  abstract_state,
  add_first_card,
  initial_state,
  prepare_run,
  read_known_card,
)
from equivariant_ssl.training.state import TrainState
from equivariant_ssl.training.step_clock import StepClock
from equivariant_ssl.training.step_log import (
  DATA_WAIT,
  FIRST_STEP,
  MONITOR,
  SAVE,
  LogOutputs,
  flush_log,
  start_window,
)

# A function (run, state, step) that is called after each step. It must not keep the state.
Hook = Callable[[Run, TrainState, int], None]
# A function (state, step, metrics, clock) -> whether to stop.
OnStep = Callable[[TrainState, int, dict, StepClock], bool]
Say = Callable[[str], None]  # prints a line for the user


def fit(run: Run, state: TrainState, on_step: OnStep) -> TrainState:
  """Train from `state` to the recipe's last step, or until `on_step` is true."""
  assert run.source is not None  # a run that trains has its data
  feed = streamed if stream.is_stream(run.source.train.images) else resident
  start = int(state.step)
  step, batches = feed(run, start)
  with StepClock() as clock:
    for n in range(start, run.recipe.steps):
      if n == start:
        with clock.span(FIRST_STEP):
          state, metrics = step(run.key, state, *next(batches))
          jax.block_until_ready(metrics)
      else:
        with clock.span(DATA_WAIT):
          arguments = next(batches)
        state, metrics = step(run.key, state, *arguments)
        clock.launch(metrics)
      if on_step(state, n + 1, metrics, clock):
        break
  return state


class _Start(NamedTuple):
  """Where a training starts from.

  workdir:   the folder of the run.
  data_card: what the run knows of its data; None for a new run.
  begin:     the folder of the run that a longer training starts from, or None.
  """
  workdir: pathlib.Path
  data_card: Card | None
  begin: pathlib.Path | None


def _find_start(config: Any, workdir: pathlib.Path, begin: pathlib.Path | None, say: Say) -> _Start:
  """Look into `workdir` and `begin`.

  Raises UserError OTHER_CONFIG if another run is in `workdir`.
  """
  data_card = read_known_card(workdir, say)
  if processes.is_main():
    config = fit_batch(config, data_card.images if data_card else 0)
    free = free_fields(config, workdir, data_known=bool(data_card))
    record.compare(workdir, config_to_json(config), free)
  if begin is None:
    return _Start(workdir, data_card, None)
  other_start = data_card and (data_card.start or {}).get('run') != str(begin)
  if other_start or not data_card and checkpoint.saved_steps(workdir / 'checkpoints'):
    raise UserError(f'{workdir} holds a run that did not start from {begin}.',
                    'Use a new --workdir.', OTHER_CONFIG)
  share = read_config(begin / 'config.json').validation
  if share != config.validation:  # the longer run would be read out on images it was trained on
    raise UserError(f'{begin} held {share:g} of its images out of training, not '
                    f'{config.validation:g}.', f'Give --config.validation={share:g}')
  if data_card:
    return _Start(workdir, data_card, begin)
  first_card = read_known_card(begin, say)
  if first_card:
    first_card = first_card._replace(images=0, since=0,
                                     start={'run': str(begin), 'data': card.data_mark(first_card)})
  return _Start(workdir, first_card, begin)


def _first_state(config: Any, run: Run, origin: dict, say: Say) -> tuple[Run, Restored]:
  """Return the run and the state of the run that a longer training starts from.

  origin: what the data card says of that run: its folder, and the step if it is known.

  Raises UserError if that run has as many steps already as the config asks for.
  """
  folder = pathlib.Path(origin['run'], 'checkpoints')
  first = checkpoint.load_checkpoint(folder, abstract_state(run, config.sharding),
                                     origin.get('step'), say)
  if first[0] >= run.recipe.steps:
    raise UserError(f'{origin["run"]} is at step {first[0]}, and {run.recipe.steps} steps are '
                    'asked for: nothing to train.', f'For more steps: {longer_flag(config)}')
  return run._replace(card=run.card._replace(start={**origin, 'step': first[0]})), first


def _open(config: Any, start: _Start, mesh: Mesh | None, say: Say, accept: bool
          ) -> tuple[Run, Restored | None]:
  """Load the data and build the run. Nothing is written yet.

  The second result is the state of the run that a longer training starts from, if this training
  has no checkpoint yet; else None. Raises UserError if the data are not the run's, if the
  processes do not have the same data, or if nothing is left to train.
  """
  workdir, data_card, begin = start
  advice = data_flag(config) if begin else ''
  if (workdir / 'config.json').is_file():
    advice = f'eqssl resume {shlex.quote(str(workdir))} {DATA_PATH_OPTION}'
  run = prepare_run(config, mesh, say, data_card, accept, advice)
  if not data_card:
    run = add_first_card(begin or workdir, run, say)
  processes.agree("the data's", card.card_facts(run.card))
  origin = run.card.start or ({'run': str(begin)} if begin else None)
  if origin and not processes.gather(checkpoint.saved_steps(workdir / 'checkpoints'))[0]:
    return _first_state(config, run, origin, say)
  return run, None


def _begin(run: Run, first: Restored | None, start: _Start, checkpoints: Checkpoints, say: Say
           ) -> tuple[Run, TrainState]:
  """Return the run and its state, and write its data card.

  The state is that of the run's newest valid checkpoint; else `first`, the state of the run that
  this one starts from, which is saved at once; else the initial state.
  """
  data_card, rule = run.card, run.config.sharding
  resumed = checkpoints.restore(abstract_state(run, rule))
  restored = resumed or first
  state = restored[1] if restored else initial_state(run, rule)
  step = int(state.step)
  changes = card.card_differences(start.data_card, data_card) if start.data_card else ()
  if changes:
    data_card = data_card._replace(
        changes=(*data_card.changes, f'from step {step}: {"; ".join(changes)}'))
  if processes.is_main():
    card.write_card(start.workdir, data_card)
  run, total = run._replace(card=data_card), run.recipe.steps
  if first:
    checkpoints.save(step, state, checkpoint_meta(run), wait=True)
  devices, batch = run.mesh.devices.size, run.config.batch
  progress_text = (f'{total} steps' if not resumed else f'resuming at step {step} of {total}'
                   if step < total else f'finished already, at step {step}')
  origin = f' from step {step} of {(data_card.start or {})["run"]}' if first else ''
  say(f'{start.workdir.name}: {progress_text}{origin}, '
      f'batch {batch} = {devices} devices x {batch // devices}')
  if resumed and step >= total:
    say(f'to train it longer: eqssl train --from {shlex.quote(str(start.workdir))} --workdir NEW '
        f'{longer_flag(run.config)}')
  elif line := warmup_warning(run.config, run.recipe):
    say(line)
  return run, state


def _knn_monitor(run: Run) -> Callable[[TrainState, int], dict[str, float]]:
  """Return a function (state, step) -> the kNN accuracy as a metric where it is due, else {}."""
  if not run.config.knn_every:
    return lambda state, n: {}
  measure = monitor(run)
  every = max(round(run.config.knn_every * run.recipe.steps_per_epoch), 1)
  return lambda state, n: {} if n % every else measure(state)


def checkpoint_meta(run: Run) -> dict:
  """Return what a checkpoint of the run holds beside its state."""
  return {'data': card.card_to_json(run.card)}


def _after_step(run: Run, hooks: tuple[Hook, ...], outputs: LogOutputs, checkpoints: Checkpoints,
                check: Callable[[], None], begin_saving: Callable[[], None],
                stop_requested: Callable[[int], bool], stopped: list[int]) -> OnStep:
  """Return the function that logs, saves and calls the hooks after a step.

  check:          raises UserError if the folder of the run was removed or replaced.
  begin_saving:   says that there is something to save from now on.
  stop_requested: step -> whether the training is to stop at this step.
  stopped:        receives the step at which the training stops early.
  """
  window, measure = start_window(run.config.log_every), _knn_monitor(run)
  config, total = run.config, run.recipe.steps
  every = config.checkpoint_every or max(total // 10, 1)

  def on_step(state: TrainState, n: int, metrics: dict, clock: StepClock) -> bool:
    nonlocal window
    begin_saving()
    window.pending.append((n, metrics))
    stops = stop_requested(n)
    save_due = n % every == 0 or n == total or stops
    with clock.span(MONITOR):
      measured = measure(state, n)
    if n % window.every == 0 or save_due or measured:
      window = flush_log(run, window, outputs, clock, measured)
    if save_due:
      check()
      with clock.span(SAVE):
        checkpoints.save(n, state, checkpoint_meta(run), wait=stops)
    with clock.span(MONITOR):
      for hook in hooks:
        hook(run, state, n)
    if stops and n < total:
      stopped.append(n)
    return stops
  return on_step


def train(config: Any, workdir: str | pathlib.Path, command: str = '', hooks: tuple[Hook, ...] = (),
          mesh: Mesh | None = None, quiet: bool = False, accept_data: bool = False,
          start_from: str | pathlib.Path | None = None) -> TrainState:
  """Train a resolved config in the folder `workdir`, and return the last state.

  The training resumes from the newest valid checkpoint in `workdir`. Without a checkpoint it starts
  from the newest valid checkpoint of the run in `start_from`, or from the initial state.

  command:     the command line, for the record.
  hooks:       functions that are called after each step.
  accept_data: train although the data are not those that the run was trained on.

  Raises UserError with one of these codes: 5 `workdir` holds a run of another config, 9 the data
  are not the run's, 3 another process is working in `workdir`, 4 none of the checkpoints is valid,
  6 a metric is not finite, 75 the process was asked to stop (the state is saved, and the message
  says how to resume).
  """
  workdir = pathlib.Path(workdir).absolute()
  start_from = pathlib.Path(start_from).absolute() if start_from else None
  config = keep_rules(config, workdir, start_from)
  processes.agree('config', record.config_leaves(config_to_json(config)))
  say = (lambda line: None) if quiet or not processes.is_main() else stop.say
  with contextlib.ExitStack() as stack:  # until the last checkpoint is written
    signal_came = stack.enter_context(stop.listen())
    begin_saving = stack.enter_context(stop.saving(stop.AFTER_STEP if say is stop.say else ''))
    start = _find_start(config, workdir, start_from, say)
    run, first = _open(config, start, mesh, say, accept_data)
    stop.raise_if_stopped()
    check: Callable = lambda *args: None
    write, show = check, check
    if processes.is_main():
      workdir.mkdir(parents=True, exist_ok=True)
      check = stack.enter_context(record.lock_folder(workdir))
      record.start_record(workdir, config_to_json(run.config), command or shlex.join(sys.argv),
                          free=free_fields(config, workdir))
    processes.wait_until_same(f'{workdir}/config.json', (workdir / 'config.json').is_file)
    checkpoints = stack.enter_context(
        checkpoint.open_checkpoints(workdir / 'checkpoints', keep=config.keep, log=say))
    run, state = _begin(run, first, start, checkpoints, say)
    stop.raise_if_stopped()
    first_step, total = int(state.step), run.recipe.steps
    if processes.is_main():
      write = stack.enter_context(record.open_metrics(workdir, first_step, config.tensorboard))
      show = stack.enter_context(progress(total, first_step, workdir.name, quiet))
    outputs = LogOutputs(write, show, say, checkpoints.latest)
    alone = jax.process_count() == 1
    stop_requested = (lambda n: signal_came()) if alone else processes.stop_requested
    stopped: list[int] = []
    state = fit(run, state, _after_step(run, hooks, outputs, checkpoints, check, begin_saving,
                                        stop_requested, stopped))
  if stopped:
    raise UserError(f'stopped at step {stopped[0]} of {total}; everything is saved.',
                    f'Resume: eqssl resume {shlex.quote(str(workdir))}', PREEMPTED)
  return state

"""The loop: one jitted step over resident data, logged, checkpointed, stoppable and resumable at any step."""
import contextlib
import functools
import math
import pathlib
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from equivariant_ssl import checkpoint, distributed, record, shard, stop
from equivariant_ssl import config as configs
from equivariant_ssl import state as states
from equivariant_ssl import step as steps
from equivariant_ssl.data import card as cards
from equivariant_ssl.data import stream
from equivariant_ssl.data.card import Card
from equivariant_ssl.data.order import epoch_order
from equivariant_ssl.errors import NOT_FINITE, OTHER_CONFIG, PREEMPTED, UserError
from equivariant_ssl.evaluate.online import monitor
from equivariant_ssl.progress import progress
from equivariant_ssl.recipe import slow_start
from equivariant_ssl.runs import MOVED, Run, abstract, first_card, free, initial, known, prepare, since, where

COLLAPSED = .3  # of the spread of a uniform sphere


Hook = Callable[[Run, states.TrainState, int], None]  # called after a step with its number; must not keep the state


def compiled(run: Run):
  """The one jitted step of the run, (key, state, data, order) -> (state, metrics), and its data on the devices."""
  train = run.source.train
  labels = train.labels if run.recipe.probe else None
  placed = shard.place(steps.Batch(train.images, train.sizes, labels), shard.replicated(run.mesh))
  return steps.resident(run.recipe, run.mesh, rule=run.config.sharding), placed


def fit(run: Run, state: states.TrainState, on_step: Callable[[states.TrainState, int, dict, float], bool]
        ) -> states.TrainState:
  """Train from `state` to the recipe's last step, or until `on_step(state, number, metrics, waited)` is true.

  waited: seconds that the step waited for its data.
  """
  start, feed = int(state.step), streamed if stream.lazy(run.source.train.images) else resident
  step, data = feed(run, start)
  for n in range(start, run.recipe.steps):
    before = time.perf_counter()
    given = next(data)
    waited = time.perf_counter() - before
    state, metrics = step(run.key, state, *given)
    if on_step(state, n + 1, metrics, waited):
      break
  return state


def resident(run: Run, start: int) -> tuple[Callable, Iterator]:
  """The jitted step of a run whose data are on the devices, and what it is given at each step from `start`."""
  step, placed = compiled(run)

  def given() -> Iterator[tuple]:
    order, per_epoch = None, run.recipe.epoch(len(placed.images))
    for n in range(start, run.recipe.steps):
      if order is None or n % per_epoch == 0:
        order = shard.place(np.asarray(epoch_order(run.key, n // per_epoch, len(placed.images))),
                            shard.replicated(run.mesh))
      yield placed, order
  return step, given()


def streamed(run: Run, start: int) -> tuple[Callable, Iterator]:
  """The same of a run whose data are decoded as they are needed: the batches that `resident` would give, bitwise."""
  recipe, split = run.recipe, shard.split(run.mesh)
  mine, per_epoch = stream.own(split, recipe.batch), recipe.epoch(len(run.source.train.images))
  order = functools.lru_cache(2)(lambda epoch: np.asarray(epoch_order(run.key, epoch, len(run.source.train.images))))

  def rows(n: int) -> np.ndarray:
    return order(n // per_epoch)[n % per_epoch * recipe.batch + mine]
  arrays = stream.batches(run.source.train, rows, start, recipe.steps)
  batches = (steps.Batch(images, sizes, labels if recipe.probe else None) for images, sizes, labels in arrays)
  step = steps.streamed(recipe, run.mesh, rule=run.config.sharding)
  return step, ((b,) for b in stream.placed(batches, split, recipe.batch))


class _Log(NamedTuple):
  """Steps whose metrics are still on the device, and when the last row was written."""
  pending: list
  since: list  # [time, step, seconds waited, whether collapse was said]


def _flush(run: Run, log: _Log, write: Callable, show: Callable, say: Callable, last_good: Callable,
           measured: dict[str, float]) -> None:
  """Fetch the pending metrics, stop on the first that is not finite, write one row with what was `measured` beside them,
  and warn of a collapse."""
  fetched = jax.device_get([m for _, m in log.pending])
  for (n, _), metrics in zip(log.pending, fetched, strict=True):
    bad = [k for k, v in metrics.items() if not math.isfinite(v)]
    if bad:
      good = last_good()
      raise UserError(
          f'step {n}: {", ".join(bad)} not finite. Last good checkpoint: {"none" if good is None else f"step {good}"}.',
          'Try a lower --config.optimizer.lr, a longer warm-up, or --config.dtype=float32, in a new --workdir.',
          NOT_FINITE)
  n = log.pending[-1][0]
  values = {k: float(v) for k, v in fetched[-1].items()} | measured
  now = time.perf_counter()
  elapsed = max(now - log.since[0], 1e-9)
  values['images_per_s'] = run.recipe.batch * (n - log.since[1]) / elapsed
  values['data_wait'] = log.since[2] / elapsed
  values['epoch'] = n / run.recipe.steps_per_epoch
  memory = run.mesh.local_devices[0].memory_stats()  # None on CPU
  if memory:
    values['memory_gib'] = memory['peak_bytes_in_use'] / 2 ** 30
  write(n, values)
  shown = ('loss', 'invariance', *run.recipe.equivariances, 'std', 'probe_top1', 'knn_top1')
  show(n, {k: values[k] for k in shown if k in values}, values['images_per_s'],
       values['data_wait'])
  if values['std'] < COLLAPSED and n > 10 and not log.since[3]:
    line = (f'step {n}: the embeddings are collapsing: their spread is {values["std"]:.2f} of a full sphere\'s '
            f'(under {COLLAPSED}).')
    if run.config.on_collapse == 'stop':
      raise UserError(line, 'Try a lower rate or temperature; --config.on_collapse=warn goes on regardless.', NOT_FINITE)
    say(line)
    log.since[3] = True
  log.pending.clear()
  log.since[:3] = [now, n, 0.]


class _Start(NamedTuple):
  """Where a training starts from. known: its data card, None of a new run. begin: the run that a longer one starts from."""
  workdir: pathlib.Path
  known: Card | None
  begin: pathlib.Path | None


def _start(config: ConfigDict, workdir: pathlib.Path, begin: pathlib.Path | None, say: Callable) -> _Start:
  """What is in `workdir`, and in `begin`; UserError OTHER_CONFIG where that is another run."""
  if distributed.main():
    record.compare(workdir, configs.as_json(config), (*free(config), *since(config, workdir)), configs.TOP)
  card = known(workdir, say)
  if begin is None:
    return _Start(workdir, card, None)
  if card and (card.start or {}).get('run') != str(begin) or not card and checkpoint.steps(workdir / 'checkpoints'):
    raise UserError(f'{workdir} holds a run that did not start from {begin}.', 'Use a new --workdir.', OTHER_CONFIG)
  share = configs.read(begin / 'config.json').validation
  if share != config.validation:  # it would be read out on images that it has seen
    raise UserError(f'{begin} held {share:g} of its images out of training, not {config.validation:g}.',
                    f'Give --config.validation={share:g}')
  old = None if card else known(begin, say)
  return _Start(workdir, card or old and old._replace(
      images=0, since=0, start={'run': str(begin), 'data': cards.mark(old)}), begin)


def _opened(config: ConfigDict, start: _Start, mesh: Mesh | None, say: Callable, accept: bool
            ) -> tuple[Run, checkpoint.Found | None]:
  """(the run, its data loaded, the same in all processes; of a longer training that has no checkpoint yet, that of the run
  which it starts from). UserError where this does not fit, or leaves nothing to train; nothing has been written then."""
  workdir, card, begin = start
  here = f'eqssl resume {shlex.quote(str(workdir))} {MOVED}' if (workdir / 'config.json').is_file() else ''
  run = prepare(config, mesh, say, card, accept, here or begin and where(config) or '')
  if not card:
    run = first_card(begin or workdir, run, say)
  distributed.agree("the data's", cards.facts(run.card))
  begin, first = run.card.start or start.begin and {'run': str(start.begin)}, None
  if begin and not distributed.gather(checkpoint.steps(workdir / 'checkpoints'))[0]:
    where_from = pathlib.Path(begin['run'], 'checkpoints')
    first = checkpoint.load(where_from, abstract(run, config.sharding), begin.get('step'), say)
    if first[0] >= run.recipe.steps:
      more = f'--config.steps={2 * config.steps}' if config.steps else f'--config.epochs={2 * config.epochs:g}'
      raise UserError(f'{begin["run"]} is at step {first[0]}, and {run.recipe.steps} steps are asked for: nothing to train.',
                      f'Ask for more, e.g. {more}')
    run = run._replace(card=run.card._replace(start={**begin, 'step': first[0]}))
  return run, first


def _begun(run: Run, first: checkpoint.Found | None, start: _Start, saved: checkpoint.Checkpoints, say: Callable
           ) -> tuple[Run, states.TrainState]:
  """The run, with its card as it is from now on in its data.json, and its state: of its newest valid checkpoint, else of
  that of the run that it starts from, `first`, which is saved as its own at once, else the initial one."""
  card, rule = run.card, run.config.sharding
  found = saved.restore(abstract(run, rule))
  held = found or first
  state = held[1] if held else initial(run, rule)
  other = cards.differences(start.known, card) if start.known else ()
  if other:
    card = card._replace(changes=(*card.changes, f'from step {int(state.step)}: {"; ".join(other)}'))
  if distributed.main():
    cards.write(start.workdir, card)
  run, total = run._replace(card=card), run.recipe.steps
  if first:
    saved.save(int(state.step), state, meta(run), wait=True)
  say(f'{start.workdir.name}: ' + (f'resuming at step {int(state.step)} of {total}' if found else f'{total} steps') +
      (f' from step {int(state.step)} of {card.start["run"]}' if first else '') +
      f', batch {run.config.batch} = {run.mesh.devices.size} devices x {run.config.batch // run.mesh.devices.size}')
  if line := slow_start(run.config, run.recipe):
    say(line)
  return run, state


def meta(run: Run) -> dict:
  """What a checkpoint says beside its state."""
  return {'data': cards.as_json(run.card)}


def train(config: ConfigDict, workdir: str | pathlib.Path, command: str = '', hooks: tuple[Hook, ...] = (),
          mesh: Mesh | None = None, quiet: bool = False, accept: bool = False, begin: str | pathlib.Path | None = None
          ) -> states.TrainState:
  """Run `config` in `workdir`: from its newest valid checkpoint if it has one, else from the start, which of a longer
  training is the newest valid checkpoint of the run `begin`. accept: go on with data that are not the run's.

  Raises UserError: 5 the workdir holds another config, 9 the data are not the run's, 3 it is in use, 4 no checkpoint of it
  is valid, 6 a loss is not finite, 75 it was asked to stop (the state is saved and the message says how to resume).
  """
  workdir, begin = pathlib.Path(workdir).absolute(), begin and pathlib.Path(begin).absolute()
  distributed.agree('config', record.leaves(configs.as_json(config)))
  say = (lambda line: None) if quiet or not distributed.main() else stop.say
  with contextlib.ExitStack() as stack:
    flag, begun = map(stack.enter_context, (stop.heard(), stop.saving()))  # until the last save is done
    place = _start(config, workdir, begin, say)
    run, first = _opened(config, place, mesh, say, accept)
    stop.check()
    check = write = show = lambda *args: None
    if distributed.main():
      workdir.mkdir(parents=True, exist_ok=True)
      check = stack.enter_context(record.lock(workdir))
      record.start(workdir, configs.as_json(run.config), command or shlex.join(sys.argv), False,
                   (*free(config), *since(config, workdir)), configs.TOP)
    distributed.seen(f'{workdir}/config.json', (workdir / 'config.json').is_file)
    saved = stack.enter_context(checkpoint.open(workdir / 'checkpoints', keep=config.keep, log=say))
    run, state = _begun(run, first, place, saved, say)
    stop.check()
    start, total = int(state.step), run.recipe.steps
    if distributed.main():
      write = stack.enter_context(record.open_metrics(workdir, start, config.tensorboard))
      show = stack.enter_context(progress(total, start, workdir.name, quiet))
    asked = distributed.preempted if jax.process_count() > 1 else lambda n: flag()
    every = config.checkpoint_every or max(total // 10, 1)
    knn_every = max(round(config.knn_every * run.recipe.steps_per_epoch), 1) if config.knn_every else 0
    measure = monitor(run) if knn_every else None
    log, stopped = _Log([], [time.perf_counter(), start, 0., False]), []

    def on_step(state: states.TrainState, n: int, metrics: dict, waited: float) -> bool:
      begun()
      log.pending.append((n, metrics))
      log.since[2] += waited
      ends = asked(n)
      due = n % every == 0 or n == total or ends
      measured = measure(state) if knn_every and n % knn_every == 0 else {}
      if n % config.log_every == 0 or due or measured:
        _flush(run, log, write, show, say, saved.latest, measured)
      if due:
        check()
        saved.save(n, state, meta(run), wait=ends)
      for hook in hooks:
        hook(run, state, n)
      if ends and n < total:
        stopped.append(n)
      return ends

    state = fit(run, state, on_step)
  if stopped:
    raise UserError(f'stopped at step {stopped[0]} of {total}; everything is saved.',
                    f'Resume: eqssl resume {shlex.quote(str(workdir))}', PREEMPTED)
  return state

"""Evaluate a run's checkpoint: every number with its protocol's name, the untrained network and chance beside it."""
import functools
import json
import os
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from rich.console import Console
from rich.table import Table

from equivariant_ssl import augment, checkpoint, record, shard, train
from equivariant_ssl import config as configs
from equivariant_ssl.errors import UserError
from equivariant_ssl.evaluate import equivariance, knn, linear
from equivariant_ssl.evaluate.features import features, in_batches
from equivariant_ssl.evaluate.statistics import Result, show
from equivariant_ssl.keys import key_for
from equivariant_ssl.recipe import Recipe
from equivariant_ssl.state import TrainState
from equivariant_ssl.types import Array, Image, Pair

SEED = 0  # of the held-out views: the same for every run and checkpoint


class Frozen(NamedTuple):
  """A network in eval mode as pure functions of its variables, which compile once for all checkpoints.

  encode: (variables, images [B S S C] in [0, 1]) -> features [B D].
  pairs: {objective: {what was done: ((variables, (index [B], images uint8 [B S S C])) -> Pair [B V ...])}}, for
  'all' the objective's own chain and for each op that it is told that op alone; of the objectives that predict
  where an embedding goes.
  answer: {objective: ((variables, Pair [N ...]) -> [N E])}.
  """
  encode: Any
  pairs: dict[str, dict[str, Any]]
  answer: dict[str, Any]


def variables(state: TrainState) -> dict:
  """What a frozen network needs of a state."""
  return {'params': state.params, 'batch_stats': state.stats}


def frozen(recipe: Recipe) -> Frozen:
  """The evaluation functions of a recipe; build them once, for the programs are cached by them."""
  network = recipe.network

  def encode(values: dict, images: Array) -> Array:
    return network.apply(values, images, method='encode')

  def pairs_of(name: str, only: str | None):
    objective = recipe.equivariances[name]
    groups = {g: recipe.groups[g] for g in objective.uses}
    if only:
      alone = lambda group: group._replace(chains=(augment.only(group.chains[0], only),) * len(group.chains))
      groups = {g: group if g == 'reference' else alone(group) for g, group in groups.items()}

    def pairs(values: dict, rows: tuple[Array, Array]) -> Pair:
      def of_one(index: Array, pixels: Array):
        image = Image(pixels[None].astype(jnp.float32) / 255., jnp.full((1, 2), pixels.shape[0], jnp.float32))
        shown = augment.views(groups, key_for(jax.random.key(SEED), 'held out', index), image)
        return jax.tree.map(lambda a: a[0], shown)
      shown = jax.vmap(of_one)(*rows)
      found = {g: network.apply(values, v.images, False, objective.tap, method='encode') for g, v in shown.items()}
      actions = {g: v.actions for g, v in shown.items()}
      pair = network.apply(values, name, recipe.equivariances, found, actions, False, method='pair')
      B = rows[0].shape[0]
      return jax.tree.map(lambda a: a.reshape(B, -1, *a.shape[1:]), pair)
    return pairs

  def answer_of(name: str):
    return lambda values, pair: network.apply(values, name, pair, method='answer')

  names = {n: [None, *told(recipe, n)] for n, e in recipe.equivariances.items() if e.predicts == 'target'}
  return Frozen(encode, {n: {o or 'all': pairs_of(n, o) for o in which} for n, which in names.items()},
                {n: answer_of(n) for n in names})


def told(recipe: Recipe, name: str) -> list[str]:
  """The names of the ops that objective `name` is told."""
  return recipe.wirings[name].told.name.split('+')


def gains(recipe: Recipe, fixed: Frozen, state: TrainState, name: str, images: np.ndarray, what: str = 'all',
          batch: int = 256) -> equivariance.Measured:
  """EquiMod's gains and their controls for objective `name` on held-out uint8 `images`, under action `what`."""
  index = np.arange(len(images), dtype=np.int32)
  values = variables(state)
  pair = in_batches(Partial(fixed.pairs[name][what], values), (index, images), batch)
  V = pair.target.shape[1]
  pair = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), pair)
  identity = recipe.wirings[name].own[0].identity(jnp.full(2, recipe.canvas, jnp.float32))
  return equivariance.measure(Partial(fixed.answer[name], values), pair, identity, jax.random.key(SEED),
                              np.repeat(index, V), batch * V)


def _labelled(run: train.Run) -> bool:
  return run.source.train.labels is not None and run.source.test is not None and run.source.test.labels is not None


def _features(run: train.Run, fixed: Frozen, state: TrainState) -> tuple:
  """What a classifier of frozen features reads: (training features, labels, test features, labels, classes)."""
  source, encode = run.source, Partial(fixed.encode, variables(state))
  of = lambda split: features(encode, split.images, mesh=run.mesh)
  return of(source.train), source.train.labels, of(source.test), source.test.labels, len(source.classes)


def _classify(run: train.Run, fixed: Frozen, state: TrainState, arrays: Callable[[], tuple], what: str, protocol: str
              ) -> Result:
  """kNN, or the linear `protocol`, of a state; `arrays` gives its `_features` where they are read."""
  source = run.source
  if what == 'linear' and protocol == 'equimod':
    return linear.equimod(Partial(fixed.encode, variables(state)), source.train.images, source.train.labels,
                          source.test.images, source.test.labels, len(source.classes), run.key, mesh=run.mesh)
  return (knn.evaluate if what == 'knn' else linear.cached)(*arrays())


def as_json(value: Any) -> Any:
  """NamedTuples as objects, arrays as lists, for a result file."""
  if hasattr(value, '_asdict'):
    return {k: as_json(v) for k, v in value._asdict().items()}
  if isinstance(value, dict):
    return {k: as_json(v) for k, v in value.items()}
  if isinstance(value, np.ndarray):
    return value.tolist()
  return value


def _write(workdir: pathlib.Path, protocol: str, content: dict) -> pathlib.Path:
  path = workdir / 'eval' / f'{protocol.replace(" ", "-").replace("=", "")}.json'
  path.parent.mkdir(exist_ok=True)
  part = path.with_suffix('.tmp')
  part.write_text(json.dumps(as_json(content), indent=1) + '\n')
  os.replace(part, path)
  return path


def evaluate(workdir: pathlib.Path, which: list[str], protocol: str = 'cached', step: int | None = None,
             asked: bool = True) -> None:
  """Evaluate the newest valid checkpoint (or that of `step`) of a run, print tables and write eval/PROTOCOL.json.

  which: of 'knn', 'linear', 'equivariance'. asked: whether the user named them; else those that the run cannot
  have (no labels, no objective) are said and left out. Raises UserError where one that was asked cannot be.
  """
  if protocol not in ('cached', 'equimod'):
    raise UserError(f'there is no linear protocol {protocol!r}.', 'One of: cached, equimod.')
  console = Console(soft_wrap=True)
  run = train.prepare(configs.read(workdir / 'config.json'), shard.mesh(jax.devices()[:1]), console.print)
  cannot = {}
  if not _labelled(run):
    reason = f'{run.config.data.name} has no labels', 'Class folders give labels; --equivariance needs none.'
    cannot |= {'knn': reason, 'linear': reason}
  if not any(e.predicts == 'target' for e in run.recipe.equivariances.values()):
    cannot['equivariance'] = ('the run has no objective that predicts an embedding',
                              'Train with --config.equivariance.name=equimod.')
  for what in [w for w in which if w in cannot]:
    if asked:
      raise UserError(f'{what}: {cannot[what][0]}.', cannot[what][1])
    console.print(f'{what} left out: {cannot[what][0]}')
  which = [w for w in which if w not in cannot]
  number, state = checkpoint.load(workdir / 'checkpoints', train.abstract(run), step, console.print)[:2]
  base, fixed = train.initial(run), frozen(run.recipe)
  about = {'checkpoint': number, 'steps': run.recipe.steps, 'seed': run.config.seed,
           'images': len(run.source.test.images), 'environment': record.environment()}
  table = Table(title=f'{workdir.name}, step {number} of {run.recipe.steps}, {len(run.source.test.images)} test images')
  for column in ('protocol', 'trained', 'untrained', 'chance'):
    table.add_column(column, justify='left' if column == 'protocol' else 'right')
  arrays = [(s, functools.cache(lambda s=s: _features(run, fixed, s))) for s in (state, base)]  # once for all protocols
  for what in [w for w in which if w != 'equivariance']:
    after, before = (_classify(run, fixed, s, a, what, protocol) for s, a in arrays)
    name = after.protocol if what == 'knn' else f'linear {after.protocol}'
    chance = float(np.bincount(run.source.test.labels).max() / len(run.source.test.labels))
    _write(workdir, name, {'protocol': name, 'trained': after, 'untrained': before, 'chance': chance, **about})
    table.add_row(f'{name}, top-1 %', *(f'{100 * x:.2f}' for x in (after.top1, before.top1, chance)))
  if table.rows:
    console.print(table)
  if 'equivariance' in which:
    _equivariance(run, fixed, state, base, workdir, about, console)
  console.print(f'Written to {workdir / "eval"}')


def _equivariance(run: train.Run, fixed: Frozen, state: TrainState, base: TrainState, workdir: pathlib.Path,
                  about: dict, console: Console) -> None:
  """Measure, print and write the gains of every objective, per augmentation."""
  for name, by_op in fixed.pairs.items():
    table = Table(title=f'{name}: absolute gain x 100 on held-out images [95 % over images]; doing nothing is 0')
    for column in ('actions', 'true', 'shuffled', 'zeroed', 'true - shuffled', 'ratio', 'untrained: true - shuffled'):
      table.add_column(column, justify='left' if column == 'actions' else 'right')
    found = {}
    for op in by_op:
      after, before = (gains(run.recipe, fixed, s, name, run.source.test.images, op) for s in (state, base))
      found[op] = {'trained': after, 'untrained': before}
      table.add_row(op, *(show(x, 100) for x in (after.true.absolute, after.shuffled.absolute, after.zeroed.absolute,
                                                 after.over_shuffled)),
                    show(after.true.ratio, 1, sign=False), show(before.over_shuffled, 100))
    _write(workdir, f'equivariance {name}', {'protocol': f'equivariance {name}', 'actions': found, **about})
    console.print(table)

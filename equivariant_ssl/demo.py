"""The thesis on real scans, offline: a digit's turn as an invariance, as a sensitivity, as both. 6 becomes 9."""
import json
import pathlib
import time
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.tree_util import Partial
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from equivariant_ssl import config as configs
from equivariant_ssl import demo_figure, record, shard, state, train
from equivariant_ssl.evaluate import fewshot, knn, linear, run
from equivariant_ssl.evaluate.features import features
from equivariant_ssl.evaluate.statistics import Interval, mean_std, paired, show

ARMS = {  # name: (config, overrides, what it is); the first two words of each story are its row of the table
    'crops': ('digits_simclr', {}, 'SimCLR, crops'),
    'invariant': ('digits_simclr_equimod', {'equivariance': "{'name': 'none'}", 'augment.rotate.role': 'invariant'},
                  '... and turns as one more invariance'),
    'both': ('digits_simclr_equimod', {'augment.rotate.role': 'both'}, '... and EquiMod told of the turns (both)'),
    'sensitive': ('digits_simclr_equimod', {}, 'SimCLR, crops; EquiMod\'s own views turn (sensitive)'),
}
READOUTS = {'linear': 'linear (cached) %', 'knn': 'kNN %', 'few': '5 labels a class %'}


class Arm(NamedTuple):
  """Of one arm: what it is, and over seeds its read-outs {name: [seeds]}, gains (or None), loss curves."""
  story: str
  readouts: dict[str, list[float]]
  gains: list[Any] | None
  losses: list[list[float]]


def readouts(fixed: run.Frozen, values: dict, source) -> dict[str, float]:
  """Linear, kNN and five-labels accuracy in per cent."""
  encode, K = Partial(fixed.encode, values), len(source.classes)
  of = lambda split: features(encode, split.images, batch=512)
  arrays = of(source.train), source.train.labels, of(source.test), source.test.labels, K
  return {'linear': 100 * linear.cached(*arrays).top1, 'knn': 100 * knn.evaluate(*arrays).top1,
          'few': 100 * fewshot.few_labels(*arrays, jax.random.key(0)).mean}


def train_arm(name: str, seeds: int, steps: int, tick) -> dict[str, Arm]:
  """Train and read out one arm over seeds; and its untrained network, under 'untrained'."""
  file, overrides, story = ARMS[name]
  config = configs.load(file, {**overrides, **({'steps': str(steps)} if steps else {})})
  base = train.prepare(config, shard.mesh(jax.devices()[:1]))
  recipe, (step, data), fixed = base.recipe, train.compiled(base), run.frozen(base.recipe)
  initial = jax.jit(lambda key: state.build(recipe, key), out_shardings=shard.replicated(base.mesh),
                    compiler_options=shard.ONCE)
  has_head = bool(recipe.equivariances)
  empty = lambda story: Arm(story, {k: [] for k in READOUTS}, [] if has_head else None, [])
  arms = {'untrained': empty('untrained'), name: empty(story)}

  def read(arm: Arm, trained: state.TrainState) -> None:
    for k, v in readouts(fixed, run.variables(trained), base.source).items():
      arm.readouts[k].append(v)
    if has_head:
      arm.gains.append({what: run.gains(recipe, fixed, trained, 'equimod', base.source.test.images, what, 512)
                        for what in fixed.pairs['equimod']})

  for seed in range(seeds):
    seeded = base._replace(key=jax.random.key(seed))
    first = initial(seeded.key)
    if name in ('crops', 'both'):
      read(arms['untrained'], first)
    losses = []

    def on_step(_, n: int, metrics: dict, waited: float) -> bool:
      losses.append(metrics)
      tick()
      return False

    last = train.fit(seeded, first, on_step, step, data)
    arms[name].losses.append([float(m['loss']) for m in jax.device_get(losses)])
    read(arms[name], last)
  return arms


def conclude(arms: dict[str, Arm]) -> str:
  """One sentence, from the numbers."""
  against = lambda a, b, what: paired(arms[a].readouts[what], arms[b].readouts[what])

  def verb(of: Interval, up: str, down: str) -> str:
    return (up if of.mean > 0 else down) if of.excludes_zero else 'makes no difference that these seeds can show to'
  cost, keep, gain = (against('invariant', 'crops', 'knn'), against('sensitive', 'crops', 'knn'),
                      against('both', 'invariant', 'knn'))
  told = [g['all'].over_shuffled for g in arms['sensitive'].gains]
  return (f'On these digits, turning as an invariance {verb(cost, "helps", "costs")} kNN accuracy ({show(cost)} points '
          f'against crops alone); telling EquiMod of the turns {verb(gain, "wins back", "loses more of")} it '
          f'({show(gain)}); and sensitivity instead of invariance {verb(keep, "adds to", "takes from")} crops alone '
          f'({show(keep)}), while the predictor {"uses" if all(t.excludes_zero and t.mean > 0 for t in told) else "does not use"} '
          'what it is told.')


def tables(arms: dict[str, Arm], console: Console) -> None:
  """The results, the paired differences, and what the predictor learnt."""
  one = lambda values: '{:.1f}'.format(mean_std(values)[0]) + (
      ' ± {:.1f}'.format(mean_std(values)[1]) if len(values) > 1 else '')
  seeds = len(arms['crops'].readouts['knn'])
  table = Table(title=f'Accuracy on 797 held-out digits, mean ± std over {seeds} seeds; difference from crops alone '
                      'paired by seed [95 %]')
  table.add_column('arm')
  for title in READOUTS.values():
    table.add_column(title, justify='right')
  table.add_column('kNN - crops', justify='right')
  for name, arm in arms.items():
    difference = '' if name == 'crops' else show(paired(arm.readouts['knn'], arms['crops'].readouts['knn']))
    table.add_row(arm.story, *(one(arm.readouts[k]) for k in READOUTS), difference)
  console.print(table)
  table = Table(title='EquiMod\'s absolute gain x 100 on held-out digits: mean ± std over seeds; doing nothing is 0')
  for column in ('arm', 'true turns', 'turns of other images', 'no turn', 'true - others', 'ratio of means'):
    table.add_column(column, justify='left' if column == 'arm' else 'right')
  for arm in arms.values():
    if arm.gains:
      g = [x['all'] for x in arm.gains]
      table.add_row(arm.story, *(one([100 * getattr(x, k).absolute.mean for x in g])
                                 for k in ('true', 'shuffled', 'zeroed')),
                    one([100 * x.over_shuffled.mean for x in g]), one([x.true.ratio.mean for x in g]))
  console.print(table)


def run_demo(out: pathlib.Path, seeds: int = 3, steps: int = 0) -> dict[str, Arm]:
  """Train every arm over `seeds` seeds (for `steps` steps instead of the configs' epochs where > 0), print the
  tables and the conclusion, and write results.json, table.txt and figure.png into `out`."""
  start, console = time.perf_counter(), Console(soft_wrap=True)
  out.mkdir(parents=True, exist_ok=True)
  console.print(f'{len(ARMS)} arms x {seeds} seeds: the same network, steps and images; only the role of the turn differs.')
  arms: dict[str, Arm] = {}
  with Progress(console=Console(stderr=True), transient=True) as bar:
    for name, (file, overrides, story) in ARMS.items():
      config = configs.load(file, overrides)
      total = steps or round(config.epochs * (1000 // config.batch))
      task = bar.add_task(story, total=total * seeds)
      found = train_arm(name, seeds, steps, lambda task=task: bar.advance(task))
      console.print(f'{story}: done after {time.perf_counter() - start:.0f} s')
      for k, arm in found.items():
        if arm.readouts['knn']:
          arms[k] = arm if k not in arms else arms[k]._replace(gains=arm.gains)
  arms = {k: arms[k] for k in ('untrained', *ARMS)}
  tables(arms, console)
  console.print(conclude(arms))
  minutes = (time.perf_counter() - start) / 60
  (out / 'results.json').write_text(json.dumps(
      {'arms': run.as_json(arms), 'minutes': minutes, 'environment': record.environment()}, indent=1) + '\n')
  with open(out / 'table.txt', 'w') as file:
    console = Console(file=file, width=160)
    tables(arms, console)
    console.print(conclude(arms))
  demo_figure.draw(out / 'figure.png', arms)
  print(f'{minutes:.1f} minutes. Figure: {out / "figure.png"}  Numbers: {out / "results.json"}\n'
        'Next: eqssl train --config digits_simclr_equimod --workdir runs/mine')
  return arms

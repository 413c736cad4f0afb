"""The thesis on real scans, offline: a digit's turn as an invariance, as a sensitivity, as both. 6 becomes 9."""
import json
import multiprocessing
import os
import pathlib
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from typing import Any, NamedTuple

import jax
from jax.tree_util import Partial
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from equivariant_ssl import config as configs
from equivariant_ssl import demo_figure, record, shard, state, train
from equivariant_ssl.evaluate import fewshot, knn, linear, run
from equivariant_ssl.evaluate.features import features
from equivariant_ssl.evaluate.statistics import Interval, mean_std, paired, show

ARMS = {  # name: (config, overrides, what it is)
    'crops': ('digits_simclr', {}, 'SimCLR with crops'),
    'invariant': ('digits_simclr_equimod', {'equivariance': "{'name': 'none'}", 'augment.rotate.role': 'invariant'},
                  'SimCLR with crops, and quarter turns as one more invariance: 6 becomes 9'),
    'both': ('digits_simclr_equimod', {'augment.rotate.role': 'both'},
             'the same, and EquiMod is told of the turns: its published wiring'),
    'sensitive': ('digits_simclr_equimod', {},
                  'SimCLR with crops alone; only EquiMod\'s own views turn: sensitivity instead of invariance'),
}
LONGEST_FIRST = ('sensitive', 'both', 'invariant', 'crops')
READOUTS = {'linear': 'linear %', 'knn': 'kNN %', 'few': '5 labels %'}  # protocols: cached; k=200, T=.1; a class, ridge


class Arm(NamedTuple):
  """Of one arm, over seeds: its read-outs {name: [seeds]}, gains (or None), loss curves."""
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


def train_arm(name: str, seeds: int, steps: int) -> dict[str, Arm]:
  """Train and read out one arm over seeds; and its untrained network, under 'untrained'."""
  file, overrides, _ = ARMS[name]
  config = configs.load(file, {**overrides, **({'steps': str(steps)} if steps else {})})
  base = train.prepare(config, shard.mesh(jax.devices()[:1]))
  recipe, (step, data), fixed = base.recipe, train.compiled(base), run.frozen(base.recipe)
  initial = state.initialiser(recipe, shard.replicated(base.mesh))
  has_head = bool(recipe.equivariances)
  arms = {k: Arm({k: [] for k in READOUTS}, [] if has_head else None, []) for k in ('untrained', name)}

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
      _tick()
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
  uses = all(t.excludes_zero and t.mean > 0 for t in told)
  return (f'On these digits, turning as an invariance {verb(cost, "helps", "costs")} kNN accuracy ({show(cost)} points '
          f'against crops alone); telling EquiMod of the turns {verb(gain, "wins back", "loses more of")} it '
          f'({show(gain)}); and sensitivity instead of invariance {verb(keep, "adds to", "takes from")} crops alone '
          f'({show(keep)}), while the predictor {"uses" if uses else "does not use"} what it is told.')


def tables(arms: dict[str, Arm], console: Console) -> None:
  """What the arms are, the results, the paired differences, and what the predictor learnt."""
  one = lambda values: f'{mean_std(values)[0]:.1f}' + (f' ± {mean_std(values)[1]:.1f}' if len(values) > 1 else '')
  for name, (_, _, story) in ARMS.items():
    console.print(f'{name:10s} {story}')
  seeds = len(arms['crops'].readouts['knn'])
  table = Table(title=f'797 held-out digits: mean ± std of {seeds} seeds; paired difference [95 %]')
  for column in ('arm', *READOUTS.values(), 'kNN - crops'):
    table.add_column(column, justify='left' if column == 'arm' else 'right')
  for name, arm in arms.items():
    difference = '' if name == 'crops' else show(paired(arm.readouts['knn'], arms['crops'].readouts['knn']), digits=1)
    table.add_row(name, *(one(arm.readouts[k]) for k in READOUTS), difference)
  console.print(table)
  table = Table(title='EquiMod\'s gain x 100, told the true turns, those of other images, none; doing nothing is 0')
  for column in ('arm', 'true', 'shuffled', 'zeroed', 'true - shuffled', 'ratio'):
    table.add_column(column, justify='left' if column == 'arm' else 'right')
  for name, arm in arms.items():
    if arm.gains:
      g = [x['all'] for x in arm.gains]
      table.add_row(name, *(one([100 * getattr(x, k).absolute.mean for x in g]) for k in ('true', 'shuffled', 'zeroed')),
                    one([100 * x.over_shuffled.mean for x in g]), one([x.true.ratio.mean for x in g]))
  console.print(table)


_done = None  # of a worker: the steps that all of them have done, shared


def _tick() -> None:
  if _done is not None:
    with _done.get_lock():
      _done.value += 1


def _begin(done: Any, cache: str | None) -> None:
  """A worker's first act."""
  global _done
  _done = done
  jax.config.update('jax_compilation_cache_dir', cache)


def train_arms(seeds: int, steps: int, console: Console) -> dict[str, Arm]:
  """Every arm, a process a core: steps this small do not fill two cores, but two arms do."""
  total = sum(seeds * (steps or round(c.epochs * (1000 // c.batch)))
              for c in (configs.load(file, overrides) for file, overrides, _ in ARMS.values()))
  spawn = multiprocessing.get_context('spawn')
  done = spawn.Value('q', 0)
  flags = os.environ.get('XLA_FLAGS', '')
  os.environ |= {'XLA_FLAGS': f'{flags} --xla_cpu_multi_thread_eigen=false', 'JAX_PLATFORMS': 'cpu'}
  cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
  start, arms = time.perf_counter(), {}
  with (ProcessPoolExecutor(min(cores, len(ARMS)), spawn, _begin, (done, jax.config.jax_compilation_cache_dir)) as pool,
        Progress(console=Console(stderr=True), transient=True) as bar):
    task = bar.add_task('training', total=total)
    waiting = {pool.submit(train_arm, name, seeds, steps): name for name in LONGEST_FIRST}
    while waiting:
      for future in wait(waiting, timeout=.2, return_when=FIRST_COMPLETED).done:
        name = waiting.pop(future)
        for k, arm in future.result().items():
          if arm.readouts['knn'] and (k not in arms or arm.gains):
            arms[k] = arm
        console.print(f'{name}: {seeds} seeds done after {time.perf_counter() - start:.0f} s')
      bar.update(task, completed=done.value)
  return {k: arms[k] for k in ('untrained', *ARMS)}


def run_demo(out: pathlib.Path, seeds: int = 3, steps: int = 0) -> dict[str, Arm]:
  """Train every arm over `seeds` seeds (for `steps` steps instead of the configs' epochs where > 0), print the
  tables and the conclusion, and write results.json, table.txt and figure.png into `out`."""
  start, console = time.perf_counter(), Console(soft_wrap=True)
  out.mkdir(parents=True, exist_ok=True)
  console.print(f'{len(ARMS)} arms x {seeds} seeds: the same network, steps and images; only the role of the turn differs.')
  arms = train_arms(seeds, steps, console)
  minutes = (time.perf_counter() - start) / 60
  with open(out / 'table.txt', 'w') as file:
    for printer in (console, Console(file=file, width=110)):
      tables(arms, printer)
      printer.print(conclude(arms))
  (out / 'results.json').write_text(json.dumps(
      {'arms': run.as_json(arms), 'minutes': minutes, 'environment': record.environment()}, indent=1) + '\n')
  demo_figure.draw(out / 'figure.png', arms)
  print(f'{minutes:.1f} minutes. Figure: {out / "figure.png"}  Numbers: {out / "results.json"}\n'
        'Next: eqssl train --config digits_simclr_equimod --workdir runs/mine')
  return arms

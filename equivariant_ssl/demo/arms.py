"""Arms of a demonstration: configs trained over seeds and read out alike, one process a core."""
import multiprocessing
import os
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.tree_util import Partial
from rich.console import Console
from rich.progress import Progress

from equivariant_ssl import config as configs
from equivariant_ssl import shipped
from equivariant_ssl.evaluate import fewshot, frozen, inputs, knn, linear
from equivariant_ssl.evaluate.statistics import mean_std
from equivariant_ssl.parallel import sharding
from equivariant_ssl.training import loop, state

READOUTS = {'linear': 'linear %', 'knn': 'kNN %', 'few': '5 labels %'}  # protocols: cached; k=200, T=.1; a class, ridge
LAST = 10  # steps over which the last metrics are averaged


class Spec(NamedTuple):
  """An arm to train: a config with overrides, and what it is in words. untrained: read its network out untrained too."""
  config: str
  overrides: dict[str, str]
  story: str = ''
  untrained: bool = False


class Arm(NamedTuple):
  """Of one arm, over seeds: its read-outs {name: [seeds]}, EquiMod's gains (or None), loss curves, and the mean of each
  metric over the last steps."""
  readouts: dict[str, list[float]]
  gains: list[Any] | None
  losses: list[list[float]]
  last: list[dict[str, float]]


def readouts(fixed: frozen.Frozen, values: dict, source, size: int) -> dict[str, float]:
  """Linear, kNN and five-labels accuracy in per cent; size: of what the network is shown."""
  encode, K = Partial(fixed.encode, values), len(source.classes)
  of = lambda split: inputs.features(encode, split, inputs.of(size, split), batch=512)
  arrays = of(source.train), source.train.labels, of(source.test), source.test.labels, K
  return {'linear': 100 * linear.cached(*arrays).top1, 'knn': 100 * knn.evaluate(*arrays).top1,
          'few': 100 * fewshot.few_labels(*arrays, jax.random.key(0)).mean}


def load(spec: Spec, steps: int):
  """The config of `spec`, for `steps` steps where > 0."""
  return configs.load(spec.config, {**spec.overrides, **({'steps': str(steps)} if steps else {})},
                      shipped.config(spec.config))


def train_arm(name: str, spec: Spec, seeds: int, steps: int) -> dict[str, Arm]:
  """Train and read out one arm over seeds; and its untrained network, under 'untrained', where the spec says so."""
  base = loop.prepare(load(spec, steps), sharding.mesh(jax.devices()[:1]))
  recipe, fixed = base.recipe, frozen.frozen(base.recipe)
  told = list(fixed.pairs.get('equimod', ()))
  arms = {k: Arm({k: [] for k in READOUTS}, [] if told else None, [], [])
          for k in ('untrained', name) if k == name or spec.untrained}

  def read(arm: Arm, trained: state.TrainState) -> None:
    for k, v in readouts(fixed, frozen.variables(trained), base.source, recipe.size).items():
      arm.readouts[k].append(v)
    if told:
      arm.gains.append({what: frozen.gains(recipe, fixed, trained, 'equimod', base.source.test, what, 512)
                        for what in told})

  for seed in range(seeds):
    seeded = base._replace(key=jax.random.key(seed))
    first = loop.initial(seeded)
    if spec.untrained:
      read(arms['untrained'], first)
    seen = []

    def on_step(_, n: int, metrics: dict, waited: float) -> bool:
      seen.append(metrics)
      _tick()
      return False

    trained = loop.fit(seeded, first, on_step)
    seen = jax.device_get(seen)
    arms[name].losses.append([float(m['loss']) for m in seen])
    arms[name].last.append({k: float(np.mean([m[k] for m in seen[-LAST:]])) for k in seen[0]})
    read(arms[name], trained)
  return arms


def show_mean(values) -> str:
  """'91.0 ± 1.6'; '91.0' of one seed."""
  mean, std = mean_std(values)
  return f'{mean:.1f}' + (f' ± {std:.1f}' if std is not None else '')


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


def train_all(specs: dict[str, Spec], seeds: int, steps: int, console: Console) -> dict[str, Arm]:
  """Every arm, the first first, a process a core: steps this small do not fill two cores, but two arms do."""
  loaded = [load(spec, steps) for spec in specs.values()]
  total = sum(seeds * (c.steps or round(c.epochs * (1000 // c.batch))) for c in loaded)
  spawn = multiprocessing.get_context('spawn')
  done = spawn.Value('q', 0)
  flags = os.environ.get('XLA_FLAGS', '')
  os.environ |= {'XLA_FLAGS': f'{flags} --xla_cpu_multi_thread_eigen=false', 'JAX_PLATFORMS': 'cpu'}
  start, arms, workers = time.perf_counter(), {}, min(sharding.count_cores(), len(specs))
  with (ProcessPoolExecutor(workers, spawn, _begin, (done, jax.config.jax_compilation_cache_dir)) as pool,
        Progress(console=Console(stderr=True), transient=True) as bar):
    task = bar.add_task('training', total=total)
    waiting = {pool.submit(train_arm, name, spec, seeds, steps): name for name, spec in specs.items()}
    while waiting:
      for future in wait(waiting, timeout=.2, return_when=FIRST_COMPLETED).done:
        name = waiting.pop(future)
        for k, arm in future.result().items():
          if k not in arms or arm.gains:
            arms[k] = arm
        console.print(f'{name}: {seeds} seeds done after {time.perf_counter() - start:.0f} s')
      bar.update(task, completed=done.value)
  return {k: arms[k] for k in ('untrained', *specs) if k in arms}

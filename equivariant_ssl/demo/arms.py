"""The arms of a demonstration: configs trained over seeds and read out alike, a process a core."""
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

from equivariant_ssl.config import load_config
from equivariant_ssl.evaluate import fewshot, inputs, knn, linear
from equivariant_ssl.evaluate.frozen import Frozen, frozen, gains, variables
from equivariant_ssl.evaluate.statistics import mean_std
from equivariant_ssl.parallel import sharding
from equivariant_ssl.shipped import shipped_config
from equivariant_ssl.training.loop import fit
from equivariant_ssl.training.runs import initial_state, prepare_run

# The head of each read-out's column: cached; k=200, T=.1; five labels a class, ridge.
READOUTS = {'linear': 'linear %', 'knn': 'kNN %', 'few': '5 labels %'}
LAST_STEPS = 10  # over which the last metrics are averaged


class ArmSpec(NamedTuple):
  """An arm to train: a config with overrides, and what it is in words.

  untrained: whether its untrained network is read out too.
  """
  config: str
  overrides: dict[str, str]
  story: str = ''
  untrained: bool = False


class TrainedArm(NamedTuple):
  """What one arm gave over its seeds.

  readouts: {name: per cent for each seed}. gains: EquiMod's gains for each seed, None without
  EquiMod. losses: the loss curve of each seed. last: the mean of each metric over the last steps,
  for each seed.
  """
  readouts: dict[str, list[float]]
  gains: list[Any] | None
  losses: list[list[float]]
  last: list[dict[str, float]]


def readouts(network: Frozen, values: dict, source: Any, size: int) -> dict[str, float]:
  """Return the linear, kNN and five-labels accuracy of a frozen network, in per cent.

  values: the network's variables. size: the side of the images that it reads.
  """
  encode, classes = Partial(network.encode, values), len(source.classes)
  train, test = (inputs.features(encode, split, inputs.split_inputs(size, split), batch=512)
                 for split in (source.train, source.test))
  arrays = train, source.train.labels, test, source.test.labels, classes
  return {'linear': 100 * linear.cached(*arrays).top1, 'knn': 100 * knn.evaluate(*arrays).top1,
          'few': 100 * fewshot.few_labels(*arrays, jax.random.key(0)).mean}


def arm_config(spec: ArmSpec, steps: int) -> Any:
  """Return the config of an arm, for `steps` steps where that is more than 0."""
  overrides = {**spec.overrides, **({'steps': str(steps)} if steps else {})}
  return load_config(spec.config, overrides, shipped_config(spec.config))


def train_arm(name: str, spec: ArmSpec, seeds: int, steps: int) -> dict[str, TrainedArm]:
  """Train and read out one arm over seeds; return {name: arm}.

  Where the spec says so, its untrained network is another arm, 'untrained'.
  """
  run = prepare_run(arm_config(spec, steps), sharding.mesh(jax.devices()[:1]))
  recipe, source = run.recipe, run.source
  assert source is not None and source.test is not None  # the digits have a test split
  network, test = frozen(recipe), source.test
  groups = list(network.pairs.get('equimod', ()))  # the groups whose gains are measured
  arms = {key: TrainedArm({k: [] for k in READOUTS}, [] if groups else None, [], [])
          for key in ('untrained', name) if key == name or spec.untrained}

  def read_out(arm: TrainedArm, state: Any) -> None:
    accuracies = readouts(network, variables(state), source, recipe.size)
    for key, value in accuracies.items():
      arm.readouts[key].append(value)
    if arm.gains is not None:
      arm.gains.append({group: gains(recipe, network, state, 'equimod', test, group, 512)
                        for group in groups})

  for seed in range(seeds):
    seeded = run._replace(key=jax.random.key(seed))
    first = initial_state(seeded)
    if spec.untrained:
      read_out(arms['untrained'], first)
    trained, metrics = _train(seeded, first)
    arms[name].losses.append([float(row['loss']) for row in metrics])
    arms[name].last.append({key: float(np.mean([row[key] for row in metrics[-LAST_STEPS:]]))
                            for key in metrics[0]})
    read_out(arms[name], trained)
  return arms


def _train(run: Any, state: Any) -> tuple[Any, list[dict]]:
  """Train a run from a state; return the trained state and the metrics of each step."""
  metrics = []

  def on_step(_, step: int, row: dict, clock: Any) -> bool:
    metrics.append(row)
    _count_step()
    return False

  trained = fit(run, state, on_step)
  return trained, jax.device_get(metrics)


def show_mean(values) -> str:
  """Return '91.0 ± 1.6', or '91.0' for one seed."""
  mean, std = mean_std(values)
  return f'{mean:.1f}' + (f' ± {std:.1f}' if std is not None else '')


_steps_done = None  # of a worker process: the count of steps that all workers share


def _count_step() -> None:
  if _steps_done is not None:
    with _steps_done.get_lock():
      _steps_done.value += 1


def _begin(steps_done: Any, cache: str | None) -> None:
  """Set up a worker process."""
  global _steps_done
  _steps_done = steps_done
  jax.config.update('jax_compilation_cache_dir', cache)


def train_all(specs: dict[str, ArmSpec], seeds: int, steps: int,
              console: Console) -> dict[str, TrainedArm]:
  """Train every arm, in the order of `specs`, in a process for each core.

  Steps this small do not keep two cores busy, but two arms do.
  """
  configs = [arm_config(spec, steps) for spec in specs.values()]
  total = sum(seeds * (c.steps or round(c.epochs * (1000 // c.batch))) for c in configs)
  spawn = multiprocessing.get_context('spawn')
  steps_done: Any = spawn.Value('q', 0)
  flags = os.environ.get('XLA_FLAGS', '')
  os.environ |= {'XLA_FLAGS': f'{flags} --xla_cpu_multi_thread_eigen=false',
                 'JAX_PLATFORMS': 'cpu'}
  start, workers = time.perf_counter(), min(sharding.count_cores(), len(specs))
  arms: dict[str, TrainedArm] = {}
  cache: Any = jax.config
  initargs = steps_done, cache.jax_compilation_cache_dir
  with (ProcessPoolExecutor(workers, spawn, _begin, initargs) as pool,
        Progress(console=Console(stderr=True), transient=True) as bar):
    task = bar.add_task('training', total=total)
    waiting = {pool.submit(train_arm, name, spec, seeds, steps): name
               for name, spec in specs.items()}
    while waiting:
      for future in wait(waiting, timeout=.2, return_when=FIRST_COMPLETED).done:
        name = waiting.pop(future)
        for key, arm in future.result().items():
          if key not in arms or arm.gains:
            arms[key] = arm
        seconds = time.perf_counter() - start
        console.print(f'{name}: {seeds} seeds are done after {seconds:.0f} s')
      bar.update(task, completed=steps_done.value)
  return {key: arms[key] for key in ('untrained', *specs) if key in arms}

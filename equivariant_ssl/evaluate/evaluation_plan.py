"""`eqssl eval --plan`: what an evaluation costs, before it starts.

Which of the default protocols the size of the data allows is decided by it, too.
Rates are measured here and now, each on a small part of the work.
"""
import contextlib
import math
import pathlib
import socket
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from equivariant_ssl.data.source import Split
from equivariant_ssl.data.stream import take_rows
from equivariant_ssl.evaluate import (
  frozen,
  inputs,
  knn,
  linear,
  panel_protocols,
  probe,
  row_sums,
  softmax_regression,
)
from equivariant_ssl.evaluate.subject import Subject, source_of
from equivariant_ssl.parallel import processes
from equivariant_ssl.storage.disk import size_text

PASSES = 150     # over the features, of `cached` at all penalties: 94 to 148 were measured
LONGEST = 4.     # hours that a default protocol may take
BATCHES = 3      # of the encoder that are timed
SAMPLE = 16_384  # rows of features on each device that are timed
SPARE = .9       # of the free memory may be taken


class EvaluationSize(NamedTuple):
  """The size of an evaluation: N training and M test images, D features of each, K classes."""
  N: int
  M: int
  D: int
  K: int

  @property
  def feature_bytes(self) -> int:
    """The bytes of the features of both splits, float32."""
    return 4 * self.D * (self.N + self.M)


class EvaluationPlan(NamedTuple):
  """What an evaluation of one network costs.

  rate: images that are read and encoded in a second. seconds: {protocol: of its own, None where
  they are not estimated}, without those of the features that several protocols share. memory: bytes
  that each process needs for features and what is computed of them. free: bytes that each may
  take, None where the system does not say it.
  """
  sizes: EvaluationSize
  devices: int
  kind: str
  rate: float
  feature_seconds: float
  seconds: dict[str, float | None]
  memory: int
  free: int | None


def free_memory() -> int | None:
  """Return the bytes of memory that a machine has free; None where Linux does not say.

  The files that Linux keeps a copy of count as free, in a container too: it drops them for a
  program.
  """
  free = []
  with contextlib.suppress(OSError, ValueError, StopIteration):
    lines = pathlib.Path('/proc/meminfo').read_text(encoding='utf-8').splitlines()
    free.append(1024 * int(next(li for li in lines if li.startswith('MemAvailable')).split()[1]))
  with contextlib.suppress(OSError, ValueError, StopIteration):  # of a container, or SLURM's job
    group = pathlib.Path('/sys/fs/cgroup')
    most, taken = (int((group / f'memory.{name}').read_text(encoding='utf-8'))
                   for name in ('max', 'current'))
    lines = (group / 'memory.stat').read_text(encoding='utf-8').splitlines()
    copies = int(next(li for li in lines if li.startswith('inactive_file ')).split()[1])
    free.append(most - taken + copies)
  return min(free, default=None)


def free_for_a_process() -> int | None:
  """Return the least share of free memory that a process of the job has, the same in all of them;
  None where no machine says it."""
  machines = processes.gather([socket.gethostname(), free_memory()])
  names = [name for name, _ in machines]
  return min((free // names.count(name) for name, free in machines if free is not None),
             default=None)


def evaluation_size(s: Subject) -> EvaluationSize:
  """Return the EvaluationSize of the evaluation of a network."""
  source, side = source_of(s.run), s.run.recipe.size
  image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
  D = jax.eval_shape(s.encode, image).shape[-1]
  return EvaluationSize(len(source.bank.images), len(s.held_out.images), D,
                        len(source.classes or ()))


def _timed(compute: Callable[[], Any]) -> float:
  """Return the seconds of a second call, which compiles nothing."""
  compute()
  start = time.perf_counter()
  compute()
  return time.perf_counter() - start


def encoder_rate(s: Subject) -> float:
  """Return the images that are read, decoded and encoded in a second, by all processes together."""
  source, run = source_of(s.run), s.run
  count = min(len(source.bank.images), BATCHES * 256 * jax.process_count())

  def some(first: int) -> Split:
    rows = (first + np.arange(count)) % len(source.bank.images)
    return take_rows(source.bank, rows)
  parts = iter((some(0), some(count)))  # other images the second time: nothing is decoded already
  run_inputs = inputs.split_inputs(run.recipe.size, source.bank)
  return count / _timed(lambda: inputs.features(s.encode, next(parts), run_inputs, mesh=run.mesh))


def cached_seconds(sizes: EvaluationSize, mesh: Mesh) -> float:
  """Return the seconds of protocol `cached`, from those of one pass over some rows."""
  N, M, D, K = sizes
  count = min(N, SAMPLE * mesh.size)
  x, y = np.ones((count, D), np.float32), np.zeros(count, np.int32)
  weights = np.zeros((D, max(K, 1)), np.float32), np.zeros(max(K, 1), np.float32)
  if linear.is_large(N, D, K):
    rows, gradient = row_sums.make_rows(x, y, mesh), softmax_regression.programs(mesh).gradient
    one = _timed(lambda: jax.block_until_ready(gradient(weights, rows)))
  else:
    z, w = x.astype(np.float64), weights[0].astype(np.float64)
    with linear.one_thread():
      one = _timed(lambda: z.T @ (z @ w))
  return PASSES * N / count * one


def knn_seconds(sizes: EvaluationSize, mesh: Mesh) -> float:
  """Return the seconds of protocol `knn`, from those of some queries on a part of the bank."""
  N, M, D, K = sizes
  bank, queries = min(N, SAMPLE * mesh.size), min(M, knn.QUERIES)
  x = np.ones((max(bank, queries), D), np.float32)
  one = _timed(lambda: knn.knn(x[:bank], np.zeros(bank, np.int32), x[:queries], max(K, 1),
                               mesh=mesh))
  return one * M / queries * N / bank


def _encoded_images(s: Subject, sizes: EvaluationSize, name: str) -> float | None:
  """Return the images that pass the encoder in a protocol beside the shared features; None where it
  is not estimated."""
  if name in ('profile', 'health'):
    return 2. * len(frozen.PANEL) * min(panel_protocols.PANEL_TEST, sizes.M)
  if name in probe.PROTOCOLS:
    protocol = probe.PROTOCOLS[name]
    trainings = 1 + (len(protocol.rates) > 1)
    return float(trainings * (s.options.epochs or protocol.epochs) * sizes.N)
  if name == 'gains':
    recipe = s.run.recipe
    return float(sizes.M * sum(
        len(changes) * len(recipe.groups[group].chains)
        for n, changes in s.functions.pairs.items() for group in recipe.equivariances[n].uses))
  return None


def make_plan(s: Subject, names: list[str]) -> EvaluationPlan:
  """Return the plan of an evaluation of one network under the protocols `names`."""
  sizes, mesh, rate = evaluation_size(s), s.run.mesh, encoder_rate(s)
  timed = {'knn': knn_seconds, 'cached': cached_seconds}
  seconds: dict[str, float | None] = {}
  for name in names:
    images = _encoded_images(s, sizes, name)
    seconds[name] = (timed[name](sizes, mesh) if name in timed
                     else None if images is None else images / rate)
  return EvaluationPlan(sizes, mesh.size, mesh.devices.flat[0].device_kind, rate,
                        (sizes.N + sizes.M) / rate, seconds, _memory(sizes, names),
                        free_for_a_process())


def _memory(sizes: EvaluationSize, names: list[str]) -> int:
  """Return the bytes that a process needs of its machine for features and the work on them."""
  N, M, D, K = sizes
  work = {'cached': 4 * (2 * softmax_regression.MEMORY + 8) * D * K + 4 * M * K,
          'knn': 4 * M * K, 'few_labels': 8 * M * D, 'logistic': 8 * (N + M) * D}
  if not linear.is_large(N, D, K):
    work['cached'] = 3 * 8 * N * D  # scikit-learn's copies
  return sizes.feature_bytes + max((work.get(name, 0) for name in names), default=0)


def too_costly(s: Subject, names: list[str]) -> dict[str, str]:
  """Return {protocol: why} for those of the default protocols that the data's size does not allow.

  Nothing is timed where the data are small. All processes of a job get the same answer.
  """
  readers = [name for name in names if name in ('knn', 'cached', 'few_labels')]
  sizes = evaluation_size(s)
  if not readers or not linear.is_large(sizes.N, sizes.D, sizes.K):
    return {}
  free = free_for_a_process()
  need = _memory(sizes, [name for name in readers if name != 'few_labels'])
  reasons = {}
  if free is not None and need > SPARE * free:
    cause = f'it needs {size_text(need)} of memory, and {size_text(free)} are free'
    reasons = dict.fromkeys(readers, cause)
  elif 'cached' in readers:
    seconds = cached_seconds(sizes, s.run.mesh)
    if seconds > 3600 * LONGEST:
      reasons['cached'] = f'it takes about {duration(seconds)} a network on these devices'
  return processes.gather(reasons)[0]


def duration(seconds: float) -> str:
  """Return seconds in the unit that a reader would use, with two digits."""
  for unit, length in (('days', 86400), ('hours', 3600), ('minutes', 60)):
    if seconds >= 2 * length:
      return f'{seconds / length:.2g} {unit}' if seconds < 100 * length else (
          f'{seconds / length:.0f} {unit}')
  return f'{max(1, math.ceil(seconds))} s'


def lines(plan: EvaluationPlan, networks: int) -> list[str]:
  """Return the lines that describe a plan. networks: 2 where the untrained network is measured
  too."""
  N, M, D, K = plan.sizes
  known = [s for s in plan.seconds.values() if s is not None]
  total = networks * (plan.feature_seconds + sum(known))
  free = '' if plan.free is None else f'; {size_text(plan.free)} are free'
  each = [f'  {name:15} {"not estimated" if seconds is None else duration(seconds)}'
          for name, seconds in plan.seconds.items()]
  return [
      f'devices      {plan.devices} x {plan.kind}, {jax.process_count()} '
      f'process{"es" * (jax.process_count() > 1)}',
      f'images       {N:,} to fit on and {M:,} to test on, {K:,} classes',
      f'features     {D:,} of each image, {size_text(plan.sizes.feature_bytes)} in each process',
      f'encoder      {plan.rate:,.1f} images/s with decoding: {duration(plan.feature_seconds)} for '
      'the features',
      *each,
      f'memory       about {size_text(plan.memory)} in each process beside the program{free}',
      f'in all       about {duration(total)} for {networks} network{"s" * (networks > 1)}'
      + (', without what is not estimated' if len(known) < len(plan.seconds) else ''),
  ]

"""The process that compiles a step for an accelerator which is not there; see compilers.py.

It reads a request from its standard input and leaves a file with the answer.
"""
import hashlib
import json
import math
import pathlib
import re
import sys
from typing import Any

import jax
from jax.experimental import topologies
from ml_collections import ConfigDict

from equivariant_ssl.config import resolve_config
from equivariant_ssl.errors import UserError
from equivariant_ssl.parallel import sharding, step_plan
from equivariant_ssl.parallel.accelerators import (
    ACCELERATORS,
    EXAMPLE,
    PlannedDevices,
    gpu_description,
    target_name,
)
from equivariant_ssl.parallel.compilers import CompiledStep
from equivariant_ssl.parallel.program_report import read_program
from equivariant_ssl.parallel.step_cost import flops_by_precision
from equivariant_ssl.training import runs

UNITS = {'': 1, 'K': 2 ** 10, 'M': 2 ** 20, 'G': 2 ** 30, 'T': 2 ** 40}
# The lines with which libtpu refuses a program, and the errors of XLA that mean the same.
REFUSED = re.compile(r'Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm')


def open_devices(target: PlannedDevices) -> list:
  """Return the devices of a target, for which programs can be compiled but not run."""
  if ACCELERATORS[target.kind].gpu:
    _name_the_gpu()
    described: Any = topologies.get_topology_desc(
        platform='cuda', target_config=gpu_description(target.kind), topology=target.topology)
    return described.devices
  options: dict[str, Any] = {}
  if target.count == 1:  # else libtpu expects the four chips of a host
    options['chips_per_host_bounds'] = 1, 1, 1
  if target.kind == 'v4':  # the two cores of its chip are one device, as on the machines themselves
    options['chip_config_name'] = 'megacore'
  try:
    return list(topologies.get_topology_desc(
        platform='tpu', topology_name=f'{target.kind}:{target.topology}', **options).devices)
  except jax.errors.JaxRuntimeError as error:
    raise UserError(f'--on {target_name(target)}: libtpu knows no such slice. '
                    f'{str(error).splitlines()[0][:200]}', EXAMPLE) from error


def _name_the_gpu() -> None:
  """Let jax lower for 'gpu' where no GPU is: it stands for 'cuda'.

  jax looks for the platform among the devices of the machine (github.com/jax-ml/jax/issues/23971).
  """
  from jax._src import xla_bridge
  canonical = xla_bridge.canonicalize_platform

  def canonicalize_platform(platform: str) -> str:
    return 'cuda' if platform == 'gpu' else canonical(platform)
  xla_bridge.canonicalize_platform = canonicalize_platform


def compile_for(config: Any, target: PlannedDevices, version: str, known: str
                ) -> CompiledStep | None:
  """Compile the step of a resolved config for a target, and return what the compiler says of it.

  known: the digest of a program; None is returned if the step is that program.
  """
  device = ACCELERATORS[target.kind]
  run = step_plan.planned_run(config, sharding.mesh(open_devices(target)), lambda line: None)
  resident = step_plan.resident_images(config, run)
  traced = step_plan.trace_step(run, resident)
  lowered = traced.lower()
  program = hashlib.sha256((version + lowered.as_text()).encode()).hexdigest()[:16]
  if program == known:
    return None
  state = runs.abstract_state(run, config.sharding)
  facts = CompiledStep(
      target=target_name(target), compiler=version, fits=True,
      limit=int(device.usable * device.memory), peak=0,
      weights=step_plan.tree_bytes((state.params, state.stats)),
      optimizer=step_plan.tree_bytes((state.opt_state, state.target, state.extras)),
      batch=step_plan.tree_bytes(step_plan.batch_shapes(run)),
      data=step_plan.data_bytes(run, resident), temporaries=0,
      flops={k: n / target.count for k, n in flops_by_precision(traced.jaxpr.jaxpr).items()},
      images=run.recipe.batch, views=step_plan.count_views(run),
      parameters=sum(math.prod(x.shape) for x in jax.tree.leaves(state.params)),
      steps=run.recipe.steps, steps_per_epoch=run.recipe.steps_per_epoch,
      program=program, work=None)
  # Without a GPU nothing can be tried out, and the code that the compiler writes for products of
  # float32 finds no tiles for some shapes and fails: cuBLAS gets them all.
  options: Any = {'xla_gpu_enable_triton_gemm': False} if device.gpu else None
  try:
    compiled = lowered.compile(compiler_options=options)
  except Exception as error:  # jax has no type of its own for it
    refusal = REFUSED.search(str(error))
    if not refusal:
      raise
    needs, needs_unit, limit, limit_unit = refusal.groups()
    return facts._replace(fits=False, peak=int(float(needs) * UNITS[needs_unit]),
                          limit=int(float(limit) * UNITS[limit_unit]))
  memory = compiled.memory_analysis()
  assert memory is not None  # both compilers have it
  peak = (memory.argument_size_in_bytes + memory.output_size_in_bytes
          - memory.alias_size_in_bytes + memory.temp_size_in_bytes
          + memory.generated_code_size_in_bytes)
  return facts._replace(
      peak=peak, fits=peak <= facts.limit, temporaries=memory.temp_size_in_bytes,
      work=read_program(compiled.as_text() or '')._asdict())


def main() -> None:
  """Answer the request on the standard input."""
  request = json.load(sys.stdin)
  try:
    config = resolve_config(ConfigDict(json.loads(request['config'])))
    compiled = compile_for(config, PlannedDevices(*request['target']), request['version'],
                           request['known'])
    answer: dict = compiled._asdict() if compiled else {}
  except UserError as error:
    cause, _, fix = str(error).partition('\n  ')
    answer = {'error': [cause, fix, error.code]}
  pathlib.Path(request['answer']).write_text(json.dumps(answer), encoding='utf-8')


if __name__ == '__main__':
  main()

"""`eqssl train --plan`: what a step of a config costs on so many devices, from its compiled program, not run."""
import collections
import math
import re
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.sharding import Mesh
from jax.stages import Traced
from ml_collections import ConfigDict

from equivariant_ssl.data.source import fits
from equivariant_ssl.data.stream import lazy
from equivariant_ssl.errors import UserError
from equivariant_ssl.parallel import sharding
from equivariant_ssl.training import recipe as recipes
from equivariant_ssl.training import runs
from equivariant_ssl.training import step as steps

# Images of each split and classes of data sets as published, for a plan where they are not prepared.
KNOWN = {'imagenet2012': ({'train': 1_281_167, 'validation': 50_000}, 1000),
         'cifar10': ({'train': 50_000, 'test': 10_000}, 10),
         'stl10': ({'train': 5_000, 'test': 8_000, 'unlabelled': 100_000}, 10)}
UNLABELLED = 'unlabelled'  # the split without labels
MEMORIES = 16, 24, 32, 40, 80, 141  # GiB of accelerators that there are
COLLECTIVES = 'all-reduce', 'all-gather', 'all-to-all', 'reduce-scatter', 'collective-permute'
BYTES = {'pred': 1, 's8': 1, 'u8': 1, 'bf16': 2, 'f16': 2, 's16': 2, 'u16': 2, 'f32': 4, 's32': 4, 'u32': 4, 'f64': 8,
         's64': 8, 'u64': 8}


class Plan(NamedTuple):
  """Of one step. flops: of the global batch, matrix products and convolutions alone. Bytes of one device: params,
  optimizer (with a target network's copies), kept (activations saved for the gradient), arguments, temporaries (by the
  compiler, kept and gradients included), data (a copy of it, where it does not stream), need (in all; on the CPU, which
  keeps bfloat16 in twice the bytes, the least that any device needs: arguments, gradients, kept, data). collectives:
  {kind: (how many, bytes of their results)}."""
  devices: int
  kind: str
  parameters: int
  flops: float
  params: int
  optimizer: int
  kept: int
  arguments: int
  temporaries: int
  data: int
  need: int
  collectives: dict[str, tuple[int, int]]
  images: int
  views: int
  steps: int
  steps_per_epoch: int


def plan(config: ConfigDict, mesh: Mesh, log: Callable[[str], None] = lambda line: None) -> Plan:
  """Compile the step of a resolved `config` for `mesh`. Raises UserError where the data are neither prepared nor known."""
  run = described(config, mesh, log)
  recipe, state = run.recipe, runs.abstract(run, config.sharding)
  if line := recipes.warmup_warning(config, recipe):
    log(line)
  batch, traced = batch_of(run), trace(run)
  compiled = traced.lower().compile(compiler_options=sharding.ONCE if mesh.devices.flat[0].platform == 'cpu' else None)
  memory = compiled.memory_analysis()
  shown = jax.eval_shape(lambda: steps.views(recipe, run.key, jnp.zeros((), jnp.int32), zeros(batch)))
  total = lambda tree: sum(own_bytes(x) for x in jax.tree.leaves(tree))
  params, saved = total(state.params), kept(run, state, shown)
  need = (memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
          + memory.temp_size_in_bytes)
  if mesh.devices.flat[0].platform == 'cpu':
    need = memory.argument_size_in_bytes + params + saved
  num = len(run.source.train.images) if run.source else count(config)
  streams = lazy(run.source.train.images) if run.source else config.data.get('stream') or not fits(num, recipe.canvas)
  data = 0 if streams else num * recipe.canvas ** 2 * 3
  return Plan(
      mesh.size, mesh.devices.flat[0].device_kind, sum(x.size for x in jax.tree.leaves(state.params)),
      flops(traced.jaxpr.jaxpr), params, total((state.opt_state, state.target)), saved, memory.argument_size_in_bytes,
      memory.temp_size_in_bytes, data, need + data, collectives(compiled.as_text()), recipe.batch,
      sum(v.images.shape[1] for v in shown.values()), recipe.steps, recipe.steps_per_epoch)


def work(config: ConfigDict) -> float:
  """FLOPs of a step of `config`, traced and not compiled, whatever its batch."""
  return flops(trace(described(config, sharding.mesh(jax.devices()[:1]), lambda line: None)).jaxpr.jaxpr)


def batch_of(run: runs.Run) -> steps.Batch:
  """The shapes of a batch, split over the run's mesh."""
  side, B = run.recipe.canvas, run.recipe.batch
  of = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.batch_sharding(run.mesh))
  return steps.Batch(of((B, side, side, 3), jnp.uint8), of((B, 2), jnp.float32),
                     of((B,), jnp.int32) if run.recipe.probe else None)


def trace(run: runs.Run) -> Traced:
  """The run's step, traced for a batch that is given."""
  rule = run.config.sharding
  return steps.streamed_step(run.recipe, run.mesh, rule=rule).trace(run.key, runs.abstract(run, rule), batch_of(run))


def known(config: ConfigDict) -> tuple[int, int] | None:
  """(images to train on, classes of their labels, 0 where some have none) of a config's data, its training split one of
  KNOWN or several joined by + in any order; None where they are not known."""
  splits, classes = KNOWN.get(config.data.get('dataset', config.data.name).split(':')[0], ({}, 0))
  parts = [part.strip() for part in config.data.get('train', 'train').split('+')]
  if not all(part in splits for part in parts):
    return None
  return sum(splits[part] for part in parts), 0 if UNLABELLED in parts else classes


def count(config: ConfigDict) -> int:
  """Images to train on of data in KNOWN, without what the config holds out."""
  return round(known(config)[0] * (1 - config.validation))


def described(config: ConfigDict, mesh: Mesh, log: Callable[[str], None]) -> runs.Run:
  """The run of `config`, without a source where it is known how many images that has."""
  sharding.check_batch(config.batch, mesh.size, config.accumulate)
  found = known(config)
  if found is None:
    return runs.prepare(config, mesh, log)
  recipe = recipes.make(config, count(config), config.data.get('size') or config.size, classes=found[1])
  return runs.Run(config, None, recipe, mesh, jax.random.key(config.seed), None)


def zeros(tree):
  """`tree` of shapes as arrays; within `eval_shape` they are none."""
  return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree)


def own_bytes(x: jax.ShapeDtypeStruct) -> int:
  """Bytes of `x` on one device."""
  return math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize


def kept(run: runs.Run, state, shown: dict) -> int:
  """Bytes a device of what the forward pass saves for the gradient, weights left out."""
  recipe = run.recipe
  aim = None
  if state.target:
    aim = jax.eval_shape(lambda: steps.target_embeddings(recipe, *zeros(state.target), {'views': zeros(shown['views'])}))[0]

  def saved():
    views, target = zeros(shown), None if aim is None else zeros(aim)
    return jax.vjp(lambda p: steps.loss(recipe, p, zeros(state.stats), views, target)[0], zeros(state.params))[1]
  weights = {x.shape for x in jax.tree.leaves(state.params)}
  leaves = [x for x in jax.tree.leaves(jax.eval_shape(saved)) if x.shape not in weights]
  return sum(x.size * x.dtype.itemsize for x in leaves) // run.mesh.size


def flops(jaxpr: Jaxpr) -> float:
  """Floating-point operations of a jaxpr's matrix products and convolutions, a multiply-add as two; of the branches of
  a condition the dearest, of a scan all rounds, of a loop without a known end one."""
  total, live = 0., set(map(id, jaxpr.outvars))
  for eqn in reversed(jaxpr.eqns):
    if not any(id(v) in live for v in eqn.outvars):
      continue  # a gradient's trace leaves the forward pass that it does not need
    live |= set(map(id, eqn.invars))
    name = eqn.primitive.name
    if name == 'dot_general':
      (contract, _), _ = eqn.params['dimension_numbers']
      total += 2. * math.prod(eqn.outvars[0].aval.shape) * math.prod(eqn.invars[0].aval.shape[d] for d in contract)
    elif name == 'conv_general_dilated':
      total += convolution(eqn)
    elif name == 'cond':
      total += max(flops(b.jaxpr) for b in eqn.params['branches'])
    else:
      rounds = eqn.params.get('length', 1) if name == 'scan' else 1
      total += rounds * sum(flops(inner) for inner in inside(eqn.params))
  return total


def inside(params: dict) -> list[Jaxpr]:
  """The jaxprs that an equation's parameters hold."""
  found = []
  for value in params.values():
    for v in value if isinstance(value, (tuple, list)) else (value,):
      found += [v.jaxpr] if isinstance(v, ClosedJaxpr) else [v] if isinstance(v, Jaxpr) else []
  return found


def convolution(eqn) -> float:
  """The operations of one convolution that meet no zero of its padding and dilations."""
  lhs, rhs = (v.aval.shape for v in eqn.invars)
  p, out = eqn.params, eqn.outvars[0].aval.shape
  numbers = p['dimension_numbers']
  pairs = 1
  for d, (low, _) in enumerate(p['padding']):
    n, k, o = (shape[spec[2 + d]] for shape, spec in zip((lhs, rhs, out), numbers, strict=True))
    at = np.arange(o)[:, None] * p['window_strides'][d] + np.arange(k) * p['rhs_dilation'][d] - low
    pairs *= int(((at >= 0) & (at <= (n - 1) * p['lhs_dilation'][d]) & (at % p['lhs_dilation'][d] == 0)).sum())
  return 2. * pairs * out[numbers.out_spec[0]] * out[numbers.out_spec[1]] * rhs[numbers.rhs_spec[1]]


def collectives(text: str) -> dict[str, tuple[int, int]]:
  """{kind: (how many, bytes of their results on a device)} of a compiled program's text."""
  found = collections.defaultdict(lambda: (0, 0))
  for kind, arrays in crossing(text):
    count, size = found[kind]
    found[kind] = count + 1, size + sum(BYTES.get(dtype, 4) * math.prod(shape) for dtype, shape in arrays)
  return dict(found)


def crossing(text: str) -> list[tuple[str, list[tuple[str, tuple[int, ...]]]]]:
  """(kind, (dtype, shape) of each of its results) of every collective of a compiled program's text, as often as it is
  done: what a loop of known length holds, that many times."""
  bodies = dict(re.findall(r'^(?:ENTRY )?%?([\w.\-]+) \(.*?\) -> .*? \{\n(.*?)^\}', text, re.MULTILINE | re.DOTALL))
  entry = re.search(r'^ENTRY %?([\w.\-]+)', text, re.MULTILINE)

  def of(body: str) -> list:
    found = []
    for line in body.splitlines():
      if match := re.search(rf'= (.*?) ({"|".join(COLLECTIVES)})(-start)?\(', line):
        results, kind, begins = match.groups()
        arrays = [(dtype, tuple(int(d) for d in dims.split(',') if d))
                  for dtype, dims in re.findall(r'(\w+)\[([\d,]*)\]', results)]
        if begins and kind != 'all-reduce':  # (operands, results)
          arrays = arrays[len(arrays) // 2:]
        found.append((kind, arrays))
      rounds = re.search(r'known_trip_count[^}]*?"n":"(\d+)"', line)
      for names in re.findall(r'(?:body|calls|to_apply|\w+_computations?)=\{?(%[\w.\-, %]+)', line):
        for name in names.split(','):
          found += of(bodies.get(name.strip().lstrip('%'), '')) * (int(rounds[1]) if rounds else 1)
    return found
  return of(bodies[entry[1]] if entry and entry[1] in bodies else text)


def lines(p: Plan) -> list[str]:
  """The plan in words."""
  mib = lambda n: f'{n / 2**30:.2f} GiB' if n >= 2**30 else f'{n / 2**20:.1f} MiB'
  fit, least = [g for g in MEMORIES if p.need <= .9 * g * 2**30], 'at least ' * (p.kind == 'cpu')
  sure = 'may fit on ' if p.kind == 'cpu' else ''  # a bound from below: temporaries are another compiler's
  fits = f'{sure}devices of {fit[0]} GiB and more' if fit else f'no device of {MEMORIES[-1]} GiB'
  crossing = ', '.join(f'{n} {kind}, together {mib(size)}' for kind, (n, size) in p.collectives.items())
  return [
      f'devices      {p.devices} x {p.kind}, batch {p.images} = {p.devices} x {p.images // p.devices}',
      f'steps        {p.steps:,} = {p.steps / p.steps_per_epoch:g} epochs of {p.steps_per_epoch:,}',
      f'a step       {p.images:,} images, {p.views} views of each, {p.flops / 1e12:,.3g} TFLOP (products and convolutions)',
      f'the run      {p.flops * p.steps / 1e18:,.3g} EFLOP, {p.images * p.steps / 1e6:,.4g} million images',
      f'parameters   {p.parameters / 1e6:,.2f} million',
      f'a device     {mib(p.params)} parameters, {mib(p.optimizer)} optimiser and target, '
      f'{mib(p.kept)} activations kept for the gradient, {mib(p.data) if p.data else "no"} data',
      f'             {mib(p.arguments)} arguments, {mib(p.temporaries)} temporaries by the compiler for {p.kind}; '
      f'{least}{mib(p.need)} in all',
      f'collectives  {crossing or "none"}, a step and device',
      f'fits         {fits} (a tenth left free)',
  ]


def run(config: ConfigDict, devices: int, log: Callable[[str], None]) -> Plan:
  """Plan `config` for the devices that are here, or for so many `devices`, which the CPU then stands in for; print it."""
  if devices < 0:
    raise UserError(f'--devices {devices}: not a number of devices.', 'e.g. --devices 8')
  if devices:
    jax.config.update('jax_platforms', 'cpu')
    jax.config.update('jax_num_cpu_devices', devices)
  found = plan(config, sharding.mesh(), log)
  print('\n'.join(lines(found)))
  return found

"""`eqssl train --plan`: what one training step of a config costs on given devices.

The step is compiled and not run; the numbers come from the compiled program.
"""
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.stages import Traced

from equivariant_ssl.data.source import fits_in_memory
from equivariant_ssl.data.stream import is_stream
from equivariant_ssl.errors import UserError
from equivariant_ssl.nets.norm import STATISTICS_SCOPE
from equivariant_ssl.parallel import sharding
from equivariant_ssl.parallel.step_cost import collectives, flops
from equivariant_ssl.training import runs
from equivariant_ssl.training.recipe import make_recipe, warmup_warning
from equivariant_ssl.training.step import Batch, draw_views, loss, streamed_step, target_embeddings

# The images of each split and the classes of data sets, as published. They serve a plan for data
# that are not prepared.
KNOWN = {'imagenet2012': ({'train': 1_281_167, 'validation': 50_000}, 1000),
         'cifar10': ({'train': 50_000, 'test': 10_000}, 10),
         'stl10': ({'train': 5_000, 'test': 8_000, 'unlabelled': 100_000}, 10)}
UNLABELED = 'unlabelled'  # the split without labels, as TFDS names it
MEMORIES = 16, 24, 32, 40, 80, 141  # GiB of the accelerators that exist
Say = Callable[[str], None]  # prints a line for the user


class StepPlan(NamedTuple):
  """What one training step costs. Bytes are those of one device.

  devices:         the number of devices.
  kind:            the kind of device.
  parameters:      the number of parameters of the networks.
  flops:           operations of the matrix products and convolutions, for the global batch.
  params:          bytes of the parameters.
  optimizer:       bytes of the optimizer's state and of a target network.
  activations:     bytes that the forward pass keeps for the gradient.
  arguments:       bytes of the step's arguments.
  temporaries:     bytes that the compiler plans, with gradients and activations.
  data:            bytes of the data set, if it lies on the device.
  need:            bytes in all. The CPU keeps bfloat16 in twice the bytes; there this is the least
                   that any device needs: arguments, gradients, activations, data.
  collectives:     {kind: (number, bytes of their results)}.
  statistics:      those of them that BatchNorm's statistics need.
  groups:          the groups of images that have BatchNorm statistics of their own.
  parts:           the parts of the batch that the encoder computes one after the other.
  images:          the images of the global batch.
  views:           the views of each image.
  steps:           the steps of the run.
  steps_per_epoch: the steps of one epoch.
  """
  devices: int
  kind: str
  parameters: int
  flops: float
  params: int
  optimizer: int
  activations: int
  arguments: int
  temporaries: int
  data: int
  need: int
  collectives: dict[str, tuple[int, int]]
  statistics: dict[str, tuple[int, int]]
  groups: int
  parts: int
  images: int
  views: int
  steps: int
  steps_per_epoch: int


def _data_bytes(config: Any, run: runs.Run) -> int:
  """Return the bytes of the data set on each device; 0 if it is streamed."""
  if run.source:
    count, streams = len(run.source.train.images), is_stream(run.source.train.images)
  else:
    count = _train_count(config)
    streams = config.data.get('stream') or not fits_in_memory(count, run.recipe.canvas)
  return 0 if streams else count * run.recipe.canvas ** 2 * 3


def _tree_bytes(tree: Any) -> int:
  """Return the bytes of a tree of shapes on one device."""
  return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
             for x in jax.tree.leaves(tree))


def plan_step(config: Any, mesh: Mesh, log: Say = lambda line: None) -> StepPlan:
  """Compile the step of a resolved config for a mesh, and return what it costs.

  Raises UserError if the data are neither prepared nor known.
  """
  run = planned_run(config, mesh, log)
  recipe, state = run.recipe, runs.abstract_state(run, config.sharding)
  if line := warmup_warning(config, recipe):
    log(line)
  device = mesh.devices.flat[0]
  on_cpu = device.platform == 'cpu'
  batch, traced = _batch_shapes(run), _trace(run)
  options: Any = sharding.ONCE if on_cpu else None
  compiled = traced.lower().compile(compiler_options=options)
  memory = compiled.memory_analysis()
  assert memory is not None  # every backend that trains has it
  views = jax.eval_shape(
      lambda: draw_views(recipe, run.key, jnp.zeros((), jnp.int32), _zeros(batch)))
  params, activations = _tree_bytes(state.params), _activation_bytes(run, state, views)
  need = (memory.argument_size_in_bytes + memory.output_size_in_bytes
          - memory.alias_size_in_bytes + memory.temp_size_in_bytes)
  if on_cpu:
    need = memory.argument_size_in_bytes + params + activations
  data, text = _data_bytes(config, run), compiled.as_text() or ''
  return StepPlan(
      devices=mesh.size, kind=device.device_kind,
      parameters=sum(x.size for x in jax.tree.leaves(state.params)),
      flops=flops(traced.jaxpr.jaxpr), params=params,
      optimizer=_tree_bytes((state.opt_state, state.target)), activations=activations,
      arguments=memory.argument_size_in_bytes, temporaries=memory.temp_size_in_bytes, data=data,
      need=need + data, collectives=collectives(text),
      statistics=collectives(text, STATISTICS_SCOPE), groups=recipe.batchnorm_groups,
      parts=recipe.accumulate, images=recipe.batch,
      views=sum(v.images.shape[1] for v in views.values()), steps=recipe.steps,
      steps_per_epoch=recipe.steps_per_epoch)


def step_flops(config: Any) -> float:
  """Return the FLOPs of a step of a config. The step is traced and not compiled."""
  run = planned_run(config, sharding.mesh(jax.devices()[:1]), lambda line: None)
  return flops(_trace(run).jaxpr.jaxpr)


def _batch_shapes(run: runs.Run) -> Batch:
  """Return the shapes of a batch, split over the run's mesh."""
  side, count = run.recipe.canvas, run.recipe.batch

  def shape(dimensions: tuple[int, ...], dtype: Any) -> Any:
    return jax.ShapeDtypeStruct(dimensions, dtype, sharding=sharding.batch_sharding(run.mesh))
  return Batch(shape((count, side, side, 3), jnp.uint8), shape((count, 2), jnp.float32),
               shape((count,), jnp.int32) if run.recipe.probe else None)


def _trace(run: runs.Run) -> Traced:
  """Trace the run's step for a batch that is passed to it."""
  rule = run.config.sharding
  step = streamed_step(run.recipe, run.mesh, rule=rule)
  return step.trace(run.key, runs.abstract_state(run, rule), _batch_shapes(run))


def known_data(config: Any) -> tuple[int, int] | None:
  """Return (training images, classes) of a config's data, or None if they are not known.

  The training split is one of KNOWN, or several joined by + in any order. The number of classes is
  0 if some images have no label.
  """
  dataset = config.data.get('dataset', config.data.name).split(':')[0]
  splits, classes = KNOWN.get(dataset, ({}, 0))
  parts = [part.strip() for part in config.data.get('train', 'train').split('+')]
  if not all(part in splits for part in parts):
    return None
  return sum(splits[part] for part in parts), 0 if UNLABELED in parts else classes


def _train_count(config: Any) -> int:
  """Return the images to train on, for data in KNOWN, without those the config holds out."""
  facts = known_data(config)
  assert facts is not None  # the caller has checked that the data are known
  return round(facts[0] * (1 - config.validation))


def planned_run(config: Any, mesh: Mesh, log: Say) -> runs.Run:
  """Return the run of a config. It has no source if the size of its data is known."""
  sharding.check_batch(config.batch, mesh.size, config.accumulate, config.batchnorm_groups)
  facts = known_data(config)
  if facts is None:
    return runs.prepare_run(config, mesh, log)
  recipe = make_recipe(config, _train_count(config), config.data.get('size') or config.size,
                       classes=facts[1])
  no_card: Any = None
  return runs.Run(config, None, recipe, mesh, jax.random.key(config.seed), no_card)


def _zeros(tree: Any) -> Any:
  """Return arrays of zeros for a tree of shapes. Within `eval_shape` no memory is used."""
  return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree)


def _activation_bytes(run: runs.Run, state: Any, views: dict) -> int:
  """Return the bytes on a device that the forward pass saves for the gradient, without weights."""
  recipe, target = run.recipe, None
  if state.target:
    average, stats = state.target

    def embed_target():
      target_views = {'views': _zeros(views['views'])}
      return target_embeddings(recipe, _zeros(average), _zeros(stats), target_views)
    target = jax.eval_shape(embed_target)[0]

  def backward():
    fixed = _zeros(views), None if target is None else _zeros(target)
    return jax.vjp(lambda params: loss(recipe, params, _zeros(state.stats), *fixed)[0],
                   _zeros(state.params))[1]
  weights = {x.shape for x in jax.tree.leaves(state.params)}
  saved = [x for x in jax.tree.leaves(jax.eval_shape(backward)) if x.shape not in weights]
  return sum(x.size * x.dtype.itemsize for x in saved) // run.mesh.size


def _size_text(count: int | float) -> str:
  """Return a number of bytes in KiB, MiB or GiB."""
  if count < .1 * 2**20:
    return f'{count / 2**10:.1f} KiB'
  return f'{count / 2**30:.2f} GiB' if count >= 2**30 else f'{count / 2**20:.1f} MiB'


def _exchange_text(exchanged: dict[str, tuple[int, int]]) -> str:
  """Return collectives in words."""
  return ', '.join(f'{count} {kind}, together {_size_text(size)}'
                   for kind, (count, size) in exchanged.items()) or 'none'


def _batchnorm_line(p: StepPlan) -> str:
  """Return the line that says over which images BatchNorm takes statistics, and what it costs."""
  images = p.images // p.parts // p.groups
  over = f'the {images:,} images of {"a part" if p.parts > 1 else "the batch"}'
  if p.groups > 1:
    held = (f'a device holds {p.groups // p.devices}' if p.groups >= p.devices else
            f'one is on {p.devices // p.groups} devices')
    over = f'each of {p.groups} groups of {images:,} images; {held}'
  exchanged = _exchange_text(p.statistics)
  return f'batchnorm    statistics over {over}; of these collectives: {exchanged}'


def lines(p: StepPlan) -> list[str]:
  """Return the lines that describe a plan."""
  large_enough = [g for g in MEMORIES if p.need <= .9 * g * 2**30]
  on_cpu = p.kind == 'cpu'  # the need is then a lower bound: another compiler has other temporaries
  fits_on = f'no device of {MEMORIES[-1]} GiB'
  if large_enough:
    fits_on = f'{"may fit on " if on_cpu else ""}devices of {large_enough[0]} GiB and more'
  per_device = p.images // p.devices
  return [
      f'devices      {p.devices} x {p.kind}, batch {p.images} = {p.devices} x {per_device}',
      f'steps        {p.steps:,} = {p.steps / p.steps_per_epoch:g} epochs of {p.steps_per_epoch:,}',
      f'a step       {p.images:,} images, {p.views} views of each, {p.flops / 1e12:,.3g} TFLOP '
      '(products and convolutions)',
      f'the run      {p.flops * p.steps / 1e18:,.3g} EFLOP, '
      f'{p.images * p.steps / 1e6:,.4g} million images',
      f'parameters   {p.parameters / 1e6:,.2f} million',
      f'a device     {_size_text(p.params)} parameters, {_size_text(p.optimizer)} optimizer and '
      f'target, {_size_text(p.activations)} activations kept for the gradient, '
      f'{_size_text(p.data) if p.data else "no"} data',
      f'             {_size_text(p.arguments)} arguments, {_size_text(p.temporaries)} temporaries '
      f'by the compiler for {p.kind}; {"at least " * on_cpu}{_size_text(p.need)} in all',
      f'collectives  {_exchange_text(p.collectives)}, a step and device',
      _batchnorm_line(p),
      f'fits         {fits_on} (a tenth left free)',
  ]


def run(config: Any, devices: int, log: Say) -> StepPlan:
  """Plan a config for the devices that are present, and print the plan.

  devices: if it is not 0, plan for this many devices, which the CPU stands in for.
  """
  if devices < 0:
    raise UserError(f'--devices {devices}: not a number of devices.', 'e.g. --devices 8')
  if devices:
    jax.config.update('jax_platforms', 'cpu')
    jax.config.update('jax_num_cpu_devices', devices)
  result = plan_step(config, sharding.mesh(), log)
  print('\n'.join(lines(result)))
  return result

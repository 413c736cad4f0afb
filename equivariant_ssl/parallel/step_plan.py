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
from equivariant_ssl.storage.disk import size_text
from equivariant_ssl.training import runs
from equivariant_ssl.training.recipe import make_recipe, warmup_warning
from equivariant_ssl.training.step import Batch, draw_views, resident_step, streamed_step

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
  batch:           bytes of its part of a batch.
  data:            bytes of the data set, if it lies on the device.
  temporaries:     bytes that the compiler of this kind plans besides: gradients, activations.
  need:            bytes in all. On CPU what must exist on any device: parameters, optimizer, batch,
                   data. What a device needs besides, its own compiler alone can say.
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
  batch: int
  data: int
  temporaries: int
  need: int
  collectives: dict[str, tuple[int, int]]
  statistics: dict[str, tuple[int, int]]
  groups: int
  parts: int
  images: int
  views: int
  steps: int
  steps_per_epoch: int


def resident_images(config: Any, run: runs.Run) -> int:
  """Return the number of images that lie on each device; 0 if they are streamed to it."""
  if run.source:
    count, streams = len(run.source.train.images), is_stream(run.source.train.images)
  else:
    count = _train_count(config)
    streams = config.data.get('stream') or not fits_in_memory(count, run.recipe.canvas)
  return 0 if streams else count


def data_bytes(run: runs.Run, resident: int) -> int:
  """Return the bytes of the images that lie on each device."""
  return tree_bytes(_image_shapes(run, resident, sharding.replicated_sharding(run.mesh))) * bool(
      resident)


def tree_bytes(tree: Any) -> int:
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
  device, batch = mesh.devices.flat[0], batch_shapes(run)
  resident = resident_images(config, run)
  traced = trace_step(run, resident)
  on_cpu = device.platform == 'cpu'
  options: Any = sharding.ONCE if on_cpu else None
  compiled = traced.lower().compile(compiler_options=options)
  memory = compiled.memory_analysis()
  assert memory is not None  # every backend that trains has it
  params = tree_bytes((state.params, state.stats))
  optimizer = tree_bytes((state.opt_state, state.target, state.extras))
  need = params + optimizer + tree_bytes(batch) + data_bytes(run, resident)
  if not on_cpu:
    need = (memory.argument_size_in_bytes + memory.output_size_in_bytes
            - memory.alias_size_in_bytes + memory.temp_size_in_bytes)
  text = compiled.as_text() or ''
  return StepPlan(
      devices=mesh.size, kind=device.device_kind,
      parameters=sum(x.size for x in jax.tree.leaves(state.params)),
      flops=flops(traced.jaxpr.jaxpr), params=params, optimizer=optimizer,
      batch=tree_bytes(batch), data=data_bytes(run, resident),
      temporaries=memory.temp_size_in_bytes, need=need,
      collectives=collectives(text), statistics=collectives(text, STATISTICS_SCOPE),
      groups=recipe.batchnorm_groups, parts=recipe.accumulate, images=recipe.batch,
      views=count_views(run), steps=recipe.steps, steps_per_epoch=recipe.steps_per_epoch)


def count_views(run: runs.Run) -> int:
  """Return the number of views of each image."""
  views = jax.eval_shape(lambda: draw_views(run.recipe, run.key, jnp.zeros((), jnp.int32),
                                            _zeros(batch_shapes(run))))
  return sum(v.images.shape[1] for v in views.values())


def step_flops(config: Any) -> float:
  """Return the FLOPs of a step of a config. The step is traced and not compiled."""
  run = planned_run(config, sharding.mesh(jax.devices()[:1]), lambda line: None)
  return flops(trace_step(run).jaxpr.jaxpr)


def _image_shapes(run: runs.Run, count: int, split: Any) -> Batch:
  """Return the shapes of `count` canvases, with what goes with them, placed by a sharding."""
  side = run.recipe.canvas

  def shape(dimensions: tuple[int, ...], dtype: Any) -> Any:
    return jax.ShapeDtypeStruct(dimensions, dtype, sharding=split)
  return Batch(shape((count, side, side, 3), jnp.uint8), shape((count, 2), jnp.float32),
               shape((count,), jnp.int32) if run.recipe.probe else None)


def batch_shapes(run: runs.Run) -> Batch:
  """Return the shapes of a batch, split over the run's mesh."""
  return _image_shapes(run, run.recipe.batch, sharding.batch_sharding(run.mesh))


def trace_step(run: runs.Run, resident: int = 0) -> Traced:
  """Trace the run's step.

  resident: the number of images that lie on each device; 0 if batches are passed to the step.
  """
  rule = run.config.sharding
  state = runs.abstract_state(run, rule)
  if not resident:
    step = streamed_step(run.recipe, run.mesh, rule=rule)
    return step.trace(run.key, state, batch_shapes(run))
  copied = sharding.replicated_sharding(run.mesh)
  order = jax.ShapeDtypeStruct((resident,), jnp.int32, sharding=copied)
  step = resident_step(run.recipe, run.mesh, rule=rule)
  data = _image_shapes(run, resident, copied)
  images = jax.eval_shape(sharding.flatten_canvases, data.images).update(sharding=copied)
  return step.trace(run.key, state, data._replace(images=images), order)

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
  held_out = 0. if config.data.get('labeled') else config.validation  # see holdout.hold_out
  return round(facts[0] * (1 - held_out))


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


def _exchange_text(exchanged: dict[str, tuple[int, int]]) -> str:
  """Return collectives in words."""
  return ', '.join(f'{count} {kind}, together {size_text(size)}'
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
  if p.kind == 'cpu':
    fits_on = 'ask the compiler of the devices: --plan --on h100:8, or v5e:4x8'
  else:
    large_enough = [g for g in MEMORIES if p.need <= .9 * g * 2**30]
    fits_on = (f'devices of {large_enough[0]} GiB and more (a tenth left free)' if large_enough
               else f'no device of {MEMORIES[-1]} GiB')
  per_device = p.images // p.devices
  return [
      f'devices      {p.devices} x {p.kind}, batch {p.images} = {p.devices} x {per_device}',
      f'steps        {p.steps:,} = {p.steps / p.steps_per_epoch:g} epochs of {p.steps_per_epoch:,}',
      f'a step       {p.images:,} images, {p.views} views of each, {p.flops / 1e12:,.3g} TFLOP '
      '(products and convolutions)',
      f'the run      {p.flops * p.steps / 1e18:,.3g} EFLOP, '
      f'{p.images * p.steps / 1e6:,.4g} million images',
      f'parameters   {p.parameters / 1e6:,.2f} million',
      f'a device     {size_text(p.params)} parameters, {size_text(p.optimizer)} optimizer and '
      f'target, {size_text(p.batch)} batch, {size_text(p.data) if p.data else "no"} data',
      f'             {size_text(p.need)} '
      + ('must exist; the rest depends on the device' if p.kind == 'cpu' else
         f'in all, with {size_text(p.temporaries)} temporaries'),
      f'collectives  {_exchange_text(p.collectives)}, a step and device',
      _batchnorm_line(p),
      f'fits         {fits_on}',
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

"""One mesh: the batch is split over devices; everything else is a copy on each, or the state is cut into shards too."""
import math
import os

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from equivariant_ssl.errors import UserError

# For a program that runs once: compiling it costs more than running it ever will.
ONCE = {'xla_backend_optimization_level': 0}
RULES = ('replicate', 'fsdp')  # of the state: a copy on every device, or a shard on each, gathered when it is used
SMALL = 2 ** 11  # numbers: a smaller array is a copy everywhere under either


def cores() -> int:
  """The host's that this process may use: of a task, fewer than the machine's."""
  return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def mesh(devices: list | None = None) -> Mesh:
  """The ('data',) mesh over `devices` (all of them by default)."""
  devices = devices or jax.devices()
  # Auto, written out: make_mesh now defaults to Explicit, in which a vmapped step raises.
  return jax.make_mesh((len(devices),), ('data',), axis_types=(AxisType.Auto,), devices=devices)


def within(mesh: Mesh):
  """A context for what a jitted function traces: the devices that large losses divide their work over."""
  return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def split(mesh: Mesh) -> NamedSharding:
  """The leading axis over the devices."""
  return NamedSharding(mesh, PartitionSpec('data'))


def replicated(mesh: Mesh) -> NamedSharding:
  """A copy on every device."""
  return NamedSharding(mesh, PartitionSpec())


def _spec(x, devices: int, rule: str) -> PartitionSpec:
  """Of an array: under 'fsdp' its largest axis that divides over `devices`, where there is one and it is not SMALL."""
  axes = [axis for axis, side in enumerate(x.shape) if not side % devices]
  if rule == 'replicate' or devices == 1 or not axes or math.prod(x.shape) < SMALL:
    return PartitionSpec()
  axis = max(axes, key=lambda axis: x.shape[axis])
  return PartitionSpec(*(None,) * axis, 'data')


def placed(tree, mesh: Mesh, rule: str):
  """The tree of shapes `tree` with the sharding of each leaf by `rule`, one of RULES."""
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=NamedSharding(mesh, _spec(x, mesh.size, rule))), tree)


def constrain(tree, rule: str):
  """`tree` inside a jitted function, made to lie as `rule` says on the mesh that is set (see `within`)."""
  devices = jax.sharding.get_abstract_mesh().size
  return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, _spec(x, devices, rule)), tree)


def place(tree, sharding: NamedSharding):
  """`tree` of host arrays, the same in every process, as global arrays under `sharding`."""
  if jax.process_count() == 1:
    return jax.device_put(tree, sharding)
  def one(x):
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])
  return jax.tree.map(one, tree)


def check_batch(batch: int, devices: int, parts: int = 1) -> None:
  """UserError where a global `batch` does not divide over `devices`, in each of its equal `parts`."""
  unit = devices * parts
  if batch % unit:
    near, each = max(batch // unit, 1) * unit, f' in {parts} parts (config.accumulate)' if parts > 1 else ''
    raise UserError(f'batch {batch} does not divide over {devices} devices{each}.',
                    f'It is the global batch: use {near} or {near + unit}, e.g. --config.batch={near}.')

"""One mesh, two placements: the batch is split over devices, everything else is a copy on each."""
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from equivariant_ssl.errors import UserError

# For a program that runs once: compiling it costs more than running it ever will.
ONCE = {'xla_backend_optimization_level': 0}


def mesh(devices: list | None = None) -> Mesh:
  """The ('data',) mesh over `devices` (all of them by default)."""
  devices = devices or jax.devices()
  # Auto, written out: make_mesh now defaults to Explicit, in which a vmapped step raises.
  return jax.make_mesh((len(devices),), ('data',), axis_types=(AxisType.Auto,), devices=devices)


def mesh_of_batch(batch: int) -> Mesh:
  """The mesh over all devices where they divide `batch`, else over one: for what reads a run that was made elsewhere."""
  devices = jax.devices()
  return mesh(devices if batch % len(devices) == 0 else devices[:1])


def within(mesh: Mesh):
  """A context for what a jitted function traces: the devices that large losses divide their work over."""
  return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def split(mesh: Mesh) -> NamedSharding:
  """The leading axis over the devices."""
  return NamedSharding(mesh, PartitionSpec('data'))


def replicated(mesh: Mesh) -> NamedSharding:
  """A copy on every device."""
  return NamedSharding(mesh, PartitionSpec())


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

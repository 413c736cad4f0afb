"""One mesh of devices: the batch is split over it; the state is copied, or is split too."""
import math
import os
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from equivariant_ssl.errors import UserError
from equivariant_ssl.types import Array

# Compiler options for a program that runs once: its compilation costs more than its run.
ONCE: Any = {'xla_backend_optimization_level': 0}
# How the state lies on the mesh. replicate: each device has a copy. fsdp: each device has a shard,
# and the weights are gathered when they are used.
RULES = ('replicate', 'fsdp')
SMALL = 2 ** 11  # numbers: a smaller array is copied to each device under either rule


def count_cores() -> int:
  """The number of cores that this process may use. A scheduler may allow fewer than there are."""
  return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def mesh(devices: list | None = None) -> Mesh:
  """The mesh over `devices` (by default all of them), with one axis, 'data'."""
  devices = devices or jax.devices()
  # Auto must be written: make_mesh defaults to Explicit, under which a vmapped step raises.
  return jax.make_mesh((len(devices),), ('data',), axis_types=(AxisType.Auto,), devices=devices)


def use_mesh(mesh: Mesh):
  """A context that sets the mesh for what a jitted function traces: large losses split over it."""
  return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """The sharding that splits the leading axis over the devices."""
  return NamedSharding(mesh, PartitionSpec('data'))


def replicated_sharding(mesh: Mesh) -> NamedSharding:
  """The sharding that gives each device a copy."""
  return NamedSharding(mesh, PartitionSpec())


def _spec(x: Any, devices: int, rule: str) -> PartitionSpec:
  """The partition of one array of the state over `devices`, by `rule`.

  'fsdp' splits the largest axis that the number of devices divides. An array without such an axis,
  or with fewer numbers than SMALL, is copied.
  """
  axes = [axis for axis, side in enumerate(x.shape) if not side % devices]
  if rule == 'replicate' or devices == 1 or not axes or math.prod(x.shape) < SMALL:
    return PartitionSpec()
  axis = max(axes, key=lambda axis: x.shape[axis])
  return PartitionSpec(*(None,) * axis, 'data')


def sharded_shapes(tree: Any, mesh: Mesh, rule: str) -> Any:
  """`tree` with a ShapeDtypeStruct for each leaf, whose sharding is that of `rule` (see RULES)."""
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=NamedSharding(mesh, _spec(x, mesh.size, rule))), tree)


def constrain(tree: Any, rule: str) -> Any:
  """`tree`, laid out by `rule` on the mesh that `use_mesh` set; for use in a jitted function."""
  devices = jax.sharding.get_abstract_mesh().size
  return jax.tree.map(
      lambda x: jax.lax.with_sharding_constraint(x, _spec(x, devices, rule)), tree)


def place(tree: Any, sharding: NamedSharding) -> Any:
  """`tree` as global arrays under `sharding`. Its host arrays are the same in every process."""
  if jax.process_count() == 1:
    return jax.device_put(tree, sharding)

  def place_array(x) -> jax.Array:
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])
  return jax.tree.map(place_array, tree)


def place_rows(rows: np.ndarray, mesh: Mesh) -> jax.Array:
  """`rows` [N ...] as a global array [N' ...], split over the devices of a mesh.

  N' is the next multiple of the devices; the rows beyond N are zeros. The rows are the same in
  every process, each of which hands its own devices their part. A CPU reads them where they lie,
  if they lie at a multiple of 64 bytes.
  """
  split, padded = batch_sharding(mesh), -(-len(rows) // mesh.size) * mesh.size
  if padded == len(rows):
    return place(rows, split)

  def part(index: Any) -> np.ndarray:
    start, stop = index[0].start or 0, padded if index[0].stop is None else index[0].stop
    here = rows[start:stop]
    lacking = stop - start - len(here)
    zeros = np.zeros((lacking, *rows.shape[1:]), rows.dtype)
    return np.concatenate([here, zeros]) if lacking else here
  return jax.make_array_from_callback((padded, *rows.shape[1:]), split, part)


def flatten_canvases(images: Any) -> Any:
  """Canvases [N S S 3] as rows [N 3 S^2], which is how devices keep a whole data set.

  A step that takes canvases of an array whose last axis is 3 would have a TPU copy that array, with
  all images, into another layout each time: 31 % of the bytes that a CIFAR-10 step moves.
  """
  return images.reshape(len(images), -1)


def take_canvases(rows: Array, index: Array) -> Array:
  """The canvases [B S S 3] at `index` [B] of `flatten_canvases`' rows [N 3 S^2]."""
  side = math.isqrt(rows.shape[1] // 3)
  return rows[index].reshape(len(index), side, side, 3)


def check_batch(batch: int, devices: int, parts: int = 1, groups: int = 1,
                option: str = '--config.batch=') -> None:
  """Raise a UserError where the global batch does not divide over the devices.

  parts:  that are computed one after the other; each must divide over the devices.
  groups: of images with BatchNorm statistics of their own. A device must hold whole groups, or a
          group whole devices; else images would have to move between devices.
  option: of the command line, which sets the batch.
  """
  unit = devices * parts
  if batch % unit:
    near = max(batch // unit, 1) * unit
    in_parts = f' in {parts} parts (config.accumulate)' if parts > 1 else ''
    raise UserError(f'A batch of {batch} does not divide over {devices} devices{in_parts}.',
                    f'The batch is the global one. Use {near} or {near + unit}, '
                    f'e.g. {option}{near}.')
  if groups % devices and devices % groups:
    raise UserError(f'{groups} groups of images (config.batchnorm_groups) do not line up with '
                    f'{devices} devices.', 'One number must divide the other: use '
                    f'{math.gcd(groups, devices)} or {math.lcm(groups, devices)} devices; in a new '
                    f'run, e.g. --config.batchnorm_groups={devices}.')

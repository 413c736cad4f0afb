"""What the tests of augmentations share beside the package's own pictures: draws, and shards over devices."""
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from equivariant_ssl.augment.law_cases import sampler
from equivariant_ssl.types import Action, Op


def draws(op: Op, many: int) -> Action:
  return sampler(op)(np.arange(many))


def shards(devices: int) -> NamedSharding:
  mesh = Mesh(np.array(jax.devices()[:devices]), ('data',), axis_types=(AxisType.Auto,))
  return NamedSharding(mesh, PartitionSpec('data'))

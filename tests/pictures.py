"""What the tests of augmentations share: pictures with every awkward value, and draws."""
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from equivariant_ssl.keys import key_for
from equivariant_ssl.types import Action, Image, Op

SIDE = 32
SIZE = jnp.full(2, SIDE, jnp.float32)


def pictures():
  """[8 32 32 3]: noise, a smooth picture, black, white, gray, pure colors, nearly gray, and values on the steps."""
  rng, ramp = np.random.default_rng(0), np.linspace(0, 1, SIDE)
  smooth = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None], np.outer(ramp, ramp)), axis=-1)
  pure = np.eye(3)[rng.integers(0, 3, (SIDE, SIDE))]
  near = .5 + 1e-8 * rng.uniform(-1, 1, (SIDE, SIDE, 3))
  flat = [np.full((SIDE, SIDE, 3), v) for v in (0., 1., .5)]
  stepped = rng.integers(0, 3, (SIDE, SIDE, 3)) / 2
  return np.stack([rng.uniform(0, 1, (SIDE, SIDE, 3)), smooth, *flat, pure, near, stepped]).astype(np.float32)


PICTURES = pictures()


def images(pixels=PICTURES):
  return Image(pixels, np.full((len(pixels), 2), SIDE, np.float32))


def sampler(op: Op):
  """Jitted: indices [M] -> M actions, each of a key of its own."""
  return jax.jit(jax.vmap(lambda i: op.sample(key_for(jax.random.key(1), i), SIZE)))


def draws(op: Op, many: int) -> Action:
  return sampler(op)(np.arange(many))


def repeated(action: Action, many: int) -> Action:
  return jax.tree.map(lambda a: jnp.broadcast_to(a, (many, *a.shape)), action)


def rows(action: Action, many: int) -> np.ndarray:
  """Actions stacked [many ...] as a float64 matrix, a row an action."""
  return np.concatenate([np.asarray(a, np.float64).reshape(many, -1) for a in jax.tree.leaves(action)], axis=1)


def same(a, b) -> bool:
  """Bitwise, leaf by leaf."""
  return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def shards(devices: int) -> NamedSharding:
  mesh = Mesh(np.array(jax.devices()[:devices]), ('data',), axis_types=(AxisType.Auto,))
  return NamedSharding(mesh, PartitionSpec('data'))

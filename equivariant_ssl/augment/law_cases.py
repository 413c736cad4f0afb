"""What the laws of augmentations look at: pictures, and many draws and views of one op."""
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from equivariant_ssl.keys import key_for
from equivariant_ssl.types import Action, Array, Image, Op

SIDE = 32                    # of the pictures, in pixels
DRAWS = 4096                 # actions that are drawn of an op


def make_pictures() -> np.ndarray:
  """[8 32 32 3]: pictures with every awkward value.

  They are noise, a smooth picture, black, white, gray, pure colors, nearly gray, and values on the
  steps of ops that have steps.
  """
  rng, ramp = np.random.default_rng(0), np.linspace(0, 1, SIDE)
  smooth = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None], np.outer(ramp, ramp)), axis=-1)
  pure = np.eye(3)[rng.integers(0, 3, (SIDE, SIDE))]
  near = .5 + 1e-8 * rng.uniform(-1, 1, (SIDE, SIDE, 3))
  flat = [np.full((SIDE, SIDE, 3), v) for v in (0., 1., .5)]
  stepped = rng.integers(0, 3, (SIDE, SIDE, 3)) / 2
  pictures = [rng.uniform(0, 1, (SIDE, SIDE, 3)), smooth, *flat, pure, near, stepped]
  return np.stack(pictures).astype(np.float32)


PICTURES = make_pictures()
SIZE = np.full(2, SIDE, np.float32)


def images(pixels: np.ndarray = PICTURES) -> Image:
  """Images of true size SIDE x SIDE. pixels: [N SIDE SIDE 3]."""
  return Image(pixels, np.full((len(pixels), 2), SIDE, np.float32))


def sampler(op: Op) -> Callable[[np.ndarray], Action]:
  """Jitted: indices [M] -> M actions, each of a key of its own."""
  return jax.jit(jax.vmap(lambda i: op.sample(key_for(jax.random.key(1), i), SIZE)))


def repeated(action: Action, count: int) -> Action:
  """One action as `count` equal ones."""
  return jax.tree.map(lambda a: jnp.broadcast_to(a, (count, *jnp.shape(a))), action)


def rows(action: Action, count: int) -> np.ndarray:
  """Actions stacked [count ...] as a float64 matrix, a row for each action."""
  leaves = [np.asarray(a, np.float64).reshape(count, -1) for a in jax.tree.leaves(action)]
  return np.concatenate(leaves, axis=1)


def same(a: Any, b: Any) -> bool:
  """Whether two trees are bitwise equal, leaf by leaf."""
  return all(np.array_equal(x, y)
             for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def take(tree: Any, index: Any) -> Any:
  """The rows `index` of each leaf."""
  return jax.tree.map(lambda a: a[index], tree)


class Case(NamedTuple):
  """An op, and what the laws look at.

  sample:    indices -> actions, jitted.
  identity:  the op's action that does nothing.
  drawn:     DRAWS actions. idle: [DRAWS] bool, whether each does nothing.
  views:     16 views of the 8 PICTURES: of drawn actions, then of the identity.
  gradients: [16 ...], of a random weighing of each view's pixels by the picture's.
  """
  op: Op
  sample: Callable[[np.ndarray], Action]
  identity: Action
  drawn: Action
  idle: np.ndarray
  views: Image
  gradients: np.ndarray


def make_case(op: Op) -> Case:
  """The Case of an op. It compiles a few programs, which takes seconds."""
  def view_and_gradient(action: Action, image: Image) -> tuple[Image, Array]:
    def weighed(pixels: Array) -> tuple[Array, Image]:
      view = op.apply(action, image._replace(pixels=pixels))
      weights = jax.random.normal(jax.random.key(5), view.pixels.shape)
      return jnp.vdot(view.pixels, weights), view
    gradient, view = jax.grad(weighed, has_aux=True)(image.pixels)
    return view, gradient

  sample, identity = sampler(op), op.identity(SIZE)
  drawn = sample(np.arange(DRAWS))
  idle = (rows(drawn, DRAWS) == rows(repeated(identity, 1), 1)).all(axis=1)
  first = take(drawn, np.argsort(idle, kind='stable')[:8])  # draws that do something first
  actions = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), first, repeated(identity, 8))
  views, gradients = jax.jit(jax.vmap(view_and_gradient))(
      actions, images(np.concatenate([PICTURES, PICTURES])))
  return Case(op, sample, identity, drawn, idle, jax.tree.map(np.asarray, views),
              np.asarray(gradients))

"""Color inversion."""
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from equivariant_ssl.augment.algebra import sometimes
from equivariant_ssl.augment.pixels import differs
from equivariant_ssl.types import Array, Image, Op


class Invert(NamedTuple):
  """applied: bool, whether the view is the negative of the picture."""
  applied: Array


def make(p: float = .5) -> Op:
  """With probability `p`, replace the picture by its negative, 1 - x.

  The op is discrete: class 0 is the picture, class 1 is its negative.
  """
  def apply(action: Invert, image: Image) -> Image:
    return image._replace(pixels=jnp.where(action.applied, 1. - image.pixels, image.pixels))

  return sometimes(p, Op(
      name='invert',
      identity=lambda size: Invert(jnp.zeros((), bool)),
      sample=lambda key, size: Invert(jnp.ones((), bool)),
      apply=apply,
      encode=lambda action: action.applied.astype(jnp.float32)[None],
      choices=Invert(np.array([False, True])),
      relative=lambda before, after: differs(before.applied, after.applied)))

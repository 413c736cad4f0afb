"""Horizontal flip."""
from typing import NamedTuple

import dm_pix
import jax.numpy as jnp
import numpy as np

from equivariant_ssl.augment.algebra import sometimes
from equivariant_ssl.augment.pixels import differs
from equivariant_ssl.types import Array, Image, Op


class Flip(NamedTuple):
  """applied: bool, whether left and right are swapped."""
  applied: Array


def make(p: float = .5) -> Op:
  """With probability `p`, swap left and right.

  The op is discrete: class 0 is not flipped, class 1 is flipped.
  """
  def apply(action: Flip, image: Image) -> Image:
    flipped = dm_pix.flip_left_right(image.pixels)
    return image._replace(pixels=jnp.where(action.applied, flipped, image.pixels))

  return sometimes(p, Op(
      name='flip',
      identity=lambda size: Flip(jnp.zeros((), bool)),
      sample=lambda key, size: Flip(jnp.ones((), bool)),
      apply=apply,
      encode=lambda action: action.applied.astype(jnp.float32)[None],
      choices=Flip(np.array([False, True])),
      relative=lambda before, after: differs(before.applied, after.applied)))

"""Vertical flip."""
from typing import NamedTuple

import dm_pix
import jax.numpy as jnp
import numpy as np

from equivariant_ssl.augment.algebra import sometimes
from equivariant_ssl.augment.pixels import differs
from equivariant_ssl.types import Array, Image, Op


class VFlip(NamedTuple):
  """applied: bool, whether top and bottom are swapped."""
  applied: Array


def make(p: float = .5) -> Op:
  """With probability `p`, swap top and bottom.

  The op is discrete: class 0 is not flipped, class 1 is flipped.
  """
  def apply(action: VFlip, image: Image) -> Image:
    flipped = dm_pix.flip_up_down(image.pixels)
    return image._replace(pixels=jnp.where(action.applied, flipped, image.pixels))

  return sometimes(p, Op(
      name='vflip',
      identity=lambda size: VFlip(jnp.zeros((), bool)),
      sample=lambda key, size: VFlip(jnp.ones((), bool)),
      apply=apply,
      encode=lambda action: action.applied.astype(jnp.float32)[None],
      choices=VFlip(np.array([False, True])),
      relative=lambda before, after: differs(before.applied, after.applied)))

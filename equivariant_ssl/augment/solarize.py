"""Solarization."""
from typing import NamedTuple

import dm_pix
import jax.numpy as jnp

from equivariant_ssl.augment.algebra import sometimes
from equivariant_ssl.types import Array, Image, Op


class Solarize(NamedTuple):
  """applied: bool, whether bright values are inverted."""
  applied: Array


def make(p: float = .2, threshold: float = .5) -> Op:
  """With probability `p`, invert the values at and above `threshold`, a fraction of white.

  The default is Pillow's 128: the 8-bit values from 128 on are at or above .5.
  """
  def apply(action: Solarize, image: Image) -> Image:
    solarized = dm_pix.solarize(image.pixels, threshold)
    return image._replace(pixels=jnp.where(action.applied, solarized, image.pixels))

  return sometimes(p, Op(
      name='solarize',
      identity=lambda size: Solarize(jnp.zeros((), bool)),
      sample=lambda key, size: Solarize(jnp.ones((), bool)),
      apply=apply,
      encode=lambda action: action.applied.astype(jnp.float32)[None]))

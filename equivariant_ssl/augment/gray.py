"""Grayscale."""
from typing import NamedTuple

import jax.numpy as jnp

from equivariant_ssl.augment import levels
from equivariant_ssl.augment.algebra import sometimes
from equivariant_ssl.augment.pixels import luma
from equivariant_ssl.types import Array, Image, Op


class Gray(NamedTuple):
  """applied: bool, whether color is removed."""
  applied: Array


def make(p: float = .2, quantize: bool = False) -> Op:
  """With probability `p`, replace each color by its luma, in three equal channels.

  quantize: the luma is computed in 8 bits, exactly as Pillow computes it.
  See `pixels.luma` for why dm_pix.rgb_to_grayscale is not called.
  """
  def apply(action: Gray, image: Image) -> Image:
    if quantize:
      gray = levels.pixels(levels.luma(levels.of(image.pixels)))[..., None]
    else:
      gray = jnp.clip(luma(image.pixels), 0., 1.)[..., None]
    return image._replace(pixels=jnp.where(action.applied, gray, image.pixels))

  return sometimes(p, Op(
      name='gray',
      identity=lambda size: Gray(jnp.zeros((), bool)),
      sample=lambda key, size: Gray(jnp.ones((), bool)),
      apply=apply,
      encode=lambda action: action.applied.astype(jnp.float32)[None]))

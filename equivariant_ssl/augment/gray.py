"""Grayscale."""
from typing import NamedTuple

import jax.numpy as jnp

from equivariant_ssl.augment import levels
from equivariant_ssl.augment.algebra import sometimes
from equivariant_ssl.augment.pixels import grey
from equivariant_ssl.types import Array, Image, Op


class Gray(NamedTuple):
  """applied: bool, whether colour is removed."""
  applied: Array


def make(p: float = .2, quantise: bool = False) -> Op:
  """Replace colour by its luma in three equal channels with probability `p`. quantise: in 8 bits, exactly as Pillow."""
  def apply(action: Gray, image: Image) -> Image:
    luma = levels.pixels(levels.grey(levels.of(image.pixels))) if quantise else jnp.clip(grey(image.pixels), 0., 1.)
    colourless = luma[..., None]
    return image._replace(pixels=jnp.where(action.applied, colourless, image.pixels))

  return sometimes(p, Op(
      name='gray',
      identity=lambda size: Gray(jnp.zeros((), bool)),
      sample=lambda key, size: Gray(jnp.ones((), bool)),
      apply=apply,
      encode=lambda action: action.applied.astype(jnp.float32)[None]))

"""Four-fold rotation."""
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from equivariant_ssl.augment.algebra import sometimes
from equivariant_ssl.errors import UserError
from equivariant_ssl.types import Array, Image, Op


class Rotate(NamedTuple):
  """turns: int32 in 0..3, quarter turns counter-clockwise; 0 is not turned."""
  turns: Array


def make(p: float = 1., fold: int = 4) -> Op:
  """With probability `p`, turn by 0, 1, 2 or 3 quarter turns, each as likely; else by 0.

  Discrete, the class is the number of turns, E-SSL's (Dangovski et al. 2022): 1 = flip left-right then
  transpose (counter-clockwise), 2 = flip both, 3 = transpose then flip left-right (clockwise). Raises ValueError
  at trace time where the image is not square. fold: 2 for half turns alone, the class is their number.
  """
  if fold not in (2, 4):
    raise UserError(f'rotate.fold = {fold} is no number of turns that keep a square.', 'Give 4 (quarter turns) or 2 (half).')
  turn = 4 // fold  # the smallest, in quarters

  def told(turns: Array) -> Array:
    return jax.nn.one_hot(turns // turn - 1, fold - 1, dtype=jnp.float32)  # class 0 is all zeros

  def apply(action: Rotate, image: Image) -> Image:
    pixels, size = image
    if pixels.shape[0] != pixels.shape[1]:
      raise ValueError(f'a quarter turn needs a square image, got {pixels.shape[:2]}; crop or resize it first')
    half, quarter = action.turns >= 2, action.turns % 2 == 1
    pixels = jnp.where(half, pixels[::-1, ::-1], pixels)
    return Image(jnp.where(quarter, jnp.rot90(pixels), pixels), jnp.where(quarter, size[::-1], size))

  return sometimes(p, Op(
      name='rotate',
      identity=lambda size: Rotate(jnp.zeros((), jnp.int32)),
      sample=lambda key, size: Rotate(turn * jax.random.randint(key, (), 0, fold)),
      apply=apply,
      encode=lambda action: told(action.turns),
      choices=Rotate(np.arange(0, 4, turn, dtype=np.int32)),
      relative=lambda before, after: told((after.turns - before.turns) % 4)))

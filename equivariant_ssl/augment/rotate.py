"""Four-fold rotation."""
from typing import NamedTuple

import dm_pix
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
  """With probability `p`, turn the picture by 0, 1, 2 or 3 quarter turns, each as likely.

  fold: 4 for quarter turns; 2 for half turns alone, whose class is their number.

  The op is discrete. The class is the number of turns, as in E-SSL (Dangovski et al. 2022): 1 flips
  left-right and then transposes (counter-clockwise), 2 flips both ways, 3 transposes and then flips
  left-right (clockwise). dm_pix.rot90 takes a number of turns that is known when it is traced, so
  it is called for one turn and for two, and the drawn number selects among the results.

  Raises UserError for another fold, and ValueError at trace time where the image is not square.
  """
  if fold not in (2, 4):
    raise UserError(f'rotate.fold = {fold} is neither 4 nor 2.',
                    'Give 4 (quarter turns) or 2 (half turns).')
  turn = 4 // fold  # the smallest turn, in quarters

  def encode_turns(turns: Array) -> Array:
    return jax.nn.one_hot(turns // turn - 1, fold - 1, dtype=jnp.float32)  # class 0 is all zeros

  def apply(action: Rotate, image: Image) -> Image:
    pixels, size = image
    if pixels.shape[0] != pixels.shape[1]:
      raise ValueError(f'A quarter turn needs a square image, but this one has {pixels.shape[:2]} '
                       'pixels; crop or resize it first.')
    half, quarter = action.turns >= 2, action.turns % 2 == 1
    pixels = jnp.where(half, dm_pix.rot90(pixels, 2), pixels)
    pixels = jnp.where(quarter, dm_pix.rot90(pixels), pixels)
    return Image(pixels, jnp.where(quarter, size[::-1], size))

  return sometimes(p, Op(
      name='rotate',
      identity=lambda size: Rotate(jnp.zeros((), jnp.int32)),
      sample=lambda key, size: Rotate(turn * jax.random.randint(key, (), 0, fold)),
      apply=apply,
      encode=lambda action: encode_turns(action.turns),
      choices=Rotate(np.arange(0, 4, turn, dtype=np.int32)),
      relative=lambda before, after: encode_turns((after.turns - before.turns) % 4)))

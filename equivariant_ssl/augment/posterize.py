"""Fewer levels of brightness."""
from typing import NamedTuple

import jax
import jax.numpy as jnp

from equivariant_ssl.augment.algebra import sometimes
from equivariant_ssl.errors import UserError
from equivariant_ssl.types import Array, Image, Op


class Posterize(NamedTuple):
  """applied: bool, whether levels are dropped. dropped: int32 in 0..7, the low bits set to zero; each a factor of two."""
  applied: Array
  dropped: Array


def make(p: float = .2, bits: tuple[int, int] = (1, 6)) -> Op:
  """Keep the highest bits of 8 with probability `p`, as Pillow's posterize; how many is drawn from `bits` (least, most).

  The gradient is that of doing nothing. Raises UserError for bits outside 1..7.
  """
  least, most = bits
  if not 1 <= least <= most <= 7:
    raise UserError(f'posterize.bits = {bits} is not a range within 1 to 7.', 'Give (least, most), as in (1, 6).')

  def apply(action: Posterize, image: Image) -> Image:
    levels = jnp.round(image.pixels * 255.).astype(jnp.int32)
    kept = ((levels >> action.dropped) << action.dropped).astype(jnp.float32) / 255.
    moved = image.pixels + jax.lax.stop_gradient(kept - image.pixels)
    return image._replace(pixels=jnp.where(action.applied, moved, image.pixels))

  return sometimes(p, Op(
      name='posterize',
      identity=lambda size: Posterize(jnp.zeros((), bool), jnp.zeros((), jnp.int32)),
      sample=lambda key, size: Posterize(jnp.ones((), bool), 8 - jax.random.randint(key, (), least, most + 1)),
      apply=apply,
      encode=lambda action: jnp.stack([x.astype(jnp.float32) for x in action])))

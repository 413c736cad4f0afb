"""Fewer levels of brightness."""
from typing import NamedTuple

import jax
import jax.numpy as jnp

from equivariant_ssl.augment.algebra import sometimes
from equivariant_ssl.errors import UserError
from equivariant_ssl.types import Array, Image, Key, Op, Size


class Posterize(NamedTuple):
  """The levels that are dropped.

  applied: bool, whether levels are dropped.
  dropped: int32 in 0..7, the low bits that become zero; each is a factor of two in the levels.
  """
  applied: Array
  dropped: Array


def make(p: float = .2, bits: tuple[int, int] = (1, 6)) -> Op:
  """With probability `p`, keep the highest bits of the 8 bits of each value.

  bits: (least, most), the range from which the number of kept bits is drawn.

  It is Pillow's posterize. Its gradient is that of the identity. Raises UserError for bits outside
  1..7.
  """
  least, most = bits
  if not 1 <= least <= most <= 7:
    raise UserError(f'posterize.bits = {bits} is not a range within 1 to 7.',
                    'Give (least, most), as in (1, 6).')

  def apply(action: Posterize, image: Image) -> Image:
    levels = jnp.round(image.pixels * 255.).astype(jnp.int32)
    posterized = ((levels >> action.dropped) << action.dropped).astype(jnp.float32) / 255.
    pixels = image.pixels + jax.lax.stop_gradient(posterized - image.pixels)
    return image._replace(pixels=jnp.where(action.applied, pixels, image.pixels))

  def sample(key: Key, size: Size) -> Posterize:
    return Posterize(jnp.ones((), bool), 8 - jax.random.randint(key, (), least, most + 1))

  return sometimes(p, Op(
      name='posterize',
      identity=lambda size: Posterize(jnp.zeros((), bool), jnp.zeros((), jnp.int32)),
      sample=sample,
      apply=apply,
      encode=lambda action: jnp.stack([x.astype(jnp.float32) for x in action])))

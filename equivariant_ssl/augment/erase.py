"""Random erasing."""
from typing import NamedTuple

import jax.numpy as jnp

from equivariant_ssl.augment.algebra import sometimes
from equivariant_ssl.augment.crop import tries
from equivariant_ssl.errors import UserError
from equivariant_ssl.types import Array, Image, Key, Op, Size


class Erase(NamedTuple):
  """The box that is erased, in fractions of the view; all 0 not applied.

  applied: bool, whether a box is erased. top: upper edge, fraction of the height. left: left edge, fraction of the width.
  height: fraction of the height. width: fraction of the width.
  """
  applied: Array
  top: Array
  left: Array
  height: Array
  width: Array


def make(p: float = .5, scale: tuple[float, float] = (.02, .33), ratio: tuple[float, float] = (.3, 3.3), value: float = 0.
         ) -> Op:
  """Fill a random box with `value` (a fraction of white) with probability `p`, as torchvision's RandomErasing (Zhong et al.
  2020): an area uniform in `scale`, an aspect log-uniform in `ratio`, ten tries, else nothing.

  Raises UserError for a range that is empty or not positive, or a value outside [0, 1].
  """
  for name, (low, high) in {'scale': scale, 'ratio': ratio}.items():
    if not 0 < low <= high:
      raise UserError(f'erase.{name} = {(low, high)} is not a range above 0.', 'Give (low, high), as in (.02, .33).')
  if not 0 <= value <= 1:
    raise UserError(f'erase.value = {value} is not a colour.', 'Give 0 (black) to 1 (white).')

  def nothing(size: Size) -> Erase:
    return Erase(jnp.zeros((), bool), *[jnp.zeros(())] * 4)

  def sample(key: Key, size: Size) -> Erase:
    h, w, place, found = tries(key, size, scale, ratio, jnp.round, below=1)
    at = jnp.floor(place * (size - jnp.stack([h, w]) + 1.))
    box = jnp.concatenate([at / size, jnp.stack([h, w]) / size])
    return Erase(found, *jnp.where(found, box, 0.))

  def apply(action: Erase, image: Image) -> Image:
    def inside(n: int, start: Array, length: Array) -> Array:
      at = jnp.arange(n)
      return (at >= jnp.round(start * n).astype(jnp.int32)) & (at < jnp.round((start + length) * n).astype(jnp.int32))
    h, w, _ = image.pixels.shape
    gone = inside(h, action.top, action.height)[:, None] & inside(w, action.left, action.width)[None]
    return image._replace(pixels=jnp.where(gone[..., None], jnp.float32(value), image.pixels))

  return sometimes(p, Op(
      name='erase', identity=nothing, sample=sample, apply=apply,
      encode=lambda action: jnp.stack([x.astype(jnp.float32) for x in action])))

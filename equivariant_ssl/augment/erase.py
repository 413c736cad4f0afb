"""Random erasing."""
from typing import NamedTuple

import jax
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


def noise(action: Erase, shape: tuple[int, ...]) -> Array:
  """Uniform noise in [0, 1) whose seed is the box: an action makes the same noise each time."""
  key = jax.random.key(0)
  for number in action[1:]:
    key = jax.random.fold_in(key, jax.lax.bitcast_convert_type(number, jnp.uint32))
  return jax.random.uniform(key, shape)


def make(p: float = .5, scale: tuple[float, float] = (.02, .33), ratio: tuple[float, float] = (.3, 3.3),
         fill: str = 'grey') -> Op:
  """Erase a random box with probability `p`, as torchvision's RandomErasing (Zhong et al. 2020): an area uniform in `scale`,
  a height / width log-uniform in `ratio`, the first of ten tries that is smaller than the image either way, else nothing.

  fill: 'grey' (.5), or 'noise', uniform for each value. Raises UserError for another fill, or a range that is empty or not
  positive.
  """
  for name, (low, high) in {'scale': scale, 'ratio': ratio}.items():
    if not 0 < low <= high:
      raise UserError(f'erase.{name} = {(low, high)} is not a range above 0.', 'Give (low, high), as in (.02, .33).')
  if fill not in ('grey', 'noise'):
    raise UserError(f'erase has no fill {fill!r}.', "It has: 'grey', 'noise'.")

  def sample(key: Key, size: Size) -> Erase:
    h, w, place, found = tries(key, size, scale, (1. / ratio[1], 1. / ratio[0]), jnp.round, below=1)
    at = jnp.floor(place * (size - jnp.stack([h, w]) + 1.))
    box = jnp.concatenate([at / size, jnp.stack([h, w]) / size])
    return Erase(found, *jnp.where(found, box, 0.))

  def apply(action: Erase, image: Image) -> Image:
    def inside(n: int, start: Array, length: Array) -> Array:
      at = jnp.arange(n)
      return (at >= jnp.round(start * n).astype(jnp.int32)) & (at < jnp.round((start + length) * n).astype(jnp.int32))
    h, w, _ = image.pixels.shape
    gone = inside(h, action.top, action.height)[:, None] & inside(w, action.left, action.width)[None]
    filling = noise(action, image.pixels.shape) if fill == 'noise' else jnp.float32(.5)
    return image._replace(pixels=jnp.where(gone[..., None], filling, image.pixels))

  return sometimes(p, Op(
      name='erase',
      identity=lambda size: Erase(jnp.zeros((), bool), *[jnp.zeros(())] * 4),
      sample=sample,
      apply=apply,
      encode=lambda action: jnp.stack([x.astype(jnp.float32) for x in action])))

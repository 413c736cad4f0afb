"""Random erasing."""
from typing import NamedTuple

import jax
import jax.numpy as jnp

from equivariant_ssl.augment.algebra import sometimes
from equivariant_ssl.augment.crop import draw_box
from equivariant_ssl.errors import UserError
from equivariant_ssl.types import Array, Image, Key, Op, Size


class Erase(NamedTuple):
  """The box that is erased, in fractions of the view; all fields are 0 where it is not applied.

  applied: bool, whether a box is erased.
  top:     upper edge, fraction of the height.
  left:    left edge, fraction of the width.
  height:  fraction of the height.
  width:   fraction of the width.
  """
  applied: Array
  top: Array
  left: Array
  height: Array
  width: Array


def noise(action: Erase, shape: tuple[int, ...]) -> Array:
  """Uniform noise in [0, 1). Its seed is the box, so an action makes the same noise each time."""
  key = jax.random.key(0)
  for number in action[1:]:
    key = jax.random.fold_in(key, jax.lax.bitcast_convert_type(number, jnp.uint32))
  return jax.random.uniform(key, shape)


def make(p: float = .5, scale: tuple[float, float] = (.02, .33),
         ratio: tuple[float, float] = (.3, 3.3), fill: str = 'gray') -> Op:
  """With probability `p`, erase a random box of the view.

  scale: the range of the box's share of the area, in which it is uniform.
  ratio: the range of height / width, in which it is log-uniform.
  fill:  'gray' (.5), or 'noise', a uniform number for each value.

  It is torchvision's RandomErasing (Zhong et al. 2020): of ten boxes, the first that is smaller
  than the image in height and width is erased; where there is none, nothing is. Raises UserError
  for another fill, and for a range that is empty or not positive.
  """
  for name, (low, high) in {'scale': scale, 'ratio': ratio}.items():
    if not 0 < low <= high:
      raise UserError(f'erase.{name} = {(low, high)} is not a range above 0.',
                      'Give (low, high), as in (.02, .33).')
  if fill not in ('gray', 'noise'):
    raise UserError(f'erase has no fill {fill!r}.', "It has: 'gray', 'noise'.")

  def sample(key: Key, size: Size) -> Erase:
    aspect = (1. / ratio[1], 1. / ratio[0])
    h, w, place, fits = draw_box(key, size, scale, aspect, jnp.round, below=1)
    corner = jnp.floor(place * (size - jnp.stack([h, w]) + 1.))
    box = jnp.concatenate([corner / size, jnp.stack([h, w]) / size])
    return Erase(fits, *jnp.where(fits, box, 0.))

  def apply(action: Erase, image: Image) -> Image:
    def inside(n: int, start: Array, length: Array) -> Array:
      at = jnp.arange(n)
      end = jnp.round((start + length) * n).astype(jnp.int32)
      return (at >= jnp.round(start * n).astype(jnp.int32)) & (at < end)
    h, w, _ = image.pixels.shape
    rows, columns = inside(h, action.top, action.height), inside(w, action.left, action.width)
    box = rows[:, None] & columns[None]
    filling = noise(action, image.pixels.shape) if fill == 'noise' else jnp.float32(.5)
    return image._replace(pixels=jnp.where(box[..., None], filling, image.pixels))

  return sometimes(p, Op(
      name='erase',
      identity=lambda size: Erase(jnp.zeros((), bool), *[jnp.zeros(())] * 4),
      sample=sample,
      apply=apply,
      encode=lambda action: jnp.stack([x.astype(jnp.float32) for x in action])))

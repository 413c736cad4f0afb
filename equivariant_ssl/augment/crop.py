"""Random resized crop."""
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from equivariant_ssl.augment.pixels import KERNELS, resample
from equivariant_ssl.errors import UserError
from equivariant_ssl.types import Action, Array, Image, Key, Op, Size

TRIES = 10


class Crop(NamedTuple):
  """The box that is kept, in fractions of the true image: pixels = fraction x true side.

  top: upper edge, fraction of the true height. left: left edge, fraction of the true width.
  height: fraction of the true height. width: fraction of the true width.
  """
  top: Array
  left: Array
  height: Array
  width: Array


def tries(key: Key, size: Size, scale: tuple[float, float], ratio: tuple[float, float], whole, below: int = 0):
  """(height, width, place [2] in [0, 1), found): the first of TRIES boxes of a random area and aspect (width / height)
  that fits into the true `size` less `below`, its sides rounded by `whole`; not found: none does."""
  low = np.array([[scale[0], np.log(ratio[0])]] * TRIES + [[0., 0.]], np.float32)
  high = np.array([[scale[1], np.log(ratio[1])]] * TRIES + [[1., 1.]], np.float32)
  H, W = size[0], size[1]
  draws = jax.random.uniform(key, low.shape, minval=low, maxval=high)
  area, aspect, place = H * W * draws[:TRIES, 0], jnp.exp(draws[:TRIES, 1]), draws[TRIES]
  h, w = whole(jnp.sqrt(area / aspect)), whole(jnp.sqrt(area * aspect))
  valid = (h > 0) & (h <= H - below) & (w > 0) & (w <= W - below)
  first = jnp.argmax(valid)
  return h[first], w[first], place, jnp.any(valid)


def sampler(scale: tuple[float, float], ratio: tuple[float, float], snap: bool):
  """torchvision's RandomResizedCrop.get_params as (key, true size) -> Crop, its ten tries drawn at once."""
  whole = jnp.round if snap else lambda x: x  # half to even, as Python's round

  def sample(key: Key, size: Size) -> Crop:
    H, W = size[0], size[1]
    h, w, place, found = tries(key, size, scale, ratio, whole)
    # No try fits: the largest central box of an allowed aspect.
    h = jnp.where(found, h, jnp.where(W / H < ratio[0], whole(W / ratio[0]), H))
    w = jnp.where(found, w, jnp.where(W / H > ratio[1], whole(H * ratio[1]), W))
    free = jnp.stack([H - h, W - w])
    anywhere = jnp.minimum(jnp.floor(place * (free + 1.)), free) if snap else place * free
    central = jnp.floor(free / 2.) if snap else free / 2.
    top, left = jnp.where(found, anywhere, central)
    return Crop(top / H, left / W, h / H, w / W)

  return sample


def make(size: int = 32, scale: tuple[float, float] = (.08, 1.), ratio: tuple[float, float] = (3 / 4, 4 / 3),
         method: str = 'bicubic', snap: bool = True) -> Op:
  """Keep a random box and resize it to `size` x `size` pixels, as torchvision's RandomResizedCrop.

  scale: range of the box's share of the area. ratio: range of width / height, log-uniform. method: 'bicubic' or
  'bilinear', antialiased. snap: boxes of whole pixels of the true image. Raises UserError for another method, or
  a range that is empty or not positive.
  """
  if method not in KERNELS:
    raise UserError(f'crop has no method {method!r}.', f'It has: {", ".join(sorted(KERNELS))}.')
  for name, (low, high) in {'scale': scale, 'ratio': ratio}.items():
    if not 0 < low <= high:
      raise UserError(f'crop.{name} = {(low, high)} is not a range above 0.', 'Give (low, high), as in (.2, 1.).')

  def apply(action: Crop, image: Image) -> Image:
    return Image(resample(image.pixels, *action, size, method), jnp.full(2, size, jnp.float32))

  def encode(action: Action) -> Array:
    return jnp.stack([action.top, action.left, action.height - 1., action.width - 1.])

  return Op(
      name='crop',
      identity=lambda size: Crop(jnp.zeros(()), jnp.zeros(()), jnp.ones(()), jnp.ones(())),
      sample=sampler(scale, ratio, snap),
      apply=apply,
      encode=encode)

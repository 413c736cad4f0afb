"""Random resized crop."""
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from equivariant_ssl.augment.pixels import KERNELS, resample
from equivariant_ssl.errors import UserError
from equivariant_ssl.types import Array, Image, Key, Op, Size

TRIES = 10


class Crop(NamedTuple):
  """The box that is kept, in fractions of the true image: pixels = fraction x true side.

  top:    upper edge, fraction of the true height.
  left:   left edge, fraction of the true width.
  height: fraction of the true height.
  width:  fraction of the true width.
  """
  top: Array
  left: Array
  height: Array
  width: Array


def draw_box(key: Key, size: Size, scale: tuple[float, float], ratio: tuple[float, float],
             whole: Callable[[Array], Array], below: int = 0
             ) -> tuple[Array, Array, Array, Array]:
  """(height, width, place [2] in [0, 1), fits): a random box in an image of true size `size`.

  TRIES boxes are drawn, with an area from `scale` and an aspect (width / height) from `ratio`. The
  first one that fits is taken: each side, rounded by `whole`, is at most the image's minus `below`.
  `fits` is false where none of them fits.
  """
  low = np.array([[scale[0], np.log(ratio[0])]] * TRIES + [[0., 0.]], np.float32)
  high = np.array([[scale[1], np.log(ratio[1])]] * TRIES + [[1., 1.]], np.float32)
  H, W = size[0], size[1]
  draws = jax.random.uniform(key, low.shape, minval=low, maxval=high)
  area, aspect, place = H * W * draws[:TRIES, 0], jnp.exp(draws[:TRIES, 1]), draws[TRIES]
  h, w = whole(jnp.sqrt(area / aspect)), whole(jnp.sqrt(area * aspect))
  valid = (h > 0) & (h <= H - below) & (w > 0) & (w <= W - below)
  first = jnp.argmax(valid)
  return h[first], w[first], place, jnp.any(valid)


def sampler(scale: tuple[float, float], ratio: tuple[float, float], snap: bool
            ) -> Callable[[Key, Size], Crop]:
  """torchvision's RandomResizedCrop.get_params: (key, true size) -> Crop.

  snap: the box has whole pixels of the true image.
  """
  def whole(x: Array) -> Array:
    return jnp.round(x) if snap else x  # half to even, as Python's round

  def sample(key: Key, size: Size) -> Crop:
    H, W = size[0], size[1]
    h, w, place, fits = draw_box(key, size, scale, ratio, whole)
    # Where no box fits: the largest central box of an allowed aspect.
    h = jnp.where(fits, h, jnp.where(W / H < ratio[0], whole(W / ratio[0]), H))
    w = jnp.where(fits, w, jnp.where(W / H > ratio[1], whole(H * ratio[1]), W))
    free = jnp.stack([H - h, W - w])
    anywhere = jnp.minimum(jnp.floor(place * (free + 1.)), free) if snap else place * free
    central = jnp.floor(free / 2.) if snap else free / 2.
    top, left = jnp.where(fits, anywhere, central)
    return Crop(top / H, left / W, h / H, w / W)

  return sample


def make(size: int = 32, scale: tuple[float, float] = (.08, 1.),
         ratio: tuple[float, float] = (3 / 4, 4 / 3), method: str = 'bicubic', snap: bool = True
         ) -> Op:
  """Keep a random box and resize it to `size` x `size` pixels.

  scale:  the range of the box's share of the area.
  ratio:  the range of width / height, in which it is log-uniform.
  method: 'bicubic' or 'bilinear', antialiased.
  snap:   boxes have whole pixels of the true image.

  It is torchvision's RandomResizedCrop. Raises UserError for another method, and for a range that
  is empty or not positive.
  """
  if method not in KERNELS:
    raise UserError(f'crop has no method {method!r}.', f'It has: {", ".join(sorted(KERNELS))}.')
  for name, (low, high) in {'scale': scale, 'ratio': ratio}.items():
    if not 0 < low <= high:
      raise UserError(f'crop.{name} = {(low, high)} is not a range above 0.',
                      'Give (low, high), as in (.2, 1.).')

  def apply(action: Crop, image: Image) -> Image:
    return Image(resample(image.pixels, *action, size, method), jnp.full(2, size, jnp.float32))

  def encode(action: Crop) -> Array:
    return jnp.stack([action.top, action.left, action.height - 1., action.width - 1.])

  return Op(
      name='crop',
      identity=lambda size: Crop(jnp.zeros(()), jnp.zeros(()), jnp.ones(()), jnp.ones(())),
      sample=sampler(scale, ratio, snap),
      apply=apply,
      encode=encode)

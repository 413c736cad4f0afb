"""Gaussian blur."""
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from equivariant_ssl.augment.algebra import sometimes
from equivariant_ssl.augment.pixels import total
from equivariant_ssl.errors import UserError
from equivariant_ssl.types import Array, Image, Key, Op, Size


class Blur(NamedTuple):
  """applied: bool, whether it is blurred. sigma: standard deviation of the Gaussian in pixels, 0 not applied."""
  applied: Array
  sigma: Array


def make(p: float = .5, kernel: int = 23, sigma: tuple[float, float] = (.1, 2.)) -> Op:
  """Blur with probability `p` by a Gaussian of `kernel` pixels, its sigma uniform in `sigma` (pixels).

  As torchvision's gaussian_blur: the kernel is cut off at its size and renormalised, the border reflected.
  Raises UserError for an even kernel, ValueError at trace time where the image is too small to reflect.
  """
  if kernel < 1 or kernel % 2 == 0:
    raise UserError(f'blur.kernel = {kernel} is not an odd number of pixels.', f'Try {abs(kernel) + 1}.')
  reach = kernel // 2

  def apply(action: Blur, image: Image) -> Image:
    pixels = image.pixels
    if reach >= min(pixels.shape[:2]):
      raise ValueError(f'blur.kernel = {kernel} is too large for an image of {pixels.shape[0]} x {pixels.shape[1]} '
                       f'pixels; give at most {2 * min(pixels.shape[:2]) - 1}')
    away = jnp.arange(-reach, reach + 1.)
    bell = jnp.exp(-.5 * (away / jnp.where(action.sigma > 0, action.sigma, 1.)) ** 2)
    bell = jnp.where(action.sigma > 0, bell, (away == 0).astype(jnp.float32))  # sigma 0: the pixel itself
    bell = bell / total(bell)
    for axis in (0, 1):
      at = np.abs(np.arange(side := pixels.shape[axis])[:, None] + np.arange(-reach, reach + 1)[None])
      at = side - 1 - np.abs(side - 1 - at)  # reflected at both borders
      matrix = jnp.einsum('k,iko->io', bell, jax.nn.one_hot(at, side), precision='highest')
      pixels = jnp.einsum('io,o...->i...' if axis == 0 else 'io,ho...->hi...', matrix, pixels, precision='highest')
    return image._replace(pixels=jnp.clip(pixels, 0., 1.))

  def sample(key: Key, size: Size) -> Blur:
    return Blur(jnp.ones((), bool), jax.random.uniform(key, (), minval=sigma[0], maxval=sigma[1]))

  return sometimes(p, Op(
      name='blur',
      identity=lambda size: Blur(jnp.zeros((), bool), jnp.zeros(())),
      sample=sample,
      apply=apply,
      encode=lambda action: jnp.stack([action.applied.astype(jnp.float32), action.sigma])))

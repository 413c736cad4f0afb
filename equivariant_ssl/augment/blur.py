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
  """The blur of an image.

  applied: bool, whether the image is blurred.
  sigma:   standard deviation of the Gaussian in pixels; 0 where it is not applied.
  """
  applied: Array
  sigma: Array


def matrix(side: int, reach: int, sigma: Array) -> Array:
  """[side side]: the weight of each pixel of a line (columns) in each blurred pixel (rows).

  The Gaussian of `sigma` pixels is cut off after `reach` pixels, and the line is reflected at both
  borders; the border pixel itself is not repeated.
  """
  # A product with one number for each image: a division would round differently where a device
  # holds a single image.
  steep = -.5 / jnp.where(sigma > 0, sigma * sigma, 1.)

  def gaussian(distance: np.ndarray) -> Array:
    height = jnp.exp((distance * distance).astype(np.float32) * steep)
    # With sigma 0, the pixel itself has all the weight.
    return jnp.where(sigma > 0, height, (distance == 0).astype(np.float32))

  at = np.arange(side)
  # The distances to a pixel, and to its reflections at the left and at the right border.
  here, last = at[:, None] - at[None], 2 * (side - 1)
  left = np.where(at[None] > 0, at[:, None] + at[None], last + side)
  right = np.where(at[None] < side - 1, last - at[:, None] - at[None], last + side)
  parts = [jnp.where(np.abs(distance) <= reach, gaussian(distance), 0.)
           for distance in (here, left, right)]
  return (parts[0] + parts[1] + parts[2]) * (1. / total(gaussian(np.arange(-reach, reach + 1))))


def gaussian_blur(name: str, kernel: int, sigma: Array, image: Image) -> Image:
  """`image` blurred by a Gaussian of `sigma` pixels; a sigma of 0 leaves it as it is.

  The Gaussian is cut off at `kernel` pixels, and the image is reflected at its border. Raises
  ValueError, in the name of op `name`, where the image is too small for the kernel.
  """
  h, w, _ = image.pixels.shape
  reach = kernel // 2
  if reach >= min(h, w):
    raise ValueError(f'{name}.kernel = {kernel} is too large for an image of {h} x {w} pixels; '
                     f'give at most {2 * min(h, w) - 1}.')
  pixels = jnp.einsum('pw,hwc->hpc', matrix(w, reach, sigma), image.pixels, precision='highest')
  pixels = jnp.einsum('qh,hpc->qpc', matrix(h, reach, sigma), pixels, precision='highest')
  return image._replace(pixels=jnp.clip(pixels, 0., 1.))


def check_kernel(name: str, kernel: int) -> None:
  """Raise a UserError for a kernel that is not an odd number of pixels."""
  if kernel < 1 or kernel % 2 == 0:
    raise UserError(f'{name}.kernel = {kernel} is not an odd number of pixels.',
                    f'Try {abs(kernel) + 1}.')


def make(p: float = .5, kernel: int = 23, sigma: tuple[float, float] = (.1, 2.)) -> Op:
  """With probability `p`, blur by a Gaussian whose standard deviation is uniform in `sigma`.

  kernel: the size of the kernel in pixels, an odd number.
  sigma:  (low, high), in pixels.

  It is torchvision's gaussian_blur: the kernel is cut off at its size and normalized, and the image
  is reflected at its border. dm_pix.gaussian_blur is not called, since it puts zeros outside the
  border.

  Raises UserError for an even kernel, and ValueError at trace time where the image is too small to
  reflect.
  """
  check_kernel('blur', kernel)
  if not 0 < sigma[0] <= sigma[1]:
    raise UserError(f'blur.sigma = {sigma} is not a range above 0.',
                    'Give (low, high) in pixels, as in (.1, 2.).')

  def sample(key: Key, size: Size) -> Blur:
    draw = jax.random.uniform(key, (), minval=sigma[0], maxval=sigma[1])
    return Blur(jnp.ones((), bool), draw)

  return sometimes(p, Op(
      name='blur',
      identity=lambda size: Blur(jnp.zeros((), bool), jnp.zeros(())),
      sample=sample,
      apply=lambda action, image: gaussian_blur('blur', kernel, action.sigma, image),
      encode=lambda action: jnp.stack([action.applied.astype(jnp.float32), action.sigma])))

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


def matrix(side: int, reach: int, sigma: Array) -> Array:
  """[side side]: what each pixel of a line takes of each, by a Gaussian of `sigma` cut off after `reach` pixels.

  A pixel is seen three times: where it is, and reflected at either border (the border pixel itself but once).
  """
  # One number an image, multiplied: to divide by it would round otherwise where a device holds one image.
  steep = -.5 / jnp.where(sigma > 0, sigma * sigma, 1.)

  def bell(distance: np.ndarray) -> Array:
    height = jnp.exp((distance * distance).astype(np.float32) * steep)
    return jnp.where(sigma > 0, height, (distance == 0).astype(np.float32))  # sigma 0: the pixel itself

  at = np.arange(side)
  here, last = at[:, None] - at[None], 2 * (side - 1)
  left = np.where(at[None] > 0, at[:, None] + at[None], last + side)
  right = np.where(at[None] < side - 1, last - at[:, None] - at[None], last + side)
  seen = [jnp.where(np.abs(distance) <= reach, bell(distance), 0.) for distance in (here, left, right)]
  return (seen[0] + seen[1] + seen[2]) * (1. / total(bell(np.arange(-reach, reach + 1))))


def blurred(name: str, kernel: int, sigma: Array, image: Image) -> Image:
  """`image` blurred by a Gaussian of `sigma` pixels cut off at `kernel`, the border reflected; 0 leaves it as it is."""
  h, w, _ = image.pixels.shape
  reach = kernel // 2
  if reach >= min(h, w):
    raise ValueError(f'{name}.kernel = {kernel} is too large for an image of {h} x {w} pixels; '
                     f'give at most {2 * min(h, w) - 1}')
  pixels = jnp.einsum('pw,hwc->hpc', matrix(w, reach, sigma), image.pixels, precision='highest')
  pixels = jnp.einsum('qh,hpc->qpc', matrix(h, reach, sigma), pixels, precision='highest')
  return image._replace(pixels=jnp.clip(pixels, 0., 1.))


def check(name: str, kernel: int) -> None:
  """Raises UserError for a kernel that has no middle."""
  if kernel < 1 or kernel % 2 == 0:
    raise UserError(f'{name}.kernel = {kernel} is not an odd number of pixels.', f'Try {abs(kernel) + 1}.')


def make(p: float = .5, kernel: int = 23, sigma: tuple[float, float] = (.1, 2.)) -> Op:
  """Blur with probability `p` by a Gaussian of `kernel` pixels, its sigma uniform in `sigma` (pixels).

  As torchvision's gaussian_blur: the kernel is cut off at its size and renormalised, the border reflected.
  Raises UserError for an even kernel, ValueError at trace time where the image is too small to reflect.
  """
  check('blur', kernel)
  if not 0 < sigma[0] <= sigma[1]:
    raise UserError(f'blur.sigma = {sigma} is not a range above 0.', 'Give (low, high) in pixels, as in (.1, 2.).')

  def sample(key: Key, size: Size) -> Blur:
    return Blur(jnp.ones((), bool), jax.random.uniform(key, (), minval=sigma[0], maxval=sigma[1]))

  return sometimes(p, Op(
      name='blur',
      identity=lambda size: Blur(jnp.zeros((), bool), jnp.zeros(())),
      sample=sample,
      apply=lambda action, image: blurred('blur', kernel, action.sigma, image),
      encode=lambda action: jnp.stack([action.applied.astype(jnp.float32), action.sigma])))

"""Gaussian blur at one of a few levels: a discrete op (E-SSL's four-fold blur)."""
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from equivariant_ssl.augment import blur
from equivariant_ssl.augment.algebra import sometimes
from equivariant_ssl.errors import UserError
from equivariant_ssl.types import Array, Image, Op


class BlurLevel(NamedTuple):
  """level: int32, the index of the Gaussian's standard deviation; 0 is not blurred."""
  level: Array


def make(p: float = 1., sigmas: tuple[float, ...] = (0., .5, 1., 2.), kernel: int = 13) -> Op:
  """With probability `p`, blur by one of the standard deviations `sigmas`, each as likely.

  sigmas: the standard deviations, in pixels; they rise, and the first is 0.
  kernel: the size of the kernel in pixels, an odd number.

  The op is discrete, and the class is the index in `sigmas`. Raises UserError where the sigmas do
  not rise from 0, or for an even kernel, and ValueError at trace time where the image is too small.
  """
  blur.check_kernel('blur_levels', kernel)
  if len(sigmas) < 2 or sigmas[0] != 0 or list(sigmas) != sorted(set(sigmas)):
    raise UserError(f'blur_levels.sigmas = {sigmas} do not rise from 0.',
                    'Write them as in (0., .5, 1., 2.).')
  K = len(sigmas)

  def apply(action: BlurLevel, image: Image) -> Image:
    sigma = jnp.array(sigmas, jnp.float32)[action.level]
    return blur.gaussian_blur('blur_levels', kernel, sigma, image)

  def encode_level(level: Array) -> Array:
    return jax.nn.one_hot(level - 1, K - 1, dtype=jnp.float32)  # level 0 is all zeros

  return sometimes(p, Op(
      name='blur_levels',
      identity=lambda size: BlurLevel(jnp.zeros((), jnp.int32)),
      sample=lambda key, size: BlurLevel(jax.random.randint(key, (), 0, K)),
      apply=apply,
      encode=lambda action: encode_level(action.level),
      choices=BlurLevel(np.arange(K, dtype=np.int32)),
      relative=lambda before, after: encode_level((after.level - before.level) % K)))

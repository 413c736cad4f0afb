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
  """level: int32, index of the Gaussian's standard deviation; 0 is not blurred."""
  level: Array


def make(p: float = 1., sigmas: tuple[float, ...] = (0., .5, 1., 2.), kernel: int = 13) -> Op:
  """With probability `p`, blur by one of `sigmas` (pixels; the first is 0), each as likely; the kernel has `kernel` pixels.

  Discrete; the class is the index. Raises UserError where the first sigma is not 0 or they do not rise, or for an even
  kernel; ValueError at trace time where the image is too small for it.
  """
  blur.check('blur_levels', kernel)
  if len(sigmas) < 2 or sigmas[0] != 0 or list(sigmas) != sorted(set(sigmas)):
    raise UserError(f'blur_levels.sigmas = {sigmas} do not rise from 0.', 'As in (0., .5, 1., 2.).')
  K = len(sigmas)

  def apply(action: BlurLevel, image: Image) -> Image:
    return blur.blurred('blur_levels', kernel, jnp.array(sigmas, jnp.float32)[action.level], image)

  return sometimes(p, Op(
      name='blur_levels',
      identity=lambda size: BlurLevel(jnp.zeros((), jnp.int32)),
      sample=lambda key, size: BlurLevel(jax.random.randint(key, (), 0, K)),
      apply=apply,
      encode=lambda action: jax.nn.one_hot(action.level - 1, K - 1, dtype=jnp.float32),
      choices=BlurLevel(np.arange(K, dtype=np.int32)),
      relative=lambda before, after: jax.nn.one_hot((after.level - before.level) % K - 1, K - 1, dtype=jnp.float32)))

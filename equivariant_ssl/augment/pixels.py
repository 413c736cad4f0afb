"""Arithmetic on pixels that several ops share, bitwise the same for every batch a device may hold.

XLA compiles a batch of one image differently from a batch of many: a `reduce` may add in another order, a product
may or may not be fused into the sum after it, and an array divided by one number an image may be multiplied by its
inverse. Hence sums in a written-out order, boxes in integers, and inverses where an image has one divisor.
"""
from collections.abc import Callable

import jax.numpy as jnp

from equivariant_ssl.types import Array


def total(x: Array) -> Array:
  """The sum over the first axis, [N ...] -> [...], by halving: exact order, error growing with log N."""
  while x.shape[0] > 1:
    n = x.shape[0]
    half = x[:n // 2] + x[n - n // 2:]
    x = jnp.concatenate([half, x[n // 2:n // 2 + 1]]) if n % 2 else half
  return x[0]


def grey(pixels: Array) -> Array:
  """The luma of colours, [... 3] -> [...], by the weights of ITU-R 601 (Pillow's 'L')."""
  return .299 * pixels[..., 0] + .587 * pixels[..., 1] + .114 * pixels[..., 2]


def cubic(x: Array) -> Array:
  """Keys' cubic kernel with a = -1/2 (Pillow's and jax.image's), support 2."""
  x = jnp.abs(x)
  near = (1.5 * x - 2.5) * x * x + 1.
  far = ((-.5 * x + 2.5) * x - 4.) * x + 2.
  return jnp.where(x < 1., near, jnp.where(x < 2., far, 0.))


def triangle(x: Array) -> Array:
  """The bilinear kernel, support 1."""
  return jnp.maximum(0., 1. - jnp.abs(x))


KERNELS: dict[str, Callable[[Array], Array]] = {'bicubic': cubic, 'bilinear': triangle}


def weights(start: Array, length: Array, side: int, size: int, kernel: Callable[[Array], Array]) -> Array:
  """The matrix [size side] that resizes pixels [start, start + length) of a line of `side` to `size` pixels.

  `start` and `length` are fractions of the line. Antialiased as jax.image.scale_and_translate; pixels whose
  centre is outside the box weigh nothing (cut first, then resize), and each row sums to 1.
  """
  # Whole steps of 1/unit pixel: 2 * size * side * unit fits in 30 bits, so positions are exact integers.
  unit = 2 ** min(12, 29 - (size * side).bit_length())
  length = jnp.maximum(jnp.round(length * (side * unit)).astype(jnp.int32), unit)  # at least a pixel to see
  start = jnp.minimum(jnp.round(start * (side * unit)).astype(jnp.int32), side * unit - length)
  centre = jnp.arange(side) * unit + unit // 2
  inside = (centre >= start) & (centre < start + length)
  distance = 2 * size * (start - centre)[None] + ((2 * jnp.arange(size) + 1) * length)[:, None]
  reach = jnp.maximum(length, size * unit).astype(jnp.float32) * 2.  # where it shrinks, the kernel widens
  weight = jnp.where(inside[None], kernel(distance.astype(jnp.float32) * (1. / reach)), 0.)
  return weight * (1. / total(weight.T))[:, None]


def resample(pixels: Array, top: Array, left: Array, height: Array, width: Array, size: int, method: str) -> Array:
  """Cut a box (fractions of the sides) out of [h w C] in [0, 1] and resize it to [size size C], as Pillow does.

  Columns first, then rows, clipped to [0, 1] after each; `method` is 'bicubic' or 'bilinear'.
  """
  h, w, _ = pixels.shape
  columns = weights(left, width, w, size, KERNELS[method])
  rows = weights(top, height, h, size, KERNELS[method])
  pixels = jnp.clip(jnp.einsum('pw,hwc->hpc', columns, pixels, precision='highest'), 0., 1.)
  return jnp.clip(jnp.einsum('qh,hpc->qpc', rows, pixels, precision='highest'), 0., 1.)

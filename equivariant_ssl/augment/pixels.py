"""Arithmetic on pixels that several ops share, bitwise the same for every batch a device may hold.

XLA compiles a batch of one image differently from a batch of many: a `reduce` may add in another order, a product
may or may not be fused into the sum after it, and an array divided by one number an image may be multiplied by its
inverse. Hence sums in a written-out order, boxes in integers, and inverses where an image has one divisor.
"""
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

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


def weights(start: Array, length: Array, side: int, size: int, kernel: Callable[[Array], Array], cut: bool = True) -> Array:
  """The matrix [size side] that resizes pixels [start, start + length) of a line of `side` to `size` pixels.

  `start` and `length` are fractions of the line. Antialiased as jax.image.scale_and_translate; with `cut` pixels whose
  centre is outside the box weigh nothing (cut first, then resize), else the kernel reaches beyond it (resize first, then
  cut); each row sums to 1.
  """
  # Whole steps of 1/unit pixel: 2 * size * side * unit fits in 30 bits, so positions are exact integers.
  unit = 2 ** min(12, 29 - (size * side).bit_length())
  length = jnp.maximum(jnp.round(length * (side * unit)).astype(jnp.int32), unit)  # at least a pixel to see
  start = jnp.minimum(jnp.round(start * (side * unit)).astype(jnp.int32), side * unit - length)
  centre = jnp.arange(side) * unit + unit // 2
  inside = (centre >= start) & (centre < start + length)
  distance = 2 * size * (start - centre)[None] + ((2 * jnp.arange(size) + 1) * length)[:, None]
  reach = jnp.maximum(length, size * unit).astype(jnp.float32) * 2.  # where it shrinks, the kernel widens
  weight = kernel(distance.astype(jnp.float32) * (1. / reach))
  weight = jnp.where(inside[None], weight, 0.) if cut else weight
  return weight * (1. / total(weight.T))[:, None]


def resample(pixels: Array, top: Array, left: Array, height: Array, width: Array, size: int, method: str, cut: bool = True
             ) -> Array:
  """Cut a box (fractions of the sides) out of [h w C] in [0, 1] and resize it to [size size C], as Pillow does; without
  `cut`, resize the whole to the same scale and then cut.

  Columns first, then rows, clipped to [0, 1] after each; `method` is 'bicubic' or 'bilinear'.
  """
  h, w, _ = pixels.shape
  columns = weights(left, width, w, size, KERNELS[method], cut)
  rows = weights(top, height, h, size, KERNELS[method], cut)
  pixels = jnp.clip(jnp.einsum('pw,hwc->hpc', columns, pixels, precision='highest'), 0., 1.)
  return jnp.clip(jnp.einsum('qh,hpc->qpc', rows, pixels, precision='highest'), 0., 1.)


def differs(before: Array, after: Array) -> Array:
  """[1] float32: 1 where one of two bools holds and the other does not: the way between views that were swapped or not."""
  return (before != after).astype(jnp.float32)[None]


REACH = 3   # of a warp's Gaussian, pixels either way
FIXED = 12  # bits after the point of a warp's positions


def warp(pixels: Array, turn: Array, shift: Array, sigma: Array) -> Array:
  """[h w C] resampled: the pixel at offset p from the centre shows the picture around `turn` p + `shift`.

  turn: [2 2], shift: [2], in pixels (rows, columns). What is around a point is weighed by one round Gaussian of `sigma`
  pixels, cut off REACH pixels away: how much it smooths does not depend on the direction, nor, from about .7 pixels on, on
  where between the pixels the point lies, so that neither can be read off the result. Beyond the border the border
  pixel is meant.
  """
  h, w, C = pixels.shape
  unit = 2 ** FIXED
  # Offsets in halves of a pixel are whole, and positions in 1 / (2 unit) exact.
  i, j = (2 * np.arange(n) - (n - 1) for n in (h, w))
  turn = jnp.round(turn * unit).astype(jnp.int32)
  shift = jnp.round(shift * (2 * unit)).astype(jnp.int32)
  centre = [(n - 1) * unit for n in (h, w)]
  at = [turn[k, 0] * i[:, None] + turn[k, 1] * j[None] + shift[k] + centre[k] for k in range(2)]
  first = [a // (2 * unit) - (REACH - 1) for a in at]                 # of the pixels within reach
  steep = -.5 / (sigma * sigma)
  reached, weights = [], []
  for a, start, n in zip(at, first, (h, w), strict=True):
    near = start[None] + np.arange(2 * REACH)[:, None, None]          # [2 REACH, h, w]
    distance = (near * (2 * unit) - a[None]).astype(jnp.float32) / (2 * unit)
    weight = jnp.exp(distance * distance * steep)
    weights.append(weight * (1. / total(weight))[None])
    reached.append(jnp.clip(near, 0, n - 1))

  def row(_, taps: tuple[Array, Array]):
    y, weight = taps
    shown = pixels[y[None], reached[1]]                               # [2 REACH, h, w, C]
    return None, total(shown * (weight[None] * weights[1])[..., None])
  rows = jax.lax.scan(row, None, (reached[0], weights[0]))[1]         # a scan: it never holds all taps at once
  return jnp.clip(total(rows), 0., 1.)


def disc(side: int, radius: float) -> np.ndarray:
  """[side side 1] bool: the pixels within `radius` pixels of the centre."""
  offset = np.arange(side) - (side - 1) / 2
  return (offset[:, None] ** 2 + offset[None] ** 2 <= radius ** 2)[..., None]

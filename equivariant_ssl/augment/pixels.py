"""Arithmetic on pixels that several ops share, bitwise the same for every size of batch.

XLA compiles a batch of one image differently from a batch of many. A `reduce` may add in another
order. A product may or may not be fused into the sum after it. An array that is divided by one
number for each image may be multiplied by the inverse. Therefore sums are written out in a fixed
order, boxes are integers, and each division by such a number is written as a product.
"""
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from equivariant_ssl.types import Array


def total(x: Array) -> Array:
  """The sum over the first axis, [N ...] -> [...], by halving.

  The order of the additions is fixed, and the error grows with log N.
  """
  while x.shape[0] > 1:
    n = x.shape[0]
    half = x[:n // 2] + x[n - n // 2:]
    x = jnp.concatenate([half, x[n // 2:n // 2 + 1]]) if n % 2 else half
  return x[0]


def luma(pixels: Array) -> Array:
  """The luma of colors, [... 3] -> [...], by the weights of ITU-R 601 (Pillow's 'L').

  dm_pix.rgb_to_grayscale is not called: it weighs red by .2989, and its matrix product may add in
  another order.
  """
  return .299 * pixels[..., 0] + .587 * pixels[..., 1] + .114 * pixels[..., 2]


def cubic(x: Array) -> Array:
  """Keys' cubic kernel with a = -1/2 (Pillow's and jax.image's), of support 2."""
  x = jnp.abs(x)
  near = (1.5 * x - 2.5) * x * x + 1.
  far = ((-.5 * x + 2.5) * x - 4.) * x + 2.
  return jnp.where(x < 1., near, jnp.where(x < 2., far, 0.))


def triangle(x: Array) -> Array:
  """The bilinear kernel, of support 1."""
  return jnp.maximum(0., 1. - jnp.abs(x))


KERNELS: dict[str, Callable[[Array], Array]] = {'bicubic': cubic, 'bilinear': triangle}


def weights(start: Array, length: Array, side: int, size: int, kernel: Callable[[Array], Array],
            cut: bool = True) -> Array:
  """[size side]: the matrix that resizes part of a line of `side` pixels to `size` pixels.

  start, length: where the part starts and how long it is, as fractions of the line.
  cut: pixels whose center is outside the part weigh nothing: the line is cut first and resized
       then. Else the kernel reaches beyond the part: the line is resized first and cut then.

  The kernel is antialiased as in jax.image.scale_and_translate, and each row sums to 1.
  """
  # Whole steps of 1/unit pixel: 2 * size * side * unit fits in 30 bits, so positions are exact.
  unit = 2 ** min(12, 29 - (size * side).bit_length())
  # At least one pixel is kept.
  length = jnp.maximum(jnp.round(length * (side * unit)).astype(jnp.int32), unit)
  start = jnp.minimum(jnp.round(start * (side * unit)).astype(jnp.int32), side * unit - length)
  center = jnp.arange(side) * unit + unit // 2
  inside = (center >= start) & (center < start + length)
  distance = 2 * size * (start - center)[None] + ((2 * jnp.arange(size) + 1) * length)[:, None]
  # Where the line shrinks, the kernel widens.
  reach = jnp.maximum(length, size * unit).astype(jnp.float32) * 2.
  weight = kernel(distance.astype(jnp.float32) * (1. / reach))
  weight = jnp.where(inside[None], weight, 0.) if cut else weight
  return weight * (1. / total(weight.T))[:, None]


def resample(pixels: Array, top: Array, left: Array, height: Array, width: Array, size: int,
             method: str, cut: bool = True) -> Array:
  """A box of the image [h w C] in [0, 1], resized to [size size C].

  top, left, height, width: the place and the size of the box, as fractions of the sides.
  method: 'bicubic' or 'bilinear'.
  cut: as Pillow, cut the box out first and resize it then; else resize the whole image to the same
       scale first and cut then.

  Columns are resized first, then rows; the values are clipped to [0, 1] after each.
  """
  h, w, _ = pixels.shape
  columns = weights(left, width, w, size, KERNELS[method], cut)
  rows = weights(top, height, h, size, KERNELS[method], cut)
  pixels = jnp.clip(jnp.einsum('pw,hwc->hpc', columns, pixels, precision='highest'), 0., 1.)
  return jnp.clip(jnp.einsum('qh,hpc->qpc', rows, pixels, precision='highest'), 0., 1.)


def differs(before: Array, after: Array) -> Array:
  """[1] float32: 1 where exactly one of two bools holds: the way between flipped views."""
  return (before != after).astype(jnp.float32)[None]


REACH = 3   # reach of a warp's Gaussian, in pixels either way
FIXED = 12  # bits after the point of a warp's positions


def warp(pixels: Array, turn: Array, shift: Array, sigma: Array) -> Array:
  """[h w C], resampled: the pixel at offset p from the center shows the point `turn` p + `shift`.

  turn:  [2 2], without unit.
  shift: [2], in pixels (rows, columns).
  sigma: the standard deviation of the Gaussian, in pixels.

  The surroundings of a point are weighted by one round Gaussian, which is cut off REACH pixels
  away. So the smoothing does not depend on the direction, nor, from a sigma of about .7 pixels on,
  on where the point lies between the pixels; neither can be read off the result. Beyond the border
  the border pixel is repeated.
  """
  h, w, C = pixels.shape
  unit = 2 ** FIXED
  # Offsets in halves of a pixel are whole numbers, and positions in 1 / (2 unit) are exact.
  i, j = (2 * np.arange(n) - (n - 1) for n in (h, w))
  turn = jnp.round(turn * unit).astype(jnp.int32)
  shift = jnp.round(shift * (2 * unit)).astype(jnp.int32)
  center = [(n - 1) * unit for n in (h, w)]
  at = [turn[k, 0] * i[:, None] + turn[k, 1] * j[None] + shift[k] + center[k] for k in range(2)]
  first = [a // (2 * unit) - (REACH - 1) for a in at]                 # the first pixel in reach
  steep = -.5 / (sigma * sigma)
  neighbors, weights = [], []
  for a, start, n in zip(at, first, (h, w), strict=True):
    near = start[None] + np.arange(2 * REACH)[:, None, None]          # [2 REACH, h, w]
    distance = (near * (2 * unit) - a[None]).astype(jnp.float32) / (2 * unit)
    weight = jnp.exp(distance * distance * steep)
    weights.append(weight * (1. / total(weight))[None])
    neighbors.append(jnp.clip(near, 0, n - 1))

  def add_row(_, taps: tuple[Array, Array]) -> tuple[None, Array]:
    y, weight = taps
    values = pixels[y[None], neighbors[1]]                            # [2 REACH, h, w, C]
    return None, total(values * (weight[None] * weights[1])[..., None])
  # A scan, so that all taps are never held at once.
  rows = jax.lax.scan(add_row, None, (neighbors[0], weights[0]))[1]
  return jnp.clip(total(rows), 0., 1.)


def disc(side: int, radius: float) -> np.ndarray:
  """[side side 1] bool: the pixels within `radius` pixels of the center."""
  offset = np.arange(side) - (side - 1) / 2
  return (offset[:, None] ** 2 + offset[None] ** 2 <= radius ** 2)[..., None]

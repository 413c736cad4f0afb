"""Colors in 8 bits, exactly as Pillow computes them.

A level is a whole number from 0 to 255, held as int32. Levels are rounded, or their fractions cut
off, where Pillow does so. The arithmetic of Pillow is derived again here in whole numbers; it was
checked on all 16.7 million colors. A blend, which Pillow computes in floating point, is computed in
the same order and without a fused multiply-add, which Pillow's builds for x86-64 do not have.
"""
import functools

import jax
import jax.numpy as jnp
import numpy as np

from equivariant_ssl.types import Array


def of(pixels: Array) -> Array:
  """The levels of pixels in [0, 1], rounded to the nearest."""
  return jnp.round(pixels * 255.).astype(jnp.int32)


def pixels(levels: Array) -> Array:
  """The pixels, float32 in [0, 1], of levels."""
  return levels.astype(jnp.float32) * np.float32(1 / 255)


def luma(levels: Array) -> Array:
  """The luma [...] of levels [... 3], as Pillow converts to its mode 'L'."""
  return (19595 * levels[..., 0] + 38470 * levels[..., 1] + 7471 * levels[..., 2] + 2 ** 15) >> 16


def blend(levels: Array, change: Array, factor: Array) -> Array:
  """Levels [h w 3] after one of Pillow's ImageEnhance operations.

  change: 0 is Brightness, 1 is Contrast, 2 is Color. Each mixes the image with another one: black,
  the rounded mean luma, or the luma. The result is the other image plus `factor` times the
  difference, with the fraction cut off.
  """
  gray = luma(levels)
  mean = (2 * jnp.sum(gray) + gray.size) // (2 * gray.size)
  other = jnp.where(change == 0, 0, jnp.where(change == 1, mean, gray))[..., None]
  # The barrier makes the product round before it is added.
  share = jax.lax.optimization_barrier(factor * (levels - other).astype(jnp.float32))
  return jnp.clip(other.astype(jnp.float32) + share, 0., 255.).astype(jnp.int32)


@functools.cache
def lowered() -> np.ndarray:
  """By how many levels Pillow's hue is below the exact hue, int32 [6 256].

  Pillow divides in float32 and cuts off the fraction, so a hue that is exactly a whole level may
  come out one level lower. First axis: twice the index of the largest channel, plus 1 where the
  first of the two other channels is the smallest. Second axis: the exact hue.
  """
  small, span = np.meshgrid(np.arange(256), np.arange(256))
  small, span = small[(small <= span) & (span > 0)], span[(small <= span) & (span > 0)]
  ratio, one = np.float32(small) / np.float32(span), np.float32(1)
  deficit = np.zeros((6, 256), np.int32)
  for largest in range(3):
    for first in range(2):
      a, b = ((one, ratio) if first else (ratio, one))
      hue = a - b if largest == 0 else np.float32(2. * largest + np.float64(a) - np.float64(b))
      theirs = np.int64(255. * np.float64(np.float32(np.fmod(np.float64(hue) / 6. + 1., 1.))))
      difference = np.where(first, span - small, small - span)
      above = 255 * ((difference + 2 * largest * span) % (6 * span))
      is_level = above % (6 * span) == 0
      exact = above // (6 * span)
      deficit[2 * largest + first, exact[is_level]] = (exact - theirs)[is_level]
  return deficit


def to_hsv(levels: Array) -> tuple[Array, Array, Array]:
  """Pillow's hue, saturation and value of levels [... 3], each [...]."""
  red, green, blue = (levels[..., i] for i in range(3))
  top, low = jnp.max(levels, axis=-1), jnp.min(levels, axis=-1)
  span = jnp.maximum(top - low, 1)
  largest = jnp.where(red == top, 0, jnp.where(green == top, 1, 2))
  def pick(*channels: Array) -> Array:
    return jnp.where(largest == 0, channels[0], jnp.where(largest == 1, channels[1], channels[2]))
  # How far the two other channels are below the largest one.
  first, second = top - pick(blue, red, green), top - pick(green, blue, red)
  around = 255 * jnp.remainder(first - second + 2 * largest * span, 6 * span)
  exact = around // (6 * span)
  under = jnp.asarray(lowered())[2 * largest + (first == span).astype(jnp.int32), exact]
  hue = jnp.where(around == 6 * span * exact, exact - under, exact)
  return jnp.where(top == low, 0, hue), 255 * (top - low) // jnp.maximum(top, 1), top


def to_rgb(hue: Array, saturation: Array, value: Array) -> Array:
  """Pillow's levels [... 3] of hue, saturation and value [...]."""
  sixth, part = 6 * hue // 255, 6 * hue % 255
  rounded = lambda above, below: (2 * above + below) // (2 * below)
  p = rounded(value * (255 - saturation), 255)
  q, t = (rounded(value * (65025 - saturation * part), 65025) for part in (part, 255 - part))
  sixth %= 6

  def take(*by_sixth: Array) -> Array:
    return functools.reduce(lambda rest, i: jnp.where(sixth == i, by_sixth[i], rest), range(5),
                            by_sixth[5])
  return jnp.stack([take(value, q, p, p, t, value), take(t, value, value, q, p, p),
                    take(p, p, t, value, value, q)], axis=-1)


def shift_hue(levels: Array, turns: Array) -> Array:
  """Levels after torchvision's adjust_hue of a PIL image.

  The hue moves by `turns` x 255, with the fraction cut off, modulo 256.
  """
  amount = jnp.abs(turns)
  whole = jnp.floor(256. * amount)
  # floor(255 amount), without rounding
  steps = jnp.where(256. * amount - whole >= amount, whole, whole - 1.)
  steps = (jnp.sign(turns) * jnp.maximum(steps, 0.)).astype(jnp.int32)
  hue, saturation, value = to_hsv(levels)
  return to_rgb((hue + steps) % 256, saturation, value)

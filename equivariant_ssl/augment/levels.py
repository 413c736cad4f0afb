"""Colours in 8 bits, exactly as Pillow computes them: whole levels 0 to 255 in int32, rounded or cut off where it does.

Pillow's code is re-derived here in whole numbers, checked on all 16.7 million colours; what it computes in floating point
(a blend) is computed in the same order, without a fused multiply-add (its x86-64 builds have none).
"""
import functools

import jax
import jax.numpy as jnp
import numpy as np

from equivariant_ssl.types import Array


def of(pixels: Array) -> Array:
  """Levels of pixels in [0, 1], rounded."""
  return jnp.round(pixels * 255.).astype(jnp.int32)


def pixels(levels: Array) -> Array:
  """Their inverse, float32."""
  return levels.astype(jnp.float32) * np.float32(1 / 255)


def grey(levels: Array) -> Array:
  """Pillow's 'L' of levels [... 3] -> [...]."""
  return (19595 * levels[..., 0] + 38470 * levels[..., 1] + 7471 * levels[..., 2] + 2 ** 15) >> 16


def blend(levels: Array, change: Array, factor: Array) -> Array:
  """ImageEnhance's Brightness, Contrast and Color (`change` 0, 1, 2) of levels [h w 3] by `factor`: black, the mean grey
  (rounded) or the grey, plus the factor's share of what it differs by, cut off to whole levels."""
  luma = grey(levels)
  mean = (2 * jnp.sum(luma) + luma.size) // (2 * luma.size)
  other = jnp.where(change == 0, 0, jnp.where(change == 1, mean, luma))[..., None]
  share = jax.lax.optimization_barrier(factor * (levels - other).astype(jnp.float32))  # rounded before it is added
  return jnp.clip(other.astype(jnp.float32) + share, 0., 255.).astype(jnp.int32)


@functools.cache
def lowered() -> np.ndarray:
  """[6 256] int32: by which Pillow's hue is under the exact one where that is a whole level, since it divides in float32
  and cuts off. First axis: twice the largest channel plus whether the first of the two others is the smallest."""
  small, span = np.meshgrid(np.arange(256), np.arange(256))
  small, span = small[(small <= span) & (span > 0)], span[(small <= span) & (span > 0)]
  ratio, one, found = np.float32(small) / np.float32(span), np.float32(1), np.zeros((6, 256), np.int32)
  for largest in range(3):
    for first in range(2):
      a, b = ((one, ratio) if first else (ratio, one))
      hue = a - b if largest == 0 else np.float32(2. * largest + np.float64(a) - np.float64(b))
      theirs = np.int64(255. * np.float64(np.float32(np.fmod(np.float64(hue) / 6. + 1., 1.))))
      above = 255 * ((np.where(first, span - small, small - span) + 2 * largest * span) % (6 * span))
      whole = above % (6 * span) == 0
      exact = above // (6 * span)
      found[2 * largest + first, exact[whole]] = (exact - theirs)[whole]
  return found


def to_hsv(levels: Array) -> tuple[Array, Array, Array]:
  """Pillow's hue, saturation and value of levels [... 3], each [...]."""
  red, green, blue = (levels[..., i] for i in range(3))
  top, low = jnp.max(levels, axis=-1), jnp.min(levels, axis=-1)
  span = jnp.maximum(top - low, 1)
  largest = jnp.where(red == top, 0, jnp.where(green == top, 1, 2))
  pick = lambda *of: jnp.where(largest == 0, of[0], jnp.where(largest == 1, of[1], of[2]))
  first, second = top - pick(blue, red, green), top - pick(green, blue, red)  # how far the others are under it
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
  take = lambda *of: functools.reduce(lambda rest, i: jnp.where(sixth == i, of[i], rest), range(5), of[5])
  return jnp.stack([take(value, q, p, p, t, value), take(t, value, value, q, p, p), take(p, p, t, value, value, q)], axis=-1)


def shift_hue(levels: Array, turns: Array) -> Array:
  """torchvision's adjust_hue of a PIL image: the hue moves by `turns` x 255, cut off towards 0, modulo 256."""
  amount = jnp.abs(turns)
  whole = jnp.floor(256. * amount)
  steps = jnp.where(256. * amount - whole >= amount, whole, whole - 1.)  # floor(255 amount), without rounding
  steps = (jnp.sign(turns) * jnp.maximum(steps, 0.)).astype(jnp.int32)
  hue, saturation, value = to_hsv(levels)
  return to_rgb((hue + steps) % 256, saturation, value)

"""Views through a linear map, made so that the resampling does not tell the map."""
import jax.numpy as jnp
import numpy as np

from equivariant_ssl.types import Array

UNIT = 2 ** 11  # steps a pixel: positions are exact integers, bitwise the same on any device


def whole(x: Array) -> Array:
  """The nearest whole number of steps, int32."""
  return jnp.round(x * UNIT).astype(jnp.int32)


def inverse(m: Array) -> Array:
  """The inverse of a matrix [2 2]."""
  return jnp.stack([jnp.stack([m[1, 1], -m[0, 1]]), jnp.stack([-m[1, 0], m[0, 0]])]) / (m[0, 0] * m[1, 1] - m[0, 1] * m[1, 0])


def warp(pixels: Array, back: Array, move: Array, width: float, stretch: float) -> Array:
  """The view of [n n C] whose pixel at u from the centre shows what lies at back (u - move): pixels (row, column).

  Each is the mean of the pixels around by the round kernel (1 - d^2 / width^2)^3, d in pixels of the view: the same
  smoothing in all directions and, the kernel being wide, at all positions between pixels; so no angle is told by it.
  stretch: the most by which `back` lengthens anything. What lies outside the image counts for nothing.
  """
  n, _, C = pixels.shape
  steps, reach = whole(back), int(np.ceil(width * stretch))
  at = 2 * jnp.arange(n) - (n - 1)                                          # half pixels from the centre
  u = jnp.stack(jnp.meshgrid(at, at, indexing='ij')) * (UNIT // 2) - whole(move)[:, None, None]
  u = u // 16                                                               # of 128 steps a pixel: the product stays in 31 bits
  p = jnp.stack([steps[i, 0] * u[0] + steps[i, 1] * u[1] for i in range(2)]) // (UNIT // 16) + (n - 1) * (UNIT // 2)
  near = p // UNIT
  taps = np.stack(np.meshgrid(*[np.arange(1 - reach, reach + 1)] * 2, indexing='ij')).reshape(2, -1).astype(np.int32)
  where = near[..., None] + taps[:, None, None]                             # [2 n n taps]
  apart = where * UNIT - p[..., None]
  ahead = whole(inverse(back)) // 2
  d = [(ahead[i, 0] * (apart[0] // 2) + ahead[i, 1] * (apart[1] // 2)) // (UNIT // 4) for i in range(2)]  # UNIT a pixel of the view
  left = jnp.maximum(int((width * UNIT) ** 2) - d[0] * d[0] - d[1] * d[1], 0)
  left = left.astype(jnp.float32) * (1. / (width * UNIT) ** 2)
  inside = ((where >= 0) & (where < n)).all(0)
  weight = jnp.where(inside, left * left * left, 0.)
  where = jnp.clip(where, 0, n - 1)
  seen = pixels.reshape(n * n, C)[where[0] * n + where[1]]
  total = jnp.sum(weight, -1, keepdims=True)
  return jnp.einsum('hwt,hwtc->hwc', weight, seen, precision='highest') * (1. / jnp.maximum(total, 1e-6))


def disc(n: int, radius: float) -> np.ndarray:
  """[n n 1] bool: the pixels whose centres are within `radius` pixels of the middle."""
  at = np.arange(n) - (n - 1) / 2
  return (np.hypot.outer(at, at) <= radius)[..., None]

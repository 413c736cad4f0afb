"""The maximum pool of the ImageNet stem, whose gradient is small on GPUs."""
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from equivariant_ssl.types import Array

SIZE, STRIDE, PADDING = 3, 2, 1
TAPS = [(i, j) for i in range(SIZE) for j in range(SIZE)]  # of a window, in its order


def plain(x: jax.Array) -> jax.Array:
  """`max_pool` with the gradient that XLA derives."""
  padding: Any = ((PADDING, PADDING),) * 2  # flax takes it, though it annotates a str
  return nn.max_pool(x, (SIZE, SIZE), (STRIDE, STRIDE), padding)


def pool_with_places(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The pooled x [B H W C], and the place of the first maximum in each window: int8, 0 to 8."""
  low = jnp.array(-jnp.inf, x.dtype)
  padded = jax.lax.pad(x, low, [(0, 0, 0), (PADDING, PADDING, 0), (PADDING, PADDING, 0), (0, 0, 0)])
  rows, columns = ((n + 2 * PADDING - SIZE) // STRIDE * STRIDE + 1 for n in x.shape[1:3])
  taps = [padded[:, i:i + rows:STRIDE, j:j + columns:STRIDE] for i, j in TAPS]
  best, place = taps[0], jnp.zeros(taps[0].shape, jnp.int8)
  for tap, values in enumerate(taps[1:], 1):
    place = jnp.where(values > best, jnp.int8(tap), place)
    best = jnp.maximum(best, values)
  return best, place


def spread_gradient(place: jax.Array, g: jax.Array, side: tuple[int, int]) -> jax.Array:
  """The gradient [B H W C] of x by that of the pooled x, g; `side` is (H, W).

  Up to four windows share a pixel. Their sum is in float32.
  """
  total = jnp.zeros((g.shape[0], *side, g.shape[3]), jnp.float32)
  for tap, corner in enumerate(TAPS):
    part = jnp.where(place == tap, g, jnp.zeros_like(g)).astype(jnp.float32)
    edges = [(at - PADDING, n - (at - PADDING) - STRIDE * (m - 1) - 1, STRIDE - 1)
             for at, n, m in zip(corner, side, g.shape[1:3], strict=True)]
    total += jax.lax.pad(part, jnp.float32(0), [(0, 0, 0), *edges, (0, 0, 0)])
  return total.astype(g.dtype)


@jax.custom_vjp
def max_pool(x: jax.Array) -> jax.Array:
  """The maxima of windows of 3 x 3 pixels, at stride 2, of x [B H W C]: torchvision's stem.

  The gradient goes to the first maximum of a window. A program for CUDA keeps one byte for each
  window, where XLA's gradient has an int32 for each pixel and twice the traffic of the pixels.
  Only reverse mode is defined.
  """
  return plain(x)


def _forward(x: jax.Array) -> tuple[Array, tuple[Array, Array]]:
  # Each platform uses one of the two that are kept; the other is no part of its program.
  pooled, place = jax.lax.platform_dependent(
      x, cuda=pool_with_places,
      default=lambda x: (y := plain(x), jnp.zeros(y.shape, jnp.int8)))
  return pooled, (x, place)


def _backward(saved: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[Array]:
  return (jax.lax.platform_dependent(
      *saved, g, cuda=lambda x, place, g: spread_gradient(place, g, x.shape[1:3]),
      default=lambda x, place, g: jax.vjp(plain, x)[1](g)[0]),)


max_pool.defvjp(_forward, _backward)

"""BatchNorm as torch computes it, over all axes of the global batch but the last."""
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from equivariant_ssl.types import Array

EPSILON = 1e-5
MOMENTUM = .9   # the share of the running statistics that stays; torch's `momentum` is 1 - this


def _scaled(x: Array, mean: Array, rstd: Array, scale: Array, bias: Array) -> Array:
  """(x - mean) rstd scale + bias, computed in float32, in the dtype of x."""
  wide = jnp.expand_dims
  axes = tuple(range(x.ndim - 1))
  y = (x.astype(jnp.float32) - wide(mean, axes)) * wide(rstd * scale, axes) + wide(bias, axes)
  return y.astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def normalize(x: Array, scale: Array, bias: Array, exact: bool) -> tuple[Array, Array, Array]:
  """(normalized x, mean [C], biased variance [C]) of x [... C], by its own statistics.

  The computation is in float32. The gradient is written out: it keeps x alone for the backward
  pass, where autodiff would keep a centered float32 copy. No gradient flows through the returned
  statistics.

  exact: compute the variance in two passes, for nearly constant inputs.
  """
  return _normalize_forward(x, scale, bias, exact)[0]


def _normalize_forward(x, scale, bias, exact):
  wide, axes = x.astype(jnp.float32), tuple(range(x.ndim - 1))
  mean = wide.mean(axes)
  if exact:
    var = jnp.square(wide - jnp.expand_dims(mean, axes)).mean(axes)
  else:
    var = jnp.maximum(jnp.square(wide).mean(axes) - jnp.square(mean), 0.)
  rstd = jax.lax.rsqrt(var + EPSILON)
  return (_scaled(x, mean, rstd, scale, bias), mean, var), (x, mean, rstd, scale)


def _normalize_backward(exact, saved, cotangents):
  x, mean, rstd, scale = saved
  axes = tuple(range(x.ndim - 1))
  n = float(x.size // x.shape[-1])  # a float: beyond int32 at a batch of 65,536
  dy = cotangents[0].astype(jnp.float32)
  unit = _scaled(x.astype(jnp.float32), mean, rstd, jnp.ones_like(mean),
                 jnp.zeros_like(mean))
  d_bias, d_scale = dy.sum(axes), (dy * unit).sum(axes)
  per_channel = functools.partial(jnp.expand_dims, axis=axes)
  dx = per_channel(rstd * scale) * (dy - per_channel(d_bias / n) - unit * per_channel(d_scale / n))
  return dx.astype(x.dtype), d_scale, d_bias


normalize.defvjp(_normalize_forward, _normalize_backward)


class BatchNorm(nn.Module):
  """BatchNorm: x [... C] -> the same shape and dtype.

  The statistics are over all leading axes together, and always float32. In training x is normalized
  by its own statistics, and the running statistics move (with the unbiased variance, as in torch).
  Otherwise the running statistics are used.

  exact: see `normalize`.
  """
  use_scale: bool = True
  use_bias: bool = True
  exact: bool = False
  scale_init: nn.initializers.Initializer = nn.initializers.ones

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    C = x.shape[-1]
    running_mean = self.variable('batch_stats', 'mean', jnp.zeros, (C,))
    running_var = self.variable('batch_stats', 'var', jnp.ones, (C,))
    scale = self.param('scale', self.scale_init, (C,)) if self.use_scale else jnp.ones(C)
    bias = self.param('bias', nn.initializers.zeros, (C,)) if self.use_bias else jnp.zeros(C)
    if not train:
      rstd = jax.lax.rsqrt(running_var.value + EPSILON)
      return _scaled(x, running_mean.value, rstd, scale, bias)
    normalized: Any = normalize(x, scale, bias, self.exact)
    y, mean, var = normalized
    if not self.is_initializing():
      n = x.size // C
      unbiased = var * (n / max(n - 1, 1))
      for running, new in ((running_mean, mean), (running_var, unbiased)):
        running.value = MOMENTUM * running.value + (1 - MOMENTUM) * new
    return y

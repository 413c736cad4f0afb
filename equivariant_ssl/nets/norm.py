"""BatchNorm as torch computes it, over the images of the global batch or of each group of them."""
import contextlib
import contextvars
import functools
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from equivariant_ssl.types import Array

EPSILON = 1e-5
MOMENTUM = .9   # the share of the running statistics that stays; torch's `momentum` is 1 - this


STATISTICS_SCOPE = 'batch_statistics'  # the name, in a compiled program, of what computes them
_image_groups: contextvars.ContextVar[int] = contextvars.ContextVar('image_groups', default=1)


@contextlib.contextmanager
def image_groups(groups: int) -> Iterator[None]:
  """A context for tracing: each of `groups` equal groups of the images has statistics of its own.

  A group is consecutive images of the batch, with all their views of one pass, as the devices of a
  mesh hold them (`sharding.batch_sharding`). It changes BatchNorm in training alone. The default is
  one group, the whole batch.
  """
  token = _image_groups.set(groups)
  try:
    yield
  finally:
    _image_groups.reset(token)


def _scaled(x: Array, mean: Array, rstd: Array, scale: Array, bias: Array) -> Array:
  """(x - mean) rstd scale + bias, computed in float32, in the dtype of x.

  The four are [C] for x [... C], or [G C] for x [G ... C].
  """
  wide = functools.partial(jnp.expand_dims, axis=_reduced_axes(x, mean))
  y = (x.astype(jnp.float32) - wide(mean)) * wide(rstd * scale) + wide(bias)
  return y.astype(x.dtype)


def _reduced_axes(x: Array, mean: Array) -> tuple[int, ...]:
  """The axes of x over which the statistics `mean` [C], or [G C] of x [G ... C], were taken."""
  return tuple(range(mean.ndim - 1, x.ndim - 1))


def _split(x: Array, groups: int) -> Array:
  """x [N ... C] as [G N/G ... C]; as it is where there is one group."""
  return x if groups == 1 else x.reshape(groups, -1, *x.shape[1:])


def plain_sums(a: Array, b: Array, groups: int) -> tuple[Array, Array]:
  """The sums of `a` and of `b`, of one shape [N ... C]: each [C], or [G C] of [G ... C]."""
  axes = tuple(range(int(groups > 1), a.ndim - 1))
  return a.sum(axes), b.sum(axes)


def sums_in_pairs(a: Array, b: Array, groups: int) -> tuple[Array, Array]:
  """`plain_sums` in one reduction, of pairs.

  A GPU takes two kernels for a long sum and three for two such sums, which share the first alone;
  for a sum of pairs it takes two. The devices of a mesh each sum their part, and then add those.
  """
  C, devices = a.shape[-1], jax.sharding.get_abstract_mesh().size or 1
  parts = groups if devices % groups or a.size // C % devices else devices
  a, b = (x.reshape(parts, -1, C) for x in (a, b))
  zero = jnp.zeros((), a.dtype)
  pairs = jax.lax.reduce((a, b), (zero, zero), lambda x, y: (x[0] + y[0], x[1] + y[1]), (1,))
  first, second = jnp.stack(pairs).reshape(2, groups, -1, C).sum(2)
  return (first[0], second[0]) if groups == 1 else (first, second)


def _sums(a: Array, b: Array, groups: int) -> tuple[Array, Array]:
  return jax.lax.platform_dependent(
      a, b, cuda=functools.partial(sums_in_pairs, groups=groups),
      default=functools.partial(plain_sums, groups=groups))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def normalize(x: Array, scale: Array, bias: Array, exact: bool, groups: int = 1
              ) -> tuple[Array, Array, Array]:
  """(normalized x, mean, biased variance) of x [N ... C], by its own statistics.

  The statistics are [C], over all leading axes together; or [G C] with `groups` G > 1, each over
  N / G consecutive rows. The computation is in float32. The gradient is written out: it keeps x
  alone for the backward pass, where autodiff would keep a centered float32 copy. No gradient flows
  through the returned statistics.

  exact: compute the variance in two passes, for nearly constant inputs.
  """
  return _normalize_forward(x, scale, bias, exact, groups)[0]


@jax.named_scope(STATISTICS_SCOPE)
def _normalize_forward(x, scale, bias, exact, groups):
  rows = _split(x, groups)
  wide, axes = rows.astype(jnp.float32), tuple(range(int(groups > 1), rows.ndim - 1))
  if exact:
    mean = wide.mean(axes)
    var = jnp.square(wide - jnp.expand_dims(mean, axes)).mean(axes)
  else:
    total, squares = _sums(wide, jnp.square(wide), groups)
    n = float(x.size // total.size)
    mean = total / n
    var = jnp.maximum(squares / n - jnp.square(mean), 0.)
  rstd = jax.lax.rsqrt(var + EPSILON)
  scale, bias = (jnp.broadcast_to(a, mean.shape) for a in (scale, bias))
  y = _scaled(rows, mean, rstd, scale, bias).reshape(x.shape)
  return (y, mean, var), (x, mean, rstd, scale)


def _normalize_backward(exact, groups, saved, cotangents):
  x, mean, rstd, scale = saved
  dy = _split(cotangents[0], groups).astype(jnp.float32)
  rows = _split(x, groups)
  axes = _reduced_axes(rows, mean)
  n = float(x.size // mean.size)  # a float: beyond int32 at a batch of 65,536
  unit = _scaled(rows.astype(jnp.float32), mean, rstd, jnp.ones_like(mean), jnp.zeros_like(mean))
  with jax.named_scope(STATISTICS_SCOPE):
    d_bias, d_scale = _sums(dy, dy * unit, groups)
  per_channel = functools.partial(jnp.expand_dims, axis=axes)

  def center_by_means(dy: Array, unit: Array, d_bias: Array, d_scale: Array) -> Array:
    return dy - per_channel(d_bias / n) - unit * per_channel(d_scale / n)

  # On a GPU the two quotients d / n would be a kernel; to divide every number costs none.
  def center_by_sums(dy: Array, unit: Array, d_bias: Array, d_scale: Array) -> Array:
    return dy - (per_channel(d_bias) + unit * per_channel(d_scale)) / n
  centered = jax.lax.platform_dependent(dy, unit, d_bias, d_scale, cuda=center_by_sums,
                                        default=center_by_means)
  dx = per_channel(rstd * scale) * centered
  if groups > 1:
    d_scale, d_bias = d_scale.sum(0), d_bias.sum(0)
  return dx.reshape(x.shape).astype(x.dtype), d_scale, d_bias


normalize.defvjp(_normalize_forward, _normalize_backward)


class BatchNorm(nn.Module):
  """BatchNorm: x [... C] -> the same shape and dtype.

  The statistics are over all leading axes together, and always float32. In training x is normalized
  by its own statistics, and the running statistics move (with the unbiased variance, as in torch).
  Otherwise the running statistics are used.

  Within `image_groups(G)` each group of images is normalized by its own statistics, as where each
  GPU has its own. The running statistics then move by the mean over the groups. (torch's
  DistributedDataParallel keeps those of process 0, which saw a G-th of the images.)

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
    groups = _image_groups.get()
    normalized: Any = normalize(x, scale, bias, self.exact, groups)
    y, mean, var = normalized
    if not self.is_initializing():
      n = x.size // mean.size
      unbiased = var * (n / max(n - 1, 1))
      for running, new in ((running_mean, mean), (running_var, unbiased)):
        new = new if groups == 1 else new.mean(0)
        running.value = MOMENTUM * running.value + (1 - MOMENTUM) * new
    return y

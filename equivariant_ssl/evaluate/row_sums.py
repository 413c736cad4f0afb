"""Sums over rows of features that lie split over the devices.

They are computed chunk by chunk where the rows lie, so that no second copy of them is made.
"""
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from equivariant_ssl.parallel import sharding
from equivariant_ssl.types import Array

CHUNK = 1024  # rows at once on a device: 8 MiB of features of 2,048 dimensions


class FeatureRows(NamedTuple):
  """Features on the devices, [N D] split over them, and what is done to each row when it is read.

  x: float32 [N' D], N' >= N a multiple of the devices. y: int32 [N']. weight: float32 [N'], 0 for a
  row that does not count. mean, scale: float32 [D]; a row is read as (x - mean) x scale.
  """
  x: Array
  y: Array
  weight: Array
  mean: Array
  scale: Array


def make_rows(x: np.ndarray, y: np.ndarray, mesh: Mesh) -> FeatureRows:
  """Return features [N D] float32 and labels [N] as FeatureRows that are read as they are."""
  D = x.shape[1]
  as_they_are = sharding.place((np.zeros(D, np.float32), np.ones(D, np.float32)),
                               sharding.replicated_sharding(mesh))
  return FeatureRows(sharding.place_rows(x, mesh), sharding.place_rows(y.astype(np.int32), mesh),
              sharding.place_rows(np.ones(len(x), np.float32), mesh), *as_they_are)


def sum_over_rows(mesh: Mesh, read: Callable, zero: Callable) -> Callable:
  """Return the function (shared, FeatureRows) -> the sum of `read(shared, chunk)` over all chunks
  of rows and all devices.

  read: returns a pytree of sums, and gives a row of weight 0 no part in them. zero: (shared) -> the
  same pytree of zeros.
  """
  split, copied = PartitionSpec('data'), PartitionSpec()

  def on_one_device(shared: Any, rows: FeatureRows) -> Any:
    n = rows.x.shape[0]
    C = min(CHUNK, n)

    def add(total: Any, first: Array) -> tuple[Any, None]:
      start = jnp.minimum(first, n - C)  # the last chunk reads some rows a second time, for nothing
      x, y, w = (jax.lax.dynamic_slice_in_dim(a, start, C) for a in rows[:3])
      w = jnp.where(jnp.arange(C) + start >= first, w, 0.)
      x = (x - rows.mean[None, :]) * rows.scale[None, :]
      return jax.tree.map(jnp.add, total, read(shared, x, y, w)), None
    sums, _ = jax.lax.scan(add, zero(shared), jnp.arange(-(-n // C)) * C)
    return jax.lax.psum(sums, 'data')
  specs: Any = (split, split, split, copied, copied)  # of the fields of FeatureRows
  return jax.shard_map(on_one_device, mesh=mesh, in_specs=(copied, FeatureRows(*specs)),
                       out_specs=copied, check_vma=False)


def product(a: Array, b: Array) -> Array:
  """Return the matrix product in full float32, which a GPU does not take by itself."""
  return jnp.matmul(a, b, precision='highest')


def loss_and_gradient(shared: tuple[Array, Array], x: Array, y: Array, w: Array) -> tuple:
  """Return the weighted sum of cross-entropies of a chunk and its gradient: for the weights [D K]
  and the bias [K]."""
  weights, bias = shared
  logits = product(x, weights) + bias[None, :]
  log_p = jax.nn.log_softmax(logits)
  loss = -jnp.sum(w * jnp.take_along_axis(log_p, y[:, None], 1)[:, 0])
  error = w[:, None] * (jnp.exp(log_p) - jax.nn.one_hot(y, bias.shape[0], dtype=x.dtype))
  return loss, product(x.T, error), error.sum(0)


def no_gradient(shared: tuple[Array, Array]) -> tuple:
  """Return zeros in the form of `loss_and_gradient`."""
  return jnp.zeros(()), *jax.tree.map(jnp.zeros_like, shared)


def total(shared: Array, x: Array, y: Array, w: Array) -> Array:
  """Return the weighted sum of the rows of a chunk: [D]."""
  return product(w[None], x)[0]


def scatter(shared: Array, x: Array, y: Array, w: Array) -> Array:
  """Return the weighted sum of x x^T over the rows of a chunk: [D D]."""
  return product(x.T, w[:, None] * x)


def judge(shared: tuple[Array, Array], x: Array, y: Array, w: Array) -> tuple:
  """Return, of a chunk: the weighted number of right predictions, that of all, and the weighted sum
  of 1 - the sum of p^2, which is 0 where each prediction is certain."""
  weights, bias = shared
  logits = product(x, weights) + bias[None, :]
  doubt = 1. - jnp.sum(jax.nn.softmax(logits) ** 2, axis=1)
  return jnp.sum(jnp.where(logits.argmax(1) == y, w, 0.)), jnp.sum(w), jnp.sum(w * doubt)

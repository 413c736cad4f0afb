"""Losses as plain functions of arrays.

They compute in float32 with matrix products at precision 'highest', whatever dtype the network
computes in.
"""
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from equivariant_ssl.types import Array

# (numbers of rows, numbers of columns) -> whether the pairs of them are left out of a sum.
LeftOut = Callable[[Array, Array], Array]

BLOCK = 2 ** 24  # cosines that a device holds at once: 64 MiB


def unit(x: Array, eps: float = 1e-12) -> Array:
  """The vectors x / |x| over the last axis, float32.

  A vector shorter than `eps` is divided by `eps`, so that the gradient at 0 is finite.
  """
  x = x.astype(jnp.float32)
  return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, -1, keepdims=True), eps * eps))


def cosine(a: Array, b: Array) -> Array:
  """The cosine similarity over the last axis, [...] float32."""
  return jnp.sum(unit(a) * unit(b), -1)


def two_views(name: str, z: Array) -> tuple[Array, Array]:
  """The first and the second view of z [B 2 E], each [B E] float32.

  Raises ValueError where the objective `name` receives another number of views.
  """
  if z.shape[1] != 2:
    raise ValueError(f'{name} compares 2 views, but it received {z.shape[1]}.')
  z = z.astype(jnp.float32)
  return z[:, 0], z[:, 1]


def _logits(rows: Array, columns: Array, temperature: float, out: LeftOut | None,
            excluded: float = -jnp.inf) -> Array:
  """[R N]: the products of `rows` [R E] and `columns` [N E], divided by the temperature.

  The entries that `out` names are `excluded`.
  """
  logits = jnp.einsum('ie,ke->ik', rows, columns, precision='highest',
                      preferred_element_type=jnp.float32) / temperature
  if out is None:
    return logits
  # Iotas of the whole square: numbers of rows as an array would be gathered from all devices.
  row, column = (jax.lax.broadcasted_iota(jnp.int32, logits.shape, axis) for axis in (0, 1))
  return jnp.where(out(row, column), excluded, logits)


def _in_blocks(rows: Array, columns: Array, temperature: float, out: LeftOut | None, count: int,
               first: Array | int) -> Array:
  """`log_partition` of `rows`, computed over `count` blocks of columns, one after the other.

  `first` is the number of the first row in the whole batch. No block is kept for the backward pass.
  """
  N, E = columns.shape
  width = -(-N // count)
  columns = jnp.pad(columns, ((0, count * width - N), (0, 0))).reshape(count, width, E)

  @jax.checkpoint
  def block(block: tuple[Array, Array]) -> Array:
    start, columns = block

    def left_out(row: Array, column: Array) -> Array:
      column = column + start
      return (column >= N) if out is None else (column >= N) | out(row + first, column)
    # Not -inf: a block in which all is left out would have a gradient that is not a number.
    logits = _logits(rows, columns, temperature, left_out, -1e30)
    return jax.nn.logsumexp(logits, axis=1)

  starts = width * jnp.arange(count, dtype=jnp.int32)
  return jax.nn.logsumexp(jax.lax.map(block, (starts, columns)), axis=0)


def log_partition(rows: Array, columns: Array, temperature: float, out: LeftOut | None = None
                  ) -> Array:
  """log sum_k exp(rows_i . columns_k / T) for rows [R E] and columns [N E]: [R].

  The pairs that `out` names are left out of the sum. Where a device's part of the R x N products
  has more than BLOCK numbers, the products are never held at once: each device of the mesh (see
  `sharding.use_mesh`) keeps its rows, gathers the columns, and computes one block of columns after
  the other, in the forward pass and in the backward pass.
  """
  mesh, (R, N) = jax.sharding.get_abstract_mesh(), (len(rows), len(columns))
  devices = mesh.size if not mesh.empty and R % mesh.size == N % mesh.size == 0 else 1
  count = -(-R * N // (devices * BLOCK))
  if count == 1:
    return jax.nn.logsumexp(_logits(rows, columns, temperature, out), axis=1)
  if devices == 1:
    return _in_blocks(rows, columns, temperature, out, count, 0)

  def on_device(rows: Array, columns: Array) -> Array:
    columns = jax.lax.all_gather(columns, 'data', tiled=True)
    first = jax.lax.axis_index('data') * len(rows)
    return _in_blocks(rows, columns, temperature, out, count, first)
  return jax.shard_map(on_device, in_specs=PartitionSpec('data'),
                       out_specs=PartitionSpec('data'))(rows, columns)


def nt_xent(a: Array, b: Array, temperature: float, siblings: int = 1) -> Array:
  """NT-Xent (Chen et al. 2020, eq. 1) of M aligned rows of `a` and `b` [M E]: a scalar.

  It is the mean over 2M anchors of

    -log( exp(s_ij / T) / sum_{k != i} exp(s_ik / T) ),   s = cosine,  j = the partner of i.

  All other rows of `a` and `b` are negatives, 2M - 2 of them. But `siblings` consecutive pairs are
  views of one image, and the rows of one of these pairs are no negatives of another's. A large M is
  computed in blocks; see `log_partition`.
  """
  M, E = a.shape
  # Each row beside its partner: a sharded batch stays where it is, which [a; b] would not.
  z = unit(jnp.stack([a, b], axis=1)).reshape(2 * M, E)

  def out(row: Array, column: Array) -> Array:
    same = row == column
    if siblings > 1:
      one_image = row // (2 * siblings) == column // (2 * siblings)
      same |= one_image & (row // 2 != column // 2)
    return same
  partition = log_partition(z, z, temperature, out)
  positive = jnp.sum(z.reshape(M, 2, E).prod(1), -1) / temperature
  return jnp.mean(partition) - jnp.mean(positive)


def info_nce(a: Array, b: Array, temperature: float) -> Array:
  """InfoNCE of the rows of `a` among the rows of `b` [M E]: a scalar.

  It is the mean over i of -log( exp(s_ii / T) / sum_k exp(s_ik / T) ),  s = cosine, with M - 1
  negatives each. A large M is computed in blocks; see `log_partition`.
  """
  a, b = unit(a), unit(b)
  return jnp.mean(log_partition(a, b, temperature)) - jnp.mean(jnp.sum(a * b, -1)) / temperature


def center(z: Array) -> Array:
  """z [N E] minus its mean over N, float32."""
  z = z.astype(jnp.float32)
  return z - z.mean(0, keepdims=True)


def variance(z: Array) -> Array:
  """VICReg's variance hinge (Bardes et al. 2022) of z [N E]: a scalar.

  It is the mean over dimensions of relu(1 - sqrt(var + 1e-4)), with the unbiased variance.
  """
  z = center(z)
  deviation = jnp.sqrt(jnp.sum(z * z, 0) / (z.shape[0] - 1) + 1e-4)
  return jnp.mean(jax.nn.relu(1. - deviation))


def off_diagonal(c: Array) -> Array:
  """The sum of the squares of c [E E] off its diagonal.

  The diagonal is masked: a difference of two sums would cancel where c is near the identity.
  """
  return jnp.sum(jnp.square(jnp.where(jnp.eye(c.shape[0], dtype=bool), 0., c)))


def covariance(z: Array) -> Array:
  """VICReg's covariance term of z [N E]: the squared off-diagonal covariances, summed, over E."""
  N, E = z.shape
  z = center(z)
  return off_diagonal(jnp.einsum('nd,ne->de', z, z, precision='highest') / (N - 1)) / E


def cross_correlation(a: Array, b: Array) -> Array:
  """[E E]: the correlations, over N, of the dimensions of a [N E] with those of b [N E].

  Each dimension is standardized as by a BatchNorm without affine (biased variance, eps 1e-5).
  """
  def standardize(z: Array) -> Array:
    z = center(z)
    return z * jax.lax.rsqrt(jnp.mean(z * z, 0, keepdims=True) + 1e-5)
  return jnp.einsum('nd,ne->de', standardize(a), standardize(b), precision='highest') / a.shape[0]


def spread(z: Array) -> Array:
  """The spread of embeddings z [N E] (Chen & He 2021): a scalar.

  It is the standard deviation of each dimension of the unit embeddings, averaged, times sqrt(E). It
  is 0 where all embeddings are one point, and near 1 where they fill the sphere.
  """
  return jnp.mean(jnp.std(unit(z), axis=0)) * jnp.sqrt(jnp.float32(z.shape[-1]))

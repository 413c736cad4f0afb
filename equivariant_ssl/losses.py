"""Losses as plain functions of arrays, in float32 at precision 'highest' whatever the network computed in."""
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from equivariant_ssl.types import Array

Out = Callable[[Array, Array], Array]  # (numbers of rows, numbers of columns) -> whether those pairs are left out

BLOCK = 2 ** 24  # cosines that a device holds at once: 64 MiB


def unit(x: Array, eps: float = 1e-12) -> Array:
  """x / |x| over the last axis, float32; at |x| < eps divided by eps instead, so the gradient at 0 is finite."""
  x = x.astype(jnp.float32)
  return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, -1, keepdims=True), eps * eps))


def cosine(a: Array, b: Array) -> Array:
  """Cosine similarity over the last axis, [...] float32."""
  return jnp.sum(unit(a) * unit(b), -1)


def two(name: str, z: Array) -> tuple[Array, Array]:
  """The two views of z [B 2 E], float32; ValueError where `name` is given another number of views."""
  if z.shape[1] != 2:
    raise ValueError(f'{name} compares 2 views, got {z.shape[1]}')
  z = z.astype(jnp.float32)
  return z[:, 0], z[:, 1]


def _logits(rows: Array, columns: Array, temperature: float, out: Out | None, nothing: float = -jnp.inf) -> Array:
  """[R N]: the products of `rows` [R E] and `columns` [N E] over the temperature, `nothing` where `out`."""
  logits = jnp.einsum('ie,ke->ik', rows, columns, precision='highest', preferred_element_type=jnp.float32) / temperature
  if out is None:
    return logits
  # Iotas of the whole square, not rows compared with rows: those would be gathered from all devices.
  row, column = (jax.lax.broadcasted_iota(jnp.int32, logits.shape, axis) for axis in (0, 1))
  return jnp.where(out(row, column), nothing, logits)


def _in_blocks(rows: Array, columns: Array, temperature: float, out: Out | None, count: int, first: Array | int) -> Array:
  """`log_partition` of `rows`, number `first` and on, over `count` blocks of columns one after the other, of which none
  is kept for the way back."""
  N, E = columns.shape
  width = -(-N // count)
  columns = jnp.pad(columns, ((0, count * width - N), (0, 0))).reshape(count, width, E)

  @jax.checkpoint
  def block(block: tuple[Array, Array]) -> Array:
    start, columns = block
    left_out = lambda row, column: (column >= N) if out is None else (column >= N) | out(row + first, column)
    # Not -inf: a block may have nothing to sum, and then no gradient either.
    logits = _logits(rows, columns, temperature, lambda row, column: left_out(row, column + start), -1e30)
    return jax.nn.logsumexp(logits, axis=1)

  starts = width * jnp.arange(count, dtype=jnp.int32)
  return jax.nn.logsumexp(jax.lax.map(block, (starts, columns)), axis=0)


def log_partition(rows: Array, columns: Array, temperature: float, out: Out | None = None) -> Array:
  """log sum_k exp(rows_i . columns_k / T) of rows [R E] over columns [N E], those that are `out` left out: [R].

  Where a device's part of the R x N products is more than BLOCK they are never whole: each device of the mesh that is
  set (`shard.within`) keeps its rows, gathers the columns, and takes them block by block, there and back.
  """
  mesh, (R, N) = jax.sharding.get_abstract_mesh(), (len(rows), len(columns))
  devices = mesh.size if not mesh.empty and R % mesh.size == N % mesh.size == 0 else 1
  count = -(-R * N // (devices * BLOCK))
  if count == 1:
    return jax.nn.logsumexp(_logits(rows, columns, temperature, out), axis=1)
  if devices == 1:
    return _in_blocks(rows, columns, temperature, out, count, 0)

  def own(rows: Array, columns: Array) -> Array:
    columns = jax.lax.all_gather(columns, 'data', tiled=True)
    return _in_blocks(rows, columns, temperature, out, count, jax.lax.axis_index('data') * len(rows))
  return jax.shard_map(own, in_specs=PartitionSpec('data'), out_specs=PartitionSpec('data'))(rows, columns)


def nt_xent(a: Array, b: Array, temperature: float, siblings: int = 1) -> Array:
  """NT-Xent (Chen et al. 2020, eq. 1) of M aligned rows of `a` and `b` [M E]: a scalar, the mean over 2M anchors of

    -log( exp(s_ij / T) / sum_{k != i} exp(s_ik / T) ),   s = cosine,  j = the partner of i,

  with every other row of either as a negative (2M - 2 of them). Of each run of `siblings` consecutive pairs (the
  views of one image) a pair's rows are no negatives of another's. In blocks where M is large: see `log_partition`.
  """
  M, E = a.shape
  # Pairs lie side by side: a sharded batch stays where it is, which [a; b] would not.
  z = unit(jnp.stack([a, b], axis=1)).reshape(2 * M, E)

  def out(row: Array, column: Array) -> Array:
    same = row == column
    if siblings > 1:
      same |= (row // (2 * siblings) == column // (2 * siblings)) & (row // 2 != column // 2)
    return same
  partition = log_partition(z, z, temperature, out)
  positive = jnp.sum(z.reshape(M, 2, E).prod(1), -1) / temperature
  return jnp.mean(partition) - jnp.mean(positive)


def info_nce(a: Array, b: Array, temperature: float) -> Array:
  """InfoNCE of rows `a` among the rows of `b` [M E], B - 1 negatives: the mean over i of
  -log( exp(s_ii / T) / sum_k exp(s_ik / T) ),  s = cosine. In blocks where M is large: see `log_partition`."""
  a, b = unit(a), unit(b)
  return jnp.mean(log_partition(a, b, temperature)) - jnp.mean(jnp.sum(a * b, -1)) / temperature


def centred(z: Array) -> Array:
  """z [N E] less its mean over N, float32."""
  z = z.astype(jnp.float32)
  return z - z.mean(0, keepdims=True)


def variance(z: Array) -> Array:
  """VICReg's hinge (Bardes et al. 2022) of z [N E]: the mean over dimensions of relu(1 - sqrt(var + 1e-4)), var unbiased."""
  z = centred(z)
  return jnp.mean(jax.nn.relu(1. - jnp.sqrt(jnp.sum(z * z, 0) / (z.shape[0] - 1) + 1e-4)))


def off_diagonal(c: Array) -> Array:
  """The sum of the squares of c [E E] off its diagonal: masked, as a difference of sums would cancel near the identity."""
  return jnp.sum(jnp.square(jnp.where(jnp.eye(c.shape[0], dtype=bool), 0., c)))


def covariance(z: Array) -> Array:
  """VICReg's decorrelation of z [N E]: the sum of the squared off-diagonal covariances, over E."""
  N, E = z.shape
  z = centred(z)
  return off_diagonal(jnp.einsum('nd,ne->de', z, z, precision='highest') / (N - 1)) / E


def cross_correlation(a: Array, b: Array) -> Array:
  """[E E]: the correlations over N of the dimensions of a with those of b [N E], each standardised as a BatchNorm
  without affine does (biased variance, eps 1e-5)."""
  def standard(z: Array) -> Array:
    z = centred(z)
    return z * jax.lax.rsqrt(jnp.mean(z * z, 0, keepdims=True) + 1e-5)
  return jnp.einsum('nd,ne->de', standard(a), standard(b), precision='highest') / a.shape[0]


def spread(z: Array) -> Array:
  """The per-dimension standard deviation of unit embeddings [N E], times sqrt(E), averaged: 0 when they have
  collapsed to a point, near 1 when they fill the sphere (Chen & He 2021)."""
  return jnp.mean(jnp.std(unit(z), axis=0)) * jnp.sqrt(jnp.float32(z.shape[-1]))

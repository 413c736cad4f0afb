"""Losses as plain functions of arrays, in float32 at precision 'highest' whatever the network computed in."""
import jax
import jax.numpy as jnp

from equivariant_ssl.types import Array


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


def nt_xent(a: Array, b: Array, temperature: float, siblings: int = 1) -> Array:
  """NT-Xent (Chen et al. 2020, eq. 1) of M aligned rows of `a` and `b` [M E]: a scalar, the mean over 2M anchors of

    -log( exp(s_ij / T) / sum_{k != i} exp(s_ik / T) ),   s = cosine,  j = the partner of i,

  with every other row of either as a negative (2M - 2 of them). Of each run of `siblings` consecutive pairs (the
  views of one image) a pair's rows are no negatives of another's.
  """
  M, E = a.shape
  # Pairs lie side by side: a sharded batch stays where it is, which [a; b] would not.
  z = unit(jnp.stack([a, b], axis=1)).reshape(2 * M, E)
  logits = jnp.einsum('ie,ke->ik', z, z, precision='highest', preferred_element_type=jnp.float32) / temperature
  # Iotas of the whole square, not rows compared with rows: those would be gathered from all devices.
  row, column = (jax.lax.broadcasted_iota(jnp.int32, logits.shape, axis) for axis in (0, 1))
  out = row == column
  if siblings > 1:
    out |= (row // (2 * siblings) == column // (2 * siblings)) & (row // 2 != column // 2)
  positive = jnp.sum(z.reshape(M, 2, E).prod(1), -1) / temperature
  return jnp.mean(jax.nn.logsumexp(jnp.where(out, -jnp.inf, logits), axis=1)) - jnp.mean(positive)


def info_nce(a: Array, b: Array, temperature: float) -> Array:
  """InfoNCE of rows `a` among the rows of `b` [M E], B - 1 negatives: the mean over i of
  -log( exp(s_ii / T) / sum_k exp(s_ik / T) ),  s = cosine."""
  a, b = unit(a), unit(b)
  logits = jnp.einsum('ie,ke->ik', a, b, precision='highest', preferred_element_type=jnp.float32) / temperature
  return jnp.mean(jax.nn.logsumexp(logits, axis=1)) - jnp.mean(jnp.sum(a * b, -1)) / temperature


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

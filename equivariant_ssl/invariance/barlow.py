"""Barlow Twins (Zbontar et al. 2021): the cross-correlation of the two views' embeddings is the identity."""
import jax.numpy as jnp

from equivariant_ssl.losses import cross_correlation, off_diagonal, two
from equivariant_ssl.types import Array, Embeddings, Invariance


def make(redundancy: float = .0051, scale: float = 1.) -> Invariance:
  """scale x [ sum_i (c_ii - 1)^2 + redundancy x sum_{i != j} c_ij^2 ],  c = BN(z1)^T BN(z2) / B over the global batch.

  Projector 8192-8192-8192, its last layer without norm. Published with LARS, biases and BatchNorm at their own rate
  (optimizer.bias_scale = .0048 / .2). scale: .1 in solo-learn's recipes. The official code on W GPUs has 1 / W of this
  gradient (its all-reduce of c has no backward, and then DDP averages): scale = 1 / W follows it. LARS takes that out of
  what adapts, but for the decay's share; biases and BatchNorm feel it.
  """
  def loss(embeddings: Embeddings) -> Array:
    c = cross_correlation(*two('barlow', embeddings.projected))
    return scale * (jnp.sum(jnp.square(jnp.diagonal(c) - 1.)) + redundancy * off_diagonal(c))

  return Invariance(loss, projector={'hidden': (8192, 8192), 'out': 8192})

"""Barlow Twins (Zbontar et al. 2021): the views' embeddings have the identity as correlation."""
import jax.numpy as jnp

from equivariant_ssl.losses import cross_correlation, off_diagonal, two_views
from equivariant_ssl.types import Array, Embeddings, Invariance


def make(redundancy: float = .0051, scale: float = 1.) -> Invariance:
  """Barlow Twins: the cross-correlation c of the two views' embeddings becomes the identity.

    scale x [ sum_i (c_ii - 1)^2 + redundancy x sum_{i != j} c_ij^2 ],   c = BN(z1)^T BN(z2) / B

  over the global batch. The projector is 8192-8192-8192, and its last layer has no norm. It was
  published with LARS, where biases and BatchNorm have a rate of their own (optimizer.bias_scale =
  .0048 / .2).

  scale: solo-learn's recipes have .1. The official code on W GPUs has 1 / W of this gradient: its
         all-reduce of c has no backward pass, and then DDP averages; scale = 1 / W follows it. LARS
         cancels the factor for the weights that adapt, except for the share of their decay. Biases
         and BatchNorm feel it.
  """
  def loss(embeddings: Embeddings) -> Array:
    c = cross_correlation(*two_views('barlow', embeddings.projected))
    on_diagonal = jnp.sum(jnp.square(jnp.diagonal(c) - 1.))
    return scale * (on_diagonal + redundancy * off_diagonal(c))

  return Invariance(loss, projector={'hidden': (8192, 8192), 'out': 8192})

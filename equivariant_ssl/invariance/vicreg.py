"""VICReg (Bardes et al. 2022): views agree, dimensions vary, dimensions are uncorrelated."""
import jax.numpy as jnp

from equivariant_ssl.losses import covariance, two_views, variance
from equivariant_ssl.types import Array, Embeddings, Invariance


def make(similarity: float = 25., std: float = 25., cov: float = 1.) -> Invariance:
  """VICReg, as its official code computes it.

    similarity x mean (z1 - z2)^2 + std x (V(z1) + V(z2)) / 2 + cov x (C(z1) + C(z2))

  The mean is over B and the dimensions. V is the variance hinge and C the covariance term; the code
  halves V and does not halve C. The expander is 8192-8192-8192: its hidden layers have a bias, its
  last layer has neither bias nor norm.
  """
  def loss(embeddings: Embeddings) -> Array:
    a, b = two_views('vicreg', embeddings.projected)
    return (similarity * jnp.mean(jnp.square(a - b)) + std * (variance(a) + variance(b)) / 2.
            + cov * (covariance(a) + covariance(b)))

  return Invariance(loss, projector={'hidden': (8192, 8192), 'out': 8192, 'bias': True})

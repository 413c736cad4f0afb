"""VICReg (Bardes et al. 2022): views agree, dimensions vary, dimensions are uncorrelated."""
import jax.numpy as jnp

from equivariant_ssl.losses import covariance, two, variance
from equivariant_ssl.types import Array, Embeddings, Invariance


def make(similarity: float = 25., std: float = 25., cov: float = 1.) -> Invariance:
  """similarity x mean (z1 - z2)^2 + std x (V(z1) + V(z2)) / 2 + cov x (C(z1) + C(z2)),  as the official code has it: the
  first mean over B and dimensions, the half on the hinge V, none on the covariance C.

  Expander 8192-8192-8192: hidden layers with a bias, the last without and without norm.
  """
  def loss(embeddings: Embeddings) -> Array:
    a, b = two('vicreg', embeddings.projected)
    return (similarity * jnp.mean(jnp.square(a - b)) + std * (variance(a) + variance(b)) / 2.
            + cov * (covariance(a) + covariance(b)))

  return Invariance(loss, projector={'hidden': (8192, 8192), 'out': 8192, 'bias': True})

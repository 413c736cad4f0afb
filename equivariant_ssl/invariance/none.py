"""No invariance objective: the equivariance objectives train the network alone."""
import jax.numpy as jnp

from equivariant_ssl.types import Invariance


def make() -> Invariance:
  """A loss of 0, without a projector. A step makes the invariance's views only if they are used."""
  return Invariance(lambda embeddings: jnp.zeros(()), projector=None)

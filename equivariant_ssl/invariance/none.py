"""No invariance objective: the equivariance objectives alone."""
import jax.numpy as jnp

from equivariant_ssl.types import Invariance


def make() -> Invariance:
  """A loss of 0, without a projector; the invariance's views are made only where an objective uses them."""
  return Invariance(lambda embeddings: jnp.zeros(()), projector=None)

"""No equivariance objective: nothing is told, nothing is asked."""
from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp

from equivariant_ssl.types import Array, Equivariance, Pair, Wiring


class Nothing(nn.Module):
  """The head without weights: an embedding is the features, the answer is the source."""

  def embed(self, features: Array, train: bool) -> Array:
    return features

  def __call__(self, pair: Pair, train: bool) -> Array:
    return pair.source


def make() -> Callable[[Wiring], Equivariance]:
  """An objective whose loss is 0."""
  def pairs(embedded: dict, actions: dict) -> Pair:
    flat = embedded['views'].reshape(-1, embedded['views'].shape[-1])
    return Pair(flat, flat, (), ())

  return lambda wiring: Equivariance(
      head=Nothing(), loss=lambda answer, pair, embeddings=None: jnp.zeros(()), groups={}, uses=('views',), pairs=pairs)

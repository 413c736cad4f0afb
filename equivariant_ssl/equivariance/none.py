"""No equivariance objective."""
from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp

from equivariant_ssl.types import Array, Equivariance, Pair, Wiring


class NoHead(nn.Module):
  """The head without weights: an embedding is the features, and the answer is the source."""

  def embed(self, features: Array, train: bool) -> Array:
    return features

  def __call__(self, pair: Pair, train: bool) -> Array:
    return pair.source


def make() -> Callable[[Wiring], Equivariance]:
  """An objective whose loss is 0, and which is conditioned on nothing."""
  def pairs(embedded: dict, actions: dict) -> Pair:
    source = embedded['views'].reshape(-1, embedded['views'].shape[-1])
    return Pair(source, source, (), ())

  def loss(answer: Array, pair: Pair, embeddings=None) -> Array:
    return jnp.zeros(())

  return lambda wiring: Equivariance(head=NoHead(), loss=loss, groups={}, uses=('views',),
                                     pairs=pairs)

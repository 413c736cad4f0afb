"""CARE (Gupta et al. 2024): an action turns all embeddings alike, so it keeps the angles between images."""
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from equivariant_ssl.errors import UserError
from equivariant_ssl.losses import unit
from equivariant_ssl.nets import mlp
from equivariant_ssl.types import Action, Array, Equivariance, Group, Pair, Wiring


class Head(nn.Module):
  """The projector of its own, where the invariance has none to share; nothing is predicted."""
  project: nn.Module

  def embed(self, features: Array, train: bool) -> Array:
    return self.project(features, train)

  def __call__(self, pair: Pair, train: bool) -> Array:
    return pair.source


def make(weight: float = .01, splits: int = 16, hidden: tuple[int, ...] = (2048, 2048), dim: int = 128
         ) -> Callable[[Wiring], Equivariance]:
  """2 mean_i sum_{j != i} ( f(a1 xi) . f(a1 xj) - f(a2 xi) . f(a2 xj) )^2 within a chunk, averaged over the `splits` chunks,

  as the official code has it (the paper's formula compares with the image itself, and averages over j). f: the invariance's
  unit embeddings. The batch is cut into `splits` chunks (fewer in a small batch: a chunk has two images at least) of
  neighbouring images, which all receive the same two actions, in views of its own for the roles `both` and `sensitive`
  alike. (The code draws them inside nested vmaps of randomness 'same', so that all its chunks receive the same two.)
  hidden, dim: of its own projector, where the invariance has none. Published weights: .01 (CIFAR-10, STL-10; .03 in the
  code's script for CIFAR-10), .001 (CIFAR-100), .005 (ImageNet-100). Raises UserError where the batch cannot be cut.
  """
  def wire(wiring: Wiring) -> Equivariance:
    chunks = min(splits, wiring.batch // 2)
    if chunks < 1 or wiring.batch % chunks:
      fits = max((s for s in range(1, chunks) if wiring.batch % s == 0), default=1)
      raise UserError(f'care.splits is {splits}: a batch of {wiring.batch} cannot be cut into {chunks} equal chunks of two '
                      'or more images.', f'e.g. --config.equivariance.splits={fits}')
    share = wiring.batch // chunks

    def pairs(embedded: dict[str, Array], actions: dict[str, Action]) -> Pair:
      z, view = embedded[wiring.name], lambda v: jax.tree.map(lambda a: a[:, v], actions[wiring.name])
      return Pair(z[:, 0], z[:, 1], view(0), view(1))

    def loss(answer: Array, pair: Pair, embeddings=None) -> Array:
      def angles(z: Array) -> Array:
        z = unit(z).reshape(chunks, share, -1)
        return jnp.einsum('sie,sje->sij', z, z, precision='highest')
      # The diagonals are 1 - 1: leaving them out (the code) and in is the same.
      return 2. * jnp.mean(jnp.sum(jnp.square(angles(pair.source) - angles(pair.target)), axis=-1))

    head = Head(mlp.make(hidden, dim, last_norm='batch_noaffine', dtype=wiring.dtype))
    groups = {wiring.name: Group(wiring.own, wiring.size, share=share)}
    return Equivariance(head, loss, groups, (wiring.name,), pairs, shares=True, weight=weight)

  return wire

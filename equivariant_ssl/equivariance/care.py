"""CARE (Gupta et al. 2024): an action rotates all embeddings alike, so it keeps their angles."""
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from equivariant_ssl.errors import UserError
from equivariant_ssl.losses import unit
from equivariant_ssl.nets import mlp
from equivariant_ssl.types import Action, Array, Equivariance, Group, Pair, Wiring


class CareHead(nn.Module):
  """A projector, for where the invariance has none to share. Nothing is predicted."""
  project: nn.Module

  def embed(self, features: Array, train: bool) -> Array:
    return self.project(features, train)

  def __call__(self, pair: Pair, train: bool) -> Array:
    return pair.source


def make(weight: float = .01, splits: int = 16, hidden: tuple[int, ...] = (2048, 2048),
         dim: int = 128) -> Callable[[Wiring], Equivariance]:
  """CARE: the angles between embeddings are the same under two actions.

    2 mean_i sum_{j != i} ( f(a1 xi) . f(a1 xj) - f(a2 xi) . f(a2 xj) )^2

  within a chunk of images, averaged over the chunks, as the official code computes it. (The paper's
  formula compares with the image itself, and averages over j.) f gives the invariance's unit
  embeddings. A chunk is neighboring images, which all receive the same two actions, in views of its
  own, for the roles `both` and `sensitive` alike. (In the code all chunks receive the same two,
  since it draws them inside nested vmaps with randomness 'same'.)

  Published weights: .01 (CIFAR-10, STL-10; .03 in the code's script for CIFAR-10), .001
  (CIFAR-100), .005 (ImageNet-100).

  splits: the number of chunks of a batch. A small batch has fewer, for a chunk has two images at
          least.
  hidden, dim: the widths of the head's projector, where the invariance has none.

  Raises UserError where the batch cannot be cut into equal chunks.
  """
  def wire(wiring: Wiring) -> Equivariance:
    chunks = min(splits, wiring.batch // 2)
    if chunks < 1 or wiring.batch % chunks:
      fits = max((s for s in range(1, chunks) if wiring.batch % s == 0), default=1)
      raise UserError(f'care.splits is {splits}, but a batch of {wiring.batch} cannot be cut into '
                      f'{chunks} equal chunks of two or more images.',
                      f'e.g. --config.equivariance.splits={fits}')
    share = wiring.batch // chunks

    def pairs(embedded: dict[str, Array], actions: dict[str, Action]) -> Pair:
      z = embedded[wiring.name]
      before, after = (jax.tree.map(lambda a: a[:, 0], actions[wiring.name]),
                       jax.tree.map(lambda a: a[:, 1], actions[wiring.name]))
      return Pair(z[:, 0], z[:, 1], before, after)

    def loss(answer: Array, pair: Pair, embeddings=None) -> Array:
      def cosines(z: Array) -> Array:
        z = unit(z).reshape(chunks, share, -1)
        return jnp.einsum('sie,sje->sij', z, z, precision='highest')
      difference = cosines(pair.source) - cosines(pair.target)
      # The diagonals are 1 - 1: the code leaves them out, which is the same.
      return 2. * jnp.mean(jnp.sum(jnp.square(difference), axis=-1))

    head = CareHead(mlp.make(hidden, dim, last_norm='batch_noaffine', dtype=wiring.dtype))
    groups = {wiring.name: Group(wiring.own_chains, wiring.size, share=share)}
    return Equivariance(head, loss, groups, (wiring.name,), pairs, shares=True, weight=weight)

  return wire

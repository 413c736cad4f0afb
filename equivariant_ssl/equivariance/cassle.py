"""CASSLE (Przewiezlikowski et al. 2024): a conditioned projector; features keep augmentations."""
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from equivariant_ssl.equivariance.pairing import between_views
from equivariant_ssl.losses import nt_xent
from equivariant_ssl.nets import mlp
from equivariant_ssl.types import Action, Array, Equivariance, Pair, Wiring


class CassleHead(nn.Module):
  """`feed` is [h, encode_action(conditioning)].

  project: the projector of the objective's own views, or None.
  encode:  action -> [A], the conditioning.
  """
  encode_action: nn.Module
  project: nn.Module | None
  encode: Callable[[Action], Array]

  def feed(self, features: Array, actions: Action, train: bool) -> Array:
    conditioning = jax.vmap(jax.vmap(self.encode))(actions)
    return jnp.concatenate([features, self.encode_action(conditioning, train)], axis=-1)

  def embed(self, features: Array, train: bool) -> Array:
    return features

  def __call__(self, pair: Pair, train: bool) -> tuple[Array, Array] | Array:
    if self.project is None:
      return pair.source
    views = jnp.stack([pair.source, pair.target], axis=1)
    actions = jax.tree.map(lambda a, b: jnp.stack([a, b], axis=1), pair.before, pair.after)
    z = self.project(self.feed(views, actions, train), train)
    return z[:, 0], z[:, 1]


def make(weight: float = 1., temperature: float = .2, action_hidden: tuple[int, ...] = (64,) * 5,
         action_dim: int = 64, hidden: tuple[int, ...] = (2048, 2048), dim: int = 128
         ) -> Callable[[Wiring], Equivariance]:
  """CASSLE: L(g([h1, gamma(a1)]), g([h2, gamma(a2)])), with the conditioning gamma(a).

  L and g are the invariance's loss and projector. The projector knows the augmentation, so the
  features need not be invariant to it.

  With the role `both`, g (and its target's) reads [h, gamma(action)], and there is no loss of its
  own. gamma is an MLP of `action_hidden` and `action_dim`: Linear without bias, BatchNorm and ReLU,
  and after the last layer BatchNorm alone. It was published with the augmentations crop, jitter,
  blur and gray. The conditioning is as the ops encode it. The official code has instead the crop's
  center (mirrored where the view is flipped), the factors without the order, and the change of the
  mean color, which is no part of an action.

  The role `sensitive` is this project's: the same idea in views of its own, with NT-Xent at
  `temperature` between the two, and a projector of its own (`hidden`, `dim`) that reads the
  conditioning.
  """
  def wire(wiring: Wiring) -> Equivariance:
    uses, groups, pairs = between_views(wiring)
    projector = None
    if wiring.has_own_views:
      projector = mlp.make(hidden, dim, last_norm='batch_noaffine', dtype=wiring.dtype)
    head = CassleHead(mlp.make(action_hidden, action_dim, last_norm='batch', dtype=wiring.dtype),
                      projector, wiring.conditioning.encode)

    def loss(answer: tuple[Array, Array] | Array, pair: Pair, embeddings=None) -> Array:
      return nt_xent(answer[0], answer[1], temperature) if wiring.has_own_views else jnp.zeros(())

    return Equivariance(head, loss, groups, uses, pairs, feeds=not wiring.has_own_views,
                        weight=weight)

  return wire

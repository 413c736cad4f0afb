"""CASSLE (Przewiezlikowski et al. 2024): a projector that is told the augmentation explains it away; features keep it."""
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from equivariant_ssl.equivariance.pairing import between_views
from equivariant_ssl.losses import nt_xent
from equivariant_ssl.nets import mlp
from equivariant_ssl.types import Action, Array, Equivariance, Pair, Wiring


class Head(nn.Module):
  """feed: [h, encode_action(encoded action)]; project: of views of its own."""
  encode_action: nn.Module
  project: nn.Module
  encode: Callable[[Action], Array]

  def feed(self, features: Array, actions: Action, train: bool) -> Array:
    told = jax.vmap(jax.vmap(self.encode))(actions)
    return jnp.concatenate([features, self.encode_action(told, train)], axis=-1)

  def embed(self, features: Array, train: bool) -> Array:
    return features

  def __call__(self, pair: Pair, train: bool) -> tuple[Array, Array] | Array:
    if self.project is None:
      return pair.source
    views = jnp.stack([pair.source, pair.target], axis=1)
    actions = jax.tree.map(lambda a, b: jnp.stack([a, b], axis=1), pair.before, pair.after)
    z = self.project(self.feed(views, actions, train), train)
    return z[:, 0], z[:, 1]


def make(weight: float = 1., temperature: float = .2, action_hidden: tuple[int, ...] = (64,) * 5, action_dim: int = 64,
         hidden: tuple[int, ...] = (2048, 2048), dim: int = 128) -> Callable[[Wiring], Equivariance]:
  """L(g([h1, gamma(a1)]), g([h2, gamma(a2)])): the invariance's loss L and projector g, which is told what was done.

  Role `both`: g (and its target's) reads [h, gamma(action)] and there is no loss of its own. gamma: an MLP of
  `action_hidden` and `action_dim`, bias-free Linear, BatchNorm, ReLU, after the last layer BatchNorm alone. Published:
  told of crop, jitter, blur and gray. Told as the ops encode it, where the official code gives the crop's centre
  (mirrored where flipped), factors without the order, and the change of mean colour, which is no part of an action.

  Role `sensitive`, which is ours: the same idea in views of its own, NT-Xent at `temperature` between the two, by a
  projector of its own (`hidden`, `dim`) that is told of them.
  """
  def wire(wiring: Wiring) -> Equivariance:
    uses, groups, pairs = between_views(wiring)
    own = wiring.sensitive
    head = Head(mlp.make(action_hidden, action_dim, last_norm='batch', dtype=wiring.dtype),
                mlp.make(hidden, dim, last_norm='batch_noaffine', dtype=wiring.dtype) if own else None, wiring.told.encode)

    def loss(answer: tuple[Array, Array] | Array, pair: Pair, embeddings=None) -> Array:
      return nt_xent(*answer, temperature) if own else jnp.zeros(())

    return Equivariance(head, loss, groups, uses, pairs, feeds=not own, weight=weight)

  return wire

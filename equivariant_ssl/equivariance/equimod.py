"""EquiMod (Devillers & Lefort 2022): predict where an embedding goes from what was done to the image."""
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from equivariant_ssl.augment import reference
from equivariant_ssl.losses import nt_xent
from equivariant_ssl.nets import mlp
from equivariant_ssl.types import Action, Array, Equivariance, Group, Pair, Wiring

PREDICTS = 'target'  # the answer is an estimate of pair.target


class Head(nn.Module):
  """y = project(h); the predicted y of a view is predict([y of the reference, encode_action(action)])."""
  project: nn.Module
  encode_action: nn.Module
  predict: nn.Module
  encode: Callable[[Action], Array]

  def embed(self, features: Array, train: bool) -> Array:
    return self.project(features, train)

  def __call__(self, pair: Pair, train: bool) -> Array:
    told = self.encode_action(jax.vmap(self.encode)(pair.after), train)
    return self.predict(jnp.concatenate([pair.source, told], axis=-1), train)


def make(temperature: float = .2, exclude_sibling: bool = False, hidden: tuple[int, ...] = (2048, 2048),
         dim: int = 128, action_dim: int = 128) -> Callable[[Wiring], Equivariance]:
  """EquiMod as its official code computes it; the loss is NT-Xent over the 4B rows [y of each view, its prediction].

  The reference is the un-augmented image. The projector is hidden-dim with a last BatchNorm without affine; the
  action encoder one Linear + BatchNorm; the predictor one bias-free Linear + BatchNorm without affine. There is no
  stop-gradient. The other view of an image (its sibling) and that view's prediction are negatives, as in the code;
  `exclude_sibling` leaves them out, as the paper's eq. 4 does.
  """
  def wire(wiring: Wiring) -> Equivariance:
    group = wiring.name if wiring.sensitive else 'views'
    V = len(wiring.own)
    groups = {'reference': Group((reference(wiring.own[0]),), wiring.size)}
    if wiring.sensitive:
      groups[group] = Group(wiring.own, wiring.size)

    def pairs(embedded: dict[str, Array], actions: dict[str, Action]) -> Pair:
      def flat(a: Array) -> Array:  # [B 1 or V ...] -> [N ...], B-major
        a = jnp.broadcast_to(a, (a.shape[0], V, *a.shape[2:]))
        return a.reshape(-1, *a.shape[2:])
      return Pair(flat(embedded['reference']), flat(embedded[group]),
                  jax.tree.map(flat, actions['reference']), jax.tree.map(flat, actions[group]))

    def loss(answer: Array, pair: Pair, embeddings=None) -> Array:
      return nt_xent(pair.target, answer, temperature, siblings=V if exclude_sibling else 1)

    head = Head(
        project=mlp.make(hidden=hidden, out=dim, last_norm='batch_noaffine', dtype=wiring.dtype),
        encode_action=mlp.make(hidden=(), out=action_dim, last_norm='batch', dtype=wiring.dtype),
        predict=mlp.make(hidden=(), out=dim, last_norm='batch_noaffine', dtype=wiring.dtype),
        encode=wiring.told.encode)
    return Equivariance(head, loss, groups, ('reference', group), pairs)

  return wire

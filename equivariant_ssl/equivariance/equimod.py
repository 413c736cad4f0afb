"""EquiMod (Devillers & Lefort 2022): predict where an embedding goes from what was done to the image."""
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from equivariant_ssl.equivariance.pairing import between_views, from_reference
from equivariant_ssl.losses import nt_xent, variance
from equivariant_ssl.nets import mlp, predictors
from equivariant_ssl.registry import unknown
from equivariant_ssl.types import Array, Equivariance, Pair, Wiring

STOPS = ('none', 'target', 'source')


class Head(nn.Module):
  """y = project(h); the predicted y of a view is predict(y of the source, encode_action(told)).

  told: pair -> [N A]. stop: 'target' or 'source', through which no gradient flows, or 'none'.
  """
  project: nn.Module
  encode_action: nn.Module
  predict: nn.Module
  told: Callable[[Pair], Array]
  stop: str = 'none'

  def embed(self, features: Array, train: bool) -> Array:
    return self.project(features, train)

  def __call__(self, pair: Pair, train: bool) -> Array:
    source = jax.lax.stop_gradient(pair.source) if self.stop == 'source' else pair.source
    return self.predict(source, self.encode_action(self.told(pair), train), train)


def make(weight: float = 1., temperature: float = .2, loss: str = 'nt_xent', exclude_sibling: bool = False,
         variance_weight: float = 1., reference: str = 'original', reference_side: float = 1., encoder: str = 'linear',
         predictor: str = 'linear', stop_gradient: str = 'none', tap_layer: int = 0,
         hidden: tuple[int, ...] = (2048, 2048), dim: int = 128, action_dim: int = 128,
         action_hidden: tuple[int, ...] = (64, 64), predictor_hidden: tuple[int, ...] = (2048,)
         ) -> Callable[[Wiring], Equivariance]:
  """EquiMod as its official code computes it; the loss is NT-Xent over the 4B rows [y of each view, its prediction].

  The reference is the un-augmented image. The projector is hidden-dim with a last BatchNorm without affine; the
  action encoder one Linear + BatchNorm; the predictor one bias-free Linear + BatchNorm without affine. There is no
  stop-gradient. The other view of an image (its sibling) and that view's prediction are negatives, as in the code;
  `exclude_sibling` leaves them out, as the paper's eq. 4 does. What else there is:

  loss: 'mse', the mean squared error plus `variance_weight` x VICReg's hinge on targets and predictions (SIE's form).
  reference: 'view' predicts each view of an image from the other, told their relative action (SIE, STL and their ports
  of EquiMod). reference_side: < 1: a central square of that fraction of the shorter side (.875 on ImageNet).
  encoder: of the action, 'linear', 'mlp' (of `action_hidden`) or 'none'. predictor: 'linear', 'mlp' (of
  `predictor_hidden`), 'hyper' (a matrix an action, SIE's) or 'identity' (a control that ignores the action).
  stop_gradient: 'target' or 'source'. tap_layer: the encoder's stage to embed, 0 the last (SER). Raises UserError for
  a word that it does not know.
  """
  for what, word, known in (('loss', loss, ('nt_xent', 'mse')), ('reference', reference, ('original', 'view')),
                            ('stop_gradient', stop_gradient, STOPS)):
    if word not in known:
      raise unknown(f'equimod.{what}', word, known)

  def wire(wiring: Wiring) -> Equivariance:
    original = reference == 'original'
    uses, groups, pairs = from_reference(wiring, reference_side) if original else between_views(wiring, both=True)
    siblings = len(wiring.own) if exclude_sibling else 1

    def told(pair: Pair) -> Array:
      if original:
        return jax.vmap(wiring.told.encode)(pair.after)
      return jax.vmap(wiring.told.relative)(pair.before, pair.after)

    def compare(answer: Array, pair: Pair, embeddings=None) -> Array:
      target = jax.lax.stop_gradient(pair.target) if stop_gradient == 'target' else pair.target
      if loss == 'nt_xent':
        return nt_xent(target, answer, temperature, siblings)
      error = jnp.mean(jnp.square(answer.astype(jnp.float32) - target.astype(jnp.float32)))
      return error + variance_weight * (variance(target) + variance(answer)) / 2.

    head = Head(
        project=mlp.make(hidden=hidden, out=dim, last_norm='batch_noaffine', dtype=wiring.dtype),
        encode_action=predictors.action_encoder('equimod.encoder', encoder, action_dim, action_hidden, wiring.dtype),
        predict=predictors.predictor('equimod.predictor', predictor, dim, predictor_hidden, wiring.dtype),
        told=told, stop=stop_gradient)
    return Equivariance(head, compare, groups, uses, pairs, predicts='target', tap=tap_layer, weight=weight)

  return wire

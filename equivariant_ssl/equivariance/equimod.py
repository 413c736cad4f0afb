"""EquiMod (Devillers & Lefort 2022): predict where an augmentation moves the embedding."""
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from equivariant_ssl.augment import relative
from equivariant_ssl.equivariance.pairing import between_views, from_reference
from equivariant_ssl.losses import nt_xent, variance
from equivariant_ssl.nets import mlp, predictors
from equivariant_ssl.registry import unknown_name
from equivariant_ssl.types import Array, Equivariance, Pair, Wiring

STOPS = ('none', 'target', 'source')


def relative_conditioning(wiring: Wiring) -> Callable[[Pair], Array]:
  """pair -> [N A]: the conditioning on the way from the view `before` to the view `after`."""
  def condition(pair: Pair) -> Array:
    return jax.vmap(lambda a, b: relative(wiring.conditioning, a, b))(pair.before, pair.after)
  return condition


def absolute_conditioning(wiring: Wiring) -> Callable[[Pair], Array]:
  """pair -> [N A]: the conditioning on the action of the view `after`."""
  return lambda pair: jax.vmap(wiring.conditioning.encode)(pair.after)


def prediction_loss(kind: str, temperature: float, variance_weight: float, siblings: int,
                    stop_target: bool) -> Callable[..., Array]:
  """(prediction, pair) -> the loss of `kind`, 'nt_xent' or 'mse'; see `make`."""
  def loss(answer: Array, pair: Pair, embeddings=None) -> Array:
    target = jax.lax.stop_gradient(pair.target) if stop_target else pair.target
    if kind == 'nt_xent':
      return nt_xent(target, answer, temperature, siblings)
    error = jnp.mean(jnp.square(answer.astype(jnp.float32) - target.astype(jnp.float32)))
    return error + variance_weight * (variance(target) + variance(answer)) / 2.
  return loss


class EquiModHead(nn.Module):
  """y = project(h), and the prediction predict(y of the source, encode_action(conditioning)).

  conditioning: pair -> [N A].
  stop:         'target' or 'source', through which no gradient flows, or 'none'.
  """
  project: nn.Module
  encode_action: nn.Module
  predict: nn.Module
  conditioning: Callable[[Pair], Array]
  stop: str = 'none'

  def embed(self, features: Array, train: bool) -> Array:
    return self.project(features, train)

  def __call__(self, pair: Pair, train: bool) -> Array:
    source = jax.lax.stop_gradient(pair.source) if self.stop == 'source' else pair.source
    return self.predict(source, self.encode_action(self.conditioning(pair), train), train)


def make(weight: float = 1., temperature: float = .2, loss: str = 'nt_xent',
         exclude_sibling: bool = False, variance_weight: float = 1., reference: str = 'original',
         reference_side: float = 1., encoder: str = 'linear', predictor: str = 'linear',
         stop_gradient: str = 'none', tap_layer: int = 0, hidden: tuple[int, ...] = (2048, 2048),
         dim: int = 128, action_dim: int = 128, action_hidden: tuple[int, ...] = (64, 64),
         predictor_hidden: tuple[int, ...] = (2048,)) -> Callable[[Wiring], Equivariance]:
  """EquiMod: NT-Xent over 4B rows, the embedding y of each view and its prediction.

  The defaults are the official code. The prediction starts from the reference, the un-augmented
  image. The projector is hidden-dim with a last BatchNorm without affine. The action encoder is one
  Linear and a BatchNorm. The predictor is one Linear without bias and a BatchNorm without affine.
  No gradient is stopped.

  loss:            'nt_xent', or 'mse': the mean squared error plus `variance_weight` x VICReg's
                   variance hinge on targets and predictions (SIE's form).
  exclude_sibling: the other view of an image, and its prediction, are no negatives (the paper's eq.
                   4). In the code they are.
  reference:       'original', or 'view': each view of an image is predicted from the other, with
                   their relative action as conditioning (SIE, STL, and their ports of EquiMod).
  reference_side:  below 1, the reference is a central square of this fraction of the shorter side
                   (.875 on ImageNet).
  encoder:         the encoder of the action: 'linear', 'mlp' (of `action_hidden`) or 'none'.
  predictor:       'linear', 'mlp' (of `predictor_hidden`), 'hyper' (a matrix for each action,
                   SIE's) or 'identity' (a control that ignores the action).
  stop_gradient:   'none', 'target' or 'source'.
  tap_layer:       the encoder's stage to embed; 0 is the last (SER).

  Raises UserError for a word that it does not know.
  """
  for what, word, known in (('loss', loss, ('nt_xent', 'mse')),
                            ('reference', reference, ('original', 'view')),
                            ('stop_gradient', stop_gradient, STOPS)):
    if word not in known:
      raise unknown_name(f'equimod.{what}', word, known)

  def wire(wiring: Wiring) -> Equivariance:
    if reference == 'original':
      uses, groups, pairs = from_reference(wiring, reference_side)
      conditioning = absolute_conditioning(wiring)
    else:
      uses, groups, pairs = between_views(wiring, both=True)
      conditioning = relative_conditioning(wiring)
    siblings = len(wiring.own_chains) if exclude_sibling else 1
    head = EquiModHead(
        project=mlp.make(hidden=hidden, out=dim, last_norm='batch_noaffine', dtype=wiring.dtype),
        encode_action=predictors.action_encoder('equimod.encoder', encoder, action_dim,
                                                action_hidden, wiring.dtype),
        predict=predictors.predictor('equimod.predictor', predictor, dim, predictor_hidden,
                                     wiring.dtype),
        conditioning=conditioning, stop=stop_gradient)
    compare = prediction_loss(loss, temperature, variance_weight, siblings,
                              stop_gradient == 'target')
    return Equivariance(head, compare, groups, uses, pairs, predicts='target', tap=tap_layer,
                        weight=weight)

  return wire

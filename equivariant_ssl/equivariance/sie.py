"""SIE (Garrido et al. 2023): part of the features is invariant, and the action moves the rest."""
from collections.abc import Callable

import jax.numpy as jnp

from equivariant_ssl.equivariance.equimod import EquiModHead, relative_conditioning
from equivariant_ssl.equivariance.pairing import between_views
from equivariant_ssl.errors import UserError
from equivariant_ssl.losses import covariance, variance
from equivariant_ssl.nets import mlp, predictors
from equivariant_ssl.types import Action, Array, Embeddings, Equivariance, Pair, Wiring


class SieHead(EquiModHead):
  """The first part of the features feeds the invariance's projector; the rest is this head's.

  invariant: the first part's share of the features.
  """
  invariant: float = .5

  def _split_at(self, features: Array) -> int:
    return round(self.invariant * features.shape[-1])

  def feed(self, features: Array, actions: Action, train: bool) -> Array:
    return features[..., :self._split_at(features)]

  def embed(self, features: Array, train: bool) -> Array:
    return self.project(features[..., self._split_at(features):], train)


def make(weight: float = 1., prediction: float = 4.5, std: float = 10., cov: float = 1.,
         predicted_std: float = 10., joint: bool = False, invariant: float = .5,
         predictor: str = 'hyper', hidden: tuple[int, ...] = (1024, 1024), dim: int = 1024
         ) -> Callable[[Wiring], Equivariance]:
  """SIE, from the first view to the second alone, without a stopped gradient.

    prediction x mean (W(a) z1 - z2)^2 + std x (V(z1) + V(z2)) / 2 + cov x (C(z1) + C(z2))
    + predicted_std x V(W(a) z1) / 2

  V and C are VICReg's variance hinge and covariance term, a is the relative action, and z is the
  projected second part of the features. The invariance's projector reads the first part. The matrix
  W has a bias, so that W(identity) is not 0; SIE's own has none.

  joint:     V and C are of [the invariance's embedding, z] side by side, as published. The
             invariance is then VICReg with std = cov = 0 and similarity 10. Otherwise they are of z
             alone, so that any invariance fits.
  invariant: the first part's share of the features.

  Raises UserError for a share that leaves a part empty, and where `joint` has no embeddings to
  join.
  """
  if not 0. < invariant < 1.:
    raise UserError(f'sie.invariant is {invariant}, which is not a share between 0 and 1.',
                    'Give the share of the features that is invariant, as in .5.')

  def wire(wiring: Wiring) -> Equivariance:
    uses, groups, pairs = between_views(wiring)

    def loss(answer: Array, pair: Pair, embeddings: Embeddings | None = None) -> Array:
      z = [pair.source.astype(jnp.float32), pair.target.astype(jnp.float32)]
      answer = answer.astype(jnp.float32)
      regularized = z
      if joint:
        if embeddings is None or embeddings.projected.shape[:2] != (z[0].shape[0], 2):
          raise UserError("sie.joint joins the embeddings of the invariance's two views, and there "
                          'are none.', 'e.g. --config.invariance=vicreg, or '
                          '--config.equivariance.joint=False')
        regularized = [
            jnp.concatenate([embeddings.projected[:, v].astype(jnp.float32), z[v]], axis=-1)
            for v in range(2)]
      error = jnp.mean(jnp.square(answer - z[1]))
      return (prediction * error + predicted_std * variance(answer) / 2.
              + std * sum(map(variance, regularized)) / 2.
              + cov * sum(map(covariance, regularized)))

    head = SieHead(
        mlp.make(hidden, dim, bias=True, dtype=wiring.dtype),
        predictors.action_encoder('sie.encoder', 'none', dim),
        predictors.predictor('sie.predictor', predictor, dim, hidden[:1], wiring.dtype),
        relative_conditioning(wiring), invariant=invariant)
    return Equivariance(head, loss, groups, uses, pairs, predicts='target', feeds=True,
                        weight=weight)

  return wire

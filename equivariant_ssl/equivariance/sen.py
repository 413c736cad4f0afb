"""SEN (Park et al. 2022): embeddings move as the action says, and there is no invariance term."""
from collections.abc import Callable

import jax

from equivariant_ssl.equivariance.equimod import Head
from equivariant_ssl.equivariance.pairing import between_views
from equivariant_ssl.losses import info_nce, nt_xent
from equivariant_ssl.nets import mlp, predictors
from equivariant_ssl.registry import unknown
from equivariant_ssl.types import Array, Equivariance, Pair, Wiring


def make(weight: float = 1., temperature: float = .2, predictor: str = 'hyper', negatives: str = 'cross',
         hidden: tuple[int, ...] = (2048, 2048), dim: int = 128) -> Callable[[Wiring], Equivariance]:
  """InfoNCE( u(f(x1), g12), f(x2) ); meant with invariance 'none'.

  As STL's and seq-JEPA's authors read it for augmented images ("SimCLR, equivariance only"). SEN's own code is of world
  models: a squared distance after a step and a hinge on that to another state, on symmetric networks; it is not here.
  negatives: 'cross', the other second views (B - 1), or 'all', the other predictions too and both ways round (2B - 2), as
  seq-JEPA's code, whose predictor is 'linear'. g12: the relative action of the two views. predictor: 'hyper' (a matrix an
  action), 'linear', 'mlp' or 'identity'. Raises UserError for another word.
  """
  losses = {'cross': info_nce, 'all': nt_xent}
  if negatives not in losses:
    raise unknown('sen.negatives', negatives, losses)

  def wire(wiring: Wiring) -> Equivariance:
    uses, groups, pairs = between_views(wiring)

    def told(pair: Pair) -> Array:
      return jax.vmap(wiring.told.relative)(pair.before, pair.after)

    head = Head(mlp.make(hidden, dim, last_norm='batch_noaffine', dtype=wiring.dtype),
                predictors.action_encoder('sen.encoder', 'none', dim),
                predictors.predictor('sen.predictor', predictor, dim, hidden[:1], wiring.dtype), told)
    return Equivariance(head, lambda answer, pair, embeddings=None: losses[negatives](answer, pair.target, temperature),
                        groups, uses, pairs, predicts='target', weight=weight)

  return wire

"""SEN (Park et al. 2022): embeddings move as the action says, and there is no invariance term."""
from collections.abc import Callable

import jax

from equivariant_ssl.equivariance.equimod import Head
from equivariant_ssl.equivariance.pairing import between_views
from equivariant_ssl.losses import info_nce
from equivariant_ssl.nets import mlp, predictors
from equivariant_ssl.types import Array, Equivariance, Pair, Wiring


def make(weight: float = 1., temperature: float = .2, predictor: str = 'hyper',
         hidden: tuple[int, ...] = (2048, 2048), dim: int = 128) -> Callable[[Wiring], Equivariance]:
  """InfoNCE( u(f(x1), g12), f(x2) ) over the B second views: B - 1 negatives; meant with invariance 'none'.

  As STL and seq-JEPA read it ("SimCLR, equivariance only"); no official code was read. g12: the relative action of the two
  views. predictor: 'hyper' (a matrix an action), 'linear', 'mlp' or 'identity'.
  """
  def wire(wiring: Wiring) -> Equivariance:
    uses, groups, pairs = between_views(wiring)

    def told(pair: Pair) -> Array:
      return jax.vmap(wiring.told.relative)(pair.before, pair.after)

    head = Head(mlp.make(hidden, dim, last_norm='batch_noaffine', dtype=wiring.dtype),
                predictors.action_encoder('sen.encoder', 'none', dim),
                predictors.predictor('sen.predictor', predictor, dim, hidden[:1], wiring.dtype), told)
    return Equivariance(head, lambda answer, pair, embeddings=None: info_nce(answer, pair.target, temperature),
                        groups, uses, pairs, predicts='target', weight=weight)

  return wire

"""SEN (Park et al. 2022): embeddings move as the action says, without an invariance objective."""
from collections.abc import Callable

from equivariant_ssl.equivariance.equimod import EquiModHead, relative_conditioning
from equivariant_ssl.equivariance.pairing import between_views
from equivariant_ssl.losses import info_nce, nt_xent
from equivariant_ssl.nets import mlp, predictors
from equivariant_ssl.registry import unknown_name
from equivariant_ssl.types import Array, Equivariance, Pair, Wiring


def make(weight: float = 1., temperature: float = .2, predictor: str = 'hyper',
         negatives: str = 'cross', hidden: tuple[int, ...] = (2048, 2048), dim: int = 128
         ) -> Callable[[Wiring], Equivariance]:
  """SEN: InfoNCE( u(f(x1), g12), f(x2) ), where g12 is the relative action of the two views.

  It is meant for use with the invariance 'none'. This is the form in which the authors of STL and
  of seq-JEPA read SEN for augmented images ("SimCLR, equivariance only"). SEN's own code is for
  world models, and is not implemented here: it has a squared distance after a step, a hinge on the
  distance to another state, and symmetric networks.

  predictor: 'hyper' (a matrix for each action), 'linear', 'mlp' or 'identity'.
  negatives: 'cross', the other second views (B - 1); or 'all', the other predictions too, and both
             ways round (2B - 2), as in seq-JEPA's code, whose predictor is 'linear'.

  Raises UserError for another word.
  """
  losses = {'cross': info_nce, 'all': nt_xent}
  if negatives not in losses:
    raise unknown_name('sen.negatives', negatives, losses)

  def wire(wiring: Wiring) -> Equivariance:
    uses, groups, pairs = between_views(wiring)

    def loss(answer: Array, pair: Pair, embeddings=None) -> Array:
      return losses[negatives](answer, pair.target, temperature)

    head = EquiModHead(
        mlp.make(hidden, dim, last_norm='batch_noaffine', dtype=wiring.dtype),
        predictors.action_encoder('sen.encoder', 'none', dim),
        predictors.predictor('sen.predictor', predictor, dim, hidden[:1], wiring.dtype),
        relative_conditioning(wiring))
    return Equivariance(head, loss, groups, uses, pairs, predicts='target', weight=weight)

  return wire

"""BYOL (Grill et al. 2020): predict the target network's embedding of the other view."""
import jax

from equivariant_ssl.errors import UserError
from equivariant_ssl.losses import cosine, two_views
from equivariant_ssl.types import Array, Embeddings, Invariance

HEAD = {'hidden': (4096,), 'out': 256, 'bias': True}


def sum_cosines(name: str, embeddings: Embeddings) -> Array:
  """[B]: the cosine of each view's prediction with the other view's target, summed over the two.

  No gradient flows through the targets.
  """
  first, second = two_views(name, embeddings.predicted)
  target_first, target_second = two_views(name, jax.lax.stop_gradient(embeddings.target))
  return cosine(first, target_second) + cosine(second, target_first)


def make(decay: float = .996, update: str = 'after') -> Invariance:
  """BYOL: the mean over B of (2 - 2 cos(q1, z2')) + (2 - 2 cos(q2, z1')).

  q is a prediction, and z' an embedding by the target network, whose BatchNorm uses its own
  batches. EquiMod's BYOL writes twice the mean over 2B, which is the same. Projector and predictor
  are Linear 4096 with a bias, BatchNorm, ReLU, and Linear 256 without a bias. (EquiMod's have none
  in the first layer, and one in the last.)

  decay:  the first decay of the moving average; it rises to 1 by a cosine.
  update: when the average moves. 'after': after the optimizer's step, towards the new weights. It
          is BYOL's code, whose target network starts from weights of its own. 'before': before the
          next forward pass. It is EquiMod's code, whose target network starts as a copy.

  Raises UserError for another update or decay.
  """
  if update not in ('after', 'before'):
    raise UserError(f"byol.update is {update!r}, neither 'after' nor 'before'.",
                    "Give 'after' (the optimizer's step) or 'before' (the forward pass).")
  if not 0. <= decay <= 1.:
    raise UserError(f'byol.decay is {decay}, which is not a share.',
                    'Give the share of the average that stays, from 0 to 1, as in .996.')

  def loss(embeddings: Embeddings) -> Array:
    return 4. - 2. * sum_cosines('byol', embeddings).mean()
  return Invariance(loss, HEAD, HEAD, decay, update)

"""BYOL (Grill et al. 2020): predict a moving average's embedding of the other view."""
import jax

from equivariant_ssl.errors import UserError
from equivariant_ssl.losses import cosine, two
from equivariant_ssl.types import Array, Embeddings, Invariance

HEAD = {'hidden': (4096,), 'out': 256, 'bias': True}


def towards_other(name: str, embeddings: Embeddings) -> Array:
  """[B]: the cosines of each view's prediction with the other view's target, which is constant, summed over the two."""
  first, second = two(name, embeddings.predicted)
  aim_first, aim_second = two(name, jax.lax.stop_gradient(embeddings.target))
  return cosine(first, aim_second) + cosine(second, aim_first)


def make(decay: float = .996, update: str = 'after') -> Invariance:
  """mean over B of  (2 - 2 cos(q1, z2')) + (2 - 2 cos(q2, z1')),  z' from the target network. (EquiMod's BYOL writes twice
  the mean over 2B: the same.)

  decay: of the target's average at first; it rises to 1 by a cosine. update: 'after' the optimiser's step, with the new
  weights (BYOL's code, whose target starts from weights of its own), or 'before' the forward pass of the next (EquiMod's,
  whose target starts as a copy). The target's BatchNorm uses its own batches. Projector and predictor: Linear 4096 with
  bias, BatchNorm, ReLU, Linear 256 without (EquiMod's: without, then with). Raises UserError for another update or decay.
  """
  if update not in ('after', 'before'):
    raise UserError(f'byol.update is {update!r}.', "Give 'after' or 'before' (the forward pass).")
  if not 0. <= decay <= 1.:
    raise UserError(f'byol.decay is {decay}.', 'Give the share of the average that stays, from 0 to 1, as in .996.')
  return Invariance(lambda embeddings: 4. - 2. * towards_other('byol', embeddings).mean(), HEAD, HEAD, decay, update)

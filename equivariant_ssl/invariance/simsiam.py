"""SimSiam (Chen & He 2021): BYOL without a moving average.

The stopped gradient and the predictor suffice.
"""
from equivariant_ssl.invariance.byol import sum_cosines
from equivariant_ssl.types import Array, Embeddings, Invariance


def make(fixed_predictor_rate: bool = True) -> Invariance:
  """SimSiam: -1/2 [cos(p1, sg z2) + cos(p2, sg z1)], the mean over B.

  sg stops the gradient. The projector is 2048-2048-2048 with a last BatchNorm without affine. The
  predictor is 2048-512-2048, and its last layer has a bias and no norm.

  fixed_predictor_rate: the predictor's learning rate stays at its peak, while the rest follows the
                        schedule.
  """
  def loss(embeddings: Embeddings) -> Array:
    return -.5 * sum_cosines('simsiam', embeddings).mean()

  return Invariance(
      loss,
      projector={'hidden': (2048, 2048), 'out': 2048, 'last_norm': 'batch_noaffine'},
      predictor={'hidden': (512,), 'out': 2048, 'last_bias': True},
      constant=('predictor',) if fixed_predictor_rate else ())

"""SimSiam (Chen & He 2021): BYOL without a moving average; the stopped gradient and the predictor suffice."""
from equivariant_ssl.invariance.byol import towards_other
from equivariant_ssl.types import Invariance


def make(fixed_predictor_rate: bool = True) -> Invariance:
  """-1/2 [cos(p1, sg z2) + cos(p2, sg z1)], the mean over B.

  fixed_predictor_rate: the predictor's learning rate stays at its peak while the rest follows the schedule. Projector
  2048-2048-2048 with a last BatchNorm without affine; predictor 2048-512-2048, its last layer with a bias and no norm.
  """
  return Invariance(
      lambda embeddings: -.5 * towards_other('simsiam', embeddings).mean(),
      projector={'hidden': (2048, 2048), 'out': 2048, 'last_norm': 'batch_noaffine'},
      predictor={'hidden': (512,), 'out': 2048, 'last_bias': True},
      constant=('predictor',) if fixed_predictor_rate else ())

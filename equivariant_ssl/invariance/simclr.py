"""SimCLR (Chen et al. 2020): the two views of an image find each other among those of the batch."""
from equivariant_ssl.errors import UserError
from equivariant_ssl.losses import info_nce, nt_xent, two_views
from equivariant_ssl.types import Array, Embeddings, Invariance


def make(temperature: float = .5, negatives: str = 'all', scale: float = 1.) -> Invariance:
  """SimCLR: NT-Xent between two views, the mean over 2B anchors, times `scale`.

  negatives: 'all' other views, 2B - 2 of them (the paper's), or 'cross', the B - 1 of the other
             view alone (E-SSL's code).
  scale:     1 is the paper's mean. SimCLR's code sums the means of the two views, which is 2.

  The projector is EquiMod's: 2048-2048-128, with a last BatchNorm without affine. Raises UserError
  for other negatives.
  """
  if negatives not in ('all', 'cross'):
    raise UserError(f"simclr.negatives is {negatives!r}, neither 'all' nor 'cross'.",
                    "Give 'all' (2B - 2 negatives) or 'cross' (B - 1 negatives).")

  def loss(embeddings: Embeddings) -> Array:
    a, b = two_views('simclr', embeddings.projected)
    if negatives == 'all':
      return scale * nt_xent(a, b, temperature)
    return scale * (info_nce(a, b, temperature) + info_nce(b, a, temperature)) / 2.

  projector = {'hidden': (2048, 2048), 'out': 128, 'last_norm': 'batch_noaffine'}
  return Invariance(loss, projector=projector)

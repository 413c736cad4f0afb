"""SimCLR (Chen et al. 2020): the two views of an image find each other among all views of the batch."""
from equivariant_ssl.losses import nt_xent
from equivariant_ssl.types import Array, Embeddings, Invariance


def make(temperature: float = .5) -> Invariance:
  """NT-Xent between two views, 2B - 2 negatives; the mean over 2B anchors (the paper's; SimCLR's own code sums
  the two views' means and so is twice this). The projector is EquiMod's: 2048-2048-128, last BatchNorm without
  affine."""
  def loss(embeddings: Embeddings) -> Array:
    z_BVE = embeddings.projected
    if z_BVE.shape[1] != 2:
      raise ValueError(f'simclr compares 2 views, got {z_BVE.shape[1]}')
    return nt_xent(z_BVE[:, 0], z_BVE[:, 1], temperature)

  return Invariance(loss, projector={'hidden': (2048, 2048), 'out': 128, 'last_norm': 'batch_noaffine'})

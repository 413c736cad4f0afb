"""Health of a representation, without labels: how many dimensions it uses, and where it puts views
and images."""
import itertools
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from scipy.linalg import eigh
from scipy.special import logsumexp

from equivariant_ssl.errors import UserError
from equivariant_ssl.evaluate.features import check_finite, in_batches
from equivariant_ssl.evaluate.linear import one_thread
from equivariant_ssl.evaluate.statistics import row_blocks, std_of_columns
from equivariant_ssl.losses import spread
from equivariant_ssl.types import Array

EPS = 1e-7       # added to the shares of RankMe and LiDAR, as published
DELTA = 1e-4     # LiDAR's ridge on the within-object scatter, as published
PAIRS = 2 ** 24  # similarities at once: 64 MiB
SMALLEST = 1e-5  # a dimension of a smaller std, as a share of the largest, is dead


class Health(NamedTuple):
  """The health of a representation.

  rankme: the effective rank of the features, 1 to D. lidar: the same for the views, 1 to E (None
  without views). alignment: 0 to 4 (None without views). uniformity: 0 at collapse, near -4 on an
  even sphere (None for one image). std: 0 at collapse, near 1 on an even sphere. dead: the share of
  dimensions that never change. spectrum: the singular values [D], falling.
  """
  rankme: float
  lidar: float | None
  alignment: float | None
  uniformity: float | None
  std: float
  dead: float
  spectrum: np.ndarray


def unit_vectors(x: np.ndarray) -> np.ndarray:
  """Return x / |x| over the last axis, float64; a zero vector stays zero."""
  x = np.asarray(x, np.float64)
  length = np.linalg.norm(x, axis=-1, keepdims=True)
  return x / np.where(length > 0, length, 1.)


def spectrum(features: np.ndarray) -> np.ndarray:
  """Return the singular values [D] of features [N D], falling; zeros where N < D.

  The features are taken as they are, not centered.
  """
  N, D = features.shape
  with one_thread():
    x = np.zeros((0, D))
    for rows in row_blocks(N):  # a triangular factor has the singular values of the rows so far
      x = np.concatenate([x, np.asarray(features[rows], np.float64)])
      x = np.asarray(np.linalg.qr(x, mode='r')) if len(x) > D else x
    values = np.linalg.svd(x, compute_uv=False)
  return np.pad(values, (0, D - len(values)))


def _effective_rank(values: np.ndarray) -> float:
  """Return exp of the entropy of the shares of `values` [D] >= 0; 0 where all are 0."""
  total = values.sum()
  if total <= 0:
    return 0.
  share = values / total + EPS
  return float(np.exp(-np.sum(share * np.log(share))))


def rankme(features: np.ndarray) -> float:
  """Return RankMe (Garrido et al. 2023, eq. 3) of features [N D].

  It is exp of the entropy of the singular values' shares.
  """
  return _effective_rank(spectrum(features))


def lidar(views: np.ndarray, delta: float = DELTA) -> float:
  """Return LiDAR (Thilak et al. 2023) of V views of each of N images [N V E].

  It is exp of the entropy of the eigenvalues' shares of Sw^-1/2 Sb Sw^-1/2, where Sb is the scatter
  of the images' means, and Sw the scatter of views about their image's mean + delta I.

  It is at most N - 1. delta is absolute: embeddings of another scale have another LiDAR. Raises
  UserError for fewer than 2 images or views.
  """
  N, V, E = views.shape
  if min(N, V) < 2:
    raise UserError(f'LiDAR of {V} views of {N} images is not defined.',
                    'It needs two images or more, and two views of each or more.')
  means, within = np.zeros((N, E)), np.zeros((E, E))
  with one_thread():
    for rows in row_blocks(N):
      x = np.asarray(views[rows], np.float64)
      means[rows] = x.mean(1)
      about = (x - means[rows, None, :]).reshape(-1, E)
      within += about.T @ about
    between = means - means.mean(0)
    # The generalized problem has the same eigenvalues, without the root.
    values = eigh(between.T @ between / N, within / (N * V) + delta * np.eye(E),
                  eigvals_only=True)
  return _effective_rank(np.maximum(values, 0.))


def alignment(views: np.ndarray) -> float:
  """Return the mean squared distance of the unit vectors of an image's views [N V E], over all
  pairs of views (Wang & Isola 2020)."""
  pairs = list(itertools.combinations(range(views.shape[1]), 2))
  if not pairs:
    raise UserError('Alignment of one view is not defined.', 'It needs two views of each image.')

  def distances(rows: slice) -> np.ndarray:
    z = unit_vectors(views[rows])
    return np.stack([np.sum((z[:, v] - z[:, w]) ** 2, axis=1) for v, w in pairs])
  blocks = [distances(rows) for rows in row_blocks(len(views))]
  return float(np.mean([pair.mean() for pair in np.concatenate(blocks, axis=1)]))


def _log_potential(bank: Array, rows: tuple[Array, Array]) -> Array:
  """Return the log of the sum over other rows z' of the bank [N E] of exp(-2 |z - z'|^2) [b].

  rows: z [b E] and its index in the bank [b].
  """
  z, index = rows
  cosines = jnp.einsum('be,ne->bn', z, bank, precision='highest')
  itself = jnp.arange(bank.shape[0])[None, :] == index[:, None]
  logits = jnp.where(itself, -jnp.inf, 4. * cosines - 4.)  # |z - z'|^2 = 2 - 2 cos
  most = logits.max(1)
  return most + jnp.log(jnp.exp(logits - most[:, None]).sum(1))


def uniformity(z: np.ndarray) -> float:
  """Return the log of the mean over all pairs of exp(-2 |z - z'|^2) of unit vectors (Wang & Isola
  2020).

  z: [N E] of different images, N >= 2. It is computed in chunks: no array is N x N.
  """
  N = len(z)
  if N < 2:
    raise UserError('Uniformity of one image is not defined.', 'It needs two images.')
  z = np.concatenate([unit_vectors(z[rows]).astype(np.float32) for rows in row_blocks(N)])
  rows = z, np.arange(N, dtype=np.int32)
  logs = in_batches(Partial(_log_potential, jnp.asarray(z)), rows, max(1, min(N, 1024, PAIRS // N)))
  return float(logsumexp(logs.astype(np.float64)) - np.log(N) - np.log(N - 1))


def health(features: np.ndarray, views: np.ndarray | None = None) -> Health:
  """Return the Health of features [N D].

  views: embeddings [N V E] of V augmented views of each image, for lidar, alignment and uniformity.
  Uniformity is that of the first view, or, without views, that of the features. Raises UserError
  where a number is not finite.
  """
  features = np.asarray(features)
  check_finite(features)
  if views is not None:
    check_finite(np.asarray(views).reshape(len(views), -1))
  values = spectrum(features)
  std = std_of_columns(features)
  dead = std <= SMALLEST * std.max()
  first, view_lidar, view_alignment = features, None, None
  if views is not None:
    first = views[:, 0]
    if views.shape[1] > 1 and len(views) > 1:
      view_lidar, view_alignment = lidar(views), alignment(views)
  return Health(_effective_rank(values), view_lidar, view_alignment,
                uniformity(first) if len(first) > 1 else None,
                float(spread(jnp.asarray(features))), float(dead.mean()), values)

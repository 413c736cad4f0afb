"""How near an augmentation acts on features as a rotation does (Gupta et al. 2024); for any
network, without a predictor."""
from typing import NamedTuple

import numpy as np

from equivariant_ssl.errors import UserError
from equivariant_ssl.evaluate.features import check_finite
from equivariant_ssl.evaluate.health import unit_vectors
from equivariant_ssl.evaluate.linear import one_thread
from equivariant_ssl.evaluate.statistics import Interval, interval


class Wahba(NamedTuple):
  """error: min |R F - F_a|_Fro over rotations R. relative: error / |F_a|_Fro.

  Both are 0 where the action is a rotation and where the features ignore it: read them beside
  gamma.
  """
  error: float
  relative: float


class Care(NamedTuple):
  """Wahba's error and relative error, and gamma, over actions. Lower is nearer a rotation."""
  error: Interval
  relative: Interval
  gamma: Interval


def _checked(before: np.ndarray, after: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  before, after = np.asarray(before, np.float64), np.asarray(after, np.float64)
  if before.ndim != 2 or before.shape != after.shape:
    raise ValueError('expected features [n d] before and after one action, '
                     f'got {before.shape} and {after.shape}')
  return before, after


def _triangular(a: np.ndarray) -> np.ndarray:
  """Return the triangular factor R of a = Q R."""
  return np.asarray(np.linalg.qr(a, mode='r'))


def wahba(before: np.ndarray, after: np.ndarray) -> Wahba:
  """Return Wahba's error of one action on features [n d] of the same n images before and after it:

    min over R in SO(d) of |R F - F_a|_Fro with F, F_a [d n]; its square is
    |F|^2 + |F_a|^2 - 2 x the sum of s.

  s are the singular values of F_a F^T; the least has the sign of the determinant. n < d leaves R
  free on the rest of the space, where nothing is compared: errors of different n or d are not
  comparable.
  """
  f, f_a = _checked(before, after)
  n, d = f.shape
  with one_thread():
    if n < d:
      # The same singular values, of a smaller matrix; the others are 0, and so is the determinant.
      product = _triangular(f_a.T) @ _triangular(f.T).T
      s, sign = np.linalg.svd(product, compute_uv=False), 1.
    else:
      product = f_a.T @ f
      s, sign = np.linalg.svd(product, compute_uv=False), np.linalg.slogdet(product)[0]
  if sign < 0:
    s[-1] *= -1
  size = np.sum(f_a ** 2)
  error = float(np.sqrt(max(np.sum(f ** 2) + size - 2 * s.sum(), 0.)))
  return Wahba(error, error / float(np.sqrt(size)) if size > 0 else 0.)


def _distances(x: np.ndarray) -> np.ndarray:
  """Return the squared distances [n n] between the rows of x [n d]."""
  with one_thread():
    gram = x @ x.T
  square = np.diag(gram)
  return square[:, None] + square[None, :] - 2 * gram


def gamma(before: np.ndarray, after: np.ndarray, cap: float = 1.) -> float:
  """Return the relative rotational equivariance of one action, on features f [n d] of n images
  before it and f_a after it.

  It is the mean, over all pairs of images x != x', of the ratio (inside the mean, as published)

    (|f_a(x') - f_a(x)|^2 - |f(x') - f(x)|^2)^2 / (|f_a(x') - f(x')|^2 + |f_a(x) - f(x)|^2)^2.

  An orthogonal map has 0. Features that ignore the action give 0 / 0, which counts as 1; features
  that nearly ignore it give ratios without bound as published (cap=inf), so here a ratio counts for
  `cap` at most, and 1 is the worst. Raises UserError for fewer than 2 images.
  """
  f, f_a = _checked(before, after)
  n = len(f)
  if n < 2:
    raise UserError(f'{n} images make no pair.', 'Measure on two images or more.')
  change = np.sum((f_a - f) ** 2, axis=1)
  denominator = (change[:, None] + change[None, :]) ** 2
  numerator = (_distances(f_a) - _distances(f)) ** 2
  ratio = np.divide(numerator, denominator, out=np.ones((n, n)), where=denominator > 0)
  return float(np.minimum(ratio, cap)[~np.eye(n, dtype=bool)].mean())


def over_actions(before: np.ndarray, after: np.ndarray, sphere: bool = True) -> Care:
  """Return the measures with 95 % intervals over G actions, each applied to all of n images.

  before: features [n d]. after: features [G n d] after each action. sphere: whether features are
  made unit vectors, as the paper's are; False leaves them as they are. Raises UserError where a
  feature is not finite.
  """
  before, after = np.asarray(before), np.asarray(after)
  if after.ndim != 3 or after.shape[1:] != before.shape:
    raise ValueError(f'expected features [n d] and [G n d], got {before.shape} and {after.shape}')
  for values in (before, *after):
    check_finite(values)
  if sphere:
    # All in one array: rounding is the same, so that no change is exactly 0.
    every = unit_vectors(np.concatenate([before[None], after]))
    before, after = every[0], every[1:]
  errors = [wahba(before, changed) for changed in after]
  return Care(interval([w.error for w in errors]), interval([w.relative for w in errors]),
              interval([gamma(before, changed) for changed in after]))

"""Least squares over the runs of a study, and Holm's correction for many contrasts."""
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from equivariant_ssl.evaluate.statistics import CONFIDENCE

POWER = .8  # the probability with which a study sees its smallest detectable difference


class LeastSquares(NamedTuple):
  """A least-squares fit.

  coefficients [P]. covariance [P P] of the coefficients, None without residual degrees of
  freedom. freedom: the number of residual degrees of freedom. span [P P]: the projection onto
  what the rows of the design span.
  """
  coefficients: np.ndarray
  covariance: np.ndarray | None
  freedom: int
  span: np.ndarray

  def determines(self, weights: np.ndarray) -> bool:
    """Return whether the rows determine weights [P] times the coefficients."""
    return bool(np.allclose(self.span @ weights, weights, atol=1e-6))


class Estimate(NamedTuple):
  """An estimated difference: the fields of an Effect that a fit gives.

  low, high: the ends of its 95 % interval. smallest: the difference that such a study sees four
  times in five. p: the two-sided p-value of no difference. All four are None where the runs leave
  no noise to measure. n: the number of seeds.
  """
  mean: float
  low: float | None
  high: float | None
  n: int
  smallest: float | None
  p: float | None


def fit(design: np.ndarray, values: np.ndarray) -> LeastSquares:
  """Fit values [N] on a design [N P]; where several fits are best, return the shortest one."""
  square = design.T @ design
  inverse = np.linalg.pinv(square, hermitian=True)
  freedom = len(values) - int(np.linalg.matrix_rank(design))
  coefficients = inverse @ (design.T @ values)
  noise = ((values - design @ coefficients) ** 2).sum() / freedom if freedom > 0 else None
  covariance = None if noise is None else noise * inverse
  return LeastSquares(coefficients, covariance, freedom, inverse @ square)


def estimate(fitted: LeastSquares, weights: np.ndarray, n: int) -> Estimate:
  """Estimate weights [P] times the coefficients of a fit over n seeds."""
  mean = float(weights @ fitted.coefficients)
  if fitted.covariance is None:
    return Estimate(mean, None, None, n, None, None)
  error = float(np.sqrt(max(weights @ fitted.covariance @ weights, 0.)))
  half, power = (float(stats.t.ppf(q, fitted.freedom)) for q in ((1 + CONFIDENCE) / 2, POWER))
  p = 2 * float(stats.t.sf(abs(mean) / error, fitted.freedom)) if error else float(mean == 0.)
  return Estimate(mean, mean - half * error, mean + half * error, n, (half + power) * error, p)


def holm(p: Sequence[float]) -> list[float]:
  """Correct p-values [N] for their number, however they depend on each other (Holm 1979)."""
  order = np.argsort(p, kind='stable')
  stepped = np.maximum.accumulate(np.asarray(p, float)[order] * np.arange(len(p), 0, -1))
  corrected = np.empty(len(p))
  corrected[order] = np.minimum(stepped, 1.)
  return corrected.tolist()


def seed_columns(seeds: Sequence[int]) -> np.ndarray:
  """Return a column for each seed but the first, [N S - 1]: what a seed adds to every arm.

  In a fit these columns take the noise away that pairing by seed takes away.
  """
  levels = sorted(set(seeds))[1:]
  rows = [[float(seed == level) for level in levels] for seed in seeds]
  return np.array(rows).reshape(len(seeds), len(levels))

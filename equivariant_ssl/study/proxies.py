"""Smaller budgets as proxies: how well they order the arms of a study as the full budget does."""
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from equivariant_ssl.evaluate.statistics import CONFIDENCE
from equivariant_ssl.study.effects import Effect, Values


class Proxy(NamedTuple):
  """How well a share `budget` of the full budget predicts what the full budget finds.

  rank: Spearman's rank correlation between the arms' mean read-outs at both budgets. low, high:
  its 95 % interval (Bonett & Wright 2000), or None. n: the number of arms. signs: the share of the
  effects which exclude zero at the full budget whose sign is the same, or None. repeat: the rank
  correlation that a repetition of the full budget with other seeds would reach, None for one seed.
  effects: the rank correlation between the effects at both budgets, or None.
  """
  budget: float
  readout: str
  rank: float
  low: float | None
  high: float | None
  n: int
  signs: float | None
  repeat: float | None = None
  effects: float | None = None


def expected_repeat(values: Values) -> float | None:
  """Return the rank correlation to expect between the arms' means and those of other seeds.

  It is the mean over pairs of seeds, raised to as many seeds as there are (Spearman & Brown 1910);
  0 where the seeds disagree, None for one seed.
  """
  by_seed = {seed: {arm: value for arm, other, value in values if other == seed}
             for _, seed, _ in values}
  correlations = []
  for one, other in itertools.combinations(by_seed.values(), 2):
    names = [name for name in one if name in other]
    correlation = rank_correlation([one[name] for name in names], [other[name] for name in names])
    correlations += [] if correlation is None else [correlation]
  r, n = max(float(np.mean(correlations)), 0.) if correlations else 0., len(by_seed)
  return n * r / (1 + (n - 1) * r) if correlations else None


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float | None:
  """Return Spearman's rank correlation; None for fewer than three pairs, or one constant side."""
  if len(a) < 3 or len(set(a)) == 1 or len(set(b)) == 1:
    return None
  result: Any = stats.spearmanr(a, b)  # scipy's type of it has no fields
  return float(result.statistic)


def compare_budgets(budget: float, readout: str, short: dict[str, float], full: dict[str, float],
                    short_effects: list[Effect], full_effects: list[Effect],
                    repeat: float | None = None) -> Proxy | None:
  """Compare a share `budget` of the full budget with all of it.

  short, full: {arm: mean read-out} at the share and at the full budget. Returns None where fewer
  than three arms have both, or where all arms of one are equal.
  """
  names = [name for name in full if name in short]
  rank = rank_correlation([short[name] for name in names], [full[name] for name in names])
  low, high = None, None
  if rank is None:
    return None
  if len(names) > 3 and abs(rank) < 1:
    half = float(stats.norm.ppf((1 + CONFIDENCE) / 2)) * np.sqrt(
        (1 + rank * rank / 2) / (len(names) - 3))
    low, high = float(np.tanh(np.arctanh(rank) - half)), float(np.tanh(np.arctanh(rank) + half))
  short_means = {(effect.aug, effect.contrast): effect.mean for effect in short_effects}
  both = [(short_means[effect.aug, effect.contrast], effect) for effect in full_effects
          if (effect.aug, effect.contrast) in short_means]
  signs = [(mean > 0) == (effect.mean > 0) for mean, effect in both if effect.excludes_zero]
  return Proxy(budget, readout, rank, low, high, len(names),
               float(np.mean(signs)) if signs else None, repeat,
               rank_correlation([mean for mean, _ in both], [effect.mean for _, effect in both]))

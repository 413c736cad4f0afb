"""What a study says: least squares over its runs, contrasts with intervals, and a sentence an augmentation."""
from typing import NamedTuple

import numpy as np
from scipy import stats

from equivariant_ssl.evaluate.statistics import CONFIDENCE
from equivariant_ssl.study.design import BITS, FIELDS, Arm, factors, terms

POWER = .8  # of the smallest difference that a study could have seen
PAIRS = (('invariant', 'off'), ('sensitive', 'off'), ('sensitive', 'invariant'), ('both', 'invariant'))
POINTS = {'linear': 'linear accuracy', 'knn': 'kNN accuracy', 'few': 'accuracy on five labels a class'}


class Effect(NamedTuple):
  """A difference of a read-out, as a fraction, with its 95 % interval (None where the runs leave no noise to measure), over
  `n` seeds. smallest: the difference that such a study sees four times in five."""
  aug: str
  contrast: str
  readout: str
  mean: float
  low: float | None
  high: float | None
  n: int
  smallest: float | None
  sentence: str = ''


class Fit(NamedTuple):
  """coefficients [P] of a least-squares fit, their covariance [P P] (None without residual freedom), and that freedom."""
  coefficients: np.ndarray
  covariance: np.ndarray | None
  freedom: int


def fit(X: np.ndarray, y: np.ndarray) -> Fit:
  """Least squares of y [N] on X [N P] of full rank."""
  freedom = len(y) - X.shape[1]
  inverse = np.linalg.inv(X.T @ X)
  coefficients = inverse @ (X.T @ y)
  noise = ((y - X @ coefficients) ** 2).sum() / freedom if freedom > 0 else None
  return Fit(coefficients, None if noise is None else noise * inverse, freedom)


def contrast(of: Fit, weights: np.ndarray, n: int) -> tuple[float, float | None, float | None, int, float | None]:
  """(mean, low, high, n, smallest to be seen) of weights [P] times the coefficients: fields of an Effect over n seeds."""
  mean = float(weights @ of.coefficients)
  if of.covariance is None:
    return mean, None, None, n, None
  error = float(np.sqrt(max(weights @ of.covariance @ weights, 0.)))
  sure, power = (float(stats.t.ppf(q, of.freedom)) for q in ((1 + CONFIDENCE) / 2, POWER))
  return mean, mean - sure * error, mean + sure * error, n, (sure + power) * error


def _seeds(seeds: list[int]) -> np.ndarray:
  """[N S - 1]: what a seed adds in every arm: the noise that pairing takes away."""
  levels = sorted(set(seeds))[1:]
  return np.array([[float(s == level) for level in levels] for s in seeds]).reshape(len(seeds), len(levels))


def single(arms: list[Arm], runs: list[tuple[str, int, float]], readout: str) -> list[Effect]:
  """One augmentation at a time: the differences PAIRS of its roles, each between two arms, paired by seed, the noise of
  (arm, seed) pooled over all arms. runs: (arm's name, seed, value) of those that are done."""
  names = [a.name for a in arms if any(r[0] == a.name for r in runs)]
  if len(names) < 2:
    return []
  column = np.array([[float(arm == n) for n in names] for arm, _, _ in runs])
  found = fit(np.concatenate([column, _seeds([s for _, s, _ in runs])], axis=1), np.array([v for *_, v in runs]))
  labels = list(dict.fromkeys(a.objective for a in arms if a.objective)) or ['']
  out, several = [], len(labels) > 1
  for aug in arms[0].roles:
    for label in labels:
      def arm_of(role: str, aug=aug, label=label) -> str | None:
        same = [a for a in arms if a.roles == {**arms[0].roles, aug: role} and a.objective in ('', label)]
        return next((a.name for a in same if a.name in names), None)
      for better, worse in PAIRS:
        first, second = arm_of(better), arm_of(worse)
        shared = {s for n, s, _ in runs if n == first} & {s for n, s, _ in runs if n == second}
        if first is None or second is None or not shared:
          continue
        weights = np.zeros(len(found.coefficients))
        weights[names.index(first)], weights[names.index(second)] = 1., -1.
        what = f'{better} - {worse}' + (f' ({label})' if several and better != 'invariant' else '')
        out.append(Effect(aug, what, readout, *contrast(found, weights, len(shared))))
  return list({(e.aug, e.contrast): e for e in out}.values())


def crossed(arms: list[Arm], roles: tuple[str, ...], interactions: tuple[tuple[str, str], ...],
            runs: list[tuple[str, int, float]], readout: str) -> list[Effect]:
  """A factorial's main effects: of being seen, of being told, each averaged over all else, and sensitive - invariant as told
  less seen; and the chosen interactions, the difference that one makes to the effect of the other."""
  if not runs:
    return []
  augs, by = tuple(arms[0].roles), {a.name: a for a in arms}
  varying, _ = factors(augs, roles)
  wanted = terms(varying, interactions)
  bits = np.array([[BITS[by[arm].roles[a]][FIELDS.index(b)] - .5 for a, b in varying] for arm, _, _ in runs])
  columns = [bits[:, t].prod(1) for t in wanted]
  X = np.concatenate([np.ones((len(runs), 1)), np.stack(columns, axis=1), _seeds([s for _, s, _ in runs])], axis=1)
  if len(runs) < X.shape[1] or np.linalg.matrix_rank(X) < X.shape[1]:
    return []  # not enough of the design is done
  found, n = fit(X, np.array([v for *_, v in runs])), len({s for _, s, _ in runs})
  unit = lambda t: np.eye(X.shape[1])[1 + wanted.index(t)]
  place = {f: (i,) for i, f in enumerate(varying)}
  out = []
  for aug in augs:
    for bit, words in (('seen', 'seen - unseen'), ('told', 'told - untold')):
      if (aug, bit) in place:
        out.append(Effect(aug, words, readout, *contrast(found, unit(place[aug, bit]), n)))
    if (aug, 'seen') in place and (aug, 'told') in place:
      out.append(Effect(aug, 'sensitive - invariant', readout,
                        *contrast(found, unit(place[aug, 'told']) - unit(place[aug, 'seen']), n)))
  for pair, term in zip(interactions, wanted[len(varying):], strict=True):
    out.append(Effect(pair[0].split('.')[0], ' x '.join(pair), readout, *contrast(found, unit(term), n)))
  return out


def seeds(n: int) -> str:
  return f'{n} seed{"s" if n > 1 else ""}'


def sentence(e: Effect) -> str:
  """An effect in words: which is better and by how much, or what could have been seen."""
  first, _, second = e.contrast.partition(' - ')
  points = f'points of {POINTS.get(e.readout, e.readout)}'
  if not second:
    return f'{e.aug}: the interaction {first} is {100 * e.mean:+.1f} {points} ({seeds(e.n)})'
  if e.low is None:
    return f'{e.aug}: {first} and {second} differ by {100 * e.mean:+.1f} {points} ({seeds(e.n)}: no interval)'
  if e.low <= 0 <= e.high:
    return (f'{e.aug}: no difference seen between {first} and {second}; the smallest that this study could have seen is '
            f'{100 * e.smallest:.1f} {points} ({seeds(e.n)})')
  if e.mean < 0:
    first, second = second, first
  return f'{e.aug}: {first} beats {second} by {100 * abs(e.mean):.1f} ± {50 * (e.high - e.low):.1f} {points} ({seeds(e.n)})'


def verdict(found: list[Effect]) -> list[str]:
  """What being an invariance does, worst first, in a line each: of the augmentations that cost, that help, and that show no
  difference. found: the effects on one read-out."""
  seen = sorted((e for e in found if e.contrast in ('invariant - off', 'seen - unseen') and e.low is not None),
                key=lambda e: e.mean)
  kinds = (('Should not be invariances, for as such they cost', lambda e: e.high < 0),
           ('May be invariances, for as such they add to', lambda e: e.low > 0),
           ('No difference seen, as invariances, to', lambda e: e.low <= 0 <= e.high))
  out = []
  for words, of in kinds:
    named = [f'{e.aug} ({100 * e.mean:+.1f} [{100 * e.low:.1f}, {100 * e.high:.1f}])' for e in seen if of(e)]
    out += [f'{words} {POINTS.get(seen[0].readout, seen[0].readout)}: {", ".join(named)}'] if named else []
  return out


class Proxy(NamedTuple):
  """What a share `budget` of the full one would have told: Spearman's rank correlation over `n` arms of their mean read-out,
  with its 95 % interval (Bonett & Wright 2000), and of the effects that exclude zero at the full budget the share whose sign
  was the same."""
  budget: float
  readout: str
  rank: float
  low: float | None
  high: float | None
  n: int
  signs: float | None


def proxy(budget: float, readout: str, short: dict[str, float], full: dict[str, float], signs: list[bool]) -> Proxy | None:
  """short, full: {arm: mean read-out}. None where fewer than three arms are in both, or all of one are alike."""
  names = [n for n in full if n in short]
  a, b = ([of[n] for n in names] for of in (short, full))
  if len(names) < 3 or len(set(a)) == 1 or len(set(b)) == 1:
    return None
  r, low, high = float(stats.spearmanr(a, b).statistic), None, None
  if len(names) > 3 and abs(r) < 1:
    half = float(stats.norm.ppf((1 + CONFIDENCE) / 2)) * np.sqrt((1 + r * r / 2) / (len(names) - 3))
    low, high = float(np.tanh(np.arctanh(r) - half)), float(np.tanh(np.arctanh(r) + half))
  return Proxy(budget, readout, r, low, high, len(names), float(np.mean(signs)) if signs else None)

"""What a study says: least squares over its runs, contrasts with intervals, and a sentence an augmentation."""
import itertools
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
  `n` seeds. smallest: the difference that such a study sees four times in five. p: of no difference, two-sided. mixed: of a
  factorial's interaction, those that its runs cannot tell from it. split: the images of the read-out. holm: p, corrected for
  all contrasts of the study."""
  aug: str
  contrast: str
  readout: str
  mean: float
  low: float | None
  high: float | None
  n: int
  smallest: float | None
  p: float | None = None
  mixed: tuple[str, ...] = ()
  split: str = 'test'
  holm: float | None = None
  sentence: str = ''


class Fit(NamedTuple):
  """coefficients [P] of a least-squares fit, their covariance [P P] (None without residual freedom), that freedom, and
  what the rows span, as a projection [P P]."""
  coefficients: np.ndarray
  covariance: np.ndarray | None
  freedom: int
  span: np.ndarray

  def tells(self, weights: np.ndarray) -> bool:
    """Whether the rows say what weights [P] times the coefficients are."""
    return bool(np.allclose(self.span @ weights, weights, atol=1e-6))


def fit(X: np.ndarray, y: np.ndarray) -> Fit:
  """Least squares of y [N] on X [N P], the shortest where several are."""
  square = X.T @ X
  inverse = np.linalg.pinv(square, hermitian=True)
  freedom = len(y) - np.linalg.matrix_rank(X)
  coefficients = inverse @ (X.T @ y)
  noise = ((y - X @ coefficients) ** 2).sum() / freedom if freedom > 0 else None
  return Fit(coefficients, None if noise is None else noise * inverse, freedom, inverse @ square)


def contrast(of: Fit, weights: np.ndarray, n: int
             ) -> tuple[float, float | None, float | None, int, float | None, float | None]:
  """(mean, low, high, n, smallest to be seen, p) of weights [P] times the coefficients: fields of an Effect over n seeds."""
  mean = float(weights @ of.coefficients)
  if of.covariance is None:
    return mean, None, None, n, None, None
  error = float(np.sqrt(max(weights @ of.covariance @ weights, 0.)))
  sure, power = (float(stats.t.ppf(q, of.freedom)) for q in ((1 + CONFIDENCE) / 2, POWER))
  p = 2 * float(stats.t.sf(abs(mean) / error, of.freedom)) if error else float(mean == 0.)
  return mean, mean - sure * error, mean + sure * error, n, (sure + power) * error, p


def holm(p: list[float]) -> list[float]:
  """p-values [N] corrected for their number, whatever ties them to each other (Holm 1979)."""
  order = np.argsort(p, kind='stable')
  stepped = np.maximum.accumulate(np.asarray(p, float)[order] * np.arange(len(p), 0, -1))
  out = np.empty(len(p))
  out[order] = np.minimum(stepped, 1.)
  return out.tolist()


def corrected(found: list[Effect]) -> list[Effect]:
  """`found`, all contrasts of a study, each with its correction and its sentence."""
  of = iter(holm([e.p for e in found if e.p is not None]))
  out = [e._replace(holm=None if e.p is None else next(of)) for e in found]
  return [e._replace(sentence=sentence(e)) for e in out]


def by_seed(seeds: list[int]) -> np.ndarray:
  """[N S - 1]: what a seed adds in every arm: the noise that pairing takes away."""
  levels = sorted(set(seeds))[1:]
  return np.array([[float(s == level) for level in levels] for s in seeds]).reshape(len(seeds), len(levels))


def _labels(arms: list[Arm]) -> list[str]:
  """Of the arms' objectives, once each; '' where there is none."""
  return list(dict.fromkeys(a.objective for a in arms if a.objective)) or ['']


def single(arms: list[Arm], runs: list[tuple[str, int, float]], readout: str) -> list[Effect]:
  """One augmentation at a time: the differences PAIRS of its roles, each between two arms, paired by seed, the noise of
  (arm, seed) pooled over all arms. runs: (arm's name, seed, value) of those that are done."""
  names = [a.name for a in arms if any(r[0] == a.name for r in runs)]
  if len(names) < 2:
    return []
  column = np.array([[float(arm == n) for n in names] for arm, _, _ in runs])
  found = fit(np.concatenate([column, by_seed([s for _, s, _ in runs])], axis=1), np.array([v for *_, v in runs]))
  out, labels = {}, _labels(arms)
  for aug in arms[0].roles:
    for label in labels:
      def arm_of(role: str, aug=aug, label=label) -> Arm | None:
        same = [a for a in arms if a.roles == {**arms[0].roles, aug: role} and a.objective in ('', label)]
        return max((a for a in same if a.name in names), key=lambda a: a.objective == label, default=None)
      for better, worse in PAIRS:
        first, second = arm_of(better), arm_of(worse)
        if first is None or second is None:
          continue
        shared = {s for n, s, _ in runs if n == first.name} & {s for n, s, _ in runs if n == second.name}
        weights = np.zeros(len(found.coefficients))
        weights[names.index(first.name)], weights[names.index(second.name)] = 1., -1.
        what = f'{better} - {worse}' + (f' ({label})' if len(labels) > 1 and (first.objective or second.objective) else '')
        if shared and found.tells(weights):
          out[aug, what] = Effect(aug, what, readout, *contrast(found, weights, len(shared)))
  return list(out.values())


def crossed(arms: list[Arm], roles: tuple[str, ...], interactions: tuple[tuple[str, str], ...],
            runs: list[tuple[str, int, float]], readout: str) -> list[Effect]:
  """A factorial's main effects: of being seen, of being told, each averaged over all else, and sensitive - invariant as told
  less seen; and the chosen interactions, the difference that one makes to the effect of the other. Of several objectives,
  each with the arms that are told nothing."""
  labels, out = _labels(arms), []
  for label in labels:
    own = [a for a in arms if a.objective in ('', label)]
    names = {a.name for a in own}
    found = _crossed(own, roles, interactions, [r for r in runs if r[0] in names], readout)
    out += [e._replace(contrast=f'{e.contrast} ({label})') for e in found] if len(labels) > 1 else found
  return out


def _crossed(arms: list[Arm], roles: tuple[str, ...], interactions: tuple[tuple[str, str], ...],
             runs: list[tuple[str, int, float]], readout: str) -> list[Effect]:
  if not runs:
    return []
  augs, by = tuple(arms[0].roles), {a.name: a for a in arms}
  varying, _ = factors(augs, roles)
  wanted = terms(varying, interactions)
  bits_of = lambda names: np.array([[BITS[by[n].roles[a]][FIELDS.index(b)] - .5 for a, b in varying] for n in names])
  bits = bits_of(arm for arm, _, _ in runs)
  columns = [bits[:, t].prod(1) for t in wanted]
  X = np.concatenate([np.ones((len(runs), 1)), np.stack(columns, axis=1), by_seed([s for _, s, _ in runs])], axis=1)
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
  whole, names = bits_of(by), ['.'.join(f) for f in varying]
  for pair, term in zip(interactions, wanted[len(varying):], strict=True):
    mixed = tuple(f'{names[i]} x {names[j]}' for i, j in itertools.combinations(range(len(varying)), 2)
                  if {i, j} != set(term) and abs(whole[:, (i, j)].prod(1) @ whole[:, term].prod(1)) > 1e-6)
    out.append(Effect(pair[0].split('.')[0], ' x '.join(pair), readout, *contrast(found, unit(term), n), mixed))
  return out


def seeds(n: int) -> str:
  return f'{n} seed{"s" if n > 1 else ""}'


def points(readout: str) -> str:
  """What a read-out measures."""
  return POINTS.get(readout, readout)


def chance(p: float | None) -> str:
  """A corrected p-value in words, after what is said before it in brackets; nothing where there is none."""
  return '' if p is None else f', Holm p {f"= {p:.2g}" if p >= .001 else "< .001"}'


def sentence(e: Effect) -> str:
  """An effect in words: which is better and by how much, or what could have been seen."""
  first, _, second = e.contrast.partition(' - ')
  of, n = f'points of {points(e.readout)} on {e.split}', f'{seeds(e.n)}{chance(e.holm)}'
  if not second:
    within = '' if e.low is None else f' [{100 * e.low:.1f}, {100 * e.high:.1f}]'
    mixed = f', or it is of {", or of ".join(e.mixed)}: this design cannot tell' if e.mixed else ''
    return f'{e.aug}: the interaction {first} is {100 * e.mean:+.1f}{within} {of} ({n}){mixed}'
  if e.low is None:
    return f'{e.aug}: {first} and {second} differ by {100 * e.mean:+.1f} {of} ({seeds(e.n)}: no interval)'
  if e.low <= 0 <= e.high:
    return (f'{e.aug}: no difference seen between {first} and {second}; the smallest that this study could have seen is '
            f'{100 * e.smallest:.1f} {of} ({n})')
  if e.mean < 0:
    first, second = second, first
  return f'{e.aug}: {first} beats {second} by {100 * abs(e.mean):.1f} ± {50 * (e.high - e.low):.1f} {of} ({n})'


def verdict(found: list[Effect]) -> list[str]:
  """What being an invariance does, worst first, in a line each: of the augmentations that cost, that help, and that show no
  difference. found: the effects on one read-out."""
  parts = lambda e: e.contrast.partition(' (')  # of one objective of several: its label in brackets
  seen = sorted((e for e in found if parts(e)[0] in ('invariant - off', 'seen - unseen') and e.low is not None),
                key=lambda e: e.mean)
  kinds = (('Should not be invariances, for as such they cost', lambda e: e.high < 0),
           ('May be invariances, for as such they add to', lambda e: e.low > 0),
           ('No difference seen, as invariances, to', lambda e: e.low <= 0 <= e.high))
  out = []
  for words, of in kinds:
    named = [f'{e.aug}{"".join(parts(e)[1:])} ({100 * e.mean:+.1f} [{100 * e.low:.1f}, {100 * e.high:.1f}]{chance(e.holm)})'
             for e in seen if of(e)]
    out += [f'{words} {points(seen[0].readout)} on {seen[0].split}: {", ".join(named)}'] if named else []
  return out


def caution(found: list[Effect]) -> list[str]:
  """How many of the intervals exclude zero, how many would by chance alone, and how many do after Holm's correction."""
  told = [e for e in found if e.low is not None]
  clear = sum(not e.low <= 0 <= e.high for e in told)
  return [f'{clear} of {len(told)} intervals of 95 % exclude zero; where nothing mattered, about '
          f'{(1 - CONFIDENCE) * len(told):.0f} would. After Holm\'s correction for all {len(told)}, '
          f'{sum(e.holm is not None and e.holm <= 1 - CONFIDENCE for e in told)} are clear.'] if told else []


class Proxy(NamedTuple):
  """What a share `budget` of the full one would have told: Spearman's rank correlation over `n` arms of their mean read-out,
  with its 95 % interval (Bonett & Wright 2000) and what a `repeat` of the full budget with other seeds would reach (None of
  one seed); the same correlation over the `effects`; and of those that exclude zero at the full budget the share whose sign
  was the same."""
  budget: float
  readout: str
  rank: float
  low: float | None
  high: float | None
  n: int
  signs: float | None
  repeat: float | None = None
  effects: float | None = None


def repeated(runs: list[tuple[str, int, float]]) -> float | None:
  """The rank correlation to be expected between the arms' means over the seeds of `runs` and those over as many others: of
  pairs of seeds, the mean, raised to that many (Spearman & Brown 1910). None of one seed; 0 where seeds disagree."""
  by = {s: {a: v for a, seed, v in runs if seed == s} for _, s, _ in runs}
  found = []
  for one, other in itertools.combinations(by.values(), 2):
    names = [n for n in one if n in other]
    r = _rank(*([of[n] for n in names] for of in (one, other)))
    found += [] if r is None else [r]
  r, n = max(float(np.mean(found)), 0.) if found else 0., len(by)
  return n * r / (1 + (n - 1) * r) if found else None


def _rank(a: list[float], b: list[float]) -> float | None:
  """Spearman's; None of fewer than three, or where all of one are alike."""
  if len(a) < 3 or len(set(a)) == 1 or len(set(b)) == 1:
    return None
  return float(stats.spearmanr(a, b).statistic)


def proxy(budget: float, readout: str, short: dict[str, float], full: dict[str, float], early: list[Effect],
          said: list[Effect], repeat: float | None = None) -> Proxy | None:
  """short, full: {arm: mean read-out}; early, said: the effects. None where fewer than three arms are in both, or all of one
  are alike."""
  names = [n for n in full if n in short]
  r, low, high = _rank([short[n] for n in names], [full[n] for n in names]), None, None
  if r is None:
    return None
  if len(names) > 3 and abs(r) < 1:
    half = float(stats.norm.ppf((1 + CONFIDENCE) / 2)) * np.sqrt((1 + r * r / 2) / (len(names) - 3))
    low, high = float(np.tanh(np.arctanh(r) - half)), float(np.tanh(np.arctanh(r) + half))
  was = {(e.aug, e.contrast): e.mean for e in early}
  both = [(was[e.aug, e.contrast], e) for e in said if (e.aug, e.contrast) in was]
  signs = [(mean > 0) == (e.mean > 0) for mean, e in both if e.low is not None and not e.low <= 0 <= e.high]
  return Proxy(budget, readout, r, low, high, len(names), float(np.mean(signs)) if signs else None, repeat,
               _rank([mean for mean, _ in both], [e.mean for _, e in both]))

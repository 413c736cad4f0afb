"""The effects of a study: differences between the roles of an augmentation, with intervals."""
import itertools
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from equivariant_ssl.study import contrasts
from equivariant_ssl.study.design import FACTORS, LEVELS, Arm, factors, terms
from equivariant_ssl.study.least_squares import estimate, fit, seed_columns

# The roles that a study of one augmentation at a time compares.
PAIRS = (('invariant', 'off'), ('sensitive', 'off'), ('sensitive', 'invariant'),
         ('both', 'invariant'))

Values = list[tuple[str, int, float]]  # (the arm's name, seed, value of one read-out) of each run


class Effect(NamedTuple):
  """A difference of a read-out, as a fraction, between two settings of an augmentation.

  low, high: its 95 % interval, None where the runs leave no noise to measure. n: the number of
  seeds. smallest: the difference that such a study sees four times in five. p: the two-sided
  p-value of no difference. mixed: the other interactions that the runs of a factorial design
  cannot tell from this one. split: the images of the read-out. holm: p, corrected for all
  contrasts of the study. sentence: the effect in words.
  """
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

  @property
  def excludes_zero(self) -> bool:
    """Whether there is an interval and 0 lies outside it."""
    return self.low is not None and self.high is not None and not self.low <= 0 <= self.high


def _objective_labels(arms: list[Arm]) -> list[str]:
  """Return each label of the arms' objectives once; [''] where no arm has an objective."""
  return list(dict.fromkeys(arm.objective for arm in arms if arm.objective)) or ['']


def _arm_with(arms: list[Arm], finished: list[str], aug: str, role: str, label: str) -> Arm | None:
  """Return the arm that differs from the base in at most the role of `aug`.

  An arm with the objective `label` is preferred to one without an objective. None where no such
  arm has a finished run.
  """
  roles = {**arms[0].roles, aug: role}
  candidates = [arm for arm in arms if arm.roles == roles and arm.objective in ('', label)
                and arm.name in finished]
  return max(candidates, key=lambda arm: arm.objective == label, default=None)


def one_at_a_time_effects(arms: list[Arm], values: Values, readout: str) -> list[Effect]:
  """Return the differences PAIRS between the roles of each augmentation.

  Each is a difference between two arms, paired by seed; the noise of (arm, seed) is pooled over
  all arms. values: the values of the finished runs.
  """
  names = [arm.name for arm in arms if any(name == arm.name for name, *_ in values)]
  if len(names) < 2:
    return []
  columns = np.array([[float(arm == name) for name in names] for arm, *_ in values])
  design = np.concatenate([columns, seed_columns([seed for _, seed, _ in values])], axis=1)
  fitted = fit(design, np.array([value for *_, value in values]))
  effects, labels = {}, _objective_labels(arms)
  for aug, label, (better, worse) in itertools.product(arms[0].roles, labels, PAIRS):
    first, second = (_arm_with(arms, names, aug, role, label) for role in (better, worse))
    if first is None or second is None:
      continue
    first_seeds, second_seeds = ({seed for name, seed, _ in values if name == arm.name}
                                 for arm in (first, second))
    shared = first_seeds & second_seeds
    weights = np.zeros(len(fitted.coefficients))
    weights[names.index(first.name)], weights[names.index(second.name)] = 1., -1.
    contrast = f'{better} - {worse}'
    if len(labels) > 1 and (first.objective or second.objective):
      contrast = contrasts.with_objective(contrast, label)
    if shared and fitted.determines(weights):
      estimated = estimate(fitted, weights, len(shared))
      effects[aug, contrast] = Effect(aug, contrast, readout, *estimated)
  return list(effects.values())


def factorial_effects(arms: list[Arm], roles: tuple[str, ...],
                      interactions: tuple[tuple[str, str], ...], values: Values,
                      readout: str) -> list[Effect]:
  """Return the effects of a factorial design.

  The main effects are those of an augmentation as an invariance, and of it in the equivariance,
  each averaged over everything else; 'sensitive - invariant' is the second less the first. The
  chosen interactions say how much one factor changes the effect of the other. Where there are
  several objectives, each has effects of its own, from its arms and those without an objective.
  """
  labels, effects = _objective_labels(arms), []
  for label in labels:
    same = [arm for arm in arms if arm.objective in ('', label)]
    names = {arm.name for arm in same}
    part = _effects_of_one_objective(same, roles, interactions,
                                     [row for row in values if row[0] in names], readout)
    if len(labels) > 1:
      part = [effect._replace(contrast=contrasts.with_objective(effect.contrast, label))
              for effect in part]
    effects += part
  return effects


def _levels(arms: Iterable[Arm], varying: list[tuple[str, str]]) -> np.ndarray:
  """Return the levels, -.5 or .5, of the `varying` factors in each arm: [arms factors]."""
  return np.array([[LEVELS[arm.roles[aug]][FACTORS.index(factor)] - .5 for aug, factor in varying]
                   for arm in arms])


def _effects_of_one_objective(arms: list[Arm], roles: tuple[str, ...],
                              interactions: tuple[tuple[str, str], ...], values: Values,
                              readout: str) -> list[Effect]:
  if not values:
    return []
  augs, by_name = tuple(arms[0].roles), {arm.name: arm for arm in arms}
  varying, _ = factors(augs, roles)
  effect_terms = terms(varying, interactions)
  levels = _levels((by_name[name] for name, *_ in values), varying)
  columns = np.stack([levels[:, list(term)].prod(1) for term in effect_terms], axis=1)
  seeds = [seed for _, seed, _ in values]
  design = np.concatenate([np.ones((len(values), 1)), columns, seed_columns(seeds)], axis=1)
  if len(values) < design.shape[1] or np.linalg.matrix_rank(design) < design.shape[1]:
    return []  # not enough of the design is done
  fitted, n = fit(design, np.array([value for *_, value in values])), len(set(seeds))
  # the weights that pick the coefficient of each term, whose column follows that of the mean
  unit = {term: np.eye(design.shape[1])[1 + i] for i, term in enumerate(effect_terms)}
  main = {factor: unit[i,] for i, factor in enumerate(varying)}
  effects = []

  def add(aug: str, contrast: str, weights: np.ndarray, mixed: tuple[str, ...] = ()) -> None:
    effects.append(Effect(aug, contrast, readout, *estimate(fitted, weights, n), mixed))
  for aug in augs:
    for factor in FACTORS:
      if (aug, factor) in main:
        add(aug, contrasts.main_effect(factor), main[aug, factor])
    if all((aug, factor) in main for factor in FACTORS):
      invariant, sensitive = (main[aug, factor] for factor in FACTORS)
      add(aug, 'sensitive - invariant', sensitive - invariant)
  design_levels = _levels(by_name.values(), varying)
  for pair, term in zip(interactions, effect_terms[len(varying):], strict=True):
    add(pair[0].split('.')[0], contrasts.interaction(pair), unit[term],
        _confounded(design_levels, term, varying))
  return effects


def _confounded(levels: np.ndarray, term: tuple[int, ...],
                varying: list[tuple[str, str]]) -> tuple[str, ...]:
  """Return the interactions of two factors that a design cannot tell from the interaction `term`.

  levels [arms factors]: -.5 or .5, over the whole design.
  """
  product, names = levels[:, list(term)].prod(1), ['.'.join(factor) for factor in varying]
  return tuple(contrasts.interaction((names[i], names[j]))
               for i, j in itertools.combinations(range(len(varying)), 2)
               if {i, j} != set(term) and abs(levels[:, [i, j]].prod(1) @ product) > 1e-6)

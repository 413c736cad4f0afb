"""The arms of a study: which augmentation has which role in each arm, and the arm's config."""
import itertools
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from equivariant_ssl import augment, registry
from equivariant_ssl.config import config_to_json, resolve_config
from equivariant_ssl.dotted import is_dotted, short_name
from equivariant_ssl.errors import UserError
from equivariant_ssl.training.recipe import build_objectives
from equivariant_ssl.types import ROLES

# A role as two levels: whether the augmentation is in the invariance's views, and whether it is
# in the equivariance objective's, which is conditioned on it.
LEVELS = {'off': (0, 0), 'invariant': (1, 0), 'sensitive': (0, 1), 'both': (1, 1)}
FACTORS = ('seen', 'told')  # the two levels' names in --interactions and study.json
ROLE_OF_LEVELS = {levels: role for role, levels in LEVELS.items()}
DESIGNS = ('one-at-a-time', 'factorial')


class Arm(NamedTuple):
  """One setting of a study.

  roles: {augmentation: role} of the studied augmentations. objective: the label of the arm's
  equivariance objectives, '' where it has none.
  """
  name: str
  roles: dict[str, str]
  objective: str = ''


class UsableArm(NamedTuple):
  """An arm that can be trained.

  config: its config as JSON values. predicts: what its equivariance objectives predict.
  """
  arm: Arm
  config: dict[str, Any]
  predicts: set[str | None]


def base_config(config: ConfigDict, augs: tuple[str, ...]) -> ConfigDict:
  """Return `config` with all of the augmentations `augs` in its chain.

  Those that it lacks come last in the chain, with the role off and default settings. `augs` may
  have dotted paths of modules; the config has these ops under their short names.
  """
  values = config_to_json(config)
  for path in augs:
    name = short_name(path) if is_dotted(path) else path
    if name not in values['augment']['order']:
      if name == path and name not in registry.names(augment):
        raise registry.unknown_name('--augs', name, registry.names(augment))
      values['augment']['order'].append(path)
      values['augment'][name] = {'role': 'off'}
  return resolve_config(ConfigDict(values))


def objective_sections(config: ConfigDict, names: tuple[str, ...]) -> dict[str, list]:
  """Return the equivariance sections of the config under study, {label: sections}.

  Each objective of `names` is a label of its own, with the config's settings where it has some.
  Without `names` all objectives of the config are one label.
  """
  sections = config_to_json(config)['equivariance']
  sections = [section for section in (sections if isinstance(sections, list) else [sections])
              if section['name'] != 'none']
  if not names:
    label = ' + '.join(section['name'] for section in sections)
    return {label: sections} if sections else {'equimod': [{'name': 'equimod'}]}
  return {name: [section for section in sections if section['name'] == name] or [{'name': name}]
          for name in names}


def arm_config(config: ConfigDict, arm: Arm, sections: dict[str, list]) -> dict[str, Any]:
  """Return the config of an arm as JSON values: `config` with the arm's roles and objective."""
  values = config_to_json(config)
  for name, role in arm.roles.items():
    values['augment'][name]['role'] = role
  objectives = sections[arm.objective] if arm.objective else [{'name': 'none'}]
  values['equivariance'] = objectives if len(objectives) > 1 else objectives[0]
  return config_to_json(resolve_config(ConfigDict(values)))


def usable_arms(config: ConfigDict, arms: list[Arm],
                sections: dict[str, list]) -> list[UsableArm]:
  """Return the arms as they can be trained.

  An arm loses its objective where the objective can be conditioned on none of the arm's
  augmentations, and no studied augmentation is meant for it (E-SSL beside a crop). Raises
  UserError where a studied augmentation is meant for it: the arm would not be what its name says.
  """
  usable = []
  for arm in arms:
    values = arm_config(config, arm, sections)
    try:
      objectives = build_objectives(resolve_config(ConfigDict(values)), 0)[1]
    except UserError as error:
      sensitive = [aug for aug, role in arm.roles.items() if LEVELS[role][1]]
      if not arm.objective or sensitive:
        fix = (f'Study other augmentations than {", ".join(sensitive)}, or give another '
               '--objective.' if sensitive else '')
        raise UserError(f'arm {arm.name}: {str(error).splitlines()[0]}', fix) from None
      arm = arm._replace(objective='')
      values, objectives = arm_config(config, arm, sections), {}
    predicts = {objective.predicts for objective in objectives.values()}
    usable.append(UsableArm(arm, values, predicts))
  return usable


def one_at_a_time(roles: dict[str, str], arms: tuple[str, ...]) -> list[dict[str, str]]:
  """Return the roles of each arm of a design that changes one augmentation at a time.

  First come the base's `roles`; then each augmentation in each other role of `arms`, the most
  informative roles first.
  """
  order = sorted(arms, key=('invariant', 'sensitive', 'both', 'off').index)
  return [roles, *({**roles, aug: role} for role in order for aug in roles if role != roles[aug])]


def factors(augs: tuple[str, ...],
            arms: tuple[str, ...]) -> tuple[list[tuple[str, str]], tuple[int, int]]:
  """Return the factors that vary, [(augmentation, 'seen' or 'told')], and the fixed levels.

  A factor that does not vary has its fixed level in every arm. Raises UserError where the roles
  `arms` are not all combinations of some levels.
  """
  seen_levels, told_levels = ({LEVELS[role][i] for role in arms} for i in (0, 1))
  combinations = set(itertools.product(seen_levels, told_levels))
  if len(arms) < 2 or {LEVELS[role] for role in arms} != combinations:
    raise UserError(f'--arms {",".join(arms)} makes no factorial design: it needs every '
                    'combination of as an invariance, or not, and in the equivariance, or not.',
                    'e.g. --arms off,invariant,sensitive,both or --arms off,invariant')
  varying = [factor for factor, levels in zip(FACTORS, (seen_levels, told_levels), strict=True)
             if len(levels) == 2]
  fixed = min(seen_levels), min(told_levels)
  return [(aug, factor) for aug in augs for factor in varying], fixed


def terms(varying: list[tuple[str, str]],
          interactions: tuple[tuple[str, str], ...]) -> list[tuple[int, ...]]:
  """Return the columns of each effect: those of one factor, or of the two of an interaction.

  varying: as `factors` returns. interactions: pairs such as ('rotate.seen', 'crop.told').
  """
  names = ['.'.join(factor) for factor in varying]
  for name in itertools.chain(*interactions):
    if name not in names:
      raise registry.unknown_name('--interactions', name, names)
  pairs = [tuple(names.index(name) for name in pair) for pair in interactions]
  return [(i,) for i in range(len(names))] + pairs


def _two_level_design(n: int, effect_terms: list[tuple[int, ...]]) -> np.ndarray:
  """Return the smallest design of pydoe, -1 or 1 [runs n], that tells all effects apart."""
  import pydoe
  for resolution in (4, 5, 6, 7, 8):
    design = pydoe.ff2n(n) if n <= 3 else pydoe.fracfact_by_res(n, resolution)
    columns = [design[:, list(term)].prod(1) for term in effect_terms] + [np.ones(len(design))]
    if np.linalg.matrix_rank(np.stack(columns, axis=1)) == len(columns):
      return design
  raise UserError('no design tells these interactions apart.', 'Ask for fewer --interactions.')


def factorial(augs: tuple[str, ...], arms: tuple[str, ...],
              interactions: tuple[tuple[str, str], ...] = ()) -> list[dict[str, str]]:
  """Return the roles of each arm of a fractional factorial design.

  It is the smallest two-level design of pydoe in which main effects are not confounded with
  interactions of two factors (resolution IV), nor the chosen interactions with each other. Raises
  UserError where there is none.
  """
  varying, fixed = factors(augs, arms)
  design = _two_level_design(len(varying), terms(varying, interactions))
  roles = []
  for row in design > 0:
    levels = {aug: list(fixed) for aug in augs}
    for (aug, factor), on in zip(varying, row, strict=True):
      levels[aug][FACTORS.index(factor)] = int(on)
    roles.append({aug: ROLE_OF_LEVELS[first, second] for aug, (first, second) in levels.items()})
  return roles


def make_arms(config: Any, augs: tuple[str, ...], arms: tuple[str, ...], labels: tuple[str, ...],
              design: str, interactions: tuple[tuple[str, str], ...] = ()) -> list[Arm]:
  """Return the arms of a study; that of the base comes first where it is one of them.

  config: a resolved config that has all of `augs`. arms: the roles to compare. labels: the
  labels of the objectives; an arm without a sensitive augmentation has none.
  """
  for role in arms:
    if role not in ROLES:
      raise registry.unknown_name('--arms', role, ROLES)
  if design not in DESIGNS:
    raise registry.unknown_name('--design', design, DESIGNS)
  if interactions and design != 'factorial':
    raise UserError('--interactions need a factorial design.', 'Add --design factorial.')
  other_roles = [config.augment[name].role for name in config.augment.order if name not in augs]
  base_roles = {aug: config.augment[aug].role for aug in augs}
  every = (one_at_a_time(base_roles, arms) if design == 'one-at-a-time' else
           factorial(augs, arms, interactions))
  result = []
  for roles in every:
    named = {aug: role for aug, role in roles.items()
             if design == 'factorial' or role != base_roles[aug]}
    name = ','.join(f'{aug}={role}' for aug, role in named.items()) or 'base'
    if any(role in ('sensitive', 'both') for role in (*other_roles, *roles.values())):
      result += [Arm(name + (f':{label}' if len(labels) > 1 else ''), roles, label)
                 for label in labels]
    else:
      result.append(Arm(name, roles))
  return result

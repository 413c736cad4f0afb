"""The arms of a study: which augmentation has which role in each, and the config that makes it so."""
import itertools
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from equivariant_ssl import augment, registry
from equivariant_ssl import config as configs
from equivariant_ssl.errors import UserError
from equivariant_ssl.training import recipe
from equivariant_ssl.types import ROLES

BITS = {'off': (0, 0), 'invariant': (1, 0), 'sensitive': (0, 1), 'both': (1, 1)}  # (seen, told)
FIELDS = ('seen', 'told')  # what they are called
ROLE = {bits: role for role, bits in BITS.items()}
DESIGNS = ('one-at-a-time', 'factorial')


class Arm(NamedTuple):
  """roles: of the studied augmentations. objective: the label of the equivariance objectives it has, '' for none."""
  name: str
  roles: dict[str, str]
  objective: str = ''


def base(config: ConfigDict, augs: tuple[str, ...]) -> ConfigDict:
  """`config` with every one of `augs` in it: what it does not have comes last in the chain, off, as its defaults say."""
  for name in augs:
    if name not in registry.names(augment):
      raise registry.unknown_name('--augs', name, registry.names(augment))
  given = configs.as_json(config)
  for name in augs:
    if name not in given['augment']['order']:
      given['augment']['order'].append(name)
      given['augment'][name] = {'role': 'off'}
  return configs.resolve(ConfigDict(given))


def objectives(config: ConfigDict, names: tuple[str, ...]) -> dict[str, list]:
  """{label: the equivariance sections}: a label each of the objectives `names`, as the config has it where it does; (): all
  that the config has, together."""
  given = configs.as_json(config)['equivariance']
  given = [s for s in (given if isinstance(given, list) else [given]) if s['name'] != 'none']
  if not names:
    return {' + '.join(s['name'] for s in given): given} if given else {'equimod': [{'name': 'equimod'}]}
  return {name: [s for s in given if s['name'] == name] or [{'name': name}] for name in names}


def configured(config: ConfigDict, arm: Arm, sections: dict[str, list]) -> dict:
  """The config of an arm, of JSON values: `config` in the arm's roles, with its objective."""
  given = configs.as_json(config)
  for name, role in arm.roles.items():
    given['augment'][name]['role'] = role
  own = sections[arm.objective] if arm.objective else [{'name': 'none'}]
  given['equivariance'] = own if len(own) > 1 else own[0]
  return configs.as_json(configs.resolve(ConfigDict(given)))


def usable(config: ConfigDict, arms: list[Arm], sections: dict[str, list]) -> list[tuple[Arm, dict, set[str | None]]]:
  """The arms, their configs and what their objectives predict. One whose objective can be told nothing, where the studied
  augmentations tell nothing either, has none (E-SSL beside a crop). Raises UserError where they do: it would not be the
  arm that its name says."""
  found = []
  for arm in arms:
    made = configured(config, arm, sections)
    try:
      objectives = recipe.build_objectives(configs.resolve(ConfigDict(made)), 0)[1]
    except UserError as e:
      told = [a for a, role in arm.roles.items() if BITS[role][1]]
      if not arm.objective or told:
        raise UserError(f'arm {arm.name}: {str(e).splitlines()[0]}',
                        f'Study others than {", ".join(told)}, or with another --objective.' if told else '') from None
      arm = arm._replace(objective='')
      made, objectives = configured(config, arm, sections), {}
    found.append((arm, made, {e.predicts for e in objectives.values()}))
  return found


def one_at_a_time(roles: dict[str, str], arms: tuple[str, ...]) -> list[dict[str, str]]:
  """The base's `roles` of the studied augmentations, and each augmentation in each other of the roles `arms`; those that
  say most first."""
  order = sorted(arms, key=('invariant', 'sensitive', 'both', 'off').index)
  return [roles, *({**roles, name: role} for role in order for name in roles if role != roles[name])]


def factors(augs: tuple[str, ...], arms: tuple[str, ...]) -> tuple[list[tuple[str, str]], tuple[int, int]]:
  """The bits that vary, [(augmentation, 'seen' or 'told')], and what (seen, told) are where they do not. Raises UserError
  where `arms` are not all the roles that some bits make."""
  seen, told = ({BITS[a][i] for a in arms} for i in (0, 1))
  if len(arms) < 2 or {BITS[a] for a in arms} != set(itertools.product(seen, told)):
    raise UserError(f'--arms {",".join(arms)} is no factorial: a design needs every combination of seen and told.',
                    'e.g. --arms off,invariant,sensitive,both or --arms off,invariant')
  bits = [b for b, values in zip(FIELDS, (seen, told), strict=True) if len(values) == 2]
  return [(a, b) for a in augs for b in bits], (min(seen), min(told))


def terms(varying: list[tuple[str, str]], interactions: tuple[tuple[str, str], ...]) -> list[tuple[int, ...]]:
  """The columns of each effect: one factor, or the two of an interaction ('rotate.seen', 'crop.told')."""
  names = ['.'.join(f) for f in varying]
  for name in itertools.chain(*interactions):
    if name not in names:
      raise registry.unknown_name('--interactions', name, names)
  return [(i,) for i in range(len(names))] + [tuple(names.index(n) for n in pair) for pair in interactions]


def factorial(augs: tuple[str, ...], arms: tuple[str, ...], interactions: tuple[tuple[str, str], ...] = ()
              ) -> list[dict[str, str]]:
  """The runs of the smallest two-level design that pydoe knows in which main effects are not mixed with interactions of
  two (resolution IV), nor the chosen interactions with each other. Raises UserError where there is none."""
  import pydoe
  varying, still = factors(augs, arms)
  wanted = terms(varying, interactions)
  for resolution in (4, 5, 6, 7, 8):
    n = len(varying)
    design = pydoe.ff2n(n) if n <= 3 else pydoe.fracfact_by_res(n, resolution)
    columns = np.stack([design[:, t].prod(1) for t in wanted] + [np.ones(len(design))], axis=1)
    if np.linalg.matrix_rank(columns) == columns.shape[1]:
      break
  else:
    raise UserError('no design tells these interactions apart.', 'Ask for fewer --interactions.')
  found = []
  for row in design > 0:
    bits = {a: list(still) for a in augs}
    for (name, bit), on in zip(varying, row, strict=True):
      bits[name][FIELDS.index(bit)] = int(on)
    found.append({a: ROLE[tuple(b)] for a, b in bits.items()})
  return found


def make(config: ConfigDict, augs: tuple[str, ...], arms: tuple[str, ...], labels: tuple[str, ...], design: str,
         interactions: tuple[tuple[str, str], ...] = ()) -> list[Arm]:
  """The arms, the base's first where it is one. labels: of the objectives; an arm that is told nothing has none."""
  for role in arms:
    if role not in ROLES:
      raise registry.unknown_name('--arms', role, ROLES)
  if design not in DESIGNS:
    raise registry.unknown_name('--design', design, DESIGNS)
  if interactions and design != 'factorial':
    raise UserError('--interactions are of a factorial design.', 'Add --design factorial.')
  others = {n: config.augment[n].role for n in config.augment.order if n not in augs}
  own = {a: config.augment[a].role for a in augs}
  every = one_at_a_time(own, arms) if design == 'one-at-a-time' else factorial(augs, arms, interactions)
  found = []
  for roles in every:
    changed = {a: r for a, r in roles.items() if design == 'factorial' or r != own[a]}
    name = ','.join(f'{a}={r}' for a, r in changed.items()) or 'base'
    told = any(r in ('sensitive', 'both') for r in {**others, **roles}.values())
    found += [Arm(name + (f':{label}' if told and len(labels) > 1 else ''), roles, label if told else '')
              for label in (labels if told else labels[:1])]
  return found

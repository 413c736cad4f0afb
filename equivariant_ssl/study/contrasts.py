"""The names of a study's contrasts: how they are made, taken apart, and read from older studies."""
import re
from typing import NamedTuple

# A two-level factor says whether an augmentation is used in one place. The keys are the words of
# --interactions ('rotate.seen') and of study.json; the values are the words for a reader.
SETTINGS = {'seen': 'as an invariance', 'told': 'in the equivariance'}
AS_INVARIANCE = f'{SETTINGS["seen"]}: with - without'
IN_EQUIVARIANCE = f'{SETTINGS["told"]}: with - without'
# What older versions of this project wrote into results.json and table.csv.
OLD_NAMES = {'seen - unseen': AS_INVARIANCE,
             'told - untold': f'{SETTINGS["told"]}: with - without'}
OLD_FACTOR = re.compile(rf'(\w+)\.({"|".join(SETTINGS)})\b')
NAME = re.compile(rf'((?P<setting>{"|".join(SETTINGS.values())}): )?(?P<first>.+?)'
                  r'( - (?P<second>.+?))?( \((?P<objective>[^()]*)\))?')


class Contrast(NamedTuple):
  """The parts of a contrast's name.

  setting: where an augmentation is used ('as an invariance'), '' where roles are compared.
  first, second: what is compared; `second` is '' for an interaction of two factors.
  objective: the label of the equivariance objective, '' where the study has only one.
  """
  setting: str
  first: str
  second: str
  objective: str


def main_effect(factor: str) -> str:
  """Return the name of the contrast between the two levels of a factor, 'seen' or 'told'."""
  return f'{SETTINGS[factor]}: with - without'


def factor_phrase(factor: str) -> str:
  """Return a factor ('rotate.seen') in words: 'rotate as an invariance'."""
  augmentation, _, kind = factor.partition('.')
  return f'{augmentation} {SETTINGS[kind]}'


def interaction(factors: tuple[str, str]) -> str:
  """Return the name of the interaction of two factors ('rotate.seen', 'crop.told')."""
  return ' x '.join(map(factor_phrase, factors))


def with_objective(name: str, label: str) -> str:
  """Return a contrast's name with the label of the equivariance objective that it is about."""
  return f'{name} ({label})'


def parse(name: str) -> Contrast:
  """Return the parts of a contrast's name."""
  match = NAME.fullmatch(name)
  if not match:
    return Contrast('', name, '', '')
  return Contrast(*(match[part] or '' for part in Contrast._fields))


def in_todays_words(name: str) -> str:
  """Return a contrast's name, which an older version may have written, in today's words."""
  start, bracket, end = name.partition(' (')
  start = OLD_NAMES.get(start, start)
  return OLD_FACTOR.sub(lambda match: factor_phrase(match[0]), start) + bracket + end

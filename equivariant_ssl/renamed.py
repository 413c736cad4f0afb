"""The names that config fields and values had in older versions, read as today's.

An old run is resumed, and an old command line typed, with the old names. A rule that is another
one today holds on in an old run.
"""
from typing import Any

OBJECTIVE_FIELDS = {'told': 'augmentations'}  # fields of a section of config.equivariance
DATA_FIELDS = {'labelled': 'labeled'}         # fields of config.data, and of a data card
OP_FIELDS = {'quantise': 'quantize'}          # fields of config.augment.jitter and .gray
ERASE_FILLS = {'grey': 'gray'}                # values of config.augment.erase.fill
# {data set: {field: what it means that a config on disk, as an old run left it, lacks the field}}
FORMER_RULES = {'folder': {'test_of': 'all'}}
COMMANDS = {'neighbours': 'neighbors'}        # commands of eqssl


def key(path: str) -> str:
  """Today's name of the config field at `path`, as in 'equivariance.0.told'."""
  section, _, field = path.rpartition('.')
  tables = {'equivariance': OBJECTIVE_FIELDS, 'data': DATA_FIELDS, 'augment': OP_FIELDS}
  field = tables.get(section.split('.')[0], {}).get(field, field)
  return f'{section}.{field}' if section else field


def _fields(section: Any, names: dict[str, str]) -> Any:
  """A section under today's names. names: {old name: today's name}.

  Where a field has its old and its new name, the new one holds. A value that is no section is
  returned as it is.
  """
  if not hasattr(section, 'keys') or not any(old in section for old in names):
    return section
  fields = {names.get(k, k): v for k, v in section.items()}
  return type(section)(fields | {k: v for k, v in section.items() if k not in names})


def objective(section: Any) -> Any:
  """A section of config.equivariance, or several, under today's names."""
  if isinstance(section, (list, tuple)):
    return [objective(s) for s in section]
  return _fields(section, OBJECTIVE_FIELDS)


def data(section: Any) -> Any:
  """The section config.data under today's names."""
  return _fields(section, DATA_FIELDS)


def augmentations(section: Any) -> Any:
  """The section config.augment, under today's names and with today's values."""
  if not hasattr(section, 'keys'):
    return section
  changed = {}
  for name, value in section.items():
    if name == 'second':
      changed[name] = augmentations(value)
    elif name == 'erase' and hasattr(value, 'keys') and value.get('fill') in ERASE_FILLS:
      changed[name] = type(value)({**dict(value.items()), 'fill': ERASE_FILLS[value['fill']]})
    else:
      changed[name] = _fields(value, OP_FIELDS)
  return type(section)(changed)


def config(values: Any) -> Any:
  """A whole config under today's names and with today's values."""
  readers = {'equivariance': objective, 'augment': augmentations, 'data': data}
  return type(values)({k: readers[k](v) if k in readers else v for k, v in values.items()})


def _rules(section: Any) -> dict[str, str]:
  return FORMER_RULES.get(str(section.get('name')), {}) if hasattr(section, 'keys') else {}


def stored(values: dict[str, Any]) -> dict[str, Any]:
  """A config as a file of an old run holds it, under today's names and with the rules it meant."""
  values = config(values)
  rules = _rules(values.get('data'))
  return values | {'data': {**rules, **values['data']}} if rules else values


def rules_to_keep(section: Any, before: Any) -> dict[str, str]:
  """The fields of config.data in which `section` has today's rule, and an old run a former one.

  before: the section `data` of the old run, as `stored` returns it.
  """
  if _rules(section) != _rules(before):
    return {}
  return {k: v for k, v in _rules(before).items() if before.get(k) == v != section.get(k)}


def card(values: Any) -> Any:
  """The JSON object of a data card under today's names."""
  values = _fields(values, DATA_FIELDS)
  if hasattr(values, 'keys') and 'settings' in values:
    values = values | {'settings': data(values['settings'])}
  return values

"""The names that config fields and values had in older versions, read as today's.

An old run is resumed, and an old command line typed, with the old names.
"""
from typing import Any

OBJECTIVE_FIELDS = {'told': 'augmentations'}  # fields of a section of config.equivariance
ERASE_FILLS = {'grey': 'gray'}                # values of config.augment.erase.fill


def key(path: str) -> str:
  """Today's name of the config field at `path`, as in 'equivariance.0.told'."""
  section, _, field = path.rpartition('.')
  if section.split('.')[0] == 'equivariance':
    field = OBJECTIVE_FIELDS.get(field, field)
  return f'{section}.{field}' if section else field


def objective(section: Any) -> Any:
  """A section of config.equivariance, or several, under today's names.

  Where a field has its old and its new name, the new one holds. A value that is no section is
  returned as it is.
  """
  if isinstance(section, (list, tuple)):
    return [objective(s) for s in section]
  if not hasattr(section, 'keys') or not any(old in section for old in OBJECTIVE_FIELDS):
    return section
  fields = {OBJECTIVE_FIELDS.get(k, k): v for k, v in section.items()}
  return type(section)(fields | {k: v for k, v in section.items() if k not in OBJECTIVE_FIELDS})


def augmentations(section: Any) -> Any:
  """The section config.augment, with today's values."""
  if not hasattr(section, 'keys'):
    return section
  changed = {}
  for name, value in section.items():
    if name == 'second':
      changed[name] = augmentations(value)
    elif name == 'erase' and hasattr(value, 'keys') and value.get('fill') in ERASE_FILLS:
      changed[name] = type(value)({**dict(value.items()), 'fill': ERASE_FILLS[value['fill']]})
    else:
      changed[name] = value
  return type(section)(changed)


def config(values: dict) -> dict:
  """A whole config of JSON values under today's names and with today's values."""
  readers = {'equivariance': objective, 'augment': augmentations}
  return {k: readers[k](v) if k in readers else v for k, v in values.items()}

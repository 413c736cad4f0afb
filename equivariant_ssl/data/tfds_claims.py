"""What the metadata of a prepared TFDS data set say, looked at before any of it is believed."""
import json
import os
import re
from typing import Any

from equivariant_ssl.errors import UserError

SAFE = 'tensorflow_datasets.core.features.'


def unsafe_class(value: Any) -> str | None:
  """The first class in a features.json that is not TFDS's own: opening the data would import its module.

  Looks where TFDS does: in the current form, in the legacy one ('type'), and in JSON nested in strings.
  """
  if isinstance(value, list):
    return next(filter(None, map(unsafe_class, value)), None)
  if not isinstance(value, dict):
    return None
  for key, part in value.items():
    if isinstance(part, str):
      if key in ('pythonClassName', 'python_class_name', 'type') and not part.startswith(SAFE):
        return part
      part = json.loads(part) if key in ('json', 'content') else None
    if bad := unsafe_class(part):
      return bad
  return None


def check_counts(builder: Any, split: str) -> None:
  """Raise UserError where the metadata say more records than the files have bytes: room is made for as many as they say."""
  found = builder.info.splits
  for name in (n for n in found if re.search(rf'(^|\+){re.escape(n)}($|[\[+])', split)):
    count, paths = found[name].num_examples, found[name].filepaths
    size = sum(os.path.getsize(p) for p in paths if os.path.exists(p))
    if count > size:
      raise UserError(f'{builder.info.name} {name}: dataset_info.json says {count:,} records, more than the {size:,} '
                      'bytes of its files can hold.', 'Prepare it again.')

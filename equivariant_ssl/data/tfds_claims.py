"""Checks of what the metadata of a prepared TFDS data set claim, before any of it is believed."""
import json
import os
import re
from typing import Any

from equivariant_ssl.errors import UserError

SAFE = 'tensorflow_datasets.core.features.'


def unsafe_class(value: Any) -> str | None:
  """The first class in a features.json that is not TFDS's own, or None.

  TFDS would import the module of such a class when it opens the data. The classes are looked for
  where TFDS looks: in the current form, in the legacy form ('type'), and in JSON that is nested in
  strings.
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
  """Raise UserError where the metadata claim more records than the files have bytes.

  The reader makes room for as many records as the metadata claim.
  """
  splits = builder.info.splits
  for name in (n for n in splits if re.search(rf'(^|\+){re.escape(n)}($|[\[+])', split)):
    count, paths = splits[name].num_examples, splits[name].filepaths
    size = sum(os.path.getsize(path) for path in paths if os.path.exists(path))
    if count > size:
      raise UserError(f'{builder.info.name} {name}: dataset_info.json claims {count:,} records, '
                      f'more than the {size:,} bytes of its files can hold.', 'Prepare it again.')

"""The paths of a study's data, made absolute so that the study goes on from any folder."""
import os
import pathlib
from typing import Any

from equivariant_ssl.evaluate.transfer import DATASETS

FIELDS = ('path', 'root')  # the fields of a config's `data` that are folders
KEYS = ('made', 'overrides', 'root', 'transfer')  # the keys of a plan in which there are paths


def absolute(path: str) -> str:
  """Return an absolute path; '' for '', which stands for the place where data usually are."""
  return os.path.abspath(os.path.expanduser(path)) if path else path


def _data_section(data: dict[str, Any]) -> dict[str, Any]:
  """Return the section `data` of a config of JSON values with absolute paths."""
  data = data | {field: absolute(data[field]) for field in FIELDS if field in data}
  name = data.get('dataset', '')
  if name and pathlib.Path(os.path.expanduser(name), 'dataset_info.json').is_file():
    data['dataset'] = absolute(name)  # named by the folder of one of its versions
  return data


def with_absolute_paths(plan: dict[str, Any]) -> dict[str, Any]:
  """Return a plan in which the paths of all data are absolute.

  A relative path is meant from the current folder. This concerns the data of the arms' configs,
  the overrides that set them, and the data sets and folder of --transfer and --root.
  """
  arms = [arm | {'config': arm['config'] | {'data': _data_section(arm['config']['data'])}}
          for arm in plan['made']]
  data = arms[0]['config']['data']  # the same in every arm
  places = {f'data.{field}': data[field] for field in (*FIELDS, 'dataset') if field in data}
  overrides = {key: places.get(key, text) for key, text in plan['overrides'].items()}
  targets = [absolute(name) if name not in DATASETS and os.path.isdir(os.path.expanduser(name))
             else name for name in plan['transfer']]
  return plan | {'made': arms, 'overrides': overrides, 'root': absolute(plan['root']),
                 'transfer': targets}

"""What a program passes to the library as a config and as data, as the config of a run."""
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from equivariant_ssl import data, registry
from equivariant_ssl.config import config_to_json, load_config, override_config
from equivariant_ssl.data import arrays
from equivariant_ssl.dotted import is_dotted
from equivariant_ssl.errors import UserError
from equivariant_ssl.parallel import processes


def as_text(value: Any) -> str:
  """The value of an override, as a command line has it."""
  value = _plain(value)
  return value if isinstance(value, str) else repr(value)


def _plain(value: Any) -> Any:
  """Paths as text, and arrays and their numbers as Python's own, also in lists and dicts."""
  if isinstance(value, os.PathLike):
    return os.fspath(value)
  if hasattr(value, 'tolist'):
    return value.tolist()
  if isinstance(value, list | tuple):
    return (list if isinstance(value, list) else tuple)(map(_plain, value))
  return {k: _plain(v) for k, v in value.items()} if isinstance(value, dict) else value


def to_config(config: Any, overrides: Mapping[str, Any] | None = None) -> ConfigDict:
  """The resolved config of a name, a file or a ConfigDict, after `overrides` {'a.b': value}."""
  texts = {k: as_text(v) for k, v in (overrides or {}).items()}
  if isinstance(config, str | os.PathLike):
    return load_config(os.fspath(config), texts)
  if not isinstance(config, ConfigDict | Mapping):
    raise UserError(f'a config is a name, a file or a ConfigDict, not a {type(config).__name__}.',
                    "e.g. 'cifar10_quick'")
  copied = config if isinstance(config, ConfigDict) else ConfigDict(dict(config))
  return override_config(copied.copy_and_resolve_references().unlock(), texts)


def config_of_data(config: Any, overrides: Mapping[str, Any], images: Any, workdir: pathlib.Path
                   ) -> tuple[ConfigDict, pathlib.Path | None]:
  """The resolved config that trains on what a user gives as data, and the file written for it.

  Overrides of config.data, such as 'data.test', are about that data.
  """
  if images is None:
    return to_config(config, overrides), None
  if isinstance(config, ConfigDict | Mapping) and 'data' not in config:
    config = {**dict(config.items()), 'data': {'name': 'digits'}}  # only until the data are known
  of_data = {k: v for k, v in overrides.items() if k.startswith('data.')}
  base = to_config(config, {k: v for k, v in overrides.items() if k not in of_data})
  fields, file = _data_fields(base, images, workdir, int(of_data.get('data.size', 0)))
  if not isinstance(images, str | os.PathLike):
    of_data.pop('data.size', None)  # it is that of the canvases in the file
  values = ConfigDict(config_to_json(base) | {'data': fields})
  try:
    return to_config(values, of_data), file
  except UserError:
    if file is not None:
      file.unlink(missing_ok=True)
    raise


def _data_fields(config: Any, images: Any, workdir: pathlib.Path, size: int
                 ) -> tuple[dict[str, Any], pathlib.Path | None]:
  """The section config.data for what a user gives as data, and the file that was written for it.

  size: the side of canvases; 0 for the config's own.
  """
  if not isinstance(images, str | os.PathLike):
    size = size or config.data.get('size', 0) or config.size
    source, before = arrays.to_source(images, size), set(workdir.glob('*.npz'))
    saved = str(arrays.save(source, workdir)) if processes.is_main() else ''
    path = pathlib.Path(processes.gather(saved)[0])
    return {'name': 'arrays', 'path': str(path)}, None if path in before else path
  text = os.fspath(images)
  path = pathlib.Path(text).expanduser()
  if (path / 'dataset_info.json').is_file():
    return {'name': 'tfds', 'dataset': str(path)}, None
  if path.is_dir():
    known = config_to_json(config)['data'] if config.data.name == 'folder' else {}
    return {'size': config.size} | known | {'name': 'folder', 'path': str(path)}, None
  if path.suffix == '.npz':
    return {'name': 'arrays', 'path': str(path)}, None
  if is_dotted(text) or text in registry.names(data):
    return {'name': text}, None
  raise UserError(f'{text!r} is no folder or .npz file here, and no data set that is known.',
                  registry.nearest_name(text, registry.names(data)))

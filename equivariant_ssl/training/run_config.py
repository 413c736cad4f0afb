"""The config of a run: changed values, the place of its data, and what may differ on resuming."""
import os
import pathlib
import shlex
from typing import Any

from ml_collections import ConfigDict

from equivariant_ssl import renamed
from equivariant_ssl.config import config_to_json, resolve_config
from equivariant_ssl.config_fields import FREE
from equivariant_ssl.errors import UserError
from equivariant_ssl.storage import record
from equivariant_ssl.training.recipe import build_ops, objective_sections

DATA_PATH_OPTION = '--data-path DIR'  # the option that says where the data of a run are now


def change_config(config: Any, changes: dict[str, Any]) -> ConfigDict:
  """Return a resolved config with other values of some fields.

  A value that is a dict replaces some fields of its section, such as `data`.
  """
  values = config_to_json(config)
  return resolve_config(ConfigDict(values | {
      k: values[k] | v if isinstance(v, dict) else v for k, v in changes.items()}))


def fit_batch(config: Any, images: int) -> Any:
  """Return the config with a batch of at most `images` training images, a power of two.

  A config that does not allow it (`fit_batch`), or whose batch is not too large, is returned as it
  is.
  """
  if not config.fit_batch or images < 1 or config.batch <= images:
    return config
  return change_config(config, {'batch': 2 ** (images.bit_length() - 1)})


def is_read(config: Any, name: str) -> bool:
  """Return whether an objective of the config reads what the augmentation `name` did.

  E-SSL reads discrete augmentations alone. name: one that is not off.
  """
  readers = {section.name for section in objective_sections(config).values()
             if name in (section.augmentations or config.augment.order)}
  if readers == {'essl'}:
    return build_ops(config, 0, config.size, {})[name][0].choices is not None
  return bool(readers)


def acting_role(config: Any, name: str) -> str:
  """Return the role that an augmentation has in effect.

  `both` is `invariant` where no objective reads the augmentation.
  """
  role = config.augment[name].role
  return 'invariant' if role == 'both' and not is_read(config, name) else role


def check_roles(config: Any) -> None:
  """Raise UserError if an augmentation is sensitive, and no objective of the config reads it."""
  sections = objective_sections(config)
  for name in config.augment.order:
    if config.augment[name].role == 'sensitive' and not is_read(config, name):
      why = ('no objective reads it: their `augmentations` do not name it, or they predict '
             'discrete augmentations alone' if sections else
             'no objective reads it: the equivariance is none')
      raise UserError(f'{name} has the role sensitive, and {why}.',
                      f'e.g. --config.augment.{name}.role=invariant'
                      + ('' if sections else ' or --config.equivariance=equimod'))


def next_command(workdir: str | pathlib.Path, labeled: bool) -> str:
  """Return the command that says what a run has learned. labeled: whether its data have labels.

  Most default protocols of `eqssl eval` need labels. Without them the report shows neighbors.
  """
  return shlex.join(['eqssl', 'eval' if labeled else 'report', str(workdir)])


def place_field(config: Any) -> str | None:
  """Return the field of `config.data` that says where the data are, 'path' or 'root'.

  Data that come with a package have none.
  """
  return next((k for k in ('path', 'root') if k in config.data), None)


def data_flag(config: Any) -> str:
  """Return the command line option that says where the data of a new run are, or ''."""
  field = place_field(config)
  return f'--config.data.{field}=DIR' if field else ''


def longer_flag(config: Any) -> str:
  """Return the command line option that makes a run twice as long."""
  return (f'--config.steps={2 * config.steps}' if config.steps else
          f'--config.epochs={2 * config.epochs:g}')


def free_fields(config: Any, workdir: pathlib.Path, data_known: bool = True) -> tuple[str, ...]:
  """Return the fields in which a config may differ from the config of its run, in `workdir`.

  The place of the data is one of them: the data card of the run says whether the data are others.
  So is a batch that is fitted to the data, until these are known.
  """
  free = (*FREE, 'data.path', 'data.root', 'data.stream', *_added_fields(config, workdir))
  free += ('batch',) * (config.fit_batch and not data_known)
  dataset = config.data.get('dataset')
  info_file = pathlib.Path(dataset or '', 'dataset_info.json').expanduser()
  return (*free, 'data.dataset') if dataset and info_file.is_file() else free


def _added_fields(config: Any, workdir: pathlib.Path) -> tuple[str, ...]:
  """Return the fields that the config.json of `workdir` lacks because an older version wrote it.

  Only fields with their default in `config` are returned, since the old run had the default. The
  result is () if there is no run in `workdir`, or if its config.json cannot be read.
  """
  try:
    values = renamed.stored(record.read_json_object(workdir / 'config.json', ''))
    resolved = record.config_leaves(config_to_json(resolve_config(ConfigDict(values))))
  except (FileNotFoundError, UserError):
    return ()
  written = record.config_leaves(values)
  now = record.config_leaves(config_to_json(config))
  return tuple(k for k in resolved if k not in written and k in now and now[k] == resolved[k])


def keep_rules(config: Any, *folders: pathlib.Path | None) -> ConfigDict:
  """Return the config with the rules of the run that it goes on with, where today's are others.

  folders: of the run, and of the run that it starts from; None for none. The first that holds a run
  counts. A config that is no older run's is returned as it is.
  """
  for folder in filter(None, folders):
    try:
      values = renamed.stored(record.read_json_object(folder / 'config.json', ''))
    except (OSError, UserError):
      continue
    rules = renamed.rules_to_keep(config.data, values.get('data'))
    return change_config(config, {'data': rules}) if rules else config
  return config


def relocate_data(config: Any, path: str) -> Any:
  """Return the config of a run whose data are now in the folder `path`; '' changes nothing.

  Raises UserError if the data of the run are in no folder.
  """
  if not path:
    return config
  field = place_field(config)
  if field is None:
    raise UserError(f'{DATA_PATH_OPTION.replace("DIR", path)}: the data set {config.data.name} '
                    'comes with a package and is in no folder.', 'Leave the option out.')
  folder = pathlib.Path(os.path.abspath(os.path.expanduser(path)))
  if 'dataset' in config.data:
    # A data set may be named by the folder of its version. `path` is that folder, or one above it.
    tails = (pathlib.Path(config.data.dataset).parts[-n:] for n in (1, 2, 3))
    versions = (p for p in (folder, *(folder.joinpath(*t) for t in tails))
                if (p / 'dataset_info.json').is_file())
    field, folder = next((('dataset', p) for p in versions), (field, folder))
  return change_config(config, {'data': {field: str(folder)}})

"""Configs: they are loaded, overridden from the command line, checked, and completed with defaults.

The signatures of the factories are the schema. A resolved config has every field written out.
"""
import importlib.util
import json
import math
import pathlib
import shlex
import sys
from typing import Any

from ml_collections import ConfigDict

from equivariant_ssl import augment, equivariance, invariance, registry, renamed, shipped
from equivariant_ssl.config_fields import (
    CHOICES,
    COSINES,
    HEADS,
    SECTIONS,
    TOP,
    factory_names,
    find_field,
    is_factory,
    section_schema,
    unknown_factory,
)
from equivariant_ssl.config_overrides import (
    apply_overrides,
    name_modules,
    objective_section,
    spell_out,
)
from equivariant_ssl.dotted import EVERY, allow_imports, is_dotted, short_name
from equivariant_ssl.errors import UserError
from equivariant_ssl.nets import mlp
from equivariant_ssl.registry import check_fields, fit, section, unknown_name
from equivariant_ssl.storage import record
from equivariant_ssl.training import optim
from equivariant_ssl.training.factories import op_settings
from equivariant_ssl.types import ROLES


def load_config(name: str, overrides: dict[str, str] | None = None, path: pathlib.Path | None = None
                ) -> ConfigDict:
  """Return the resolved config of a config file, after `overrides` {'a.b': 'text'}.

  name: the path of the file, or the name of one of the shipped configs.
  path: the path of the file, if no user has named it.

  The file runs as a program. Raises UserError on any mistake.
  """
  path = path or shipped.find_config(name)
  spec = importlib.util.spec_from_file_location(f'config_{path.stem}', path)
  if spec is None or spec.loader is None:
    raise UserError(f'config file {str(path)!r} is not a Python file.',
                    f'To go on with a run: eqssl resume {shlex.quote(str(path.parent))}'
                    if path.name == 'config.json' else 'It needs a name that ends in .py.')
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
    config = module.get_config()
    if not isinstance(config, ConfigDict):
      raise TypeError(f'get_config() returned {type(config).__name__}')
  except UserError:
    raise
  except Exception as error:  # the user's file can raise anything
    raise UserError(f'config file {str(path)!r} failed: {type(error).__name__}: {error}',
                    'It needs a function get_config() that returns a ConfigDict.') from error
  return override_config(config.copy_and_resolve_references().unlock(), overrides)


def override_config(config: ConfigDict, overrides: dict[str, str] | None = None) -> ConfigDict:
  """Return the resolved config of an unlocked one, after `overrides` {'a.b': 'text'}.

  Modules that it names by dotted paths are imported: a user has typed the overrides, and named the
  file that the config is from, or it is resolved already. The unlocked config is changed. Raises
  UserError on any mistake.
  """
  with allow_imports(EVERY):
    spell_out(config)
    lines = apply_overrides(config, overrides or {})
    resolved = resolve_config(config)
  for line in lines:
    print(f'eqssl: {line}', file=sys.stderr)
  return resolved


def read_config(path: pathlib.Path) -> ConfigDict:
  """Return the resolved config that a run left in its config.json."""
  fix = 'Restore it from a backup or start a new --workdir.'
  try:
    return resolve_config(ConfigDict(renamed.stored(record.read_json_object(path, fix))))
  except (FileNotFoundError, NotADirectoryError):
    why = 'it is a file' if path.parent.is_file() else 'config.json is missing'
    raise UserError(f'no run in {str(path.parent)!r}: {why}.',
                    'Start one: eqssl train --config NAME --workdir DIR') from None
  except (ValueError, TypeError, AttributeError, RecursionError) as error:  # JSON, but no config
    why = ' '.join(str(error).split())[:150]
    raise UserError(f'{path} is damaged, it is no config: {why}', fix) from error


def config_to_json(config: ConfigDict) -> dict:
  """Return a config as JSON holds it: tuples become lists."""
  return json.loads(config.to_json())


def _factory_section(path: str, package: Any, fields: Any, name: str = '') -> Any:
  """Return the complete section at `path`, which names a factory and its keyword arguments.

  name: the factory, if the section itself has no field `name`.
  """
  known = factory_names(package)
  example = 'role=both' if name else f'name={fields if fields in known else known[0]}'
  text = fields
  if isinstance(text, str) and not name and text not in known:
    raise unknown_factory(path, package, text)
  check_fields(path, fields, f'e.g. --{path}.{example}')
  name = name or fields.get('name')
  if not name:
    raise UserError(f'{path} needs a name.', f'One of: {", ".join(known)}.')
  if not is_factory(package, name):
    raise unknown_factory(path, package, name)
  return ConfigDict(section(path, fields, section_schema(package, name)))


def _optimizer(fields: Any) -> Any:
  """Return the complete section config.optimizer."""
  fields = {'name': 'lars', **fields} if hasattr(fields, 'keys') else fields
  out = _factory_section('config.optimizer', optim, fields)
  if out.cosine not in COSINES:
    raise unknown_name('config.optimizer.cosine', out.cosine, COSINES)
  return out


def _op_section(path: str, fields: Any, name: str) -> Any:
  """Return the complete section at `path` of the op `name`. `module` names that of another package.
  """
  module = fields.get('module') if hasattr(fields, 'keys') else None
  if not module:
    op_section = _factory_section(path, augment, fields, name=name)
  elif not is_dotted(module) or short_name(module) != name or name in registry.names(augment):
    raise UserError(f'{path}.module is {module!r}, which cannot be the op {name!r}.',
                    'An op is called as its module is, the last part of the dotted path, and not '
                    f'as one of these: {", ".join(registry.names(augment))}.')
  else:
    values = {k: v for k, v in fields.items() if k != 'module'}
    op_section = _factory_section(path, augment, ConfigDict(values), name=module)
    op_section.module = module
  del op_section['name']
  return op_section


def _augment(fields: Any) -> Any:
  """Return the complete section config.augment."""
  check_fields('config.augment', fields, 'e.g. --config.augment.crop.role=both')
  fields = ConfigDict(renamed.augmentations(fields))
  name_modules(fields)
  ops = [k for k in fields.keys() if k not in ('order', 'second')]
  order = tuple(short_name(name) if is_dotted(name) else name
                for name in fit('config.augment.order', fields.get('order', ()), ('crop',)))
  if sorted(order) != sorted(ops):
    for name in order:
      if name not in ops and name not in registry.names(augment):
        raise unknown_name('config.augment.order', name, registry.names(augment))
    raise UserError(f'config.augment.order names {list(order)}, '
                    f'but config.augment configures {sorted(ops)}.',
                    'Name each op once in both: a ConfigDict sorts its keys, so the order must be '
                    'given.')
  out: Any = ConfigDict({'order': tuple(order), 'second': {}})
  for op in order:
    op_section = _op_section(f'config.augment.{op}', fields[op], op)
    if op_section.role not in ROLES:
      raise unknown_name(f'config.augment.{op}.role', op_section.role, ROLES)
    out[op] = op_section
  second = fields.get('second', {})  # the changes in the second of the invariance's views
  check_fields('config.augment.second', second, 'e.g. --config.augment.second.blur.p=.1')
  for op, changes in second.items():
    if op not in order:
      raise unknown_name('config.augment.second', op, order)
    complete = section(f'config.augment.second.{op}', changes, op_settings(out[op]))
    out.second[op] = ConfigDict({k: complete[k] for k in changes.keys()})
  return out


def _invariance(fields: Any) -> Any:
  """Return the complete section config.invariance. The head published with it is the default."""
  head = {k: v for k, v in registry.arguments(mlp.make).items() if k != 'dtype'}
  is_section = hasattr(fields, 'keys')
  arguments = {k: v for k, v in fields.items() if k not in HEADS} if is_section else fields
  out = _factory_section('config.invariance', invariance, arguments)
  objective = registry.make(invariance, out.name, **{k: v for k, v in out.items() if k != 'name'})
  for part in HEADS:
    published = getattr(objective, part)
    if published is None and part in fields and fields[part]:
      raise UserError(f'config.invariance.{part} is set, and {out.name} has no {part}.',
                      f'Remove config.invariance.{part}.')
    if published is not None:
      out[part] = section(f'config.invariance.{part}', fields.get(part, {}), {**head, **published})
  return out


def _equivariance(fields: Any, path: str = 'config.equivariance') -> Any:
  """Return the complete section of an equivariance objective, or a tuple of several.

  Its field `augmentations` names the objective's augmentations. () stands for all that have the
  role sensitive or both.
  """
  if isinstance(fields, (list, tuple)):
    return tuple(_equivariance(f, f'{path}.{i}') for i, f in enumerate(fields))
  return _factory_section(path, equivariance, renamed.objective(fields))


def _check_numbers(config: Any) -> None:
  """Raise UserError if numbers of a resolved config do not fit each other."""
  if config.knn_every < 0:
    raise UserError(f'config.knn_every is {config.knn_every}; it must be 0 (never) or epochs.',
                    'e.g. --config.knn_every=10')
  if config.batch % config.accumulate:
    raise UserError(f'config.accumulate is {config.accumulate}: a batch of {config.batch} cannot '
                    'be cut into so many equal parts.',
                    f'e.g. --config.accumulate={math.gcd(config.batch, config.accumulate)}')
  images, groups = config.batch // config.accumulate, config.batchnorm_groups
  possible = [1, *(g for g in range(2, images // 2 + 1) if images % g == 0)]
  if groups not in possible:
    part = f' in {config.accumulate} parts (config.accumulate)' if config.accumulate > 1 else ''
    raise UserError(f'config.batchnorm_groups is {groups}: a batch of {config.batch}{part} cannot '
                    'be cut into so many equal groups of two images or more.',
                    f'e.g. --config.batchnorm_groups={max(g for g in possible if g <= abs(groups))}'
                    if groups else 'One group is the whole batch: --config.batchnorm_groups=1')
  counts = {len(config.mean), len(config.std)}
  if counts not in ({0}, {3}) or min(config.std, default=1.) <= 0:
    raise UserError(f'config.mean is {config.mean} and config.std {config.std}; '
                    'they need three numbers each, or none.',
                    'e.g. --config.mean=.485,.456,.406 --config.std=.229,.224,.225')
  if config.epochs <= 0 and not config.steps:
    raise UserError(f'config.epochs is {config.epochs} and config.steps {config.steps}: '
                    'nothing to train.', 'e.g. --config.epochs=10')


def resolve_config(config: Any) -> ConfigDict:
  """Return the config with every default written out.

  Raises UserError on an unknown field or a wrong type.
  """
  config = {**config, 'data': renamed.data(config.get('data', ConfigDict()))}
  known = {*TOP, *SECTIONS, 'augment'}
  for k in config.keys():
    if k not in known:
      field = find_field(k)
      raise UserError(f'config has no {k!r}.', f'Did you mean --config.{field}=VALUE?'
                      ) if field else unknown_name('config', k, known)
  out: Any = ConfigDict(section('config', {k: v for k, v in config.items() if k in TOP}, TOP))
  for k, choices in CHOICES.items():
    if out[k] not in choices:
      raise unknown_name(f'config.{k}', out[k], choices)
  for k in ('data', 'encoder'):
    out[k] = _factory_section(f'config.{k}', SECTIONS[k], config.get(k, ConfigDict()))
  out.augment = _augment(config.get('augment', ConfigDict()))
  out.invariance = _invariance(objective_section(config.get('invariance', 'simclr')))
  out.equivariance = _equivariance(objective_section(config.get('equivariance', 'none')))
  out.optimizer = _optimizer(config.get('optimizer', ConfigDict()))
  _check_numbers(out)
  return out.lock()

"""Configs: found, overridden from the command line, checked against the factories' signatures, made explicit."""
import ast
import importlib.util
import json
import math
import pathlib
import sys
from typing import Any

from ml_collections import ConfigDict

from equivariant_ssl import augment, data, equivariance, invariance, modules, nets, optim, shard
from equivariant_ssl.errors import UserError
from equivariant_ssl.modules import unknown
from equivariant_ssl.nets import mlp
from equivariant_ssl.types import ROLES

TOP = {
    'seed': 0,              # of the run: initialisation, order, augmentation
    'size': 32,             # side of a view, pixels
    'batch': 256,           # global
    'accumulate': 1,        # parts of the batch that the encoder computes in turn, in the memory of one: see step.encode
    'sharding': 'replicate',  # of the state: or 'fsdp', a shard on each device instead of a copy
    'epochs': 100.,
    'steps': 0,             # > 0: this many steps, whatever the epochs
    'dtype': 'float32',     # or 'bfloat16': what the networks compute in; losses and statistics stay float32
    'mean': (),             # of the inputs, a channel, pixels in [0, 1]; (): the data set's. An imported network has its own
    'std': (),              # the same
    'batchnorm': 'joint',   # statistics over all views of one size; or 'view': a pass for each of the invariance's
    'log_every': 10,        # steps
    'checkpoint_every': 0,  # steps; 0: ten times in the run
    'keep': 2,              # checkpoints
    'tensorboard': False,
    'probe': False,         # train a linear classifier beside, on stopped features, and log its accuracy
    'knn_every': 0.,        # epochs: log kNN accuracy on the test images this often; 0: never
    'on_collapse': 'warn',  # or 'stop': what to do when the embeddings' spread falls under .3 of the sphere's
}
# What may differ on resuming.
FREE = ('log_every', 'checkpoint_every', 'keep', 'tensorboard', 'knn_every', 'on_collapse', 'sharding')
CHOICES = {'dtype': ('float32', 'bfloat16'), 'batchnorm': ('joint', 'view'), 'on_collapse': ('warn', 'stop'),
           'sharding': shard.RULES}
COSINES = ('step', 'epoch')  # how often the rate moves
GIVEN = {augment: 'size', nets: 'dtype'}  # an argument of a package's factories that the recipe fills in, not the config


def folders(name: str = 'configs') -> list[pathlib.Path]:
  """Where a config named without its path is looked for; or a file of `name`: here, in the clone, where it is installed."""
  return [p for p in (pathlib.Path(name), pathlib.Path(__file__).parent.parent / name,
                      pathlib.Path(sys.prefix, 'share/equivariant_ssl', name)) if p.is_dir()]


def load(name: str, overrides: dict[str, str] | None = None) -> ConfigDict:
  """The resolved config of file or name `name` after `overrides` {'a.b': 'text'}; UserError on any mistake."""
  paths = [pathlib.Path(name), *(f / f'{name}.py' for f in folders())]
  path = next((p for p in paths if p.is_file()), None)
  if path is None:
    there = sorted({p.stem for f in folders() for p in f.glob('*.py')})
    raise UserError(f'config file {name!r} not found.', f'Available: {", ".join(there) or "none here"}.')
  spec = importlib.util.spec_from_file_location(f'config_{path.stem}', path)
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
    config = module.get_config()
  except UserError:
    raise
  except Exception as e:  # whatever a user's file can raise
    raise UserError(f'config file {str(path)!r} failed: {type(e).__name__}: {e}',
                    'It needs a function get_config() that returns a ConfigDict.') from e
  config = config.copy_and_resolve_references().unlock()
  _spell_out(config)
  for key, text in (overrides or {}).items():
    _override(config, key, text)
    _spell_out(config)
  return resolve(config)


def read(path: pathlib.Path) -> ConfigDict:
  """The resolved config that a run left in its config.json."""
  try:
    return resolve(ConfigDict(json.loads(path.read_text())))
  except FileNotFoundError:
    raise UserError(f'no run in {str(path.parent)!r}: config.json is missing.',
                    'Start one: eqssl train --config NAME --workdir DIR') from None
  except json.JSONDecodeError as e:
    raise UserError(f'{str(path)!r} is not JSON: {e}', 'Restore it from a backup or start a new --workdir.') from None


def as_json(config: ConfigDict) -> dict:
  """The config as JSON holds it: tuples are lists."""
  return json.loads(config.to_json())


def _named(given: Any) -> Any:
  """An objective given by its name alone, or as a dict, as a section; several as a list of sections."""
  if isinstance(given, (list, tuple)):
    return [_named(g) for g in given]
  given = {'name': given} if isinstance(given, str) else given
  return ConfigDict(given) if isinstance(given, dict) else given


def _spell_out(config: ConfigDict) -> None:
  for k in ('invariance', 'equivariance'):
    if k in config:
      named = _named(config[k])
      del config[k]  # the type of a field may not change otherwise
      config[k] = named


def _child(node: Any, part: str) -> Any:
  if isinstance(node, list):
    return node[int(part)] if part.isdigit() and int(part) < len(node) else None
  return node.get(part)


def _override(config: ConfigDict, key: str, text: str) -> None:
  """Set the field at path `key` ('a.b'; 'a.0.b' of the first of several) to what `text` says."""
  *path, last = key.split('.')
  node, seen = config, 'config'
  for part in path:
    inner = _child(node, part)
    if not isinstance(inner, (ConfigDict, list)):
      raise unknown(seen, part, {*TOP, *config.keys()} if node is config else
                    map(str, range(len(node))) if isinstance(node, list) else
                    [k for k, v in node.items() if isinstance(v, ConfigDict)])
    node, seen = inner, f'{seen}.{part}'
  try:
    value = ast.literal_eval(text)
  except (ValueError, SyntaxError):
    value = tuple(t.strip() for t in text.split(',')) if ',' in text else text
  if isinstance(node, list):
    raise UserError(f'--config.{key} does not say which of the {len(node)} it means.', f'e.g. --{seen}.0.{last}={text}')
  if last in node:  # replaced, not merged: the type is checked by resolve, with a message of ours
    del node[last]
  node[last] = ConfigDict(value) if isinstance(value, dict) else value


def _fit(path: str, value: Any, default: Any) -> Any:
  """`value` as the type of `default`, or a UserError."""
  if isinstance(default, tuple):
    if isinstance(value, (list, tuple)):
      kind = default[0] if default else None
      return tuple(_fit(f'{path}[{i}]', v, kind) if kind is not None else v for i, v in enumerate(value))
    if default and type(value) is type(default[0]):
      return (value,)
  elif isinstance(default, bool):
    if isinstance(value, bool):
      return value
  elif isinstance(default, float):
    if isinstance(value, (int, float)) and not isinstance(value, bool):
      return float(value)
  elif isinstance(default, int):
    if isinstance(value, int) and not isinstance(value, bool):
      return value
    if isinstance(value, float) and value == int(value):
      return int(value)
  elif isinstance(default, str):
    if isinstance(value, str):
      return value
    if isinstance(value, (int, float)) and path.endswith(('.path', '.root')):
      return str(value)
  else:
    return value
  raise UserError(f'{path} is {value!r}; it needs a {type(default).__name__}, like {default!r}.',
                  f'e.g. --{path}={default!r}')


def _section(path: str, given: Any, schema: dict[str, Any]) -> ConfigDict:
  """`given` over the defaults of `schema`, every value of its default's type."""
  if not isinstance(given, (dict, ConfigDict)):
    raise UserError(f'{path} is {given!r}; it needs fields.', f'It has: {", ".join(sorted(schema))}.')
  for k in given.keys():
    if k not in schema:
      raise unknown(path, k, schema)
  return ConfigDict({k: _fit(f'{path}.{k}', given[k], d) if k in given else d for k, d in schema.items()})


def _module(path: str, package: Any, given: Any, extra: dict[str, Any] | None = None, name: str = '') -> ConfigDict:
  """A section that names a factory of `package` and its keyword arguments."""
  if not isinstance(given, (dict, ConfigDict)):
    raise UserError(f'{path} is {given!r}; it needs fields.', f'e.g. --{path}.name={modules.names(package)[0]}')
  name = name or given.get('name')
  if not name:
    raise UserError(f'{path} needs a name.', f'One of: {", ".join(modules.names(package))}.')
  if name not in modules.names(package):
    raise unknown(path, name, modules.names(package))
  schema = {k: v for k, v in modules.schema(package, name).items() if k != GIVEN.get(package)}
  return _section(path, given, {'name': name, **schema, **(extra or {})})


def _optimizer(given: ConfigDict) -> ConfigDict:
  name = given.get('name', 'lars')
  if name not in optim.OPTIMIZERS:
    raise unknown('config.optimizer', name, optim.OPTIMIZERS)
  out = _section('config.optimizer', given, {
      'name': name, 'lr': 1., 'warmup_epochs': 10., 'end': 0., 'cosine': 'step',
      **{k: v for k, v in modules.arguments(optim.OPTIMIZERS[name]).items() if k != 'schedule'}})
  if out.cosine not in COSINES:
    raise unknown('config.optimizer.cosine', out.cosine, COSINES)
  return out


def _augment(given: ConfigDict) -> ConfigDict:
  ops = [k for k in given.keys() if k not in ('order', 'second')]
  order = _fit('config.augment.order', given.get('order', ()), ('crop',))
  if sorted(order) != sorted(ops):
    for name in order:
      if name not in modules.names(augment):
        raise unknown('config.augment.order', name, modules.names(augment))
    raise UserError(f'config.augment.order names {list(order)}, but config.augment configures {sorted(ops)}.',
                    'Each op once in both: a ConfigDict sorts its keys, so the order must be said.')
  out = ConfigDict({'order': tuple(order), 'second': {}})
  for op in order:
    out[op] = _module(f'config.augment.{op}', augment, given[op], {'role': 'invariant'}, name=op)
    del out[op]['name']
    if out[op].role not in ROLES:
      raise unknown(f'config.augment.{op}.role', out[op].role, ROLES)
  for op, changes in given.get('second', {}).items():  # what differs in the second of the invariance's views
    if op not in order:
      raise unknown('config.augment.second', op, order)
    fields = {k: v for k, v in out[op].items() if k != 'role'}
    whole = _section(f'config.augment.second.{op}', changes, fields)
    out.second[op] = ConfigDict({k: whole[k] for k in changes.keys()})
  return out


def _invariance(given: Any) -> ConfigDict:
  head = {k: v for k, v in modules.arguments(mlp.make).items() if k != 'dtype'}
  own = {k: v for k, v in given.items() if k not in ('projector', 'predictor')}
  out = _module('config.invariance', invariance, own)
  published = modules.make(invariance, out.name, **{k: v for k, v in out.items() if k != 'name'})
  for part in ('projector', 'predictor'):
    base = getattr(published, part)
    if base is None and part in given and given[part]:
      raise UserError(f'config.invariance.{part}: {out.name} has none.', f'Remove config.invariance.{part}.')
    if base is not None:
      out[part] = _section(f'config.invariance.{part}', given.get(part, {}), {**head, **base})
  return out


def _equivariance(given: Any) -> Any:
  """One objective, or several. told: the names of the ops it is told, of those whose roles tell any; (): all of them."""
  if isinstance(given, (list, tuple)):
    return tuple(_equivariance(g) for g in given)
  return _module('config.equivariance', equivariance, given, {'told': ()})


def resolve(config: ConfigDict) -> ConfigDict:
  """The same config with every default written out; UserError on an unknown field or a wrong type."""
  sections = {'data': data, 'encoder': nets}
  known = {*TOP, *sections, 'augment', 'invariance', 'equivariance', 'optimizer'}
  for k in config.keys():
    if k not in known:
      raise unknown('config', k, known)
  out = _section('config', {k: v for k, v in config.items() if k in TOP}, TOP)
  for k, choices in CHOICES.items():
    if out[k] not in choices:
      raise unknown(f'config.{k}', out[k], choices)
  for k, package in sections.items():
    out[k] = _module(f'config.{k}', package, config.get(k, ConfigDict()))
  out.augment = _augment(config.get('augment', ConfigDict()))
  out.invariance = _invariance(_named(config.get('invariance', 'simclr')))
  out.equivariance = _equivariance(_named(config.get('equivariance', 'none')))
  out.optimizer = _optimizer(config.get('optimizer', ConfigDict()))
  for k in ('size', 'batch', 'accumulate', 'log_every', 'keep'):
    if out[k] < 1:
      raise UserError(f'config.{k} is {out[k]}; it must be at least 1.', f'e.g. --config.{k}={TOP[k]}')
  if out.knn_every < 0:
    raise UserError(f'config.knn_every is {out.knn_every}; it must be 0 (never) or epochs.', 'e.g. --config.knn_every=10')
  if out.batch % out.accumulate:
    raise UserError(f'config.accumulate is {out.accumulate}: a batch of {out.batch} cannot be cut into so many equal parts.',
                    f'e.g. --config.accumulate={math.gcd(out.batch, out.accumulate)}')
  given = {k: tuple(_fit(f'config.{k}', v, 0.) for v in out[k]) for k in ('mean', 'std')}
  if {len(v) for v in given.values()} not in ({0}, {3}) or min(given['std'], default=1.) <= 0:
    raise UserError(f'config.mean is {given["mean"]} and config.std {given["std"]}; they need three numbers each, or none.',
                    'e.g. --config.mean=.485,.456,.406 --config.std=.229,.224,.225')
  out.update(given)
  if out.steps < 0 or out.epochs <= 0 and not out.steps:
    raise UserError(f'config.epochs is {out.epochs} and config.steps {out.steps}: nothing to train.',
                    'e.g. --config.epochs=10')
  return out.lock()

"""Configs: found, overridden from the command line, checked against the factories' signatures, made explicit."""
import importlib.util
import json
import math
import pathlib
import re
import shlex
from typing import Any

from ml_collections import ConfigDict

from equivariant_ssl import augment, data, equivariance, invariance, nets, registry, renamed, shipped
from equivariant_ssl.errors import UserError
from equivariant_ssl.nets import mlp
from equivariant_ssl.parallel import sharding
from equivariant_ssl.registry import Text, check_fields, fit, flag, literal, section, unknown_name
from equivariant_ssl.storage import record
from equivariant_ssl.training import optim
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
    'validation': 0.,       # a share of each class, kept out of training: evaluations read out on it, not on the test split
    'batchnorm': 'joint',   # statistics over all views of one size; or 'view': a pass for each view
    'log_every': 10,        # steps
    'checkpoint_every': 0,  # steps; 0: ten times in the run
    'keep': 2,              # checkpoints
    'tensorboard': False,
    'probe': False,         # train a linear classifier beside, on stopped features, and log its accuracy
    'knn_every': 0.,        # epochs: log kNN accuracy on the test images (or held-out ones) this often; 0: never
    'on_collapse': 'warn',  # or 'stop': what to do when the embeddings' spread falls under .3 of the sphere's
}
# What may differ on resuming, and of the data: see runs.free.
FREE = ('log_every', 'checkpoint_every', 'keep', 'tensorboard', 'knn_every', 'on_collapse', 'sharding')
CHOICES = {'dtype': ('float32', 'bfloat16'), 'batchnorm': ('joint', 'view'), 'on_collapse': ('warn', 'stop'),
           'sharding': sharding.RULES}
COSINES = ('step', 'epoch')  # how often the rate moves
# The sections that name a factory, and where it is from.
SECTIONS = {'data': data, 'encoder': nets, 'invariance': invariance, 'equivariance': equivariance, 'optimizer': optim}
HEADS = ('projector', 'predictor')  # of an invariance that has them
# An argument of a package's factories that the recipe fills in, not the config; what their sections have beside.
GIVEN = {augment: 'size', nets: 'dtype', optim: 'schedule'}
MORE = {augment: {'role': 'invariant'}, equivariance: {'augmentations': ()},
        optim: {'lr': 1., 'warmup_epochs': 10., 'end': 0., 'cosine': 'step'}}
UNSAID = re.compile(rf'config\.({"|".join(SECTIONS)}|invariance\.({"|".join(HEADS)})|augment\.second(\.\w+)?)')  # at first
WHOLE = re.compile(rf'{UNSAID.pattern}|config\.augment(\.\w+)?')  # what a dict may be given for


def load(name: str, overrides: dict[str, str] | None = None, path: pathlib.Path | None = None) -> ConfigDict:
  """The resolved config of file or name `name`, which runs as a program, after `overrides` {'a.b': 'text'}; UserError on any
  mistake. path: the file, where no user has named it."""
  path = path or shipped.find(name)
  spec = importlib.util.spec_from_file_location(f'config_{path.stem}', path)
  if spec is None:
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
  except Exception as e:  # whatever a user's file can raise
    raise UserError(f'config file {str(path)!r} failed: {type(e).__name__}: {e}',
                    'It needs a function get_config() that returns a ConfigDict.') from e
  return changed(config.copy_and_resolve_references().unlock(), overrides)


def changed(config: ConfigDict, overrides: dict[str, str] | None = None) -> ConfigDict:
  """The resolved config of an unlocked one, which is written to, after `overrides` {'a.b': 'text'}; UserError."""
  _spell_out(config)
  overrides = {renamed.key(key): text for key, text in (overrides or {}).items()}
  for key, text in overrides.items():
    if key.endswith('.name'):
      _rename(config, key.split('.')[:-1], text)
  for key, text in overrides.items():
    _override(config, key, text)
    _spell_out(config)
  return resolve(config)


def read(path: pathlib.Path) -> ConfigDict:
  """The resolved config that a run left in its config.json."""
  fix = 'Restore it from a backup or start a new --workdir.'
  try:
    return resolve(ConfigDict(record.read_object(path, fix)))
  except (ValueError, TypeError, AttributeError, RecursionError) as error:  # of what is JSON, and no config
    raise UserError(f'{path} is damaged, it is no config: {" ".join(str(error).split())[:150]}', fix) from error
  except FileNotFoundError:
    raise UserError(f'no run in {str(path.parent)!r}: config.json is missing.',
                    'Start one: eqssl train --config NAME --workdir DIR') from None


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
      named = renamed.objective(_named(config[k])) if k == 'equivariance' else _named(config[k])
      del config[k]  # the type of a field may not change otherwise
      config[k] = named


def _child(node: Any, part: str) -> Any:
  if isinstance(node, list):
    return node[int(part)] if part.isdecimal() and int(part) < len(node) else None
  return node.get(part)


def _rename(config: ConfigDict, path: list[str], name: Any) -> None:
  """Before the section at `path` takes another name: drop what the file says of it that the new factory cannot have."""
  node, package = config.get(path[0]), SECTIONS.get(path[0])
  for part in path[1:]:
    node = _child(node, part) if isinstance(node, list) else None
  if package is None or not isinstance(node, ConfigDict) or name not in _names(package) or name == node.get('name'):
    return
  schema = {} if package is nets else _schema(package, name)  # 50 layers of one network are not another's
  if package is invariance:
    schema |= {head: {} for head in HEADS if getattr(registry.make(invariance, name), head) is not None}
  for k in list(node.keys()):
    try:
      fit(k, node[k], schema[k])
    except (KeyError, UserError):
      del node[k]


def _astray(node: Any, seen: str, part: str, rest: str, text: str) -> UserError:
  """The error for a path whose `part`, in `node` at path `seen`, has no fields."""
  if isinstance(node, list):
    return UserError(f'{seen} has {len(node)} objectives, 0 to {len(node) - 1}; {part!r} does not say which.',
                     f'e.g. {flag(f"{seen}.0.{rest}".rstrip("."), text)}')
  if part.isdecimal() and seen == 'config.equivariance':
    return UserError(f'{seen} has one objective, which takes no number.', f'e.g. {flag(f"{seen}.{rest}", text)}')
  inner = literal(node.get(part, TOP.get(part) if seen == 'config' else None))
  sections = [k for k, v in node.items() if isinstance(v, ConfigDict)]
  if inner is None and (sections or seen == 'config'):
    return unknown_name(seen, part, {*TOP, *SECTIONS, 'augment'} if seen == 'config' else sections)
  number = 'a number, ' if isinstance(inner, (int, float)) and not isinstance(inner, bool) else ''
  return UserError(f'{seen}.{part} is {number}{inner!r}: it has no fields.' if inner is not None else
                   f'{seen}.{part} has no fields.', f'e.g. {flag(f"{seen}.{part}", text)}')


def _override(config: ConfigDict, key: str, text: str) -> None:
  """Set the field at path `key` ('a.b'; 'a.0.b' of the first of several) to what `text` says."""
  *path, last = key.split('.')
  node, seen, value = config, 'config', Text(text)
  for i, part in enumerate(path):
    if isinstance(node, ConfigDict) and part not in node and UNSAID.fullmatch(f'{seen}.{part}'):
      node[part] = ConfigDict()
    inner = _child(node, part)
    if not isinstance(inner, (ConfigDict, list)):
      raise _astray(node, seen, part, '.'.join([*path[i + 1:], last]), text)
    node, seen = inner, f'{seen}.{part}'
  if isinstance(node, list) or WHOLE.fullmatch(f'{seen}.{last}'):
    value = literal(value)
  if isinstance(node, list):
    if _child(node, last) is None:
      raise _astray(node, seen, last, '' if last.isdecimal() else last, text)
    node[int(last)] = value
    return
  if last in node:  # replaced, not merged: the type is checked by resolve, with a message of ours
    del node[last]
  node[last] = ConfigDict(value) if isinstance(value, dict) else value


def _names(package: Any) -> list[str]:
  return list(optim.OPTIMIZERS) if package is optim else registry.names(package)


def _schema(package: Any, name: str) -> dict[str, Any]:
  """The fields of a section that names factory `name` of `package`, with their defaults."""
  factory = optim.OPTIMIZERS[name] if package is optim else registry.factory(package, name)
  own = {k: v for k, v in registry.arguments(factory).items() if k != GIVEN.get(package)}
  return {'name': name, **own, **MORE.get(package, {})}


def _module(path: str, package: Any, given: Any, name: str = '') -> ConfigDict:
  """A section that names a factory of `package` (else `name` does) and its keyword arguments."""
  known = _names(package)
  check_fields(path, given, f'e.g. --{path}.' + ('role=both' if name else f'name={given if given in known else known[0]}'))
  name = name or given.get('name')
  if not name:
    raise UserError(f'{path} needs a name.', f'One of: {", ".join(known)}.')
  if name not in known:
    raise unknown_name(path, name, known)
  return ConfigDict(section(path, given, _schema(package, name)))


def _optimizer(given: Any) -> ConfigDict:
  out = _module('config.optimizer', optim, {'name': 'lars', **given} if hasattr(given, 'keys') else given)
  if out.cosine not in COSINES:
    raise unknown_name('config.optimizer.cosine', out.cosine, COSINES)
  return out


def _augment(given: Any) -> ConfigDict:
  check_fields('config.augment', given, 'e.g. --config.augment.crop.role=both')
  given = renamed.augmentations(given)
  ops = [k for k in given.keys() if k not in ('order', 'second')]
  order = fit('config.augment.order', given.get('order', ()), ('crop',))
  if sorted(order) != sorted(ops):
    for name in order:
      if name not in registry.names(augment):
        raise unknown_name('config.augment.order', name, registry.names(augment))
    raise UserError(f'config.augment.order names {list(order)}, but config.augment configures {sorted(ops)}.',
                    'Each op once in both: a ConfigDict sorts its keys, so the order must be said.')
  out = ConfigDict({'order': tuple(order), 'second': {}})
  for op in order:
    out[op] = _module(f'config.augment.{op}', augment, given[op], name=op)
    del out[op]['name']
    if out[op].role not in ROLES:
      raise unknown_name(f'config.augment.{op}.role', out[op].role, ROLES)
  second = given.get('second', {})  # what differs in the second of the invariance's views
  check_fields('config.augment.second', second, 'e.g. --config.augment.second.blur.p=.1')
  for op, changes in second.items():
    if op not in order:
      raise unknown_name('config.augment.second', op, order)
    fields = {k: v for k, v in out[op].items() if k != 'role'}
    whole = section(f'config.augment.second.{op}', changes, fields)
    out.second[op] = ConfigDict({k: whole[k] for k in changes.keys()})
  return out


def _invariance(given: Any) -> ConfigDict:
  head = {k: v for k, v in registry.arguments(mlp.make).items() if k != 'dtype'}
  own = {k: v for k, v in given.items() if k not in HEADS} if hasattr(given, 'keys') else given
  out = _module('config.invariance', invariance, own)
  published = registry.make(invariance, out.name, **{k: v for k, v in out.items() if k != 'name'})
  for part in HEADS:
    base = getattr(published, part)
    if base is None and part in given and given[part]:
      raise UserError(f'config.invariance.{part}: {out.name} has none.', f'Remove config.invariance.{part}.')
    if base is not None:
      out[part] = section(f'config.invariance.{part}', given.get(part, {}), {**head, **base})
  return out


def _equivariance(given: Any, path: str = 'config.equivariance') -> Any:
  """One section or several. Field `augmentations`: the objective's, () for all with the role sensitive or both."""
  if isinstance(given, (list, tuple)):
    return tuple(_equivariance(g, f'{path}.{i}') for i, g in enumerate(given))
  return _module(path, equivariance, renamed.objective(given))


def resolve(config: ConfigDict) -> ConfigDict:
  """The same config with every default written out; UserError on an unknown field or a wrong type."""
  known = {*TOP, *SECTIONS, 'augment'}
  for k in config.keys():
    if k not in known:
      raise unknown_name('config', k, known)
  out = ConfigDict(section('config', {k: v for k, v in config.items() if k in TOP}, TOP))
  for k, choices in CHOICES.items():
    if out[k] not in choices:
      raise unknown_name(f'config.{k}', out[k], choices)
  for k in ('data', 'encoder'):
    out[k] = _module(f'config.{k}', SECTIONS[k], config.get(k, ConfigDict()))
  out.augment = _augment(config.get('augment', ConfigDict()))
  out.invariance = _invariance(_named(config.get('invariance', 'simclr')))
  out.equivariance = _equivariance(_named(config.get('equivariance', 'none')))
  out.optimizer = _optimizer(config.get('optimizer', ConfigDict()))
  if out.knn_every < 0:
    raise UserError(f'config.knn_every is {out.knn_every}; it must be 0 (never) or epochs.', 'e.g. --config.knn_every=10')
  if out.batch % out.accumulate:
    raise UserError(f'config.accumulate is {out.accumulate}: a batch of {out.batch} cannot be cut into so many equal parts.',
                    f'e.g. --config.accumulate={math.gcd(out.batch, out.accumulate)}')
  if {len(out.mean), len(out.std)} not in ({0}, {3}) or min(out.std, default=1.) <= 0:
    raise UserError(f'config.mean is {out.mean} and config.std {out.std}; they need three numbers each, or none.',
                    'e.g. --config.mean=.485,.456,.406 --config.std=.229,.224,.225')
  if out.epochs <= 0 and not out.steps:
    raise UserError(f'config.epochs is {out.epochs} and config.steps {out.steps}: nothing to train.',
                    'e.g. --config.epochs=10')
  return out.lock()

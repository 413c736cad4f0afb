"""Result files: what a number was measured on, and whether the result on disk answers a request."""
import hashlib
import importlib.metadata
import inspect
import json
import pathlib
import shlex
import types
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from equivariant_ssl.errors import UserError, passing
from equivariant_ssl.evaluate.frozen import variables
from equivariant_ssl.storage import fingerprint, record
from equivariant_ssl.training.state import TrainState

# The fields of a result file that say what its numbers depend on, and the words for each.
WORDS = {'digest': 'weights', 'data': 'data', 'inputs': 'pixels shown to the network',
         'checkpoint': 'checkpoint', 'definition': 'constants or version of the protocol',
         'options': 'options', 'seeds': 'seeds', 'protocol': 'protocol'}
# Arguments that result files name as older versions did: under other names, stored results would be
# computed again.
ARGUMENTS = {'center': 'centred', 'quantize': 'quantise'}
NEW = ('data', 'inputs', 'definition')  # the fields that results of earlier versions do not have


def as_json(value: Any) -> Any:
  """Return `value` for a result file: NamedTuples become objects, arrays become lists."""
  if hasattr(value, '_asdict'):
    return {k: as_json(v) for k, v in value._asdict().items()}
  if isinstance(value, dict):
    return {k: as_json(v) for k, v in value.items()}
  if isinstance(value, (list, tuple)):
    return [as_json(v) for v in value]
  if isinstance(value, np.ndarray):
    return value.tolist()
  if isinstance(value, np.generic):
    return value.item()
  return value


def weights_digest(state: TrainState) -> str:
  """Return a fingerprint of the weights and statistics of a state, which a result is valid for."""
  leaves = fingerprint.fingerprints(variables(state))
  return hashlib.sha256(json.dumps(leaves, sort_keys=True).encode()).hexdigest()[:16]


def _is_plain(value: Any) -> bool:
  """Whether a constant consists of numbers and words alone."""
  if isinstance(value, dict):
    return all(isinstance(k, str) for k in value) and all(map(_is_plain, value.values()))
  if isinstance(value, (list, tuple)):
    return all(map(_is_plain, value))
  return value is None or isinstance(value, (str, int, float))


def _module_constants(module: types.ModuleType) -> dict[str, Any]:
  """Return {'module.NAME': value} of the plain constants in capitals of a module."""
  name = module.__name__.rpartition('.')[2]
  return {f'{name}.{k}': v for k, v in vars(module).items() if k.isupper() and _is_plain(v)}


def _function_defaults(function: Callable) -> dict[str, Any]:
  """Return {'module.function': {argument: its default}} of the plain defaults of a function."""
  parameters = inspect.signature(function).parameters.items()
  # A mesh says where it is computed, not what.
  defaults = {k: p.default for k, p in parameters if p.default is not p.empty and k != 'mesh'}
  name = f'{function.__module__.rpartition(".")[2]}.{function.__name__}'
  return {name: {k: v for k, v in defaults.items() if _is_plain(v)}}


def _older_names(value: Any) -> Any:
  """Return JSON values with the names of arguments that ARGUMENTS gives."""
  if isinstance(value, dict):
    return {ARGUMENTS.get(k, k): _older_names(v) for k, v in value.items()}
  return [_older_names(v) for v in value] if isinstance(value, list) else value


def constants(sources: Iterable[Any]) -> dict[str, Any]:
  """Return the constants that `sources` hold.

  A module holds its constants in capitals, a function its defaults; any other value is a constant
  itself, under its place in `sources`.
  """
  constants = {}
  for i, source in enumerate(sources):
    if isinstance(source, types.ModuleType):
      constants |= _module_constants(source)
    elif callable(source):
      constants |= _function_defaults(source)
    else:
      constants[str(i)] = source
  return _older_names(as_json(constants))


def definition(protocol: Any) -> dict[str, Any]:
  """Return what defines a protocol: its version, its constants, the versions of its packages.

  A result is read again only where its definition is still the same.
  """
  return {'version': protocol.version, 'constants': constants(protocol.depends_on()),
          'packages': {name: importlib.metadata.version(name) for name in protocol.packages}}


def read_result(path: pathlib.Path) -> dict[str, Any]:
  """Return the content of a result file; raise UserError where it is damaged."""
  fix = f'Delete it, or evaluate again: eqssl eval {shlex.quote(str(path.parent.parent))}'
  result = record.read_json_object(path, fix)
  for seeds in (result[network] for network in ('trained', 'untrained') if network in result):
    complete = isinstance(seeds, list) and all(
        isinstance(seed, dict) and isinstance(seed.get('numbers'), dict) for seed in seeds)
    if not seeds or not complete:
      raise UserError(f'{path} is damaged, numbers are missing.', fix)
  return result


def states_origin(result: dict[str, Any]) -> bool:
  """Whether a result states its data, its pixels and its protocol; results of earlier versions do
  not."""
  return all(k in result for k in NEW)


def _differences(result: dict[str, Any], request: dict[str, Any]) -> list[str]:
  """Return words for each field of `request` in which a result differs."""
  return [WORDS[k] for k in WORDS if k in request and result.get(k) != request[k]]


def stored_result(path: pathlib.Path, request: dict[str, Any], networks: Iterable[str],
                  say: Callable[[str], None]) -> dict | None:
  """Return the result in `path` where it answers a request, else None.

  It answers the request where it is complete, has the `networks` ('trained', 'untrained'), and
  agrees with every field of `request`. Where a result exists but does not answer, `say` is given a
  line with the reason.
  """
  if not path.exists():
    return None
  again = f'{path.name} is computed again: '
  try:
    result = read_result(path)
  except (OSError, UserError) as error:
    if passing(error):
      raise
    say(f'{again}it is damaged.')
    return None
  if not states_origin(result):
    say(f'{again}an earlier version wrote it, which did not record what its numbers depend on.')
  elif differences := _differences(result, request):
    say(f'{again}it was measured with other {", other ".join(differences)}.')
  elif set(networks) <= result.keys() and not any(
      seed.get('missing') for seed in result.get('trained', ())):
    return result
  return None

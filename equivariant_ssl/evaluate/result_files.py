"""Result files: what a number is of, and whether the one on disk is of what is asked for."""
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

from equivariant_ssl.errors import UserError
from equivariant_ssl.evaluate.frozen import variables
from equivariant_ssl.storage import fingerprint, record
from equivariant_ssl.training.state import TrainState

# The fields of a result file that say what it is of, and the words for one that is another's.
WORDS = {'digest': 'weights', 'data': 'data', 'inputs': 'pixels shown to the network', 'checkpoint': 'checkpoint',
         'definition': 'constants or version of the protocol', 'options': 'options', 'seeds': 'seeds',
         'protocol': 'protocol'}
NEW = ('data', 'inputs', 'definition')  # that results of before have not


def as_json(value: Any) -> Any:
  """NamedTuples as objects, arrays as lists, for a result file."""
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


def digest(state: TrainState) -> str:
  """A fingerprint of the weights and statistics of a state: what a result is valid for."""
  leaves = fingerprint.of(variables(state))
  return hashlib.sha256(json.dumps(leaves, sort_keys=True).encode()).hexdigest()[:16]


def _plain(value: Any) -> bool:
  """Whether a constant is numbers and words alone."""
  if isinstance(value, dict):
    return all(isinstance(k, str) for k in value) and all(map(_plain, value.values()))
  if isinstance(value, (list, tuple)):
    return all(map(_plain, value))
  return value is None or isinstance(value, (str, int, float))


def constants(of: Iterable[Any]) -> dict[str, Any]:
  """The constants among `of`: of a module its own in capitals, of a function its defaults, and whatever else as it is."""
  found = {}
  for i, one in enumerate(of):
    if isinstance(one, types.ModuleType):
      name = one.__name__.rpartition('.')[2]
      found |= {f'{name}.{k}': v for k, v in vars(one).items() if k.isupper() and _plain(v)}
    elif callable(one):
      defaults = {k: p.default for k, p in inspect.signature(one).parameters.items() if p.default is not p.empty}
      found[f'{one.__module__.rpartition(".")[2]}.{one.__name__}'] = {k: v for k, v in defaults.items() if _plain(v)}
    else:
      found[str(i)] = one
  return as_json(found)


def definition(protocol: Any) -> dict[str, Any]:
  """What a protocol is, for the key of its results: its version, its constants, and the versions of its packages."""
  return {'version': protocol.version, 'constants': constants(protocol.of()),
          'packages': {name: importlib.metadata.version(name) for name in protocol.packages}}


def result(path: pathlib.Path) -> dict[str, Any]:
  """What an evaluation left in a file; UserError where it is damaged."""
  fix = f'Delete it, or evaluate again: eqssl eval {shlex.quote(str(path.parent.parent))}'
  found = record.read_object(path, fix)
  for seeds in (found[who] for who in ('trained', 'untrained') if who in found):
    whole = isinstance(seeds, list) and all(isinstance(f, dict) and isinstance(f.get('numbers'), dict) for f in seeds)
    if not seeds or not whole:
      raise UserError(f'{path} is damaged, numbers are missing.', fix)
  return found


def says(found: dict[str, Any]) -> bool:
  """Whether a result says what it is of: those written before did not say the data, the pixels and the protocol."""
  return all(k in found for k in NEW)


def _differs(found: dict[str, Any], about: dict[str, Any]) -> list[str]:
  """Words for each of `about` in which a result is another's."""
  return [WORDS[k] for k in WORDS if k in about and found.get(k) != about[k]]


def kept(path: pathlib.Path, about: dict[str, Any], who: Iterable[str], say: Callable[[str], None]) -> dict | None:
  """The result in `path` where it is complete, of `who`, and of all that `about` says; else None, and a line says why a
  result that is there is not used."""
  if not path.exists():
    return None
  again = f'{path.name} is computed again: '
  try:
    found = result(path)
  except (OSError, UserError):
    say(f'{again}it is damaged.')
    return None
  if not says(found):
    say(f'{again}of an earlier version, which did not write down what its numbers are of.')
  elif other := _differs(found, about):
    say(f'{again}of other {", other ".join(other)}.')
  elif set(who) <= found.keys() and not any(f.get('missing') for f in found.get('trained', ())):
    return found
  return None

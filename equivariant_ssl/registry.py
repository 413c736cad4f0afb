"""The module is the registry: `make(augment, 'jitter', hue=.2)` calls `augment/jitter.py`'s `make(hue=.2)`.

A factory's signature is the config schema and holds the defaults; there is no other list of either. What a config gives
is fitted to it here too: `section`.
"""
import ast
import difflib
import importlib
import inspect
import math
import pkgutil
import shlex
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any, get_args

from equivariant_ssl.errors import UserError

EXAMPLES = {'told': ('crop',), 'crop_scale': (.05, .14), 'mean': (.485, .456, .406), 'std': (.229, .224, .225)}  # not ()
LARGEST = 2 ** 32 - 1  # a whole number; jax takes a larger seed for another one


class Text(str):
  """What was typed for a field: taken as it is where the field is text, else for what it says."""


def meant(value: Any) -> Any:
  """What a Text says: a literal of Python, words with commas, or a word; anything else as it is."""
  if not isinstance(value, Text):
    return value
  try:
    return ast.literal_eval(value)
  except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
    return tuple(t.strip() for t in value.split(',')) if ',' in value else str(value)


def names(package: ModuleType) -> list[str]:
  """The modules of `package` that have a `make`: what a config may name."""
  found = [m.name for m in pkgutil.iter_modules(package.__path__)]
  return sorted(n for n in found if hasattr(importlib.import_module(f'{package.__name__}.{n}'), 'make'))


def unknown(what: str, name: str, known: Iterable[str]) -> UserError:
  """The error for a name that is not there, with the nearest one that is."""
  known = sorted(known)
  near = difflib.get_close_matches(str(name), known, n=1, cutoff=.5)
  return UserError(f'{what} has no {name!r}.',
                   (f'Did you mean {near[0]!r}? ' if near else '') + f'It has: {", ".join(known)}.')


def factory(package: ModuleType, name: str) -> Callable:
  """The `make` of module `name` in `package`."""
  if name not in names(package):
    raise unknown(package.__name__.split('.')[-1], name, names(package))
  return importlib.import_module(f'{package.__name__}.{name}').make


def arguments(function: Callable) -> dict[str, Any]:
  """The arguments of `function` with their defaults."""
  return {k: p.default for k, p in inspect.signature(function).parameters.items()}


def schema(package: ModuleType, name: str) -> dict[str, Any]:
  """The keyword arguments that factory `name` takes, with their defaults."""
  return arguments(factory(package, name))


def make(package: ModuleType, name: str, /, **kw) -> Any:
  """Call factory `name` of `package`; an unknown keyword is a UserError that names the nearest, and so is a tuple of
  another length where the annotation says one."""
  function = factory(package, name)
  known = inspect.signature(function).parameters
  for k, value in kw.items():
    if k not in known:
      raise unknown(f'{package.__name__.split(".")[-1]}.{name}', k, known)
    parts = get_args(known[k].annotation) if isinstance(value, tuple) else ()
    if parts and Ellipsis not in parts and len(parts) != len(value):
      raise UserError(f'{name}.{k} = {value}; it takes {len(parts)} values.', f'As in {known[k].default}.')
  return function(**kw)


def flag(path: str, value: Any) -> str:
  """What sets the field at `path`, as a shell takes it."""
  words = isinstance(value, tuple) and value and all(isinstance(v, str) for v in value)
  return f'--{path}={shlex.quote(",".join(value) if words else value if isinstance(value, str) else repr(value))}'


def _typed(path: str, value: Any, default: Any) -> Any:
  """`value` as the type of `default`; ValueError where it is of another."""
  number = isinstance(value, (int, float)) and not isinstance(value, bool)
  if isinstance(default, tuple):
    like = (default or EXAMPLES.get(path.rpartition('.')[2], ()))[:1]
    if isinstance(value, (list, tuple)):
      return tuple(_typed(path, v, like[0]) if like else v for v in value)
    if like and type(value) is type(like[0]):
      return (value,) if value != '' else ()
  elif isinstance(default, bool):
    if str(value).lower() in ('true', 'false'):
      return str(value).lower() == 'true'
  elif isinstance(default, float):
    if number and math.isfinite(value):
      return float(value)
  elif isinstance(default, int):
    if number and value == value // 1:
      return int(value)
  elif isinstance(default, str):
    if isinstance(value, str):
      return str(value)  # a Text no longer
  else:
    return value
  raise ValueError(path)


def fit(path: str, value: Any, default: Any) -> Any:
  """`value` as the type of `default` and, of whole numbers, at least 1, or 0 where that is the default; else a UserError.
  A Text stays as it was typed where the default is text, and is what it says elsewhere."""
  value = value if isinstance(default, str) else meant(value)
  try:
    found = _typed(path, value, default)
  except (ValueError, OverflowError):
    kind, eg = type(default).__name__, not default if isinstance(default, bool) else default
    eg = eg or EXAMPLES.get(path.rpartition('.')[2], eg)
    said = ' '.join(repr(value).split())
    raise UserError(f'{path} is {said}; it needs {"an" if kind == "int" else "a"} {kind}, like {eg!r}.',
                    f'e.g. {flag(path, eg)}') from None
  like = default[0] if isinstance(default, tuple) and default else default
  for one in (found if isinstance(found, tuple) else (found,)) if type(like) is int and like >= 0 else ():
    if not min(like, 1) <= one <= LARGEST:
      raise UserError(f'{path} is {value!r}; it must be at {"most" if one > 0 else "least"} '
                      f'{LARGEST if one > 0 else min(like, 1)}.', f'e.g. {flag(path, default)}')
  return found


def check_fields(path: str, given: Any, fix: str) -> None:
  """Refuse a value where a section is due."""
  if not hasattr(given, 'keys'):
    raise UserError(f'{path} is {given!r}; it needs fields.', fix)


def section(path: str, given: Any, schema: dict[str, Any]) -> dict[str, Any]:
  """`given` over the defaults of `schema`, every value of its default's type."""
  check_fields(path, given, f'It has: {", ".join(sorted(schema))}.')
  for k in given.keys():
    if k not in schema:
      raise unknown(path, k, schema)
  return {k: fit(f'{path}.{k}', given[k], d) if k in given else d for k, d in schema.items()}

"""A package of modules is a registry: `make(augment, 'jitter', hue=.2)` calls `augment/jitter.py`.

Each module has a factory `make(hue=.1, ...)`. The signature of a factory is the schema of its
section of a config and holds the defaults; there is no second list of either. `section` checks what
a config says against a schema.

A name with a dot is a module of another package, 'my_pkg.sepia', which has such a factory too (see
`dotted.py`).
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

from equivariant_ssl import dotted
from equivariant_ssl.errors import UserError

# Values to show in an error message for the fields whose default is ().
EXAMPLES = {'augmentations': ('crop',), 'crop_scale': (.05, .14), 'mean': (.485, .456, .406),
            'std': (.229, .224, .225)}
LARGEST = 2 ** 32 - 1  # the largest whole number: jax mistakes a larger seed for another one


class Text(str):
  """What the user typed for a field. A field of text takes it as it is; another, its value."""


def literal(value: Any) -> Any:
  """The value that a Text spells: a Python literal, a tuple of words (with commas), or a word.

  Anything that is no Text is returned as it is.
  """
  if not isinstance(value, Text):
    return value
  try:
    return ast.literal_eval(value)
  except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
    return tuple(t.strip() for t in value.split(',')) if ',' in value else str(value)


def names(package: ModuleType) -> list[str]:
  """The names of the modules of `package` that have a `make`: the words that a config may use."""
  modules = [m.name for m in pkgutil.iter_modules(package.__path__)]
  return sorted(name for name in modules
                if hasattr(importlib.import_module(f'{package.__name__}.{name}'), 'make'))


def unknown_name(what: str, name: str, known: Iterable[str]) -> UserError:
  """The error for a name that `what` does not have, with the nearest name that it has."""
  return UserError(f'{what} has no {name!r}.', nearest_name(name, known))


def nearest_name(name: str, known: Iterable[str]) -> str:
  """The advice for a name that is not among the known ones: the nearest one, and all of them."""
  known = sorted(known)
  near = difflib.get_close_matches(str(name), known, n=1, cutoff=.5)
  return (f'Did you mean {near[0]!r}? ' if near else '') + f'It has: {", ".join(known)}.'


def factory(package: ModuleType, name: str) -> Callable:
  """The function `make` of the module `name`; UserError where there is none.

  The module is in `package`, or, where its name has a dot, anywhere.
  """
  if dotted.is_dotted(name):
    return dotted.factory(name)
  if name not in names(package):
    raise unknown_name(package.__name__.split('.')[-1], name, names(package))
  return importlib.import_module(f'{package.__name__}.{name}').make


def arguments(function: Callable) -> dict[str, Any]:
  """{argument: default} of a function."""
  return {k: p.default for k, p in inspect.signature(function).parameters.items()}


def schema(package: ModuleType, name: str) -> dict[str, Any]:
  """{keyword argument: default} of the factory `name` of `package`."""
  return arguments(factory(package, name))


def make(package: ModuleType, name: str, /, **kw) -> Any:
  """The result of the factory `name` of `package`, called with the keyword arguments `kw`.

  Raises UserError for an argument that the factory does not have, and for a tuple whose length is
  not the one that the factory's annotation states.
  """
  function = factory(package, name)
  known = inspect.signature(function).parameters
  for k, value in kw.items():
    if k not in known:
      raise unknown_name(f'{package.__name__.split(".")[-1]}.{name}', k, known)
    parts = get_args(known[k].annotation) if isinstance(value, tuple) else ()
    if parts and Ellipsis not in parts and len(parts) != len(value):
      raise UserError(f'{name}.{k} is {value}, but it takes {len(parts)} values.',
                      f'Write it as in {known[k].default}.')
  return function(**kw)


def flag(path: str, value: Any) -> str:
  """The flag that sets the field at `path` to `value`, quoted for a shell."""
  if isinstance(value, tuple) and value and all(isinstance(v, str) for v in value):
    text = ','.join(value)
  else:
    text = value if isinstance(value, str) else repr(value)
  return f'--{path}={shlex.quote(text)}'


def _convert(path: str, value: Any, default: Any) -> Any:
  """`value` in the type of `default`; ValueError where it does not fit."""
  number = isinstance(value, (int, float)) and not isinstance(value, bool)
  if isinstance(default, tuple):
    like = (default or EXAMPLES.get(path.rpartition('.')[2], ()))[:1]
    if isinstance(value, (list, tuple)):
      return tuple(_convert(path, v, like[0]) if like else v for v in value)
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
      return str(value)  # a plain str in place of a Text
  else:
    return value
  raise ValueError(path)


def fit(path: str, value: Any, default: Any) -> Any:
  """`value` in the type of `default`, for the field at `path`.

  A Text stays as it was typed where the default is text; elsewhere its value is taken. Raises
  UserError where the type does not fit. Raises it also for a whole number that is too large, or
  below 1 (below 0 where the default is 0).
  """
  value = value if isinstance(default, str) else literal(value)
  try:
    converted = _convert(path, value, default)
  except (ValueError, OverflowError):
    kind, example = type(default).__name__, not default if isinstance(default, bool) else default
    example = example or EXAMPLES.get(path.rpartition('.')[2], example)
    article, text = 'an' if kind == 'int' else 'a', ' '.join(repr(value).split())
    raise UserError(f'{path} is {text}; it needs {article} {kind}, like {example!r}.',
                    f'e.g. {flag(path, example)}') from None
  like = default[0] if isinstance(default, tuple) and default else default
  if type(like) is int and like >= 0:
    for number in converted if isinstance(converted, tuple) else (converted,):
      if not min(like, 1) <= number <= LARGEST:
        most = number > 0
        raise UserError(f'{path} is {value!r}; it must be at {"most" if most else "least"} '
                        f'{LARGEST if most else min(like, 1)}.', f'e.g. {flag(path, default)}')
  return converted


def check_fields(path: str, value: Any, fix: str) -> None:
  """Raise a UserError where a plain value stands in place of a section."""
  if not hasattr(value, 'keys'):
    raise UserError(f'{path} is {value!r}; it needs fields.', fix)


def section(path: str, values: Any, schema: dict[str, Any]) -> dict[str, Any]:
  """All fields of the section at `path`: `values` where they are given, else the schema's defaults.

  Raises UserError for a field that is not in the schema, or a value of another type.
  """
  check_fields(path, values, f'It has: {", ".join(sorted(schema))}.')
  for k in values.keys():
    if k not in schema:
      raise unknown_name(path, k, schema)
  return {k: fit(f'{path}.{k}', values[k], default) if k in values else default
          for k, default in schema.items()}

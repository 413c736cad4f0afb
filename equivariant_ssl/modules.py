"""The module is the registry: `make(augment, 'jitter', hue=.2)` calls `augment/jitter.py`'s `make(hue=.2)`.

A factory's signature is the config schema and holds the defaults; there is no other list of either.
"""
import difflib
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

from equivariant_ssl.errors import UserError


def names(package: ModuleType) -> list[str]:
  """The modules of `package` that have a `make`: what a config may name."""
  found = [m.name for m in pkgutil.iter_modules(package.__path__)]
  return sorted(n for n in found if hasattr(importlib.import_module(f'{package.__name__}.{n}'), 'make'))


def unknown(what: str, name: str, known: Iterable[str]) -> UserError:
  """The error for a name that is not there, with the nearest one that is."""
  known = sorted(known)
  near = difflib.get_close_matches(name, known, n=1, cutoff=.5)
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
  """Call factory `name` of `package`; an unknown keyword is a UserError that names the nearest."""
  known = schema(package, name)
  for k in kw:
    if k not in known:
      raise unknown(f'{package.__name__.split(".")[-1]}.{name}', k, known)
  return factory(package, name)(**kw)

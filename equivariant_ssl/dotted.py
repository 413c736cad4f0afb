"""Modules of other packages that a config names by a dotted path, such as 'my_pkg.sepia'.

Such a module has a factory `make(...)`, like the modules of this package. A name is never a reason
to import a module: what a run, a study or an export says of itself may come from anyone. A module
is imported where the user has named it (on the command line, in a config file that is run, in an
argument of a function of the library), or has allowed its package (`--allow my_pkg`, `allow=`).
Elsewhere only a module that the program has imported already is used.
"""
import contextlib
import contextvars
import importlib
import inspect
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any

from equivariant_ssl.errors import UserError

EVERY = '*'  # in place of a package: every package is allowed
PACKAGE = __name__.partition('.')[0]
# The packages that a process allows those which it starts: 'my_pkg=FOLDER', joined by os.pathsep.
VARIABLE = 'EQSSL_ALLOW'
# The packages that may be imported at this point of the program.
_allowed: contextvars.ContextVar[tuple[str, ...]] = contextvars.ContextVar('allowed', default=())


def is_dotted(name: object) -> bool:
  """Whether the name of a factory is the dotted path of a module of another package."""
  return isinstance(name, str) and '.' in name


def short_name(name: str) -> str:
  """The last part of a dotted path: 'sepia' of 'my_pkg.sepia'."""
  return name.rpartition('.')[2]


@contextlib.contextmanager
def allow_imports(*packages: str) -> Iterator[None]:
  """Inside this block, modules of these packages are imported where a config names them.

  packages: names such as 'my_pkg' or 'my_pkg.nets'; EVERY stands for every package. They are added
            to those of the blocks around this one.
  """
  token = _allowed.set((*_allowed.get(), *packages))
  try:
    yield
  finally:
    _allowed.reset(token)


def allowed_packages() -> tuple[str, ...]:
  """The packages that are allowed at this point of the program."""
  return _allowed.get()


def names_in(config: Mapping[str, Any]) -> list[str]:
  """The dotted paths that a resolved config, or one of JSON values, names."""
  objectives = config.get('equivariance', ())
  sections = [config.get(k, {}) for k in ('data', 'encoder', 'invariance')]
  sections += objectives if isinstance(objectives, list | tuple) else [objectives]
  ops = [section for section in config.get('augment', {}).values() if hasattr(section, 'keys')]
  names = [*(section.get('name') for section in sections), *(op.get('module') for op in ops)]
  return list(dict.fromkeys(filter(is_dotted, names)))


def environment(names: list[str]) -> dict[str, str]:
  """The environment variable by which a process that this one starts may import these modules.

  It says also where their packages are. Raises the errors of `factory`.
  """
  folders = {}
  for name in names:
    factory(name)  # imported here first, if it is allowed
    parts, file = name.split('.'), pathlib.Path(sys.modules[name].__file__ or '').absolute()
    depth = len(parts) - 1 + (file.stem == '__init__')
    folders[parts[0]] = str(file.parents[depth])
  text = os.pathsep.join(f'{package}={folder}' for package, folder in folders.items())
  return {VARIABLE: text} if text else {}


def _from_environment() -> dict[str, str]:
  """{package: folder} that the process which started this one allows."""
  entries = os.environ.get(VARIABLE, '').split(os.pathsep)
  return dict(entry.split('=', 1) for entry in entries if '=' in entry)


def _is_allowed(name: str) -> bool:
  return any(package == EVERY or f'{name}.'.startswith(f'{package}.')
             for package in (*_allowed.get(), *_from_environment()))


def _import(name: str) -> ModuleType:
  """Import the module `name`, from where Python looks, or else from the current folder.

  The current folder comes last, so that no file in it takes the place of an installed package.
  """
  top = name.partition('.')[0]
  folder = _from_environment().get(top) or os.getcwd()
  folders = [] if folder in sys.path else [folder]
  sys.path.extend(folders)
  importlib.invalidate_caches()
  try:
    return importlib.import_module(name)
  except Exception as error:  # the user's module can raise anything
    raise UserError(f'the module {name} cannot be imported: {type(error).__name__}: '
                    f'{" ".join(str(error).split())}.',
                    f'Install {top}, or work in the folder that holds {top}.') from error
  finally:
    for folder in folders:
      if folder in sys.path:  # the module may have changed the path too
        sys.path.remove(folder)


def factory(name: str) -> Callable:
  """The function `make` of the module at the dotted path `name`.

  Raises UserError where the module may not be imported or cannot be, where it has no `make`, and
  where an argument of its `make` has no default.
  """
  top = name.partition('.')[0]
  if not all(part.isidentifier() for part in name.split('.')):
    raise UserError(f'{name!r} is not the dotted path of a module.', 'e.g. my_pkg.sepia')
  if top == PACKAGE or top in sys.stdlib_module_names:
    raise UserError(f'{name} is not a module of another package.',
                    f'Write {short_name(name)!r} for a module of {PACKAGE}.' if top == PACKAGE
                    else 'Name a module with a function make(...).')
  if name not in sys.modules and not _is_allowed(name):
    raise UserError(f'{name} is a module of another package, and nothing is imported because a '
                    'folder names it.',
                    f'If you trust {top}: --allow {top} (in Python: allow=({top!r},), or import '
                    f'{name} first).')
  make = getattr(sys.modules.get(name) or _import(name), 'make', None)
  if not callable(make):
    raise UserError(f'the module {name} has no function make.',
                    'Its signature is the schema of the config: def make(amount: float = .5): ...')
  for argument, parameter in inspect.signature(make).parameters.items():
    if parameter.default is inspect.Parameter.empty:
      raise UserError(f'{name}.make: its argument {argument} has no default.',
                      f'The defaults stand in the signature: def make({argument}=..., ...).')
  return make

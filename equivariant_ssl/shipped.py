"""The folders of configs and launch files: the package's own, and those of the current folder.

A config file is a program; only a config that the user names is run from the current folder.
"""
import pathlib
import re
import sys

from equivariant_ssl.errors import UserError


def folders(name: str = 'configs') -> list[pathlib.Path]:
  """Return the folders that are searched for a config without a path, or for a file of `name`.

  These are the current folder, the clone, and the place where the package is installed.
  """
  candidates = (pathlib.Path(name), pathlib.Path(__file__).parent.parent / name,
                pathlib.Path(sys.prefix, 'share/equivariant_ssl', name))
  return [p for p in candidates if p.is_dir()]


def shipped_config(name: str) -> pathlib.Path | None:
  """Return the package's own config of that name, or None.

  A run, an archive or the current folder cannot put another file in its place.
  """
  paths = [f / f'{name}.py' for f in folders() if f.is_absolute()]
  return next((p for p in paths if p.is_file()), None) if re.fullmatch(r'\w+', name) else None


def find_config(name: str) -> pathlib.Path:
  """Return the config file that a user names. Raise UserError if there is none, or two."""
  local, packaged = pathlib.Path('configs', f'{name}.py'), shipped_config(name)
  if pathlib.Path(name).is_file():
    return pathlib.Path(name)
  if local.is_file() and packaged and local.read_bytes() != packaged.read_bytes():
    raise UserError(f'config {name!r} is two files that differ: {local} and {packaged}.',
                    f'Say which: --config {local}')
  if packaged:
    return packaged
  if local.is_file():
    return local
  available = sorted({p.stem for f in folders() for p in f.glob('*.py')})
  raise UserError(f'config file {name!r} not found.',
                  f'Available: {", ".join(available) or "none here"}.')

"""Where configs and launch files are: the package's own, and those of a user's folder. Files that are run as programs."""
import pathlib
import re
import sys

from equivariant_ssl.errors import UserError


def folders(name: str = 'configs') -> list[pathlib.Path]:
  """Where a config named without its path is looked for; or a file of `name`: here, in the clone, where it is installed."""
  return [p for p in (pathlib.Path(name), pathlib.Path(__file__).parent.parent / name,
                      pathlib.Path(sys.prefix, 'share/equivariant_ssl', name)) if p.is_dir()]


def config(name: str) -> pathlib.Path | None:
  """The package's own config of that name: nothing that a run, an archive or the folder one is in says is looked up."""
  paths = [f / f'{name}.py' for f in folders() if f.is_absolute()]
  return next((p for p in paths if p.is_file()), None) if re.fullmatch(r'\w+', name) else None


def find(name: str) -> pathlib.Path:
  """The config file that a user names; UserError where there is none, or two."""
  here, own = pathlib.Path('configs', f'{name}.py'), config(name)
  if pathlib.Path(name).is_file():
    return pathlib.Path(name)
  if here.is_file() and own and here.read_bytes() != own.read_bytes():
    raise UserError(f'config {name!r} is two: {here} of this folder is not {own}.', f'Say which: --config {here}')
  if not here.is_file() and not own:
    there = sorted({p.stem for f in folders() for p in f.glob('*.py')})
    raise UserError(f'config file {name!r} not found.', f'Available: {", ".join(there) or "none here"}.')
  return own or here

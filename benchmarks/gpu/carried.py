"""What the calls carry (wheels, and half of CIFAR-10 each), and what of it is on the machine. It needs the standard library
alone."""
import hashlib
import importlib.metadata
import json
import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Callable

# Each call's half of the data; the wheels and the script that unpacks travel with both.
HALVES = {'call1': tuple(f'cifar10-train{i}.webp.zip' for i in (1, 2, 3)),
          'call2': ('cifar10-train4.webp.zip', 'cifar10-train5.webp.zip', 'cifar10-test.webp.zip')}
LIST = 'sha256.json'  # {name: sha256} of a load
# Carried in case the machine's are older than this package takes; else left alone.
SPARE = {'flax': '0.12.0', 'optax': '0.2.5', 'orbax-checkpoint': '0.12.0', 'protobuf': '6.33.5'}


def digest(file: pathlib.Path) -> str:
  with file.open('rb') as f:
    return hashlib.file_digest(f, 'sha256').hexdigest()


def environment(store: pathlib.Path) -> dict[str, str]:
  """The variables of every part: where its packages, data, programs and decoded images are."""
  path = [str(store / 'site'), str(pathlib.Path(__file__).resolve().parent.parent.parent), os.environ.get('PYTHONPATH', '')]
  return {'PYTHONPATH': os.pathsep.join(p for p in path if p), 'TFDS_DATA_DIR': str(store / 'tfds'),
          'EQSSL_CACHE': os.environ.get('EQSSL_CACHE', str(store / 'xla')), 'XDG_CACHE_HOME': str(store / 'cache'),
          # Up to five processes share the device: a training, and evaluations beside it.
          'XLA_PYTHON_CLIENT_MEM_FRACTION': os.environ.get('XLA_PYTHON_CLIENT_MEM_FRACTION', '.12'),
          'PYTHONUNBUFFERED': '1', 'TF_CPP_MIN_LOG_LEVEL': '1'}


def older(version: str, floor: str) -> bool:
  number = lambda text: [int(''.join(c for c in part if c.isdigit()) or 0) for part in text.split('.')[:3]]
  return number(version) < number(floor)


def wheels_to_install(wheels: list[pathlib.Path]) -> list[pathlib.Path]:
  """The wheels to install: a spare one only where the machine's package is missing or too old."""
  found = []
  for wheel in wheels:
    name = wheel.name.split('-')[0].replace('_', '-').lower()
    try:
      if name in SPARE and not older(importlib.metadata.version(name), SPARE[name]):
        continue
    except importlib.metadata.PackageNotFoundError:
      pass
    found.append(wheel)
  return found


def install(wheels: list[pathlib.Path], store: pathlib.Path, say: Callable[[str], None]) -> None:
  """Install the wheels into the store's own folder, all of them or none."""
  new, names = store / 'site.new', sorted(w.name for w in wheels)
  mark = store / 'site' / 'wheels.json'
  if not wheels or mark.exists() and json.loads(mark.read_text()) == names:
    return
  for folder in (new, store / 'site'):
    shutil.rmtree(folder, ignore_errors=True)
  pip = [sys.executable, '-m', 'pip', 'install', '-q', '--no-index', '--no-deps', '--no-compile', '--no-cache-dir']
  done = subprocess.run([*pip, '--target', str(new), *map(str, wheels)], capture_output=True, text=True)
  if done.returncode:
    say(f'wheels: {done.stderr.strip().splitlines()[-1:]}')
    return
  (new / 'wheels.json').write_text(json.dumps(names))
  new.rename(store / 'site')
  say(f'{len(wheels)} wheels installed in {store / "site"}: {", ".join("-".join(w.split("-")[:2]) for w in names)}')


def take(load: pathlib.Path, store: pathlib.Path, say: Callable[[str], None]) -> None:
  """Keep what the folder `load` carries in `store`, where the next call finds it. Damaged files are left out, and a line
  says so."""
  if not load.is_dir():
    say(f'{load} is not here: this call carries nothing')
    return
  listed = json.loads((load / LIST).read_text())
  (store / 'data').mkdir(parents=True, exist_ok=True)
  for name, sha256 in listed.items():
    file = load / name
    if not file.is_file() or digest(file) != sha256:
      say(f'{file} did not arrive whole: left out')
    elif not name.startswith('whl/') and not (store / 'data' / name).exists():
      shutil.copyfile(file, store / 'data' / f'{name}.tmp')
      (store / 'data' / f'{name}.tmp').rename(store / 'data' / name)
  install(wheels_to_install(sorted((load / 'whl').glob('*.whl'))), store, say)


def commit(store: pathlib.Path) -> str:
  """The commit of the checkout that the load was packed in. On the machine there is no git folder to ask."""
  file = store / 'data' / 'commit.txt'
  return file.read_text().strip() if file.exists() else 'unknown'


def missing(store: pathlib.Path) -> list[str]:
  """The parts of CIFAR-10 that are not on this machine; none where it is prepared."""
  if (store / 'tfds' / 'cifar10' / '3.0.2').is_dir():
    return []
  return [name for half in HALVES.values() for name in half if not (store / 'data' / name).exists()]


def repeat(names: list[str]) -> str:
  """What to type to bring the files that are missing."""
  which = [call for call, half in HALVES.items() if set(half) & set(names)]
  return ', then '.join([*(f'{call} with --only load' for call in which), 'call2 again (while this machine is warm)'])

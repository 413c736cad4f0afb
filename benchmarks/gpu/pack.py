"""Make the folders that the calls carry, .gpu/call1 and .gpu/call2. Print each call as it is typed, and its size."""
import email
import json
import pathlib
import re
import shutil
import subprocess
import sys
import zipfile

import carried

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
LIMIT = 64 * 2**20  # bytes of a call: the working tree and what it carries
MACHINE = pathlib.Path('/work/.library/device/KINDS.md')  # whose list of packages says what need not travel
# As rehearsed, for Python 3.12 on x86-64: what the package needs and that machine has not, with its own needs.
WHEELS = ('tensorflow-datasets==4.9.10', 'dm-pix==0.4.5', 'ml-collections==1.1.0', 'array_record==0.8.6',
          'simplejpeg==1.9.0', 'pydoe==1.6.0', 'dm-tree==0.1.10', 'immutabledict==4.3.1', 'simple_parsing==0.1.9',
          'tensorflow-metadata==1.21.0', 'termcolor==3.3.0', 'toml==0.10.2', 'portpicker==1.6.0', 'docstring_parser==0.18.0',
          'googleapis-common-protos==1.76.0', 'importlib_resources==7.1.0')
SOURCES = ('promise==2.3',)  # has no wheel; it is pure Python
SPARE = ('flax==0.12.12', 'optax==0.2.8', 'orbax-checkpoint==0.12.8', 'protobuf==7.36.2')
PLATFORMS = tuple(f'manylinux_2_{n}_x86_64' for n in (28, 27, 24, 17)) + ('manylinux2014_x86_64', 'manylinux1_x86_64')
CALLS = {'call1': 6., 'call2': 7.}  # minutes; call 3 has what is left
START = 20  # seconds that a command may run over its --minutes before it is killed


def download(folder: pathlib.Path) -> None:
  """Download the wheels into `folder`, and keep those that are there."""
  folder.mkdir(parents=True, exist_ok=True)
  pip = [sys.executable, '-m', 'pip']
  platforms = [word for p in PLATFORMS for word in ('--platform', p)]
  subprocess.run([*pip, 'download', '-q', '--no-deps', '--only-binary=:all:', '--python-version', '3.12',
                  '--implementation', 'cp', *platforms, '-d', str(folder), *WHEELS, *SPARE], check=True)
  subprocess.run([*pip, 'wheel', '-q', '--no-deps', '-w', str(folder), *SOURCES], check=True)


def plain(name: str) -> str:
  return re.sub(r'[-_.]+', '-', name).lower()


def lacking(wheels: list[pathlib.Path], there: set[str]) -> list[str]:
  """The packages that these wheels need on Linux and that are neither among them nor `there` (plain names): 'name (of
  WHEEL)'."""
  from packaging.requirements import Requirement
  env = {'python_version': '3.12', 'python_full_version': '3.12.3', 'platform_system': 'Linux', 'sys_platform': 'linux',
         'platform_machine': 'x86_64', 'extra': ''}
  own, found = {plain(w.name.split('-')[0]) for w in wheels}, []
  for wheel in wheels:
    with zipfile.ZipFile(wheel) as z:
      about = email.message_from_bytes(z.read(next(n for n in z.namelist() if n.endswith('.dist-info/METADATA'))))
    for text in about.get_all('Requires-Dist') or ():
      need = Requirement(text)
      if plain(need.name) not in own | there and (need.marker is None or need.marker.evaluate(env)):
        found.append(f'{need.name} (of {wheel.name.split("-")[0]})')
  return sorted(set(found))


def on_the_machine(page: pathlib.Path) -> set[str]:
  """The plain names that the page lists under 'Python packages already there'; none where there is no page."""
  if not page.is_file():
    return set()
  listed = page.read_text().partition('## Python packages already there')[2].partition('Packages: ')[2]
  return {plain(n.strip(' .\n')) for n in listed.partition('\n')[0].split(',')}


def head() -> str:
  """The commit of this checkout, and whether files differ from it."""
  git = lambda *args: subprocess.run(['git', *args], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
  return git('rev-parse', 'HEAD') + ('+modified' if git('status', '--porcelain') else '')


def load(folder: pathlib.Path, names: tuple[str, ...], data: pathlib.Path, wheels: list[pathlib.Path]) -> int:
  """Make a call's folder of the data's files `names` and the wheels, with their checksums. Returns its bytes."""
  shutil.rmtree(folder, ignore_errors=True)
  (folder / 'whl').mkdir(parents=True)
  for name in (*names, 'unpack.py'):
    shutil.copyfile(data / name, folder / name)
  (folder / 'commit.txt').write_text(head() + '\n')
  for wheel in wheels:
    shutil.copyfile(wheel, folder / 'whl' / wheel.name)
  files = [f for f in folder.rglob('*') if f.is_file()]
  listed = {str(f.relative_to(folder)): carried.digest(f) for f in files}
  (folder / carried.LIST).write_text(json.dumps(listed, indent=1) + '\n')
  return sum(f.stat().st_size for f in folder.rglob('*') if f.is_file())


def fitted(own: int, folder: pathlib.Path, names: tuple[str, ...], data: pathlib.Path, wheels: list[pathlib.Path],
           limit: int = LIMIT) -> tuple[int, list[pathlib.Path]]:
  """Do `load`, without the spare wheels where the folder would be too large with them and with `own` bytes of code. Returns
  (bytes, its wheels)."""
  spare = tuple(plain(s.split('==')[0]) for s in SPARE)
  size = own + load(folder, names, data, wheels)
  if size > limit:
    wheels = [w for w in wheels if plain(w.name.split('-')[0]) not in spare]
    size = own + load(folder, names, data, wheels)
  return size, wheels


def traveling(root: pathlib.Path) -> list[str]:
  """The files of the working tree that travel: tracked ones, and untracked ones that git does not ignore."""
  git = ['git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard']
  listed = subprocess.run(git, cwd=root, capture_output=True, text=True, check=True).stdout
  return [n for n in listed.split('\0') if n and (root / n).is_file()]


def tree(root: pathlib.Path) -> int:
  """The bytes of these files."""
  return sum((root / n).stat().st_size for n in traveling(root))


def call(name: str, minutes: float | str, carry: str) -> str:
  """A call of the device tool, as it is typed."""
  seconds = min(600, round(60 * minutes) + START) if isinstance(minutes, float) else 'the same in seconds + 20'
  carries = f'carry=["{carry}"], ' if carry else ''
  number = f'{minutes:g}' if isinstance(minutes, float) else minutes
  return f'run(command="python3 benchmarks/gpu/lease.py {name} --minutes {number}", {carries}timeout_s={seconds})'


def main(data: pathlib.Path, root: pathlib.Path = ROOT) -> int:
  """Pack both loads from `data`. Returns 2 where something is missing or a call would be too large."""
  names = [n for half in carried.HALVES.values() for n in half]
  absent = [n for n in (*names, 'unpack.py') if not (data / n).is_file()]
  if absent:
    print(f'lease.py: {data} has no {", ".join(absent)}. Say where CIFAR-10\'s parts are: --data FOLDER', file=sys.stderr)
    return 2
  download(root / '.gpu' / 'whl')
  wheels = sorted((root / '.gpu' / 'whl').glob('*.whl'))
  there = on_the_machine(MACHINE)
  if there and (lacks := lacking(wheels, there)):
    print(f'lease.py: neither carried nor there: {", ".join(lacks)}. Add them to WHEELS in {__file__}', file=sys.stderr)
    return 2
  own, code = tree(root), 0
  for name, minutes in CALLS.items():
    size, taken = fitted(own, root / '.gpu' / name, carried.HALVES[name], data, wheels)
    code = code if size <= LIMIT else 2
    print(f'{name}: {size / 2**20:.2f} of {LIMIT / 2**20:.0f} MiB{"" if size <= LIMIT else ": TOO LARGE, commit less"} '
          f'(code {own / 2**20:.2f}, {len(taken)} wheels {sum(w.stat().st_size for w in taken) / 2**20:.2f})')
    print(f'  {call(name, minutes, f".gpu/{name}")}')
  print(f'call3: {own / 2**20:.2f} MiB, nothing carried\n  {call("call3", "(budget_left_s - 60) / 60", "")}')
  print('Between the calls `status` (free) says budget_left_s: call 2 has min(9, (budget_left_s - 60) / 60) minutes,')
  print('and must follow within 30 s. After the last: give_back; then python benchmarks/gpu/restore.py FOLDER ... --out DIR')
  return code

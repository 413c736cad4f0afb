"""The house stands on its floors: a module imports only from floors below its own, or sideways without a cycle."""
import ast
import itertools
import pathlib
import re
import subprocess
import sys

import equivariant_ssl

ROOT = pathlib.Path(equivariant_ssl.__file__).parent
# Of each floor the rooms (folders) and modules; a module that is named here is not on the floor of its room.
FLOORS = (
    {'__init__', 'types', 'keys', 'registry', 'errors', 'renamed', 'storage.disk', 'shipped', 'dotted', 'training.stop'},
    {'augment', 'losses'},
    {'nets'},
    {'invariance', 'equivariance'},
    {'training', 'parallel.sharding'},
    {'config', 'config_fields', 'config_overrides', 'data', 'evaluate', 'storage', 'parallel.cluster',
     'parallel.processes', 'parallel.shared_work', 'training.progress', 'training.run_config', 'training.runs', 'training.feeds',
     'training.step_log', 'training.loop'},
    {'parallel', 'study', 'report', 'export', 'demo', 'doctor', 'cli_arguments', 'cli_overrides', 'cli', '__main__', 'encoder',
     'run_arguments', 'api'},
)
KNOWN = set().union(*FLOORS)


def module(path: pathlib.Path) -> str:
  """The dotted name of a file below the package: 'training.step'."""
  return '.'.join(path.relative_to(ROOT).with_suffix('').parts)


def imports(path: pathlib.Path) -> set[str]:
  """Dotted names, below the package where they are its own, that a file imports, at module level or inside functions."""
  found = set()
  for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
    if isinstance(node, ast.Import):
      found |= {a.name for a in node.names}
    elif isinstance(node, ast.ImportFrom) and node.module:
      found |= {f'{node.module}.{a.name}' for a in node.names} | {node.module}
  return found


def package_imports(path: pathlib.Path) -> set[str]:
  """The modules of this package that a file imports: 'training.step'; a room where a name of its __init__ is imported."""
  there = lambda name: (ROOT / name.replace('.', '/')).with_suffix('.py').is_file()
  found = set()
  for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
    if isinstance(node, ast.ImportFrom) and node.module and node.module.split('.')[0] == 'equivariant_ssl':
      room = node.module.partition('.')[2]
      names = {f'{room}.{a.name}'.strip('.') for a in node.names}
      found |= {n if there(n) or not room else room for n in names}
  return found - {'__version__'}


def floor(name: str) -> int:
  """The number of the floor of a module: its own, else that of its room."""
  known = next(n for n in (name, name.split('.')[0]) if n in KNOWN)
  return next(i for i, f in enumerate(FLOORS) if known in f)


def test_modules_import_from_floors_below():
  wrong = [f'{path.relative_to(ROOT)} (floor {floor(module(path))}) imports {name} (floor {floor(name)})'
           for path in ROOT.rglob('*.py') for name in package_imports(path) if floor(name) > floor(module(path))]
  assert not wrong, '\n'.join(wrong)


def test_imports_have_no_cycle():
  edges = {module(p): package_imports(p) for p in ROOT.rglob('*.py')}
  whole = set()

  def visit(name, trail):
    assert name not in trail, ' -> '.join([*trail, name])
    for after in () if name in whole else edges.get(name, ()):
      visit(after, [*trail, name])
    whole.add(name)
  for name in edges:
    visit(name, [])


def test_a_file_name_says_which_file_it_is():
  """No two files of the package are named alike, but for what means the same: no objective, a package's own."""
  names = [p.name for p in ROOT.rglob('*.py') if p.name not in ('__init__.py', 'none.py')]
  assert sorted(names) == sorted(set(names))


def test_tests_mirror_the_rooms():
  """Each room has a folder of tests; pytest needs a different name of each file."""
  tests = pathlib.Path(__file__).parent
  files = list(tests.rglob('test_*.py'))
  rooms = {p.name for p in ROOT.iterdir() if p.is_dir() and any(p.glob('*.py'))}
  assert {p.parent.name for p in files} == rooms | {tests.name, 'benchmarks', 'faults', 'golden'}
  assert len({p.name for p in files}) == len(files)


def test_flax_is_behind_its_firewall():
  for path in ROOT.rglob('*.py'):
    if path.relative_to(ROOT).parts[0] not in ('nets', 'equivariance'):
      assert not any(n.split('.')[0] == 'flax' for n in imports(path)), path


def test_orbax_is_behind_checkpoint():
  for path in ROOT.rglob('*.py'):
    if path.name not in ('checkpoint.py', 'checkpoint_writer.py'):
      assert not any(n.startswith('orbax') for n in imports(path)), path


def test_configs_import_ml_collections_alone():
  for path in (ROOT.parent / 'configs').glob('*.py'):
    assert {n.split('.')[0] for n in imports(path)} == {'ml_collections'}, path


def test_the_package_imports_no_tensorflow():
  code = ('import sys, equivariant_ssl.cli, equivariant_ssl.training.loop, equivariant_ssl.evaluate.evaluation;'
          'import equivariant_ssl.demo.digits_demo; sys.exit("tensorflow" in sys.modules)')
  assert subprocess.run([sys.executable, '-c', code]).returncode == 0


def test_files_and_functions_stay_readable():
  """No file much over 250 lines, no function over 60."""
  for path in ROOT.rglob('*.py'):
    text = path.read_text(encoding='utf-8')
    assert len(text.splitlines()) <= 300, path
    for node in ast.walk(ast.parse(text)):
      if isinstance(node, ast.FunctionDef):
        assert node.end_lineno - node.lineno < 60, f'{path}: {node.name}'


MODULES = {'os', 'Image', 'tarfile', 'zipfile', 'checkpoint', 'webbrowser'}  # whose `open` opens no text, or is no file's


def unsaid(call: ast.Call) -> bool:
  """Whether a call reads or writes text in whatever encoding the locale has."""
  name = getattr(call.func, 'attr', getattr(call.func, 'id', ''))
  given = {k.arg: k.value for k in call.keywords}
  if 'encoding' in given or name == 'read_text' and call.args:
    return False
  if name in ('read_text', 'write_text'):
    return True
  if name in ('open', 'fdopen', 'NamedTemporaryFile'):
    if isinstance(call.func, ast.Attribute) and getattr(call.func.value, 'id', '') in MODULES and name == 'open':
      return False
    modes = [a.value for a in [*call.args[:2], given.get('mode')] if isinstance(a, ast.Constant)]
    modes = [m for m in modes if isinstance(m, str) and re.fullmatch('[rwaxbt+|]+', m)]
    return not any('b' in m for m in modes) and name != 'NamedTemporaryFile' or 'w' in modes
  text = given.get('text', given.get('universal_newlines'))
  return isinstance(text, ast.Constant) and text.value is True


def test_text_is_utf_8_in_any_locale():
  """Every file and pipe of text says its encoding."""
  wrong = [f'{path.relative_to(ROOT)}:{node.lineno}' for path in ROOT.rglob('*.py')
           for node in ast.walk(ast.parse(path.read_text(encoding='utf-8')))
           if isinstance(node, ast.Call) and unsaid(node)]
  assert not wrong, 'encoding=\'utf-8\' is missing: ' + ', '.join(wrong)


TYPED = re.compile(r'(eqssl( [a-z]+)+( --[a-z-]+)*|--(workdir|out|root|resume|run|data-path)|\b(sbatch|mkdir -p|cd))[ =]$')
QUOTED = {'quote', 'join'}  # of shlex; or a name that holds what they gave
OWN = {'n'}  # names that the code itself lists


def test_paths_in_hints_are_quoted():
  """What a line says to type works where a folder's name has spaces: `eqssl resume {workdir}` is not enough."""
  wrong = []
  for path in ROOT.rglob('*.py'):
    tree = ast.parse(path.read_text(encoding='utf-8'))
    named = {t.id for node in ast.walk(tree) if isinstance(node, ast.Assign) and 'shlex.' in ast.unparse(node.value)
             for t in node.targets if isinstance(t, ast.Name)}
    for node in ast.walk(tree):
      for text, part in itertools.pairwise(node.values) if isinstance(node, ast.JoinedStr) else ():
        if isinstance(text, ast.Constant) and isinstance(part, ast.FormattedValue) and TYPED.search(text.value):
          value = part.value
          good = (value.func.attr in QUOTED if isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute) else
                  isinstance(value, ast.Name) and value.id in named | OWN)
          wrong += [] if good else [f'{path.relative_to(ROOT)}:{part.lineno}: {text.value[-30:]}{{{ast.unparse(value)}}}']
  assert not wrong, '\n'.join(wrong)


def test_every_folder_is_a_package():
  """A folder without __init__.py is imported from a checkout, and is missing in a wheel."""
  folders = {path.parent for path in ROOT.rglob('*.py')}
  assert not [str(folder) for folder in folders if not (folder / '__init__.py').is_file()]

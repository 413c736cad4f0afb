"""One concept, one word: the code uses the glossary's words, and no retired one."""
import ast
import functools
import pathlib
import re

import pytest

import equivariant_ssl
from equivariant_ssl import types

PACKAGE = pathlib.Path(equivariant_ssl.__file__).parent
ROOT = PACKAGE.parent
GLOSSARY = (ROOT / 'docs' / 'glossary.md').read_text(encoding='utf-8')
# Identifiers that are retired, and what is said in their place.
RETIRED = {
    'told': 'conditioning, or augmentations', 'seen': 'view_chains', 'own': 'own_chains',
    'aimed': 'target_embeddings', 'aim': 'target', 'lie': 'shard_state', 'shown': 'views',
    'found': 'what it is', 'given': 'what it is',
    'kept': 'what is kept', 'wanted': 'what is wanted', 'moved': 'what has moved',
    'made': 'what it is', 'still': 'what it is', 'there': 'what is there', 'which': 'what it is',
    'who': 'what it is', 'asked': 'questions', 'meant': 'literal', 'wired': 'build_objectives',
    'watched': 'probe_features', 'merged': 'merge_groups', 'unknown': 'unknown_name',
    'slow_start': 'warmup_warning', 'grey': 'luma, or gray',
    'colour': 'color', 'colours': 'colors', 'normalise': 'normalize', 'normalised': 'normalized',
    'initialise': 'initialize', 'initialiser': 'initializer', 'optimiser': 'optimizer',
    'centre': 'center', 'centred': 'center', 'neighbour': 'neighbor', 'neighbours': 'neighbors'}
# British spellings. Docstrings, comments and messages are in American English.
BRITISH = re.compile(r'\b\w*(?:normalis|initialis|optimis(?!t)|standardis|regularis|quantis|penalis'
                     r'|summaris|organis|recognis|minimis|maximis|parametris|serialis|synchronis'
                     r'|colour|neighbour|behaviour|artefact|centre(?!d)|centred|labelled|levelled'
                     r'|travelling|solaris|(?<![a-z])greys?(?![a-z]))\w*', re.IGNORECASE)
# Names in files that users have, and those of other libraries.
OLD_NAMES = {'labelled', 'grey', 'neighbours', 'quantise'}  # what `renamed.py` reads
TFDS_SPLIT = {'unlabelled'}                                 # of TFDS's STL-10
ALLOWED = {
    'equivariant_ssl/renamed.py': OLD_NAMES, 'tests/test_config.py': OLD_NAMES,
    'tests/test_cli.py': OLD_NAMES, 'tests/data/test_card.py': OLD_NAMES,
    'equivariant_ssl/data/card.py': {'labelled'},  # in the digests of the data in result files
    'equivariant_ssl/evaluate/inputs.py': {'centre'},  # these three: keys of result files
    'equivariant_ssl/evaluate/probe.py': {'centred'},
    'equivariant_ssl/evaluate/result_files.py': {'centred', 'quantise'},
    'tests/evaluate/test_cached.py': {'centred', 'quantise'},
    'equivariant_ssl/data/archives.py': TFDS_SPLIT, 'equivariant_ssl/data/tfds.py': TFDS_SPLIT,
    'equivariant_ssl/parallel/step_plan.py': TFDS_SPLIT, 'tests/data/test_prepare.py': TFDS_SPLIT,
    'tests/parallel/test_plan.py': TFDS_SPLIT, 'configs/stl10_simclr_augself.py': TFDS_SPLIT,
    'configs/stl10_simclr_stl.py': TFDS_SPLIT}


def files(*folders: str) -> list[pathlib.Path]:
  """The Python files of folders; of the whole package where none is named."""
  return sorted(file for folder in folders or [PACKAGE.name]
                for file in (ROOT / folder).rglob('*.py') if file.name != 'test_words.py')


def identity(path: pathlib.Path) -> str:
  return path.relative_to(ROOT).as_posix()


@functools.cache
def tree_of(path: pathlib.Path) -> ast.Module:
  return ast.parse(path.read_text(encoding='utf-8'))


def identifiers(tree: ast.AST) -> set[tuple[str, int]]:
  """{(identifier, line)}: names of variables, arguments, functions, classes, fields and imports."""
  names = set()
  for node in ast.walk(tree):
    fields = {ast.Name: 'id', ast.arg: 'arg', ast.FunctionDef: 'name', ast.ClassDef: 'name',
              ast.Attribute: 'attr', ast.keyword: 'arg', ast.alias: 'name'}
    field = fields.get(type(node))
    if isinstance(node, ast.Attribute) and getattr(node.value, 'id', '') == 'shutil':
      continue  # `shutil.which`
    if field and getattr(node, field):
      names.add((getattr(node, field), getattr(node, 'lineno', 0)))
  return names


def test_no_retired_word():
  wrong = [f'{identity(path)}:{line}: {name} (say: {RETIRED[name]})' for path in files()
           for name, line in sorted(identifiers(tree_of(path)), key=lambda x: x[1])
           if name in RETIRED]
  assert not wrong, '\n'.join(wrong)


def test_no_function_of_tests_and_benchmarks_has_a_retired_name():
  """Their locals are free: in a test, what is `wanted` stands beside what was `found`."""
  wrong = [f'{identity(path)}:{node.lineno}: {node.name} (say: {RETIRED[node.name]})'
           for path in files('tests', 'benchmarks', 'configs')
           for node in ast.walk(tree_of(path))
           if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name in RETIRED]
  assert not wrong, '\n'.join(wrong)


@pytest.mark.parametrize('folder', (PACKAGE.name, 'tests', 'benchmarks', 'configs'))
def test_american_english(folder):
  wrong = [f'{identity(path)}:{number}: {word}' for path in files(folder)
           for number, line in enumerate(path.read_text(encoding='utf-8').splitlines(), 1)
           for word in BRITISH.findall(line) if word not in ALLOWED.get(identity(path), set())]
  assert not wrong, '\n'.join(wrong)


def test_what_is_allowed_is_there():
  missing = [f'{name}: {word}' for name, words in ALLOWED.items() if words is not OLD_NAMES
             for word in words if word not in (ROOT / name).read_text(encoding='utf-8')]
  assert not missing


def test_lines_are_short_and_no_lambda_binds_a_loop_variable():
  names = {identity(path): path for path in files()}
  wrong = [f'{name}:{number}: {len(line)} characters' for name, path in names.items()
           for number, line in enumerate(path.read_text(encoding='utf-8').splitlines(), 1)
           if len(line) > 100]
  wrong += [f'{name}:{node.lineno}: a lambda with a default argument'
            for name, path in names.items() for node in ast.walk(tree_of(path))
            if isinstance(node, ast.Lambda) and (node.args.defaults or node.args.kw_defaults)]
  assert not wrong, '\n'.join(wrong)


def test_the_check_sees_every_kind_of_identifier():
  code = ('def told(seen, *, own): found = seen.aimed(lie=own)\n'
          'class Shown: shown: int\nfrom x import given\n')
  assert {'told', 'seen', 'own', 'found', 'aimed', 'lie', 'Shown', 'shown', 'given'} <= {
      name for name, _ in identifiers(ast.parse(code))}
  assert not identifiers(ast.parse('shutil.which')) - {('shutil', 1)}
  assert BRITISH.findall('optimiser, greys, grey_1, Colours, _centre') == [
      'optimiser', 'greys', 'grey_1', 'Colours', '_centre']
  assert not BRITISH.findall('optimistic, greyhound, centers, unlabeled')


def test_a_class_has_a_name_of_its_own():
  trees = [tree_of(path) for path in files()]
  names = [node.name for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)]
  both = {'Block', 'Architecture'}  # a ResNet's and a ViT's
  twice = {name for name in names if names.count(name) > 1} - both
  assert not twice


def test_no_module_has_an_alias_and_no_name_is_passed_on():
  """A module is imported under its name, a function from the module that it is defined in: no `X as X`."""
  for path in PACKAGE.rglob('*.py'):
    for node in ast.walk(tree_of(path)):
      if isinstance(node, ast.ImportFrom) and (node.module or '').startswith('equivariant_ssl'):
        folder = PACKAGE.parent / node.module.replace('.', '/')
        for name in node.names:
          is_module = (folder / f'{name.name}.py').is_file() or (folder / name.name).is_dir()
          assert not name.asname or not is_module and name.asname != name.name, (
              f'{path.name}: {name.name} as {name.asname}')


def test_the_glossary_has_the_words_of_the_code():
  """What it says of types and fields is there, and each type of types.py is in it."""
  fields = re.findall(r'`([A-Z]\w+)\.(\w+)`', GLOSSARY)
  named = {name: getattr(types, name) for name, _ in fields if hasattr(types, name)}
  missing = [f'{name}.{field}' for name, field in fields
             if name in named and field not in named[name]._fields]
  assert named and not missing
  nouns = {name for name, value in vars(types).items()
           if isinstance(value, type) and issubclass(value, tuple)}
  assert {name for name in nouns if not re.search(rf'`(types\.)?{name}[`.]', GLOSSARY)} == set()

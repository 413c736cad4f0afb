"""One concept, one word: rooms that are done use the glossary's words and no retired one."""
import ast
import pathlib
import re

import pytest

import equivariant_ssl
from equivariant_ssl import types

PACKAGE = pathlib.Path(equivariant_ssl.__file__).parent
GLOSSARY = (PACKAGE.parent / 'docs' / 'glossary.md').read_text(encoding='utf-8')
# Files and folders of the package whose words are settled. Extend it when a room is done.
ROOMS = ('__init__.py', 'types.py', 'keys.py', 'errors.py', 'registry.py', 'losses.py',
         'renamed.py', 'training/optim.py', 'training/recipe.py', 'training/state.py',
         'training/step.py', 'parallel/sharding.py', 'augment', 'nets', 'invariance',
         'equivariance')
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
BRITISH = re.compile(r'\b\w*(?:normalis|initialis|optimis|standardis|regularis|colour|neighbour'
                     r'|\bgrey\b|centre\b|centred|labelled|levelled|solaris)\w*', re.IGNORECASE)
# Names that older versions had, which `renamed.py` must know to read them.
OLD_NAMES = {'renamed.py': {'told', 'grey'}}


def files() -> list[pathlib.Path]:
  return sorted(file for room in ROOMS
                for file in ([PACKAGE / room] if room.endswith('.py') else
                             (PACKAGE / room).rglob('*.py')))


def identifiers(tree: ast.AST) -> set[tuple[str, int]]:
  """{(identifier, line)}: names of variables, arguments, functions, classes, fields and imports."""
  names = set()
  for node in ast.walk(tree):
    fields = {ast.Name: 'id', ast.arg: 'arg', ast.FunctionDef: 'name', ast.ClassDef: 'name',
              ast.Attribute: 'attr', ast.keyword: 'arg', ast.alias: 'name'}
    field = fields.get(type(node))
    if field and getattr(node, field):
      names.add((getattr(node, field), getattr(node, 'lineno', 0)))
  return names


@pytest.mark.parametrize('path', files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_retired_word(path):
  text = path.read_text(encoding='utf-8')
  wrong = [f'{path.name}:{line}: {name} (say: {RETIRED[name]})'
           for name, line in sorted(identifiers(ast.parse(text)), key=lambda x: x[1])
           if name in RETIRED]
  allowed = OLD_NAMES.get(path.name, set())
  wrong += [f'{path.name}:{number}: {word} (American English)'
            for number, line in enumerate(text.splitlines(), 1)
            for word in BRITISH.findall(line) if word not in allowed]
  assert not wrong, '\n'.join(wrong)


@pytest.mark.parametrize('path', files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_lines_are_short_and_no_lambda_binds_a_loop_variable(path):
  text = path.read_text(encoding='utf-8')
  assert max(map(len, text.splitlines())) <= 100
  wrong = [node.lineno for node in ast.walk(ast.parse(text))
           if isinstance(node, ast.Lambda) and (node.args.defaults or node.args.kw_defaults)]
  assert not wrong, f'{path.name}: a lambda with a default argument in lines {wrong}'


def test_the_check_sees_every_kind_of_identifier():
  code = ('def told(seen, *, own): found = seen.aimed(lie=own)\n'
          'class Shown: shown: int\nfrom x import given\n')
  assert {'told', 'seen', 'own', 'found', 'aimed', 'lie', 'Shown', 'shown', 'given'} <= {
      name for name, _ in identifiers(ast.parse(code))}
  assert BRITISH.findall('optimiser, greys, grey, Colours') == ['optimiser', 'grey', 'Colours']


def test_a_class_has_a_name_of_its_own():
  trees = [ast.parse(path.read_text(encoding='utf-8')) for path in files()]
  names = [node.name for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)]
  twice = {name for name in names if names.count(name) > 1} - {'Block'}  # a ResNet's and a ViT's
  assert not twice


def test_no_module_has_an_alias_and_no_name_is_passed_on():
  """A module is imported under its name, a function from the module that it is defined in: no `X as X`."""
  for path in PACKAGE.rglob('*.py'):
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
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

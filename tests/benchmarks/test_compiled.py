"""benchmarks/compiled.py: the programs of eight configs for an H100 and a TPU v5e stay as small as the file has them."""
import importlib.util
import pathlib

import pytest

from equivariant_ssl.errors import UserError
from equivariant_ssl.parallel.accelerators import parse_target

SPEC = importlib.util.spec_from_file_location(
    'compiled', pathlib.Path(__file__).parents[2] / 'benchmarks' / 'compiled.py')
compiled = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(compiled)


def test_the_file_has_every_program():
  kept = compiled.recorded()
  assert set(kept) == {f'{name} on {on}' for name, on in compiled.programs('')}
  for key, figures in kept.items():
    assert sum(figures['moved_by_part'].values()) == figures['moved'], key
    assert sum(figures['instructions_by_part'].values()) == figures['instructions'], key
    assert figures['peak'] > 0 and figures['program'] and 'jax' in figures['compiler'], key
    assert parse_target(key.split(' on ')[1])


def test_what_is_worse_and_what_is_not():
  old = {'peak': 1000, 'moved': 2000, 'instructions': 100}
  assert compiled.worse(old, {'peak': 1030, 'moved': 1500, 'instructions': 100}) == []
  assert compiled.worse(old, {'peak': 1031, 'moved': 2000, 'instructions': 110}) == [
      'peak 1,000 -> 1,031 (+3.1%)', 'instructions 100 -> 110 (+10.0%)']
  assert compiled.worse({}, old) == []  # a program that is new
  refused = {'peak': 1000, 'moved': 0, 'instructions': 0}  # by a compiler, as it does not fit
  assert compiled.worse(refused, {'peak': 900, 'moved': 5, 'instructions': 5}) == []
  assert compiled.worse({**old, 'fits': True}, {**refused, 'fits': False, 'peak': 1001}) == ['it no longer fits: 1,001 bytes']


@pytest.mark.slow
@pytest.mark.parametrize(('name', 'on'), compiled.programs(''))
def test_no_program_is_worse_than_recorded(name, on, monkeypatch):
  """A program that is unchanged is not compiled; else this takes from half a minute to several."""
  monkeypatch.delenv('XLA_FLAGS')  # the suite's, which would turn optimizations off
  old = compiled.recorded()[f'{name} on {on}']
  try:
    lines = compiled.compare(name, on, old)
  except UserError as error:
    if 'is missing' not in str(error):
      raise
    pytest.skip(' '.join(str(error).split()))
  assert not lines, (f'{name} on {on}: {lines}, recorded with {old["compiler"]}. If it has to be so: '
                     'python benchmarks/compiled.py --record')

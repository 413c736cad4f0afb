"""benchmarks/compiled.py: the programs of eight configs for an H100 and a TPU v5e stay as small as the file has them."""
import importlib.util
import pathlib
import shutil

import pytest

from equivariant_ssl.errors import UserError
from equivariant_ssl.parallel.accelerators import parse_target

SPEC = importlib.util.spec_from_file_location(
    'compiled', pathlib.Path(__file__).parents[2] / 'benchmarks' / 'compiled.py')
compiled = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(compiled)


def test_the_file_is_of_these_programs():
  kept = compiled.recorded()
  assert kept and set(kept) <= {f'{name} on {on}' for name, on in compiled.programs('')}
  for key, figures in kept.items():
    assert sum(figures['moved_by_part'].values()) == figures['moved'], key
    assert sum(figures['instructions_by_part'].values()) == figures['instructions'], key
    assert figures['peak'] > 0 and figures['program'] and 'jax' in figures['compiler'], key
    assert parse_target(key.split(' on ')[1])


def test_the_table_and_the_docstrings_say_what_the_file_has(monkeypatch, tmp_path):
  """A row for each program, a change for one that does not fit, a docstring that keeps its other parts."""
  root, name = compiled.ROOT, 'imagenet_simclr'
  for part in ('docs/scaling.md', f'configs/{name}.py'):
    (tmp_path / part).parent.mkdir(exist_ok=True)
    shutil.copy(root / part, tmp_path / part)
  monkeypatch.setattr(compiled, 'ROOT', tmp_path)
  monkeypatch.setattr(compiled, 'PROGRAMS', {name: ('h100:8', 'v5e:4x8')})
  one = {'peak': 40 * 2**30, 'limit': 71 * 2**30, 'fits': True, 'moved': 5 * 10**9, 'instructions': 1234, 'seconds': .125,
         'parameters': 32_170_000, 'steps': 1000, 'flops': 197e12, 'compiler': 'jax 1'}
  refused = one | {'peak': 20 * 2**30, 'limit': 16 * 2**30, 'fits': False, 'moved': 0, 'instructions': 0,
                   'fits_with': [['--config.accumulate=2', 11 * 2**30]]}
  kept = {f'{name} on h100:8': one, f'{name} on v5e:4x8': refused}
  for _ in range(2):  # the second time it replaces what the first wrote
    compiled.publish(kept)
    page = (tmp_path / 'docs/scaling.md').read_text(encoding='utf-8')
    assert page.count('| `h100:8` | 40.0 of 71.0 | yes | 1,234 | 5.0 | 0.125 |  |') == 1
    assert page.count('| `v5e:4x8` | 20.0 of 16.0 | **no** | - | - | - | `--config.accumulate=2`: 11.0 |') == 1
    assert page.count('| fits with |') == 1 and page.count(compiled.MARK) == 1
    text = (tmp_path / f'configs/{name}.py').read_text(encoding='utf-8')
    said = ' '.join(text.split())
    assert 'Planned: 32.17 million parameters, 197 TFLOP a step, 0.197 EFLOP in all. 40.0 GiB of 71.0 on each of 8 x' in said
    assert 'does not fit, but with config.accumulate=2 (11.0)' in said and text.count('Planned:') == 1
    assert text.count('Measured:') == text.count('Published:') == 1 and max(map(len, text.splitlines())) <= 125
    compile(text, name, 'exec')


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
  old = compiled.recorded().get(f'{name} on {on}')
  if old is None:
    pytest.skip('not recorded yet: python benchmarks/compiled.py --record')
  try:
    lines = compiled.compare(name, on, old)
  except UserError as error:
    if 'is missing' not in str(error):
      raise
    pytest.skip(' '.join(str(error).split()))
  assert not lines, (f'{name} on {on}: {lines}, recorded with {old["compiler"]}. If it has to be so: '
                     'python benchmarks/compiled.py --record')

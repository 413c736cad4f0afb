"""Damaged results of a run, and what cannot group runs, are said in a line."""
import json

import pytest

from equivariant_ssl import cli, report
from equivariant_ssl.config import config_to_json, load_config
from equivariant_ssl.errors import UserError
from equivariant_ssl.evaluate import comparison
from equivariant_ssl.evaluate.result_files import stored_result

ABOUT = {'protocol': 'knn', 'data': '0f', 'inputs': {'version': 1}, 'definition': {'version': 1}}
WHOLE = {**ABOUT, 'trained': [{'numbers': {'top1': .5}, 'controls': {}, 'missing': []}]}


@pytest.fixture
def folder(tmp_path):
  (tmp_path / 'eval').mkdir()
  (tmp_path / 'config.json').write_text(json.dumps(config_to_json(load_config('smoke'))))
  (tmp_path / 'eval' / 'knn.json').write_text(json.dumps(WHOLE))
  return tmp_path


@pytest.mark.parametrize('text', [json.dumps(WHOLE)[:-9], '[]', '{"protocol": "knn", "trained": [3]}',
                                  '{"protocol": "knn", "trained": []}', '{"protocol": "knn", "trained": null}'])
def test_a_damaged_result_is_named_and_computed_again(folder, text):
  path = folder / 'eval' / 'knn.json'
  assert stored_result(path, ABOUT, ['trained'], pytest.fail) == WHOLE
  path.write_text(text)
  with pytest.raises(UserError) as error:
    comparison.read_numbers(folder, 'method')
  cause, fix = str(error.value).splitlines()
  assert f'{path} is damaged' in cause and f'eqssl eval {folder}' in fix
  lines = []
  assert stored_result(path, ABOUT, ['trained'], lines.append) is None and 'damaged' in lines[0]


@pytest.mark.parametrize('by,fix', [('augment', '--group-by method or --group-by augment.'),
                                    ('equivariance', 'equivariance.'), ('augment.rotate', 'augment.rotate.')])
def test_a_section_is_no_name_of_a_group(folder, by, fix):
  with pytest.raises(UserError) as error:
    comparison.rows([folder], by)
  cause, said = str(error.value).splitlines()
  assert f'config.{by} is a whole section' in cause and fix in said
  leaf = said.split('--group-by ')[-1]
  assert comparison.rows([folder], leaf)[0].seeds == {0: .5}


def test_several_objectives_are_no_name_of_a_group():
  config = load_config('smoke', {'equivariance': 'equimod,essl'})
  for by, fix in (('equivariance', 'method or --group-by equivariance.0.'), ('equivariance.1', '.*equivariance.1.')):
    with pytest.raises(UserError, match=f'{by} is a whole section.*\n  e.g. --group-by {fix}') as error:
      comparison.group(config, by)
    assert comparison.group(config, str(error.value).split('--group-by ')[-1].rstrip('.'))
  assert comparison.group(config, 'equivariance.1.name') == 'essl'
  with pytest.raises(UserError, match='no .equivariance.2.name. to group by'):
    comparison.group(config, 'equivariance.2.name')


@pytest.mark.parametrize('text', [
    '', '{}', '[]', 'null', '3', '{"seed": ', '{"seed": {"a": 1}}', '{"augment": 3}', '\x00', '[' * 9999, '{"data": [1]}',
    '{"invariance": {"name": {"a": []}}}', '{"equivariance": [[[1]]]}', '{"a.b": 1}', '{"optimizer": {"name": "os"}}',
    '{"batch": 1e999}', '{"encoder": {"name": "../../x"}}'])
@pytest.mark.parametrize('command', ['resume', 'eval', 'report', 'compare', 'export'])
def test_a_damaged_config_is_a_line(command, text, folder, monkeypatch, capsys):
  monkeypatch.chdir(folder.parent)
  monkeypatch.setattr(cli, '_cache', lambda: None)
  (folder / 'config.json').write_text(text)
  (folder / 'metrics.jsonl').write_text('{"step": 1, "loss": {"a": [NaN]}}\n')
  code = cli.main([command, str(folder)])
  err = capsys.readouterr().err
  assert code in (2, 5) and len(err.strip().splitlines()) <= 2 and 'does not know this error' not in err, err


def test_odd_rows_of_a_log_are_a_line_in_a_report(folder, capsys):
  rows = [{'step': 1, 'loss': 2., 'std': .9}, {'step': 2, 'loss': {'a': [1]}, 'std': 'x'}, {'step': 'x'}, 3]
  (folder / 'metrics.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows))
  page = report.report([folder], images=False)
  err = capsys.readouterr().err
  assert err.count('\n') == 1 and '3 lines have something else than' in err and page.is_file()

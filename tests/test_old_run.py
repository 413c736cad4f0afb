"""A run of an earlier version, commit c4dcbaf, is resumed, evaluated, exported and reported.

fixtures/old_run is its folder after 8 steps, without the checkpoint of step 8: `eqssl train --config smoke --workdir old_run
--config.equivariance.told=crop`, then `eqssl eval old_run --protocol knn`. It has no data card and no run.json, its config
says `told`, and its result does not say what it was measured on.
"""
import json
import pathlib
import shutil

import numpy as np
import pytest
from PIL import Image

from equivariant_ssl import cli
from equivariant_ssl.config import load_config, read_config
from equivariant_ssl.data import card
from equivariant_ssl.errors import UserError
from equivariant_ssl.storage import checkpoint, record
from equivariant_ssl.training import loop, run_config, runs

FIXTURE = pathlib.Path(__file__).parent / 'fixtures' / 'old_run'


def eqssl(capsys, *argv):
  """(exit code, what was printed) of a command."""
  code = cli.main(list(map(str, argv)))
  printed = capsys.readouterr()
  return code, printed.out + printed.err


@pytest.fixture
def run(tmp_path, monkeypatch):
  monkeypatch.setattr(cli, '_cache', lambda: None)
  return shutil.copytree(FIXTURE, tmp_path / 'old_run')


def test_a_run_of_an_earlier_version_goes_on(run, capsys):
  before = record.read_metrics(run)
  code, text = eqssl(capsys, 'resume', run, '--quiet')
  assert code == 0, text
  after = record.read_metrics(run)
  assert [r['step'] for r in after] == [r['step'] for r in before] and checkpoint.saved_steps(run / 'checkpoints')[0] == 8
  # Not bitwise: another machine rounds otherwise.
  np.testing.assert_allclose([r['loss'] for r in after], [r['loss'] for r in before], rtol=1e-4)
  data_card = json.loads((run / 'data.json').read_text(encoding='utf-8'))
  assert data_card['since'] == 4 and data_card['train']['count'] == 1000

  old = json.loads((run / 'eval' / 'knn.json').read_text(encoding='utf-8'))['trained'][0]['numbers']
  code, text = eqssl(capsys, 'eval', run, '--protocol', 'knn')
  assert code == 0 and 'knn.json is computed again: an earlier version wrote it' in text, text
  new = json.loads((run / 'eval' / 'knn.json').read_text(encoding='utf-8'))['trained'][0]['numbers']
  assert abs(new['top1'] - old['top1']) < .02

  code, text = eqssl(capsys, 'export', run)
  assert code == 0 and (run / 'export' / 'model.safetensors').is_file(), text
  code, text = eqssl(capsys, 'report', run, '--no-images')
  assert code == 0 and (run / 'report.html').is_file(), text


def test_a_run_on_a_folder_keeps_its_test_images(tmp_path, monkeypatch, capsys):
  """Runs of before `data.test_of` held a share of all images out at once, and their config.json does not say so."""
  monkeypatch.setattr(cli, '_cache', lambda: None)

  def begin(*args):   # all but the steps: the data are read, accepted and recorded
    raise UserError('the first step comes now', code=7)
  monkeypatch.setattr(loop, '_begin', begin)
  photos, workdir, new = tmp_path / 'photos', tmp_path / 'run', tmp_path / 'new'
  for name in ('cat', 'dog', 'hen'):
    (photos / name).mkdir(parents=True)
    for i in range(20):
      Image.fromarray(np.full((8, 8, 3), 10 * i, np.uint8)).save(photos / name / f'{i}.png')
  overrides = {'data.name': 'folder', 'data.path': str(photos), 'data.size': '16', 'batch': '16', 'steps': '2'}
  config = load_config('smoke', overrides | {'data.test_of': 'all'})
  first = runs.prepare_run(config)
  values = json.loads(config.to_json())
  assert values['data'].pop('test_of') == 'all'

  def forget():
    workdir.mkdir(exist_ok=True)
    (workdir / 'config.json').write_text(json.dumps(values), encoding='utf-8')
  forget()
  card.write_card(workdir, first.card)
  command = ['--config', 'smoke', *(f'--config.{k}={v}' for k, v in overrides.items())]
  for argv in (('resume', workdir), ('train', *command, '--workdir', workdir)):
    forget()
    for _ in range(2):   # the second time meets what the first one has written
      code, text = eqssl(capsys, *argv)
      assert (code, 'the first step comes now' in text) == (7, True), (argv, text)
  forget()
  assert runs.reopen_run(workdir).card == first.card
  longer = run_config.keep_rules(load_config('smoke', overrides), new, workdir)   # `new` holds no run yet
  assert longer.data.test_of == read_config(workdir / 'config.json').data.test_of == 'all'
  code, text = eqssl(capsys, 'train', *command, '--workdir', new)
  assert code == 7 and runs.reopen_run(new).config.data.test_of == 'class'
  assert len(runs.reopen_run(new).source.test.images) == 6 != first.card.test.count

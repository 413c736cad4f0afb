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
from equivariant_ssl.storage import checkpoint, record

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
  card = json.loads((run / 'data.json').read_text(encoding='utf-8'))
  assert card['since'] == 4 and card['train']['count'] == 1000

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
  photos, workdir = tmp_path / 'photos', tmp_path / 'run'
  for name in ('cat', 'dog', 'hen'):
    (photos / name).mkdir(parents=True)
    for i in range(20):
      Image.fromarray(np.full((8, 8, 3), 10 * i, np.uint8)).save(photos / name / f'{i}.png')
  command = ('train', '--config', 'smoke', '--workdir', workdir, '--config.data.name=folder', f'--config.data.path={photos}',
             '--config.data.size=16', '--config.batch=16', '--config.steps=2', '--quiet')
  code, text = eqssl(capsys, *command, '--config.data.test_of=all')
  assert code == 0, text
  card = json.loads((workdir / 'data.json').read_text(encoding='utf-8'))

  def forget():
    values = json.loads((workdir / 'config.json').read_text(encoding='utf-8'))
    assert values['data'].pop('test_of') == 'all'
    (workdir / 'config.json').write_text(json.dumps(values), encoding='utf-8')

  for argv in (command, command, ('resume', workdir, '--quiet'), ('eval', workdir, '--protocol', 'knn')):
    if argv != command:
      forget()   # each of these meets the config.json of the old run
    code, text = eqssl(capsys, *argv)
    assert code == 0, (argv, text)
    now = json.loads((workdir / 'data.json').read_text(encoding='utf-8'))
    assert now['test'] == card['test'] and not now['changes'], argv
  longer = tmp_path / 'longer'
  code, text = eqssl(capsys, 'train', '--workdir', longer, '--from', workdir, '--config.steps=3', '--quiet')
  assert code == 0, text
  assert json.loads((longer / 'data.json').read_text(encoding='utf-8'))['test'] == card['test']
  code, text = eqssl(capsys, *command[:3], '--workdir', tmp_path / 'new', *command[5:])
  assert code == 0, text
  assert json.loads((tmp_path / 'new' / 'data.json').read_text(encoding='utf-8'))['test']['count'] == 6 != card['test']['count']

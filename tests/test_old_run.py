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

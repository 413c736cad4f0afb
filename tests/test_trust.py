"""What a run, a study, an export or a data folder says is read, and never run: these come from anyone."""
import contextlib
import json
import os
import pathlib
import pickle
import subprocess
import sys

import numpy as np
import pytest

from equivariant_ssl import shipped
from equivariant_ssl.config import config_to_json, load_config
from equivariant_ssl.data import cache, tfds
from equivariant_ssl.errors import UserError
from equivariant_ssl.report import embeddings, run_folder
from equivariant_ssl.storage import record
from equivariant_ssl.study.runner import isolated_environment
from equivariant_ssl.study.study_plan import read

ROOT = pathlib.Path(__file__).parent.parent
DICT = 'tensorflow_datasets.core.features.features_dict.FeaturesDict'


@pytest.fixture
def evil(tmp_path, monkeypatch):
  """(a folder that one was sent and is in, what is there when something of it was executed)."""
  sent, mark = tmp_path / 'sent', tmp_path / 'executed'
  code = f'import os\nos.mkdir({str(mark)!r})\n' + (ROOT / 'configs' / 'smoke.py').read_text()
  (sent / 'configs').mkdir(parents=True)
  for name in ('evil', 'configs/smoke', 'configs/evil', 'configs/cifar10_quick', 'configs/digits_simclr_equimod', 'jax',
               'numpy', 'json', 'equivariant_ssl', 'sitecustomize'):
    (sent / f'{name}.py').write_text(code)
  monkeypatch.chdir(sent)
  return sent, mark


@pytest.mark.parametrize('named', ['evil.py', '{sent}/evil.py', 'evil', 'smoke', 'configs/smoke.py', './configs/evil.py',
                                   '../sent/evil', '--config=configs/evil.py', '"evil.py'])
def test_the_config_that_a_run_names_is_not_run(named, evil):
  sent, mark = evil
  said = named if named.startswith('--') else f'--config {named.format(sent=sent)}'
  record.start_record(sent, config_to_json(load_config(str(ROOT / 'configs' / 'smoke.py'))), f'eqssl train {said} --workdir x')
  found = run_folder.base(run_folder.read(sent))
  assert not mark.exists()
  known = 'smoke' in named
  assert (found and found[0]) == ('smoke' if known else None)
  assert run_folder.changed(run_folder.read(sent)) == []


def test_a_name_is_looked_up_among_the_shipped_ones_alone(evil):
  sent, mark = evil
  assert shipped.shipped_config('smoke').parent == ROOT / 'configs'
  assert all(shipped.shipped_config(n) is None for n in ('evil', '../configs/smoke', str(sent / 'evil'), '', 'smoke.py'))
  with pytest.raises(UserError, match='is two'):  # what a user types is not guessed
    load_config('cifar10_quick')
  assert not mark.exists()
  load_config('evil')
  assert mark.exists(), 'a config that the user names runs, by design'


def test_processes_of_a_study_import_nothing_from_its_folder(evil):
  sent, mark = evil
  code = 'import json, sys; sys.modules.pop("json"); import json; print(json.__file__)'
  out = subprocess.run([sys.executable, '-c', code], env={**os.environ, **isolated_environment()}, cwd=sent, text=True,
                       capture_output=True)
  assert out.returncode == 0 and str(sent) not in out.stdout and not mark.exists(), out.stderr
  plain = {k: v for k, v in os.environ.items() if k != 'PYTHONSAFEPATH'}
  subprocess.run([sys.executable, '-c', code], env=plain, cwd=sent, capture_output=True)
  assert mark.exists(), 'the test can see it'


def test_a_study_that_is_sent_names_no_folder_outside_of_it(tmp_path):
  for name in ('../../x', 'a/../../../x'):
    (tmp_path / 'study.json').write_text(json.dumps({'made': [{'name': name, 'config': {}}], 'seeds': [0], 'proxies': []}))
    with pytest.raises(UserError, match='outside of its folder'):
      read(tmp_path)
  for text in ('{}', '[]', '3', '{"made": 3, "seeds": [0], "proxies": []}'):
    (tmp_path / 'study.json').write_text(text)
    with pytest.raises(UserError, match='is not a study'):
      read(tmp_path)


class Bomb:
  def __init__(self, mark):
    self.mark = str(mark)

  def __reduce__(self):
    return open, (self.mark, 'w')


def test_no_pickle_is_opened(tmp_path, monkeypatch):
  mark = tmp_path / 'executed'
  bomb = np.array([Bomb(mark)], object)
  np.savez(tmp_path / 'e.npz', paths=bomb, features=bomb)
  with pytest.raises((UserError, ValueError)):
    embeddings.read(tmp_path / 'e.npz')
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  source = tmp_path / 'a'
  source.write_text('a')
  cache.cached([source], 'x', lambda: ({'x': np.arange(3)}, True), beside=tmp_path)
  kept = next(tmp_path.glob('.eqssl-*.npz'))
  np.savez(tmp_path / 'x.npz', x=bomb)
  (tmp_path / 'x.npz').replace(kept)
  assert cache.cached([source], 'x', lambda: ({'x': np.arange(3)}, True), beside=tmp_path)['x'].tolist() == [0, 1, 2]
  kept.write_bytes(pickle.dumps(Bomb(mark)))
  assert cache.cached([source], 'x', lambda: ({'x': np.arange(3)}, True), beside=tmp_path)['x'].tolist() == [0, 1, 2]
  assert not mark.exists()


def test_a_prepared_data_set_names_no_code(evil, tmp_path):
  sent, mark = evil
  sys.path.insert(0, str(sent))
  try:
    (tmp_path / 'dataset_info.json').write_text(json.dumps({
        'name': 'x', 'version': '1.0.0', 'moduleName': 'evil', 'fileFormat': 'array_record', 'splits': []}))
    for features in ({'pythonClassName': 'evil.X'}, {'type': 'evil.X', 'content': '{}'}, {
        'pythonClassName': DICT, 'featuresDict': {'features': {'image': {'pythonClassName': 'evil.Image'}}}}):
      (tmp_path / 'features.json').write_text(json.dumps(features))
      with pytest.raises(UserError, match='would import that code'):
        tfds.open_directory(tmp_path)
    (tmp_path / 'features.json').write_text(json.dumps({'pythonClassName': DICT, 'featuresDict': {'features': {}}}))
    with contextlib.suppress(UserError):
      tfds.open_directory(tmp_path)
  finally:
    sys.path.remove(str(sent))
  assert not mark.exists()

"""A result is read again where all that it depends on is the same; where anything is not, it is computed again and said."""
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
import tiny
from PIL import Image

from equivariant_ssl import cli
from equivariant_ssl.config import load_config
from equivariant_ssl.data import card
from equivariant_ssl.errors import OTHER_DATA
from equivariant_ssl.evaluate import (
  comparison,
  evaluation,
  finetune,
  inputs,
  knn,
  protocols,
  result_files,
  transfer,
)
from equivariant_ssl.evaluate.protocols import Measurement, Options
from equivariant_ssl.parallel import sharding
from equivariant_ssl.training import loop


def album(root, counts):
  """root/{train,test}/CLASS/NN.png of noisy colors."""
  random = np.random.RandomState(0)
  for kind in ('train', 'test'):
    for c, (name, count) in enumerate(counts.items()):
      (root / kind / name).mkdir(parents=True, exist_ok=True)
      for i in range(count):
        pixels = random.randint(0, 120, (16, 16, 3)) + 120 * np.eye(3, dtype=int)[c]
        Image.fromarray(pixels.astype(np.uint8)).save(root / kind / name / f'{i:02d}.png')
  return root


def trained(workdir, data):
  settings = {'data.name': 'folder', 'data.path': str(data), 'data.size': '16', 'size': '16', 'batch': '16', 'steps': '1',
              'equivariance': 'none'}
  loop.train(load_config(tiny.NAME, settings), workdir, mesh=sharding.mesh(jax.devices()[:1]), quiet=True)
  return workdir


@pytest.fixture(scope='module')
def ran(tmp_path_factory):
  """(a run on three classes, of which one is small; its data)."""
  root = tmp_path_factory.mktemp('cached')
  data = album(root / 'data', {'r': 12, 'g': 12, 'b': 3})
  return trained(root / 'run', data), data


@pytest.fixture
def copy(ran, tmp_path, monkeypatch):
  """(run, data) to change, that are evaluated in no time: `called` has the protocols that computed something."""
  shutil.copytree(ran[0], tmp_path / 'run')
  shutil.copytree(ran[1], tmp_path / 'data')
  called = []
  quick = lambda name: lambda s: called.append(name) or Measurement(name, {'top1': .5}, {'top1': {'chance': .1}})
  counted = {n: p._replace(measure=quick(n)) for n, p in protocols.PROTOCOLS.items()}
  monkeypatch.setattr(evaluation, 'PROTOCOLS', counted)
  monkeypatch.setattr(cli, '_cache', lambda: None)
  return tmp_path / 'run', tmp_path / 'data', called, counted


def evaluated(workdir, data, name='knn', options=Options(), accept=True):
  asked = evaluation.runs.DataRequest(str(data), accept)
  return evaluation.evaluate(workdir, [name], options=options, untrained=False, data_request=asked)[name]


def relabel(data):
  (data / 'test' / 'r' / '00.png').rename(data / 'test' / 'g' / '00b.png')


def repaint(data):
  Image.fromarray(np.full((16, 16, 3), 77, np.uint8)).save(data / 'test' / 'r' / '00.png')


def rename(data):
  for kind in ('train', 'test'):
    (data / kind / 'r').rename(data / kind / 'rr')


def fewer(data):
  for path in sorted((data / 'train' / 'g').iterdir())[:3]:
    path.unlink()


@pytest.mark.parametrize('change', [relabel, repaint, rename, fewer])
def test_other_data_other_result(change, copy, capsys):
  workdir, data, called, _ = copy
  first = evaluated(workdir, data)
  assert evaluated(workdir, data) == first and called == ['knn']  # nothing changed
  assert 'again' not in capsys.readouterr().out
  change(data)
  other = evaluated(workdir, data)
  assert called == ['knn', 'knn'] and other['data'] != first['data']
  assert 'knn.json is computed again: it was measured with other data.' in capsys.readouterr().out
  assert evaluated(workdir, data) == other and called == ['knn', 'knn']


def another_mean(workdir, monkeypatch, counted):
  path = workdir / card.CARD_FILE
  found = json.loads(path.read_text())
  path.write_text(json.dumps(found | {'mean': [.1, .2, .3]}))
  return 'data'


def another_constant(workdir, monkeypatch, counted):
  monkeypatch.setattr(knn, 'BANK', 4096)
  return 'constants or version of the protocol'


def another_version(workdir, monkeypatch, counted):
  monkeypatch.setitem(counted, 'knn', counted['knn']._replace(version=2))
  return 'constants or version of the protocol'


def another_package(workdir, monkeypatch, counted):
  monkeypatch.setitem(counted, 'knn', counted['knn']._replace(packages=('jax',)))
  return 'constants or version of the protocol'


def other_pixels(workdir, monkeypatch, counted):
  monkeypatch.setattr(inputs, 'VERSION', inputs.VERSION + 1)
  return 'pixels shown to the network'


@pytest.mark.parametrize('change', [another_mean, another_constant, another_version, another_package, other_pixels])
def test_what_else_a_number_depends_on(change, copy, monkeypatch, capsys):
  workdir, data, called, counted = copy
  evaluated(workdir, data)
  words = change(workdir, monkeypatch, counted)
  evaluated(workdir, data)
  assert called == ['knn', 'knn']
  assert f'knn.json is computed again: it was measured with other {words}.' in capsys.readouterr().out


def test_what_is_old_or_damaged_is_computed_again_and_marked_where_it_is_read(copy, capsys):
  workdir, data, called, _ = copy
  found, path = evaluated(workdir, data), workdir / 'eval' / 'knn.json'
  old = {k: v for k, v in found.items() if k not in result_files.NEW}
  path.write_text(json.dumps(old))
  assert not result_files.states_origin(old) and result_files.states_origin(found)
  line, = comparison.caveats([workdir])
  assert line.startswith(f'knn of {workdir}: an earlier version wrote it') and line.endswith(f'{workdir} --protocol knn')
  of_test = path.with_name('knn-test.json')
  of_test.write_text(json.dumps(old | {'options': {'epochs': 0, 'readout': 'test'}}))
  assert comparison.caveats([workdir])[0].endswith(f'{workdir} --protocol knn --readout test')
  of_test.unlink()
  assert evaluated(workdir, data)['trained'] == found['trained'] and called == ['knn', 'knn']
  assert 'computed again: an earlier version' in capsys.readouterr().out
  path.write_text('{"torn')
  assert evaluated(workdir, data)['trained'] == found['trained']
  assert 'computed again: it is damaged' in capsys.readouterr().out
  assert not comparison.caveats([workdir])


def test_runs_of_other_data_are_not_compared_in_silence(copy, tmp_path):
  workdir, data, _, _ = copy
  evaluated(workdir, data)
  shutil.copytree(workdir, tmp_path / 'other')
  assert not comparison.caveats([workdir, tmp_path / 'other'])
  relabel(data)
  evaluated(tmp_path / 'other', data)
  assert comparison.caveats([workdir, tmp_path / 'other']) == ['knn: the runs were not measured with the same data.']
  assert not comparison.caveats([workdir, tmp_path / 'other'], ('health',))


def test_constants_are_found():
  own = result_files.definition(protocols.PROTOCOLS['knn'])
  assert own['constants']['knn.evaluate'] == {'k': 200, 'temperature': .1} and own['constants']['knn.BANK'] == knn.BANK
  probe = result_files.definition(protocols.PROTOCOLS['equimod'])['constants']['0']
  assert probe['epochs'] == 90 and probe['rates'] == [.2]
  assert result_files.definition(protocols.PROTOCOLS['cached'])['packages'].keys() == {'scikit-learn'}
  for name, protocol in protocols.PROTOCOLS.items():
    definition = result_files.definition(protocol)
    assert json.loads(json.dumps(definition)) == definition, name  # as a file holds it
    assert definition['constants'], name
  constants = result_files.definition(protocols.PROTOCOLS['profile'])['constants']
  assert constants['profile.drift'] == {'centred': True}  # stored results have these older names
  assert constants['1']['jitter']['quantise'] is False


def test_transfer_and_a_list_know_what_they_read(copy, tmp_path, capsys):
  workdir, data, called, _ = copy
  target = album(tmp_path / 'target', {'r': 4, 'g': 4})
  options = Options(targets=(str(target),))
  evaluated(workdir, data, 'transfer', options)
  evaluated(workdir, data, 'transfer', options)
  assert called == ['transfer']
  repaint(target)
  evaluated(workdir, data, 'transfer', options)
  assert called == ['transfer'] * 2 and 'with other data' in capsys.readouterr().out
  listed = tmp_path / 'list.txt'
  listed.write_text('r/00.png\ng/00.png\n')
  tuned = lambda: evaluated(workdir, data, 'finetune10', Options(images=str(listed)))
  tuned(), tuned()
  listed.write_text('r/01.png\ng/00.png\n')
  tuned()
  assert called[2:] == ['finetune10'] * 2 and finetune.read_list(listed) and transfer.VERSION


def test_a_small_class_ends_nothing(ran, tmp_path, monkeypatch, capsys):
  """Through the command line: the class is left out, said, and what follows is measured."""
  monkeypatch.setattr(cli, '_cache', lambda: None)
  monkeypatch.setitem(evaluation.GROUPS, 'default', ('few_labels', 'knn'))
  assert cli.main(['eval', str(ran[0])]) == 0
  out = capsys.readouterr().out
  assert 'few_labels 5 a class, ridge, 20 trials, 1 small class left out' in out and 'knn k=2 T=0.1' in out
  found = json.loads((ran[0] / 'eval' / 'few_labels.json').read_text())['trained'][0]
  assert found['controls']['top1']['chance'] == .5
  two = trained(tmp_path / 'run', album(tmp_path / 'data', {'r': 16, 'g': 3}))
  assert cli.main(['eval', str(two)]) == 0
  out = capsys.readouterr().out
  assert 'few_labels left out: 1 of 2 classes have 5 training images or more' in out and 'knn k=1 ' in out
  assert cli.main(['eval', str(two), '--protocol', 'few_labels,knn']) == 2  # asked for by name: the last word
  captured = capsys.readouterr()
  assert 'knn k=1 ' in captured.out and 'few_labels: 1 of 2 classes' in captured.err


def test_images_removed(ran, tmp_path, monkeypatch, capsys):
  """kNN once stayed what it was after images were removed."""
  monkeypatch.setattr(cli, '_cache', lambda: None)
  shutil.copytree(ran[0], tmp_path / 'run')
  data = pathlib.Path(shutil.copytree(ran[1], tmp_path / 'data'))
  eqssl = lambda *more: cli.main(['eval', str(tmp_path / 'run'), '--protocol', 'knn', '--data-path', str(data), *more])
  assert eqssl() == 0
  fewer(data)
  assert eqssl() == OTHER_DATA
  capsys.readouterr()
  assert eqssl('--accept-data') == 0
  out = capsys.readouterr().out
  assert 'computed again: it was measured with other data' in out and 'knn k=2 ' in out


def test_a_small_bank_has_few_neighbors():
  """200 as published wherever the digits are: their stored results stay."""
  assert [knn.usual_k(n) for n in (3, 19, 183, 499, 500, 800, 1000, 50_000)] == [1, 1, 18, 49, 200, 200, 200, 200]

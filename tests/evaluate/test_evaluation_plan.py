"""`eqssl eval --plan`, and the default protocols that the size of the data allows."""
import pathlib

import jax
import pytest
import tiny

from equivariant_ssl import cli
from equivariant_ssl.config import load_config
from equivariant_ssl.evaluate import evaluation, evaluation_plan, linear
from equivariant_ssl.evaluate.evaluation_plan import EvaluationSize
from equivariant_ssl.evaluate.protocols import Measurement
from equivariant_ssl.parallel import sharding
from equivariant_ssl.training import loop

IMAGENET = EvaluationSize(1_281_167, 50_000, 2048, 1000)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  folder = tmp_path_factory.mktemp('plan') / 'run'
  config = load_config(tiny.NAME, {'steps': '1', 'equivariance': 'none', 'data.name': 'digits', 'size': '8'})
  loop.train(config, folder, mesh=sharding.mesh(jax.devices()[:1]), quiet=True)
  return folder


def test_a_plan_says_time_and_memory_and_measures_nothing(run, monkeypatch, capsys):
  monkeypatch.setattr(cli, '_cache', lambda: None)
  assert cli.main(['eval', str(run), '--plan', '--protocol', 'knn,cached,linear,care']) == 0
  out = capsys.readouterr().out
  for line in ('images       1,000 to fit on and 797 to test on, 10 classes', 'images/s with decoding', '  knn ', '  linear ',
               '  care            not estimated', 'memory       about', 'for 2 networks, without what is not estimated'):
    assert line in out, out
  assert not (run / 'eval').exists()


def test_what_imagenet_needs_is_within_its_features(monkeypatch):
  assert IMAGENET.feature_bytes == 4 * 2048 * 1_331_167
  assert evaluation_plan._memory(IMAGENET, ['knn', 'cached']) < 1.05 * IMAGENET.feature_bytes
  assert evaluation_plan._memory(IMAGENET, ['logistic']) > 2.9 * IMAGENET.feature_bytes


@pytest.mark.parametrize('seconds,text', [(.2, '1 s'), (119, '119 s'), (600, '10 minutes'), (7 * 3600, '7 hours'),
                                          (2.5 * 86400, '2.5 days'), (150 * 86400, '150 days')])
def test_a_duration_is_in_its_unit(seconds, text):
  assert evaluation_plan.duration(seconds) == text


def test_the_processes_of_a_machine_share_its_memory(monkeypatch):
  """All get one answer, from all machines: else they would go different ways, and wait for each other."""
  monkeypatch.setattr(evaluation_plan.processes, 'gather', lambda mine: [mine, mine, ['other', 700], ['silent', None]])
  monkeypatch.setattr(evaluation_plan, 'free_memory', lambda: 1000)
  assert evaluation_plan.free_for_a_process() == 500
  monkeypatch.setattr(evaluation_plan.processes, 'gather', lambda mine: [['silent', None]])
  assert evaluation_plan.free_for_a_process() is None


def test_the_copies_of_files_in_a_container_are_free(monkeypatch):
  texts = {'/proc/meminfo': 'MemTotal: 9 kB\nMemAvailable: 8 kB\n', '/sys/fs/cgroup/memory.max': '5000',
           '/sys/fs/cgroup/memory.current': '4500', '/sys/fs/cgroup/memory.stat': 'anon 500\ninactive_file 3000\n'}
  monkeypatch.setattr(pathlib.Path, 'read_text', lambda path, **kw: texts[str(path)])
  assert evaluation_plan.free_memory() == 3500


def test_the_default_protocols_are_those_that_the_size_allows(run, monkeypatch, capsys):
  measured = lambda name: lambda s: Measurement(name, {'top1': .5}, {'top1': {'chance': .1}})
  quick = {n: p._replace(measure=measured(n), together=False, reads='') for n, p in evaluation.PROTOCOLS.items()}
  monkeypatch.setattr(evaluation, 'PROTOCOLS', quick)
  monkeypatch.setattr(evaluation_plan, 'cached_seconds', lambda sizes, mesh: 20 * 3600)
  everything = {'knn', 'cached', 'few_labels', 'profile', 'health'}

  def evaluated(names=()):
    return set(evaluation.evaluate(run, list(names), untrained=False))
  assert evaluated() == everything  # nothing is timed where the data are small
  monkeypatch.setattr(linear, 'LARGE', 0)
  assert evaluated() == everything - {'cached'}
  assert 'cached left out: it takes about 20 hours a network on these devices. To measure it anyway: --protocol cached' in (
      capsys.readouterr().out)
  assert evaluated(['cached']) == {'cached'} and evaluated(['default', 'cached']) == everything
  assert evaluated(['default']) == everything - {'cached'}
  monkeypatch.setattr(evaluation_plan, 'free_memory', lambda: 10_000)
  assert evaluated() == everything - {'knn', 'cached', 'few_labels'}
  assert 'of memory, and 9.8 KiB are free' in capsys.readouterr().out
  monkeypatch.setattr(evaluation_plan, 'free_memory', lambda: None)
  monkeypatch.setattr(evaluation_plan, 'cached_seconds', lambda sizes, mesh: 60.)
  assert evaluated() == everything

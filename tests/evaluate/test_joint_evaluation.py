"""Two processes evaluate one run: the result of one process, one file, and no half of anything where one of them fails."""
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import tiny
from PIL import Image
from rich.console import Console

from equivariant_ssl.config import load_config
from equivariant_ssl.errors import BAD_DATA, WATCHDOG
from equivariant_ssl.evaluate import evaluation, linear
from equivariant_ssl.parallel import sharding
from equivariant_ssl.report import embed, embeddings
from equivariant_ssl.training import loop

PROGRAM = pathlib.Path(__file__).parent.parent / 'evaluating_process.py'
NAMES = ['knn', 'cached', 'few_labels']
TRAIN, TEST = 600, 300  # images; each process decodes 256 of 512 at a time


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """A run on streamed photographs of three classes."""
  root, random = tmp_path_factory.mktemp('joint'), np.random.RandomState(0)
  for kind, count in (('train', TRAIN // 3), ('test', TEST // 3)):
    for c, name in enumerate('rgb'):
      (root / 'data' / kind / name).mkdir(parents=True)
      for i in range(count):
        pixels = random.randint(0, 250, (16, 16, 3)) * (1 - .3 * np.eye(3)[c])
        Image.fromarray(pixels.astype(np.uint8)).save(root / 'data' / kind / name / f'{i:02d}.png')
  settings = {'data.name': 'folder', 'data.path': str(root / 'data'), 'data.size': '16', 'size': '16', 'batch': '16',
              'steps': '1', 'equivariance': 'none', 'data.stream': 'True'}
  loop.train(load_config(tiny.NAME, settings), root / 'run', mesh=sharding.mesh(jax.devices()[:1]), quiet=True)
  return root / 'run'


@pytest.fixture
def alone(run, tmp_path, monkeypatch):
  """(a copy of the run, its results as one process with eight devices computes them)."""
  for folder in ('one', 'two'):
    shutil.copytree(run, tmp_path / folder)
  monkeypatch.setattr(linear, 'LARGE', 0)
  return tmp_path / 'two', evaluation.evaluate(tmp_path / 'one', NAMES, console=Console(quiet=True), untrained=False)


def start(number, count, port, *arguments, devices=1, **settings):
  env = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': str(devices), 'EQSSL_COORDINATOR': f'127.0.0.1:{port}',
         'EQSSL_PROCESSES': str(count), 'EQSSL_PROCESS': str(number), 'EQSSL_TEST_SETTINGS': json.dumps(settings),
         'EQSSL_CACHE': str(jax.config.jax_compilation_cache_dir)}
  return subprocess.Popen([sys.executable, str(PROGRAM), *map(str, arguments)], env=env, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def ended(pair, timeout=240):
  """[(exit code, stdout, stderr)] of processes; none is left behind."""
  try:
    texts = [p.communicate(timeout=timeout) for p in pair]
    return [(p.returncode, *text) for p, text in zip(pair, texts, strict=True)]
  finally:
    for p in pair:
      p.kill()
      p.wait()


def files(workdir):
  return sorted(p.name for p in (workdir / 'eval').iterdir())


def test_two_processes_give_the_result_of_one(alone):
  workdir, expected = alone
  arguments = ('eval', workdir, '--protocol', ','.join(NAMES))
  (code, out, said), (other_code, other_out, other_said) = ended(
      [start(i, 2, 25000 + os.getpid() % 1000, *arguments, **{'evaluate.linear.LARGE': 0}) for i in range(2)])
  assert code == other_code == 0, said + other_said
  assert files(workdir) == [f'{name}.json' for name in sorted(NAMES)]
  for name in NAMES:
    result = json.loads((workdir / 'eval' / f'{name}.json').read_text())
    one, two = expected[name]['trained'][0], result['trained'][0]
    assert two['numbers'] == one['numbers'] and two['controls'] == one['controls'], name
    if name != 'few_labels':
      assert two['detail']['predictions'] == one['detail']['predictions'], name
    assert two['name'] == ('cached in float32' if name == 'cached' else one['name'])
  assert 'Written to' in out and 'Written to' not in other_out
  # For each of two networks, training images 0-255 and 512-599 here, 256-511 and the last one there; test images are
  # still decoded for the second network.
  shares = [int(text.rsplit('decoded ')[-1]) for text in (said, other_said)]
  assert shares == [2 * (256 + 88) + 256, 2 * (256 + 1) + 44], shares


@pytest.mark.slow
def test_trained_protocols_of_two_processes_are_those_of_one_with_two_devices(run, tmp_path):
  for folder in ('one', 'two'):
    shutil.copytree(run, tmp_path / folder)
  port, names = 29000 + os.getpid() % 1000, ['linear', 'finetune100', 'logistic', 'episodes', 'health']
  more = '--protocol', ','.join(names), '--epochs', '1'
  processes = [start(0, 1, port, 'eval', tmp_path / 'one', *more, devices=2),
               *(start(i, 2, port, 'eval', tmp_path / 'two', *more) for i in range(2))]
  results = ended(processes, 500)
  assert [code for code, *_ in results] == [0, 0, 0], results
  assert files(tmp_path / 'one') == files(tmp_path / 'two') and len(files(tmp_path / 'two')) == len(names)
  for name in files(tmp_path / 'two'):
    one, two = (json.loads((tmp_path / folder / 'eval' / name).read_text())['trained'][0] for folder in ('one', 'two'))
    for row, value in one['numbers'].items():
      assert two['numbers'][row] == (pytest.approx(value, rel=1e-4) if isinstance(value, float) else value), (name, row)


@pytest.mark.slow
def test_embedding_in_two_processes_gives_the_file_of_one(run, tmp_path, monkeypatch, capsys):
  data = run.parent / 'data' / 'train'
  (tmp_path / 'images').mkdir()
  for i, path in enumerate(sorted(data.rglob('*.png'))[:39]):
    shutil.copy(path, tmp_path / 'images' / f'{i:03d}.png')
  (tmp_path / 'images' / '007.png').write_bytes(b'no image')
  monkeypatch.setattr(embed, 'CHUNK', 7)  # six chunks: the last one is a process's alone
  embed.embed(run, str(tmp_path / 'images'), str(tmp_path / 'one.npz'))
  arguments = ('embed', run, tmp_path / 'images', '--out', tmp_path / 'two.npz')
  results = ended([start(i, 2, 26000 + os.getpid() % 1000, *arguments, **{'report.embed.CHUNK': 7}) for i in range(2)])
  assert [code for code, *_ in results] == [0, 0], results
  one, two = (embeddings.read(tmp_path / name) for name in ('one.npz', 'two.npz'))
  assert two.paths == one.paths and len(two.paths) == 38 and two.origin == one.origin
  np.testing.assert_allclose(two.features, one.features, rtol=1e-5, atol=1e-6)
  assert '007.png' in results[0][2] and '007.png' not in results[1][2] and 'written to' in results[0][1]


@pytest.mark.slow
def test_an_error_of_one_process_is_the_line_of_all(run, tmp_path):
  shutil.copytree(run, tmp_path / 'run')
  port = 27000 + os.getpid() % 1000
  results = ended([start(i, 2, port, 'eval', tmp_path / 'run', '--protocol', 'knn', **({'unreadable': 300} if i else {}))
                   for i in range(2)])
  for code, _, said in results:
    assert code == BAD_DATA and 'eqssl: image 300 cannot be read.' in said, said
  assert not (tmp_path / 'run' / 'eval').exists()


@pytest.mark.slow
@pytest.mark.parametrize('victim', [0, 1])
def test_killed_half_way_no_half_of_a_file(run, tmp_path, victim):
  shutil.copytree(run, tmp_path / 'run')
  port = 28000 + os.getpid() % 1000 + 1000 * victim
  pair = [start(i, 2, port, 'eval', tmp_path / 'run', '--protocol', 'profile,knn', wait=.01) for i in range(2)]
  try:
    deadline = time.monotonic() + 240
    while not (tmp_path / 'run' / 'eval' / 'profile.json').is_file():
      assert time.monotonic() < deadline and all(p.poll() is None for p in pair)
      time.sleep(.2)
    pair[victim].kill()  # while features of knn are computed
    killed = time.monotonic()
    code, _, said = ended([pair[1 - victim]], 120)[0]
    assert code == WATCHDOG and 'eqssl: another process of this job was lost' in said, said
    assert time.monotonic() - killed < 60
  finally:
    ended(pair)
  assert files(tmp_path / 'run') == ['profile.json']
  json.loads((tmp_path / 'run' / 'eval' / 'profile.json').read_text())

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
TRAIN, TEST = 39, 21  # images: neither is a multiple of a batch


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


def start(number, count, port, *arguments, **settings):
  env = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': '1', 'EQSSL_COORDINATOR': f'127.0.0.1:{port}',
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
  assert 'cached in float32' in out and not other_out  # process 0 prints
  # Two networks, trained and untrained: each process decodes about half of the images of each, its last batch filled up.
  shares = [int(text.rsplit('decoded ')[-1]) for text in (said, other_said)]
  assert all(TRAIN + TEST <= share <= 2 * (TRAIN + TEST) * .75 for share in shares), shares

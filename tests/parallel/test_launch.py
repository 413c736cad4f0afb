"""Several processes on this machine."""
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import one_process
import pytest
from PIL import Image

from equivariant_ssl import cli
from equivariant_ssl.config import load_config
from equivariant_ssl.parallel import sharding
from equivariant_ssl.storage import record
from equivariant_ssl.training import loop

ROOT = pathlib.Path(__file__).parents[2]
STEPS = {'steps': '5', 'checkpoint_every': '3', 'optimizer.lr': '.01'}  # a rate at which rounding does not grow


def script(path, *argv, **settings):
  """A finished script of the clone, on CPU, with the suite's cache of compiled programs."""
  env = {**os.environ, 'PYTHON': sys.executable, 'JAX_PLATFORMS': 'cpu',
         'EQSSL_CACHE': str(jax.config.jax_compilation_cache_dir), **{k: str(v) for k, v in settings.items()}}
  return subprocess.run(['bash', str(ROOT / path), *map(str, argv)], cwd=ROOT, env=env, capture_output=True, text=True,
                        timeout=300)


def local(workdir, **overrides):
  return script('launch/local.sh', 2, 'smoke', '--workdir', workdir, '--quiet',
                *(f'--config.{k}={v}' for k, v in {**STEPS, **overrides}.items()))


def losses(workdir):
  rows = [[row[k] for k in ('loss', 'gradient', 'std')] for row in record.read_metrics(workdir)]
  assert len(rows) == 5
  return rows


def agree(one, two):
  """The losses of two runs: the first step's to 1e-6, five steps' to 1e-4."""
  np.testing.assert_allclose(losses(two)[0], losses(one)[0], rtol=1e-6)
  np.testing.assert_allclose(losses(two), losses(one), rtol=1e-4)


SEVERAL = [pytest.param(2, {}, id='2'),
           pytest.param(4, {}, id='4', marks=pytest.mark.slow),
           pytest.param(2, {'sharding': 'fsdp', 'encoder.width': '16'}, id='2, fsdp', marks=pytest.mark.slow),
           pytest.param(2, {'data.stream': 'True'}, id='2, streaming', marks=pytest.mark.slow)]


@pytest.mark.parametrize(('n', 'over'), SEVERAL)
def test_one_process_and_several_train_alike_on_four_devices(n, over, tmp_path):
  """Bar 1. What the views are is bitwise the same."""
  if 'data.stream' in over:
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), np.uint8)
    (tmp_path / 'images').mkdir()
    for i, image in enumerate(images):
      Image.fromarray(image).save(tmp_path / 'images' / f'{i}.png')
    over = {'data.name': 'folder', 'data.path': str(tmp_path / 'images'), 'data.size': '8', **over}
  stand_in = tmp_path / 'python'
  stand_in.write_text(f'#!/usr/bin/env bash\nexec {sys.executable} {ROOT}/tests/one_process.py "$@"\n')
  stand_in.chmod(0o755)
  config = load_config(one_process.__file__, over)
  one_process.train_with_views(config, tmp_path / '1', mesh=sharding.mesh(jax.devices()[:4]), quiet=True)
  views = (tmp_path / '1' / 'views.json').read_text()
  done = script('launch/local.sh', n, one_process.__file__, '--workdir', tmp_path / str(n), '--quiet',
                *(f'--config.{k}={v}' for k, v in over.items()), PYTHON=stand_in, PORT=23600 + os.getpid() % 1000,
                DEVICES=4 // n)
  assert done.returncode == 0, done.stderr
  assert re.search(f'{n} processes on 1 machines?, 4 devices', done.stderr)
  assert json.loads((tmp_path / str(n) / 'env.json').read_text())['processes'] == n
  assert (tmp_path / str(n) / 'views.json').read_text() == views
  assert (tmp_path / str(n) / 'data.json').read_text() == (tmp_path / '1' / 'data.json').read_text()
  agree(tmp_path / '1', tmp_path / str(n))


@pytest.mark.slow
def test_a_workdir_that_is_not_shared_is_said(tmp_path):
  """As /tmp of two machines: each would go on from what it has, or wait for the other."""
  stand_in = tmp_path / 'python'
  stand_in.write_text(f'#!/usr/bin/env bash\nexec {sys.executable} {ROOT}/tests/one_process.py '
                      '"${@/NODE/$EQSSL_PROCESS}"\n')
  stand_in.chmod(0o755)
  done = script('launch/local.sh', 2, one_process.__file__, '--workdir', tmp_path / 'NODE', '--quiet', PYTHON=stand_in,
                PORT=24600 + os.getpid() % 1000)
  assert done.returncode == 2 and 'must be on a file system that all machines share' in done.stderr, done.stderr


@pytest.fixture(scope='module')
def two(tmp_path_factory):
  """Five steps by two processes with a device each."""
  workdir = tmp_path_factory.mktemp('two') / 'run'
  done = local(workdir)
  assert done.returncode == 0, done.stderr
  return workdir


@pytest.mark.slow
def test_one_process_goes_on_from_two_and_evaluates_what_they_trained(two, tmp_path, monkeypatch, capsys):
  config, mesh = load_config('smoke', STEPS), sharding.mesh(jax.devices()[:2])
  shutil.copytree(two, tmp_path / 'on')
  assert {p.name for p in (two / 'checkpoints').iterdir() if p.name.isdigit()} == {'3', '5'}
  shutil.rmtree(tmp_path / 'on' / 'checkpoints' / '5')
  loop.train(config, tmp_path / 'on', mesh=mesh, quiet=True)  # steps 4 and 5, by one process
  agree(two, tmp_path / 'on')
  monkeypatch.setattr(cli, '_cache', lambda: None)
  assert cli.main(['eval', str(two), '--protocol', 'knn']) == 0, capsys.readouterr().err
  assert json.loads((two / 'eval' / 'knn.json').read_text())['checkpoint'] == 5


@pytest.mark.slow
def test_an_error_in_one_process_ends_the_other(two):
  """Only process 0 reads the workdir's config; the other waits for it in vain."""
  done = local(two, **{'optimizer.lr': .3})
  assert done.returncode == 5 and 'optimizer.lr: 0.01 -> 0.3' in done.stderr


def test_the_launcher_prints_and_refuses(tmp_path):
  dry = script('launch/local.sh', 2, 'smoke', '--workdir', tmp_path / 'run', DRY_RUN=1, DEVICES=3, PORT=9,
               PER_PROCESS='GPU=$i A=b')
  assert dry.returncode == 0 and not (tmp_path / 'run').exists()
  assert len(dry.stdout.splitlines()) == 2
  for i, line in enumerate(dry.stdout.splitlines()):
    assert f'EQSSL_COORDINATOR=127.0.0.1:9 EQSSL_PROCESSES=2 EQSSL_PROCESS={i} JAX_NUM_CPU_DEVICES=3 GPU={i} A=b' in line
    assert f'train --config smoke --workdir {tmp_path / "run"}' in line
  for argv in ((), ('2',), ('0', 'smoke'), ('two', 'smoke'), ('2', '--workdir', 'x')):
    done = script('launch/local.sh', *argv)
    assert done.returncode == 2 and done.stderr.startswith('usage: ')


@pytest.mark.parametrize('ends,code', [('0 4', 4), ('137 8', 137), ('8 75', 75), ('5 134', 5)])
def test_the_exit_code_is_the_cause_and_none_is_left(tmp_path, ends, code):
  """What a stand-in for python ends with: a process of eqssl's own code goes before those that its end broke."""
  stand_in = tmp_path / 'python'
  stand_in.write_text(f'#!/usr/bin/env bash\ncodes=({ends})\nexit ${{codes[$EQSSL_PROCESS]}}\n')
  stand_in.chmod(0o755)
  assert script('launch/local.sh', 2, 'smoke', PYTHON=stand_in, PORT=9).returncode == code


def test_a_process_that_does_not_end_is_killed(tmp_path):
  stand_in = tmp_path / 'python'
  stand_in.write_text('#!/usr/bin/env bash\ntrap "" TERM\n[ "$EQSSL_PROCESS" = 1 ] && exit 6\n'
                      'while :; do sleep .1; done\n')
  stand_in.chmod(0o755)
  assert script('launch/local.sh', 2, 'smoke', PYTHON=stand_in, PORT=9, GRACE=1).returncode == 6

"""A pod on this machine: a job of 8 devices in 8 or 4 processes streams its images, shards its state, is killed and goes on.

EQSSL_POD_LOG=FILE appends what the processes said, and how long each part took (docs/scaling.md has such a log).
"""
import json
import os
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import one_process
import pytest
from PIL import Image

from equivariant_ssl import cli
from equivariant_ssl.config import load_config
from equivariant_ssl.errors import OK, PREEMPTED, WATCHDOG
from equivariant_ssl.parallel import sharding
from equivariant_ssl.storage import record
from equivariant_ssl.training import loop

pytestmark = pytest.mark.slow
STEPS, KEPT = 24, 6  # of the run, and between two checkpoints
# The width leaves arrays that fsdp splits. BatchNorm's groups are one on each device, and one on two processes of two.
PODS = [pytest.param(8, 1, 8, id='8 processes of 1 device'), pytest.param(4, 2, 2, id='4 processes of 2 devices')]


def log(text):
  if os.environ.get('EQSSL_POD_LOG'):
    with open(os.environ['EQSSL_POD_LOG'], 'a') as file:
      print(text, file=file)


@pytest.fixture(scope='module')
def images(tmp_path_factory):
  """A folder of 80 images of 8 x 8, in two classes that their brightness tells apart."""
  folder, random = tmp_path_factory.mktemp('images'), np.random.default_rng(0)
  for split, count in (('train', 32), ('val', 8)):
    for name, low in (('dark', 0), ('bright', 156)):
      (folder / split / name).mkdir(parents=True)
      for i in range(count):
        pixels = random.integers(low, low + 100, (8, 8, 3), np.uint8)
        Image.fromarray(pixels).save(folder / split / name / f'{i}.png')
  return folder


class Pod:
  """A job of `count` processes with `devices` devices each, which trains with `settings` in `workdir`."""

  def __init__(self, count, devices, workdir, settings):
    with socket.socket() as s:
      s.bind(('127.0.0.1', 0))
      port = s.getsockname()[1]
    program = one_process.__file__
    argv = [sys.executable, program, '-m', 'equivariant_ssl.cli', 'train', '--config', program, '--workdir', str(workdir),
            *(f'--config.{k}={v}' for k, v in settings.items())]
    env = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': str(devices), 'OMP_NUM_THREADS': '1',
           'EQSSL_COORDINATOR': f'127.0.0.1:{port}', 'EQSSL_PROCESSES': str(count),
           'EQSSL_CACHE': str(jax.config.jax_compilation_cache_dir)}
    self.outputs = [workdir.parent / f'{workdir.name}-{i}-{port}.txt' for i in range(count)]
    self.processes = []
    for i, output in enumerate(self.outputs):
      with output.open('w') as file:
        self.processes.append(subprocess.Popen(argv, env={**env, 'EQSSL_PROCESS': str(i)}, stdout=file, stderr=file))

  def said(self, i=0):
    return self.outputs[i].read_text()

  def run_until(self, true, seconds=400):
    """Wait until `true()` while every process runs."""
    deadline = time.monotonic() + seconds
    while not true():
      assert time.monotonic() < deadline and all(p.poll() is None for p in self.processes), self.said()
      time.sleep(.02)

  def ends(self, seconds=400):
    """The exit codes."""
    deadline = time.monotonic() + seconds
    return [p.wait(max(deadline - time.monotonic(), .1)) for p in self.processes]

  def end(self):
    for p in self.processes:
      p.kill()
      p.wait()


@pytest.fixture
def pods():
  """A list of the pods of a test, whose processes end with it."""
  started = []
  yield started
  for pod in started:
    pod.end()


def losses(workdir):
  rows = record.read_metrics(workdir)
  return [row['step'] for row in rows], np.array([[row[k] for k in ('loss', 'gradient', 'std')] for row in rows])


@pytest.mark.parametrize(('count', 'devices', 'groups'), PODS)
def test_a_pod_is_killed_goes_on_and_is_one_process_of_as_many_devices(count, devices, groups, images, tmp_path, pods,
                                                                      monkeypatch, capsys):
  settings = {'data.name': 'folder', 'data.path': images, 'data.size': 8, 'data.stream': True, 'sharding': 'fsdp',
              'encoder.width': 16, 'batchnorm_groups': groups, 'steps': STEPS, 'checkpoint_every': KEPT,
              'optimizer.lr': .0005}  # a rate at which rounding does not grow, with two images in a group
  workdir, begun = tmp_path / 'pod', time.monotonic()
  log(f'-- {count} processes, {devices} devices each, batchnorm_groups={groups}')

  def part(text):
    nonlocal begun
    log(f'{time.monotonic() - begun:6.1f} s  {text}')
    begun = time.monotonic()

  def saved():
    return sorted(int(p.name) for p in workdir.glob('checkpoints/*') if p.name.isdigit())
  pod = Pod(count, devices, workdir, settings)
  pods.append(pod)
  pod.run_until(lambda: saved() and len(record.read_metrics(workdir)) > KEPT)
  part(f'until step {KEPT + 1} was done and the checkpoint of step {saved()[-1]} was there')
  pod.processes[-1].kill()
  codes = pod.ends()  # at once, or after jax's 100 s of silence where they wait for no collective
  assert codes[:-1] == [WATCHDOG] * (count - 1), pod.said()
  assert 'another process of this job was lost' in pod.said()
  part(f'process {count - 1} was killed; the others ended with {sorted(set(codes[:-1]))}')
  assert saved()[-1] < STEPS

  again = Pod(count, devices, workdir, settings)
  pods.append(again)
  assert again.ends() == [OK] * count, again.said()
  assert f'{count} processes on 1 machine, 8 devices' in again.said()
  assert json.loads((workdir / 'env.json').read_text())['processes'] == count
  part(f'the same command went on to step {STEPS}')

  config = load_config(one_process.__file__, {k: str(v) for k, v in settings.items()} | {'sharding': 'replicate'})
  loop.train(config, tmp_path / 'one', mesh=sharding.mesh(), quiet=True)
  (steps, pod_losses), (one_steps, one_losses) = losses(workdir), losses(tmp_path / 'one')
  assert steps == one_steps == list(range(1, STEPS + 1))
  np.testing.assert_allclose(pod_losses[:5], one_losses[:5], rtol=1e-4)
  np.testing.assert_allclose(pod_losses, one_losses, rtol=1e-3)
  assert np.abs(np.diff(one_losses[:, 0])).mean() > .02  # the losses tell the batches apart
  part('one process with 8 devices, replicated, never killed: its losses are the same to '
       f'{np.abs(pod_losses / one_losses - 1).max():.1e}')

  monkeypatch.setattr(cli, '_cache', lambda: None)
  results = []
  for folder in (workdir, tmp_path / 'one'):
    assert cli.main(['eval', str(folder), '--protocol', 'knn']) == 0, capsys.readouterr().err
    results.append(json.loads((folder / 'eval' / 'knn.json').read_text()))
  assert [r['checkpoint'] for r in results] == [STEPS] * 2
  (pod_knn,), (one_knn,) = ([m['numbers']['top1'] for m in r['trained']] for r in results)
  assert pod_knn == one_knn > .75
  part(f'eval of both by one process: kNN {pod_knn:.2f} and {one_knn:.2f}')
  log(again.said())


def test_a_process_that_stands_still_for_35_seconds_ends_no_job(tmp_path, pods):
  """As on a machine that swaps, or whose file system stalls under the program. jax calls it lost after 100 s."""
  workdir = tmp_path / 'pod'
  pod = Pod(2, 1, workdir, {'steps': 100000})
  pods.append(pod)
  pod.run_until(lambda: len(record.read_metrics(workdir)) > 2)
  pod.processes[1].send_signal(signal.SIGSTOP)
  until = time.monotonic() + 35
  pod.run_until(lambda: time.monotonic() > until)
  done = len(record.read_metrics(workdir))
  pod.processes[1].send_signal(signal.SIGCONT)
  pod.run_until(lambda: len(record.read_metrics(workdir)) > done + 5)
  pod.processes[0].terminate()
  assert pod.ends() == [PREEMPTED] * 2

"""Two jobs in one directory; directories that are full, cannot be written, or go away under a run."""
import contextlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import tempfile
import time

import matrix
import pytest
from matrix import many

STEPS = {'steps': 40 if matrix.FULL else 20, 'checkpoint_every': 1, 'keep': 1, 'log_every': 1}
FEW = {**STEPS, 'steps': 4}


@pytest.fixture(scope='module')
def second(tmp_path_factory):
  made = matrix.Server(tmp_path_factory.mktemp('second'))
  yield made
  made.close()


def rows(run):
  path = run / 'metrics.jsonl'
  return path.read_text().splitlines() if path.exists() else []


def wait_for(run, count):
  while len(rows(run)) < count:
    time.sleep(.01)


def hold(pid):
  """Stop a process, and wait until each of its threads has."""
  os.kill(pid, signal.SIGSTOP)
  while any(p.read_text().rpartition(')')[2].split()[0] != 'T' for p in pathlib.Path(f'/proc/{pid}/task').glob('*/stat')):
    time.sleep(.01)


def said_in_a_line(said):
  """Whether a run ended with a cause and a fix; the server prints the traceback before, as --debug does."""
  return len(said.rstrip().split('\n')[-2:]) == 2 and said.rstrip().split('\n')[-1].startswith('  ')


def test_two_jobs_in_one_directory(server, second, row, tmp_path):
  count = many(12, 3)
  one = row('a second job in the directory of one', count)
  for i in range(count):
    run = tmp_path / str(i)
    pid = server.start(do='light', workdir=str(run), config=STEPS)
    wait_for(run, 2 + i)
    hold(pid)  # while the other tries
    if i % 3 == 1:
      (run / 'run.lock').unlink()
    if i % 3 == 2:
      (run / 'run.lock').write_text('')
    before = {str(p): p.stat().st_mtime_ns for p in run.rglob('*') if p.name != 'run.lock'}
    status, _, said = second.do(do='light', workdir=str(run), config=STEPS)
    changed = {str(p) for p in run.rglob('*') if p.name != 'run.lock' and before.get(str(p)) != p.stat().st_mtime_ns
               and p != run}
    os.kill(pid, signal.SIGCONT)
    first, left, told = server.wait()
    good = status == 3 and not changed and first == 0 and len(rows(run)) == STEPS['steps']
    one.add('survived' if good else 'wrong', f'{i}: {status} {first} {changed} {said[-300:]} {told[-300:]}')
    shutil.rmtree(run)


@pytest.mark.parametrize('how', ['removed', 'moved', 'replaced'])
def test_a_directory_that_goes_away(server, row, tmp_path, how):
  count = many(6, 1)
  one = row(f'the directory is {how} during the run', count)
  for i in range(count):
    run = tmp_path / str(i)
    server.start(do='light', workdir=str(run), config=STEPS)
    wait_for(run, 2 + 7 * i)
    run.rename(tmp_path / f'{i} elsewhere')
    if how == 'replaced':
      run.mkdir()
    if how == 'removed':
      shutil.rmtree(tmp_path / f'{i} elsewhere', ignore_errors=True)
    status, _, said = server.wait()
    good = status in (2, 10) and said_in_a_line(said)
    one.add('survived' if good else 'wrong', f'{i}: {status} {said[-500:]}')


def test_a_directory_that_cannot_be_written(server, row):
  one = row('a directory that may not be written', 3)
  for what in ('nothing there yet', 'a run', 'its checkpoints'):
    with tempfile.TemporaryDirectory() as folder:  # outside pytest's own, which is closed to other users
      run = pathlib.Path(folder, 'run')
      if what != 'nothing there yet':
        assert server.do(do='light', workdir=str(run), config={**FEW, 'steps': 2})[0] == 0
      for path in (pathlib.Path(folder), *pathlib.Path(folder).rglob('*')):
        path.chmod(0o777 if path.is_dir() else 0o666)
      closed = {'nothing there yet': [pathlib.Path(folder)], 'a run': [run], 'its checkpoints': [run / 'checkpoints']}[what]
      for path in closed:
        path.chmod(0o555)
      status, _, said = server.do(do='light', workdir=str(run), config=FEW if what == 'nothing there yet' else {
          **FEW, 'steps': 2, 'keep': 9}, user=65534 if os.geteuid() == 0 else 0)
      for path in closed:
        path.chmod(0o777)
      again, *_ = server.do(do='light', workdir=str(run), config=FEW if what == 'nothing there yet' else {**FEW, 'steps': 2})
      # A run that is done has nothing to write among its checkpoints.
      good = (status == 2 and said_in_a_line(said) or what == 'its checkpoints' and status == 0) and again == 0
      one.add('survived' if good else 'lost', f'{what}: {status} {again} {said[-500:]}')


def test_a_full_disk(server, row, tmp_path):
  """A file system of its own, too small for the run's log and checkpoints; the newest checkpoint stays, and loads."""
  place = tmp_path / 'small'
  place.mkdir()
  if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=4m', 'none', place], capture_output=True).returncode:
    pytest.skip('a file system cannot be mounted here; the shim tells a full disk in its place')
  try:
    count = many(5, 1)
    one = row('a file system that is full', count)
    for i in range(count):
      run, ballast = place / 'run', place / 'ballast'
      server.start(do='light', workdir=str(run), config=STEPS)
      wait_for(run, 3 + 5 * i)
      with contextlib.suppress(OSError), open(ballast, 'wb', buffering=0) as file:
        while True:
          file.write(bytes(4096))
      status, _, said = server.wait()
      ballast.unlink()
      kept = len(rows(run))
      again, left, told = server.do(do='light', workdir=str(run), config=STEPS)
      resumed = [json.loads(r)['step'] for r in rows(run)] == list(range(1, STEPS['steps'] + 1))
      good = status == 2 and said_in_a_line(said) and again == 0 and resumed and not list(run.glob('quarantine/*'))
      one.add('survived' if good else 'lost', f'{i}: {status} {kept} {again} {said[-400:]} {told[-400:]}')
      shutil.rmtree(run)
  finally:
    subprocess.run(['umount', '-l', place], check=True)

"""Kills and signals at any moment, and a resume at every step: what is learnt is, bit for bit, what it would have been."""
import contextlib
import json
import os
import random
import shutil
import signal
import socket
import time

import matrix
import pytest
from matrix import many

LONG = {'steps': 60, 'checkpoint_every': 1, 'log_every': 1, 'keep': 2}
SHORT = {**LONG, 'steps': 12}
SENT = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGINT)


def learnt(run):
  """What a run that is done has learnt: the fingerprints in its newest checkpoint, its losses; None if it is not whole."""
  newest = max((p for p in (run / 'checkpoints').iterdir() if p.name.isdigit()), key=lambda p: int(p.name))
  body = json.loads(json.loads((newest / '_CHECKPOINT_METADATA').read_text())['custom_metadata']['body'])
  rows = [json.loads(line) for line in (run / 'metrics.jsonl').read_text().splitlines()]
  if [r['step'] for r in rows] != list(range(1, len(rows) + 1)) or list(run.glob('quarantine/*')):
    return None
  return body['step'], body['leaves'], [(r['loss'], r['std']) for r in rows]


def straight(server, folder, config, **job):
  """(what is learnt at once, the seconds that it takes)."""
  for again in range(2):  # the first may compile
    run, start = folder / f'straight{again}', time.monotonic()
    status, _, said = server.do(**{'do': 'real', 'workdir': str(run), 'config': config, **job})
    assert status == 0, said
  return learnt(run), time.monotonic() - start


@pytest.fixture(scope='module')
def long(server, tmp_path_factory):
  return straight(server, tmp_path_factory.mktemp('long'), LONG)


@pytest.fixture(scope='module')
def short(server, tmp_path_factory):
  """The same of fewer steps; the first does not compile."""
  return straight(server, tmp_path_factory.mktemp('short'), SHORT)


def judge(row, run, want, times, said=''):
  """All that was done to a run is judged by what came of it."""
  found = learnt(run)
  for _ in range(times):
    row.add('survived' if found == want else 'lost' if found is None else 'wrong', f'{run.name}: {said[-300:]}')
  shutil.rmtree(run)


def test_kills_of_one_process(server, long, row, tmp_path):
  count, rng = many(100, 2), random.Random(0)
  (want, seconds), one, runs, killed, total = long, row('kill -9 of one process, at random', count), 0, 0, 0
  while total < count or killed:
    run = tmp_path / str(runs)
    pid = server.start(do='real', workdir=str(run), config=LONG)
    if total < count:
      time.sleep(rng.uniform(.05, 1.1 * seconds))
      with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    status, _, said = server.wait()
    if status == -9:
      killed, total = killed + 1, total + 1
    elif status:
      one.add('lost', f'{status} {said[-500:]}')
      break
    else:
      judge(one, run, want, killed, said)
      runs, killed = runs + 1, 0


@pytest.fixture(scope='module')
def pair(tmp_path_factory):
  """Two servers, for the two processes of a job."""
  both = [matrix.Server(tmp_path_factory.mktemp(f'jobs{i}')) for i in range(2)]
  yield both
  for one in both:
    one.close()


def both(pair, run):
  """Start the two processes of a job; their pids."""
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    place = f'127.0.0.1:{s.getsockname()[1]}'
  argv = ['train', '--config', os.path.join(matrix.HERE.parent, 'one_process.py'), '--workdir', str(run), '--quiet',
          *(f'--config.{k}={v}' for k, v in LONG.items())]
  return [server.start(do='cli', argv=argv, workdir=str(run), env={
      'EQSSL_COORDINATOR': place, 'EQSSL_PROCESSES': '2', 'EQSSL_PROCESS': str(i)}) for i, server in enumerate(pair)]


@pytest.mark.skipif(not matrix.FULL, reason='minutes; make faults')
def test_kills_of_two_processes(pair, row, tmp_path):
  start = time.monotonic()
  for again in range(2):
    start = time.monotonic()
    both(pair, tmp_path / f'straight{again}')
    ends = [server.wait() for server in pair]
    assert [status for status, *_ in ends] == [0, 0], ends
  want, seconds = learnt(tmp_path / 'straight1'), time.monotonic() - start
  count, rng, runs, killed, total = 25, random.Random(1), 0, 0, 0
  one = row('kill -9 of one of two processes, or of both', count)
  while total < count or killed:
    run, victims = tmp_path / str(runs), rng.choice([[0], [1], [0, 1]])
    pids = both(pair, run)
    if total < count:
      time.sleep(rng.uniform(.2, 1.1 * seconds))
      for i in victims:
        with contextlib.suppress(ProcessLookupError):
          os.kill(pids[i], signal.SIGKILL)
    start = time.monotonic()
    ends = [server.wait() for server in pair]
    status, took = [s for s, *_ in ends], time.monotonic() - start
    if status == [0, 0]:
      judge(one, run, want, killed)
      runs, killed = runs + 1, 0
    elif -9 not in status or not set(status) <= {-9, 8, 2} or took > 120:  # 2: they had not met yet
      one.add('wrong' if took > 120 else 'lost', f'{status} after {took:.0f} s: {[said[-300:] for *_, said in ends]}')
      break
    else:
      killed, total = killed + 1, total + 1


def test_signals_at_any_moment(server, short, row, tmp_path):
  """75 from the first line to the last, where the run can go on; 0 where it was done."""
  count, rng = many(40, 2), random.Random(2)
  config = [f'--config.{k}={v}' for k, v in SHORT.items()]
  name = os.path.join(matrix.HERE.parent, 'one_process.py')
  want, seconds = short
  one, runs, sent, total = row('TERM, USR1, USR2, HUP or INT at any moment', count), 0, 0, 0
  while total < count or sent:
    run = tmp_path / str(runs)
    pid = server.start(do='cli', argv=['train', '--config', name, '--workdir', str(run), *config], workdir=str(run))
    if total < count:
      time.sleep(rng.uniform(.05, 1.1 * seconds))
      with contextlib.suppress(ProcessLookupError):  # it was done
        os.kill(pid, SENT[total % len(SENT)])
    status, _, said = server.wait()
    sent, total = sent + (total < count), min(total + 1, count)
    if status not in (0, 75):
      one.add('lost', f'{SENT[total % len(SENT)]}: {status} {said[-500:]}')
      break
    if status == 0:
      judge(one, run, want, sent, said)
      runs, sent = runs + 1, 0


@pytest.mark.parametrize('every', [1, 5])
def test_a_resume_at_every_step(server, short, row, every, tmp_path):
  """A process that ends at once, without a word, after step k of 12; whatever was saved by then."""
  chosen = range(1, 12) if matrix.FULL else (7,)
  one = row(f'resume at every step of 12, checkpoints every {every}', len(chosen))
  for k in chosen:
    run, config = tmp_path / str(k), {**SHORT, 'checkpoint_every': every}
    status, _, said = server.do(do='real', workdir=str(run), config=config, die_at=k)
    assert status == 9, said
    status, _, said = server.do(do='real', workdir=str(run), config=config)
    if status:
      one.add('lost', f'{k}: {status} {said[-500:]}')
    else:
      judge(one, run, short[0], 1, said)

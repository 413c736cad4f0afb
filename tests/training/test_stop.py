"""Asked to stop: from the first line to the last a run that can go on ends with 75, whoever asks."""
import errno
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import jax
import pytest
import tiny

from equivariant_ssl import cli
from equivariant_ssl.config import load_config
from equivariant_ssl.errors import PREEMPTED, UserError
from equivariant_ssl.parallel import sharding
from equivariant_ssl.storage import checkpoint_writer
from equivariant_ssl.training import loop, stop

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _none_ignored():
  """Started by a shell in the background, a process ignores INT."""
  before = {s: signal.signal(s, signal.SIG_DFL) for s in stop.SIGNALS}
  yield
  for number, handler in before.items():
    signal.signal(number, handler)


def handlers():
  return [signal.getsignal(s) for s in stop.SIGNALS]


@pytest.mark.parametrize('number', stop.SIGNALS)
def test_a_signal_asks_to_stop(number):
  before = handlers()
  with stop.listen() as asked:
    assert asked() is False
    stop.raise_if_stopped()
    signal.raise_signal(number)
    assert asked() is True
    with pytest.raises(UserError, match='nothing is lost') as error:
      stop.raise_if_stopped()
    assert error.value.code == PREEMPTED
    if number == signal.SIGINT:
      with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(number)
    else:
      signal.raise_signal(number)  # patience
      signal.raise_signal(signal.SIGINT)
    with stop.listen() as inner:
      assert inner() is True
    assert signal.getsignal(number) not in before, 'the inner one must not take the handlers away'
  assert handlers() == before


def test_a_third_interrupt_ends_the_process_where_the_second_was_lost():
  code = ('import contextlib, signal\nfrom equivariant_ssl.training import stop\n'
          'signal.signal(signal.SIGINT, signal.SIG_DFL)\nwith stop.listen():\n  for _ in range(3):\n'
          '    with contextlib.suppress(KeyboardInterrupt):\n      signal.raise_signal(signal.SIGINT)\nprint("lost")')
  ended = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, timeout=50)
  assert ended.returncode == -signal.SIGINT and 'lost' not in ended.stdout


LOST = """
import gc, os, signal, sys, time
import equivariant_ssl.__main__
from equivariant_ssl import cli
from equivariant_ssl.training import stop
stop.GRACE = .2

def interrupt(phase, info):  # as jax's hook, in which Python drops the KeyboardInterrupt
  gc.callbacks.clear()
  os.kill(os.getpid(), signal.SIGINT)

def run(args):
  gc.callbacks.append(interrupt)
  gc.collect()
  time.sleep({seconds})

def entry():
  assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL, 'while modules are imported'
  sys.exit(cli.main(['doctor']))
cli.COMMANDS['doctor'], cli.entry = run, entry
signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever pytest was started with
equivariant_ssl.__main__.entry()
"""


def test_an_interrupt_that_a_hook_drops_ends_the_command():
  ended = subprocess.run([sys.executable, '-c', LOST.format(seconds=60)], cwd=ROOT, capture_output=True, text=True,
                         timeout=50)
  assert ended.returncode == 130 and ended.stderr.endswith('eqssl: interrupted.\n')
  assert 'Exception ignored' in ended.stderr, 'the hook did not drop it: the test tests nothing'


def test_an_interrupt_is_an_exception_once_and_then_the_default():
  with stop.interruptible():
    with pytest.raises(KeyboardInterrupt):
      signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
  with stop.listen():
    assert signal.getsignal(signal.SIGINT) is not signal.SIG_DFL
    before = signal.getsignal(signal.SIGINT)
    with stop.interruptible():
      assert signal.getsignal(signal.SIGINT) is before


def test_what_is_ignored_stays_ignored():
  before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
  try:
    with stop.listen() as asked:
      signal.raise_signal(signal.SIGHUP)
      assert not asked()
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
  finally:
    signal.signal(signal.SIGHUP, before)


def test_outside_the_main_thread_nothing_is_asked():
  seen = []

  def work():
    with stop.listen() as asked:
      seen.append(asked())
  thread = threading.Thread(target=work)
  thread.start()
  thread.join()
  assert seen == [False]


BUSY = """if True:
  import hashlib, sys
  from equivariant_ssl.training import stop
  stop.GRACE = .3
  with stop.listen(), stop.saving('the answer.') as begun:
    if sys.argv[1] == 'saving':
      begun()
    print('ready', flush=True)
    hashlib.pbkdf2_hmac('sha256', b'', b'', 8_000_000)  # over 1 s in which the main thread runs no line of Python
    print('over', flush=True)
"""


@pytest.mark.parametrize('what,code', [('idle', 75), ('saving', 0)])
def test_a_long_call_of_c_is_ended_only_where_nothing_would_be_lost(what, code):
  pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True}
  with subprocess.Popen([sys.executable, '-c', BUSY, what], **pipes) as run:
    run.stdout.readline()
    run.send_signal(signal.SIGUSR2)
    out, err = run.communicate(timeout=60)
  assert run.returncode == code
  assert ('over' in out) == (what == 'saving') and ('nothing is lost' in err) == (what == 'idle')
  answer = 'the answer.' if what == 'saving' else 'stopping; nothing is lost.'
  assert err.splitlines()[0] == f'eqssl: {answer}', 'before the main thread hears of it'


@pytest.mark.parametrize('every, saved', [(100, 'no checkpoint was saved yet'), (1, 'the newest checkpoint is of step')])
def test_both_interrupts_are_answered_with_a_line(every, saved, tmp_path, monkeypatch, capfd):
  real, workdir = loop.fit, tmp_path / 'my run'

  def fit(run, state, on_step):
    def each(state, n, *more):
      if n == 3:
        signal.raise_signal(signal.SIGINT)
        for _ in range(500):  # the thread answers while the step goes on
          if stop._open_listeners[0].answered:
            break
          time.sleep(.01)
        time.sleep(.1)
        signal.raise_signal(signal.SIGINT)
      return on_step(state, n, *more)
    return real(run, state, each)
  monkeypatch.setattr(loop, 'fit', fit)
  monkeypatch.setattr(cli, '_cache', lambda: None)
  assert cli.main(['train', '--config', tiny.NAME, '--workdir', str(workdir), f'--config.checkpoint_every={every}']) == 130
  lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith('eqssl: ')]
  assert lines[0] == 'eqssl: stopping after this step, with everything saved. Ctrl-C again ends it at once.'
  assert len(lines) == 2 and f'interrupted; {saved}' in lines[1]
  assert f"eqssl resume '{workdir}'" in lines[1] or 'same command again' in lines[1]


def test_an_interrupt_before_there_is_anything_to_save_says_so():
  with stop.listen(), pytest.raises(KeyboardInterrupt, match='nothing is lost. Type the same command again'):
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize('phase', ['read_known_card', 'prepare_run', 'restore', 'initial_state', 'resident'])
def test_a_signal_in_each_part_of_a_start_is_75(phase, tmp_path, monkeypatch):
  """Data, restoring, initialization: the run has nothing to save yet, and the same command goes on."""
  place = loop.checkpoint if phase == 'restore' else loop
  name = '_newest' if phase == 'restore' else phase
  real = getattr(place, name)

  def slow(*args, **kw):
    signal.raise_signal(signal.SIGUSR2)
    return real(*args, **kw)
  monkeypatch.setattr(place, name, slow)
  config, mesh = load_config(tiny.NAME), sharding.mesh(jax.devices()[:1])
  with pytest.raises(UserError) as error:
    loop.train(config, tmp_path / 'run', mesh=mesh, quiet=True)
  assert error.value.code == PREEMPTED
  steps = loop.checkpoint.saved_steps(tmp_path / 'run' / 'checkpoints')
  assert steps == ([1] if phase == 'resident' else [])  # the loop itself saves
  monkeypatch.setattr(place, name, real)
  assert int(loop.train(config, tmp_path / 'run', mesh=mesh, quiet=True).step) == 8


def test_a_signal_in_the_last_save_ends_with_everything_done(tmp_path, monkeypatch):
  real = checkpoint_writer._manager

  def late(*args):
    manager = real(*args)
    signal.raise_signal(signal.SIGTERM)
    return manager
  monkeypatch.setattr(checkpoint_writer, '_manager', late)
  config = load_config(tiny.NAME, {'checkpoint_every': '8'})
  loop.train(config, tmp_path, mesh=sharding.mesh(jax.devices()[:1]), quiet=True)
  assert loop.checkpoint.saved_steps(tmp_path / 'checkpoints') == [8]


def test_a_terminal_that_closes_takes_nothing_with_it(tmp_path):
  """HUP, and every write to the terminal from then on fails: the run is saved all the same, and says so by its code."""
  import pty
  leader, follower = pty.openpty()
  env = {**os.environ, 'JAX_NUM_CPU_DEVICES': '1', 'JAX_PLATFORMS': 'cpu', 'TERM': 'xterm-256color',
         'EQSSL_CACHE': str(jax.config.jax_compilation_cache_dir)}
  run = subprocess.Popen([sys.executable, '-m', 'equivariant_ssl.cli', 'train', '--config', tiny.NAME, '--workdir',
                          str(tmp_path), '--config.steps=3000'], cwd=ROOT, env=env, stdin=follower, stdout=follower,
                         stderr=follower, start_new_session=True)
  os.close(follower)
  drain = threading.Thread(target=lambda: [None for _ in iter(lambda: _read(leader), b'')], daemon=True)
  drain.start()
  while not (tmp_path / 'metrics.jsonl').exists() or len((tmp_path / 'metrics.jsonl').read_text().splitlines()) < 3:
    assert run.poll() is None
    time.sleep(.02)
  os.kill(run.pid, signal.SIGSTOP)  # so that it finds the terminal closed when it hears
  os.kill(run.pid, signal.SIGHUP)
  CLOSED.set()
  drain.join(20)
  os.close(leader)
  os.kill(run.pid, signal.SIGCONT)
  assert run.wait(60) == PREEMPTED
  assert loop.checkpoint.saved_steps(tmp_path / 'checkpoints')


CLOSED = threading.Event()


def _read(leader):
  import select
  while not CLOSED.is_set():
    if select.select([leader], [], [], .05)[0]:
      return os.read(leader, 65536)
  return b''


def test_a_line_that_a_closed_terminal_does_not_take_is_the_stop_that_it_is():
  for asked, kind in ((False, OSError), (True, UserError)):
    with pytest.raises(kind) as error, stop.listen():
      if asked:
        signal.raise_signal(signal.SIGHUP)
      raise OSError(errno.EIO, 'Input/output error')
    assert not asked or error.value.code == PREEMPTED


def test_of_several_processes_jax_is_told(monkeypatch):
  """Which tells the others, so that all stop at one step: also of what came before it listened."""
  sent = []
  monkeypatch.setattr(os, 'kill', lambda pid, number: sent.append((pid, number)))
  with stop.listen() as asked:
    signal.raise_signal(signal.SIGUSR1)
    stop.forward_to_jax()
    assert sent == [(os.getpid(), signal.SIGTERM)] and not asked()
    stop.raise_if_stopped()
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR2):
      signal.raise_signal(number)
    assert sent == [(os.getpid(), signal.SIGTERM)] * 4


@pytest.mark.parametrize('number', [signal.SIGHUP, signal.SIGUSR2])
def test_hup_and_usr2_save_like_term(number, tmp_path, monkeypatch):
  real = loop.fit

  def fit(run, state, on_step):
    def each(state, n, *more):
      if n == 3:
        signal.raise_signal(number)
      return on_step(state, n, *more)
    return real(run, state, each)
  monkeypatch.setattr(loop, 'fit', fit)
  with pytest.raises(UserError, match='stopped at step 3 of 8') as error:
    loop.train(load_config(tiny.NAME), tmp_path, mesh=sharding.mesh(jax.devices()[:1]), quiet=True)
  assert error.value.code == PREEMPTED
  assert loop.checkpoint.saved_steps(tmp_path / 'checkpoints') == [3]

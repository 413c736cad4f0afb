"""What a run leaves is whole, says what happened once, and belongs to one process and one config."""
import contextlib
import errno
import fcntl
import io
import json
import os
import pty
import shutil
import stat
import subprocess
import sys
import time
import types

import jax.numpy as jnp
import numpy as np
import pytest

from equivariant_ssl import errors
from equivariant_ssl.storage import record
from equivariant_ssl.training import progress

CONFIG = {'seed': 0, 'keep': 3, 'optimizer': {'lr': .06, 'name': 'lars'}, 'data': {'sizes': [32, 32]}}


def code_of(call, *args, **kw):
  with pytest.raises(errors.UserError) as error:
    call(*args, **kw)
  return error.value.code, str(error.value)


def test_a_start_leaves_config_command_and_environment(tmp_path):
  record.start_record(tmp_path / 'a/run', CONFIG, 'eqssl train')
  record.start_record(tmp_path / 'a/run', CONFIG, 'eqssl resume run', resume=True)
  run = tmp_path / 'a/run'
  assert json.loads((run / 'config.json').read_text()) == CONFIG
  assert (run / 'command.txt').read_text() == 'eqssl train\neqssl resume run\n'
  env = json.loads((run / 'env.json').read_text())
  assert {'python', 'jax', 'flax', 'optax', 'orbax-checkpoint', 'numpy', 'cpu', 'cores', 'devices', 'xla_flags',
          'git', 'time'} <= env.keys() and len(env['devices']) == 8 and 'earlier' not in env
  assert sorted(p.name for p in run.iterdir()) == ['command.txt', 'config.json', 'env.json']


def test_an_environment_that_changed_is_kept(tmp_path, monkeypatch):
  for flags in ('--a', '--a', '--b'):
    monkeypatch.setattr(record, 'environment', lambda flags=flags: {'xla_flags': flags, 'time': time.time()})
    record.start_record(tmp_path, CONFIG, 'eqssl train')
  env = json.loads((tmp_path / 'env.json').read_text())
  assert env['xla_flags'] == '--b' and [e['xla_flags'] for e in env['earlier']] == ['--a']


@pytest.mark.parametrize('change,said', [
    ({'optimizer': {'lr': .03, 'name': 'lars'}}, 'optimizer.lr: 0.06 -> 0.03'),
    ({'optimizer': {'name': 'lars'}}, 'optimizer.lr: 0.06 -> absent'),
    ({'data': {'sizes': [32, 16]}}, 'data.sizes: [32, 32] -> [32, 16]'),
    ({'method': 'byol'}, 'method: absent -> "byol"')])
def test_another_config_is_refused_with_what_differs(change, said, tmp_path):
  record.start_record(tmp_path, CONFIG, 'eqssl train')
  code, text = code_of(record.start_record, tmp_path, {**CONFIG, **change}, 'eqssl train', free=('keep',))
  assert code == errors.OTHER_CONFIG and said in text and f'eqssl resume {tmp_path}' in text and '--workdir' in text
  assert json.loads((tmp_path / 'config.json').read_text()) == CONFIG
  assert len((tmp_path / 'command.txt').read_text().splitlines()) == 1


def test_free_keys_may_change_and_tuples_are_lists(tmp_path):
  record.start_record(tmp_path, CONFIG, 'a')
  new = {**CONFIG, 'keep': 9, 'optimizer': {'lr': .1, 'name': 'lars'}, 'data': {'sizes': (32, 32)}}
  record.start_record(tmp_path, new, 'b', free=('keep', 'optimizer'))
  assert json.loads((tmp_path / 'config.json').read_text())['keep'] == 9
  assert code_of(record.start_record, tmp_path, {**new, 'keepsake': 1}, 'c', free=('keep',))[0] == errors.OTHER_CONFIG


def test_bad_workdirs_are_said_in_a_line(tmp_path):
  assert code_of(record.start_record, tmp_path / 'none', CONFIG, 'x', resume=True)[0] == errors.NO_CHECKPOINT
  (tmp_path / 'file').write_text('')
  assert code_of(record.start_record, tmp_path / 'file', CONFIG, 'x')[0] == errors.USAGE
  for text in ('{"seed": ', '[]'):
    (tmp_path / 'config.json').write_text(text)
    code, said = code_of(record.start_record, tmp_path, CONFIG, 'x')
    assert code == errors.OTHER_CONFIG and f'{tmp_path}/config.json is damaged' in said and '--workdir' in said


@pytest.mark.parametrize('text', ['{"python": ', '[]', '3', '{"earlier": 3, "python": 1}'])
def test_a_damaged_environment_is_written_anew(text, tmp_path):
  record.start_record(tmp_path, CONFIG, 'x')
  (tmp_path / 'env.json').write_text(text)
  record.start_record(tmp_path, CONFIG, 'x')
  assert 'python' in json.loads((tmp_path / 'env.json').read_text())


def test_a_workdir_has_one_writer(tmp_path):
  with record.lock_folder(tmp_path):
    code, text = code_of(lambda: record.lock_folder(tmp_path).__enter__())
    assert code == errors.IN_USE and f'process {os.getpid()} ' in text
    other = subprocess.run([sys.executable, '-c', f"""if True:
      import fcntl
      fcntl.flock(open({str(tmp_path / 'run.lock')!r}), fcntl.LOCK_EX | fcntl.LOCK_NB)"""], capture_output=True)
    assert b'BlockingIOError' in other.stderr
  with record.lock_folder(tmp_path):  # let go
    pass


def test_a_killed_holder_lets_go(tmp_path):
  holder = subprocess.Popen([sys.executable, '-c', f"""if True:
    import fcntl, time
    file = open({str(tmp_path / 'run.lock')!r}, 'w')
    fcntl.flock(file, fcntl.LOCK_EX)
    print('held', flush=True)
    time.sleep(60)"""], stdout=subprocess.PIPE)
  holder.stdout.readline()
  assert code_of(lambda: record.lock_folder(tmp_path).__enter__())[0] == errors.IN_USE
  holder.kill()
  holder.communicate()
  with record.lock_folder(tmp_path):
    pass


@pytest.mark.parametrize('how', ['deleted', 'replaced'])
def test_a_lock_file_that_was_deleted_lets_nobody_in(tmp_path, how):
  with record.lock_folder(tmp_path) as check:
    (tmp_path / 'run.lock').unlink()
    if how == 'replaced':
      (tmp_path / 'run.lock').write_text('')
    for _ in range(2):
      assert code_of(lambda: record.lock_folder(tmp_path).__enter__())[0] == errors.IN_USE
    check()  # it is still this process's folder
  with record.lock_folder(tmp_path):
    pass


@pytest.mark.parametrize('number', [errno.EBADF, errno.ENOTSUP, errno.EINVAL])
def test_without_locks_of_folders_the_file_is_watched(tmp_path, number, monkeypatch):
  """NFS: a folder cannot be locked."""
  real = fcntl.flock

  def flock(descriptor, how):
    if stat.S_ISDIR(os.fstat(descriptor).st_mode):
      raise OSError(number, os.strerror(number))
    real(descriptor, how)
  monkeypatch.setattr(fcntl, 'flock', flock)
  with record.lock_folder(tmp_path) as check:
    check()
    assert code_of(lambda: record.lock_folder(tmp_path).__enter__())[0] == errors.IN_USE
    (tmp_path / 'run.lock').unlink()
    monkeypatch.setattr(os, 'getpid', lambda: 1)
    with record.lock_folder(tmp_path):  # another process got in, and the first one sees it
      assert 'removed or replaced' in code_of(check)[1]


@pytest.mark.parametrize('how', ['removed', 'moved', 'replaced'])
def test_a_folder_that_goes_away_under_its_holder_is_an_error(tmp_path, how):
  run = tmp_path / 'run'
  with record.lock_folder(run) as check, record.open_metrics(run) as write:
    write(1, {'loss': 1})
    check()
    shutil.rmtree(run) if how == 'removed' else run.rename(tmp_path / 'elsewhere')
    if how == 'replaced':
      run.mkdir()
    for say in (check, lambda: write(2, {'loss': 2})):
      code, text = code_of(say)
      assert code == errors.USAGE and 'removed or replaced' in text
    assert how == 'replaced' or not run.exists(), 'nothing is made anew'


def test_a_file_system_that_numbers_files_anew_is_no_error(tmp_path, monkeypatch):
  """As some of the user's space do, of buckets."""
  with record.lock_folder(tmp_path) as check, record.open_metrics(tmp_path) as write:
    monkeypatch.setattr(os.path, 'samestat', lambda a, b: False)
    check()
    write(1, {'loss': 1})


def test_a_log_that_goes_away_is_an_error(tmp_path):
  with record.open_metrics(tmp_path) as write:
    write(1, {'loss': 1})
    (tmp_path / 'metrics.jsonl').unlink()
    assert 'eqssl resume' in code_of(lambda: write(2, {'loss': 2}))[1]


ODD = ['{"step": 2, "loss": {"a": NaN}}', '{"step": true, "loss": 1}', '{"step": -1}', '{"step": "2"}', '[1]', '3', '"x"',
       '{"step": 1e999}', '{"step": 2, "loss": NaN}', '{"step": 2, "loss": [1, 2]}', '{"step": 2, "loss": "high"}', '{}',
       '{"step": 2, "loss": %s}' % ('9' * 400), '[' * 100_000, '{"step": 2.5}', '\x00', '{"step": 2, "a": false}', 'x' * 999]


def test_odd_rows_are_left_out_with_a_line(tmp_path, capsys):
  path = tmp_path / 'metrics.jsonl'
  path.write_bytes('\n'.join(['{"step": 1, "loss": 1.5}', *ODD, '{"step": 3, "loss": null}', '']).encode() + b'\xff\xfe\n')
  want = [{'step': 1, 'loss': 1.5}, {'step': 2, 'loss': None}, {'step': 3, 'loss': None}]
  assert record.read_metrics(tmp_path) == want
  with record.open_metrics(tmp_path, 3) as write:
    write(4, {'loss': 1})
  err = capsys.readouterr().err
  # One of ODD has a number that is not finite, which is read as null and is no odd line.
  assert err.count('\n') == 1 and f'{len(ODD)} lines have something else than' in err
  assert [json.loads(line) for line in path.read_text().splitlines()] == [*want, {'step': 4, 'loss': 1.}]
  with record.open_metrics(tmp_path, 4):
    pass
  assert capsys.readouterr().err == ''


def test_repeated_rows_are_merged(tmp_path):
  rows = [(1, 1.), (2, 2.), (1, 10.), (3, 3.), (2, 20.)]
  (tmp_path / 'metrics.jsonl').write_text(''.join(f'{{"step": {n}, "loss": {v}, "of{n}": 1}}\n' for n, v in rows))
  with record.open_metrics(tmp_path, 3) as write:
    write(4, {'loss': 4})
  text = (tmp_path / 'metrics.jsonl').read_text()
  assert [(r['step'], r['loss']) for r in map(json.loads, text.splitlines())] == [(1, 10), (2, 20), (3, 3), (4, 4)]


def test_metrics_are_one_finite_object_a_step(tmp_path):
  assert record.read_metrics(tmp_path) == []
  with record.open_metrics(tmp_path) as write:
    write(1, {'loss': jnp.float32(2.5), 'std': np.float64(.5), 'bad': float('nan'), 'worse': -np.inf})
    assert len(record.read_metrics(tmp_path)) == 1  # on disk before the file is closed
    write(np.int64(2), {'loss': 1})
  assert record.read_metrics(tmp_path) == [{'step': 1, 'loss': 2.5, 'std': .5, 'bad': None, 'worse': None},
                                           {'step': 2, 'loss': 1.}]


def test_resuming_drops_later_rows_and_a_torn_line(tmp_path):
  with record.open_metrics(tmp_path) as write:
    for step in range(1, 8):
      write(step, {'loss': step})
  path = tmp_path / 'metrics.jsonl'
  path.write_text(path.read_text()[:-9])
  assert [r['step'] for r in record.read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]
  with record.open_metrics(tmp_path, 4) as write:
    write(5, {'loss': 50})
  path.write_text(path.read_text() + '{"step": 6, "loss": 6.0}')  # whole, but its newline is missing: torn
  with record.open_metrics(tmp_path, 6) as write:
    write(7, {'loss': 70})
  assert [(r['step'], r['loss']) for r in record.read_metrics(tmp_path)] == [
      (1, 1), (2, 2), (3, 3), (4, 4), (5, 50), (7, 70)]
  before = path.read_bytes(), path.stat().st_ino
  with record.open_metrics(tmp_path, 7):
    pass
  assert (path.read_bytes(), path.stat().st_ino) == before
  with record.open_metrics(tmp_path, 0):
    pass
  assert record.read_metrics(tmp_path) == []


def test_tensorboard_files_are_written_when_asked(tmp_path, monkeypatch):
  pytest.importorskip('tensorboardX')
  with record.open_metrics(tmp_path, 3, tensorboard=True) as write:
    write(4, {'loss': 1.25})
  events = list(tmp_path.glob('events.out.tfevents*'))
  assert len(events) == 1 and b'loss' in events[0].read_bytes()
  monkeypatch.setitem(sys.modules, 'tensorboardX', None)
  code, text = code_of(lambda: record.open_metrics(tmp_path, tensorboard=True).__enter__())
  assert code == errors.USAGE and 'pip install -e ".[log]"' in text


def run_progress(times, monkeypatch, quiet=False):
  clock = iter([0., *times])
  monkeypatch.setattr(progress, 'time', types.SimpleNamespace(monotonic=lambda: next(clock)))
  with progress.progress(103, 3, 'run', quiet) as update:
    for step in range(4, 4 + len(times)):
      update(step, {'loss': jnp.float32(5.5), 'equimod': 2.25}, 1234.4, .034)


def test_progress_without_a_terminal_is_a_line_each_5_seconds(monkeypatch, capsys):
  monkeypatch.delenv('FORCE_COLOR', raising=False)
  run_progress([10., 12., 14.9, 15.1, 16., 20.2], monkeypatch)
  out, err = capsys.readouterr()
  assert out == ''
  assert [line.split()[1] for line in err.splitlines()] == ['4/103', '7/103', '9/103']
  assert err.splitlines()[0] == 'run  4/103  0:16:30 left  1234 images/s  3 % data wait  loss 5.5  equimod 2.25'
  monkeypatch.setattr(progress, 'time', time)
  with progress.progress(2, 0, 'run') as update:
    update(1, {}, 1., 0.)
    update(2, {}, 1., 0.)  # at once, but the last
  assert len(capsys.readouterr().err.splitlines()) == 2
  run_progress([10.], monkeypatch, quiet=True)
  assert capsys.readouterr() == ('', '')


@pytest.mark.parametrize('plain', [True, False])
def test_progress_on_a_terminal_is_one_live_line(plain, monkeypatch):
  for name in ('NO_COLOR', 'FORCE_COLOR'):
    monkeypatch.delenv(name, raising=False)
  if plain:
    monkeypatch.setenv('NO_COLOR', '1')
  monkeypatch.setenv('TERM', 'xterm-256color')
  monkeypatch.setenv('COLUMNS', '90')
  leader, follower = pty.openpty()
  with os.fdopen(follower, 'w') as terminal:
    with contextlib.redirect_stderr(terminal), progress.progress(10, 0, 'run') as update:
      update(1, {'loss': 5.5}, 100., 0.)
      print('a line above', file=sys.stderr)
      time.sleep(.25)
      update(7, {'loss': 4.5, **{f'term{i}': 1. for i in range(9)}}, 100., 0.)
      update(10, {'loss': 3.5}, 100., 0.)
  text = io.BytesIO()
  with contextlib.suppress(OSError):  # EIO is the end of a terminal
    while part := os.read(leader, 65536):
      text.write(part)
  os.close(leader)
  text = text.getvalue().decode()
  assert 'a line above' in text and '10/10' in text and 'loss 3.5' in text and '0:00:00 left' in text
  assert text.count('\n') <= 3  # the live line is rewritten, not repeated
  assert ('\x1b[3' in text) != plain  # a color

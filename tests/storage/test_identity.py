"""Whose a checkpoint is, and whether what cannot be read is wrong: good checkpoints are neither mixed up nor condemned."""
import errno
import json
import os
import re
import shutil

import jax
import numpy as np
import pytest
from jax.errors import JaxRuntimeError
from PIL import Image

from equivariant_ssl import errors
from equivariant_ssl.data import decode
from equivariant_ssl.parallel import processes
from equivariant_ssl.storage import (
  checkpoint,
  checkpoint_writer,
  disk,
  orbax_log,
  record,
  run_identity,
)

LIKE = {'step': np.int32(0), 'w': np.zeros((4, 8), np.float32)}


def state(step):
  return {'step': np.int32(step), 'w': np.full((4, 8), step, np.float32)}


def make(workdir, *steps):
  with checkpoint.open_checkpoints(workdir / 'checkpoints', keep=9) as saved:
    saved.restore(LIKE)
    for step in steps:
      saved.save(step, state(step), {'at': step})
  return workdir


def restore(workdir, lines=None):
  with checkpoint.open_checkpoints(workdir / 'checkpoints', log=(lines if lines is not None else []).append) as saved:
    return saved.restore(LIKE)


def code_of(call, *args, match=None):
  with pytest.raises(errors.UserError, match=match) as error:
    call(*args)
  return error.value.code


def everything(workdir):
  return {str(p.relative_to(workdir)): p.is_file() and p.read_bytes() for p in workdir.rglob('*')}


@pytest.fixture(scope='module')
def two(tmp_path_factory):
  """A run with checkpoints of steps 1 and 2."""
  return make(tmp_path_factory.mktemp('two') / 'run', 1, 2)


@pytest.fixture
def run(two, tmp_path):
  return shutil.copytree(two, tmp_path / 'run')


@pytest.fixture(autouse=True)
def _at_once(monkeypatch):
  monkeypatch.setattr(disk, 'PAUSES', (0., 0., 0.))


def test_a_checkpoint_of_another_run_is_refused_by_whoever_reads_it(run, tmp_path):
  other = make(tmp_path / 'other', 3)
  shutil.copytree(other / 'checkpoints/3', run / 'checkpoints/3')
  before = everything(run)
  for read in (lambda: restore(run), lambda: checkpoint.load_checkpoint(run / 'checkpoints', LIKE)):
    assert code_of(read, match='3 is not of this run.*\n.*nothing was changed') == errors.OTHER_CONFIG
  assert everything(run) == before
  shutil.rmtree(run / 'checkpoints')
  shutil.copytree(other / 'checkpoints', run / 'checkpoints')
  assert code_of(restore, run, match='is not of this run') == errors.OTHER_CONFIG


def test_a_copy_of_a_run_is_the_same_run_and_a_lost_id_is_that_of_its_checkpoints(run):
  own = run_identity.read(run)
  assert len(own.id) == 16 and own.saved == 1
  (run / 'run.json').unlink()
  assert restore(run)[0] == 2 and run_identity.read(run).id == own.id
  (run / 'run.json').write_text('')  # as after a power loss
  assert restore(run)[0] == 2 and run_identity.read(run).id == own.id
  assert restore(make(run, 3))[0] == 3


def test_an_id_that_cannot_be_read_is_not_a_lost_one(run, monkeypatch):
  real = run_identity.record.pathlib.Path.read_text
  before, calls = everything(run), []

  def broken(self, *args, **kw):
    if self.name == 'run.json':
      calls.append(self)
      raise OSError(errno.EIO, 'Input/output error', str(self))
    return real(self, *args, **kw)
  monkeypatch.setattr(run_identity.record.pathlib.Path, 'read_text', broken)
  for read in (lambda: restore(run), lambda: checkpoint.load_checkpoint(run / 'checkpoints', LIKE)):
    assert code_of(read, match='run.json could not be read in 4 tries') == errors.INPUT_OUTPUT
  assert len(calls) == 8 and everything(run) == before


def test_checkpoints_of_before_there_were_ids_go_on(run, monkeypatch):
  real = checkpoint.fingerprint.seal
  monkeypatch.setattr(checkpoint.fingerprint, 'seal', lambda step, prints, meta, **more: real(step, prints, meta))
  old = make(run.parent / 'old', 1, 2)
  monkeypatch.undo()
  (old / 'run.json').unlink()
  make(old, 3)
  assert restore(old)[0] == 3 and run_identity.read(old).unnamed == 2
  shutil.rmtree(old / 'checkpoints/3')
  assert restore(old)[0] == 2
  shutil.copytree(old / 'checkpoints/2', old / 'checkpoints/5')  # of another place
  assert code_of(restore, old) == errors.OTHER_CONFIG


@pytest.mark.parametrize('gone', ['folder', 'steps', 'folder and id'])
def test_checkpoints_that_are_gone_stop_the_run_and_its_metrics_stay(run, gone):
  with record.open_metrics(run, 2) as write:
    write(2, {'loss': 1.})
  for path in [run / 'checkpoints'] if 'folder' in gone else (run / 'checkpoints').iterdir():
    shutil.rmtree(path)
  if 'id' in gone:
    (run / 'run.json').unlink()
  for _ in range(2):
    assert code_of(restore, run, match='(?s)step 1|step 2.*back from a copy') == errors.NO_CHECKPOINT
  assert [r['step'] for r in record.read_metrics(run)] == [2]


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_again(tmp_path):
  assert restore(tmp_path) is None
  with record.open_metrics(tmp_path) as write:
    write(1, {'loss': 1.})
  assert restore(tmp_path) is None


def failing(monkeypatch, times, error=errno.EIO, place='load'):
  """Let orbax's reading fail so many times, as a disk or a network file system does; how often it was asked."""
  real, calls = getattr(checkpoint.ocp, place), []

  def broken(*args, **kw):
    calls.append(args)
    if len(calls) <= times:
      try:
        raise OSError(error, os.strerror(error), 'd/0')
      except OSError as inner:
        raise ValueError('Failed to load') from inner  # as libraries do
    return real(*args, **kw)
  monkeypatch.setattr(checkpoint.ocp, place, broken)
  return calls


@pytest.mark.parametrize('place', ['load', 'metadata'])
@pytest.mark.parametrize('times', [1, 3])
def test_a_read_error_that_passes_is_not_damage(run, times, place, monkeypatch):
  before, lines = everything(run), []
  failing(monkeypatch, times, [errno.EIO, errno.ESTALE][times % 2], place)
  assert restore(run, lines)[0] == 2 and not lines
  assert everything(run) == before


@pytest.mark.parametrize('keep', [1, 2])
def test_a_read_error_that_stays_is_one_of_its_own(run, keep, monkeypatch):
  """Whether it is the only checkpoint or not: nothing is condemned, and nothing older is taken in its place."""
  if keep == 1:
    shutil.rmtree(run / 'checkpoints/1')
  before = everything(run)
  failing(monkeypatch, 99)
  for read in (lambda: restore(run), lambda: checkpoint.load_checkpoint(run / 'checkpoints', LIKE)):
    assert code_of(read, match='checkpoints/2 could not be read in 4 tries: Input/output error.\n') == errors.INPUT_OUTPUT
  assert everything(run) == before


def test_a_file_that_cannot_be_read_is_not_damage(run, monkeypatch):
  """Orbax says something else, but a file of it cannot be read."""
  failing(monkeypatch, 99, errno.ENOENT)
  monkeypatch.setattr(disk, 'read_through', lambda path: (_ for _ in ()).throw(OSError(errno.EIO, 'Input/output error')))
  assert code_of(restore, run) == errors.INPUT_OUTPUT and not (run / 'quarantine').exists()


def test_a_folder_that_cannot_be_listed_at_first(run, monkeypatch):
  real, calls = checkpoint.pathlib.Path.iterdir, []

  def iterdir(self):
    calls.append(self)
    if len(calls) < 3:
      raise OSError(errno.ESTALE, 'Stale file handle')
    return real(self)
  monkeypatch.setattr(checkpoint.pathlib.Path, 'iterdir', iterdir)
  assert checkpoint.saved_steps(run / 'checkpoints') == [2, 1]
  monkeypatch.setattr(checkpoint.pathlib.Path, 'iterdir', lambda self: (_ for _ in ()).throw(OSError(errno.EIO, 'x')))
  assert code_of(checkpoint.saved_steps, run / 'checkpoints') == errors.INPUT_OUTPUT


def test_what_is_wrong_once_is_read_again(run, monkeypatch):
  real, calls = checkpoint.fingerprint.digest_leaves, []

  def survey(leaves):
    calls.append(leaves)
    found = real(leaves)
    return ({**found[0], 'w': 'x'}, found[1]) if len(calls) == 1 else found
  monkeypatch.setattr(checkpoint.fingerprint, 'digest_leaves', survey)
  assert restore(run)[0] == 2 and not (run / 'quarantine').exists()


def rewritten(run, **change):
  path = run / 'checkpoints/2/_CHECKPOINT_METADATA'
  found = json.loads(path.read_text())
  found['custom_metadata'] |= change
  path.write_text(json.dumps(found))


@pytest.mark.parametrize('form', [2, '3', 0])
def test_an_unknown_format_is_a_version(run, form):
  rewritten(run, format=form)
  before = everything(run)
  assert code_of(restore, run, match=f'format {form}, and 1 is what this version reads') == errors.OTHER_CONFIG
  assert everything(run) == before


def test_what_a_newer_orbax_wrote_is_a_version_where_this_one_fails(run, monkeypatch):
  monkeypatch.setattr(checkpoint_writer, 'ORBAX', '99.1.0')
  make(run, 3)
  monkeypatch.undo()
  monkeypatch.setattr(disk, 'PAUSES', ())
  assert restore(run)[0] == 3
  failing(monkeypatch, 99, errno.ENOENT)
  assert code_of(restore, run, match='written by orbax-checkpoint 99.1.0') == errors.OTHER_CONFIG
  assert not (run / 'quarantine').exists()


def test_no_advice_deletes_weights(run):
  for path in (run / 'checkpoints').rglob('ocdbt*'):
    shutil.rmtree(path, ignore_errors=True)
  for path in list((run / 'checkpoints').glob('*/state')):
    shutil.rmtree(path)
  with pytest.raises(errors.UserError) as error:
    restore(run)
  said = str(error.value).replace(str(run), 'RUN')
  assert not re.search(r'\brm\b|delete|remove', said) and 'good copy' in said
  assert len(list((run / 'quarantine').iterdir())) == 2


def test_a_dead_peer_during_a_save_is_told_as_one(tmp_path, monkeypatch):
  monkeypatch.setattr(checkpoint_writer, '_manager', lambda *a: (_ for _ in ()).throw(
      ValueError('save failed').with_traceback(None)))
  gone = JaxRuntimeError('DEADLINE_EXCEEDED: Barrier timed out. Some tasks: 1')
  with checkpoint.open_checkpoints(tmp_path / 'checkpoints') as saved:
    assert code_of(saved.save, 1, state(1), {}, match='was not written') == errors.USAGE
    monkeypatch.setattr(jax, 'process_count', lambda: 2)
    monkeypatch.setattr(processes, 'gather', lambda value: [value])

    def lost(*args):
      raise ValueError('save failed') from gone
    monkeypatch.setattr(checkpoint_writer, '_manager', lost)
    code = code_of(saved.save, 1, state(1), {}, match='another process of this job was lost.*Barrier timed out')
    monkeypatch.undo()
  assert code == errors.WATCHDOG


def test_an_error_of_the_disk_in_a_save_has_its_code(tmp_path, monkeypatch):
  failure = OSError(errno.EIO, 'Input/output error')
  monkeypatch.setattr(checkpoint_writer, '_manager', lambda *a: (_ for _ in ()).throw(failure))
  with checkpoint.open_checkpoints(tmp_path / 'checkpoints') as saved:
    assert code_of(saved.save, 1, state(1), {}) == errors.INPUT_OUTPUT


@pytest.mark.parametrize('number,code', [(errno.EIO, errors.INPUT_OUTPUT), (errno.EINVAL, None), (errno.ENOTSUP, None)])
def test_a_flush_that_fails_is_said_and_one_that_is_not_to_be_had_is_not(tmp_path, number, code, monkeypatch):
  def fsync(descriptor):
    raise OSError(number, os.strerror(number))
  with checkpoint.open_checkpoints(tmp_path / 'checkpoints') as saved:
    saved.restore(LIKE)
    monkeypatch.setattr(os, 'fsync', fsync)
    if code:
      assert code_of(lambda: saved.save(1, state(1), {}, wait=True), match='1 was not written') == code
    else:
      saved.save(1, state(1), {}, wait=True)
    monkeypatch.undo()


def test_what_orbax_says_of_an_abandoned_read_is_not_heard(capsys):
  import sys
  with orbax_log.silenced():
    sys.unraisablehook(None)
  assert capsys.readouterr().err == ''


def test_errors_that_pass_are_known_by_what_they_came_from():
  inner = OSError(errno.ESTALE, 'Stale file handle')
  outer = RuntimeError('x')
  outer.__cause__ = inner
  assert errors.passing(outer) == 'Stale file handle'
  assert errors.passing(ValueError('NOT_FOUND: Error reading "x": [OS error 5: Input/output error]')) == 'Input/output error'
  assert errors.passing(FileNotFoundError(errno.ENOENT, 'x')) == '' == errors.passing(None)
  inner.__cause__ = outer  # round and round
  assert errors.passing(RuntimeError('y')) == ''
  assert errors.describe(inner)[1] == errors.INPUT_OUTPUT and errors.describe(OSError(errno.ENOSPC, 'x'))[1] == errors.USAGE


def shaky(monkeypatch, times):
  """Let so many openings of files fail, as a network file system that was away does."""
  real, calls = os.open, []

  def broken(path, *args, **kw):
    if str(path).endswith('.png'):
      calls.append(path)
      if len(calls) <= times:
        raise OSError(errno.ESTALE, 'Stale file handle', path)
    return real(path, *args, **kw)
  monkeypatch.setattr(os, 'open', broken)


@pytest.mark.parametrize('read', [decode.read_file, decode.read_header])
def test_an_image_on_a_disk_that_fails_is_not_a_broken_one(read, tmp_path, monkeypatch):
  path = tmp_path / 'a.png'
  Image.fromarray(np.zeros((3, 5, 3), np.uint8)).save(path)
  want = read(str(path), str(tmp_path))
  shaky(monkeypatch, 3)
  assert read(str(path), str(tmp_path)) == want
  monkeypatch.undo()
  monkeypatch.setattr(disk, 'PAUSES', (0.,))
  shaky(monkeypatch, 99)
  assert code_of(read, str(path), str(tmp_path), match='a.png could not be read') == errors.INPUT_OUTPUT
  monkeypatch.undo()
  path.write_bytes(b'x')
  with pytest.raises(decode.BadImage):
    decode.read_header(str(path), str(tmp_path))

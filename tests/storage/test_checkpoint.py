"""A checkpoint comes back bit for bit, or not at all: every damage is seen, and the newest sound one is found."""
import os
import pathlib
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import namedtuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from equivariant_ssl import errors
from equivariant_ssl.parallel import sharding
from equivariant_ssl.storage import checkpoint, checkpoint_writer, fingerprint

State = namedtuple('State', 'step params stats target opt_state extras')
PARAMS = {'conv': {'kernel': np.random.RandomState(0).normal(size=(3, 3, 32, 8)).astype(np.float32)},
          'bn': {'scale': np.linspace(0, 1, 8, dtype=np.float32)}, 'none': np.zeros((0, 8), np.float32)}
TX = optax.lars(.1, 1e-6, lambda p: jax.tree.map(lambda x: x.ndim > 1, p), .001,
                trust_ratio_mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p), momentum=.9)


def state(step=0, tx=TX, params=PARAMS):
  """A state of the shape of a run's, its bits a function of `step`."""
  params = jax.tree.map(lambda x: jnp.asarray(x + np.float32(step)), params)
  return State(jnp.int32(step), params, {'bn': {'mean': np.full(8, step, np.float32)}}, (), tx.init(params), ())


def abstract(tree, placed=None):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed), tree)


LIKE = abstract(state())


def same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.fixture(scope='module')
def original(tmp_path_factory):
  """A workdir with sound checkpoints of steps 5, 10, 15 and 20."""
  workdir = tmp_path_factory.mktemp('original')
  with checkpoint.open_checkpoints(workdir / 'checkpoints', keep=4) as saved:
    for step in (5, 10, 15, 20):
      saved.save(step, state(step), {'config': 'a', 'at': step})
  return workdir


@pytest.fixture
def workdir(original, tmp_path):
  shutil.copytree(original, tmp_path / 'run')
  return tmp_path / 'run'


def restore(workdir, like=LIKE, lines=None):
  with checkpoint.open_checkpoints(workdir / 'checkpoints', log=(lines if lines is not None else []).append) as saved:
    return saved.restore(like)


@pytest.mark.parametrize('tx', [
    TX, optax.chain(optax.add_decayed_weights(5e-4, lambda p: jax.tree.map(lambda x: x.ndim > 1, p)),
                    optax.sgd(lambda n: .1, .9)),
    optax.adamw(lambda n: .1, mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p)),
    optax.masked(optax.sgd(.1, .9), {'conv': True, 'bn': False, 'none': False})],
    ids=['lars', 'sgd', 'adamw', 'masked nodes'])
def test_a_state_comes_back_bit_for_bit(tx, tmp_path):
  want = state(3, tx)._replace(target=({'w': jnp.array([1.5, -0.], jnp.bfloat16)}, {}), extras={'on': np.array(True)})
  with checkpoint.open_checkpoints(tmp_path / 'checkpoints') as saved:
    saved.save(3, want, {'seed': 7, 'name': 'x'}, wait=True)
    step, got, meta = saved.restore(abstract(want))
  assert (step, meta) == (3, {'seed': 7, 'name': 'x'})
  same(got, want)
  assert fingerprint.fingerprints(got) == fingerprint.fingerprints(want)


def test_nothing_yet_is_none_and_reading_it_is_an_error(tmp_path):
  assert restore(tmp_path) is None
  with pytest.raises(errors.UserError, match='eqssl train') as error:
    checkpoint.load_checkpoint(tmp_path / 'checkpoints', LIKE)
  assert error.value.code == errors.NO_CHECKPOINT


def test_the_newest_are_kept_and_a_saved_step_is_not_saved_again(tmp_path):
  with checkpoint.open_checkpoints(tmp_path / 'checkpoints', keep=2) as saved:
    for step in (1, 2, 3):
      saved.save(step, state(step), {})
    saved.save(3, state(99), {}, wait=True)
    assert saved.latest() == 3
  assert checkpoint.saved_steps(tmp_path / 'checkpoints') == [3, 2]
  with checkpoint.open_checkpoints(tmp_path / 'checkpoints', keep=2) as saved:
    step, got, _ = saved.restore(LIKE)
    saved.save(3, state(99), {})  # restored, so it is there
    saved.save(4, state(4), {})
  same(got, state(3))
  assert checkpoint.saved_steps(tmp_path / 'checkpoints') == [4, 3]
  same(checkpoint.load_checkpoint(tmp_path / 'checkpoints', LIKE, 3)[1], state(3))


def test_a_reader_takes_a_part_a_step_or_an_older_one_and_moves_nothing(workdir):
  lines, directory = [], workdir / 'checkpoints'
  step, got, meta = checkpoint.load_checkpoint(directory, {'params': LIKE.params}, 10)
  assert step == 10 and meta == {'config': 'a', 'at': 10}
  same(got['params'], state(10).params)
  weights(directory / '20').unlink()
  before = sorted(directory.rglob('*'))
  assert checkpoint.load_checkpoint(directory, LIKE, log=lines.append)[0] == 15
  assert len(lines) == 1 and '20 is damaged' in lines[0]
  for step in (20, 7):  # damaged, absent
    with pytest.raises(errors.UserError) as error:
      checkpoint.load_checkpoint(directory, LIKE, step, lines.append)
    assert error.value.code == errors.NO_CHECKPOINT
  assert sorted(directory.rglob('*')) == before and not (workdir / 'quarantine').exists()


def weights(step_dir):
  """The file that holds the arrays."""
  return max((p for p in step_dir.rglob('*') if p.is_file()), key=lambda p: p.stat().st_size)


def edit(path, change):
  data = bytearray(path.read_bytes())
  path.write_bytes(change(data))


def flipped(data):
  data[len(data) // 2] ^= 1
  return data


def all_of_them(d):
  for step in ('5', '10', '15', '20'):
    weights(d / step).unlink()


def replaced(d, part=''):
  shutil.rmtree(d / '20' / part)
  shutil.copytree(d / '15' / part, d / '20' / part)


DAMAGES = {  # what is done to the directory, and the step that is then found
    'bit flip': (lambda d: edit(weights(d / '20'), flipped), 15),
    'truncated': (lambda d: edit(weights(d / '20'), lambda b: b[:len(b) // 2]), 15),
    'deleted': (lambda d: weights(d / '20').unlink(), 15),
    'zeroed': (lambda d: edit(weights(d / '20'), lambda b: bytes(len(b))), 15),
    'no _METADATA': (lambda d: (d / '20/state/_METADATA').unlink(), 15),
    'empty _METADATA': (lambda d: (d / '20/state/_METADATA').write_text(''), 15),
    'empty _CHECKPOINT_METADATA': (lambda d: (d / '20/_CHECKPOINT_METADATA').write_text(''), 15),
    'renamed in _METADATA': (lambda d: edit(d / '20/state/_METADATA', lambda b: b.replace(b'scale', b'scalf')), 15),
    'no state': (lambda d: shutil.rmtree(d / '20/state'), 15),
    'empty step': (lambda d: [shutil.rmtree(d / '20'), (d / '20').mkdir()], 15),
    'flipped manifest': (lambda d: edit(d / '20/state/manifest.ocdbt', flipped), 15),
    'copy of another step': (replaced, 15),
    'state of 15 inside 20': (lambda d: replaced(d, 'state'), 15),
    'stray directory': (lambda d: (d / '999').mkdir(), 20),
    'stray file': (lambda d: (d / '998').write_text('x'), 20),
    'torn copy': (lambda d: shutil.copytree(d / '20/state', d / '25.orbax-checkpoint-tmp/state'), 20),
    'old step half deleted': (lambda d: [(d / '5/_CHECKPOINT_METADATA').unlink(), shutil.rmtree(d / '5/state')], 20),
    'two damaged': (lambda d: [weights(d / '20').unlink(), edit(weights(d / '15'), flipped)], 10),
    'edited record': (lambda d: edit(d / '20/_CHECKPOINT_METADATA', lambda b: b.replace(b'config', b'konfig')), 15),
    'all damaged': (all_of_them, None),
}


@pytest.mark.parametrize('name', DAMAGES)
def test_damaged_directories(name, workdir):
  damage, left = DAMAGES[name]
  damage(workdir / 'checkpoints')
  there, lines = checkpoint.saved_steps(workdir / 'checkpoints'), []
  if left is None:
    for _ in range(2):  # the second time nothing is listed any more, and it still does not start from 0
      with pytest.raises(errors.UserError, match='quarantine') as error:
        restore(workdir, lines=lines)
      assert error.value.code == errors.NO_CHECKPOINT
  else:
    step, got, meta = restore(workdir, lines=lines)
    assert (step, meta['at']) == (left, left)
    same(got, state(left))
  moved = [s for s in there if left is None or s > left]
  aside = sorted(int(p.name.split('-')[0]) for p in (workdir / 'quarantine').glob('*'))
  assert aside == sorted(moved) and len(lines) == len(moved)
  if left is not None:  # the run goes on over what is left
    with checkpoint.open_checkpoints(workdir / 'checkpoints', keep=2) as saved:
      saved.save(30, state(30), {}, wait=True)
      assert saved.restore(LIKE)[0] == 30
    assert len(checkpoint.saved_steps(workdir / 'checkpoints')) == 2


def flips(workdir, count, seed):
  """Flip a bit of the newest checkpoint, `count` times, every second one in its arrays: what loads must be right.

  Returns how often the newest was loaded all the same (some bits are in nothing that is read).
  """
  rng, newest, harmless = random.Random(seed), workdir / 'checkpoints/20', 0
  files = sorted(p for p in newest.rglob('*') if p.is_file() and p.stat().st_size)
  for i in range(count):
    path = weights(newest) if i % 2 else rng.choice(files)
    good = path.read_bytes()
    at, bit = rng.randrange(len(good)), rng.randrange(8)
    path.write_bytes(good[:at] + bytes([good[at] ^ 1 << bit]) + good[at + 1:])
    step, got, _ = checkpoint.load_checkpoint(workdir / 'checkpoints', LIKE, log=lambda line: None)
    same(got, state(step))
    harmless += step == 20
    path.write_bytes(good)
  return harmless


def test_no_flipped_bit_is_accepted(workdir):
  assert flips(workdir, 20, 0) < 15


@pytest.mark.slow
def test_no_flipped_bit_is_accepted_in_a_long_sweep(workdir):
  assert flips(workdir, 800, 1) < 600


@pytest.mark.parametrize('like', [
    abstract(state(params={**PARAMS, 'bn': {'scale': np.zeros(9, np.float32)}})),
    LIKE._replace(stats={}), LIKE._replace(extras={'more': LIKE.step}),
    LIKE._replace(stats=jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), LIKE.stats))],
    ids=['shape', 'leaf too many', 'leaf missing', 'dtype'])
def test_another_config_is_an_error_and_nothing_is_moved(like, workdir):
  lines = []
  with pytest.raises(errors.UserError, match='eqssl resume') as error:
    restore(workdir, like, lines)
  assert error.value.code == errors.OTHER_CONFIG and not lines
  assert re.search(r'of another config: \d+ of \d+ tensors match: ', str(error.value))
  assert checkpoint.saved_steps(workdir / 'checkpoints') == [20, 15, 10, 5] and not (workdir / 'quarantine').exists()


def test_files_that_cannot_be_read_raise_and_nothing_is_moved(original):
  with tempfile.TemporaryDirectory() as folder:  # outside pytest's own, which is closed to other users
    os.chmod(folder, 0o777)
    workdir = pathlib.Path(folder, 'run')
    shutil.copytree(original, workdir)
    for path in (workdir, workdir / 'checkpoints', workdir / 'checkpoints/20'):
      path.chmod(0o777)  # moving it away would be allowed
    weights(workdir / 'checkpoints/20').chmod(0)
    root = os.geteuid() == 0
    try:
      if root:
        os.seteuid(65534)
      with pytest.raises(OSError, match='denied'):
        restore(workdir)
    finally:
      if root:
        os.seteuid(0)
    assert checkpoint.saved_steps(workdir / 'checkpoints')[0] == 20


@pytest.mark.parametrize('value', [np.nan, np.inf, 2.4e30, -1e16])
def test_a_state_that_is_not_finite_or_absurd_is_refused(value, tmp_path):
  bad = state(2)
  bad.params['bn']['scale'] = bad.params['bn']['scale'].at[3].set(value)
  with checkpoint.open_checkpoints(tmp_path / 'checkpoints') as saved:
    saved.save(1, state(1), {})
    with pytest.raises(errors.UserError, match='params/bn/scale.*\n.*step 1') as error:
      saved.save(2, bad, {})
    assert error.value.code == errors.NOT_FINITE and saved.latest() == 1


def test_a_full_disk_is_said_before_and_a_later_save_works(tmp_path, monkeypatch):
  usage = shutil.disk_usage(tmp_path)
  with checkpoint.open_checkpoints(tmp_path / 'checkpoints') as saved:
    saved.save(1, state(1), {})
    with monkeypatch.context() as patch:
      patch.setattr(shutil, 'disk_usage', lambda path: usage._replace(free=100))
      with pytest.raises(errors.UserError, match='0 MiB are free.*\n.*step 1'):
        saved.save(2, state(2), {})
    saved.save(2, state(2), {}, wait=True)
    assert saved.latest() == 2


def test_a_save_that_fails_in_its_thread_is_said_once(tmp_path):
  code = """if True:
    import resource, signal, sys
    import numpy as np
    from equivariant_ssl import errors
    from equivariant_ssl.storage import checkpoint
    state = lambda: {'w': np.random.default_rng(0).normal(size=99999).astype('f4')}
    lines = []
    with checkpoint.open_checkpoints(sys.argv[1], log=lines.append) as saved:
      saved.save(1, state(), {}, wait=True)
      signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
      resource.setrlimit(resource.RLIMIT_FSIZE, (9999, resource.RLIM_INFINITY))
      saved.save(2, state(), {})
      try:
        saved.save(3, state(), {})
      except errors.UserError as error:
        print(error)
      resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
      saved.save(4, state(), {})
    assert not lines, lines
    assert checkpoint.load_checkpoint(sys.argv[1], state())[0] == 4
  """
  done = subprocess.run([sys.executable, '-c', code, str(tmp_path / 'checkpoints')], capture_output=True, text=True,
                        timeout=120)
  assert done.returncode == 0, done.stderr
  assert done.stdout.startswith('checkpoint 2 was not written') and 'step 1' in done.stdout and not done.stderr
  assert checkpoint.saved_steps(tmp_path / 'checkpoints') == [4, 1]


@pytest.mark.parametrize('devices', [1, 2, 8])
def test_saved_on_4_devices_restored_on_others(devices, tmp_path):
  four = sharding.replicated_sharding(sharding.mesh(jax.devices()[:4]))
  want = sharding.place(state(6), four)
  want = want._replace(stats=jax.device_put(want.stats, NamedSharding(four.mesh, PartitionSpec('data'))))
  prints = fingerprint.fingerprints(state(6))
  assert fingerprint.fingerprints(want) == prints
  with checkpoint.open_checkpoints(tmp_path / 'checkpoints') as saved:
    saved.save(6, want, {})
  there = sharding.replicated_sharding(sharding.mesh(jax.devices()[:devices]))
  got = restore(tmp_path, abstract(want, there))[1]
  assert fingerprint.fingerprints(got) == prints
  assert all(x.sharding.is_equivalent_to(there, x.ndim) for x in jax.tree.leaves(got))


def test_a_fingerprint_sees_values_places_and_types():
  prints = {fingerprint.fingerprints({'x': x})['x'] for x in (
      jnp.array([0., 1.]), jnp.array([1., 0.]), jnp.array([[0., 1.]]), jnp.array([-0., 1.]), jnp.array([0, 1]),
      jnp.array([False, True]), jnp.array([0., 1.], jnp.bfloat16), jnp.array([0., np.nan]), jnp.zeros(0))}
  assert len(prints) == 9
  assert fingerprint.fingerprints({'a': 1, 'b': (), 'c': (np.float32(2),)}).keys() == {'a', 'c/0'}


WRITER = """if True:
  import sys
  import numpy as np
  from equivariant_ssl.storage import checkpoint
  with checkpoint.open_checkpoints(sys.argv[1], keep=2) as saved:
    last = saved.restore({'step': np.int32(0), 'w': np.zeros((50, 50), 'f4')})
    for step in range(last[0] + 1 if last else 1, 10 ** 6):
      saved.save(step, {'step': np.int32(step), 'w': np.full((50, 50), step, 'f4')}, {})
      print(step, flush=True)
"""


def killed(tmp_path, rng):
  """Start a writer over what is there, kill it at a random moment, and check what is left."""
  with subprocess.Popen([sys.executable, '-c', WRITER, str(tmp_path / 'checkpoints')], stdout=subprocess.PIPE) as run:
    first = int(run.stdout.readline())
    time.sleep(rng.uniform(.2, .8))
    run.kill()
    last = int((run.stdout.read().split() or [first])[-1])
  like = {'step': jax.ShapeDtypeStruct((), jnp.int32), 'w': jax.ShapeDtypeStruct((50, 50), jnp.float32)}
  found = restore(tmp_path, like)
  # the save handed over last was in flight, the one before it committed
  assert last - 1 <= (found[0] if found else 0) <= last + 1
  if found:
    assert (np.asarray(found[1]['w']) == found[0]).all() and int(found[1]['step']) == found[0]
  return first, last


def test_kill_during_saving(tmp_path):
  rng, before = random.Random(0), 0
  for _ in range(2):
    first, last = killed(tmp_path, rng)
    assert before <= first <= before + 2
    before = last


@pytest.mark.slow
def test_kill_during_saving_many_times(tmp_path):
  rng = random.Random(1)
  for _ in range(25):
    killed(tmp_path, rng)


JOB = """if True:
  import sys
  import jax
  import numpy as np
  jax.config.update('jax_platforms', 'cpu')
  jax.config.update('jax_num_cpu_devices', 2)
  jax.distributed.initialize(sys.argv[2], 2, int(sys.argv[3]), coordinator_bind_address=sys.argv[2],
                             cluster_detection_method='deactivate')
  from equivariant_ssl.parallel import sharding
  from equivariant_ssl.storage import checkpoint, fingerprint
  where = sharding.replicated_sharding(sharding.mesh())
  state = lambda n: sharding.place({'step': np.int32(n), 'w': np.full((4, 8), n, 'f4')}, where)
  like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), state(0))
  with checkpoint.open_checkpoints(sys.argv[1], log=lambda line: print('LOG', line)) as saved:
    assert saved.restore(like) is None
    for n in (1, 2, 3):
      saved.save(n, {**state(n), 'host': np.float32(n)}, {'n': n})
  import pathlib
  from jax.experimental import multihost_utils
  if jax.process_index() == 0:
    (pathlib.Path(sys.argv[1]) / '3/_CHECKPOINT_METADATA').write_text('')
  multihost_utils.sync_global_devices('damaged')
  like['host'] = jax.ShapeDtypeStruct((), np.float32, sharding=where)
  with checkpoint.open_checkpoints(sys.argv[1], log=lambda line: print('LOG', line)) as saved:
    step, got, meta = saved.restore(like)
    assert step == 2 and meta == {'n': 2} and int(got['step']) == 2
    saved.save(4, {**state(4), 'host': np.float32(4)}, {}, wait=True)
  print('END', fingerprint.fingerprints(got))
"""


@pytest.mark.slow
def test_two_processes_save_restore_and_fall_back_together(tmp_path):
  import socket
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    address = f'127.0.0.1:{s.getsockname()[1]}'
  jobs = [subprocess.Popen([sys.executable, '-c', JOB, str(tmp_path / 'checkpoints'), address, str(i)],
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for i in range(2)]
  ends = [job.communicate(timeout=300) for job in jobs]
  assert [job.returncode for job in jobs] == [0, 0], ends
  logs = [[line for line in out.splitlines() if line.startswith('LOG')] for out, _ in ends]
  assert [len(x) for x in logs] == [1, 0]
  want = fingerprint.fingerprints({'step': np.int32(2), 'w': np.full((4, 8), 2, 'f4'), 'host': np.float32(2)})
  assert all(f'END {want}' in out for out, _ in ends), (want, ends)


def test_a_directory_that_is_there_and_said_to_be_missing_is_a_failing_disk(tmp_path):
  """os.path.isdir answers False when the disk fails: orbax then reports a missing directory."""
  seen = ValueError('Checkpoint directory does not exist: x'), NotADirectoryError('Path is not a directory: x')
  for error in seen:
    there = checkpoint_writer._not_written(tmp_path, 3, error, 2)
    assert there.code == errors.INPUT_OUTPUT and 'it is there now' in str(there)
    assert checkpoint_writer._not_written(tmp_path / 'gone', 3, error, 2).code == errors.USAGE

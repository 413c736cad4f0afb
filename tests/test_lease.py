"""The lease of a GPU: its arithmetic, what travels and comes back, parts that end badly, a rehearsal in miniature."""
import argparse
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys
import time
import zipfile

import jax
import numpy as np
import pytest
import tiny

from equivariant_ssl import config as configs
from equivariant_ssl.evaluate import evaluation
from equivariant_ssl.parallel import sharding
from equivariant_ssl.storage import checkpoint, fingerprint, record
from equivariant_ssl.training import runs

ROOT = pathlib.Path(__file__).parent.parent
GPU = ROOT / 'benchmarks' / 'gpu'
sys.path.insert(0, str(GPU))

import budget  # noqa: E402
import calls  # noqa: E402
import carried  # noqa: E402
import encoders  # noqa: E402
import experiment  # noqa: E402
import lease  # noqa: E402
import pack  # noqa: E402
import rehearse  # noqa: E402
import restore  # noqa: E402
import sizes  # noqa: E402

NEEDS = budget.Needs((1.3, 2.), 15.)


# -- arithmetic

@pytest.mark.parametrize('left', [130., 300., 420., 540.])
def test_as_many_epochs_as_fit_and_no_more(left):
  n = budget.epochs(NEEDS, left, sizes.MOST)
  time_of = lambda n: budget.fixed(NEEDS, left) + n * sum(NEEDS.epoch)
  assert time_of(n) <= left < time_of(n + 1)


def test_no_epochs_where_nothing_is_left_and_never_more_than_published():
  assert budget.epochs(NEEDS, 60., sizes.MOST) == 0
  assert budget.epochs(NEEDS, 1e5, sizes.MOST) == sizes.MOST
  slow = budget.epochs(NEEDS._replace(epoch=(2.6, 4.)), 420., sizes.MOST)
  assert 0 < slow <= budget.epochs(NEEDS, 420., sizes.MOST) / 2 + 1


def test_flags_are_kept_that_are_faster_by_more_than_the_noise_and_have_the_same_loss():
  base = {'images_per_s': [100., 102., 101.], 'loss': 5.}
  one = lambda speed, loss=5.: {'images_per_s': [speed] * 3, 'loss': loss}
  assert budget.best(base, {'a': one(110.), 'b': one(120.)}) == 'b'
  assert budget.best(base, {'a': one(101.5), 'b': one(102.9)}) is None, 'within the spread of the base'
  assert budget.best(base, {'a': one(110.), 'b': one(120., 6.)}) == 'a', 'another loss is another program'
  assert budget.best(base, {'a': one(110.), 'b': one(120., float('nan'))}) == 'a'
  assert budget.best(base, {'a': {}}) is None, 'a trial that failed'


def test_an_arm_is_a_config_and_what_it_is_changed_by():
  assert sizes.arm('cifar10_byol') == ('cifar10_byol', 'cifar10_byol', {})
  arm = sizes.arm('cifar10_simclr_equimod;augment.gray.role=invariant;augment.flip.role=invariant')
  assert arm.changed == {'augment.gray.role': 'invariant', 'augment.flip.role': 'invariant'}
  assert re.fullmatch(r'[\w.-]+', arm.label), 'a file of this name must come back'
  configs.load(arm.config, sizes.overrides(sizes.SIZES['rehearsal'], arm.config, arm.changed))


def test_every_size_fits_every_config_of_the_calls():
  for size in sizes.SIZES.values():
    for name in sizes.SPEEDS:
      assert configs.load(name, sizes.overrides(size, name)).batch <= 5 * size.records


def test_every_flag_is_known_to_this_xla():
  """An unknown flag ends the process: a lease would learn it on the device."""
  flags = ' '.join((*sizes.FLAGS.values(), calls.TRITON, '--xla_gpu_deterministic_ops=true'))
  done = subprocess.run([sys.executable, '-c', 'import jax; jax.devices()'], capture_output=True, text=True,
                        env={**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': flags})
  assert done.returncode == 0, done.stderr[-300:]


def test_every_item_of_the_list_can_be_typed():
  typed = re.findall(r'`((?:--arms|--seed|--epochs|call\d) [^`]*)`', (GPU / 'README.md').read_text())
  typed = [['call2', *w] if w[0].startswith('--') else w for w in map(shlex.split, typed)]
  asked = [lease.parser().parse_args(['1' if x == 'N' else x for x in w]) for w in typed]
  arms = {text for a in asked for text in a.arms}
  assert len(asked) >= 10 and len(arms) >= 9 and {a.only for a in asked} >= {'load', 'imagenet', 'resume'}
  for text in arms:
    arm = sizes.arm(text)
    configs.load(arm.config, arm.changed)


# -- what travels

def fake_load(folder, call, **changed):
  (folder / 'whl').mkdir(parents=True)
  for name in (*carried.HALVES[call], 'unpack.py'):
    (folder / name).write_text(f'of {name}')
  listed = {f.name: carried.digest(f) for f in folder.iterdir() if f.is_file()}
  (folder / carried.LIST).write_text(json.dumps(listed | changed))
  return folder


def test_half_of_the_data_is_not_the_experiment(tmp_path):
  """A machine that was lost between the calls: the second says what to repeat, at once; then nothing is missing."""
  store, said = tmp_path / 'store', []
  two = fake_load(tmp_path / 'two', 'call2')
  done = subprocess.run([sys.executable, GPU / 'lease.py', 'call2', '--store', store, '--load', two], capture_output=True,
                        text=True, env={**os.environ, 'OUT': str(tmp_path / 'out')})
  assert done.returncode == 3, done.stderr
  assert 'call1 with --only load, then call2 again' in done.stdout.splitlines()[-1]
  assert carried.missing(store) == list(carried.HALVES['call1'])
  carried.take(fake_load(tmp_path / 'one', 'call1'), store, said.append)
  assert carried.missing(store) == [] and not said


def test_a_file_that_did_not_arrive_whole_is_left_out(tmp_path):
  name, said = carried.HALVES['call1'][1], []
  carried.take(fake_load(tmp_path / 'one', 'call1', **{name: '0' * 64}), tmp_path, said.append)
  assert len(said) == 1 and name in said[0]
  assert carried.missing(tmp_path) == [name, *carried.HALVES['call2']]
  carried.take(tmp_path / 'none', tmp_path, said.append)
  assert 'carries nothing' in said[1]


def test_a_spare_wheel_is_for_a_machine_whose_own_is_too_old(monkeypatch):
  wheels = [pathlib.Path(f'{n}-9-py3-none-any.whl') for n in ('dm_pix', 'flax', 'orbax_checkpoint')]
  monkeypatch.setattr(carried.importlib.metadata, 'version', {'flax': '0.12.1', 'orbax-checkpoint': '0.9.1'}.__getitem__)
  assert [w.name.split('-')[0] for w in carried.wanted(wheels)] == ['dm_pix', 'orbax_checkpoint']


def test_what_a_wheel_needs_travels_or_is_there(tmp_path):
  wheel = tmp_path / 'some_thing-1.0-py3-none-any.whl'
  with zipfile.ZipFile(wheel, 'w') as z:
    z.writestr('some_thing-1.0.dist-info/METADATA', 'Name: some-thing\nRequires-Dist: numpy>=1\nRequires-Dist: Absent_One\n'
               'Requires-Dist: extra-one ; extra == "x"\nRequires-Dist: other; sys_platform == "win32"\n')
  page = tmp_path / 'KINDS.md'
  page.write_text('## Python packages already there\n\nkind: of it. Packages: absl-py, numpy.\n')
  assert pack.lacking([wheel], pack.on_the_machine(page)) == ['Absent_One (of some_thing)']


def test_the_loads_and_the_calls_as_they_are_typed(tmp_path):
  data = tmp_path / 'data'
  data.mkdir()
  for name in (*sum(carried.HALVES.values(), ()), 'unpack.py'):
    (data / name).write_bytes(b'x' * 1000)
  whole = [pack.load(tmp_path / call, half, data, []) for call, half in carried.HALVES.items()]
  assert all(4000 < size < 6000 for size in whole)
  (tmp_path / 'flax-9-py3-none-any.whl').write_bytes(b'x' * 3000)
  wheels, half = sorted(tmp_path.glob('*.whl')), carried.HALVES['call1']
  taken = [pack.fitted(0, tmp_path / 'call1', half, data, wheels, limit)[1] for limit in (9000, 6000)]
  assert taken == [wheels, []], 'a spare wheel stays behind where there is no room'
  readme = (GPU / 'README.md').read_text()
  for call, minutes in pack.CALLS.items():
    command = re.search('command="(.*?)"', pack.call(call, minutes, f'.gpu/{call}'))[1]
    assert len(command) <= 2000 and f'`{command}`' in readme, 'the README has the calls as they are typed'
    assert f'timeout_s={60 * minutes + pack.START:.0f}' in pack.call(call, minutes, '')
  assert '/.gpu/' in (ROOT / '.gitignore').read_text().split()


# -- what comes back

def test_a_network_in_pieces_and_back(tmp_path):
  rng = np.random.default_rng(0)
  leaves = {'params/a/kernel': rng.normal(size=(40, 50)).astype(np.float32), 'stats/a/var': rng.random(30, np.float32)}
  about = encoders.write(leaves, tmp_path, 'x.encoder', piece=1000)
  files = [tmp_path / n for n in about['files']]
  assert len(files) > 2 and max(f.stat().st_size for f in files) <= 1000
  back = encoders.read(files, about['sha256'])
  assert {k: v.dtype for k, v in back.items()} == dict.fromkeys(leaves, np.float32)
  np.testing.assert_array_equal(back['stats/a/var'], leaves['stats/a/var'])
  np.testing.assert_allclose(back['params/a/kernel'], leaves['params/a/kernel'], rtol=2**-11, atol=2**-25)
  with pytest.raises(ValueError, match='not the bytes'):
    encoders.read(files[::-1], about['sha256'])
  with pytest.raises(ValueError, match='not finite'):
    encoders.write({'params/k': np.full((2, 2), 1e6, np.float32)}, tmp_path, 'y')


def test_both_official_encoders_come_back_in_one_call():
  """8 files of 16 MiB, 64 MiB together, by the shapes of the two networks; deflation is not counted on."""
  from equivariant_ssl.parallel import step_plan
  state = runs.abstract(step_plan.described(configs.load(sizes.FOUNDING[1]), sharding.mesh(jax.devices()[:1]), print))
  sizes_of = []
  for left in ((*experiment.LEFT, 'heads_equimod'), experiment.LEFT):  # SimCLR has the same encoder
    leaves = fingerprint.flat([{k: v for k, v in tree.items() if k not in left} for tree in (state.params, state.stats)])
    sizes_of.append(sum(v.size * (2 if len(v.shape) > 1 else 4) for v in leaves.values()) + 200 * len(leaves))
  assert sizes_of[1] > 1.3 * sizes_of[0] > 2e7, 'the head of EquiMod is half as large as the encoder'
  pieces = sum(-(-s // encoders.PIECE) for s in sizes_of)
  assert pieces <= lease.ENCODERS and sum(sizes_of) <= lease.BACK
  assert pieces + 2 <= rehearse.FILES and lease.BACK + lease.LOG <= rehearse.TOGETHER


def test_a_run_directory_is_made_of_what_came_back(tmp_path, monkeypatch, capsys):
  """The weights to float16's rounding, the statistics bitwise, the projector as at the start; metrics and config."""
  monkeypatch.setattr(experiment, 'STORE', tmp_path / 'store')
  config = configs.load(tiny.NAME, {'seed': '3'})
  place = experiment.folder('smoke', 3)
  run = runs.prepare(config, sharding.mesh(jax.devices()[:1]))
  state = jax.device_get(runs.initial(run))
  moved = jax.tree.map(lambda x: x + np.asarray(.01, x.dtype), (state.params, state.stats))
  record.start(place, configs.as_json(config), 'eqssl train --config smoke')
  (place / 'metrics.jsonl').write_text('{"step": 5, "loss": 1.5}\n')
  with checkpoint.open(place / 'checkpoints') as saved:
    saved.save(5, state._replace(step=np.int32(5), params=moved[0], stats=moved[1]), {}, wait=True)
  out = tmp_path / 'out'
  (tmp_path / 'store' / 'brought').mkdir()
  found = experiment.bring(sizes.SIZES['test'], print, 'smoke', 3)
  (tmp_path / 'store' / 'brought').rename(out)
  (out / 'results.json').write_text(json.dumps({'parts': {'bring smoke s3': {'state': 'done', 'found': found}}}))
  assert restore.main([str(out), '--out', str(tmp_path / 'runs')]) == 0
  workdir = tmp_path / 'runs' / 'smoke-s3'
  step, back, meta = checkpoint.load(workdir / 'checkpoints', runs.abstract(run))
  assert step == 5 and 'float16' in meta['restored']
  assert record.read_metrics(workdir) == [{'step': 5, 'loss': 1.5}]
  assert json.loads((workdir / 'config.json').read_text()) == json.loads((place / 'config.json').read_text())
  for part in ('encoder', 'heads_equimod'):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2**-11, atol=1e-7), back.params[part], moved[0][part])
    jax.tree.map(np.testing.assert_array_equal, back.stats[part], moved[1][part])
  jax.tree.map(np.testing.assert_array_equal, back.params['projector'], state.params['projector'])
  again = lambda name: (restore.main([str(out), '--out', str(tmp_path / name)]), capsys.readouterr().err)
  code, said = again('runs')
  assert code == 2 and 'is there already' in said
  (out / found['files'][0]).unlink()
  code, said = again('new')
  assert code == 7 and 'in none of the folders' in said


# -- parts that end in every way

STAND_IN = '''
import json, os, pathlib, signal, sys, time
name, found = sys.argv[1], pathlib.Path(sys.argv[sys.argv.index('--found') + 1])
given = json.loads(sys.argv[sys.argv.index('--given') + 1])
fast = 'graph' in os.environ['XLA_FLAGS']
found.write_text(json.dumps({
    'step': 3, 'flags': os.environ['XLA_FLAGS'], 'given': given, 'platform': 'gpu', 'passed': True, 'loss_error': 0.,
    'gradient_error': 0., 'epoch_s': .01 if 'equimod' in given.get('config', '') else .02, 'start_s': .5, 'loss': 5.,
    'images_per_s': [200. if fast else 100.] * 3, 'ms_per_step': 1., 'compile_s': 1.}))
if name == 'train':
  run = pathlib.Path(os.environ['LEASE_STORE']) / 'runs' / f'{given["arm"][0]}-s{given["seed"]}' / 'checkpoints' / '3'
  run.mkdir(parents=True, exist_ok=True)
if name in os.environ.get('STOP', '').split(): sys.exit(75)
if name == 'bring':
  (pathlib.Path(os.environ['LEASE_STORE']) / 'brought').mkdir(exist_ok=True)
  (pathlib.Path(os.environ['LEASE_STORE']) / 'brought' / f'{given["label"]}-s{given["seed"]}.encoder.0').write_bytes(b'x')
if name == 'bad': raise MemoryError('out of memory')
if name == 'deaf': signal.signal(signal.SIGTERM, signal.SIG_IGN)
if name in ('hang', 'deaf'): time.sleep(60)
if name == 'shot': os.kill(os.getpid(), 9)
if name == 'stopped': sys.exit(75)
'''


def a_lease(tmp_path, monkeypatch, **changed):
  (tmp_path / 'parts.py').write_text(STAND_IN)
  monkeypatch.setattr(lease, 'PARTS', tmp_path / 'parts.py')
  args = {'call': 'call1', 'minutes': 1., 'size': 'test', 'store': tmp_path / 'store', 'again': False, 'only': None,
          'seed': 0, 'epochs': 0, 'arms': list(sizes.FOUNDING)}
  return lease.Lease(argparse.Namespace(**{**args, **changed}), tmp_path / 'out')


def states(tmp_path):
  return {k: p['state'] for k, p in json.loads((tmp_path / 'out' / 'results.json').read_text())['parts'].items()}


def test_a_part_that_ends_badly_takes_nothing_with_it(tmp_path, monkeypatch):
  one = a_lease(tmp_path, monkeypatch)
  one.results['flags'] = '--of_all'
  for name in ('good', 'bad', 'hang', 'shot', 'stopped'):
    assert one.part(f'{name} part', name, {}, 1, .6 if name == 'hang' else 20)['step'] == 3, 'what it found is kept'
  assert states(tmp_path) == {'good part': 'done', 'bad part': 'failed', 'hang part': 'cut', 'shot part': 'cut',
                              'stopped part': 'cut'}
  assert 'MemoryError: out of memory' in one.results['parts']['bad part']['why']
  assert one.found('good part')['flags'].endswith('--of_all') and not one.found('bad part')
  assert one.part('late part', 'good', {}, 61, 70) == {} and states(tmp_path)['late part'] == 'not begun'
  assert one.left() > 50, 'none waited for the one that hangs'


def test_a_lease_keeps_its_minutes_whatever_its_parts_do(tmp_path, monkeypatch):
  one = a_lease(tmp_path, monkeypatch, minutes=.08)
  for key in ('a', 'b', 'c'):
    one.start(key, 'deaf', {}, 0, 100)
  for key in ('a', 'b', 'c'):
    one.finish(key)
  assert set(states(tmp_path).values()) == {'cut'}
  assert one.seconds - one.left() <= 1.05 * one.seconds


def test_the_next_call_goes_on_from_where_one_was_killed(tmp_path, monkeypatch):
  one = a_lease(tmp_path, monkeypatch)
  one.part('first', 'good', {}, 1, 20)
  began = one.results['parts']['first']['seconds']
  one.start('second', 'hang', {}, 1, 50)
  process = one.running['second'][0]
  while not (found := tmp_path / 'store' / 'found' / 'second.json').exists() or not found.read_text():
    time.sleep(.02)
  process.kill()  # and its lease is never heard of again
  process.wait()
  two = a_lease(tmp_path, monkeypatch, call='call2')
  assert states(tmp_path) == {'first': 'done', 'second': 'cut'} and two.known('second')['step'] == 3
  two.part('first', 'bad', {}, 1, 20)
  assert two.results['parts']['first']['seconds'] == began, 'what is done is not done again'
  two.part('second', 'good', {}, 1, 20)
  assert states(tmp_path)['second'] == 'done' and [c['call'] for c in two.results['calls']] == ['call1', 'call2']


def whole_data(tmp_path):
  (tmp_path / 'store' / 'data').mkdir(parents=True)
  for name in sum(carried.HALVES.values(), ()):
    (tmp_path / 'store' / 'data' / name).touch()


def trainings(results):
  """{key: (epochs, flags)} of every training."""
  found = {k: p['found'] for k, p in results['parts'].items() if k.startswith('train ')}
  return {k: (f['given']['epochs'], f['flags']) for k, f in found.items()}


def test_the_calls_hand_on_what_they_measured(tmp_path, monkeypatch):
  """Call 1's speeds give call 2's epochs, equal for both arms, its best flag is theirs, and call 3 is the next seed's."""
  monkeypatch.delenv('XLA_FLAGS', raising=False)
  whole_data(tmp_path)
  one = a_lease(tmp_path, monkeypatch, minutes=2.)
  assert calls.measure(one) == 0
  assert one.results['best_flags'] == {'name': 'all into command buffers', 'tried': len(sizes.FLAGS)}
  assert set(states(tmp_path).values()) == {'done'}
  two = a_lease(tmp_path, monkeypatch, call='call2', minutes=2.)
  assert calls.experiment(two) == 0
  plan = two.plans()['0']
  assert plan['epoch_s'] == (.02, .01) and plan['enough'] and plan['epochs'] == sizes.MOST
  assert trainings(two.results) == {f'train {arm} s0': (sizes.MOST, sizes.FLAGS['all into command buffers'])
                                    for arm in sizes.FOUNDING}
  assert {f'{what} {arm} s0' for what in ('bring', 'probe', 'linear') for arm in sizes.FOUNDING} <= states(tmp_path).keys()
  assert len(list((tmp_path / 'out').glob('*.encoder.0'))) == 2
  three = a_lease(tmp_path, monkeypatch, call='call3', minutes=2.)
  assert calls.experiment(three) == 0 and len(trainings(three.results)) == 4
  short = a_lease(tmp_path, monkeypatch, call='call3', minutes=1.)
  assert calls.experiment(short) == 0 and len(trainings(short.results)) == 4, 'a third seed would have fewer epochs'


def test_a_training_that_was_cut_goes_on_with_its_epochs(tmp_path, monkeypatch):
  whole_data(tmp_path)
  monkeypatch.setenv('STOP', 'train')
  one = a_lease(tmp_path, monkeypatch, call='call2', minutes=1.6)
  assert calls.experiment(one) == 4
  epochs = one.plans()['0']['epochs']
  assert states(tmp_path)[f'bring {sizes.FOUNDING[1]} s0'] == 'of a cut training'
  monkeypatch.setenv('STOP', 'bring')
  one = a_lease(tmp_path, monkeypatch, call='call2', minutes=2.)
  assert calls.experiment(one) == 4, 'trained, and not brought back'
  monkeypatch.delenv('STOP')
  two = a_lease(tmp_path, monkeypatch, call='call3', minutes=3.)
  assert calls.experiment(two) == 0
  assert {e for e, _ in trainings(two.results).values()} == {epochs} and len(trainings(two.results)) == 2
  assert states(tmp_path)[f'bring {sizes.FOUNDING[1]} s0'] == 'done'


def test_the_newest_encoders_come_back_first_and_no_more_than_may(tmp_path, monkeypatch):
  one = a_lease(tmp_path, monkeypatch)
  (tmp_path / 'store' / 'brought').mkdir()
  for i in range(9):
    file = tmp_path / 'store' / 'brought' / f'a-s{i}.encoder.0'
    file.write_bytes(b'x')
    os.utime(file, (i, i))
  one.deliver()
  one.say('a line')
  assert sorted(f.name[:4] for f in (tmp_path / 'out').glob('a-*')) == [f'a-s{i}' for i in range(3, 9)]
  assert not rehearse.returned(tmp_path / 'out')


# -- all of it, on this machine in the place of the other

UNPACK = '''
import hashlib
import numpy as np
def part(name):
  rng = np.random.default_rng(len(name) + ord(name[-1]))
  labels = np.arange(20, dtype=np.uint8) % 10
  return (rng.integers(0, 200, (20, 32, 32, 3)) + 5 * labels[:, None, None, None]).astype(np.uint8), labels
def binary(images, labels):
  return np.concatenate([labels[:, None], images.transpose(0, 3, 1, 2).reshape(20, -1)], 1).tobytes()
SHA256 = {f'data_batch_{i}.bin': hashlib.sha256(binary(*part(f'train{i}'))).hexdigest() for i in range(1, 6)}
SHA256['test_batch.bin'] = hashlib.sha256(binary(*part('test'))).hexdigest()
'''


def loads(folder):
  """What the calls carry, with images of noise in the place of CIFAR-10's, and no wheels."""
  for call in carried.HALVES:
    fake_load(folder / call, call)
    (folder / call / 'unpack.py').write_text(UNPACK)
    listed = {f.name: carried.digest(f) for f in (folder / call).iterdir() if f.is_file() and f.name != carried.LIST}
    (folder / call / carried.LIST).write_text(json.dumps(listed))


@pytest.mark.slow
def test_the_lease_in_miniature(tmp_path, monkeypatch, capfd):
  """Call 1, killed and typed again; call 2; what came back as runs that can be evaluated; each call within its minutes."""
  monkeypatch.setenv('EQSSL_CACHE', str(jax.config.jax_compilation_cache_dir))
  monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
  monkeypatch.setenv('XLA_FLAGS', '--xla_backend_optimization_level=0')
  loads(tmp_path / 'loads')

  def call(name, minutes, *more, kill=0.):
    argv = [name, '--minutes', str(minutes), '--size', 'test', '--load', str(tmp_path / 'loads' / name), *more]
    began = time.monotonic()
    code = rehearse.run(tmp_path / 'machine', ROOT, sys.executable, argv, '', kill)
    assert time.monotonic() - began < 60 * minutes * 1.05 + 1
    return code, json.loads((tmp_path / 'machine' / 'store' / 'results.json').read_text())

  code, killed = call('call1', 2., kill=25)
  assert code == -9 and killed['parts']['device']['state'] == 'done'
  code, found = call('call1', 2.)
  assert code == 0, capfd.readouterr().out
  assert found['parts']['device'] == killed['parts']['device'], 'not done again'
  assert found['parts'][f'speed {sizes.FOUNDING[1]}']['found']['images_per_s']
  for _ in range(4):  # of a busy machine the first may be cut: the same again goes on
    code, found = call('call2', 4., '--epochs', '20')
    if code == 0:
      break
  assert code == 0, capfd.readouterr().out
  plan = found['plans'][' '.join(sizes.FOUNDING)]['0']
  for arm in sizes.FOUNDING:
    trained = found['parts'][f'train {arm} s0']['found']
    assert trained['epochs'] == plan['epochs'] and trained['step'] == plan['epochs'] * 6
    assert trained['metrics'][-1]['lr'] < 1e-3 * max(row['lr'] for row in trained['metrics']), 'a whole cosine'
    assert found['parts'][f'probe {arm} s0']['found']['knn']['trained'][0]['numbers']['top1'] >= 0
  outs = sorted((tmp_path / 'machine').glob('out-*'))
  assert restore.main([*map(str, outs), '--out', str(tmp_path / 'runs')]) == 2, 'CIFAR-10 is not prepared here'
  monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path / 'machine' / 'store' / 'tfds'))
  assert restore.main([*map(str, outs), '--out', str(tmp_path / 'runs')]) == 0
  evaluated = evaluation.evaluate(tmp_path / 'runs' / f'{sizes.FOUNDING[1]}-s0', ['knn', 'retrieval'])
  there = found['parts'][f'probe {sizes.FOUNDING[1]} s0']['found']['knn']['trained'][0]['numbers']['top1']
  assert abs(evaluated['knn']['trained'][0]['numbers']['top1'] - there) <= .1, 'float16 moved two images of twenty at most'

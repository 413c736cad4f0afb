"""The lease of a GPU: its arithmetic, its calls, parts that end badly, a rehearsal in miniature."""
import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import time

import jax
import pytest
from leases import GPU, ROOT, budget, calls, carried, fake_load, lease, rehearse, restore, sizes

from equivariant_ssl.config import load_config
from equivariant_ssl.evaluate import evaluation

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
  load_config(arm.config, sizes.overrides(sizes.SIZES['rehearsal'], arm.config, arm.changed))


def test_every_size_fits_every_config_of_the_calls():
  for size in sizes.SIZES.values():
    for name in sizes.SPEEDS:
      assert load_config(name, sizes.overrides(size, name)).batch <= 5 * size.records


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
    load_config(arm.config, arm.changed)


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
  assert one.result_of('good part')['flags'].endswith('--of_all') and not one.result_of('bad part')
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

"""The command line: what a run leaves, exact resumption, and one clear line for every mistake (bars 6 and 11)."""
import functools
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import tiny
from PIL import Image

import equivariant_ssl
from equivariant_ssl import cli
from equivariant_ssl.config import config_to_json, load_config, read_config
from equivariant_ssl.data import card
from equivariant_ssl.errors import UserError
from equivariant_ssl.parallel import sharding
from equivariant_ssl.storage import checkpoint, record
from equivariant_ssl.training import loop, step_log
from equivariant_ssl.training.step_clock import StepClock

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _here(monkeypatch):
  """Commands run from the clone; the suite's own cache of compiled programs stays as conftest set it."""
  monkeypatch.chdir(ROOT)
  monkeypatch.setattr(cli, '_cache', lambda: None)


def eqssl(*argv, capsys=None):
  """(exit code, stdout, stderr) of a command, in this process."""
  code = cli.main([str(a) for a in argv])
  captured = capsys.readouterr() if capsys else None
  return code, *(captured or ('', ''))


def command(*argv, devices=1):
  """The same in a process of its own."""
  env = {**os.environ, 'JAX_NUM_CPU_DEVICES': str(devices), 'JAX_PLATFORMS': 'cpu',
         'EQSSL_CACHE': str(jax.config.jax_compilation_cache_dir)}
  return subprocess.Popen([sys.executable, '-m', 'equivariant_ssl.cli', *map(str, argv)], cwd=ROOT, env=env,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def weights(workdir, devices=1):
  """Every leaf of a run's newest checkpoint."""
  run = loop.prepare_run(read_config(pathlib.Path(workdir) / 'config.json'), sharding.mesh(jax.devices()[:devices]))
  return [np.asarray(x) for x in jax.tree.leaves(checkpoint.load_checkpoint(workdir / 'checkpoints', loop.abstract_state(run))[1])]


def rows(workdir):
  return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


@pytest.fixture(scope='module')
def on(tmp_path_factory):
  """Eight steps at once, on so many devices."""
  @functools.cache
  def of(devices):
    workdir = tmp_path_factory.mktemp(f'straight{devices}')
    loop.train(load_config(tiny.NAME), workdir, 'straight', mesh=sharding.mesh(jax.devices()[:devices]), quiet=True)
    return workdir
  return of


@pytest.fixture
def straight(on):
  return on(1)


def test_what_a_run_leaves(straight):
  workdir = straight
  assert [r['step'] for r in rows(workdir)] == list(range(1, 9))
  assert all(np.isfinite(r['loss']) and {'invariance', 'equimod', 'std', 'lr'} <= r.keys() for r in rows(workdir))
  assert (workdir / 'command.txt').read_text().strip() == 'straight'
  assert json.loads((workdir / 'config.json').read_text())['batch'] == 16
  assert 'jax' in json.dumps(json.loads((workdir / 'env.json').read_text()))
  assert (workdir / 'checkpoints').is_dir()


class Killed(BaseException):
  """Nothing in the program catches this, as nothing catches a kill."""


@pytest.mark.parametrize('devices', [1, pytest.param(4, marks=pytest.mark.slow)])
def test_killed_and_resumed_equals_straight(on, tmp_path, devices):
  """Three steps, an end without warning, and on to eight: bitwise the weights and the losses of eight at once."""
  config = load_config(tiny.NAME, {'checkpoint_every': '1'})
  mesh = sharding.mesh(jax.devices()[:devices])

  def kill(run, state, n):
    if n == 3:
      raise Killed

  with pytest.raises(Killed):
    loop.train(config, tmp_path, hooks=(kill,), mesh=mesh, quiet=True)
  loop.train(config, tmp_path, mesh=mesh, quiet=True)
  for a, b in zip(weights(on(devices), devices), weights(tmp_path, devices), strict=True):
    np.testing.assert_array_equal(a, b)
  assert [r['loss'] for r in rows(tmp_path)] == [r['loss'] for r in rows(on(devices))]


@pytest.mark.parametrize('sent', [pytest.param(signal.SIGKILL, marks=pytest.mark.slow), signal.SIGTERM])
def test_signals_in_a_process_of_its_own(tmp_path, sent):
  """kill -9 loses at most the steps since the last checkpoint; TERM loses none, and ends with 75 and what to type."""
  args = ('train', '--config', tiny.NAME, '--workdir', tmp_path, '--config.steps=3000', '--config.checkpoint_every=5')
  process = command(*args)
  while not (tmp_path / 'metrics.jsonl').exists() or len((tmp_path / 'metrics.jsonl').read_text().splitlines()) < 12:
    assert process.poll() is None, process.stderr.read()
    time.sleep(.02)
  process.send_signal(sent)
  _, err = process.communicate(timeout=60)
  done = rows(tmp_path)[-1]['step']
  saved = max(int(p.name) for p in (tmp_path / 'checkpoints').iterdir() if p.name.isdigit())
  if sent == signal.SIGTERM:
    assert process.returncode == 75 and f'eqssl resume {tmp_path}' in err and saved == done
  else:
    assert process.returncode == -9 and done - saved <= 10
  config = read_config(tmp_path / 'config.json')
  stop = saved + 4

  def end(run, state, n):
    if n == stop:
      raise Killed
  with pytest.raises(Killed):
    loop.train(config, tmp_path, hooks=(end,), mesh=sharding.mesh(jax.devices()[:1]), quiet=True)
  steps = [r['step'] for r in rows(tmp_path)]
  assert steps == list(range(1, steps[-1] + 1)), 'a row is missing or doubled after resuming'


MISTAKES = [  # argv after 'train', part of the cause, part of the fix
  (('--config', 'smoke', '--config.augment.crop.scal=1'), "has no 'scal'", "'scale'"),
  (('--config', 'smoke', '--config.batch=many'), "config.batch is 'many'", '--config.batch'),
  (('--config', 'smoke', '--config.batch'), 'needs a value', '--config.batch=VALUE'),
  (('--config', 'smook'), 'not found', 'smoke'),
  (('--config', 'smoke', '--confg.batch=1'), 'unknown argument', '--help'),
  (('--config', 'smoke', '--config.batch=12'), 'does not divide over 8 devices', '--config.batch='),
  (('--config', 'smoke', '--config.batch=2048'), 'larger than the 1000 training images', '--config.batch='),
  (('--config', 'smoke', '--config.data.name=cifar10', '--config.data.root=/nowhere'), 'cifar10', 'eqssl data prepare'),
  (('--config', 'smoke', '--config.data.name=folder', '--config.data.path=/nowhere'), '/nowhere', ''),
  (('--config', 'smoke', '--config.augment.crop.scale=.5'), 'crop.scale is (0.5,), but it takes 2', '(0.08, 1.0)'),
  (('--config', 'smoke', '--config.augment.crop.role=off', '--config.augment.rotate.role=invariant'),
   'has no augmentations', 'both'),
  (('--config', 'smoke', '--config.equivariance=none', '--config.augment.rotate.role=sensitive'),
   'rotate has the role sensitive, and no objective reads it: the equivariance is none', 'equivariance=equimod'),
  (('--config', 'smoke', '--config.equivariance.augmentations=crop', '--config.augment.rotate.role=sensitive'),
   'their `augmentations` do not name it', 'rotate.role=invariant'),
  (('--config', 'cifar10_simclr_essl', '--config.augment.jitter.role=sensitive'),
   'they predict discrete augmentations alone', 'jitter.role=invariant'),
  (('--config', 'smoke', '--config.augment.blur.p=.5'), 'blur is not among the augmentations', 'blur.role=invariant'),
]


@pytest.mark.parametrize('argv,cause,fix', MISTAKES, ids=[m[1][:24] for m in MISTAKES])
def test_one_line_and_exit_code_2(argv, cause, fix, tmp_path, capsys):
  code, _, err = eqssl('train', '--workdir', tmp_path / 'run', *argv, capsys=capsys)
  assert code == 2 and cause in err and fix in err
  assert 'Traceback' not in err and len(err.strip().splitlines()) <= 2
  assert not (tmp_path / 'run').exists(), 'a refused run leaves nothing behind'


@pytest.mark.parametrize('argv,said', [
    (('trian',), "invalid choice: 'trian'"), ((), 'COMMAND'), (('train',), '--config'),
    (('eval', 'x', '--step', 'k'), "'k'"), (('--quiet', 'help'), '--quiet')])
def test_what_is_no_command_is_one_line_too(argv, said, capsys):
  code, _, err = eqssl(*argv, capsys=capsys)
  assert code == 2 and err.startswith('eqssl: ') and said in err and err.endswith(' --help.\n')


NEAR = [
  ('train --config smoke --workdir x --epochs 5', '--config.epochs=5'),
  ('train --config smoke --workdir x --lr=.1', '--config.optimizer.lr=.1'),
  ('train --config smoke --workdir x --batch-size 3', '--config.batch=3'),
  ('train --config smoke --workdir x --config.lr=.1', '--config.optimizer.lr=VALUE'),
  ('train --config smoke --workdir x --config.encoder=resnet50', '--config.encoder.name=resnet --config.encoder.depth=50'),
  ('train --config smoke --workdir x --config.encoder.name=vit_s', '--config.encoder.name=vit --config.encoder.variant=small'),
  ('train --config smoke --wokdir x', '--workdir=x'), ('eval x --epoch 3', '--epochs=3'),
  ('data prepare cifar11', 'Did you mean cifar10?'), ('trian', "Did you mean 'train'?"),
  ('resume setup.cfg', 'it is a file'), ('train --config smoke --workdir setup.cfg', 'is a file, not a folder'),
  ('study --config smoke --augs crop --out setup.cfg', '--out setup.cfg is a file'),
  ('train --config smoke --plan --config.equivariance=none --config.augment.rotate.role=sensitive', 'rotate.role=invariant'),
]


@pytest.mark.parametrize('line,meant', NEAR, ids=[n[0] for n in NEAR])
def test_a_near_miss_is_answered_with_what_was_meant(line, meant, capsys):
  code, _, err = eqssl(*line.split(), capsys=capsys)
  assert code == 2 and meant in err and len(err.strip().splitlines()) == 2


def test_version_and_help(capsys):
  for argv, said in ((('--version',), f'eqssl {equivariant_ssl.__version__}'), (('help', 'train'), 'usage: eqssl train'),
                     (('help', 'data', 'check'), 'usage: eqssl data check'), (('help',), 'usage: eqssl [-h]')):
    with pytest.raises(SystemExit) as end:
      cli.main(list(argv))
    assert end.value.code in (0, None) and capsys.readouterr().out.startswith(said)


@pytest.mark.parametrize('words,completed', [
  ('eqssl ', {'train', 'neighbors', 'help'}), ('eqssl train --config photo', {'photos'})])
def test_a_shell_completes_commands_and_configs(words, completed, tmp_path):
  env = {**os.environ, '_ARGCOMPLETE': '1', 'COMP_LINE': words, 'COMP_POINT': str(len(words)), '_ARGCOMPLETE_IFS': '\n',
         '_ARGCOMPLETE_STDOUT_FILENAME': str(tmp_path / 'out'), '_ARGCOMPLETE_SUPPRESS_SPACE': '1'}
  subprocess.run([sys.executable, '-m', 'equivariant_ssl'], cwd=ROOT, env=env, timeout=60, capture_output=True)
  said = {word.strip() for word in (tmp_path / 'out').read_text().split('\n')}
  assert completed <= said and (len(completed) > 1 or said == completed)


def test_debug_shows_the_traceback_too(capsys):
  code, _, err = eqssl('train', '--config', 'smook', '--debug', capsys=capsys)
  assert code == 2 and err.startswith('Traceback') and "eqssl: config file 'smook' not found" in err


def test_an_empty_folder_and_a_broken_image(tmp_path, capsys):
  from PIL import Image
  (tmp_path / 'none').mkdir()
  (tmp_path / 'none' / 'notes.txt').write_text('no image')
  folder = lambda path: ('--config', tiny.NAME, '--config.data.name=folder', f'--config.data.path={path}',
                         '--config.data.size=16', '--config.steps=1')
  code, _, err = eqssl('train', '--workdir', tmp_path / 'a', *folder(tmp_path / 'none'), capsys=capsys)
  assert code == 2 and 'txt' in err
  rng = np.random.default_rng(0)
  (tmp_path / 'some').mkdir()
  for i in range(220):
    Image.fromarray(rng.integers(0, 256, (20, 24, 3), np.uint8)).save(tmp_path / 'some' / f'{i:02d}.png')
  (tmp_path / 'some' / '07.png').write_bytes(b'not a png')
  whole = (tmp_path / 'some' / '08.png').read_bytes()
  (tmp_path / 'some' / '08.png').write_bytes(whole[:len(whole) // 2])  # indexed by its header, unreadable later
  code, _, err = eqssl('train', '--workdir', tmp_path / 'b', *folder(tmp_path / 'some'), capsys=capsys)
  assert code == 0 and '07.png' in err and '08.png' in err
  code, _, err = eqssl('eval', tmp_path / 'b', '--protocol', 'knn', capsys=capsys)
  assert code == 2 and 'no labels' in err


def test_a_batch_larger_than_the_photographs_is_made_smaller(tmp_path, capsys):
  """Config `photos` takes any folder, and says so in a line; the same command goes on with the run."""
  photos, run, said = tmp_path / 'photos', tmp_path / 'run', []
  photos.mkdir()
  for i in range(12):
    Image.fromarray(np.random.default_rng(i).integers(0, 256, (20, 30, 3), 'uint8')).save(photos / f'{i}.png')
  assert eqssl('data', 'check', photos, capsys=capsys)[1].splitlines()[-1].startswith(
    f'Next: eqssl train --config photos --config.data.path={photos} ')
  config = load_config('photos', {'data.path': str(photos), 'encoder.name': 'mlp'})
  prepared = loop.prepare_run(config, sharding.mesh(jax.devices()[:1]), said.append)
  images = len(prepared.source.train.images)
  assert prepared.config.batch == prepared.recipe.batch == 8 <= images < 16 and config.batch == 64
  assert f'the batch is 8, not 64: there are {images} training images' in said
  record.start_record(run, config_to_json(prepared.config), '')
  loop._find_start(config, run, None, said.append)  # a run that was killed before it wrote what it knows of its data
  card.write_card(run, prepared.card)
  loop._find_start(config, run, None, said.append)  # 64 is not another config
  with pytest.raises(UserError, match='another config: batch: 8 -> 4') as error:
    loop._find_start(load_config('photos', {'data.path': str(photos), 'encoder.name': 'mlp', 'batch': '4'}), run, None, print)
  assert error.value.code == 5


def test_a_folder_that_cannot_be_written(tmp_path, capsys):
  (tmp_path / 'file').write_text('')
  code, _, err = eqssl('train', '--config', tiny.NAME, '--workdir', tmp_path / 'file' / 'run', capsys=capsys)
  assert code == 2 and 'file' in err and 'Traceback' not in err


def test_a_workdir_of_another_config(straight, tmp_path, capsys):
  import shutil
  shutil.copytree(straight, tmp_path / 'run')
  code, _, err = eqssl('train', '--config', tiny.NAME, '--workdir', tmp_path / 'run', '--config.optimizer.lr=.01',
                       capsys=capsys)
  assert code == 5 and 'optimizer.lr' in err and '0.05' in err and '0.01' in err
  assert len(rows(tmp_path / 'run')) == 8


def test_a_run_that_explodes_keeps_nothing_of_it(tmp_path, capsys):
  """Weights of 1e29 are finite, and so is their loss: neither a good checkpoint nor a run to go on with."""
  code, _, err = eqssl('train', '--config', tiny.NAME, '--workdir', tmp_path, '--config.optimizer.lr=1e30',
                       '--config.checkpoint_every=1', capsys=capsys)
  assert code == 6 and 'exploded (params/' in err and 'Last good checkpoint: none' in err and 'Traceback' not in err
  assert checkpoint.saved_steps(tmp_path / 'checkpoints') == []


def test_a_loss_that_is_not_finite():
  run = loop.prepare_run(load_config(tiny.NAME), sharding.mesh(jax.devices()[:1]))
  window = step_log.start_window(10)
  window.pending.append((3, {'loss': np.float32(np.nan)}))
  outputs = step_log.LogOutputs(None, None, None, lambda: 2)
  with pytest.raises(UserError, match='step 3: loss not finite. Last good checkpoint: step 2') as error:
    step_log.flush_log(run, window, outputs, StepClock(), {})
  assert error.value.code == 6


@pytest.mark.parametrize('what', ['warn', 'stop'])
def test_a_collapse_is_said_once_or_stops(what):
  config = load_config(tiny.NAME, {'on_collapse': what})
  run = loop.prepare_run(config, sharding.mesh(jax.devices()[:1]))
  window, said = step_log.start_window(10), []
  outputs = step_log.LogOutputs(lambda *a: None, lambda *a: None, said.append, lambda: None)
  metrics = {k: np.float32(1.) for k in ('loss', 'invariance', 'equimod')}

  def flush(n, std):
    nonlocal window
    window.pending.append((n, {**metrics, 'std': np.float32(std)}))
    window = step_log.flush_log(run, window, outputs, StepClock(), {})
  flush(20, .9)
  assert not said
  if what == 'stop':
    with pytest.raises(UserError, match='collapsing'):
      flush(30, .1)
  else:
    flush(30, .1)
    flush(40, .1)
    assert len(said) == 1 and 'collapsing' in said[0] and '0.10' in said[0]


def test_a_torn_last_checkpoint_falls_back(straight, tmp_path, capsys):
  import shutil
  shutil.copytree(straight, tmp_path / 'run')
  steps = sorted(int(p.name) for p in (tmp_path / 'run' / 'checkpoints').iterdir() if p.name.isdigit())
  newest = tmp_path / 'run' / 'checkpoints' / str(steps[-1])
  for file in (newest / 'state' / 'd').iterdir():
    file.write_bytes(file.read_bytes()[:file.stat().st_size // 2])
  code, _, err = eqssl('resume', tmp_path / 'run', capsys=capsys)
  assert code == 0 and f'{steps[-1]}' in err and f'resuming at step {steps[-2]}' in err
  assert [r['step'] for r in rows(tmp_path / 'run')] == list(range(1, 9))


def test_eval_prints_trained_untrained_and_chance(straight, capsys, tmp_path):
  import shutil
  shutil.copytree(straight, tmp_path / 'run')
  code, out, err = eqssl('eval', tmp_path / 'run', '--protocol', 'knn,cached', capsys=capsys)
  assert code == 0, err
  of = {p.stem: json.loads(p.read_text()) for p in (tmp_path / 'run' / 'eval').glob('*.json')}
  assert set(of) == {'knn', 'cached'}
  trained, untrained = of['knn']['trained'][0], of['knn']['untrained'][0]
  assert trained['name'] == 'knn k=200 T=0.1' and 0 < trained['controls']['top1']['chance'] < .2
  assert trained['numbers'] != untrained['numbers']
  assert 'untrained' in out and 'chance' in out and 'Written to' in out


def test_doctor_and_print_config(capsys):
  code, out, _ = eqssl('doctor', capsys=capsys)
  assert code == 0 and 'jax' in out and 'TensorFlow' in out
  code, out, _ = eqssl('train', '--config', 'smoke', '--workdir', 'unused', '--print-config', capsys=capsys)
  assert code == 0 and json.loads(out)['encoder']['name'] == 'resnet'

"""Whatever the locale, the home or the folder's name: files are UTF-8, nothing needs a home, and hints can be typed."""
import json
import os
import pathlib
import pwd
import shlex
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny
from PIL import Image

from equivariant_ssl import cli
from equivariant_ssl.config import config_to_json, load_config, read_config
from equivariant_ssl.data import tfds
from equivariant_ssl.evaluate import target_data, targets, transfer
from equivariant_ssl.storage import record
from equivariant_ssl.training import loop

ASCII = {'LC_ALL': 'C', 'PYTHONUTF8': '0', 'PYTHONCOERCECLOCALE': '0', 'PYTHONIOENCODING': 'ascii'}
ODD = "it's a run; or: été"  # of a folder
CACHE = cli._cache


@pytest.fixture
def here(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(cli, '_cache', lambda: None)
  return tmp_path


def images(folder):
  rng = np.random.default_rng(0)
  for kind in ('café', 'thé'):
    (folder / kind).mkdir(parents=True)
    for i in range(20):
      Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(folder / kind / f'é{i}.png')
  return folder


def ascii_only(*argv):
  """What a command prints, of bytes, in a process of its own in such a locale."""
  env = {k: v for k, v in os.environ.items() if not k.startswith(('LC_', 'LANG', 'PYTHONUTF8'))}
  env |= ASCII | {'EQSSL_CACHE': str(jax.config.jax_compilation_cache_dir), 'JAX_PLATFORMS': 'cpu',
                  'JAX_NUM_CPU_DEVICES': '1'}
  done = subprocess.run([sys.executable, '-m', 'equivariant_ssl.cli', *map(str, argv)], env=env, capture_output=True)
  assert done.returncode == 0, done.stderr.decode()
  return done.stdout.decode('ascii')  # PYTHONIOENCODING asks for it


def test_data_prepared_in_an_ascii_locale_are_those_of_any_other(tmp_path):
  """Names of folders and classes come out as what they are, and nothing stops on them."""
  out = ascii_only('data', 'prepare', 'bilder', '--src', images(tmp_path / 'bilder ü'), '--root', tmp_path / ODD)
  assert shlex.split(out.splitlines()[-1])[:3] == ['Next:', 'eqssl', 'train']
  made = tfds.read_tfds('bilder', str(tmp_path / ODD), 'train[:80%]', 'train[80%:]', 8)
  assert list(made.classes) == ['café', 'thé']
  assert 'café' in next((tmp_path / ODD).rglob('*labels.txt')).read_text(encoding='utf-8')


@pytest.mark.slow
def test_a_run_in_an_ascii_locale_is_that_of_any_other(tmp_path):
  out = ascii_only('train', '--config', tiny.NAME, '--workdir', tmp_path / ODD, '--config.data.name=folder',
                   '--config.data.size=16', f'--config.data.path={images(tmp_path / "bilder ü")}', '--config.steps=1')
  workdir = tmp_path / ODD
  assert f'data.path={tmp_path}/bilder ü' in (workdir / 'command.txt').read_text(encoding='utf-8')
  assert read_config(workdir / 'config.json').data.path == str(tmp_path / 'bilder ü')
  assert json.loads((workdir / 'data.json').read_text(encoding='utf-8'))['classes'] == ['café', 'thé']
  assert out.startswith('Next: eqssl eval ')


def test_what_is_no_utf_8_is_written_as_it_is(tmp_path):
  """A folder's name can be of other bytes, which Python holds as surrogates."""
  record.start_record(tmp_path, {'seed': 0}, f'eqssl train --workdir {os.fsdecode(b"x/caf")}{os.fsdecode(bytes([0xe9]))}')
  record.start_record(tmp_path, {'seed': 0}, 'eqssl resume é')
  assert (tmp_path / 'command.txt').read_bytes() == b'eqssl train --workdir x/caf\xe9\neqssl resume \xc3\xa9\n'


@pytest.fixture
def homeless(here, monkeypatch):
  """A user without a home: HOME is not set, and no entry says another; in an empty folder, which stays empty."""
  def nobody(uid):
    raise KeyError(uid)
  for name in ('HOME', 'XDG_CACHE_HOME', 'EQSSL_CACHE', 'TFDS_DATA_DIR'):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setattr(pwd, 'getpwuid', nobody)
  monkeypatch.setattr(cli, '_cache', CACHE)  # the real one
  with pytest.raises(RuntimeError):
    pathlib.Path.home()
  yield here
  assert not (here / '~').exists()


@pytest.mark.parametrize(('argv', 'code', 'said'), [
    (('doctor',), 0, '~/tensorflow_datasets'),
    (('train', '--config', tiny.NAME, '--print-config'), 0, '"seed"'),
    (('train', '--config', tiny.NAME, '--workdir', 'run'), 0, 'Next: eqssl eval run'),
    (('data', 'check', 'digits'), 0, ''),
    (('train', '--config', 'cifar10_quick', '--workdir', 'run'), 2, 'is not prepared under ~/tensorflow_datasets'),
    (('data', 'prepare', 'cifar10'), 2, 'HOME is not set'),
    (('data', 'check', '~/pictures'), 2, ''),
    (('train', '--config', 'smoke', '--workdir', 'run', '--config.data.name=folder', '--config.data.path=~/x'), 2, '~'),
    (('embed', 'nowhere', '~/x', '--out', 'x.csv'), 2, "'~/x' is no file")])
def test_no_home_is_needed(argv, code, said, homeless, monkeypatch, capsys):
  monkeypatch.setattr(loop, 'fit', lambda run, state, on_step: state)
  before = jax.config.jax_compilation_cache_dir
  found = cli.main(list(argv))
  captured = capsys.readouterr()
  assert found == code, captured
  assert said in captured.out + captured.err and 'Traceback' not in captured.err
  assert jax.config.jax_compilation_cache_dir == before


def hint(err):
  """What the last line of a message says to type, as a shell reads it."""
  return shlex.split('eqssl ' + err.splitlines()[-1].split('eqssl ', 1)[1])


def test_hints_can_be_typed(here, capsys):
  """A folder whose name has spaces, quotes and a semicolon."""
  workdir = here / ODD
  record.start_record(workdir, config_to_json(load_config(tiny.NAME)), 'eqssl train')

  def said(*argv):
    assert cli.main([str(a) for a in argv]) in (2, 4, 5)
    return hint(capsys.readouterr().err)
  assert said('compare', workdir) == ['eqssl', 'eval', str(workdir)]
  assert said('train', '--config', workdir / 'config.json') == ['eqssl', 'resume', str(workdir)]
  assert said('train', '--config', tiny.NAME, '--workdir', workdir, '--config.seed=3') == ['eqssl', 'resume', str(workdir)]
  assert said('eval', workdir)[-2:] == ['--workdir', str(workdir)]


@pytest.mark.parametrize('name', transfer.DATASETS)
def test_what_prepares_a_target_can_be_typed(name, tmp_path):
  root = tmp_path / "two  spaces it's"
  command = target_data.command_for(transfer.DATASETS[name], root)
  assert shlex.quote(str(root)) in command
  if command.startswith('bash'):  # with a curl and a tar that do nothing
    for tool in ('curl', 'tar'):
      (tmp_path / tool).write_text('#!/bin/sh\n')
      (tmp_path / tool).chmod(0o755)
    subprocess.run(['bash', '-c', command], env={'PATH': f'{tmp_path}:/usr/bin:/bin'}, stderr=subprocess.DEVNULL)
    assert root.is_dir() and targets.BUILD not in command

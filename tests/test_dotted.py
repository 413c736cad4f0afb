"""Modules of other packages, by dotted paths: trained, evaluated, exported; never imported because a folder says so."""
import contextlib
import os
import pathlib
import subprocess
import sys

import numpy as np
import own_package
import pytest
import tiny
from ml_collections import ConfigDict
from own_package import DOTTED, NAME, forget, imported
from PIL import Image

import equivariant_ssl as es
from equivariant_ssl import cli, dotted
from equivariant_ssl.config import load_config, read_config, resolve_config
from equivariant_ssl.errors import UserError
from equivariant_ssl.study import design, runner, study_plan


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  yield from own_package.write(tmp_path_factory.mktemp('theirs'))


@pytest.fixture(autouse=True)
def fresh(folder, monkeypatch):
  """The current folder has the package; nothing of it is imported."""
  monkeypatch.setattr(cli, '_cache', lambda: None)
  monkeypatch.chdir(folder)
  forget()


@pytest.fixture(scope='module')
def run(folder):
  """A run with an op, an objective and a data set by dotted paths, trained by the command line."""
  flags = [f'--config.{k}={v}' for k, v in DOTTED.items()]
  with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
    patch.setattr(cli, '_cache', lambda: None)
    assert cli.main(['train', '--config', tiny.NAME, '--workdir', 'runs/theirs', '--quiet', *flags]) == 0
    forget()
  return folder / 'runs' / 'theirs'


def test_a_config_has_the_modules_and_their_settings():
  config = load_config(tiny.NAME, DOTTED)
  assert config.augment.order == ('crop', 'flip', 'rotate', 'sepia')
  assert config.augment.sepia.to_dict() == {'role': 'both', 'most': .3, 'module': f'{NAME}.sepia'}
  assert config.equivariance.to_dict() == {'name': f'{NAME}.objective', 'width': 8, 'augmentations': ()}
  assert config.data.to_dict() == {'name': f'{NAME}.squares', 'count': 36}
  assert resolve_config(config) == config
  assert f'{NAME}.sepia' in imported() and sys.path == [p for p in sys.path if p != os.getcwd()]


@pytest.mark.parametrize('overrides, message', [
    ({'encoder.name': f'{NAME}.nets'}, 'no function make'),
    ({'encoder.name': f'{NAME}.absent'}, 'cannot be imported: ModuleNotFoundError'),
    ({'encoder.name': 'os.path'}, 'not a module of another package'), ({'encoder.name': f'{NAME}./tmp/x'}, 'not the dotted path'),
    ({'encoder.name': f'{NAME}..nets'}, 'not the dotted path'),
    ({'encoder.name': 'equivariant_ssl.nets.resnet'}, "Write 'resnet'"),
    ({'augment.order': 'crop,flip,rotate,their_pkg.flip'}, 'Name each op once'),
    ({'augment.order': f'crop,flip,rotate,{NAME}.sepia', 'augment.sepia.mst': '1.'}, "Did you mean 'most'"),
    ({'augment.sepia.role': 'both'}, "no 'sepia'"),
])
def test_mistakes_are_a_line(overrides, message):
  with pytest.raises(UserError, match=message) as raised:
    load_config('smoke', overrides)
  assert len(str(raised.value).splitlines()) <= 2


def test_an_op_of_theirs_cannot_take_the_place_of_a_shipped_one(folder):
  (folder / NAME / 'crop.py').write_text(own_package.OP)
  values = load_config('smoke').to_dict()
  values['augment']['crop'] = {'module': f'{NAME}.crop'}
  with dotted.allow_imports(NAME), pytest.raises(UserError, match='cannot be the op'):
    resolve_config(ConfigDict(values))


COMMANDS = ('eval {run} --protocol health', 'report {run}', 'resume {run} --quiet', 'export {run} --out out',
            'embed {run} images --out out.npz', 'compare {run} {run}', 'train --from {run} --workdir other --quiet')


@pytest.mark.parametrize('command', COMMANDS)
def test_nothing_is_imported_because_a_folder_says_so(command, run, capsys):
  pathlib.Path('images').mkdir(exist_ok=True)
  Image.new('RGB', (20, 20)).save('images/a.png')
  before = sorted(run.rglob('*'))
  assert cli.main(command.format(run=run).split()) == 2
  text = capsys.readouterr().err.strip()
  assert f'--allow {NAME}' in text and len(text.splitlines()) == 2 and 'Traceback' not in text
  assert not imported() and sorted(run.rglob('*')) == before


def test_what_is_allowed_is_evaluated_and_exported(run, capsys):
  assert cli.main(['eval', str(run), '--protocol', 'knn', '--allow', NAME]) == 0
  assert f'{NAME}.sepia' in imported() and f'{NAME}.nets.mine' not in imported()
  forget()
  assert cli.main(['export', str(run), '--allow', f'other,{NAME}']) == 0
  forget()
  exported = es.load(run / 'export')  # which names no module: it is the encoder alone
  assert not imported()
  images = np.random.default_rng(0).integers(0, 256, (5, 20, 14, 3), np.uint8)
  np.testing.assert_allclose(exported(images), es.load(run, allow=(NAME,))(images), atol=1e-4)


def test_a_program_allows_or_imports(run, monkeypatch):
  with pytest.raises(UserError, match='--allow'):
    es.load(run)
  with pytest.raises(UserError, match='--allow'):
    es.load(run, allow=('their', f'{NAME}.nets'))
  assert not imported()
  assert es.load(run, allow=(NAME,)).step == 2
  assert es.load(run).step == 2  # they are imported by now
  forget()
  monkeypatch.syspath_prepend(os.getcwd())
  for name in ('sepia', 'objective', 'squares'):
    __import__(f'{NAME}.{name}')
  assert es.load(run).step == 2


def test_a_network_of_theirs_is_trained_and_loaded(folder):
  images = np.random.default_rng(0).integers(0, 256, (20, 16, 16, 3), np.uint8)
  run = es.pretrain('smoke', images, 'runs/net', quiet=True,
                    overrides={'encoder.name': f'{NAME}.nets.mine', 'steps': 1})
  encoder = es.load(run)
  assert encoder(images).shape == (20, 8) == (20, encoder.dim)
  with pytest.raises(UserError, match='0 stages'):
    encoder.features(images, layer=1)
  assert cli.main(['export', str(run), '--allow', NAME]) == 2  # torchvision has no such network
  with pytest.raises(UserError, match='takes no dtype'):
    es.pretrain('smoke', images, 'runs/half', quiet=True,
                overrides={'encoder.name': f'{NAME}.nets.plain', 'dtype': 'bfloat16'})


def test_laws_are_checked_by_dotted_path():
  es.check_laws(f'{NAME}.sepia', most=.4)
  with pytest.raises(es.LawError, match='mytint breaks 2 laws:\n  identity_encodes_to_zero: encode') as raised:
    es.check_laws(f'{NAME}.broken')
  assert isinstance(raised.value, AssertionError)  # a failure in pytest


def test_a_study_of_their_op_tells_its_processes(run, folder, tmp_path):
  """The processes of a study import what the user named, from where it is, and nothing else from a folder."""
  config = design.base_config(load_config('smoke', {'encoder.name': f'{NAME}.nets.mine'}), ('rotate',))
  arms = [{'config': values} for values in (config.to_dict(), read_values(run))]
  variables = runner.allowed_modules({'made': arms})
  names = (f'{NAME}.sepia', f'{NAME}.objective', f'{NAME}.squares', f'{NAME}.nets.mine')
  code = f'from equivariant_ssl import dotted\nfor name in {names!r}: dotted.factory(name)'
  base = {k: v for k, v in os.environ.items() if k != dotted.VARIABLE} | runner.isolated_environment()
  for environment, fails in ((base | variables, 0), (base, 1)):
    done = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, env=environment, capture_output=True,
                          encoding='utf-8')
    assert done.returncode == fails, done.stderr


def read_values(run: pathlib.Path) -> dict:
  with dotted.allow_imports(NAME):
    return read_config(run / 'config.json').to_dict()


@pytest.mark.slow
def test_a_study_of_their_op_runs(folder):
  found = es.study('smoke', [f'{NAME}.sepia'], 'runs/study', arms=('off', 'both'), seeds=(0,), workers=1, quiet=True,
                   overrides={'steps': 2, 'encoder.name': f'{NAME}.nets.mine', 'batch': 16}, protocols=['health'])
  assert {row['arm'] for row in found['table']} == {'base', 'sepia=both'}
  forget()
  with pytest.raises(UserError, match='--allow'):
    es.study(folder='runs/study', collect=True)
  assert study_plan.read(folder / 'runs' / 'study')['augs'] == ['sepia']

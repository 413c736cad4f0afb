"""Configs: resolved, typed, refused with the nearest name."""
import pathlib

import pytest

from equivariant_ssl import config as configs
from equivariant_ssl.errors import UserError

NAMES = sorted(p.stem for p in (pathlib.Path(__file__).parent.parent / 'configs').glob('*.py'))


@pytest.mark.parametrize('name', NAMES)
def test_every_config_resolves_and_survives_json(name, tmp_path):
  config = configs.load(name)
  (tmp_path / 'config.json').write_text(config.to_json())
  assert configs.read(tmp_path / 'config.json') == config
  assert configs.resolve(config) == config


def test_every_default_is_written_out():
  config = configs.load('smoke')
  assert config.augment.crop.ratio == (3 / 4, 4 / 3)
  assert config.invariance.projector.last_norm == 'batch_noaffine'


def test_overrides():
  config = configs.load('smoke', {'epochs': '3', 'augment.crop.scale': '.5,1', 'augment.rotate.role': 'off',
                                  'optimizer.lr': '1e-3', 'invariance.projector.hidden': '32'})
  assert config.epochs == 3. and isinstance(config.epochs, float)
  assert config.augment.crop.scale == (.5, 1.)
  assert config.augment.rotate.role == 'off'
  assert config.optimizer.lr == 1e-3
  assert config.invariance.projector.hidden == (32,)


@pytest.mark.parametrize('key,value,cause,fix', [
    ('augment.crop.scal', '(.1, 1.)', "config.augment.crop has no 'scal'", "'scale'"),
    ('bath', '3', "config has no 'bath'", "'batch'"),
    ('augment.croq.scale', '.5,1', "config.augment has no 'croq'", "'crop'"),
    ('invariance.name', 'simclear', "config.invariance has no 'simclear'", "'simclr'"),
    ('optimizer.name', 'larz', "config.optimizer has no 'larz'", "'lars'"),
    ('augment.crop.role', 'seen', "config.augment.crop.role has no 'seen'", 'sensitive'),
    ('batch', 'many', "config.batch is 'many'; it needs a int", '--config.batch'),
    ('batch', '0', 'config.batch is 0', 'config.batch'),
    ('optimizer.lr', '(1, 2)', 'config.optimizer.lr is (1, 2)', 'float'),
    ('dtype', 'float16', "config.dtype has no 'float16'", 'bfloat16'),
    ('augment.order', 'crop,flip', 'config.augment.order names', 'order'),
    ('knn_every', '-1', 'config.knn_every is -1', '--config.knn_every=10'),
    ('mean', '.5,.5', 'config.mean is (0.5, 0.5)', '--config.std'),
    ('std', '1,1,0', 'config.mean is ()', 'three numbers'),
    ('encoder', '3', 'config.encoder is 3', '--config.encoder.name'),
])
def test_a_mistake_is_named_with_its_remedy(key, value, cause, fix):
  with pytest.raises(UserError) as error:
    configs.load('smoke', {key: value})
  assert error.value.code == 2
  assert cause in str(error.value) and fix in str(error.value)


def test_a_missing_or_broken_file(tmp_path):
  with pytest.raises(UserError, match='not found.*\n.*Available: .*smoke'):
    configs.load('smook')
  broken = tmp_path / 'broken.py'
  broken.write_text('def get_config(:')
  with pytest.raises(UserError, match='SyntaxError'):
    configs.load(str(broken))
  with pytest.raises(UserError, match='config.json is missing'):
    configs.read(tmp_path / 'config.json')

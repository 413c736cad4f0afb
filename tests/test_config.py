"""Configs: resolved, typed, refused with the nearest name."""
import json
import pathlib

import pytest
from ml_collections import ConfigDict

from equivariant_ssl import augment, registry
from equivariant_ssl.config import config_to_json, load_config, read_config, resolve_config
from equivariant_ssl.config_fields import USUAL_ORDER
from equivariant_ssl.errors import UserError
from equivariant_ssl.storage import record
from equivariant_ssl.storage.record import config_leaves
from equivariant_ssl.training.run_config import free_fields

NAMES = sorted(p.stem for p in (pathlib.Path(__file__).parent.parent / 'configs').glob('*.py'))


@pytest.mark.parametrize('name', NAMES)
def test_every_config_resolves_and_survives_json(name, tmp_path):
  config = load_config(name)
  (tmp_path / 'config.json').write_text(config.to_json())
  assert read_config(tmp_path / 'config.json') == config
  assert resolve_config(config) == config


def test_every_default_is_written_out():
  config = load_config('smoke')
  assert config.augment.crop.ratio == (3 / 4, 4 / 3)
  assert config.invariance.projector.last_norm == 'batch_noaffine'


def test_overrides():
  config = load_config('smoke', {'epochs': '3', 'augment.crop.scale': '.5,1', 'augment.rotate.role': 'off',
                                 'optimizer.lr': '1e-3', 'invariance.projector.hidden': '32'})
  assert config.epochs == 3. and isinstance(config.epochs, float)
  assert config.augment.crop.scale == (.5, 1.)
  assert config.augment.rotate.role == 'off'
  assert config.optimizer.lr == 1e-3
  assert config.invariance.projector.hidden == (32,)


@pytest.mark.parametrize('name,order', [
  ('blur', ('crop', 'flip', 'blur', 'rotate')), ('vflip', ('crop', 'flip', 'vflip', 'rotate')),
  ('turn', ('crop', 'flip', 'turn', 'rotate'))])
def test_a_role_adds_an_augmentation_in_its_usual_place(name, order, capsys):
  config = load_config('smoke', {f'augment.{name}.role': 'sensitive'})
  assert config.augment.order == order and config.augment[name].role == 'sensitive'
  assert f'{name} is added to the augmentations: {", ".join(order)}' in capsys.readouterr().err
  with pytest.raises(UserError, match=f"has no '{name}'|not among"):  # an order of one's own stays
    load_config('smoke', {f'augment.{name}.role': 'sensitive', 'augment.order': 'crop,flip,rotate'})


def test_every_augmentation_has_a_usual_place():
  assert sorted(USUAL_ORDER) == registry.names(augment)


AS_TYPED = ('2024_01_15', '1e5', 'a,b', '1', '0x10', 'None', "('a', 'b')", '{}', ' a ', 'train[:80%]', '-', 'é',
            "it's", '1_0.5')


@pytest.mark.parametrize('text', AS_TYPED)
@pytest.mark.parametrize('key', ['folder.path', 'tfds.dataset', 'tfds.root', 'tfds.train', 'tfds.test', 'cifar10.root'])
def test_text_is_taken_as_typed(key, text, tmp_path):
  """Whatever Python would read in it; and it comes back from config.json as that."""
  name, _, field = key.partition('.')
  config = load_config('smoke', {'data.name': name, f'data.{field}': text})
  assert config.data[field] == text and type(config.data[field]) is str
  (tmp_path / 'config.json').write_text(config.to_json(), encoding='utf-8')
  assert read_config(tmp_path / 'config.json') == config


def test_every_field_that_is_text_is_taken_as_typed():
  """A law over the whole schema: no field of text is read as anything else, and no name is."""
  fields = [k for k, v in config_leaves(config_to_json(load_config('imagenet_byol_equimod'))).items() if isinstance(v, str)]
  assert {'data.root', 'dtype', 'encoder.stem', 'augment.crop.role', 'invariance.projector.last_norm'} <= set(fields)
  for field in fields:
    for text in ('1e5', '1,2'):
      try:
        config = load_config('imagenet_byol_equimod', {field: text})
      except UserError as e:
        assert repr(text) in str(e), f'{field}: {e}'
      else:
        assert config_leaves(config_to_json(config))[field] == text


@pytest.mark.parametrize('key,value,cause,fix', [
    ('augment.crop.scal', '(.1, 1.)', "config.augment.crop has no 'scal'", "'scale'"),
    ('bath', '3', "config has no 'bath'", "'batch'"),
    ('augment.croq.scale', '.5,1', "config.augment has no 'croq'", "'crop'"),
    ('invariance.name', 'simclear', "config.invariance has no 'simclear'", "'simclr'"),
    ('optimizer.name', 'larz', "config.optimizer has no 'larz'", "'lars'"),
    ('augment.crop.role', 'seen', "config.augment.crop.role has no 'seen'", 'sensitive'),
    ('batch', 'many', "config.batch is 'many'; it needs an int", '--config.batch=256'),
    ('batch', '0', 'config.batch is 0', 'config.batch'),
    ('optimizer.lr', '(1, 2)', 'config.optimizer.lr is (1, 2)', 'float'),
    ('dtype', 'float16', "config.dtype has no 'float16'", 'bfloat16'),
    ('augment.order', 'crop,flip', 'config.augment.order names', 'order'),
    ('knn_every', '-1', 'config.knn_every is -1', '--config.knn_every=10'),
    ('mean', '.5,.5', 'config.mean is (0.5, 0.5)', '--config.std'),
    ('std', '1,1,0', 'config.mean is ()', 'three numbers'),
    ('encoder', '3', 'config.encoder is 3', '--config.encoder.name'),
    ('encoder', 'vit', "config.encoder is 'vit'", '--config.encoder.name=vit'),
    ('encoder.name', '3', "config.encoder has no '3'", 'resnet'),
    ('augment', '3', 'config.augment is 3', '--config.augment.'),
    ('augment.crop', '3', 'config.augment.crop is 3', '--config.augment.crop.role='),
    ('augment.second', '3', 'config.augment.second is 3', '--config.augment.second.'),
    ('optimizer', '3', 'config.optimizer is 3', '--config.optimizer.name'),
    ('invariance', '3', 'config.invariance is 3', '--config.invariance.name'),
    ('augment.crop.scale', 'x,1', "config.augment.crop.scale is ('x', '1')", "--config.augment.crop.scale='(0.08, 1.0)'"),
    ('augment.order', '3', 'config.augment.order is 3', '--config.augment.order=crop'),
    ('batch.foo', '3', 'config.batch is a number, 16: it has no fields', '--config.batch=3'),
    ('keep.foo', '3', 'config.keep is a number, 2: it has no fields', '--config.keep=3'),
    ('equivariance.1.weight', '.5', 'config.equivariance has one objective', '--config.equivariance.weight=.5'),
    ('probe', 'yes', "config.probe is 'yes'", '--config.probe=True'),
    ('mean', 'a,b,c', "config.mean is ('a', 'b', 'c')", "--config.mean='(0.485, 0.456, 0.406)'"),
    ('encoder.width', '0', 'config.encoder.width is 0; it must be at least 1', '--config.encoder.width=64'),
    ('invariance.projector.out', '0', 'config.invariance.projector.out is 0', 'out=128'),
    ('invariance.projector.hidden', '64,-1', 'config.invariance.projector.hidden is (64, -1)', 'hidden='),
    ('equivariance.dim', '0', 'config.equivariance.dim is 0', 'dim=128'),
    ('equivariance.action_dim', '-1', 'config.equivariance.action_dim is -1', 'action_dim=128'),
    ('checkpoint_every', '-1', 'config.checkpoint_every is -1; it must be at least 0', 'checkpoint_every=0'),
    ('seed', '99999999999999999999', 'it must be at most 4294967295', '--config.seed=0'),
    ('batch', '1e999', 'config.batch is inf; it needs an int', '--config.batch'),
    ('epochs', '1' + 400 * '0', 'it needs a float', '--config.epochs'),
])
def test_a_mistake_is_named_with_its_remedy(key, value, cause, fix):
  with pytest.raises(UserError) as error:
    load_config('smoke', {key: value})
  assert error.value.code == 2
  assert cause in str(error.value) and fix in str(error.value)


@pytest.mark.parametrize('key,cause,fix', [
    ('2.weight', "config.equivariance has 2 objectives, 0 to 1; '2' does not say which", '--config.equivariance.0.weight=x'),
    ('1.hidden', "config.equivariance.1.hidden is 'x'", "--config.equivariance.1.hidden='(2048, 2048)'"),
    ('2', 'config.equivariance has 2 objectives', '--config.equivariance.0=x')])
def test_a_mistake_in_one_of_several_objectives(key, cause, fix):
  with pytest.raises(UserError) as error:
    load_config('smoke', {'equivariance': 'equimod,essl', f'equivariance.{key}': 'x'})
  assert cause in str(error.value) and fix in str(error.value)


def test_one_word_is_a_list_and_a_switch_is_true_in_any_letters():
  config = load_config('smoke', {'equivariance': 'equimod,essl', 'equivariance.0.augmentations': 'crop', 'probe': 'true',
                                 'equivariance.1': 'sie', 'tensorboard': 'FALSE'})
  assert config.equivariance[0].augmentations == ('crop',) and config.equivariance[1].name == 'sie'
  assert config.probe is True and config.tensorboard is False
  assert load_config('smoke', {'equivariance.augmentations': 'crop'}).equivariance.augmentations == ('crop',)


def test_a_section_under_another_name_keeps_what_both_have():
  config = load_config('imagenet_simclr', {'optimizer.name': 'adam', 'data.name': 'folder', 'data.path': 'x'})
  assert config.optimizer.lr == 2.4 and config.optimizer.weight_decay == 1e-6 and 'trust' not in config.optimizer
  assert config.data.size == 256 and config.data.test == .1  # TFDS's `test` is a word, a folder's a share
  config = load_config('cifar10_byol', {'invariance.name': 'simclr'})
  assert 'predictor' not in config.invariance
  config = load_config('imagenet_simclr', {'invariance.predictor.hidden': '64', 'invariance.name': 'byol'})
  assert config.invariance.predictor.hidden == (64,)


@pytest.mark.parametrize('order', [1, -1])
def test_what_is_asked_beside_another_name_must_be_there(order):
  with pytest.raises(UserError, match="config.encoder has no 'stem'"):
    load_config('imagenet_simclr', dict([('encoder.name', 'vit'), ('encoder.stem', 'cifar')][::order]))


def test_a_missing_or_broken_file(tmp_path):
  with pytest.raises(UserError, match='not found.*\n.*Available: .*smoke'):
    load_config('smook')
  broken = tmp_path / 'broken.py'
  broken.write_text('def get_config(:')
  with pytest.raises(UserError, match='SyntaxError'):
    load_config(str(broken))
  for returned in ("{'seed': 1}", 'None'):
    broken.write_text(f'def get_config():\n  return {returned}')
    with pytest.raises(UserError, match='get_config.. returned .*\n.*that returns a ConfigDict'):
      load_config(str(broken))
  with pytest.raises(UserError, match='config.json is missing'):
    read_config(tmp_path / 'config.json')
  (tmp_path / 'config.json').write_text('[]')
  with pytest.raises(UserError, match='is not a Python file.\n.*eqssl resume '):
    load_config(str(tmp_path / 'config.json'))
  with pytest.raises(UserError, match='config.json is damaged.*\n.*backup'):
    read_config(tmp_path / 'config.json')


def test_the_old_names_of_fields_are_read():
  """An old command line, config file and config.json have `told`, and a fill that is `grey`."""
  order = {'augment.order': 'crop,flip,rotate,erase'}
  new = load_config('smoke', {**order, 'augment.erase': "{'fill': 'gray'}",
                              'equivariance.augmentations': 'crop'})
  old = load_config('smoke', {**order, 'augment.erase': "{'fill': 'grey'}",
                              'equivariance.told': 'crop'})
  assert new == old and old.equivariance.augmentations == ('crop',) and 'told' not in old.equivariance
  values = config_to_json(new)
  values['equivariance']['told'] = values['equivariance'].pop('augmentations')
  values['augment']['erase']['fill'] = 'grey'
  values['augment']['second'] = {'erase': {'fill': 'grey'}}
  read = resolve_config(ConfigDict(values))
  assert read.augment.second.erase.fill == 'gray'
  assert {**config_to_json(read)['augment'], 'second': {}} == config_to_json(new)['augment']
  assert read.equivariance == new.equivariance
  spelled = {'augment.jitter': "{'quantise': True}", 'augment.order': 'crop,flip,rotate,jitter'}
  assert load_config('smoke', spelled).augment.jitter.quantize
  spelled |= {'augment.jitter': "{'quantize': False}", 'augment.jitter.quantise': 'True',
              'augment.second.jitter.quantise': 'False'}
  both = load_config('smoke', spelled).augment
  assert both.jitter.quantize and both.second.jitter.to_dict() == {'quantize': False}
  several = load_config('smoke', {
      'equivariance': "[{'name': 'equimod', 'told': ('crop',)}, {'name': 'essl'}]",
      'equivariance.1.told': 'rotate'})
  assert [e.augmentations for e in several.equivariance] == [('crop',), ('rotate',)]


def test_a_run_with_the_old_names_is_resumed(tmp_path):
  """The config.json of an older version is the same config as today's."""
  config = load_config('stl10_simclr_augself', {'equivariance.augmentations': 'crop',
                                                'data.labelled': 'train[:9]'})
  values = config_to_json(config)
  assert config.data.labeled == 'train[:9]'
  values['equivariance']['told'] = values['equivariance'].pop('augmentations')
  values['data']['labelled'] = values['data'].pop('labeled')
  for op in ('jitter', 'gray'):
    values['augment'][op]['quantise'] = values['augment'][op].pop('quantize')
  (tmp_path / 'config.json').write_text(json.dumps(values), encoding='utf-8')
  assert read_config(tmp_path / 'config.json') == config
  record.compare(tmp_path, config_to_json(config), ())
  assert free_fields(config, tmp_path) == free_fields(config, tmp_path / 'no run')
  with pytest.raises(UserError, match='data.labeled: .*; equivariance.augmentations'):
    record.compare(tmp_path, config_to_json(load_config('stl10_simclr_augself')), ())


def test_a_run_with_several_objectives_is_resumed_once_one_has_a_new_field(tmp_path):
  """config.json lacks a field of the second objective, as that of an older version does."""
  several = {'equivariance': 'equimod,augself'}
  config = load_config('smoke', several)
  values = config_to_json(config)
  del values['equivariance'][1]['weight']
  (tmp_path / 'config.json').write_text(json.dumps(values), encoding='utf-8')
  record.compare(tmp_path, config_to_json(config), free_fields(config, tmp_path))
  for field in ('0.weight', '1.weight'):  # another value than the default is another config
    other = load_config('smoke', several | {f'equivariance.{field}': '.37'})
    with pytest.raises(UserError, match=f'another config: equivariance.{field}: .* -> 0.37'):
      record.compare(tmp_path, config_to_json(other), free_fields(other, tmp_path))

"""Export and import of weights: torchvision's names and shapes, the same features, and one clear
error for every wrong file."""

import importlib.util
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from safetensors.numpy import load_file, save_file

from equivariant_ssl.config import config_to_json, load_config, read_config
from equivariant_ssl.errors import UserError
from equivariant_ssl.evaluate.features import features
from equivariant_ssl.evaluate.frozen import frozen, variables
from equivariant_ssl.export import exporting, importing, torchvision, weight_files
from equivariant_ssl.nets import resnet
from equivariant_ssl.parallel import sharding
from equivariant_ssl.storage import checkpoint, record
from equivariant_ssl.training import runs

ALONE = {'equivariance': 'none'}
BYOL = ALONE | {
  'invariance': "{'name': 'byol', 'projector': {'hidden': (16,), 'out': 8}, "
  "'predictor': {'hidden': (16,), 'out': 8}}"
}


def scheme(depth, width=64, kernel=7, fc=False):
  """{name: shape} of torchvision's ResNet, written from its naming scheme."""
  counts, deep = {
    10: ((1, 1, 1, 1), 0),
    18: ((2, 2, 2, 2), 0),
    34: ((3, 4, 6, 3), 0),
    50: ((3, 4, 6, 3), 1),
    101: ((3, 4, 23, 3), 1),
    152: ((3, 8, 36, 3), 1),
  }[depth]
  shapes = {}

  def layer(conv, norm, out, inside, size):
    shapes[f'{conv}.weight'] = (out, inside, size, size)
    shapes.update(
      {f'{norm}.{word}': (out,) for word in ('weight', 'bias', 'running_mean', 'running_var')}
    )
    shapes[f'{norm}.num_batches_tracked'] = ()

  layer('conv1', 'bn1', width, 3, kernel)
  inside = width
  for stage, count in enumerate(counts, 1):
    planes = width * 2 ** (stage - 1)
    for i in range(count):
      block, out = f'layer{stage}.{i}', planes * (4 if deep else 1)
      sizes = (
        [(planes, inside, 1), (planes, planes, 3), (out, planes, 1)]
        if deep
        else [(planes, inside, 3), (planes, planes, 3)]
      )
      for n, shape in enumerate(sizes, 1):
        layer(f'{block}.conv{n}', f'{block}.bn{n}', *shape)
      if i == 0 and (stage > 1 or deep):
        layer(f'{block}.downsample.0', f'{block}.downsample.1', out, inside, 1)
      inside = out
  return shapes | ({'fc.weight': (1000, inside), 'fc.bias': (1000,)} if fc else {})


def random_state(depth, width=4, kernel=3, seed=0, fc=False):
  """A state dict of random numbers that keep activations near 1."""
  random = np.random.RandomState(seed)

  def one(name, shape):
    if not shape:
      return np.zeros((), np.int64)
    if len(shape) == 4:
      return random.randn(*shape).astype(np.float32) * np.float32((2 / np.prod(shape[1:])) ** 0.5)
    around = 0.0 if name.endswith(('bias', 'mean')) else 1.0
    return (around + random.uniform(-0.3, 0.3, shape)).astype(np.float32)

  return {name: one(name, shape) for name, shape in scheme(depth, width, kernel, fc).items()}


def like(depth, stem, width):
  """(params, stats) of our network, as shapes."""
  net = resnet.make(depth, stem, width)
  shapes = jax.eval_shape(lambda: net.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), False))
  return shapes['params'], shapes['batch_stats']


def written(path, state):
  save_file(state, path)
  return path


def prepared(workdir):
  return runs.prepare_run(read_config(workdir / 'config.json'), sharding.mesh(jax.devices()[:1]))


def loaded(workdir, run):
  return checkpoint.load_checkpoint(workdir / 'checkpoints', runs.abstract_state(run))


def encoded(run, state):
  """Features [6 D] of the data's first test images."""
  return features(Partial(frozen(run.recipe).encode, variables(state)), run.source.test.images[:6])


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
  """A run with random weights at step 7 and its export.

  They are its workdir, run and state, the folder of the export, and the lines that were printed.
  """
  workdir = tmp_path_factory.mktemp('exported') / 'start'
  config = load_config('smoke', ALONE)
  run = runs.prepare_run(config, sharding.mesh(jax.devices()[:1]))
  state = runs.initial_state(run)
  (params, stats), _ = torchvision.from_torch(
    random_state(10), (state.params['encoder'], state.stats['encoder'])
  )
  state = state._replace(
    step=jnp.int32(7),
    params={**state.params, 'encoder': params},
    stats={**state.stats, 'encoder': stats},
  )
  state = jax.device_put(state, sharding.replicated_sharding(run.mesh))
  record.start_record(workdir, config_to_json(config), 'eqssl train --config smoke --workdir start')
  with checkpoint.open_checkpoints(workdir / 'checkpoints') as saved:
    saved.save(7, state, {}, wait=True)
  lines = []
  return workdir, run, state, exporting.export(workdir, say=lines.append), lines


@pytest.fixture(scope='module')
def back(exported, tmp_path_factory):
  """The workdir, run and state of the imported export, a run of BYOL, and the printed lines."""
  workdir, lines = tmp_path_factory.mktemp('back') / 'again', []
  importing.import_weights(
    exported[3] / 'model.safetensors', workdir, 'smoke', BYOL, 'the command', lines.append
  )
  run = prepared(workdir)
  step, state, meta = loaded(workdir, run)
  assert step == int(state.step) == 0 and meta['imported'].endswith('model.safetensors')
  return workdir, run, state, lines


# -- out


@pytest.mark.parametrize(('depth', 'stem', 'width'), [(18, 'imagenet', 64), (50, 'cifar', 16)])
def test_names_and_shapes_are_torchvisions(depth, stem, width):
  zeros = jax.tree.map(lambda a: np.zeros(a.shape, np.float32), like(depth, stem, width))
  ours = {k: v.shape for k, v in resnet.to_torch(*zeros).items()}
  assert ours == scheme(depth, width, 7 if stem == 'imagenet' else 3)
  assert (
    depth != 18
    or len(ours) == 120
    and sum(np.prod(s) for k, s in ours.items() if 'running' not in k) > 11.1e6
  )


def test_an_export_is_the_checkpoints_encoder(exported):
  workdir, run, state, out, lines = exported
  assert out == workdir / 'export' and {p.name for p in out.iterdir()} == {
    'model.safetensors',
    'config.json',
  }
  exported_tensors, expected = load_file(out / 'model.safetensors'), random_state(10)
  assert {k: v.shape for k, v in exported_tensors.items()} == scheme(10, 4, 3)
  for name, array in expected.items():
    np.testing.assert_array_equal(exported_tensors[name], array)
    assert exported_tensors[name].dtype == array.dtype
  kernel = state.params['encoder']['layer2_0']['downsample_0']['kernel']
  np.testing.assert_array_equal(
    exported_tensors['layer2.0.downsample.0.weight'], np.asarray(kernel).transpose(3, 2, 0, 1)
  )
  facts = json.loads((out / 'config.json').read_text())
  section, timm = facts['equivariant_ssl'], facts['pretrained_cfg']
  assert (
    facts['architecture'] == 'resnet10-cifar-width4'
    and facts['num_features'] == 32
    and facts['num_classes'] == 0
  )
  assert (
    section['encoder'] == {'depth': 10, 'stem': 'cifar', 'width': 4} and not section['standard']
  )
  assert (section['config'], section['step'], section['run']) == (
    'smoke',
    7,
    'start',
  ) and 'neither in timm' in section['note']
  assert timm['mean'] == section['mean'] == list(run.source.mean) and timm['std'] == list(
    run.source.std
  )
  assert (timm['first_conv'], timm['classifier'], timm['input_size']) == (
    'conv1',
    'fc',
    [3, 16, 16],
  )
  text = '\n'.join(lines)
  assert (
    'read back: features of 8 images differ by at most 0,' in text and 'neither in timm' in text
  )
  assert ('not compared' in text) == (importlib.util.find_spec('torch') is None)


def test_an_export_replaces_its_own_alone(exported, tmp_path):
  workdir = exported[0]
  for name, content in (('config.json', '{"batch": 16}'), ('model.safetensors', 'mine')):
    (tmp_path / name).mkdir()
    (tmp_path / name / name).write_text(content)
    with pytest.raises(UserError, match='was not exported by eqssl'):
      exporting.export(workdir, tmp_path / name)
    assert (tmp_path / name / name).read_text() == content and len(
      list((tmp_path / name).iterdir())
    ) == 1
  with pytest.raises(UserError, match='was not exported by eqssl'):
    exporting.export(workdir, workdir)  # where the run's own config.json is
  before = (exported[3] / 'model.safetensors').read_bytes()
  exporting.export(workdir, exported[3], say=lambda line: None)
  assert (exported[3] / 'model.safetensors').read_bytes() == before


def test_a_file_that_computes_something_else_is_not_left(exported, tmp_path, monkeypatch):
  wrong = lambda *encoder: {
    k: v * 2 if k == 'bn1.bias' else v for k, v in resnet.to_torch(*encoder).items()
  }
  monkeypatch.setattr(torchvision, 'to_torch', wrong)
  with pytest.raises(UserError, match='read back: .* differ by at most .* Nothing was exported'):
    exporting.export(exported[0], tmp_path / 'out')
  assert not list((tmp_path / 'out').iterdir())


def test_a_resnet_alone_is_exported(exported, tmp_path):
  config = json.loads((exported[0] / 'config.json').read_text())
  (tmp_path / 'config.json').write_text(json.dumps(config | {'encoder': {'name': 'mlp'}}))
  with pytest.raises(
    UserError, match="an encoder 'mlp', and only a resnet or a vit can be exported"
  ):
    exporting.export(tmp_path)
  with pytest.raises(UserError, match='no checkpoint of step 3'):
    exporting.export(exported[0], step=3)


def test_standard_ones_are_timms_and_others_say_how_they_are_built():
  standard = torchvision.Architecture(50, 'imagenet', 64)
  assert standard.name == 'resnet50' and "'local-dir:to'" in torchvision.build_code(
    standard, 'to/model.safetensors'
  )
  for changed in ({'depth': 10}, {'stem': 'cifar'}, {'width': 32}):
    other = standard._replace(**changed)
    text = torchvision.build_code(other, 'to/model.safetensors')
    compile(text, 'building', 'exec')
    assert not other.standard and 'timm' not in text and "load_file('to/model.safetensors')" in text
    assert ('Narrow' in text, 'maxpool' in text) == ('width' in changed, 'stem' in changed)


# -- in


def test_out_and_in_gives_the_same_features_bitwise(exported, back):
  _, run, state, _, _ = exported
  workdir, again, imported_state, lines = back
  np.testing.assert_array_equal(encoded(again, imported_state), encoded(run, state))
  assert again.recipe.network.mean == run.source.mean and again.recipe.network.std == run.source.std
  assert (workdir / 'command.txt').read_text() == 'the command\n' and (
    workdir / 'env.json'
  ).exists()
  assert (
    '60 of 60 tensors of the encoder matched; 12 of the file were left out (12 num_batches_tracked)'
    in lines[0]
  )
  assert 'from the config.json beside the file' in lines[1] and lines[2].startswith(
    'Stem: cifar, from the config.json'
  )


def test_what_is_not_the_encoder_is_as_at_the_start(back):
  _, run, imported_state, _ = back
  first = runs.initial_state(run)
  rest = lambda s: [
    {k: v for k, v in tree.items() if k != 'encoder'} for tree in (s.params, s.stats, *s.target)
  ]
  jax.tree.map(
    np.testing.assert_array_equal,
    (rest(imported_state), imported_state.opt_state),
    (rest(first), first.opt_state),
  )
  jax.tree.map(
    np.testing.assert_array_equal,
    imported_state.target[0]['encoder'],
    imported_state.params['encoder'],
  )
  jax.tree.map(
    np.testing.assert_array_equal,
    imported_state.target[1]['encoder'],
    imported_state.stats['encoder'],
  )


def test_a_file_of_torchvision_gets_imagenets_normalization_or_what_is_asked(tmp_path):
  state = {f'module.{k}': v for k, v in random_state(10, fc=True).items() if 'num_batches' not in k}
  lines, stem = [], {'encoder.stem': 'half'}
  file = written(tmp_path / 'old.safetensors', state)
  workdir = importing.import_weights(file, tmp_path / 'run', 'smoke', ALONE | stem, say=lines.append)
  run = prepared(workdir)
  _, imported_state, _ = loaded(workdir, run)
  assert (
    "under 'module.': 60 of 60 tensors of the encoder matched; 2 of the file were left out "
    in lines[0]
  )
  assert '(module.fc.bias, module.fc.weight).' in lines[0] and 'those of ImageNet' in lines[1]
  assert lines[2] == 'Stem: half, as --config.encoder.stem says.'
  x = (run.source.test.images[:6] / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
  values = {
    'params': imported_state.params['encoder'],
    'batch_stats': imported_state.stats['encoder'],
  }
  expected = jax.jit(lambda v, x: resnet.make(10, 'half', 4).apply(v, x, False))(
    values, x.astype(np.float32)
  )
  np.testing.assert_allclose(encoded(run, imported_state), expected, rtol=1e-4, atol=1e-4)
  another = ALONE | stem | {'mean': '.5,.5,.5', 'std': '.25,.25,.25'}
  importing.import_weights(file, tmp_path / 'other', 'smoke', another, say=lines.append)
  config = read_config(tmp_path / 'other' / 'config.json')
  assert (config.mean, config.std) == ((0.5,) * 3, (0.25,) * 3) and 'as the config says' in lines[5]


@pytest.mark.parametrize('depth', [10, 18, 34, 50, 101, 152])
@pytest.mark.parametrize(('kernel', 'stem'), [(7, 'imagenet'), (3, 'half')])
def test_depth_stem_and_width_are_in_names_and_shapes(depth, kernel, stem):
  state = {
    k: np.broadcast_to(np.float32(0), shape)
    for k, shape in scheme(depth, 12, kernel, fc=True).items()
  }
  encoder, prefix, left = torchvision.backbone(state)
  assert (prefix, left) == ('', ['fc.weight', 'fc.bias'])
  assert torchvision.architecture(encoder, 'half') == (depth, stem, 12)


def test_the_trained_one_of_two_is_taken():
  tensors, others = random_state(10), random_state(10, seed=1)
  for prefix in ('backbone.', 'encoder.', 'resnet.', 'module.encoder_q.', 'anything.else.'):
    state = {prefix + k: v for k, v in tensors.items()} | {
      'queue': np.zeros(3),
      'conv1.weight': np.zeros(3),
    }
    encoder, encoder_prefix, left = torchvision.backbone(
      state | {f'module.encoder_k.{k}': v for k, v in others.items()}
    )
    assert encoder_prefix == prefix and len(left) == len(others) + 2
    assert encoder.keys() == tensors.keys() and all(encoder[k] is v for k, v in tensors.items())
  with pytest.raises(UserError, match="it holds 2 ResNets: 'a.', 'b.'"):
    torchvision.backbone({f'{p}.{k}': v for p in 'ab' for k, v in tensors.items()})


def test_normalization_and_stem_of_a_config_beside_a_file():
  timm = {'mean': [0.5, 0.4, 0.3], 'std': [0.1, 0.2, 0.3]}
  assert importing._normalization({'pretrained_cfg': timm})[:2] == (
    (0.5, 0.4, 0.3),
    (0.1, 0.2, 0.3),
  )
  ours = {'mean': [0, 0, 0], 'std': [1, 1, 1]}
  assert importing._normalization({'pretrained_cfg': timm, 'equivariant_ssl': ours})[:2] == (
    (0, 0, 0),
    (1, 1, 1),
  )
  assert importing._normalization(timm)[1] == (0.1, 0.2, 0.3)
  assert (
    importing._normalization({})[:2]
    == importing._normalization({'mean': [], 'std': []})[:2]
    == importing.IMAGENET
  )
  encoder = load_config('smoke', {'encoder.stem': 'imagenet'}).encoder
  assert importing._small_stem({}, 'smoke', encoder)[0] == 'cifar'
  assert (
    importing._small_stem({'equivariant_ssl': {'encoder': {'stem': 'half'}}}, 'smoke', encoder)[0]
    == 'half'
  )


# -- wrong files


def without(name):
  return lambda state: {k: v for k, v in state.items() if k != name}


def renamed(old, new):
  return lambda state: {k.replace(old, new): v for k, v in state.items()}


BROKEN = {
  'no resnet': (
    lambda state: {'fc.weight': np.zeros((2, 2), np.float32)},
    'none of its 1 tensors is called',
  ),
  'no stem': (without('conv1.weight'), 'conv1.weight is missing'),
  'a flat stem': (
    lambda state: state | {'conv1.weight': np.zeros(4, np.float32)},
    r'conv1.weight is \[4\]',
  ),
  'a block too many': (
    renamed('layer2.0', 'layer1.3'),
    r'its stages have \(2, 0, 1, 1\) basic blocks',
  ),
  'missing': (
    without('layer3.0.bn2.running_var'),
    '1 tensors do not fit the 60 of the encoder: layer3.0.bn2.running_var is missing',
  ),
  'shape': (
    lambda state: state | {'layer1.0.conv2.weight': np.zeros((4, 4, 1, 1), np.float32)},
    r'layer1.0.conv2.weight is \[4, 4, 1, 1\], not \[4, 4, 3, 3\]',
  ),
  'scalar': (
    lambda state: state | {'bn1.bias': np.zeros((), np.float32)},
    r'bn1.bias is \[\], not \[4\]',
  ),
  'more': (
    lambda state: state | {'layer1.0.se.fc.weight': np.zeros(4, np.float32)},
    'layer1.0.se.fc.weight is not one of them',
  ),
  'names': (renamed('bn1', 'norm1'), r'60 of the encoder: bn1.bias is missing; .* and \d+ more'),
  'not finite': (
    lambda state: state | {'bn1.bias': np.full(4, np.nan, np.float32)},
    '1 of its tensors are not finite: bn1.bias',
  ),
}


@pytest.mark.parametrize('what', BROKEN)
def test_a_wrong_file_is_one_line_and_no_partial_load(what):
  change, message = BROKEN[what]
  shapes = like(10, 'cifar', 4)
  with pytest.raises(UserError, match=message):
    encoder, _, _ = torchvision.backbone(change(random_state(10)))
    torchvision.architecture(encoder, 'cifar')
    torchvision.from_torch(encoder, shapes)


def test_a_failed_import_leaves_nothing(tmp_path):
  file = written(tmp_path / 'x.safetensors', BROKEN['missing'][0](random_state(10)))
  with pytest.raises(UserError, match=re.escape(f'{file}: 1 tensors do not fit the 60')):
    importing.import_weights(file, tmp_path / 'run', 'smoke', ALONE, say=lambda line: None)
  assert [p.name for p in tmp_path.iterdir()] == ['x.safetensors']
  with pytest.raises(UserError, match='is not empty'):
    importing.import_weights(file, tmp_path, 'smoke')


def test_damaged_files(exported, tmp_path):
  original = (exported[3] / 'model.safetensors').read_bytes()
  for content in (original[:-5], original[:40], b''):
    (tmp_path / 'cut.safetensors').write_bytes(content)
    with pytest.raises(UserError, match='is damaged or no safetensors file'):
      weight_files.read(tmp_path / 'cut.safetensors')
  (tmp_path / 'cut.safetensors').write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
  with pytest.raises(UserError, match='is not what the SHA-256 in its own header says'):
    weight_files.read(tmp_path / 'cut.safetensors')
  save_file(
    load_file(exported[3] / 'model.safetensors'), tmp_path / 'model.safetensors'
  )  # without its own fingerprint
  (tmp_path / 'config.json').write_text((exported[3] / 'config.json').read_text())
  with pytest.raises(UserError, match='is not what was exported'):
    importing.import_weights(tmp_path / 'model.safetensors', tmp_path / 'run', 'smoke', ALONE)
  for name, message in (
    ('none.safetensors', 'there is no file'),
    ('config.json', 'is not a file of weights'),
  ):
    with pytest.raises(UserError, match=message):
      weight_files.read(tmp_path / name)


def test_half_precision_becomes_float32(tmp_path):
  values = np.arange(4) / 8
  for dtype in (np.float16, jnp.bfloat16, np.float64):
    tensors = weight_files.read(written(tmp_path / 'x.safetensors', {'a': values.astype(dtype)}))[
      'a'
    ]
    assert tensors.dtype == np.float32
    np.testing.assert_array_equal(tensors, values.astype(np.float32))


# -- torch, where it is


def test_without_torch_a_pth_file_is_one_line(tmp_path):
  if importlib.util.find_spec('torch'):
    pytest.skip('torch is installed')
  (tmp_path / 'x.pth').write_bytes(b'')
  with pytest.raises(UserError, match='a file of torch, and torch is not installed.*\n.*python -c'):
    weight_files.read(tmp_path / 'x.pth')


def test_files_of_torch(tmp_path):
  torch = pytest.importorskip('torch')
  state = random_state(10)
  tensors = {k: torch.from_numpy(np.array(v)) for k, v in state.items()}
  for content in (tensors, {'epoch': 3, 'state_dict': tensors}, {'model': {'state_dict': tensors}}):
    torch.save(content, tmp_path / 'x.pth.tar')
    tensors = weight_files.read(tmp_path / 'x.pth.tar')
    assert tensors.keys() == state.keys()
    for k, v in state.items():
      np.testing.assert_array_equal(tensors[k], v)
  torch.save(torch.nn.Linear(2, 2), tmp_path / 'whole.pth')
  (tmp_path / 'cut.pth').write_bytes((tmp_path / 'x.pth.tar').read_bytes()[:-50])
  for name in ('whole.pth', 'cut.pth'):
    with pytest.raises(UserError, match='is damaged, or more than a state dict'):
      weight_files.read(tmp_path / name)


def test_a_plain_torch_network_computes_the_same(exported):
  torch = pytest.importorskip('torch')
  path = pathlib.Path(__file__).parents[2] / 'benchmarks' / 'torch_step.py'
  spec = importlib.util.spec_from_file_location('torch_step', path)
  torch_step = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(torch_step)
  state, net = random_state(18), torch_step.ResNet18(4)
  net.load_state_dict({k: torch.from_numpy(np.array(v)) for k, v in state.items()})  # strict
  x = np.random.RandomState(0).randn(3, 16, 16, 3).astype(np.float32)
  with torch.no_grad():
    expected = net.eval()(torch.from_numpy(x).permute(0, 3, 1, 2)).numpy()
  (params, stats), count = torchvision.from_torch(state, like(18, 'cifar', 4))
  values = {'params': params, 'batch_stats': stats}
  ours = jax.jit(lambda v, x: resnet.make(18, 'cifar', 4).apply(v, x, False))(values, x)
  assert count == 100 and np.abs(expected).max() > 0.1
  np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)
  torch_output = torchvision.torch_features(torchvision.Architecture(18, 'cifar', 4))(state, x)
  np.testing.assert_allclose(torch_output, expected, rtol=1e-5, atol=1e-5)
  assert 'in plain torch: features of 8 images differ' in '\n'.join(exported[4])


@pytest.mark.parametrize(
  'architecture', [(18, 'imagenet', 8), (10, 'imagenet', 64), (50, 'half', 4), (18, 'solo', 4)]
)
def test_what_is_printed_builds_it_in_torch(architecture, tmp_path):
  torch = pytest.importorskip('torch')
  pytest.importorskip('torchvision')
  architecture, scope = torchvision.Architecture(*architecture), {}
  state = random_state(
    architecture.depth, architecture.width, 7 if architecture.stem == 'imagenet' else 3
  )
  exec(torchvision.build_code(architecture, str(written(tmp_path / 'x.safetensors', state))), scope)
  x = np.random.RandomState(0).randn(3, 32, 32, 3).astype(np.float32)
  with torch.no_grad():
    torch_output = scope['net'](torch.from_numpy(x).permute(0, 3, 1, 2)).numpy()
  np.testing.assert_allclose(
    torch_output, torchvision.torch_features(architecture)(state, x), rtol=1e-4, atol=1e-4
  )

"""The configs' published constants, each beside its source; what they say of themselves; what a fork may change."""
import ast
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from equivariant_ssl import equivariance, invariance, nets, registry
from equivariant_ssl.config import load_config, resolve_config
from equivariant_ssl.nets import mlp
from equivariant_ssl.training import optim, recipe
from equivariant_ssl.types import Embeddings

FOLDER = pathlib.Path(__file__).parent.parent / 'configs'
NAMES = sorted(p.stem for p in FOLDER.glob('*.py'))

EQUIMOD = 'github.com/ADevillers/EquiMod: run_equimod_*.slurm, src/dataset.py'
ESSL = 'github.com/rdangovs/essl: cifar10/README.md, imagenet/*/main.py and README.md'
SOLO = 'github.com/vturrisi/solo-learn: scripts/pretrain/cifar/*.yaml'

# name: source, optimizer, batch, epochs, lr, weight decay, and what else its authors fixed.
PUBLISHED = {
    'cifar10_simclr': (EQUIMOD, 'lars', 512, 800, 4., 1e-6, {'invariance.temperature': .5, 'augment.crop.scale': (.2, 1.)}),
    'cifar10_simclr_equimod': (EQUIMOD, 'lars', 512, 800, 4., 1e-6, {
        'invariance.temperature': .5, 'equivariance.temperature': .2, 'equivariance.weight': 1.}),
    'cifar10_simclr_essl': (ESSL, 'sgd', 512, 800, .06 * 2, 5e-4, {
        'invariance.temperature': .5, 'invariance.negatives': 'cross', 'equivariance.weight': .4}),
    'cifar10_byol': (EQUIMOD, 'lars', 512, 800, 2., 1e-6, {'invariance.decay': .996, 'augment.blur.kernel': 3}),
    'cifar10_byol_equimod': (EQUIMOD, 'lars', 512, 800, 2., 1e-6, {
        'invariance.decay': .996, 'invariance.update': 'before', 'equivariance.temperature': .2, 'equivariance.weight': 1.,
        'augment.blur.p': 1., 'augment.second.blur.p': .1, 'augment.solarize.p': 0., 'augment.second.solarize.p': .2,
        'augment.jitter.saturation': .2}),
    'cifar10_simsiam': (ESSL, 'sgd', 512, 800, .03 * 2, 5e-4, {'invariance.predictor.hidden': (512,)}),
    'cifar10_simsiam_essl': (ESSL, 'sgd', 512, 800, .06 * 2, 5e-4, {
        'equivariance.weight': .4, 'equivariance.hidden_activation_last': False}),
    'cifar10_barlow': (SOLO, 'lars', 256, 1000, .3, 1e-4, {
        'optimizer.trust': .02, 'invariance.scale': .1, 'invariance.redundancy': .0051, 'augment.crop.scale': (.08, 1.)}),
    'cifar10_vicreg': (SOLO, 'lars', 256, 1000, .3, 1e-4, {
        'optimizer.trust': .02, 'invariance.similarity': 25., 'invariance.std': 2 * 25., 'invariance.cov': 1.,
        'augment.crop.scale': (.2, 1.), 'augment.solarize.p': .1}),
    'cifar10_care': ('github.com/Sharut/CARE: cifar10_cifar100_stl10/scripts/cifar10.sh', 'adam', 256, 400, 1e-3, 1e-6, {
        'invariance.temperature': .5, 'equivariance.weight': .03, 'equivariance.splits': 16, 'optimizer.end': 1e-3}),
    'stl10_simclr_augself': ('github.com/hankook/AugSelf: pretrain.py, trainers.py', 'sgd', 256, 200, .03, 5e-4, {
        'invariance.temperature': .2, 'equivariance.weight': 1., 'equivariance.hidden': (512, 512)}),
    'stl10_simclr_stl': ('github.com/jaemyung-u/stl: main.py, README.md', 'sgd', 256, 200, .03, 5e-4, {
        'equivariance.equivariant': 1., 'equivariance.transformation': .1, 'equivariance.temperature': .2}),
    'imagenet_simclr': (EQUIMOD, 'lars', 4096, 800, 2.4, 1e-6, {'invariance.temperature': .2, 'augment.jitter.hue': .2}),
    'imagenet_simclr_equimod': (EQUIMOD, 'lars', 4096, 800, 2.4, 1e-6, {
        'invariance.temperature': .2, 'equivariance.temperature': .2, 'equivariance.reference_side': .875}),
    'imagenet_byol': ('github.com/google-deepmind/deepmind-research: byol/configs', 'lars', 4096, 1000, .2 * 16, 1.5e-6, {
        'invariance.decay': .996, 'invariance.update': 'after', 'optimizer.lr_outside': True, 'batchnorm': 'view'}),
    'imagenet_byol_equimod': (EQUIMOD, 'lars', 4096, 1000, 4.8, 1.5e-6, {
        'invariance.decay': .996, 'invariance.update': 'before', 'equivariance.temperature': .2}),
    'imagenet_simclr_vit_s': ('github.com/facebookresearch/moco-v3', 'adamw', 4096, 300, 1.5e-4 * 16, .1, {
        'optimizer.warmup_epochs': 40., 'invariance.temperature': .2}),
    'imagenet_byol_essl': ('as imagenet_byol and imagenet_simclr_essl', 'lars', 4096, 1000, .2 * 16, 1.5e-6, {
        'equivariance.weight': .4, 'invariance.decay': .996}),
    'imagenet_simsiam': ('github.com/facebookresearch/simsiam: main_simsiam.py', 'sgd', 512, 100, .05 * 2, 1e-4, {
        'optimizer.cosine': 'epoch', 'optimizer.warmup_epochs': 0., 'optimizer.decay_all': True}),
    'imagenet_barlow': ('github.com/facebookresearch/barlowtwins: main.py', 'lars', 2048, 1000, .2 * 8, 1e-6, {
        'optimizer.bias_scale': .0048 / .2, 'optimizer.end': .2 * 8e-3, 'invariance.redundancy': .0051}),
    'imagenet_vicreg': ('github.com/facebookresearch/vicreg: main_vicreg.py, README.md', 'lars', 2048, 1000, .2 * 8, 1e-6, {
        'optimizer.end': .2 * 8e-3, 'optimizer.lr_outside': True}),
    'imagenet_simclr_essl': (ESSL, 'lars', 4096, 100, 4.8, 1e-6, {
        'invariance.temperature': .2, 'equivariance.weight': .4, 'equivariance.size': 96, 'optimizer.end': 4.8e-3,
        'equivariance.crop_scale': (.05, .14), 'equivariance.hidden': (2048, 2048, 128)}),
    'imagenet_barlow_essl': (ESSL, 'lars', 4096, 100, .2 * 16, 1e-6, {
        'equivariance.weight': 8., 'optimizer.bias_scale': .0048 / .2, 'equivariance.hidden': (2048, 2048, 256)}),
    'imagenet_simsiam_essl': (ESSL, 'sgd', 512, 100, .05 * 2, 1e-4, {'equivariance.weight': .08}),
}
# name: source, stem, init of the encoder's convolutions, and the deviation of the inputs where it is not the data set's.
ENCODERS = {
    **dict.fromkeys(('cifar10_simclr', 'cifar10_simclr_equimod', 'cifar10_byol', 'cifar10_byol_equimod'),
                    ('EquiMod: src/model.py', 'cifar', 'stem', ())),
    **dict.fromkeys(('cifar10_simclr_essl', 'cifar10_simsiam', 'cifar10_simsiam_essl'),
                    ('E-SSL: cifar10/resnet.py, main.py', 'cifar', 'torchvision', (.2023, .1994, .2010))),
    **dict.fromkeys(('cifar10_barlow', 'cifar10_vicreg'), (
        'solo-learn: solo/methods/base.py, data/pretrain_dataloader.py', 'solo', 'stem', (.2470, .2435, .2616))),
    'cifar10_care': ('CARE: cifar10_cifar100_stl10/model.py, dataset.py', 'cifar', 'stem', (.2023, .1994, .2010)),
    'stl10_simclr_augself': ('AugSelf: models.py, datasets.py', 'imagenet', 'torch', (.27, .26, .27)),
    'stl10_simclr_stl': ('STL: model.py, main.py', 'imagenet', 'torchvision', (.27, .26, .27)),
}
# fork: original, and the sections that differ.
FORKS = {
    'cifar10_simclr_equimod': ('cifar10_simclr', {'equivariance'}),
    'cifar10_byol_equimod': ('cifar10_byol', {'equivariance'}),
    'cifar10_byol_essl': ('cifar10_byol', {'equivariance', 'augment'}),
    'cifar10_simsiam_equimod': ('cifar10_simsiam', {'equivariance', 'batchnorm'}),
    'cifar10_simsiam_essl': ('cifar10_simsiam', {'equivariance', 'augment', 'optimizer'}),
    'cifar10_barlow_equimod': ('cifar10_barlow', {'equivariance', 'batchnorm'}),
    'cifar10_barlow_essl': ('cifar10_barlow', {'equivariance', 'augment'}),
    'cifar10_vicreg_equimod': ('cifar10_vicreg', {'equivariance', 'batchnorm'}),
    'cifar10_vicreg_essl': ('cifar10_vicreg', {'equivariance', 'augment'}),
    'imagenet_simclr_equimod': ('imagenet_simclr', {'equivariance'}),
    'imagenet_byol_essl': ('imagenet_byol', {'equivariance', 'augment'}),
}


@pytest.fixture(scope='module')
def loaded():
  return {name: load_config(name) for name in NAMES}


@pytest.mark.parametrize('name', NAMES)
def test_a_config_is_a_lab_notebook_and_imports_ml_collections_alone(name):
  tree = ast.parse((FOLDER / f'{name}.py').read_text())
  text = ast.get_docstring(tree)
  for word in ('Command:   ', 'Published: ', 'Measured:  '):
    assert f'\n{word}' in text, f'configs/{name}.py does not say {word.strip()}'
  assert f'--config {name} ' in text, 'the command is not its own'
  imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
  assert [ast.unparse(node) for node in imports] == ['from ml_collections import ConfigDict']


@pytest.mark.parametrize('name', PUBLISHED)
def test_published_constants(name, loaded):
  config, (source, optimizer, batch, epochs, lr, decay, more) = loaded[name], PUBLISHED[name]
  expected = {'optimizer.name': optimizer, 'batch': batch, 'epochs': epochs, 'optimizer.lr': lr,
              'optimizer.weight_decay': decay, **more}
  for path, value in expected.items():
    node = config
    for part in path.split('.'):
      node = node[part]
    assert node == (pytest.approx(value) if isinstance(value, float) else value), f'{path} is {node}; {source} has {value}'


@pytest.mark.parametrize('name', PUBLISHED)
def test_published_encoders(name, loaded):
  config = loaded[name]
  source, *expected = ENCODERS.get(name, ('torchvision', 'imagenet', 'torchvision', ()))
  if config.encoder.name == 'resnet':
    assert [config.encoder.stem, config.encoder.init, config.std] == expected, source


@pytest.mark.parametrize('name', ['cifar10_vicreg', 'cifar10_vicreg_equimod', 'cifar10_vicreg_essl'])
def test_vicreg_on_cifar_is_solo_learns(name, loaded):
  """25 mean (z1 - z2)^2 + 25 (V(z1) + V(z2)) + (C(z1) + C(z2)): in float64, from solo/losses/vicreg.py and vicreg.yaml."""
  z = np.random.default_rng(0).normal(size=(2, 9, 5)) * .4
  hinge = lambda x: np.maximum(1. - np.sqrt(x.var(0, ddof=1) + 1e-4), 0.).mean()
  off = lambda x: sum(c ** 2 for (i, j), c in np.ndenumerate(np.cov(x, rowvar=False)) if i != j) / x.shape[1]
  wanted = 25. * np.mean((z[0] - z[1]) ** 2) + 25. * (hinge(z[0]) + hinge(z[1])) + off(z[0]) + off(z[1])
  inv = registry.make(invariance, 'vicreg', **recipe.factory_arguments(loaded[name].invariance, 'projector'))
  projected = jnp.float32(z.transpose(1, 0, 2))
  np.testing.assert_allclose(inv.loss(Embeddings(projected, projected, projected)), wanted, rtol=1e-6)


def test_the_command_evaluates_as_the_authors_did():
  of = lambda name: (FOLDER / f'{name}.py').read_text().split('--protocol ')[1].split()[0]
  essl = {n for n in NAMES if n.startswith('cifar10') and n.endswith('_essl')} | {'cifar10_simsiam'}
  assert len(essl) == 6
  others = {'cifar10_simclr', 'cifar10_simclr_equimod', 'cifar10_byol', 'cifar10_byol_equimod'}
  assert all('--protocol essl --seeds 0,1,2,3,4\n' in (FOLDER / f'{n}.py').read_text() for n in essl)  # the mean of five
  assert {of(n) for n in essl} == {'essl'} and {of(n) for n in others} == {'equimod'}


def test_every_method_has_its_configs():
  for method in ('simclr', 'byol', 'simsiam', 'barlow', 'vicreg'):
    assert {f'cifar10_{method}{arm}' for arm in ('', '_equimod', '_essl')} <= set(NAMES)
  assert {n for n in NAMES if n.startswith('imagenet')} <= set(PUBLISHED)


@pytest.mark.parametrize('name', FORKS)
def test_a_fork_changes_only_what_it_is_about(name, loaded):
  original, changed = FORKS[name]
  one, other = loaded[name], loaded[original]
  assert {k for k in one.keys() if one[k] != other[k]} == changed
  if 'augment' in changed:
    assert 'rotate' in one.augment and one.augment.rotate.role == 'sensitive'
    assert {one.augment[op].role for op in one.augment.order} == {'invariant', 'sensitive'}


@pytest.mark.parametrize('name', NAMES)
def test_the_factories_take_their_settings(name, loaded):
  config = loaded[name]
  for view in range(2):
    on = [name for name in config.augment.order if config.augment[name].role != 'off']
    assert list(recipe.build_ops(config, view, config.size, {})) == on
  registry.make(nets, config.encoder.name, **recipe.factory_arguments(config.encoder), dtype=config.dtype)
  registry.make(invariance, config.invariance.name, **recipe.factory_arguments(config.invariance, 'projector', 'predictor'))
  for part in ('projector', 'predictor'):
    if part in config.invariance:
      mlp.make(**config.invariance[part], dtype=config.dtype)
  registry.make(equivariance, config.equivariance.name,
               **recipe.factory_arguments(config.equivariance, 'weight', 'augmentations'))
  optim.OPTIMIZERS[config.optimizer.name](
      lambda count: 1., **recipe.factory_arguments(config.optimizer, 'lr', 'warmup_epochs', 'end', 'cosine'))


@pytest.mark.parametrize('name', NAMES)
def test_a_section_may_take_another_name(name):
  for over in ({'encoder.name': 'vit'}, {'encoder.name': 'resnet'}, {'equivariance.name': 'none'},
               {'invariance.name': 'byol'}, {'invariance.name': 'none'}, {'optimizer.name': 'adam'},
               {'data.name': 'folder', 'data.path': 'x'}):
    config = load_config(name, over)
    assert all(config[k.split('.')[0]][k.split('.')[1]] == v for k, v in over.items())


def test_the_lines_in_the_docs_are_config_lines():
  pages = sorted((FOLDER.parent / 'docs' / 'methods').glob('*.md'))
  text = '\n'.join(page.read_text() for page in pages)
  blocks = [block.split('```')[0] for block in text.split('```python\n')[1:]]
  assert len(blocks) == 4
  for block in blocks:
    lines = ast.literal_eval('{' + block + '}')
    config = resolve_config(ConfigDict({**load_config('smoke').to_dict(), **lines}))
    for key, given in lines.items():
      sections = zip(given, config[key], strict=True) if isinstance(given, list) else [(given, config[key])]
      for section, resolved in sections:
        expected = {'name': section} if isinstance(section, str) else section
        expected = {k: v for k, v in expected.items() if k != 'projector'}
        assert {k: resolved[k] for k in expected} == expected

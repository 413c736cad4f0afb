"""`import equivariant_ssl as es`: what each name of api.py does, and that the examples of its docstrings run."""
import contextlib
import doctest
import inspect
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import equivariant_ssl as es
from equivariant_ssl import api, encoder, run_arguments
from equivariant_ssl.data import arrays
from equivariant_ssl.data.source import Split
from equivariant_ssl.errors import OTHER_DATA
from equivariant_ssl.evaluate import inputs
from equivariant_ssl.evaluate.frozen import frozen, variables
from equivariant_ssl.parallel import sharding
from equivariant_ssl.storage import checkpoint
from equivariant_ssl.training import loop, runs
from equivariant_ssl.types import Image

ROOT = pathlib.Path(api.__file__).parent.parent
EXAMPLES = {'steps': 2}
LABELS = np.arange(32) % 2
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (40, 16, 16, 3), np.uint8)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """A folder as the docstrings' examples mean it: runs/mine is a run of 'smoke' on arrays."""
  folder = tmp_path_factory.mktemp('library')
  with contextlib.chdir(folder):
    es.pretrain('smoke', (IMAGES[:32], LABELS), 'runs/mine', overrides=EXAMPLES, quiet=True)
  return folder


@pytest.fixture(scope='module')
def mine(folder):
  return es.load(folder / 'runs' / 'mine')


HEAVY = {'jax', 'flax', 'optax', 'orbax', 'numpy', 'scipy', 'sklearn', 'matplotlib', 'PIL', 'tensorflow_datasets', 'rich',
         'jinja2', 'ml_collections'}


def imported(code: str) -> set[str]:
  """The packages that a new process has imported after `code`."""
  code += '\nimport sys; print(*{name.partition(".")[0] for name in sys.modules})'
  ran = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
  return set(ran.stdout.splitlines()[-1].split())


def test_importing_is_lazy_and_the_help_too():
  """Neither imports anything that takes time, so both are there at once; the names are."""
  for code in ('import equivariant_ssl as es; assert "load" in dir(es)',
               'from equivariant_ssl import cli\ntry: cli.main(["--help"])\nexcept SystemExit: pass',
               'from equivariant_ssl import cli\ntry: cli.main(["train", "--help"])\nexcept SystemExit: pass'):
    assert not HEAVY & imported(code), code


def test_training_imports_no_package_of_evaluations_and_figures():
  """So that the second start of a run is short (docs/results.md has its seconds)."""
  unused = {'sklearn', 'matplotlib', 'tensorflow', 'tensorflow_datasets', 'jinja2'}
  assert not unused & imported('import equivariant_ssl.api, equivariant_ssl.training.loop')


def test_the_names_are_those_of_the_api():
  assert es.__all__ == api.__all__
  stub = (ROOT / 'equivariant_ssl' / '__init__.pyi').read_text(encoding='utf-8')
  assert sorted(re.findall(r'import (\w+) as', stub)) == es.__all__
  for name in es.__all__:
    thing = getattr(es, name)
    target = getattr(api, name)
    assert thing is target or inspect.unwrap(thing) is target
  assert callable(es.evaluate) and callable(es.study) and es.evaluate.inputs is inputs
  assert inspect.signature(es.evaluate) == inspect.signature(api.evaluate)
  with pytest.raises(AttributeError, match="no attribute 'lod'"):
    es.lod  # noqa: B018


DOCUMENTED = [*(getattr(api, name) for name in ('load', 'pretrain', 'evaluate', 'study', 'views', 'check_laws')),
              encoder.Encoder.features, encoder.Encoder.apply, encoder.Encoder.predict,
              encoder.Encoder.fine_tune_head, encoder.Encoder.embed]
CLASSES = [getattr(api, name) for name in ('Encoder', 'Classifier', 'Source', 'Split', 'UserError', 'LawError')]


@pytest.mark.parametrize('thing', [*DOCUMENTED, *CLASSES], ids=lambda thing: thing.__name__)
def test_the_examples_of_the_docstrings_run(thing, folder, monkeypatch):
  monkeypatch.chdir(folder)
  tests = doctest.DocTestFinder(recurse=False).find(thing, globs={'es': es, 'np': np, 'jax': jax, 'jnp': jnp})
  assert tests and all(test.examples for test in tests), f'{thing.__name__} has no example'
  flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE | doctest.IGNORE_EXCEPTION_DETAIL
  with jax.numpy_dtype_promotion('standard'), jax.numpy_rank_promotion('allow'):  # as users have it
    for test in tests:
      assert doctest.DocTestRunner(optionflags=flags).run(test).failed == 0


def test_every_public_name_has_an_example():
  names = {thing.__name__ for thing in [*DOCUMENTED, *CLASSES]}
  assert set(es.__all__) <= names


def test_every_public_function_says_its_shapes_and_errors():
  for thing in DOCUMENTED:
    assert 'UserError' in thing.__doc__ or 'LawError' in thing.__doc__ or thing.__name__ in ('apply', 'fine_tune_head')


# The encoder

def test_features_are_those_of_the_evaluations(mine, folder):
  """Of the run's own canvases, on all devices and on one."""
  run = runs.reopen_run(folder / 'runs' / 'mine', sharding.mesh(jax.devices()[:1]))
  state = checkpoint.load_checkpoint(folder / 'runs' / 'mine' / 'checkpoints', runs.abstract_state(run))[1]
  split = run.source.train
  encode = jax.tree_util.Partial(frozen(run.recipe).encode, variables(state))
  expected = inputs.features(encode, split, inputs.split_inputs(run.recipe.size, split))
  np.testing.assert_allclose(mine(split.images), expected, rtol=1e-5, atol=1e-6)
  assert mine(split.images).shape == (len(split.images), mine.dim) and mine.dim == 32


@pytest.mark.parametrize('height, width, canvas', [(40, 30, 16), (16, 16, 16), (12, 12, 16), (40, 30, 20), (16, 16, 20)])
def test_pixels_of_any_size_are_those_of_canvases(height, width, canvas):
  """An image as it is gives what a canvas of the whole image gives, where squashing loses nothing."""
  size = 16
  own = inputs.canvas_inputs(size, canvas)
  smooth = np.stack(np.broadcast_arrays(*np.meshgrid(np.linspace(.2, .8, height), np.linspace(0, 1, width),
                                                     indexing='ij'), .5), axis=-1).astype(np.float32)
  pixels = np.asarray(jax.jit(inputs.array_pixels, static_argnums=0)(own, smooth[None]))[0]
  assert pixels.shape == (size, size, 3)
  if height == width == canvas:
    expected = jax.jit(inputs.input_pixels, static_argnums=0)(own, Image(smooth, np.float32([height, width])))
    np.testing.assert_allclose(pixels, expected, atol=1e-6)
  # The box of the image that is cut: the gradients of the picture say where it begins and ends.
  top, left, tall, wide = (float(x) for x in inputs.box(own, np.array([height, width], np.float32)))
  if not height == width == size:
    assert abs(pixels[:, 0, 0].mean() - (.2 + .6 * (top + tall / 2))) < .03
    assert abs(pixels[0, :, 1].mean() - (left + wide / 2)) < .03


def test_floats_are_bytes_and_other_numbers_are_refused(mine):
  h = mine(IMAGES[:4])
  for same in (IMAGES[:4] / 255., (IMAGES[:4] / 255.).astype(np.float32), jnp.asarray(IMAGES[:4])):
    np.testing.assert_allclose(mine(same), h, atol=1e-5)
  gray = IMAGES[:2, ..., 0]
  np.testing.assert_array_equal(mine(gray), mine(np.repeat(gray[..., None], 3, axis=-1)))
  for wrong, words in ((IMAGES[:4].astype(np.float32), 'floats from 0 to 255'), (IMAGES[:4].astype(int), 'int64'),
                       (IMAGES[0], r'images\[None\]'), (IMAGES[:4] / 255. - .5, 'not in'), (IMAGES[:0], 'shape'),
                       (np.full((1, 16, 16, 3), np.nan), 'floats from nan'), (IMAGES[..., :2], 'shape')):
    with pytest.raises(es.UserError, match=words) as raised:
      mine(wrong)
    assert len(str(raised.value).splitlines()) == 2


def test_layers_and_batches(mine):
  h = mine(IMAGES)
  np.testing.assert_allclose(mine(IMAGES, batch=8), h, atol=1e-6)
  np.testing.assert_allclose(mine(IMAGES[:1]), h[:1], atol=1e-6)
  assert [mine.features(IMAGES[:2], layer=n).shape[1] for n in (1, 2, 3, 4)] == [4, 8, 16, 32]
  np.testing.assert_allclose(mine.features(IMAGES[:2], layer=4), h[:2], atol=1e-6)
  with pytest.raises(es.UserError, match='from 1 to 4'):
    mine.features(IMAGES[:2], layer=5)


def test_apply_is_a_pure_function_of_weights_and_images(mine):
  x = jnp.asarray(IMAGES[:2] / 255., jnp.float32)
  np.testing.assert_allclose(jax.jit(mine.apply)(mine.variables, x), mine(IMAGES[:2]), atol=1e-5)
  gradient = jax.jit(jax.grad(lambda v: jnp.square(mine.apply(v, x)).mean()))(mine.variables)
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradient['params']))
  assert any(np.abs(g).max() > 0 for g in jax.tree.leaves(gradient['params']['encoder']))
  head = mine.fine_tune_head(3)
  loss = jax.jit(jax.value_and_grad(lambda v: -jax.nn.log_softmax(head.apply(v, x))[:, 0].mean()))
  before, gradient = loss(head.variables)
  after = jax.tree.map(lambda a, g: a - .1 * g, head.variables, gradient)
  assert loss(after)[0] < before


def test_predictions_are_those_of_the_run(mine):
  """`predict` of the reference's features and a view's action is the answer that training computes of the pair."""
  recipe = mine.recipe
  views = es.views('smoke', IMAGES[:4], overrides=EXAMPLES)
  apply = recipe.network.apply

  @jax.jit
  def trained(variables, views):
    features = {g: apply(variables, views[g].images, False, method='encode') for g in views}
    actions = {g: views[g].actions for g in views}
    pair = apply(variables, 'equimod', recipe.equivariances, features, actions, False, method='pair')
    return features, apply(variables, 'equimod', pair, False, method='answer')
  features, answer = trained(mine.variables, views)
  expected = np.asarray(answer).reshape(4, 2, -1)
  for v in range(2):
    action = jax.tree.map(lambda a, v=v: a[:, v], views['views'].actions)
    np.testing.assert_allclose(mine.predict(features['reference'][:, 0], action), expected[:, v], atol=1e-4)
  h = mine(IMAGES[:4])
  turned, still = mine.predict(h, {'rotate': {'turns': 1}}), mine.predict(h, {})
  assert turned.shape == mine.embed(h).shape and np.abs(turned - still).max() > 1e-3
  np.testing.assert_allclose(mine.predict(h, {'rotate': {'turns': np.full(4, 1)}}), turned, atol=1e-6)


@pytest.mark.parametrize('action, words', [
    ({'turn': {}}, "Did you mean 'rotate'|It has"), ({'rotate': {'turn': 1}}, "Did you mean 'turns'"),
    ({'rotate': {'turns': [1, 2]}}, 'has the shape'),
])
def test_actions_that_do_not_fit(action, words, mine):
  with pytest.raises(es.UserError, match=words):
    mine.predict(mine(IMAGES[:4]), action)


# Training on one's own data

def test_arrays_are_kept_in_the_run(folder):
  run = folder / 'runs' / 'mine'
  file, = run.glob('arrays-*.npz')
  with np.load(file) as arrays:
    assert np.array_equal(arrays['images'], IMAGES[:32])
  before = file.read_bytes()
  es.pretrain('smoke', (IMAGES[:32] / 255., LABELS), run, overrides=EXAMPLES, quiet=True)  # the same: it is done already
  assert list(run.glob('*.npz')) == [file] and file.read_bytes() == before
  with pytest.raises(es.UserError, match='not the data that the run knows') as raised:
    es.pretrain('smoke', (IMAGES[8:40], LABELS), run, overrides=EXAMPLES, quiet=True)
  assert raised.value.code == OTHER_DATA and list(run.glob('*.npz')) == [file]


def test_what_is_given_as_data(tmp_path, monkeypatch):
  """A path or a name becomes the config's section `data`; the run is not trained here."""
  trained = []
  monkeypatch.setattr(loop, 'train', lambda config, workdir, *rest, **more: trained.append(config))
  (tmp_path / 'photos').mkdir()
  (tmp_path / 'set').mkdir()
  (tmp_path / 'set' / 'dataset_info.json').write_text('{}')
  cases = {
      None: {'name': 'digits'}, 'digits': {'name': 'digits'},
      str(tmp_path / 'photos'): {'name': 'folder', 'path': str(tmp_path / 'photos'), 'size': 16},
      tmp_path / 'set': {'name': 'tfds', 'dataset': str(tmp_path / 'set')},
      'mine.npz': {'name': 'arrays', 'path': 'mine.npz'}}
  for given, expected in cases.items():
    es.pretrain('smoke', given, tmp_path / 'run')
    assert expected.items() <= trained[-1].data.to_dict().items()
  es.pretrain('smoke', IMAGES, tmp_path / 'kept', overrides={'data.test': 0., 'batch': 8})
  assert trained[-1].data.test == 0. and trained[-1].data.name == 'arrays' and trained[-1].batch == 8
  es.pretrain({'size': 16, 'encoder': {'name': 'resnet'}, 'augment': {'order': ('crop',), 'crop': {}}}, 'digits', tmp_path / 'run')
  assert trained[-1].augment.order == ('crop',)
  images = [np.zeros((40, 30, 3), np.uint8)] * 4  # of no one size, so that data.size is that of their canvases
  with pytest.raises(es.UserError, match="config.data has no 'tset'"):
    es.pretrain('photos', images, tmp_path / 'sizes', overrides={'data.tset': .1})
  assert not list((tmp_path / 'sizes').glob('*'))
  es.pretrain('photos', images, tmp_path / 'sizes', overrides={'data.size': 48})
  with np.load(trained[-1].data.path) as file:
    assert file['images'].shape == (4, 48, 48, 3)
  with pytest.raises(es.UserError, match="Did you mean 'digits'"):
    es.pretrain('smoke', 'digit', tmp_path / 'run')
  with pytest.raises(es.UserError, match='a config is a name'):
    es.pretrain(3, None, tmp_path / 'run')
  with pytest.raises(es.UserError, match='needs a folder'):
    es.pretrain('smoke')


def test_overrides_are_numbers_and_paths_of_any_library():
  config = run_arguments.to_config('smoke', {
      'optimizer.lr': np.float64(.1), 'steps': np.int64(7), 'mean': np.full(3, .5), 'std': [np.float32(.25)] * 3,
      'probe': np.bool_(True), 'data.name': 'folder', 'data.path': pathlib.Path('my photos'), 'seed': jnp.int32(3)})
  assert (config.optimizer.lr, config.steps, config.mean, config.std) == (.1, 7, (.5,) * 3, (.25,) * 3)
  assert (config.probe, config.data.path, config.seed) == (True, 'my photos', 3)


def test_evaluate_and_study_know_their_options(folder):
  with pytest.raises(es.UserError, match="Did you mean 'epochs'"):
    es.evaluate(folder / 'runs' / 'mine', 'knn', epoch=3)
  with pytest.raises(es.UserError, match="Did you mean 'seeds'"):
    es.study('smoke', ['rotate'], folder / 'study', seed=(3,))
  with pytest.raises(es.UserError, match="Did you mean 'linear'"):
    es.evaluate(folder / 'runs' / 'mine', ['knn', 'liner'])


def test_an_export_is_an_encoder(mine, folder):
  from equivariant_ssl.export.exporting import export
  out = export(folder / 'runs' / 'mine', folder / 'out', say=lambda line: None)
  exported = es.load(out)
  images = RNG.integers(0, 256, (3, 21, 30, 3), np.uint8)
  np.testing.assert_allclose(exported(images), mine(images), rtol=1e-4, atol=1e-5)
  assert exported.step == mine.step and exported.size == mine.size and 'dim=32' in repr(exported)
  with pytest.raises(es.UserError, match='the encoder alone'):
    exported.predict(exported(images), {})
  content = (out / 'model.safetensors').read_bytes()
  (out / 'model.safetensors').write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
  with pytest.raises(es.UserError, match='damaged'):
    es.load(out)


def test_a_split_of_views_is_the_runs_own(mine):
  views = es.views('smoke', [IMAGES[0], IMAGES[1][:12]], overrides=EXAMPLES, seed=3)
  again = es.views('smoke', [IMAGES[0], IMAGES[1][:12]], overrides=EXAMPLES, seed=3)
  assert views['views'].images.shape == (2, 2, 16, 16, 3) and views['reference'].images.shape == (2, 1, 16, 16, 3)
  assert np.array_equal(views['views'].images, again['views'].images)
  np.testing.assert_allclose(views['reference'].images[0, 0] * 255., IMAGES[0], atol=1e-3)
  assert isinstance(arrays.to_split([IMAGES[0], IMAGES[1][:12]], 16), Split)


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch):
  """Each ```python block of README and docs/library.md that uses the library; the one that both have runs once."""
  monkeypatch.chdir(tmp_path)
  mesh = sharding.mesh  # a device is enough: the step over eight is tested elsewhere, and takes longer to compile
  monkeypatch.setattr(sharding, 'mesh', lambda devices=None: mesh(devices or jax.devices()[:1]))
  pages = [(ROOT / page).read_text(encoding='utf-8') for page in ('README.md', 'docs/library.md')]
  blocks = dict.fromkeys(block for text in pages for block in re.findall(r'```python\n(.*?)```', text, re.DOTALL)
                         if 'import equivariant_ssl as es' in block)
  assert blocks
  for block in blocks:
    names = {}
    with jax.numpy_dtype_promotion('standard'), jax.numpy_rank_promotion('allow'):
      exec(compile(block, 'README.md', 'exec'), names)
    assert len(names['features']) == len(names['images']) == len(names['turned'])

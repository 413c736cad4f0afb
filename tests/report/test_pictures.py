"""Pictures: the views are the step's, exactly the ops that did something are named, the right view
is first, and neighbors are those of a brute-force search."""

import html
import io
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from PIL import Image as Pillow

from equivariant_ssl import augment, data, registry
from equivariant_ssl.augment.blur import Blur
from equivariant_ssl.augment.crop import Crop
from equivariant_ssl.augment.jitter import Jitter
from equivariant_ssl.augment.rotate import Rotate
from equivariant_ssl.config import load_config
from equivariant_ssl.errors import UserError
from equivariant_ssl.evaluate import retrieval
from equivariant_ssl.evaluate.features import features
from equivariant_ssl.evaluate.frozen import bank, frozen, indexed_images, variables
from equivariant_ssl.evaluate.gains import predictions
from equivariant_ssl.parallel import sharding
from equivariant_ssl.report import gallery, maps, neighbor_tiles, pictures
from equivariant_ssl.storage import checkpoint
from equivariant_ssl.training import recipe, runs, step
from equivariant_ssl.training.loop import train
from equivariant_ssl.types import Pair

M = 12  # views of a bank
VIEW = pictures.to_uint8


@pytest.fixture(scope='module')
def digits():
  """A run on the digits, its frozen functions, and its state.

  It is untrained, because the tests hold for any weights.
  """
  run = runs.prepare_run(load_config('smoke'), sharding.mesh(jax.devices()[:1]))
  return run, frozen(run.recipe, views=M), runs.initial_state(run)


def step_views(config_recipe, key, batch):
  return jax.device_get(jax.jit(lambda k, b: step.draw_views(config_recipe, k, 0, b))(key, batch))


def test_the_gallery_is_the_first_step(digits):
  run, tests = digits[0], digits[0].source.test
  tiles = pictures.gallery(run, 3)
  expected = step_views(run.recipe, run.key, step.Batch(tests.images[:3], tests.sizes[:3]))
  assert list(tiles) == list(run.recipe.groups) and set(tiles) == {'views', 'reference'}
  for name, rows in tiles.items():
    assert len(rows) == 3
    for i, (original, *views) in enumerate(rows):
      np.testing.assert_array_equal(original.pixels, tests.images[i])
      np.testing.assert_array_equal(
        [t.pixels for t in views], VIEW(expected[name].images[i])
      )  # bitwise
  assert all(row[1].lines == (pictures.PLAIN,) for row in tiles['reference'])


@pytest.mark.slow
def test_a_group_of_every_choice_is_shown_whole():
  config_recipe = recipe.make_recipe(
    load_config('smoke', {'equivariance': 'essl', 'augment.rotate.role': 'sensitive'}), 64, 16
  )
  batch = step.Batch(
    np.arange(2 * 16 * 16 * 3, dtype=np.uint32).astype(np.uint8).reshape(2, 16, 16, 3),
    np.full((2, 2), 16, np.float32),
  )
  tiles, expected = (
    pictures.view_tiles(config_recipe, jax.random.key(3), batch),
    step_views(config_recipe, jax.random.key(3), batch),
  )
  for row, views in zip(tiles['essl'], VIEW(expected['essl'].images), strict=True):
    np.testing.assert_array_equal([t.pixels for t in row[1:]], views)
    turns = [''.join(re.findall(r'rotate (\d+)°', ' '.join(t.lines))) for t in row[1:]]
    assert turns == ['', '90', '180', '270']


@pytest.fixture(scope='module')
def everything():
  """(chain of all ops that there are, 60 of its actions, what each op tells of each)."""
  make = lambda name: registry.make(
    augment,
    name,
    **{k: v for k, v in (('size', 32), ('p', 0.5)) if k in registry.schema(augment, name)},
  )
  ops = [make(name) for name in registry.names(augment)]
  chain, size = augment.chain(*ops), jnp.full(2, 40.0)
  actions = jax.device_get(
    jax.jit(jax.vmap(lambda k: chain.sample(k, size)))(jax.random.split(jax.random.key(0), 60))
  )
  encodings = jax.device_get(
    jax.jit(jax.vmap(lambda a: {op.name: op.encode(a[op.name]) for op in ops}))(actions)
  )
  return chain, actions, encodings


def test_exactly_the_ops_that_did_something_are_named(everything):
  """An op did something where its encoding is not 0."""
  chain, actions, encodings = everything
  nothing, met = pictures.host_identity(chain, 40), set()
  for i in range(60):
    did = [name for name in chain.name.split('+') if np.any(encodings[name][i] != 0)]
    lines = pictures.describe(pictures.take(actions, i), nothing)
    assert [line.split()[0] for line in lines] == did  # in the order of application
    met |= set(did)
  assert met == set(chain.name.split('+'))
  assert pictures.describe(nothing, nothing) == (pictures.PLAIN,)


def test_actions_in_words():
  f = np.float32
  nothing = {
    'crop': Crop(*map(f, (0, 0, 1, 1))),
    'jitter': Jitter(np.False_, np.arange(4), f(1), f(1), f(1), f(0)),
    'rotate': Rotate(np.int32(0)),
    'blur': Blur(np.False_, f(0)),
  }
  action = {
    'blur': Blur(np.True_, f(1.256)),
    'crop': Crop(f(0.1), f(0.25), f(0.8), f(0.775)),
    'rotate': Rotate(np.int32(3)),
    'jitter': Jitter(np.True_, np.array([3, 0, 2, 1]), f(1.3), f(0.805), f(1), f(-0.05)),
  }
  assert pictures.describe(action, nothing) == (
    'crop 62 % of the area, at (.1, .25)',
    'jitter hue -.05 turns → brightness ×1.3 → contrast ×.81',
    'rotate 270° counter-clockwise',
    'blur sigma 1.26 px',
  )
  assert [pictures.number(v) for v in (0.0, 1.0, -0.3, 12.34, 0.0034, 180.0)] == [
    '0',
    '1',
    '-.3',
    '12.3',
    '.0034',
    '180',
  ]


def test_pixels_survive_a_file_and_a_canvas_is_set_upright():
  pixels = np.random.RandomState(0).randint(0, 256, (12, 12, 3)).astype(np.uint8)
  np.testing.assert_array_equal(np.asarray(Pillow.open(io.BytesIO(pictures.png(pixels)))), pixels)
  assert pictures.upright(pixels, np.array([9.0, 9.0])) is pixels
  assert pictures.upright(pixels, np.array([300.0, 600.0])).shape == (6, 12, 3)


def test_a_perfect_predictor_finds_the_right_one_first(digits):
  run, fixed, state = digits
  perfect = fixed._replace(answer={'equimod': lambda values, pair: pair.target})
  rows = pictures.strips(run, perfect, state, 3)['equimod']
  assert len(rows) == 3
  for i, (query, requested, best, *others) in enumerate(rows):
    np.testing.assert_array_equal(query.pixels, run.source.test.images[i])
    assert query.lines == ('query', pictures.PLAIN) and requested.lines[:2] == (
      'requested',
      f'retrieved at rank 1 of {M}',
    )
    assert (
      best.lines[:2] == ('1. cosine 1.000', '✓ the right one')
      and best.lines[2:] == requested.lines[2:]
    )
    np.testing.assert_array_equal(best.pixels, requested.pixels)
    assert len(others) == 4 and not any('✓' in line for t in others for line in t.lines)
  blind = fixed._replace(answer={'equimod': lambda values, pair: -pair.target})
  assert all(
    row[1].lines[1] == f'retrieved at rank {M} of {M}'
    for row in pictures.strips(run, blind, state, 3)['equimod']
  )
  assert pictures.strips(run, fixed._replace(banks={}), state) == {}


def test_a_strip_ranks_as_the_protocol_does(digits):
  run, fixed, state = digits
  h, actions = bank(fixed, state, 'equimod', indexed_images(run.source.test, slice(4)), batch=4)
  before, after = (jax.tree.map(lambda a, m=m: a[:, m], actions) for m in range(2))
  guess = predictions(
    Partial(fixed.answer['equimod'], variables(state)), Pair(h[:, 0], h[:, 1], before, after), 4
  )
  expected = retrieval.ranks(guess[:, None], h, 1)[:, 0]
  rows = pictures.strips(run, fixed, state, 4)['equimod']
  assert [int(row[1].lines[1].split()[3]) for row in rows] == expected.tolist()
  for row in rows:
    cosines = [float(t.lines[0].split()[-1]) for t in row[2:]]
    assert cosines == sorted(cosines, reverse=True) and len(cosines) == 5


def test_a_view_of_the_same_action_is_right_too():
  actions = {'rotate': Rotate(np.array([0, 1, 1, 2]))}
  view = lambda a: np.stack([np.full((2, 2, 3), t / 4) for t in a['rotate'].turns])
  order, cosines, nothing = (
    np.array([3, 2, 1, 0]),
    np.array([0.9, 0.5, 0.4, 0.1]),
    {'rotate': Rotate(np.array(0))},
  )
  row = pictures._strip(actions, order, cosines, view, nothing)
  assert row[1].lines[1] == 'retrieved at rank 2 of 4'
  assert [len(t.lines) == 3 for t in row[2:]] == [False, True, True, False]  # marked
  assert [int(t.pixels[0, 0, 0]) for t in row] == [0, 64, 128, 64, 64, 0]


def brute(queries, bank):
  """Cosines [Q N] in float64, one pair at a time."""
  return np.array(
    [
      [np.dot(q, b) / np.sqrt(np.dot(q, q) * np.dot(b, b)) for b in bank.astype(np.float64)]
      for q in queries.astype(np.float64)
    ]
  )


def test_nearest_is_brute_force(monkeypatch):
  monkeypatch.setattr(pictures, 'CHUNK', 7)
  random = np.random.RandomState(0)
  queries, bank_ = random.randn(5, 6).astype(np.float32), random.randn(40, 6).astype(np.float32)
  bank_[30] = 2 * bank_[3]  # as near, later in the bank
  order, cosines = pictures.nearest(queries, bank_, 40)
  expected = brute(queries, bank_)
  np.testing.assert_array_equal(order, np.argsort(-expected.round(12), axis=1, kind='stable'))
  np.testing.assert_allclose(cosines, -np.sort(-expected, axis=1), atol=1e-12)


@pytest.mark.parametrize('held', [True, False])
def test_neighbors_are_brute_force(digits, held):
  run, fixed, state = digits
  run = run if held else run._replace(source=run.source._replace(test=None))
  train_, tests = run.source.train, run.source.test or run.source.train
  encode = Partial(fixed.encode, variables(state))
  h, ht = (features(encode, part.images, mesh=run.mesh) for part in (train_, tests))
  tiles = neighbor_tiles.neighbors(run, fixed, state, 4, 5)
  assert len(tiles) == 4
  files = run._replace(source=run.source._replace(names=tuple(f'd/{i}.png' for i in range(len(train_.images)))))
  named = neighbor_tiles.neighbors(files, fixed, state, 4, 5)
  for (query, *near), i in zip(tiles, pictures.sample(len(tests.images), 4), strict=True):
    assert query.lines == ('query', str(tests.labels[i]))
    np.testing.assert_array_equal(query.pixels, tests.images[i])
    cosines = brute(ht[i : i + 1], h)[0]
    if not held:
      cosines[i] = -2.0  # itself
    for tile, j in zip(near, np.argsort(-cosines, kind='stable'), strict=False):
      same = ' ✓ same class' if train_.labels[j] == tests.labels[i] else ''
      assert tile.lines == (f'cosine {cosines[j]:.3f}{same}', str(train_.labels[j]))
      np.testing.assert_array_equal(tile.pixels, train_.images[j])
    assert len(near) == 5
  for plain, row in zip(tiles, named, strict=True):  # the class, and then the file
    assert [tile.lines[:-1] for tile in row[1:]] == [tile.lines for tile in plain[1:]]
    assert all(np.array_equal(tile.pixels, train_.images[int(tile.lines[-1][2:-4])]) for tile in row[1:])
    assert row[0].lines[: len(plain[0].lines)] == plain[0].lines and (row[0].lines == plain[0].lines) == held


@pytest.fixture
def small(monkeypatch):
  monkeypatch.setattr(maps, 'BY_CLASS', 60)
  monkeypatch.setattr(maps, 'BY_ACTION', 48)


def test_maps_are_finite(digits, small):
  run, fixed, state = digits
  feature_maps = maps.maps(run, fixed, state)
  by = [k.removeprefix('PCA ').removeprefix('t-SNE ') for k in feature_maps]
  assert by[:2] == ['by class'] * 2 and by[2::2] == by[3::2] and 'by action: rotate' in by
  for name, m in feature_maps.items():
    N = 60 if 'class' in name else 48
    assert m.points.shape == (N, 2) and m.points.dtype == np.float32 and np.isfinite(m.points).all()
    assert (
      m.labels.shape == (N,)
      and m.labels.min() >= 0
      and m.labels.max() < len(m.names)
      and str(N) in m.about
    )
    assert np.ptp(m.points, axis=0).min() > 0
  turned = feature_maps['PCA by action: rotate']
  assert (
    np.bincount(turned.labels).tolist() == [12] * 4
    and turned.names[1] == 'rotate 90° counter-clockwise'
  )


def test_views_of_an_op_alone_are_of_their_color(digits, small):
  run = digits[0]
  chain, tests = maps._ops(run)['rotate'], run.source.test.images
  actions, views = maps._views_of_op(run, chain, 'rotate')
  _, labels, names = maps._coloring(views.reshape(48, -1) / 255, chain, 'rotate', actions, 16)
  np.testing.assert_array_equal(labels, actions.turns)
  for i, image in enumerate(tests[pictures.sample(len(tests), 12)]):
    np.testing.assert_array_equal(views[4 * i : 4 * i + 4], [np.rot90(image, k) for k in range(4)])


def test_a_map_is_the_same_twice():
  h, labels = np.random.RandomState(0).randn(200, 8).astype(np.float32), np.zeros(200, int)
  first, again = (maps._pca_and_tsne(h, labels, ('',), 'of noise', '200 images') for _ in range(2))
  for name, m in first.items():
    np.testing.assert_array_equal(again[name].points, m.points)
    assert again[name].about == m.about
  assert maps._pca_and_tsne(h[:4], labels[:4], ('',), 'of noise', '4 images') == {}


def test_maps_without_labels_of_many_classes_and_of_nothing(digits, small, monkeypatch):
  run, fixed, state = digits
  one = fixed._replace(encode=lambda values, images: jnp.ones((images.shape[0], 4)))  # collapsed
  assert maps.maps(run, one, state) == {}
  monkeypatch.setattr(maps, '_by_action', lambda *args: {})
  source = run.source
  bare = run._replace(source=source._replace(test=source.test._replace(labels=None)))
  feature_maps = maps.maps(bare, fixed, state)
  assert list(feature_maps)[:2] == ['PCA of images', 't-SNE of images'] and feature_maps[
    'PCA of images'
  ].names == ('test images',)
  many = run._replace(
    source=source._replace(
      test=source.test._replace(labels=np.arange(797) % 40),
      classes=tuple(f'c{k}' for k in range(40)),
    )
  )
  m = maps.maps(many, fixed, state)['PCA by class']
  assert len(m.names) == 10 == len(np.unique(m.labels)) and '10 of the 40 classes' in m.about


def test_a_map_shows_the_field_that_moves_the_features():
  random = np.random.RandomState(0)
  action = Jitter(np.ones(200, bool), random.rand(200, 4), *random.rand(4, 200).astype(np.float32))
  h = np.outer(action.saturation, random.randn(5)) + 0.01 * random.randn(200, 5)
  chain = augment.chain(registry.make(augment, 'jitter'))
  share, labels, names = maps._coloring(h, chain, 'jitter', action, 8)
  assert share > 0.8 and [n.split()[0] for n in names] == ['saturation'] * 4
  assert np.bincount(labels).tolist() == [50] * 4
  for k in range(3):
    assert action.saturation[labels == k].max() <= action.saturation[labels == k + 1].min()
  still = jax.tree.map(np.ones_like, action)
  assert maps._coloring(h, chain, 'jitter', still, 8)[0] == 0.0


def test_the_page_shows_the_config(digits, tmp_path):
  out = gallery.write_gallery(load_config('smoke'), out=tmp_path / 'augs.html', count=2)
  text = html.unescape(out.read_text())
  tiles = [t for rows in pictures.gallery(digits[0], 2).values() for row in rows for t in row]
  assert text.count('<img ') == len(tiles)
  assert all(f'alt="{"; ".join(t.lines)}"' in text for t in tiles)
  assert all(line in text for t in tiles for line in t.lines)
  for line in (
    'Chain: crop, then flip, then rotate.',
    'read by the invariance and equimod',
    'flip: p 0.5.',
    'equimod is conditioned on crop, rotate.',
    'is in the views of the invariance, and the equivariance is conditioned on it',
  ):
    assert line in text, line
  assert '://' not in text and '<script src' not in text


def test_the_page_of_a_file_needs_no_data_and_keeps_its_size(tmp_path, monkeypatch):
  pixels = np.random.RandomState(0).randint(0, 256, (40, 80, 3)).astype(np.uint8)
  Pillow.fromarray(pixels).save(tmp_path / 'wide.png')
  config = load_config('smoke', {'probe': 'True'})
  monkeypatch.setattr(
    registry,
    'make',
    lambda package, *a, real=registry.make, **kw: (
      1 / (package is not data) and real(package, *a, **kw)
    ),
  )
  config_recipe, batch = gallery._file_batch(config, str(tmp_path / 'wide.png'), 2)
  assert batch.sizes.tolist() == [[40, 80]] * 2 and batch.images.shape == (2, 16, 16, 3)
  text = gallery.write_gallery(config, str(tmp_path / 'wide.png'), tmp_path / 'a.html', 2).read_text()
  assert 'the image, 40 x 80 pixels' in text
  crops = step_views(config_recipe, jax.random.key(0), batch)['views'].actions['crop']
  assert all(
    pictures._box('crop', pictures.take(crops, i, v)) in text for i in range(2) for v in range(2)
  )
  (tmp_path / 'no.png').write_bytes(b'no')
  for name in ('no.png', 'nowhere.png'):
    with pytest.raises(UserError, match=name):
      gallery.write_gallery(config, str(tmp_path / name), tmp_path / 'b.html')
  assert not (tmp_path / 'b.html').exists()


@pytest.mark.slow
def test_of_a_run_that_was_trained(tmp_path):
  config = load_config('smoke', {'steps': '100', 'encoder.width': '8'})
  train(config, tmp_path / 'run', quiet=True)
  run = runs.prepare_run(config)  # on all devices
  fixed, state = (
    frozen(run.recipe),
    checkpoint.load_checkpoint(tmp_path / 'run' / 'checkpoints', runs.abstract_state(run))[1],
  )
  assert [len(row) for row in pictures.strips(run, fixed, state)['equimod']] == [7] * 4
  near = neighbor_tiles.neighbors(run, fixed, state, 40, 5)
  assert (
    np.mean([tile.lines[-1] == row[0].lines[-1] for row in near for tile in row[1:]]) > 0.3
  )  # by chance .1
  feature_maps = maps.maps(run, fixed, state)
  assert {n: len(m.points) for n, m in feature_maps.items() if 'crop' not in n} == {
    'PCA by class': 797,
    't-SNE by class': 797,
    'PCA by action: rotate': 600,
    't-SNE by action: rotate': 600,
  }

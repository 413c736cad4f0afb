"""The online probe and kNN: logged, learning, and without any effect on what is trained."""
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from equivariant_ssl.config import load_config
from equivariant_ssl.errors import UserError
from equivariant_ssl.parallel import sharding
from equivariant_ssl.storage import record
from equivariant_ssl.training import loop, runs, step
from equivariant_ssl.training.recipe import Monitor
from equivariant_ssl.training.state import LinearHead, Probe

QUICK = {'steps': '10', 'log_every': '1', 'checkpoint_every': '100'}


def weights(state):
  return jax.tree.leaves(jax.tree.map(np.asarray, (state.params, state.stats, state.opt_state)))


def run(folder, **more):
  """(state, rows) of ten steps of the smoke config."""
  config = load_config(tiny.NAME, QUICK | more)
  return loop.train(config, folder, mesh=sharding.mesh(jax.devices()[:1]), quiet=True), record.read_metrics(folder)


@pytest.fixture(scope='module')
def monitored(tmp_path_factory):
  return run(tmp_path_factory.mktemp('online'), probe='True', knn_every='.08')


@pytest.mark.slow
def test_what_is_trained_is_bitwise_the_same(monitored, tmp_path):
  (without, rows), (with_, more) = run(tmp_path), monitored
  for a, b in zip(weights(without), weights(with_), strict=True):
    np.testing.assert_array_equal(a, b)
  assert [r['loss'] for r in rows] == [r['loss'] for r in more]
  assert without.extras == () and 'probe_top1' not in rows[0]


def test_both_are_logged_when_due(monitored):
  rows = monitored[1]
  assert rows[0]['probe_loss'] == pytest.approx(np.log(10), rel=1e-5)  # it starts at zero: the uniform answer
  assert all(0 <= r['probe_top1'] <= 1 for r in rows)
  per_epoch = round(rows[-1]['step'] / rows[-1]['epoch'])
  due = round(.08 * per_epoch)
  assert {r['step'] for r in rows if 'knn_top1' in r} == set(range(due, 11, due)) and 0 < due <= 5
  assert all(.1 < r['knn_top1'] <= 1 for r in rows if 'knn_top1' in r)


def test_the_probe_is_sgd_on_its_features(key):
  random = np.random.RandomState(0)
  y = random.randint(0, 3, 32)
  h = (np.eye(3)[y] @ random.randn(3, 5) + .1 * random.randn(32, 5)).astype(np.float32)
  recipe = SimpleNamespace(probe=Monitor(3, optax.sgd(.1, momentum=.9)))
  head = LinearHead(jnp.zeros((5, 3)), jnp.zeros(3))
  extras, w, memory, hits = Probe(head, recipe.probe.tx.init(head)), np.zeros((6, 3)), np.zeros((6, 3)), []
  one = np.concatenate([h, np.ones((32, 1))], axis=1, dtype=np.float64)
  for _ in range(20):
    extras, seen = step.probe_step(recipe.probe.tx, extras, jnp.asarray(h), jnp.asarray(y, jnp.int32))
    p = np.exp(one @ w)
    memory = .9 * memory + one.T @ (p / p.sum(1, keepdims=True) - np.eye(3)[y]) / 32
    hits.append((float(seen['probe_top1']), np.mean((one @ w).argmax(1) == y)))
    w = w - .1 * memory
  np.testing.assert_allclose(np.concatenate([extras.head.kernel, extras.head.bias[None]]), w, atol=1e-5)
  assert all(a == pytest.approx(b) for a, b in hits) and hits[-1][0] > .9
  loss = lambda h: step.probe_step(recipe.probe.tx, extras, h, jnp.asarray(y, jnp.int32))[1]['probe_loss']
  assert not jax.grad(loss)(jnp.asarray(h)).any()


@pytest.mark.parametrize('field', ['probe=True', 'knn_every=1'])
def test_without_labels_it_is_one_line(field, tmp_path):
  from PIL import Image
  (tmp_path / 'images').mkdir()
  for i in range(40):
    Image.fromarray(np.full((8, 8, 3), 6 * i, np.uint8)).save(tmp_path / 'images' / f'{i}.png')
  name, value = field.split('=')
  config = load_config(tiny.NAME, {'data.name': 'folder', 'data.path': str(tmp_path / 'images'), 'data.size': '8',
                                  'size': '8', 'batch': '16', name: value})
  with pytest.raises(UserError, match=f'config.{name} needs labels'):
    loop.train(config, tmp_path / 'run', mesh=sharding.mesh(jax.devices()[:1]), quiet=True)


def test_the_probe_watches_the_invariances_views_whatever_is_in_the_pass(monkeypatch):
  """E-SSL's views are smaller, and a joint BatchNorm passes the smallest first."""
  config = load_config(tiny.NAME, {'probe': 'True', 'batchnorm': 'joint', 'equivariance': 'essl',
                                   'augment.rotate.role': 'sensitive', 'batch': '4'})
  run = runs.prepare_run(config, sharding.mesh(jax.devices()[:1]))
  features = {'essl': jnp.zeros((4, 4, 3)), 'views': jnp.ones((4, 2, 3)), 'reference': jnp.full((4, 1, 3), 2.)}
  assert set(run.recipe.groups) == {'views', 'essl'} and run.recipe.groups['essl'].size < run.recipe.size
  for order in (features, dict(reversed(features.items()))):
    np.testing.assert_array_equal(step.probe_features(run.recipe, order), jnp.ones((4, 3)))
  # And the step gives the probe these.
  given = []
  monkeypatch.setattr(step, 'probe_features', lambda recipe, features: (given.append(set(features)), jnp.zeros((4, 7)))[1])
  state, split = runs.abstract_state(run), run.source.train
  batch = step.Batch(split.images[:4], split.sizes[:4])
  seen = jax.eval_shape(lambda state: step.loss(run.recipe, state.params, state.stats, step.draw_views(
      run.recipe, run.key, state.step, batch))[1][2], state)
  assert seen.shape == (4, 7) and given == [{'views', 'essl'}]

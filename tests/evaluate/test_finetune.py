"""Fine-tuning: which images, what a step does to head, backbone and statistics, and that a checkpoint is left alone."""
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from equivariant_ssl import errors
from equivariant_ssl.config import load_config
from equivariant_ssl.data.order import epoch_order
from equivariant_ssl.data.source import Source, Split
from equivariant_ssl.evaluate import finetune
from equivariant_ssl.keys import key_for
from equivariant_ssl.nets.conv import Conv, fan_out_init
from equivariant_ssl.nets.network import Network
from equivariant_ssl.nets.norm import BatchNorm
from equivariant_ssl.parallel import sharding
from equivariant_ssl.storage import fingerprint
from equivariant_ssl.training import runs
from equivariant_ssl.training.state import TrainState

K = 3


def plain(N, seed):
  """Images of one color each, which crops and flips leave alone, and their three classes."""
  random = np.random.RandomState(seed)
  labels = np.arange(N, dtype=np.int32) % K
  colors = random.randint(0, 100, (N, 3)) + 130 * np.eye(3, dtype=int)[labels]
  images = np.broadcast_to(colors[:, None, None, :], (N, 16, 16, 3)).astype(np.uint8)
  return Split(images, np.full((N, 2), 16, np.float32), labels)


class Tiny(nn.Module):
  """A convolution, BatchNorm and a mean over pixels: what compiles in a second. [N H W 3] -> [N 8]."""

  @nn.compact
  def __call__(self, x, train):
    return nn.relu(BatchNorm(name='bn')(Conv(8, 3, 2, 1, 'float32', fan_out_init, name='conv')(x), train)).mean((1, 2))


class Stub(NamedTuple):
  """What fine-tuning reads of a recipe."""
  network: Network
  size: int = 16


class Stubbed(NamedTuple):
  recipe: Stub
  source: Source
  mesh: None


@pytest.fixture(scope='module')
def recipe():
  return Stub(Network(Tiny(), None, None, {}))


@pytest.fixture(scope='module')
def state(recipe):
  variables = recipe.network.init(jax.random.key(1), jnp.zeros((1, 16, 16, 3)), method='encode')
  return TrainState(0, {**variables['params'], 'projector': {'bias': jnp.ones(3)}}, variables['batch_stats'], (), ())


@pytest.fixture(scope='module')
def colors():
  return Source('colors', plain(120, 0), plain(30, 1), ('r', 'g', 'b'), (0., 0., 0.), (1., 1., 1.))


def encoder(state):
  return {'params': {'encoder': state.params['encoder']}, 'batch_stats': {'encoder': state.stats['encoder']}}


def trained(recipe, state, data, **kw):
  data = Split(*(a[:12] for a in data))  # one shape for all tests: compiling is what costs
  kw = {'epochs': 4, 'batch': 6, **kw}
  return finetune.train(recipe.network, encoder(state), data, 16, K, jax.random.key(0), **kw)


# -- which images

def test_a_subset_is_a_share_of_every_class_and_smaller_ones_are_in_larger_ones(key):
  labels = np.random.RandomState(0).permutation(np.repeat(np.arange(4), [130, 30, 9, 1]))
  few, more = (finetune.subset(labels, 4, key, f) for f in (.01, .1))
  np.testing.assert_array_equal(np.bincount(labels[few]), [1, 1, 1, 1])
  np.testing.assert_array_equal(np.bincount(labels[more]), [13, 3, 1, 1])
  assert set(few) <= set(more) and len(set(more)) == len(more)
  np.testing.assert_array_equal(more, finetune.subset(labels, 4, key, .1))
  assert not np.array_equal(more, finetune.subset(labels, 4, jax.random.key(1), .1))
  np.testing.assert_array_equal(finetune.subset(labels, 4, key, 1.), np.arange(170))
  with pytest.raises(errors.UserError, match='Class 4 has no training image'):
    finetune.subset(labels, 5, key, .1)
  with pytest.raises(errors.UserError, match='not a share'):
    finetune.subset(labels, 4, key, 0.)


def test_a_published_list_is_matched_by_name(tmp_path):
  path = tmp_path / '1percent.txt'
  path.write_text('n01_2.JPEG\nb/same.png\n\nn00_1.JPEG\n')
  names = ['n00/n00_0.JPEG', 'n00/n00_1.JPEG', 'n01/n01_2.JPEG', 'a/same.png', 'b/same.png']
  images = finetune.read_list(path)
  np.testing.assert_array_equal(finetune.listed(images, names, 5), [1, 2, 4])
  np.testing.assert_array_equal(finetune.listed(np.array([3, 0]), None, 5), [0, 3])
  for wrong, known, match in ((['n00_1.JPEG', 'other'], names, '1 of the 2 listed .* other is not'),
                              (['same.png'], names, '0 of the 1'), ([0, 5], None, '1 of the 2'), ([], None, 'empty'),
                              (['n00_1.JPEG'], None, 'keeps no names'), ([2, 2], None, 'listed twice')):
    with pytest.raises(errors.UserError, match=match):
      finetune.listed(wrong, known, 5)
  with pytest.raises(errors.UserError, match='cannot be read'):
    finetune.read_list(tmp_path / 'no.txt')


# -- training

def test_the_head_is_torchs_sgd_and_a_rate_of_0_keeps_the_backbone(recipe, state, colors, key):
  before = fingerprint.fingerprints(state)
  found = trained(recipe, state, colors.train, lr_backbone=0., lr_head=.5)
  assert fingerprint.fingerprints(state) == before  # the checkpoint is whole, and not donated
  assert fingerprint.fingerprints(found.variables['params']) == fingerprint.fingerprints(encoder(state)['params'])
  assert fingerprint.fingerprints(found.variables['batch_stats']) != fingerprint.fingerprints(encoder(state)['batch_stats'])

  encode = jax.jit(lambda images: recipe.network.apply(
      encoder(state), images, True, method='encode', mutable=['batch_stats'])[0])
  D = found.head.kernel.shape[0]
  w = np.concatenate([.01 * np.asarray(jax.random.normal(key_for(key, 'init'), (D, K))), np.zeros((1, K))])
  w, memory, losses = w.astype(np.float64), 0., []
  for step in range(8):
    rows = np.asarray(epoch_order(key, step // 2, 12))[step % 2 * 6:][:6]
    h = np.asarray(encode(jnp.asarray(colors.train.images[rows], jnp.float32) / 255), np.float64)
    h, y = np.concatenate([h, np.ones((6, 1))], axis=1), colors.train.labels[rows]
    p = np.exp(h @ w)
    p /= p.sum(1, keepdims=True)
    losses.append(-np.log(p[np.arange(6), y]).mean())
    memory = .9 * memory + h.T @ (p - np.eye(K)[y]) / 6
    w = w - .5 * (1 + np.cos(np.pi * step / 8)) / 2 * memory
  np.testing.assert_allclose(np.concatenate([found.head.kernel, found.head.bias[None]]), w, atol=1e-3 * np.abs(w).max())
  np.testing.assert_allclose(found.losses, losses, rtol=1e-3)


def test_backbone_and_head_have_their_own_rates(recipe, state, colors, key):
  trace, step = finetune._step(recipe.network, 16, 6, None)
  images, sizes, labels = (a[:12] for a in colors.train)
  data = Split(sharding.flatten_canvases(images), sizes, labels)
  head = finetune.Head(jnp.ones((8, K)) * jnp.arange(K, dtype=jnp.float32)[None], jnp.zeros(K))
  def weight_changes(lr_backbone, lr_head):
    start = {'backbone': encoder(state)['params'], 'head': head}
    weights = jax.tree.map(jnp.copy, start)
    after = step((weights, jax.tree.map(jnp.copy, encoder(state)['batch_stats']), trace.init(weights)), key,
                 data, np.arange(12, dtype=np.int32), 0, 0,
                 {'backbone': np.float32(lr_backbone), 'head': np.float32(lr_head)})[0][0]
    return jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), after, start)
  one, two = weight_changes(.01, .1), weight_changes(.02, .3)
  largest = max(np.abs(a).max() for a in jax.tree.leaves(one['backbone']))
  assert largest > 1e-4
  for part, times in (('backbone', 2), ('head', 3)):
    for a, b in zip(jax.tree.leaves(one[part]), jax.tree.leaves(two[part]), strict=True):
      np.testing.assert_allclose(times * a, b, atol=1e-3 * largest + 1e-6)


def test_all_of_it_learns_and_is_the_same_twice_and_on_two_devices(recipe, state, colors, key):
  kw = {'fraction': .1, 'epochs': 15, 'batch': 6, 'lr_backbone': .02, 'lr_head': .2}
  found, again = (finetune.finetune(recipe, state, colors, key, **kw) for _ in range(2))
  still = finetune.finetune(recipe, state, colors, key, **{**kw, 'lr_backbone': 0., 'lr_head': 0.})
  assert found.top1 >= .9 and found.top1 > still.top1 + .3 and found.top5 is None
  assert found.protocol == 'finetune 10 % epochs=15 batch=6 lr=0.02/0.2'
  np.testing.assert_array_equal(found.predictions, again.predictions)
  one, same = (trained(recipe, state, colors.train) for _ in range(2))
  two = trained(recipe, state, colors.train, mesh=sharding.mesh(jax.devices()[:2]))
  assert fingerprint.fingerprints(one[:2]) == fingerprint.fingerprints(same[:2])
  assert one.losses[-1] < one.losses[0]
  np.testing.assert_allclose(one.losses, two.losses, rtol=1e-3)
  for a, b in zip(*(jax.tree.leaves(t.variables) for t in (one, two)), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-3 * max(np.abs(a).max(), .1))


def test_published_rates_and_a_list_of_images(recipe, state, colors, key):
  found = finetune.finetune(recipe, state, colors, key, fraction=.1, epochs=1, batch=6)
  assert found.protocol == 'finetune 10 % epochs=1 batch=6'
  assert found.chosen == {'images': 12, 'batch': 6, 'epochs': 1, 'lr_backbone': .01, 'lr_head': .1}
  rows = finetune.subset(colors.train.labels, K, key_for(key, 'fine-tune'), .1)
  named = finetune.finetune(recipe, state, colors, key, epochs=1, batch=6, images=[f'{i}.png' for i in rows[::-1]],
                            names=[f'a/{i}.png' for i in range(120)])
  assert named.protocol == 'finetune 12 listed images epochs=1 batch=6' and named.chosen == found.chosen
  np.testing.assert_array_equal(named.predictions, found.predictions)


def test_a_run_is_fine_tuned_on_the_files_of_a_list(recipe, state, colors, key, tmp_path):
  (tmp_path / 'list.txt').write_text('\n'.join(f'{i}.png' for i in range(12)))
  source = colors._replace(names=tuple(f'a/{i}.png' for i in range(120)))
  run = Stubbed(recipe, source, None)
  found = finetune.evaluate(run, state, .1, key, 1, 6, str(tmp_path / 'list.txt'))
  assert found.protocol == 'finetune 12 listed images epochs=1 batch=6' and found.chosen['images'] == 12


def test_what_cannot_be_fine_tuned_is_said(recipe, state, colors, key):
  tune = lambda state=state, source=colors, **kw: finetune.finetune(recipe, state, source, key, epochs=1,
                                                                      batch=6, **kw)
  for source, match in ((colors._replace(test=None), 'no labeled test images'),
                        (colors._replace(train=colors.train._replace(labels=None)), 'no labeled training images'),
                        (colors._replace(classes=('r', 'g', 'b', 'none')), 'Class 3 has no training image')):
    with pytest.raises(errors.UserError, match=match):
      tune(source=source)
  broken = state._replace(params=jax.tree.map(lambda a: a * jnp.float32(np.nan), state.params))
  for wrong, match in (({'state': broken}, 'not finite: 0/encoder'), ({'lr_head': np.inf}, 'diverged')):
    with pytest.raises(errors.UserError, match=match) as e:
      tune(**wrong)
    assert e.value.code == errors.NOT_FINITE
  with pytest.raises(errors.UserError, match='3 images do not fill 8 devices'):
    tune(fraction=.01, mesh=sharding.mesh())


@pytest.mark.slow
def test_a_run_is_fine_tuned_on_its_own_data(key):
  run = runs.prepare_run(load_config('smoke', {'equivariance': 'none'}), sharding.mesh(jax.devices()[:1]))
  run = run._replace(source=run.source._replace(test=Split(*(a[:100] for a in run.source.test))))
  state = runs.initial_state(run)
  before = fingerprint.fingerprints(state)
  found = finetune.evaluate(run, state, .01, key, epochs=2)
  assert found.protocol == 'finetune 1 % epochs=2' and found.chosen['images'] == 10 and found.top5 >= found.top1
  assert (found.chosen['lr_backbone'], found.chosen['lr_head']) == (.03, .08)
  assert fingerprint.fingerprints(state) == before

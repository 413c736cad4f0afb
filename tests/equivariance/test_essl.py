"""E-SSL: which views it asks for, what it calls their classes, and its loss against float64 NumPy."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from wirings import make_wiring

from equivariant_ssl import augment, equivariance, registry
from equivariant_ssl.errors import UserError
from equivariant_ssl.types import Image, Pair

B, SIDE = 4, 8
DISCRETE = [name for name in registry.names(augment) if registry.make(augment, name).choices is not None]
make = functools.partial(registry.make, equivariance, 'essl', hidden=(6, 5))
IMAGES = Image(jnp.float32(np.random.default_rng(0).uniform(size=(B, SIDE, SIDE, 3))), jnp.full((B, 2), SIDE, jnp.float32))


def test_every_image_is_shown_under_all_turns(key):
  wiring = make_wiring('rotate', sensitive=True)
  wired = make()(wiring)
  assert wired.uses == ('own',) and wired.predicts == 'action' and not wired.feeds
  group, = wired.groups.values()
  assert (len(group.chains), group.size, group.all_of) == (1, SIDE // 2, 'rotate')
  images, actions = jax.jit(functools.partial(augment.views, wired.groups))(key, IMAGES)['own']
  assert images.shape == (B, 4, SIDE // 2, SIDE // 2, 3)
  np.testing.assert_array_equal(actions['rotate'].turns, [range(4)] * B)
  for k in range(4):
    np.testing.assert_allclose(images[:, k], np.rot90(images[:, 0], k, axes=(1, 2)), atol=1e-6)
  pair = wired.pairs({'own': images.mean((2, 3))}, {'own': actions})
  np.testing.assert_array_equal(pair.target, images.mean((2, 3)).reshape(4 * B, 3))
  np.testing.assert_array_equal(pair.after['rotate'].turns, list(range(4)) * B)


def test_its_own_size_and_crop(key):
  group = make(size=3, crop_scale=(.05, .14))(make_wiring('rotate', sensitive=True)).groups['own']
  assert group.size == 3
  sample = jax.jit(jax.vmap(lambda k: group.chains[0].sample(k, jnp.full(2, 64.))['crop']))
  crop = sample(jax.random.split(key, 64))
  assert .04 < (crop.height * crop.width).min() and (crop.height * crop.width).max() < .15


def counted(**views):
  """Embeddings [B V 1], all different, of each group."""
  return {name: jnp.float32(np.arange(B * V).reshape(B, V, 1) + 100 * V) for name, V in views.items()}


def flips(V):
  return {'flip': augment.flip.Flip(jnp.arange(B * V).reshape(B, V) % 3 == 0)}


def test_role_both_classifies_what_the_views_drew():
  wired = make()(make_wiring('flip'))
  assert wired.uses == ('views',) and not wired.groups
  pair = wired.pairs(counted(views=2), {'views': flips(2)})
  np.testing.assert_array_equal(pair.target[:, 0], 200 + np.arange(2 * B))
  np.testing.assert_array_equal(pair.after['flip'].applied, np.arange(2 * B) % 3 == 0)


def test_relative_to_the_first_view():
  """Sensitive: no view of the invariance has the op, so the first is the source of all four."""
  wired = make(relative=True)(make_wiring('rotate', sensitive=True))
  assert wired.uses == ('own', 'views') and set(wired.groups) == {'own'}
  turns = {'rotate': augment.rotate.Rotate(jnp.tile(jnp.arange(4)[None], (B, 1)))}
  pair = wired.pairs(counted(own=4, views=2), {'own': turns, 'views': {}})
  np.testing.assert_array_equal(pair.source[:, 0], 200 + np.repeat(2 * np.arange(B), 4))
  np.testing.assert_array_equal(pair.target[:, 0], 400 + np.arange(4 * B))
  np.testing.assert_array_equal(pair.after['rotate'].turns, list(range(4)) * B)


def test_relative_to_a_view_of_its_own(key):
  """Both, wholly or in part: the source is still in the ops that are asked, and in them alone."""
  wiring = make_wiring('flip', 'vflip')
  wired = make(relative=True)(wiring)
  assert wired.uses == ('views', 'own still')
  group, = wired.groups.values()
  assert (len(group.chains), group.size, group.all_of) == (1, SIDE, None)
  action = jax.jit(jax.vmap(lambda k: group.chains[0].sample(k, jnp.full(2, 8.))))(jax.random.split(key, 16))
  assert not action['flip'].applied.any() and not action['vflip'].applied.any()
  assert len(np.unique(action['crop'].height)) > 1
  pair = wired.pairs(counted(views=2) | {'own still': counted(views=1)['views']}, {'views': flips(2), 'own still': flips(1)})
  np.testing.assert_array_equal(pair.source[:, 0], 100 + np.repeat(np.arange(B), 2))
  np.testing.assert_array_equal(pair.before['flip'].applied, np.repeat(np.arange(B) % 3 == 0, 2))

  # The views are flipped, but not turned.
  mixed = make_wiring('flip', 'rotate', sensitive=True)._replace(view_chains=wiring.own_chains)
  wired = make(relative=True)(mixed)
  assert wired.uses == ('own', 'own still') and wired.groups['own'].all_of == 'rotate'


def numpy_loss(logits, labels: dict):
  """(value, gradient) in float64: for each op {name: (labels, K)} the mean -log softmax of its own logits."""
  value, gradient, start = 0., np.zeros_like(logits), 0
  for label, K in labels.values():
    z = logits[:, start:start + K]
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    value -= np.log(p[np.arange(len(z)), label]).mean()
    gradient[:, start:start + K] = (p - np.eye(K)[label]) / len(z)
    start += K
  return value, gradient


@pytest.fixture(scope='module')
def two():
  """An objective about turns and vertical flips, 16 pairs' actions, the logits that say them, and a jitted loss."""
  wired = make()(make_wiring('rotate', 'vflip'))
  rng = np.random.default_rng(1)
  turns, flips = rng.integers(4, size=16), rng.integers(2, size=16)
  after = {'rotate': augment.rotate.Rotate(jnp.int32(turns)), 'vflip': augment.vflip.VFlip(jnp.bool_(flips))}
  empty = jnp.zeros((16, 0))
  loss = jax.jit(jax.value_and_grad(lambda logits, after: wired.loss(logits, Pair(empty, empty, after, after))))
  return loss, after, {'rotate': (turns, 4), 'vflip': (flips, 2)}


def test_loss_equals_float64(two):
  loss, after, labels = two
  logits = np.random.default_rng(2).normal(size=(16, 6))
  value, gradient = loss(jnp.float32(logits), after)
  wanted = numpy_loss(logits, labels)
  np.testing.assert_allclose(value, wanted[0], rtol=1e-5)
  assert np.abs(gradient - wanted[1]).max() <= 1e-5 * np.abs(wanted[1]).max()
  np.testing.assert_allclose(loss(jnp.zeros((16, 6)), after)[0], np.log(4) + np.log(2), rtol=1e-6)


def test_laws(two):
  """The truth beats not knowing and other answers; the order of pairs is nothing, that of the actions is not."""
  loss, after, labels = two
  true = jnp.float32(np.concatenate([5 * np.eye(K)[label] for label, K in labels.values()], axis=1))
  roll = lambda tree: jax.tree.map(lambda a: jnp.roll(a, 3, axis=0), tree)
  value = loss(true, after)[0]
  assert value < .1 < loss(jnp.zeros_like(true), after)[0]
  assert value < loss(-true, after)[0] and value < loss(true, roll(after))[0]
  np.testing.assert_allclose(loss(roll(true), roll(after))[0], value, rtol=1e-6)


@pytest.mark.parametrize('name', DISCRETE)
def test_any_discrete_op(name):
  """Class k is choice k, of every op that has choices."""
  wiring = make_wiring(name, sensitive=True)
  wired = make()(wiring)
  K = len(jax.tree.leaves(wiring.conditioning.choices[name])[0])
  after = {name: jax.tree.map(jnp.asarray, wiring.conditioning.choices[name])}
  assert wired.groups['own'].all_of == name and wired.head.classify.out == K
  assert jax.jit(lambda logits: wired.loss(logits, Pair(None, None, after, after)))(50. * jnp.eye(K)) < 1e-6


@pytest.mark.parametrize('relative', [False, True])
def test_head(relative, key):
  wired = make(relative=relative, hidden_activation_last=not relative)(make_wiring('rotate', 'vflip'))
  h = jax.random.normal(key, (B, 2, 7))
  pair = Pair(h[:, 0], h[:, 1], {}, {})

  def both(head, h, pair):
    return head(pair._replace(source=head.embed(h, True)[:, 0]), True)
  answer, values = jax.eval_shape(lambda: wired.head.init_with_output(key, h, pair, method=both))
  assert answer.shape == (B, 6) and answer.dtype == jnp.float32 and set(values) == {'params'}
  layers = values['params']['classify']
  assert layers['linear_0']['kernel'].shape == (14 if relative else 7, 6) and layers['linear_2']['kernel'].shape == (5, 6)
  assert layers['linear_1']['bias'].shape == layers['norm_1']['scale'].shape == (5,)
  assert wired.head.classify.hidden_activation_last is not relative


def test_nothing_to_classify():
  with pytest.raises(UserError, match='has none'):
    make()(make_wiring('gray'))

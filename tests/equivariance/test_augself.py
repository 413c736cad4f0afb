"""AugSelf: what leads from one view to another, in the frame that each view shows, and its loss against float64 NumPy."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from wirings import make_wiring

from equivariant_ssl import augment, equivariance, registry
from equivariant_ssl.augment.crop import Crop
from equivariant_ssl.augment.flip import Flip
from equivariant_ssl.augment.rotate import Rotate
from equivariant_ssl.augment.vflip import VFlip
from equivariant_ssl.equivariance import augself
from equivariant_ssl.errors import UserError
from equivariant_ssl.types import Image, Pair

B, D, SIZE = 8, 5, jnp.full(2, 8.)
DISCRETE = [name for name in registry.names(augment) if registry.make(augment, name).choices is not None]
TOLD = ('crop', 'flip', 'jitter', 'blur', 'rotate')
make = functools.partial(registry.make, equivariance, 'augself', hidden=(6, 6))
scalar = jnp.float32


@pytest.fixture(scope='module')
def everything():
  """An objective about five ops, its questions, its 2B pairs of drawn actions, and its jitted loss."""
  wiring = make_wiring(*TOLD)._replace(conditioning=augment.chain(*(registry.make(augment, name) for name in TOLD)))
  wired = make()(wiring)
  keys = jax.random.split(jax.random.key(1), (B, 2))
  actions = jax.jit(jax.vmap(jax.vmap(lambda k: wiring.own_chains[0].sample(k, SIZE))))(keys)
  h = jax.random.normal(jax.random.key(2), (B, 2, D))
  pair = wired.pairs({'views': h}, {'views': actions})
  loss = jax.jit(jax.value_and_grad(lambda answer, pair: wired.loss(answer, pair)))
  return wired, augself.build_questions(wiring, augself.differences(wiring)), pair, loss


def view_of(actions, n):
  return jax.tree.map(lambda a: np.asarray(a[n], np.float64), actions)


def numpy_box(action):
  """Center and size in the frame that the view shows: flipped, then turned counter-clockwise."""
  y, x = action['crop'].top + action['crop'].height / 2, action['crop'].left + action['crop'].width / 2
  h, w = action['crop'].height, action['crop'].width
  x = 1 - x if action['flip'].applied else x
  for _ in range(int(action['rotate'].turns)):
    y, x, h, w = 1 - x, y, w, h
  return np.array([y, x, h, w])


def numpy_targets(pair, spans):
  """{op: w1 - w2 [N n], or labels [N]} in float64."""
  found = {name: [] for name in TOLD}
  for n in range(len(pair.source)):
    a, b = view_of(pair.before, n), view_of(pair.after, n)
    found['crop'].append(numpy_box(a) - numpy_box(b))
    first, second = (np.array([v['jitter'].brightness, v['jitter'].contrast, v['jitter'].saturation, v['jitter'].hue])
                     for v in (a, b))
    found['jitter'].append((first - second) / spans['jitter'])
    found['blur'].append((a['blur'].sigma - b['blur'].sigma)[None] / spans['blur'])
    found['flip'].append(int(a['flip'].applied != b['flip'].applied))
    found['rotate'].append(int(a['rotate'].turns - b['rotate'].turns) % 4)
  return {name: np.stack(rows) for name, rows in found.items()}


def numpy_loss(answer, targets):
  """(value, {op: gradient}) in float64."""
  value, gradient = 0., {}
  for name, z in answer.items():
    w, N = targets[name], len(z)
    if w.ndim == 2:
      t = np.tanh(z)
      value += ((t - w) ** 2).mean()
      gradient[name] = 2 * (t - w) * (1 - t ** 2) / w.size
    else:
      p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
      value -= np.log(p[np.arange(N), w]).mean()
      gradient[name] = (p - np.eye(z.shape[1])[w]) / N
  return value, gradient


def test_loss_equals_float64(everything):
  wired, asked, pair, loss = everything
  assert {name: q.out for name, q in asked.items()} == {'crop': 4, 'flip': 2, 'jitter': 4, 'blur': 1, 'rotate': 4}
  rng = np.random.default_rng(0)
  answer = {name: rng.normal(size=(2 * B, q.out)) for name, q in asked.items()}
  value, gradient = loss(jax.tree.map(jnp.float32, answer), pair)
  wanted = numpy_loss(answer, numpy_targets(pair, {name: q.span for name, q in asked.items()}))
  np.testing.assert_allclose(value, wanted[0], rtol=1e-5)
  for name, want in wanted[1].items():
    assert np.abs(gradient[name] - want).max() <= 1e-5 * np.abs(want).max(), name


def test_in_units_of_the_range(everything):
  """Factors and sigma over the ranges of their ops, as measured; a crop in fractions."""
  asked = everything[1]
  np.testing.assert_array_equal(asked['crop'].span, 1.)
  np.testing.assert_allclose(asked['jitter'].span, [.8, .8, .8, .2], rtol=5e-4)
  np.testing.assert_allclose(asked['blur'].span, 2., rtol=5e-4)  # from not applied to the widest


def test_both_ways_round(everything):
  pair = everything[2]
  assert pair.source.shape == (2 * B, D)
  np.testing.assert_array_equal(pair.source[::2], pair.target[1::2])
  np.testing.assert_array_equal(pair.source[1::2], pair.target[::2])
  np.testing.assert_array_equal(pair.before['crop'].top[::2], pair.after['crop'].top[1::2])


def test_laws(everything):
  """The truth beats not knowing and other answers; the order of pairs is nothing, that of the actions is not."""
  wired, asked, pair, loss = everything
  targets = numpy_targets(pair, {name: q.span for name, q in asked.items()})
  true = {name: scalar(np.arctanh(np.clip(w, -.999, .999)) if w.ndim == 2 else 9 * np.eye(asked[name].out)[w])
          for name, w in targets.items()}
  roll = lambda tree: jax.tree.map(lambda a: jnp.roll(a, 2, axis=0), tree)
  value = loss(true, pair)[0]
  assert value < .01
  assert loss(jax.tree.map(jnp.zeros_like, true), pair)[0] > 1
  assert loss(true, pair._replace(before=roll(pair.before), after=roll(pair.after)))[0] > 1
  np.testing.assert_allclose(loss(roll(true), roll(pair))[0], value, rtol=1e-5, atol=1e-7)


def test_each_view_is_mirrored_by_its_own_flip():
  """The same box: no difference where both are flipped, twice the way to the middle where one is."""
  crop = Crop(scalar(.1), scalar(.2), scalar(.5), scalar(.4))
  one = lambda flip, vflip: {'crop': crop, 'flip': Flip(jnp.bool_(flip)), 'vflip': VFlip(jnp.bool_(vflip))}
  flipped = make_wiring('crop')._replace(own_chains=make_wiring('flip', 'vflip').own_chains)
  way = augself.differences(flipped)['crop']
  w = lambda a, b: np.asarray(way(one(*a), one(*b)))
  np.testing.assert_allclose(w((0, 0), (0, 0)), 0.)
  np.testing.assert_allclose(w((1, 1), (1, 1)), 0.)
  np.testing.assert_allclose(w((0, 0), (1, 0)), [0., .4 - .6, 0., 0.], atol=1e-6)  # the official code: 0
  np.testing.assert_allclose(w((1, 0), (0, 0)), [0., .6 - .4, 0., 0.], atol=1e-6)
  np.testing.assert_allclose(w((0, 0), (0, 1)), [.35 - .65, 0., 0., 0.], atol=1e-6)


@pytest.mark.parametrize('order', [('crop', 'flip', 'vflip', 'rotate'), ('flip', 'crop', 'rotate', 'vflip')], ids='+'.join)
def test_the_box_is_where_the_view_shows_it(order):
  """A view equals its box cut out of the whole image, flipped and turned as the view was."""
  ops = {n: registry.make(augment, n, **({'size': 8, 'method': 'bilinear'} if n == 'crop' else {})) for n in order}
  chain = augment.chain(*ops.values())
  picture = Image(scalar(np.random.default_rng(0).uniform(size=(8, 8, 3))), SIZE)
  box = Crop(*(scalar(x) for x in (.125, .25, .5, .625)))
  turns, flips = np.divmod(np.arange(16), 4)
  actions = {'crop': jax.tree.map(lambda a: jnp.repeat(a[None], 16), box), 'rotate': Rotate(jnp.int32(turns)),
             'flip': Flip(jnp.bool_(flips % 2)), 'vflip': VFlip(jnp.bool_(flips // 2))}

  @jax.jit
  @jax.vmap
  def both(action):
    y, x, h, w = augself.box(list(order), action)
    whole = chain.apply({**action, 'crop': ops['crop'].identity(SIZE)}, picture)
    cut = ops['crop'].apply(Crop(y - h / 2., x - w / 2., h, w), whole)
    return chain.apply(action, picture).pixels, cut.pixels
  np.testing.assert_allclose(*both(actions), atol=1e-4)


@pytest.mark.parametrize('name', DISCRETE)
def test_a_discrete_op_is_asked_by_class(name):
  """Row: the first view's choice, column: the second's. Same is class 0; every way back has one class, too."""
  wiring = make_wiring(name)
  asked = augself.build_questions(wiring, augself.differences(wiring))[name]
  K = len(jax.tree.leaves(wiring.conditioning.choices[name])[0])
  if asked.table is None:
    assert asked.out == len(asked.span) > 0
    return
  assert asked.out == K and asked.table.shape == (K, K)
  np.testing.assert_array_equal(np.diag(asked.table), 0)
  np.testing.assert_array_equal(asked.table[:, 0], np.arange(K))  # as seen from the untouched view
  np.testing.assert_array_equal(np.sort(asked.table, axis=0), np.tile(np.arange(K)[:, None], K))
  if name == 'rotate':
    np.testing.assert_array_equal(asked.table, (np.arange(4)[:, None] - np.arange(4)) % 4)


def test_choices_that_are_no_group_are_regressed():
  op = registry.make(augment, 'rotate')._replace(relative=None)
  wiring = make_wiring('rotate')._replace(conditioning=augment.chain(op))
  assert augself.build_questions(wiring, augself.differences(wiring))['rotate'].table is None


@pytest.mark.parametrize('sensitive', [False, True])
def test_groups_and_head(sensitive, key):
  wiring = make_wiring('rotate', 'solarize', sensitive=sensitive)
  wired = make()(wiring)
  name = 'own' if sensitive else 'views'
  assert wired.uses == (name,) and wired.predicts == 'action' and not wired.feeds
  own = {'own': (wiring.own_chains, wiring.size)} if sensitive else {}
  assert {n: (g.chains, g.size) for n, g in wired.groups.items()} == own
  h = jax.random.normal(key, (B, 2, D))
  assert wired.head.embed(h, True) is h
  answer, values = jax.eval_shape(lambda: wired.head.init_with_output(key, Pair(h[:, 0], h[:, 1], {}, {}), True))
  assert {n: a.shape for n, a in answer.items()} == {'rotate': (B, 4), 'solarize': (B, 1)}
  layers = values['params']['ask_rotate']
  assert layers['linear_0']['kernel'].shape == (2 * D, 6) and 'bias' not in layers['linear_0']
  assert 'bias' in layers['linear_2'] and set(layers['norm_1']) == {'scale', 'bias'}


def test_nothing_varies():
  still = augment.chain(registry.make(augment, 'gray', p=0.))
  with pytest.raises(UserError, match='never vary'):
    make()(make_wiring('gray')._replace(own_chains=(still, still)))

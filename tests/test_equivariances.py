"""The laws of every equivariance objective found, and of EquiMod's parts: its pairs, gradients, encoders and predictors."""
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_losses import numeric_gradient
from test_losses import reference as nt_xent
from wirings import wiring

from equivariant_ssl import equivariance, modules
from equivariant_ssl.errors import UserError
from equivariant_ssl.nets import predictors
from equivariant_ssl.nets.network import split
from equivariant_ssl.types import Pair

B, V, E = 8, 2, 4
SMALL = {'hidden': (8,), 'dim': E, 'action_dim': 3, 'read_hidden': (8,), 'read_dim': 3, 'splits': 4}
NAMES = modules.names(equivariance)
OWN_VIEWS = ('care', 'stl')  # neighbouring images must share draws, whatever the role


def made(name: str, told=None, **kw):
  """Objective `name`, its layers small, wired."""
  small = {k: v for k, v in SMALL.items() if k in modules.schema(equivariance, name)}
  return modules.make(equivariance, name, **{**small, **kw})(told or wiring())


TARGETS = [n for n in NAMES if made(n).predicts == 'target']


def variance(z):
  return np.maximum(1. - np.sqrt(z.var(0, ddof=1) + 1e-4), 0.).mean()


def covariance(z):
  C = np.cov(z, rowvar=False)
  return ((C ** 2).sum() - (np.diag(C) ** 2).sum()) / z.shape[1]


def info_nce(a, b, temperature):
  a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
  s = a @ b.T / temperature
  return np.mean(np.log(np.exp(s).sum(1)) - np.diag(s))


def check(loss, wanted, *arrays):
  """Values and gradients of `loss` in float32 equal those of `wanted` in float64."""
  value, grads = jax.jit(jax.value_and_grad(loss, tuple(range(len(arrays)))))(*map(jnp.float32, arrays))
  assert value.shape == () and value.dtype == jnp.float32
  np.testing.assert_allclose(value, wanted(*arrays), rtol=1e-5)
  for i, got in enumerate(grads):
    want = numeric_gradient(lambda x, i=i: wanted(*arrays[:i], x, *arrays[i + 1:]), arrays[i])
    assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max(), f'argument {i}'


def pairs_of(source, target):
  return Pair(source, target, (), ())


@pytest.mark.parametrize('name', TARGETS)
def test_the_true_answer_is_best(name):
  """It beats doing nothing and the answers to other actions; the order of the images is nothing."""
  loss = jax.jit(made(name).loss)
  rng = np.random.default_rng(0)
  source, target = jnp.float32(rng.normal(size=(2, B * V, E)))
  pair = pairs_of(source, target)
  true = loss(target, pair)
  assert true.shape == () and true.dtype == jnp.float32 and np.isfinite(true)
  assert true < loss(source, pair)
  assert true < loss(jnp.roll(target, V, axis=0), pair)
  images = np.repeat(rng.permutation(B), V) * V + np.tile(np.arange(V), B)
  np.testing.assert_allclose(loss(source[images], jax.tree.map(lambda z: z[images], pair)), loss(source, pair), rtol=1e-5)


@pytest.mark.parametrize('sensitive', [False, True])
@pytest.mark.parametrize('name', NAMES)
def test_an_objective_asks_for_the_groups_it_uses(name, sensitive):
  told = wiring(sensitive=sensitive)
  wired = made(name, told)
  assert set(wired.uses) <= {'views', *wired.groups}
  if name != 'none' and (sensitive or name in OWN_VIEWS):
    assert 'own' in wired.groups and 'views' not in wired.uses
    assert {op.name for op in wired.groups['own'].chains} == {told.own[0].name}
  elif name not in ('essl', 'none'):
    assert 'own' not in wired.groups and wired.uses[-1] == 'views'


def test_none_is_nothing():
  wired = made('none')
  pair = wired.pairs({'views': jnp.ones((B, V, E))}, {})
  answer = wired.head.apply({}, pair, True)
  assert wired.predicts is None and not wired.groups and answer.shape == (B * V, E)
  assert float(wired.loss(answer, pair)) == 0.


def test_equimod_pairs_each_view_with_its_own_reference():
  wired = made('equimod')
  embedded = {'reference': jnp.arange(B, dtype=jnp.float32).reshape(B, 1, 1),
              'views': jnp.arange(B * V, dtype=jnp.float32).reshape(B, V, 1)}
  actions = {'reference': {'flip': jnp.zeros((B, 1), bool)}, 'views': {'flip': jnp.ones((B, V), bool)}}
  pair = wired.pairs(embedded, actions)
  np.testing.assert_array_equal(pair.source[:, 0], np.repeat(np.arange(B), V))
  np.testing.assert_array_equal(pair.target[:, 0], np.arange(B * V))
  assert not pair.before['flip'].any() and pair.after['flip'].all() and pair.after['flip'].shape == (B * V,)


@pytest.mark.parametrize('name, kw, source, target', [
    ('equimod', {'reference': 'view'}, [0, 1, 2, 3], [1, 0, 3, 2]), ('sie', {}, [0, 2], [1, 3]), ('sen', {}, [0, 2], [1, 3])])
def test_views_are_paired_with_each_other(name, kw, source, target):
  """EquiMod both ways round, SIE and SEN from the first view to the second; told of the relative action."""
  wired = made(name, **kw)
  z, flipped = jnp.arange(4.).reshape(2, 2, 1), jnp.array([[False, True], [True, True]])
  pair = wired.pairs({'views': z}, {'views': {'flip': flipped}})
  np.testing.assert_array_equal(pair.source[:, 0], source)
  np.testing.assert_array_equal(pair.target[:, 0], target)
  np.testing.assert_array_equal(pair.before['flip'], flipped.reshape(-1)[np.array(source)])
  np.testing.assert_array_equal(pair.after['flip'], flipped.reshape(-1)[np.array(target)])


@pytest.mark.parametrize('kw', [{}, {'exclude_sibling': True}, {'loss': 'mse', 'variance_weight': .7}], ids=str)
def test_equimod_loss_equals_float64(kw):
  """NT-Xent over 4B rows, the sibling a negative unless excluded; or the squared error and the hinge on both sides."""
  wired = made('equimod', **kw)
  same = np.arange(6) // 2 if kw.get('exclude_sibling') else None

  def wanted(y, y_hat):
    if kw.get('loss') == 'mse':
      return np.mean((y_hat - y) ** 2) + .7 * (variance(y) + variance(y_hat)) / 2
    return nt_xent(y, y_hat, .2, same)

  check(lambda y, y_hat: wired.loss(y_hat, pairs_of(y, y)), wanted, *np.random.default_rng(1).normal(size=(2, 6, E)) * .8)


def test_sen_loss_equals_float64():
  wired = made('sen', temperature=.3)
  check(lambda z, answer: wired.loss(answer, pairs_of(z, z)), lambda z, answer: info_nce(answer, z, .3),
        *np.random.default_rng(2).normal(size=(2, B, E)))


def through(wired, features, actions, train: bool):
  """What the network does with a head: features {group: [B V D]} -> (answer, pair)."""
  def run(head, features):
    together = jnp.concatenate([features[g] for g in wired.uses], axis=1)
    embedded = split(head.embed(together, train), {g: features[g].shape[1] for g in wired.uses})
    pair = wired.pairs(embedded, actions)
    return head(pair, train), pair
  return run


def drawn(told, key):
  draw = lambda k: told.own[0].sample(k, jnp.full(2, 8.))
  return {'views': jax.vmap(jax.vmap(draw))(jax.random.split(key, (B, V))),
          'reference': jax.vmap(jax.vmap(lambda k: told.own[0].identity(jnp.full(2, 8.))))(jax.random.split(key, (B, 1)))}


@pytest.mark.parametrize('stop, flows', [('none', (True, True)), ('target', (True, False)), ('source', (False, True))])
def test_where_the_gradient_of_equimod_flows(stop, flows, key):
  """By default through references and views alike, as published; else exactly nothing through what is stopped."""
  told = wiring('rotate')
  wired = made('equimod', told, stop_gradient=stop)
  features = {'reference': jax.random.normal(key, (B, 1, 6)), 'views': jax.random.normal(jax.random.key(1), (B, V, 6))}

  @jax.jit
  def gradients(key):
    actions = drawn(told, key)
    _, values = nn.init_with_output(through(wired, features, actions, True), wired.head)(key, features)

    def loss(embedded, params):
      pair = wired.pairs(embedded, actions)
      answer, _ = wired.head.apply({**values, 'params': params}, pair, True, mutable=['batch_stats'])
      return wired.loss(answer, pair)

    embed = lambda h: wired.head.apply(values, h, False, method='embed')
    return jax.grad(loss, (0, 1))({g: embed(h) for g, h in features.items()}, values['params'])

  embedded, params = gradients(key)
  assert (bool(np.any(embedded['reference'])), bool(np.any(embedded['views']))) == flows
  assert np.any(params['encode_action']['linear_0']['kernel']) and np.any(params['predict']['linear_0']['kernel'])


def test_equimod_head_equals_float64(key):
  """y_hat = BN( [y0, BN(a W)] U ): one Linear each, no bias, the last norm without affine; the action is `after`'s alone."""
  told = wiring('rotate')
  wired = made('equimod', told)
  y = jax.random.normal(key, (B, V + 1, E))

  @jax.jit
  def run(key):
    pair = wired.pairs({'reference': y[:, :1], 'views': y[:, 1:]}, drawn(told, key))
    return *wired.head.init_with_output(key, pair, True), jax.vmap(told.told.encode)(pair.after)

  answer, values, actions = jax.tree.map(np.float64, run(key))
  params = values['params']
  assert jax.tree.map(np.shape, params) == {
      'encode_action': {'linear_0': {'kernel': (3, 3)}, 'norm_0': {'scale': (3,), 'bias': (3,)}},
      'predict': {'linear_0': {'kernel': (E + 3, E)}}}
  standard = lambda x: (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)
  code = standard(actions @ params['encode_action']['linear_0']['kernel'])
  source = np.repeat(np.float64(y[:, 0]), V, axis=0)
  wanted = standard(np.concatenate([source, code], axis=1) @ params['predict']['linear_0']['kernel'])
  np.testing.assert_allclose(answer, wanted, atol=2e-5)


@pytest.mark.parametrize('name', [n for n in ('sen', 'sie') if n in NAMES])
def test_they_are_told_the_relative_action(name, key):
  """An image whose two views are alike is predicted to stay; W moves the others."""
  told = wiring('rotate')
  wired = made(name, told)
  z = jax.random.normal(key, (B, V, E))

  @jax.jit
  def run(key):
    actions = drawn(told, key)
    pair = wired.pairs({'views': z}, actions)
    return wired.head.init_with_output(key, pair, True)[0], jax.vmap(told.told.relative)(pair.before, pair.after)

  answer, moved = map(np.asarray, run(key))
  still = ~moved.any(1)
  assert 0 < still.sum() < B
  np.testing.assert_allclose(answer[still], z[still, 0], atol=1e-6)
  assert (np.abs(answer - z[:, 0]).max(1)[~still] > 1e-3).all()


@pytest.mark.parametrize('kw', [{'encoder': 'mlp'}, {'encoder': 'none', 'predictor': 'hyper'}, {'predictor': 'mlp'},
                                {'predictor': 'identity', 'reference': 'view'}], ids=str)
def test_every_encoder_and_predictor_fits(kw, key):
  told = wiring('rotate')
  wired = made('equimod', told, action_hidden=(5,), predictor_hidden=(7,), tap_layer=2, **kw)
  assert wired.tap == 2
  features = {'reference': jnp.ones((B, 1, 6)), 'views': jax.random.normal(key, (B, V, 6))}

  @jax.jit
  def run(key):
    (answer, pair), values = nn.init_with_output(through(wired, features, drawn(told, key), True), wired.head)(key)(features)
    return answer, pair.source, values

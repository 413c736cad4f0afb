"""EquiMod: its pairs, loss, gradients and switches; the predictors and action encoders that it may have."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_equivariances import (
  TURNS,
  B,
  E,
  V,
  check,
  filled,
  make_objective,
  pairs_of,
  turned,
  turns,
  variance,
)
from test_losses import reference as nt_xent
from wirings import make_wiring

from equivariant_ssl.errors import UserError
from equivariant_ssl.nets import predictors


def test_equimod_pairs_each_view_with_its_own_reference():
  wired = make_objective('equimod')
  embedded = {'reference': jnp.arange(B, dtype=jnp.float32).reshape(B, 1, 1),
              'views': jnp.arange(B * V, dtype=jnp.float32).reshape(B, V, 1)}
  actions = {'reference': {'flip': jnp.zeros((B, 1), bool)}, 'views': {'flip': jnp.ones((B, V), bool)}}
  pair = wired.pairs(embedded, actions)
  np.testing.assert_array_equal(pair.source[:, 0], np.repeat(np.arange(B), V))
  np.testing.assert_array_equal(pair.target[:, 0], np.arange(B * V))
  assert not pair.before['flip'].any() and pair.after['flip'].all() and pair.after['flip'].shape == (B * V,)


@pytest.mark.parametrize('kw', [{}, {'exclude_sibling': True}, {'loss': 'mse', 'variance_weight': .7}], ids=str)
def test_equimod_loss_equals_float64(kw):
  """NT-Xent over 4B rows, the sibling a negative unless excluded; or the squared error and the hinge on both sides."""
  wired = make_objective('equimod', **kw)
  same = np.arange(6) // 2 if kw.get('exclude_sibling') else None

  def expected_loss(y, y_hat):
    if kw.get('loss') == 'mse':
      return np.mean((y_hat - y) ** 2) + .7 * (variance(y) + variance(y_hat)) / 2
    return nt_xent(y, y_hat, .2, same)

  check(lambda y, y_hat: wired.loss(y_hat, pairs_of(y, y)), expected_loss, *np.random.default_rng(1).normal(size=(2, 6, E)) * .8)


@pytest.fixture
def embedded(key):
  y = jax.random.normal(key, (B, 1 + V, E))
  return {'reference': y[:, :1], 'views': y[:, 1:]}


@pytest.mark.parametrize('stop, flows', [('none', (True, True)), ('target', (True, False)), ('source', (False, True))])
def test_where_the_gradient_flows(stop, flows, embedded):
  """By default through references and views alike, as published; else exactly nothing through what is stopped."""
  wired = make_objective('equimod', turns(), stop_gradient=stop)
  values = filled(wired.head, wired.pairs(embedded, turned()))

  @jax.jit
  @jax.grad
  def gradient(varied):
    pair = wired.pairs(varied[0], turned())
    answer, _ = wired.head.apply({**values, 'params': varied[1]}, pair, True, mutable=['batch_stats'])
    return wired.loss(answer, pair)

  groups, params = gradient((embedded, values['params']))
  assert (bool(np.any(groups['reference'])), bool(np.any(groups['views']))) == flows
  assert np.any(params['encode_action']['linear_0']['kernel']) and np.any(params['predict']['linear_0']['kernel'])


def test_the_head_equals_float64(embedded):
  """y_hat = BN( [y0, BN(a W)] U ): one Linear each, no bias, the last norm without affine; the action is `after`'s alone."""
  wired = make_objective('equimod', turns())
  pair = wired.pairs(embedded, turned())
  values = filled(wired.head, pair)
  params = values['params']
  assert jax.tree.map(np.shape, params) == {
      'encode_action': {'linear_0': {'kernel': (3, 3)}, 'norm_0': {'scale': (3,), 'bias': (3,)}},
      'predict': {'linear_0': {'kernel': (E + 3, E)}}}
  answer, _ = jax.jit(lambda: wired.head.apply(values, pair, True, mutable=['batch_stats']))()
  weights = jax.tree.map(np.float64, params)
  standard = lambda x: (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)
  code = standard(np.eye(4)[TURNS.reshape(-1)][:, 1:] @ weights['encode_action']['linear_0']['kernel'])
  code = code * weights['encode_action']['norm_0']['scale'] + weights['encode_action']['norm_0']['bias']
  source = np.repeat(np.float64(embedded['reference'][:, 0]), V, axis=0)
  wanted = standard(np.concatenate([source, code], axis=1) @ weights['predict']['linear_0']['kernel'])
  np.testing.assert_allclose(answer, wanted, atol=2e-5)


MLP = ('linear_0', 'norm_0', 'linear_1', 'norm_1')


@pytest.mark.parametrize('kw, encoder, predictor', [
    ({'encoder': 'mlp'}, MLP, ('linear_0',)), ({'encoder': 'none', 'predictor': 'hyper'}, (), ('bias', 'kernel')),
    ({'predictor': 'mlp'}, MLP[:2], MLP[:3]), ({'predictor': 'identity', 'reference': 'view'}, MLP[:2], ())], ids=str)
def test_every_encoder_and_predictor_fits(kw, encoder, predictor, embedded):
  wired = make_objective('equimod', turns(), action_hidden=(5,), predictor_hidden=(7,), tap_layer=2, **kw)
  assert wired.tap == 2 and wired.predicts == 'target'
  pair = wired.pairs(embedded, turned())
  values = filled(wired.head, pair)
  assert {name: tuple(sorted(layers)) for name, layers in values['params'].items()} == {
      name: tuple(sorted(layers)) for name, layers in (('encode_action', encoder), ('predict', predictor)) if layers}
  answer = jax.eval_shape(lambda: wired.head.apply(values, pair, True, mutable=['batch_stats'])[0])
  assert answer.shape == pair.target.shape == (B * V, E) and answer.dtype == jnp.float32


def test_the_identity_predictor_answers_the_source():
  source, conditioning = jnp.ones((B, E)), jnp.ones((B, 3))
  assert predictors.predictor('control', 'identity', E).apply({}, source, conditioning, True) is source
  assert predictors.action_encoder('control', 'none', E).apply({}, conditioning, True) is conditioning


@pytest.mark.parametrize('setting', ['loss', 'reference', 'stop_gradient', 'encoder', 'predictor'])
def test_an_unknown_word_is_named_with_those_known(setting):
  with pytest.raises(UserError, match=f'equimod.{setting} has no .hypre.') as error:
    make_objective('equimod', **{setting: 'hypre'})
  assert 'It has:' in str(error.value)


def test_a_square_of_the_reference():
  """.875 on ImageNet: recorded as a crop, which is the action before those of its views."""
  wiring = make_wiring('crop')
  size = jnp.array([8., 16.])
  action = make_objective('equimod', wiring, reference_side=.875).groups['reference'].chains[0].sample(jax.random.key(0), size)
  np.testing.assert_allclose(jnp.stack(action['crop'][:4]), [.0625, .28125, .875, .4375])


def test_a_matrix_a_pair(key):
  """W(a) = W_0 + sum_k a_k W_k applied to the source, and the source itself where nothing was done."""
  rng = np.random.default_rng(0)
  source, conditioning = rng.normal(size=(B, 3)), rng.normal(size=(B, 2))
  hyper = predictors.Hyper()
  values = hyper.init(key, jnp.float32(source), jnp.float32(conditioning), True)
  run = jax.jit(lambda source, conditioning: hyper.apply(values, source, conditioning, True))
  bias, kernel = (np.float64(values['params'][k]) for k in ('bias', 'kernel'))
  assert kernel.shape == (2, 3, 3) and np.any(kernel)
  wanted = [source[n] @ (bias + sum(conditioning[n, k] * kernel[k] for k in range(2))) for n in range(B)]
  np.testing.assert_allclose(run(jnp.float32(source), jnp.float32(conditioning)), wanted, rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(run(jnp.float32(source), jnp.zeros((B, 2))), np.float32(source))
  text = run.lower(jnp.float32(source), jnp.float32(conditioning)).as_text()
  assert f'tensor<{B}x2x3xf32>' in text and f'tensor<{B}x3x3xf32>' not in text  # no matrix a pair is made


def fitted(kind: str) -> float:
  """The squared error, after learning, of a predictor of turned points of the plane, conditioned on the angle."""
  rng = np.random.default_rng(0)
  z, angle = rng.normal(size=(256, 2)), rng.uniform(0, 2 * np.pi, 256)
  c, s = np.cos(angle), np.sin(angle)
  moved = np.stack([c * z[:, 0] - s * z[:, 1], s * z[:, 0] + c * z[:, 1]], axis=1)
  source, conditioning, target = map(jnp.float32, (z, np.stack([c - 1., s], axis=1), moved))  # conditioning 0 for no turn
  module = predictors.predictor('toy', kind, 2)

  def error(params):
    answer = module.apply({'params': params}, source, conditioning, True, mutable=['batch_stats'])[0]
    return jnp.mean(jnp.square(answer - target))

  def step(params, _):
    return jax.tree.map(lambda p, g: p - .5 * g, params, jax.grad(error)(params)), None

  params = filled(module, source, conditioning)['params']
  return float(jax.jit(lambda params: error(jax.lax.scan(step, params, None, length=300)[0]))(params))


def test_turns_of_the_plane_need_a_matrix():
  assert fitted('hyper') < 1e-6 and fitted('linear') > .3

"""CASSLE: what it feeds the invariance's projector, and its own conditioned pair, against float64 NumPy."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_losses import numeric_gradient, reference
from wirings import make_wiring

from equivariant_ssl import equivariance, registry
from equivariant_ssl.augment.rotate import Rotate
from equivariant_ssl.types import Pair

B, D = 6, 7
make = functools.partial(registry.make, equivariance, 'cassle', hidden=(6,), dim=5)


def turned():
  """Actions [B 2 ...] of the views."""
  return {'rotate': Rotate(jnp.int32(np.random.default_rng(2).integers(4, size=(B, 2))))}


def test_the_projector_reads_the_conditioning(key):
  """Features first and unchanged, then 64 numbers that depend on the conditioning alone."""
  wired = make()(make_wiring('rotate'))
  assert wired.feeds and wired.predicts is None and not wired.groups and wired.uses == ('views',)
  h, actions = jax.random.normal(key, (B, 2, D)), turned()
  fed, values = jax.jit(lambda: wired.head.init_with_output(key, h, actions, True, method='feed'))()
  assert fed.shape == (B, 2, D + 64)
  np.testing.assert_array_equal(fed[..., :D], h)
  turns, code = np.asarray(actions['rotate'].turns).reshape(-1), np.asarray(fed[..., D:]).reshape(-1, 64)
  alike = np.abs(code[:, None] - code[None]).max(-1) < 1e-5
  np.testing.assert_array_equal(alike, turns[:, None] == turns[None])
  assert code.min() < 0  # BatchNorm, and no ReLU, after the last layer
  layers = values['params']['encode_action']
  assert [layers[f'linear_{i}']['kernel'].shape for i in range(6)] == [(3, 64)] + [(64, 64)] * 5
  assert set(layers['norm_5']) == {'scale', 'bias'} and 'bias' not in layers['linear_5'] and 'linear_6' not in layers


def test_no_loss_of_its_own(key):
  wired = make()(make_wiring('rotate'))
  h = jax.random.normal(key, (B, 2, D))
  assert wired.head.embed(h, True) is h
  pair = wired.pairs({'views': h}, {'views': turned()})
  answer = wired.head.apply({}, pair, True)
  assert wired.loss(answer, pair) == 0. and not jax.grad(lambda a: wired.loss(a, pair))(answer).any()


def test_views_of_its_own(key):
  """Role sensitive: a projector of its own, with the action of each view as conditioning."""
  wiring = make_wiring('rotate', sensitive=True)
  wired = make(action_hidden=(8,), action_dim=4)(wiring)
  assert not wired.feeds and wired.predicts is None and wired.uses == ('own',)
  assert wired.groups['own'].chains == wiring.own_chains and wired.groups['own'].size == wiring.size
  h, actions = jax.random.normal(key, (B, 2, D)), turned()
  pair = wired.pairs({'own': h}, {'own': actions})
  np.testing.assert_array_equal(pair.target, h[:, 1])
  still = jax.tree.map(jnp.zeros_like, actions)

  @jax.jit
  def run(seed):
    answer, values = wired.head.init_with_output(seed, pair, True)
    other, _ = wired.head.apply(values, wired.pairs({'own': h}, {'own': still}), True, mutable=['batch_stats'])
    return answer, other, values

  answer, other, values = run(key)
  assert [z.shape for z in answer] == [(B, 5)] * 2
  assert values['params']['project']['linear_0']['kernel'].shape == (D + 4, 6)
  assert np.abs(answer[0] - other[0]).max() > 1e-3  # what was done matters
  np.testing.assert_allclose(np.concatenate(answer).mean(0), 0., atol=1e-5)  # the last BatchNorm, over both views


@pytest.mark.parametrize('temperature', [.2, .5])
def test_loss_equals_float64(temperature):
  wired = make(temperature=temperature)(make_wiring('rotate', sensitive=True))
  a, b = np.random.default_rng(0).normal(size=(2, B, 5))
  loss = jax.jit(jax.value_and_grad(lambda a, b: wired.loss((a, b), Pair(None, None, None, None)), (0, 1)))
  value, grads = loss(jnp.float32(a), jnp.float32(b))
  np.testing.assert_allclose(value, reference(a, b, temperature), rtol=1e-5)
  wanted = (numeric_gradient(lambda x: reference(x, b, temperature), a),
            numeric_gradient(lambda x: reference(a, x, temperature), b))
  for got, want in zip(grads, wanted, strict=True):
    assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()
  order = np.random.default_rng(1).permutation(B)
  np.testing.assert_allclose(loss(jnp.float32(a[order]), jnp.float32(b[order]))[0], value, rtol=1e-5)
  assert loss(jnp.float32(a), jnp.float32(a))[0] < value  # agreement is what it asks for

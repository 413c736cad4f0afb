"""Optimizers and schedules against NumPy, written from the formulas (methods: LARS as EquiMod and SimCLR run it)."""
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from equivariant_ssl import equivariance, invariance, nets, registry
from equivariant_ssl.config import load_config
from equivariant_ssl.nets import predictors
from equivariant_ssl.parallel import sharding
from equivariant_ssl.training import optim, recipe, state

RATES = (.1, .4, .3)  # a warm-up: the two orders of rate and momentum differ only while the rate changes


def reference(params, grads, lr_outside, momentum=.9, weight_decay=.01, trust=1e-3, bias_scale=1.):
  """Weights after a step a rate, in float64."""
  params = {k: v.astype(np.float64) for k, v in params.items()}
  buffer = {k: np.zeros_like(v) for k, v in params.items()}
  for rate, grad in zip(RATES, grads, strict=True):
    for k, g in grad.items():
      g = g.astype(np.float64)
      if params[k].ndim > 1:
        g = g + weight_decay * params[k]
        w, n = np.linalg.norm(params[k]), np.linalg.norm(g)
        g = g * (trust * w / n if w > 0 and n > 0 else 1.)
      own = rate * (bias_scale if params[k].ndim == 1 else 1.)
      buffer[k] = momentum * buffer[k] + (g if lr_outside else own * g)
      params[k] = params[k] - (own if lr_outside else 1.) * buffer[k]
  return params


@pytest.mark.parametrize('bias_scale', [1., .024])
@pytest.mark.parametrize('lr_outside', [False, True])
def test_lars_equals_float64(lr_outside, bias_scale):
  rng = np.random.default_rng(0)
  shapes = {'kernel': (4, 3), 'bias': (3,), 'zero': (2, 2)}
  params = {k: rng.normal(size=s).astype(np.float32) for k, s in shapes.items()}
  params['zero'][:] = 0.
  grads = [{k: rng.normal(size=s).astype(np.float32) for k, s in shapes.items()} for _ in RATES]
  tx = optim.lars(lambda count: jnp.array(RATES)[count.astype(int)], weight_decay=.01, lr_outside=lr_outside,
                  bias_scale=bias_scale)
  found, state = jax.tree.map(jnp.asarray, params), None
  state = tx.init(found)
  for g in grads:
    updates, state = tx.update(g, state, found)
    found = optax.apply_updates(found, updates)
  for k, want in reference(params, grads, lr_outside, bias_scale=bias_scale).items():
    np.testing.assert_allclose(found[k], want, rtol=1e-5, atol=1e-7)


def test_the_norms_of_all_arrays_at_once_are_those_of_each():
  rng = np.random.default_rng(0)
  shapes = {'kernel': (3, 3, 8, 16), 'linear': (5, 40), 'bias': (70,), 'scalar': (), 'zero': (4, 2)}
  params, updates = ({k: jnp.float32(rng.normal(size=s)) for k, s in shapes.items()} for _ in range(2))
  params['zero'] = jnp.zeros((4, 2))
  squares = [np.square(np.float64(params[k])).sum() for k in sorted(shapes)]
  np.testing.assert_allclose(optim.squared_norms(params), squares, rtol=1e-6)
  np.testing.assert_allclose(optim.tree_norm(params), np.sqrt(sum(squares)), rtol=1e-6)
  ours, theirs = (tx.update(updates, tx.init(params), params)
                  for tx in (optim.scale_by_trust(.01),
                             optax.masked(optax.scale_by_trust_ratio(trust_coefficient=.01), optim.weight_mask)))
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-6)
  assert jax.tree.structure(ours) == jax.tree.structure(theirs)  # a checkpoint of the one is one of the other


def test_solo_learns_lars_equals_float64():
  """One weight far within the bound, one clipped by the rate, at a rate that moves."""
  rng = np.random.default_rng(0)
  params = {'small': 1e-3 * rng.normal(size=(4, 3)), 'large': 10. * rng.normal(size=(4, 3)), 'bias': rng.normal(size=3)}
  grads = [{k: rng.normal(size=v.shape) for k, v in params.items()} for _ in RATES]
  single = lambda tree: jax.tree.map(jnp.float32, tree)
  tx = optim.lars(lambda count: jnp.array(RATES)[count.astype(int)], weight_decay=.01, trust=.02, lr_outside=True, clip=True)
  found, state = single(params), tx.init(single(params))
  buffer = {k: np.zeros_like(v) for k, v in params.items()}
  clipped = set()
  for rate, grad in zip(RATES, grads, strict=True):
    updates, state = tx.update(single(grad), state, found)
    found = optax.apply_updates(found, updates)
    for k, g in grad.items():
      if g.ndim > 1:
        w, n = np.linalg.norm(params[k]), np.linalg.norm(g)
        ratio = .02 * w / (n + .01 * w + 1e-8)
        clipped |= {k} if ratio > rate else set()
        g = (g + .01 * params[k]) * min(ratio / rate, 1.)
      buffer[k] = .9 * buffer[k] + g
      params[k] = params[k] - rate * buffer[k]
  assert clipped == {'large'}
  for k, want in params.items():
    np.testing.assert_allclose(found[k], want, rtol=1e-5, atol=1e-7)


def test_solo_learns_lars_after_a_gradient_of_exactly_zero():
  """It moves by its momentum and does not decay; a weight of zeros takes its gradient as it is."""
  tx = optim.lars(lambda count: .1, weight_decay=.5, trust=.02, lr_outside=True, clip=True)
  params = {'kernel': jnp.full((2, 2), 3.), 'zero': jnp.zeros((2, 2))}
  grads = {'kernel': jnp.zeros((2, 2)), 'zero': jnp.ones((2, 2))}
  updates, state = tx.update(grads, tx.init(params), params)
  np.testing.assert_array_equal(updates['kernel'], 0.)
  np.testing.assert_allclose(updates['zero'], -.1, rtol=1e-6)
  first, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
  assert np.any(first['kernel'])
  second, _ = tx.update(grads, state, params)
  np.testing.assert_allclose(second['kernel'], .9 * first['kernel'], rtol=1e-6)


def test_the_two_orders_differ_while_the_rate_changes():
  grads = [{'bias': np.ones(1, np.float32)}] * 3
  inside, outside = (reference({'bias': np.zeros(1, np.float32)}, grads, o)['bias'] for o in (False, True))
  assert abs(inside - outside) > .01


def test_warmup_then_cosine_a_step():
  schedule = optim.warmup_cosine(4., 10, 110, 1e-8)
  assert schedule(0) == 0.
  np.testing.assert_allclose(schedule(5), 2., rtol=1e-5)
  np.testing.assert_allclose(schedule(10), 4., rtol=1e-6)
  np.testing.assert_allclose(schedule(60), 2., rtol=1e-5)
  assert float(schedule(110)) < 1e-6


NAMED = [('encoder', n, {}) for n in registry.names(nets)] + [('invariance', n, {}) for n in registry.names(invariance)]
TOLD = [('equivariance', n, {}) for n in registry.names(equivariance)] + [
    ('equivariance', n, {'predictor': p}) for n in ('equimod', 'sie') for p in predictors.PREDICTORS
    if 'predictor' in registry.schema(equivariance, n)]


def test_what_decays_and_adapts_is_the_kernels_of_every_module_found():
  """A law over every network, invariance and equivariance: what published code leaves out is left out, of any shape."""
  found = {}
  for part, name, more in NAMED + TOLD:
    over = {'encoder.name': 'mlp', f'{part}.name': name, **{f'{part}.{k}': v for k, v in more.items()}}
    over |= {'encoder.patch': '8', 'encoder.size': '16', 'encoder.depth': '1'} if name == 'vit' else {}
    made = recipe.make_recipe(load_config('smoke', over), 1000, 0)._replace(canvas=16)  # 0: no draws to measure units by
    params = state.abstract_train_state(made, sharding.mesh(jax.devices()[:1])).params
    for path, decays in jax.tree_util.tree_leaves_with_path(optim.weight_mask(params)):
      assert decays == (path[-1].key == 'kernel'), f'{part} {name}: {jax.tree_util.keystr(path)}'
    found |= {path[-1].key: leaf.ndim for path, leaf in jax.tree_util.tree_leaves_with_path(params) if leaf.ndim > 1}
  assert found.keys() == {'kernel', 'bias', 'cls_token', 'pos_embed'}, 'a parameter of a new kind: does it decay?'


@pytest.mark.parametrize('name', optim.OPTIMIZERS)
def test_what_is_left_out_has_any_shape(name):
  """Plain steps: neither decay nor trust, for a hypernetwork's bias and a ViT's class token and positions."""
  tx = optim.OPTIMIZERS[name](lambda count: .1, weight_decay=.5)
  left = {'bias': jnp.eye(2), 'cls_token': jnp.ones((1, 1, 2)), 'pos_embed': jnp.ones((1, 3, 2))}
  with jax.numpy_dtype_promotion('standard'):
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, left), tx.init(left), left)
    ones, _ = tx.update(jax.tree.map(jnp.ones_like, left), tx.init(left), left)
  for k in left:
    assert np.all(updates[k] == 0) == (name not in ('sgd', 'adam'))
    if name == 'lars':
      np.testing.assert_allclose(ones[k], -.1 * np.ones_like(left[k]), rtol=1e-6)


@pytest.mark.parametrize('name', optim.OPTIMIZERS)
def test_biases_do_not_decay_where_the_method_says_so(name):
  tx = optim.OPTIMIZERS[name](lambda count: .1, weight_decay=.5)
  params = {'kernel': jnp.ones((2, 2)), 'bias': jnp.ones(2)}
  with jax.numpy_dtype_promotion('standard'):  # optax's own bias correction raises a float to an int
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
  assert np.all(updates['kernel'] < 0)
  # SimSiam's and E-SSL's SGD, and torch's Adam, decay everything.
  assert np.all(updates['bias'] == 0) == (name not in ('sgd', 'adam'))


def test_the_cosine_may_move_an_epoch_at_a_time():
  """SimSiam: constant within an epoch, on the cosine at its start; a warm-up still moves every step."""
  steps, epochs = optim.warmup_cosine(4., 0, 100), optim.warmup_cosine(4., 0, 100, every=10)
  for count in (0, 9, 10, 55, 99):
    assert float(epochs(count)) == float(steps(count // 10 * 10))
  assert float(optim.warmup_cosine(4., 10, 110, every=10)(5)) == 2.
  # A warm-up of half an epoch: the cosine's epochs start where it ends, never back inside it.
  rates = jax.vmap(optim.warmup_cosine(2., 5, 45, every=10))(jnp.arange(5, 45))
  np.testing.assert_allclose(rates, np.repeat(1 + np.cos(np.pi * np.arange(4) / 4), 10), rtol=1e-5)


def test_the_targets_decay():
  """BYOL's tau: the base at first, 1 at the end, half way between them half way."""
  at = lambda step: float(optim.decay_at(.996, step, 1000))
  np.testing.assert_allclose([at(0), at(500), at(1000)], [.996, .998, 1.], rtol=1e-7)


def test_a_part_may_keep_its_rate():
  """The predictor at the peak, the encoder at the schedule's rate, of the same optimizer."""
  params = {'encoder': {'kernel': jnp.ones((2, 2))}, 'predictor': {'kernel': jnp.ones((2, 2))}}
  tx = optim.build('sgd', lambda count: .01, .1, ('predictor',), momentum=0., weight_decay=0.)
  updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
  np.testing.assert_allclose(updates['encoder']['kernel'], -.01, rtol=1e-6)
  np.testing.assert_allclose(updates['predictor']['kernel'], -.1, rtol=1e-6)


def test_a_part_keeps_its_rate_while_lars_follows_the_schedule():
  """Step by step, with LARS's masks inside each part."""
  weights = {'kernel': jnp.full((2, 2), 2.), 'bias': jnp.ones(2)}
  scheduled = lambda count: jnp.array(RATES)[count.astype(int)]
  whole = optim.build('lars', scheduled, .5, ('predictor',))
  alone = {'encoder': optim.lars(scheduled), 'heads_essl': optim.lars(scheduled), 'predictor': optim.lars(lambda count: .5)}
  params = dict.fromkeys(alone, weights)
  state, states = whole.init(params), {part: tx.init(weights) for part, tx in alone.items()}
  update = jax.jit(lambda state, states: (whole.update(params, state, params), {
      part: tx.update(weights, states[part], weights) for part, tx in alone.items()}))
  for _ in RATES:
    (found, state), each = update(state, states)
    states = {part: s for part, (_, s) in each.items()}
    for part, (want, _) in each.items():
      for k in weights:
        np.testing.assert_allclose(found[part][k], want[k], rtol=1e-6)


def test_adam_is_torchs():
  """L2 in the gradient, before the moments: one step against the formula."""
  w, g, wd = 2., .3, .1
  tx = optim.build('adam', lambda count: .5, .5, weight_decay=wd)
  with jax.numpy_dtype_promotion('standard'):
    updates, _ = tx.update({'w': jnp.array(g)}, tx.init({'w': jnp.array(w)}), {'w': jnp.array(w)})
  np.testing.assert_allclose(updates['w'], -.5 * (g + wd * w) / (g + wd * w + 1e-8), rtol=1e-5)

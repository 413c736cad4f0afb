"""The laws of every invariance and equivariance objective found; each needs a float64 reference here too."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_losses import reference as nt_xent

from equivariant_ssl import augment, equivariance, invariance, modules
from equivariant_ssl.types import Embeddings, Pair, Wiring

B, V, E = 8, 2, 6


def simclr(projected, predicted, target):
  return nt_xent(projected[:, 0], projected[:, 1], .5)


REFERENCES = {'simclr': simclr}


@pytest.fixture(params=modules.names(invariance))
def objective(request):
  return request.param, modules.make(invariance, request.param)


@pytest.fixture
def embeddings():
  return Embeddings(*(jax.random.normal(jax.random.key(i), (B, V, E)) for i in range(3)))


def test_invariance_laws(objective, embeddings):
  name, inv = objective
  loss = jax.jit(jax.value_and_grad(inv.loss))
  value, grad = loss(embeddings)
  assert value.shape == () and value.dtype == jnp.float32 and np.isfinite(value)
  np.testing.assert_allclose(value, REFERENCES[name](*map(np.asarray, embeddings)), rtol=1e-5)
  order = np.random.default_rng(0).permutation(B)
  np.testing.assert_allclose(loss(jax.tree.map(lambda z: z[order], embeddings))[0], value, rtol=1e-5)
  assert not np.any(grad.target), 'a gradient flows through the target'
  free = embeddings
  for _ in range(10):
    g = loss(free)[1]
    free = jax.tree.map(lambda z, g: z - .5 * g, free, g)
  assert loss(free)[0] < value


def test_the_published_heads_can_be_made(objective):
  from equivariant_ssl.nets import mlp
  for part in (objective[1].projector, objective[1].predictor):
    if part is not None:
      mlp.make(**part)


def wiring(sensitive: bool = False) -> Wiring:
  flip = modules.make(augment, 'flip')
  chain = augment.chain(flip)
  return Wiring('own', (chain, chain), (chain, chain), chain, sensitive, 8)


@pytest.fixture(params=[n for n in modules.names(equivariance)
                        if modules.factory(equivariance, n).__globals__['PREDICTS'] == 'target'])
def predictive(request):
  return modules.make(equivariance, request.param)(wiring())


def test_equivariance_laws(predictive):
  """The true answer beats doing nothing and the answers to other actions; the order of pairs is nothing."""
  rng = np.random.default_rng(0)
  source, target = jnp.float32(rng.normal(size=(2, B * V, E)))
  pair = Pair(source, target, (), ())
  true = predictive.loss(target, pair)
  assert true.shape == () and np.isfinite(true)
  assert true < predictive.loss(source, pair)
  assert true < predictive.loss(jnp.roll(target, V, axis=0), pair)
  images = np.repeat(rng.permutation(B), V) * V + np.tile(np.arange(V), B)
  np.testing.assert_allclose(predictive.loss(source[images], Pair(source[images], target[images], (), ())),
                             predictive.loss(source, pair), rtol=1e-5)


@pytest.mark.parametrize('name', modules.names(equivariance))
@pytest.mark.parametrize('sensitive', [False, True])
def test_an_objective_asks_for_the_groups_it_uses(name, sensitive):
  wired = modules.make(equivariance, name)(wiring(sensitive))
  assert set(wired.uses) <= {'views', *wired.groups}
  if sensitive and name != 'none':
    assert 'own' in wired.groups and 'views' not in wired.uses


def test_none_is_nothing():
  wired = modules.make(equivariance, 'none')(wiring())
  assert float(wired.loss(jnp.ones((2, 3)), None)) == 0.


def test_equimod_pairs_each_view_with_its_own_reference():
  wired = modules.make(equivariance, 'equimod')(wiring())
  embedded = {'reference': jnp.arange(B, dtype=jnp.float32).reshape(B, 1, 1),
              'views': jnp.arange(B * V, dtype=jnp.float32).reshape(B, V, 1)}
  actions = {'reference': {'flip': jnp.zeros((B, 1), bool)}, 'views': {'flip': jnp.ones((B, V), bool)}}
  pair = wired.pairs(embedded, actions)
  np.testing.assert_array_equal(pair.source[:, 0], np.repeat(np.arange(B), V))
  np.testing.assert_array_equal(pair.target[:, 0], np.arange(B * V))
  assert not pair.before['flip'].any() and pair.after['flip'].all() and pair.after['flip'].shape == (B * V,)

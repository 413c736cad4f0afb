"""The laws of every equivariance objective found, and what their tests share."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_losses import numeric_gradient
from wirings import make_wiring

from equivariant_ssl import equivariance, registry
from equivariant_ssl.augment.rotate import Rotate
from equivariant_ssl.types import Pair

B, V, E = 8, 2, 4
SMALL = {'hidden': (8,), 'dim': E, 'action_dim': 3, 'read_hidden': (8,), 'read_dim': 3, 'splits': 4}
NAMES = registry.names(equivariance)


def make_objective(name: str, wiring=None, **kw):
  """Objective `name`, its layers small, wired."""
  small = {k: v for k, v in SMALL.items() if k in registry.schema(equivariance, name)}
  return registry.make(equivariance, name, **{**small, **kw})(wiring or make_wiring())


TARGETS = [n for n in NAMES if make_objective(n).predicts == 'target']


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


TURNS = np.array([[0, 1], [2, 2], [3, 0], [1, 1], [0, 3], [2, 1], [0, 0], [3, 2]])  # of the two views of each image


def turned(turns=TURNS):
  """Turns [B V] as the actions of every group; the reference's are none."""
  of = lambda t: {'rotate': Rotate(jnp.array(t, jnp.int32))}
  return {'views': of(turns), 'own': of(turns), 'reference': of(np.zeros((len(turns), 1)))}


def turns(**kw):
  """A wiring of an objective about turns, which are all that is done."""
  return make_wiring('rotate', views=(), **kw)


def filled(module, *args, **kw):
  """Variables of `module`: normal weights; running statistics of 1. Nothing is compiled for it."""
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *args, True, **kw))
  values = {'batch_stats': jax.tree.map(lambda s: jnp.ones(s.shape), shapes.get('batch_stats', {}))}
  return {**values, 'params': jax.tree.map(lambda s: jnp.float32(rng.normal(size=s.shape)), shapes.get('params', {}))}


@pytest.mark.parametrize('name', TARGETS)
def test_the_true_answer_is_best(name):
  """It beats doing nothing and the answers to other actions; the order of the images is nothing."""
  loss = jax.jit(make_objective(name).loss)
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
  wiring = make_wiring(sensitive=sensitive)
  wired = make_objective(name, wiring)
  assert set(wired.uses) <= {'views', *wired.groups}
  if name != 'none' and (sensitive or name in ('care', 'stl')):
    assert 'own' in wired.groups and 'views' not in wired.uses
    assert {op.name for op in wired.groups['own'].chains} == {wiring.own_chains[0].name}
  else:
    assert 'own' not in wired.groups and wired.uses[-1] == 'views'


def test_none_is_nothing():
  wired = make_objective('none')
  pair = wired.pairs({'views': jnp.ones((B, V, E))}, {})
  answer = wired.head.apply({}, pair, True)
  assert wired.predicts is None and not wired.groups and answer.shape == (B * V, E)
  assert float(wired.loss(answer, pair)) == 0.

"""The laws of every invariance objective found; each needs a float64 reference here too."""
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_losses import numeric_gradient
from test_losses import reference as nt_xent

from equivariant_ssl import invariance, registry
from equivariant_ssl.errors import UserError
from equivariant_ssl.nets import mlp
from equivariant_ssl.parallel import sharding
from equivariant_ssl.types import Embeddings

B, V, E = 8, 2, 6


def normed(z):
  return z / np.sqrt((z ** 2).sum(-1, keepdims=True))


def simclr(z, _, __, temperature=.5, negatives='all', scale=1.):
  if negatives == 'all':
    return scale * nt_xent(z[:, 0], z[:, 1], temperature)
  s = np.exp(normed(z[:, 0]) @ normed(z[:, 1]).T / temperature)
  return -scale * np.mean([np.log(s[i, i] / s[i].sum()) / 2 + np.log(s[i, i] / s[:, i].sum()) / 2 for i in range(len(s))])


def byol(_, q, target):
  return np.mean(np.sum((normed(q) - normed(target)[:, ::-1]) ** 2, axis=(1, 2)))


def simsiam(_, p, target):
  return np.mean([-normed(p[i, v]) @ normed(target[i, 1 - v]) for i in range(len(p)) for v in range(2)])


def barlow(z, _, __, redundancy=.0051, scale=1.):
  z = (z - z.mean(0)) / np.sqrt(z.var(0) + 1e-5)
  c = z[:, 0].T @ z[:, 1] / len(z)
  return scale * sum((c[i, j] - 1) ** 2 if i == j else redundancy * c[i, j] ** 2 for i, j in np.ndindex(c.shape))


def vicreg(z, _, __, similarity=25., std=25., cov=1.):
  total = similarity * np.mean((z[:, 0] - z[:, 1]) ** 2)
  for x in (z[:, 0], z[:, 1]):
    c = np.cov(x.T)
    total += std * np.mean(np.maximum(0, 1 - np.sqrt(np.diag(c) + 1e-4))) / 2
    total += cov * sum(c[i, j] ** 2 for i, j in np.ndindex(c.shape) if i != j) / len(c)
  return total


REFERENCES = {'barlow': barlow, 'byol': byol, 'none': lambda *_: 0., 'simclr': simclr, 'simsiam': simsiam, 'vicreg': vicreg}
VARIANTS = [('simclr', {'negatives': 'cross', 'scale': 2., 'temperature': .2}), ('barlow', {'redundancy': .1, 'scale': .1}),
            ('vicreg', {'similarity': 1., 'std': 2., 'cov': 3.})]
NAMES = registry.names(invariance)
LOSSES = [n for n in NAMES if n != 'none']


@pytest.fixture(scope='module', params=[(n, {}) for n in NAMES] + VARIANTS, ids=str)
def objective(request):
  """(its name, its settings, value and gradient by the three embeddings): compiled once for all laws."""
  name, kw = request.param
  return name, kw, jax.jit(jax.value_and_grad(registry.make(invariance, name, **kw).loss))


@pytest.fixture(scope='module')
def embeddings():
  return Embeddings(*jnp.float32(np.random.default_rng(0).normal(size=(3, B, V, E))))


def test_value_and_gradient_equal_float64(objective, embeddings):
  """And none of the gradient goes through the target."""
  name, kw, loss = objective
  value, grad = loss(embeddings)
  assert value.shape == () and value.dtype == jnp.float32
  arrays = [np.float64(z) for z in embeddings]
  wanted = lambda projected, predicted: REFERENCES[name](projected, predicted, arrays[2], **kw)
  np.testing.assert_allclose(value, wanted(*arrays[:2]), rtol=1e-5)
  assert not np.any(grad.target), 'a gradient flows through the target'
  want = np.stack([numeric_gradient(lambda x: wanted(x, arrays[1]), arrays[0]),
                   numeric_gradient(lambda x: wanted(arrays[0], x), arrays[1])])
  assert np.abs(np.stack([grad.projected, grad.predicted]) - want).max() <= 1e-5 * np.abs(want).max()


def test_the_order_of_images_is_nothing_and_descent_falls(objective, embeddings):
  name, _, loss = objective
  value = loss(embeddings)[0]
  order = np.random.default_rng(0).permutation(B)
  np.testing.assert_allclose(loss(jax.tree.map(lambda z: z[order], embeddings))[0], value, rtol=1e-5)
  free = embeddings
  for _ in range(5):
    free = jax.tree.map(lambda z, g: z - .1 * g, free, loss(free)[1])
  assert name == 'none' or loss(free)[0] < value


@pytest.mark.parametrize('name', NAMES)
def test_the_published_heads_can_be_made(name):
  inv = registry.make(invariance, name)
  for part in (inv.projector, inv.predictor):
    if part is not None:
      mlp.make(**part)


@pytest.mark.parametrize('name', LOSSES)
def test_two_views_are_compared(name):
  three = Embeddings(*[jnp.zeros((4, 3, E))] * 3)
  with pytest.raises(ValueError, match=f'{name} compares 2 views, but it received 3'):
    jax.eval_shape(registry.make(invariance, name).loss, three)


@pytest.mark.parametrize('name, kw', [('byol', {'update': 'during'}), ('byol', {'decay': 1.5}),
                                      ('simclr', {'negatives': 'some'})])
def test_a_wrong_setting_is_named(name, kw):
  with pytest.raises(UserError, match=f'{name}.{next(iter(kw))}'):
    registry.make(invariance, name, **kw)


@pytest.mark.parametrize('name', ['barlow', 'vicreg'])
def test_identical_whitened_views_cost_nothing(name):
  """Each term of VICReg and of Barlow Twins is 0 where the views agree and their dimensions are white."""
  noise = np.random.default_rng(0).normal(size=(32, E))
  q = np.linalg.qr(np.c_[np.ones(32), noise])[0][:, 1:] * np.sqrt(31)
  z = jnp.float32(np.stack([q, q], axis=1))
  loss = registry.make(invariance, name).loss
  assert 0. <= float(jax.jit(loss)(Embeddings(z, z, z))) < 1e-8
  assert float(jax.jit(loss)(Embeddings(z.at[:, 1].set(z[::-1, 1]), z, z))) > 1.


def test_a_batch_over_four_devices_is_the_batch(embeddings):
  """The same values and gradients, and nothing larger than the embeddings moves."""
  def all_of_them(embeddings):
    return {n: jax.value_and_grad(registry.make(invariance, n).loss)(embeddings) for n in NAMES}

  found = {}
  for n in (1, 4):
    placed = sharding.place(embeddings, sharding.batch_sharding(sharding.mesh(jax.devices()[:n])))
    compiled = jax.jit(all_of_them).lower(placed).compile()
    found[n] = jax.device_get(compiled(placed))
  for one, four in zip(jax.tree.leaves(found[1]), jax.tree.leaves(found[4]), strict=True):
    assert np.abs(one - four).max() <= 1e-5 * np.abs(one).max()
  text = compiled.as_text()
  assert not re.search(r'all-to-all|collective-permute', text)
  moved = [line.split('=', 1)[1] for line in text.splitlines() if re.search(r' all-(gather|reduce)(-start)?\(', line)]
  assert moved
  for line in moved:
    for shape in re.findall(r'f32\[([\d,]*)\]', re.split(r' all-(?:gather|reduce)', line)[0]):
      assert math.prod(int(d) for d in shape.split(',') if d) <= B * V * E, line

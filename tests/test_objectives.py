"""The laws of every invariance objective found; each needs a float64 reference here too."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_losses import reference as nt_xent

from equivariant_ssl import invariance, modules
from equivariant_ssl.types import Embeddings

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

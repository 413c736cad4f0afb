"""NT-Xent against float64 NumPy, written from the formula (bar 4 of the main job); the other losses: test_objectives.py."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from equivariant_ssl import losses


def reference(a, b, temperature, same=None):
  """NT-Xent in float64: for each of the 2M rows, -log softmax of the partner among the rows it may see."""
  rows = np.concatenate([a, b]).astype(np.float64)
  M = len(a)
  rows /= np.sqrt((rows ** 2).sum(1, keepdims=True))
  same = np.arange(M) if same is None else np.asarray(same)
  total = 0.
  for i in range(2 * M):
    partner = (i + M) % (2 * M)
    seen = [k for k in range(2 * M) if k != i and (k == partner or same[k % M] != same[i % M])]
    s = np.array([rows[i] @ rows[k] for k in seen]) / temperature
    total += np.log(np.exp(s - s.max()).sum()) + s.max() - rows[i] @ rows[partner] / temperature
  return total / (2 * M)


def numeric_gradient(f, x, step=1e-6):
  """Central differences in float64."""
  g = np.zeros_like(x)
  for i in np.ndindex(*x.shape):
    up, down = x.copy(), x.copy()
    up[i] += step
    down[i] -= step
    g[i] = (f(up) - f(down)) / (2 * step)
  return g


@pytest.mark.parametrize('temperature', [.1, .5])
@pytest.mark.parametrize('grouped', [False, True])
def test_nt_xent_equals_float64(temperature, grouped):
  rng = np.random.default_rng(0)
  a, b = rng.normal(size=(2, 6, 5))
  same = np.array([0, 0, 1, 1, 2, 2]) if grouped else None
  f = lambda a, b: losses.nt_xent(a, b, temperature, 2 if grouped else 1)
  value, grads = jax.jit(jax.value_and_grad(f, (0, 1)))(jnp.float32(a), jnp.float32(b))
  np.testing.assert_allclose(value, reference(a, b, temperature, same), rtol=1e-5)
  wanted = (numeric_gradient(lambda x: reference(x, b, temperature, same), a),
            numeric_gradient(lambda x: reference(a, x, temperature, same), b))
  for got, want in zip(grads, wanted, strict=True):
    assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()


def test_level_at_random_embeddings():
  """In high dimension every cosine is near 0, so the loss is near log(number of rows - 1)."""
  a, b = np.random.default_rng(2).normal(size=(2, 128, 2048)).astype(np.float32)
  assert abs(float(losses.nt_xent(a, b, .5)) - np.log(255)) < .01
  # EquiMod's at its published batch of 512: 4B rows, log(4B - 1) = 7.62.
  y, y_hat = np.random.default_rng(2).normal(size=(2, 1024, 1024)).astype(np.float32)
  assert abs(float(losses.nt_xent(y, y_hat, .2)) - np.log(4 * 512 - 1)) < .02  # + 1 / (2 E T^2) = .012


def test_memory_of_the_gradient():
  """Temporaries at 2 x 1024 x 128 stay under 64 MiB (a broadcast form needs gigabytes)."""
  shape = jax.ShapeDtypeStruct((1024, 128), jnp.float32)
  compiled = jax.jit(jax.grad(lambda a, b: losses.nt_xent(a, b, .5), (0, 1))).lower(shape, shape).compile()
  assert compiled.memory_analysis().temp_size_in_bytes <= 64 * 2 ** 20


def test_off_diagonal_does_not_cancel():
  """1e-8 beside a diagonal of 64, which a difference of float32 sums would lose."""
  c = jnp.eye(64).at[3, 5].set(1e-4)
  np.testing.assert_allclose(losses.off_diagonal(c), 1e-8, rtol=1e-5)


def test_unit_at_zero():
  assert np.isfinite(jax.grad(lambda x: losses.unit(x).sum())(jnp.zeros((2, 3)))).all()


def test_spread():
  points = np.random.default_rng(3).normal(size=(4096, 32)).astype(np.float32)
  assert abs(float(losses.spread(jnp.array(points))) - 1) < .01
  assert float(losses.spread(jnp.ones((16, 32)))) < 1e-6

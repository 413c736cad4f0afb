"""Gradients that are written out so that a GPU keeps and moves less; the numbers are XLA's."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from equivariant_ssl.nets import conv, pool


@pytest.mark.parametrize(('sides', 'dtype'), [((8, 8), 'float32'), ((7, 10), 'float32'), ((9, 6), 'bfloat16')], ids=str)
def test_the_maximum_pool_of_gpus_is_xlas_with_ties_to_the_first(key, sides, dtype):
  """Few levels, so that most windows have ties; the gradients are whole numbers, so that sums are exact in any order."""
  x = jax.random.randint(key, (3, *sides, 5), -2, 2).astype(dtype)
  y, place = jax.jit(pool.pool_with_places)(x)
  wanted, back = jax.vjp(pool.plain, x)
  np.testing.assert_array_equal(y, wanted)
  assert (place.dtype, place.shape) == (jnp.int8, y.shape) and len(np.unique(place)) == 9
  g = jax.random.randint(jax.random.fold_in(key, 1), y.shape, 1, 9).astype(dtype)
  got = jax.jit(pool.spread_gradient, static_argnums=2)(place, g, sides)
  assert got.dtype == x.dtype
  np.testing.assert_array_equal(got, back(g)[0])
  np.testing.assert_array_equal(jax.vjp(pool.max_pool, x)[1](g)[0], back(g)[0])


def test_which_maximum_pool_a_program_has(key):
  """XLA's where it is one instruction; on CUDA, where that stores an int32 for each pixel, ours."""
  x = jax.random.normal(key, (2, 8, 8, 4))
  traced = jax.jit(lambda x, g: jax.vjp(pool.max_pool, x)[1](g)).trace(x, pool.plain(x))

  def counts(platform):
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    return [text.count(f'stablehlo.{op}') for op in ('select_and_scatter', 'compare')]
  assert counts('cuda') == [0, 8 + 9] and counts('cpu') == counts('tpu') == [1, 1]  # its comparison is its body


def test_on_gpus_what_comes_after_a_convolution_waits_for_its_weight_gradient():
  """The gradient in x takes a g from the barrier that the weight gradient is in; a stem, whose x needs none, has one less."""
  x, kernel, g = jnp.ones((4, 8, 8, 3)), jnp.ones((3, 3, 3, 5)), jnp.ones((4, 8, 8, 5))

  def program(platform, wrt):
    traced = jax.jit(lambda x, kernel, g: jax.vjp(lambda *a: conv.conv2d(*a, 1, 1), x, kernel)[1](g)[wrt]).trace(x, kernel, g)
    return traced.lower(lowering_platforms=(platform,)).as_text()
  whole = program('cuda', slice(None))
  barrier = whole.index('stablehlo.optimization_barrier')
  assert whole[:barrier].count('stablehlo.convolution') == 1 and whole[barrier:].count('stablehlo.convolution') == 1
  assert program('cuda', 1).count('stablehlo.convolution') == 1
  assert 'optimization_barrier' not in program('cpu', slice(None)) + program('tpu', slice(None))

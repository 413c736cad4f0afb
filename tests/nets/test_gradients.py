"""What is written out so that a GPU keeps and moves less, in fewer kernels; the numbers are XLA's."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from equivariant_ssl.nets import conv, norm, pool, resnet
from equivariant_ssl.parallel import sharding


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


def value_and_gradients(f, *inputs):
  """f(*inputs) and the gradients of its product with fixed numbers, all as one list."""
  @jax.jit
  def compute(*inputs):
    y, back = jax.vjp(f, *inputs)
    return y, back(jax.tree.map(lambda y: jax.random.normal(jax.random.key(9), y.shape, y.dtype), y))
  return jax.tree.leaves(compute(*inputs))


@pytest.fixture()
def by_both_forms(monkeypatch):
  """f, inputs -> `value_and_gradients` in the form that a CPU computes and in that of CUDA, both on this CPU."""
  def compare(f, *inputs):
    plain, calls = value_and_gradients(f, *inputs), []

    def take_cuda(*operands, cuda, **_):
      calls.append(cuda)
      return cuda(*operands)
    with monkeypatch.context() as patch:
      patch.setattr(jax.lax, 'platform_dependent', take_cuda)
      cuda = value_and_gradients(lambda *inputs: f(*inputs), *inputs)
    assert calls
    return plain, cuda
  return compare


@pytest.mark.parametrize(('size', 'stride', 'padding'), [(1, 2, 0), (1, 1, 0), (1, 2, 1), (3, 2, 1)], ids=str)
@pytest.mark.parametrize('side', [8, 7])
def test_a_convolution_of_gpus_is_xlas(key, by_both_forms, side, size, stride, padding):
  """Also where a 1x1 kernel meets every second pixel alone."""
  x = jax.random.normal(key, (4, side, side, 3))
  kernel = jax.random.normal(jax.random.fold_in(key, 1), (size, size, 3, 5))
  for a, b in zip(*by_both_forms(lambda x, kernel: conv.conv2d(x, kernel, stride, padding), x, kernel), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_of_a_strided_1x1_convolution_a_gpu_reads_and_writes_a_quarter(key):
  """Its gradient comes out of the convolution with a quarter of the pixels; the zeros are put between them after it."""
  x, kernel = jnp.ones((4, 8, 8, 3)), jnp.ones((1, 1, 3, 5))

  def shapes(platform):
    traced = jax.jit(lambda *a: jax.vjp(lambda *a: conv.conv2d(*a, 2), *a)[1](jnp.ones((4, 4, 4, 5)))).trace(x, kernel)
    lines = traced.lower(lowering_platforms=(platform,)).as_text().splitlines()
    return [line for line in lines if 'stablehlo.convolution' in line and '8x8' in line]
  assert not shapes('cuda') and len(shapes('tpu')) == 2


def test_on_gpus_the_gradient_of_a_strided_blocks_branch_is_there_before_the_shortcuts_is_added(key, by_both_forms):
  """Of the identity in a program for CUDA a barrier is left, of that for others nothing."""
  for a, b in zip(*by_both_forms(resnet.gradient_apart, jax.random.normal(key, (2, 3))), strict=True):
    np.testing.assert_array_equal(a, b)

  def barriers(stride, platform):
    block = resnet.Block(4, stride, True, 'float32', True, 'torchvision')
    x = jnp.ones((2, 4, 4, 16))
    variables = block.init(key, x, True)
    traced = jax.jit(jax.grad(lambda x: block.apply(variables, x, True, mutable=['batch_stats'])[0].sum())).trace(x)
    return traced.lower(lowering_platforms=(platform,)).as_text().count('optimization_barrier')
  assert barriers(2, 'cuda') == barriers(1, 'cuda') + 2  # the other is of the shortcut's weight gradient
  assert barriers(2, 'tpu') == barriers(1, 'tpu')


@pytest.mark.parametrize(('exact', 'groups'), [(False, 1), (True, 1), (False, 3)])
def test_the_batchnorm_of_gpus_is_xlas(key, by_both_forms, exact, groups):
  x = 3. + 2. * jax.random.normal(key, (12, 5, 4, 7))
  scale, bias = jax.random.normal(jax.random.fold_in(key, 1), (2, 7))
  forms = by_both_forms(lambda x, scale, bias: norm.normalize(x, scale, bias, exact, groups)[0], x, scale, bias)
  for a, b in zip(*forms, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(('groups', 'devices'), [(1, 1), (1, 4), (1, 5), (2, 4), (4, 2), (3, 4)])
def test_sums_of_pairs_are_the_sums(key, groups, devices):
  """Whole numbers, so that sums are exact in any order; 24 rows, which 5 devices would not share equally."""
  a, b = jax.random.randint(key, (2, *((24,) if groups == 1 else (groups, 24 // groups)), 3, 5), -9, 9).astype(jnp.float32)
  def sums(a, b):
    with sharding.use_mesh(sharding.mesh(jax.devices()[:devices])):
      return norm.sums_in_pairs(a, b, groups)
  pairs = jax.jit(sums)(a, b)
  for got, wanted in zip(pairs, norm.plain_sums(a, b, groups), strict=True):
    np.testing.assert_array_equal(got, wanted)


def test_on_gpus_the_relu_at_the_end_of_a_block_asks_its_result(key, by_both_forms):
  x = jnp.round(2 * jax.random.normal(key, (64,)))  # with zeros
  plain, cuda = by_both_forms(resnet.end_relu, x)
  for a, b, c in zip(plain, cuda, value_and_gradients(jax.nn.relu, x), strict=True):
    np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(a, c)


def test_remat_keeps_the_result_of_a_block(key):
  """The next block keeps it anyway. Without a policy the ReLU would be computed again; the gradient is the same."""
  x = jax.random.normal(key, (64,))

  def gradient(**policy):
    block = jax.checkpoint(lambda x: resnet.end_relu(jnp.sin(x)), **policy)
    return jax.jit(jax.grad(lambda x: (block(x) ** 2).sum()))
  kept = gradient(policy=jax.checkpoint_policies.save_only_these_names(resnet.BLOCK_END))
  counts = [g.trace(x).lower(lowering_platforms=('cuda',)).as_text().count('call @relu') for g in (kept, gradient())]
  assert counts == [1, 2]
  np.testing.assert_allclose(kept(x), jnp.where(jnp.sin(x) > 0, 2 * jnp.sin(x) * jnp.cos(x), 0.), rtol=1e-5, atol=1e-6)


def test_a_resnet_with_remat_has_the_same_gradient_and_statistics(key):
  x = jax.random.normal(key, (4, 8, 8, 3))
  nets = [resnet.make(10, 'half', width=2, remat=remat) for remat in (False, True)]
  variables = jax.jit(lambda: nets[0].init(key, x, True))()

  def of(net, params):
    def loss(params):
      y, updated = net.apply({**variables, 'params': params}, x, True, mutable=['batch_stats'])
      return (y ** 2).sum(), updated
    return jax.grad(loss, has_aux=True)(params)
  plain, again = jax.jit(lambda params: [of(net, params) for net in nets])(variables['params'])
  for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(again), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)

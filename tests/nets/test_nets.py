"""Networks: the convolution's gradient is XLA's, a ResNet is torchvision's, an MLP is every published head."""
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from equivariant_ssl.errors import UserError
from equivariant_ssl.nets import conv, mlp, resnet

SHAPES = [  # B, side, C, K, kernel, stride, padding
    (16, 8, 3, 4, 3, 1, 1), (6, 9, 4, 5, 3, 2, 1), (8, 14, 3, 4, 7, 2, 3), (5, 8, 4, 6, 1, 2, 0),
    (12, 6, 2, 3, 2, 2, 0)]


def relative(a, b):
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  assert a.shape == b.shape
  return np.abs(a - b).max() / np.abs(b).max()


def arrays(key, B, side, C, K, size, stride, padding, dtype='float32'):
  keys = jax.random.split(key, 3)
  out = (side + 2 * padding - size) // stride + 1
  return (jax.random.normal(keys[0], (B, side, side, C), dtype), jax.random.normal(keys[1], (size, size, C, K)),
          jax.random.normal(keys[2], (B, out, out, K), dtype))


def pullback(function, stride, padding):
  """(x, kernel, cotangent) -> (output, gradient in x, gradient in the kernel)."""
  def both(x, kernel, g):
    y, back = jax.vjp(lambda x, kernel: function(x, kernel, stride, padding), x, kernel)
    return y, *back(g)
  return both


@pytest.mark.parametrize('shape', SHAPES, ids=str)
@pytest.mark.parametrize('patch_bytes', [1, conv.PATCH_BYTES], ids=['sliced', 'whole'])
def test_gradients_of_a_convolution_are_xlas(key, monkeypatch, shape, patch_bytes):
  monkeypatch.setattr(conv, 'PATCH_BYTES', patch_bytes)
  args = arrays(key, *shape)
  fast = jax.jit(pullback(conv.conv2d, *shape[-2:]))(*args)
  for got, wanted in zip(fast, jax.jit(pullback(conv.plain, *shape[-2:]))(*args), strict=True):
    assert relative(got, wanted) < 1e-5


@pytest.mark.parametrize('shape', [SHAPES[0], SHAPES[3]], ids=str)
def test_bfloat16_sums_its_weight_gradient_in_float32(key, monkeypatch, shape):
  monkeypatch.setattr(conv, 'PATCH_BYTES', 1)
  x, kernel, g = arrays(key, *shape, dtype='bfloat16')
  y, dx, dk = jax.jit(pullback(conv.conv2d, *shape[-2:]))(x, kernel, g)
  assert (y.dtype, dx.dtype, dk.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
  wanted = jax.jit(pullback(conv.plain, *shape[-2:]))(x.astype('float32'), kernel, g.astype('float32'))
  assert relative(dk, wanted[2]) < 1e-5   # its inputs are exact in bfloat16, so are their products in float32
  assert relative(y, wanted[0]) < 2e-2


def test_a_program_for_an_accelerator_holds_nothing_of_the_cpus(key, monkeypatch):
  monkeypatch.setattr(conv, 'PATCH_BYTES', 1)
  traced = jax.jit(pullback(conv.conv2d, 1, 1)).trace(*arrays(key, *SHAPES[0]))

  def counts(platform):
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    return [text.count(f'stablehlo.{op}') for op in ('convolution', 'while', 'dot_general', 'concatenate')]
  assert counts('cuda') == counts('tpu') == [3, 0, 0, 0]
  assert counts('cpu') == [2, 1, 1, 1]


def test_on_a_sharded_batch_the_only_collective_is_the_sum_of_the_weight_gradient(key, monkeypatch):
  monkeypatch.setattr(conv, 'PATCH_BYTES', 1)
  mesh = jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,))
  data, everywhere = NamedSharding(mesh, P('data')), NamedSharding(mesh, P())
  args = arrays(key, 32, 8, 3, 4, 3, 1, 1)
  x, kernel, g = (jax.device_put(a, s) for a, s in zip(args, (data, everywhere, data), strict=True))
  function = pullback(conv.conv2d, 1, 1)
  compiled = jax.jit(function, out_shardings=(data, data, everywhere)).lower(x, kernel, g).compile()
  text = compiled.as_text()
  assert not re.findall(r'all-gather|all-to-all|collective-permute|reduce-scatter|collective-broadcast', text)
  summed = re.findall(r'= f32\[([\d,]*)\]\S* all-reduce(?:-start)?\(', text)
  assert [np.prod([int(n) for n in dims.split(',')]) for dims in summed] == [kernel.size]
  for got, wanted in zip(compiled(x, kernel, g), jax.jit(pullback(conv.plain, 1, 1))(*args), strict=True):
    assert relative(got, wanted) < 1e-5


def shapes_of(net, x, **kw):
  return jax.eval_shape(lambda: net.init(jax.random.key(0), x, True, **kw))


@pytest.mark.parametrize(('depth', 'weights'), [  # torchvision's totals, without `fc`
    (18, 11_176_512), (34, 21_284_672), (50, 23_508_032), (101, 42_500_160), (152, 58_143_808)])
def test_a_resnet_has_its_published_size(depth, weights):
  net = resnet.make(depth)
  y, variables = jax.eval_shape(lambda: net.init_with_output(jax.random.key(0), jnp.zeros((2, 64, 64, 3)), True))
  assert sum(a.size for a in jax.tree.leaves(variables['params'])) == weights
  assert (y.shape, y.dtype) == ((2, net.dim), jnp.float32)
  assert net.dim == (2048 if depth >= 50 else 512)


@pytest.mark.parametrize(('init', 'uniform'), [('torchvision', 0), ('stem', 1), ('torch', 12)])
def test_which_convolutions_start_as_torchs_default(key, init, uniform):
  """Uniform within 1 / sqrt(fan in), the bound nearly reached; else normal of variance 2 / fan out."""
  net = resnet.make(10, 'cifar', 16, init=init)
  params = jax.jit(lambda key: net.init(key, jnp.zeros((2, 8, 8, 3)), True)['params'])(key)
  kernels = [a for a in jax.tree.leaves(params) if a.ndim == 4]
  bound = lambda a: 1 / np.sqrt(np.prod(a.shape[:3]))
  default = [a for a in kernels if .9 < np.abs(a).max() / bound(a) <= 1]
  assert len(default) == uniform and (uniform != 1 or default[0] is params['conv1']['kernel'])
  for a in kernels:
    wanted = bound(a) / np.sqrt(3) if any(a is d for d in default) else np.sqrt(2 / (np.prod(a.shape[:2]) * a.shape[3]))
    np.testing.assert_allclose(np.std(a), wanted, rtol=.12)


def test_solo_learns_stem_pads_by_two():
  net = resnet.make(10, 'solo', 8)
  x = jnp.zeros((2, 32, 32, 3))
  shapes = jax.eval_shape(lambda: net.init_with_output(jax.random.key(0), x, True, capture_intermediates=True))
  sides = {k: v['__call__'][0].shape[1] for k, v in shapes[1]['intermediates'].items() if k.startswith(('conv1', 'layer'))}
  assert sides == {'conv1': 34, 'layer1_0': 34, 'layer2_0': 17, 'layer3_0': 9, 'layer4_0': 5}


def test_an_intermediate_stage_can_be_tapped(key):
  net = resnet.make(10, 'cifar', 8)
  x = jax.random.uniform(key, (2, 16, 16, 3))
  variables = jax.jit(lambda key: net.init(key, x, True))(key)
  taps = jax.jit(lambda v: [net.apply(v, x, False, tap) for tap in (None, 1, 2, 3, 4)])(variables)
  assert [y.shape for y in taps] == [(2, dim) for dim in (64, 8, 16, 32, 64)] and net.dims == (8, 16, 32, 64)
  np.testing.assert_array_equal(taps[0], taps[4])


def test_a_resnet_starts_as_torchvisions_with_zero_gain():
  net = resnet.make(10, 'cifar', 16)
  params = jax.jit(lambda key: net.init(key, jnp.zeros((1, 8, 8, 3)), False))(jax.random.key(0))['params']
  block = params['layer4_0']
  assert not block['bn2']['scale'].any() and (block['bn1']['scale'] == 1).all()
  kernel = block['conv2']['kernel']
  assert abs(kernel.std() / np.sqrt(2 / (kernel.shape[3] * 9)) - 1) < .02
  assert jnp.abs(kernel).max() > 3 * kernel.std()   # normal, not truncated at two deviations


def test_a_bfloat16_resnet_keeps_weights_statistics_and_features_in_float32(key):
  nets = [resnet.make(10, 'cifar', 8, dtype, zero_init=False) for dtype in conv.DTYPES]
  x = jax.random.uniform(key, (8, 16, 16, 3))
  variables = jax.jit(lambda key: nets[0].init(key, x, True))(key)
  outs = [jax.jit(lambda v: net.apply(v, x, True, mutable=['batch_stats']))(variables) for net in nets]
  assert {a.dtype for a in jax.tree.leaves(outs)} == {jnp.dtype('float32')}
  assert 1e-5 < relative(outs[1][0], outs[0][0]) < .05
  for got, wanted in zip(*(jax.tree.leaves(stats) for _, stats in outs), strict=True):
    assert relative(got, wanted) < .05


def torch_resnet(state, x, depth, stem, train):
  """The forward pass of torchvision's ResNet, read from the names of its state dict."""
  import torch.nn.functional as F

  def conv_bn(x, i, prefix='', stride=1, conv='conv{}', bn='bn{}'):
    c, b = prefix + conv.format(i), prefix + bn.format(i)
    weight = state[f'{c}.weight']
    x = F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)
    return F.batch_norm(x, *(state[f'{b}.{n}'] for n in ('running_mean', 'running_var', 'weight', 'bias')),
                        training=train, momentum=.1, eps=1e-5)

  blocks, bottleneck = resnet.DEPTHS[depth]
  x = F.relu(conv_bn(x, 1, stride=2 if stem == 'imagenet' else 1))
  x = F.max_pool2d(x, 3, 2, 1) if stem == 'imagenet' else x
  for stage, count in enumerate(blocks, 1):
    for i in range(count):
      prefix, stride = f'layer{stage}.{i}.', 2 if stage > 1 and i == 0 else 1
      strides = (1, stride, 1) if bottleneck else (stride, 1)
      h = x
      for n, s in enumerate(strides, 1):
        h = conv_bn(h, n, prefix, s)
        h = h if n == len(strides) else F.relu(h)
      if f'{prefix}downsample.0.weight' in state:
        x = conv_bn(x, 0, prefix, stride, 'downsample.0', 'downsample.1')
      x = F.relu(x + h)
  return x.mean((2, 3))


@pytest.mark.parametrize(('depth', 'stem', 'side'), [(18, 'imagenet', 40), (50, 'cifar', 16)])
def test_a_resnet_is_torchvisions(key, depth, stem, side):
  torch = pytest.importorskip('torch')
  net = resnet.make(depth, stem, width=4)
  rng = np.random.default_rng(0)
  def drawn(path, a):
    if path[-1].key in ('scale', 'var'):
      return np.float32(rng.uniform(.5, 1.5, a.shape))
    return np.float32(rng.normal(size=a.shape) * (.3 if len(a.shape) < 4 else np.sqrt(2 / np.prod(a.shape[:3]))))
  variables = jax.tree_util.tree_map_with_path(drawn, shapes_of(net, jnp.zeros((1, side, side, 3))))
  params, stats = variables['params'], variables['batch_stats']
  x, r = np.float32(rng.uniform(size=(8, side, side, 3))), np.float32(rng.normal(size=(8, net.dim)))

  def loss(params, train):
    y, new = net.apply({'params': params, 'batch_stats': stats}, x, train, mutable=['batch_stats'])
    return jnp.vdot(y, r), (y, new['batch_stats'])
  evaluated = jax.jit(lambda params: loss(params, False))(params)[1][0]
  grads, (trained, new_stats) = jax.jit(jax.grad(lambda params: loss(params, True), has_aux=True))(params)

  # float64: torch's float32 gradient of the deep one can be 6e-3 from its own (torch 2.11).
  state = {name: torch.from_numpy(np.array(a)) for name, a in resnet.to_torch(params, stats).items()}
  state = {name: a.double() if a.is_floating_point() else a for name, a in state.items()}
  images = torch.from_numpy(x).permute(0, 3, 1, 2).double()
  with torch.no_grad():
    assert relative(evaluated, torch_resnet(state, images, depth, stem, False)) < 1e-4
  learned = {n: a.requires_grad_() for n, a in state.items() if a.is_floating_point() and 'running' not in n}
  y = torch_resnet(state, images, depth, stem, True)
  assert relative(trained, y.detach()) < 1e-4
  gradients = torch.autograd.grad((y * torch.from_numpy(r).double()).sum(), list(learned.values()))   # raises if unused
  after = resnet.to_torch(grads, new_stats)
  assert set(after) == set(state)
  for name, gradient in zip(learned, gradients, strict=True):
    assert relative(after[name], gradient) < 1e-3, name
  for name in state:
    if 'running' in name:
      assert relative(after[name], state[name]) < 1e-4, name


HEADS = {  # every published head that a projector, predictor or parameter encoder is
    'simclr v2': dict(hidden=(12, 12), out=8, last_norm='batch_nobias', init='normal'),
    'simclr v1': dict(hidden=(12,), out=8),
    'equimod projector': dict(hidden=(12, 12), out=8, last_norm='batch_noaffine'),
    'equimod encoder': dict(hidden=(), out=8, last_norm='batch'),
    'simsiam predictor': dict(hidden=(4,), out=8, last_bias=True),
    'byol': dict(hidden=(12,), out=8, bias=True),
    'essl': dict(hidden=(12, 12), out=4, bias=True, norm='layer', last_bias=True),
    'essl simsiam': dict(hidden=(12, 12), out=4, bias=True, norm='layer', last_bias=True,
                         hidden_activation_last=False),
    'plain, activated': dict(hidden=(12,), out=8, norm='none', activation_last=True),
}


def reference(params, stats, x, kw, train):
  """The same head in float64 NumPy."""
  x = np.float64(x)
  last = len(kw['hidden'])
  for i in range(last + 1):
    linear, norm = params[f'linear_{i}'], params.get(f'norm_{i}', {})
    x = x @ np.float64(linear['kernel']) + np.float64(linear.get('bias', 0))
    kind = kw.get('last_norm', 'none') if i == last else kw.get('norm', 'batch')
    if kind != 'none':
      axes = -1 if kind == 'layer' else tuple(range(x.ndim - 1))
      mean, var = x.mean(axes, keepdims=True), x.var(axes, keepdims=True)
      if kind != 'layer' and not train:
        mean, var = (np.float64(stats[f'norm_{i}'][n]) for n in ('mean', 'var'))
      x = (x - mean) / np.sqrt(var + 1e-5) * np.float64(norm.get('scale', 1)) + np.float64(norm.get('bias', 0))
    relu = kw.get('activation_last', False) if i == last else i < last - 1 or kw.get('hidden_activation_last', True)
    x = np.maximum(x, 0) if relu else x
  return x


@pytest.mark.parametrize('name', HEADS)
def test_an_mlp_is_each_published_head(key, name):
  kw = HEADS[name]
  net = mlp.make(**kw)
  x = jax.random.normal(key, (6, 3, 10)) + 2.   # statistics over both leading axes jointly
  variables = jax.jit(lambda key: net.init(key, x, True))(key)
  params, stats = variables['params'], variables.get('batch_stats', {})
  last = len(kw['hidden'])
  for i in range(last + 1):
    assert ('bias' in params[f'linear_{i}']) == kw.get('last_bias' if i == last else 'bias', False)
  wanted = {'batch': {'scale', 'bias'}, 'batch_nobias': {'scale'}}.get(kw.get('last_norm'), set())
  assert set(params.get(f'norm_{last}', ())) == wanted

  params, stats = jax.tree.map(lambda a: a + .1 * jnp.cos(jnp.arange(a.size).reshape(a.shape)), (params, stats))
  variables = {'params': params, 'batch_stats': stats}
  both = jax.jit(lambda v: (net.apply(v, x, True, mutable=['batch_stats'])[0], net.apply(v, x, False)))(variables)
  for got, train in zip(both, (True, False), strict=True):
    assert got.dtype == jnp.float32
    assert relative(got, reference(params, stats, x, kw, train)) < 1e-5


def test_a_nearly_constant_input_keeps_its_digits(key):
  net = mlp.make(hidden=(), out=4, last_norm='batch_noaffine')
  x = jnp.concatenate([jnp.full((16, 1), 1000.), jax.random.normal(key, (16, 1))], axis=1)
  params = {'linear_0': {'kernel': jnp.ones((2, 4))}}
  y = jax.jit(lambda x: net.apply({'params': params}, x, True, mutable=['batch_stats'])[0])(x)
  assert relative(y, reference(params, {}, x, dict(hidden=(), last_norm='batch_noaffine'), True)) < 1e-3


def test_linear_layers_start_as_torchs_or_simclrs(key):
  x = jnp.zeros((2, 400))
  torch, normal = (jax.jit(lambda key: mlp.make((300,), 50, bias=True, init=init).init(key, x, True))(key)['params']
                   for init in mlp.INITS)
  for name in ('kernel', 'bias'):
    assert .97 / 20 < jnp.abs(torch['linear_0'][name]).max() <= 1 / 20
  assert abs(normal['linear_0']['kernel'].std() / .01 - 1) < .02 and not normal['linear_0']['bias'].any()


def test_a_bfloat16_mlp_answers_in_float32(key):
  nets = [mlp.make((16, 16), 8, last_norm='batch_noaffine', dtype=dtype) for dtype in conv.DTYPES]
  x = jax.random.normal(key, (32, 12))
  variables = jax.jit(lambda key: nets[0].init(key, x, True))(key)
  outs = [jax.jit(lambda v: net.apply(v, x, True, mutable=['batch_stats']))(variables) for net in nets]
  assert {a.dtype for a in jax.tree.leaves(outs)} == {jnp.dtype('float32')}
  assert 1e-5 < relative(outs[1][0], outs[0][0]) < .05


@pytest.mark.parametrize(('make', 'kw', 'said'), [
    (resnet.make, dict(depth=19), "'18'"), (resnet.make, dict(stem='cifar10'), "'cifar'"),
    (resnet.make, dict(dtype='float16'), "'bfloat16'"),
    (mlp.make, dict(last_norm='batch_no_affine'), "'batch_noaffine'"), (mlp.make, dict(init='torhc'), "'torch'")])
def test_a_wrong_word_is_answered_with_the_nearest(make, kw, said):
  with pytest.raises(UserError, match=f'Did you mean {said}'):
    make(**kw)

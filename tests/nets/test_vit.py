"""The ViT is timm's: names, sizes, numbers from the definition in float64; and what it shares with the ResNet."""
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from equivariant_ssl.errors import UserError
from equivariant_ssl.export import exporting, importing, timm
from equivariant_ssl.nets import resnet, vit

SMALL = dict(variant='tiny', patch=4, size=16, depth=2)


def scheme(width, patch, tokens, depth=12):
  """{name: shape} of timm's VisionTransformer without `head`, written from its naming scheme."""
  found = {'cls_token': (1, 1, width), 'pos_embed': (1, tokens + 1, width),
           'patch_embed.proj.weight': (width, 3, patch, patch), 'patch_embed.proj.bias': (width,),
           'norm.weight': (width,), 'norm.bias': (width,)}
  for i in range(depth):
    for name, out, inside in (('attn.qkv', 3 * width, width), ('attn.proj', width, width),
                              ('mlp.fc1', 4 * width, width), ('mlp.fc2', width, 4 * width)):
      found |= {f'blocks.{i}.{name}.weight': (out, inside), f'blocks.{i}.{name}.bias': (out,)}
    found |= {f'blocks.{i}.norm{n}.{word}': (width,) for n in (1, 2) for word in ('weight', 'bias')}
  return found


def drawn(seed=0, **kw):
  """Random numbers for every tensor, so large that every part shows in the answer."""
  random = np.random.default_rng(seed)
  return {k: (np.float32(1.) * k.endswith('norm.weight') + random.normal(size=s) * .3).astype(np.float32)
          for k, s in scheme(**kw).items()}


def reference(state, x, heads, depth):
  """The class token after each block, through the last norm, in float64 NumPy; x [N H W 3]."""
  state = {k: np.float64(v) for k, v in state.items()}
  erf = np.vectorize(math.erf)

  def linear(x, name):
    return x @ state[f'{name}.weight'].T + state[f'{name}.bias']

  def norm(x, name):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x ** 2).mean(-1, keepdims=True) + 1e-6) * state[f'{name}.weight'] + state[f'{name}.bias']

  def attention(x, name):
    N, T, D = x.shape
    q, k, v = linear(x, f'{name}.qkv').reshape(N, T, 3, heads, D // heads).transpose(2, 0, 3, 1, 4)
    scores = q @ k.transpose(0, 1, 3, 2) / np.sqrt(D // heads)
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    h = (scores / scores.sum(-1, keepdims=True)) @ v
    return linear(h.transpose(0, 2, 1, 3).reshape(N, T, D), f'{name}.proj')

  kernel = state['patch_embed.proj.weight']
  D, _, p, _ = kernel.shape
  N, H, W, C = x.shape
  patches = np.float64(x).reshape(N, H // p, p, W // p, p, C).transpose(0, 1, 3, 5, 2, 4).reshape(N, -1, C * p * p)
  x = patches @ kernel.reshape(D, -1).T + state['patch_embed.proj.bias']
  x = np.concatenate([np.broadcast_to(state['cls_token'], (N, 1, D)), x], axis=1) + state['pos_embed']
  tokens = []
  for i in range(depth):
    x = x + attention(norm(x, f'blocks.{i}.norm1'), f'blocks.{i}.attn')
    h = linear(norm(x, f'blocks.{i}.norm2'), f'blocks.{i}.mlp.fc1')
    x = x + linear(h * (1 + erf(h / np.sqrt(2))) / 2, f'blocks.{i}.mlp.fc2')
    tokens.append(norm(x, 'norm')[:, 0])
  return tokens


def abstract(net, side):
  return jax.eval_shape(lambda: net.init(jax.random.key(0), jnp.zeros((1, side, side, 3)), True))


def loaded(net, state):
  """`state` under our names."""
  zeros = jax.tree.map(lambda a: np.zeros(a.shape, np.float32), abstract(net, net.size)['params'])
  leaves, form = jax.tree.flatten(zeros)
  names = list(vit.to_torch(zeros))
  turned = lambda a: {4: lambda: a.transpose(2, 3, 1, 0), 2: lambda: a.T}.get(a.ndim, lambda: a)()
  return {'params': jax.tree.unflatten(form, [turned(state[k]) for k in names])}


def relative(a, b):
  return np.abs(np.float64(a) - b).max() / np.abs(b).max()


@pytest.mark.parametrize(('variant', 'weights'), [  # timm's num_classes=0: without `head`
    ('tiny', 5_524_416), ('small', 21_665_664), ('base', 85_798_656)])
def test_names_shapes_and_sizes_are_timms(variant, weights):
  params = abstract(vit.make(variant), 224)['params']
  zeros = jax.tree.map(lambda a: np.broadcast_to(np.float32(0), a.shape), params)
  assert {k: v.shape for k, v in vit.to_torch(zeros).items()} == scheme(vit.VARIANTS[variant][0], 16, 196)
  assert sum(a.size for a in jax.tree.leaves(params)) == weights


@pytest.fixture(scope='module')
def small_vit():
  """(network, torch's tensors, ours, images)."""
  net, state = vit.make(**SMALL), drawn(width=192, patch=4, tokens=16, depth=2)
  return net, state, loaded(net, state), np.random.default_rng(1).normal(size=(3, 16, 16, 3)).astype(np.float32)


def test_features_are_the_definitions(small_vit):
  net, state, variables, x = small_vit
  found = jax.jit(lambda v, x: (net.apply(v, x, True), *net.apply(v, x, False, method='stages')))(variables, x)
  want = reference(state, x, heads=3, depth=2)
  for got, token in zip(found, (want[-1], *want), strict=True):
    assert got.dtype == jnp.float32 and relative(got, token) < 1e-5
  assert net.dims == (192, 192) and net.dim == found[0].shape[1]
  back = vit.to_torch(variables['params'])
  assert back.keys() == state.keys() and all((back[k] == v).all() for k, v in state.items())


def test_features_are_timms(small_vit):
  torch, theirs = pytest.importorskip('torch'), pytest.importorskip('timm')
  net, state, variables, x = small_vit
  theirs = theirs.create_model('vit_tiny_patch16_224', img_size=16, patch_size=4, depth=2, num_classes=0).eval()
  theirs.load_state_dict({k: torch.from_numpy(v) for k, v in state.items()})
  with torch.no_grad():
    want = theirs(torch.from_numpy(x).permute(0, 3, 1, 2)).numpy()
  assert relative(net.apply(variables, x, False), np.float64(want)) < 1e-5


def test_bfloat16_and_views_of_another_size(small_vit):
  net, _, variables, x = small_vit
  low = vit.make(**SMALL, dtype='bfloat16')
  out = jax.jit(lambda v, x: (net.apply(v, x, True), low.apply(v, x, True), net.apply(v, x[:, :8, :8], True)))(variables, x)
  assert {a.dtype for a in out} == {jnp.dtype('float32')} and out[2].shape == out[0].shape
  assert 1e-4 < relative(out[1], np.float64(out[0])) < .1
  with pytest.raises(UserError, match='10 x 10 pixels cannot be cut into patches of 4'):
    abstract(net, 10)


def backward(net, start, x):
  """params -> (the sum of the squared features, what changed beside, what is kept for the way back)."""
  rest = {k: v for k, v in start.items() if k != 'params'}

  def loss(params):
    y, updated = net.apply({'params': params, **rest}, x, True, mutable=['batch_stats'])
    return jnp.square(y).sum(), updated
  return lambda params: jax.vjp(loss, params, has_aux=True)


@pytest.mark.parametrize('make', [lambda **kw: vit.make(**SMALL, **kw), pytest.param(
    lambda **kw: resnet.make(10, 'cifar', 4, **kw), marks=pytest.mark.slow)], ids=['vit', 'resnet'])
def test_remat_keeps_less_and_has_the_same_weights_and_statistics(make):
  x, kept = jnp.zeros((8, 16, 16, 3)), []
  for net in (make(), make(remat=True)):
    start = abstract(net, 16)
    value, back, updated = jax.eval_shape(backward(net, start | jax.tree.map(
        lambda a: jnp.zeros(a.shape), {k: v for k, v in start.items() if k != 'params'}), x), start['params'])
    kept.append((sum(a.size for a in jax.tree.leaves(back)), jax.tree.structure((start, updated))))
  assert kept[1][0] < .5 * kept[0][0] and kept[1][1] == kept[0][1]


def test_remat_has_the_same_gradient(small_vit):
  _, _, variables, x = small_vit
  of = lambda net: backward(net, variables, x)(variables['params'])[1](jnp.float32(1))[0]
  plain, again = jax.jit(lambda: (of(vit.make(**SMALL)), of(vit.make(**SMALL, remat=True))))()
  largest = max(np.abs(a).max() for a in jax.tree.leaves(plain))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * largest), plain, again)


@pytest.mark.slow
def test_out_and_in_is_bitwise(tmp_path):
  """A run of a file of timm's, exported again: the same tensors, timm's names for it, and one line for a wrong file."""
  state = drawn(width=192, patch=8, tokens=4, depth=1)
  save_file({f'module.{k}': v for k, v in state.items()}, tmp_path / 'timm.safetensors')
  said = []
  importing.import_weights(tmp_path / 'timm.safetensors', tmp_path / 'run', 'smoke', {'equivariance': 'none'}, say=said.append)
  assert "vit_tiny_patch16_224, under 'module.': 18 of 18 tensors" in said[0]
  found = load_file(exporting.export(tmp_path / 'run', say=said.append) / 'model.safetensors')
  assert found.keys() == state.keys() and all((found[k] == v).all() for k, v in state.items())
  facts = json.loads((tmp_path / 'run' / 'export' / 'config.json').read_text())
  assert facts['architecture'] == 'vit_tiny_patch16_224' and facts['global_pool'] == 'token'
  assert facts['model_args'] == {'patch_size': 8, 'img_size': 16, 'depth': 1} and facts['num_features'] == 192
  assert facts['pretrained_cfg']['first_conv'] == 'patch_embed.proj' and facts['pretrained_cfg']['classifier'] == 'head'
  assert any("timm.create_model('local-dir:" in line for line in said)
  with pytest.raises(UserError, match='it is a ViT of width 192 with 4 positions, and no such ViT is known'):
    timm.architecture(state | {'pos_embed': state['pos_embed'][:, 1:]})
  with pytest.raises(UserError, match='cls_token is missing'):
    timm.architecture({k: v for k, v in state.items() if k != 'cls_token'})
  assert timm.Architecture('small', 16, 224, 12).standard


@pytest.mark.parametrize(('kw', 'said'), [
    ({'variant': 'smal'}, "Did you mean 'small'"), ({'dtype': 'float16'}, "'bfloat16'"),
    ({'size': 100}, 'a multiple of the patch')])
def test_a_wrong_word_is_answered(kw, said):
  with pytest.raises(UserError, match=said):
    vit.make(**kw)

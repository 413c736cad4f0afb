"""ResNets as torchvision computes and names them (He et al. 2016).

They are of version 1.5: a bottleneck strides in its 3x3 convolution.
"""
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from equivariant_ssl.nets.conv import DTYPES, Conv, fan_out_init, torch_init
from equivariant_ssl.nets.norm import BatchNorm
from equivariant_ssl.nets.pool import max_pool
from equivariant_ssl.registry import unknown_name
from equivariant_ssl.types import Array

# depth: (blocks of each stage, bottleneck). Depth 10 has one basic block a stage, for CPU.
DEPTHS = {10: ((1, 1, 1, 1), False), 18: ((2, 2, 2, 2), False), 34: ((3, 4, 6, 3), False),
          50: ((3, 4, 6, 3), True), 101: ((3, 4, 23, 3), True), 152: ((3, 8, 36, 3), True)}
# stem: (kernel, stride, padding).
STEMS = {'imagenet': (7, 2, 3), 'cifar': (3, 1, 1), 'half': (3, 2, 1), 'solo': (3, 1, 2)}
# init: (of the stem, of the other convolutions).
INITS = {'torchvision': (fan_out_init, fan_out_init), 'stem': (torch_init, fan_out_init),
         'torch': (torch_init, torch_init)}
EXPANSION = 4
BLOCK_END = 'block_end'  # the name of a block's result, which the next block keeps


@jax.custom_vjp
def end_relu(x: Array) -> Array:
  """The ReLU at the end of a block.

  Its gradient on GPUs asks where the result is positive, which the next convolution keeps. XLA
  would compute x again for it, and read all of which x is the sum.
  """
  return nn.relu(x)


def _end_relu_forward(x: Array) -> tuple[Array, tuple[Array, Array]]:
  y = checkpoint_name(nn.relu(x), BLOCK_END)
  return y, (x, y)  # each platform uses one of the two; the other is no part of its program


def _end_relu_backward(saved: tuple[Array, Array], g: Array) -> tuple[Array]:
  x, y = saved
  positive = jax.lax.platform_dependent(  # the barrier, or XLA would compute y again
      x, y, cuda=lambda x, y: jax.lax.optimization_barrier(y) > 0, default=lambda x, y: x > 0)
  return (jnp.where(positive, g, jnp.zeros_like(g)),)


end_relu.defvjp(_end_relu_forward, _end_relu_backward)


@jax.custom_vjp
def gradient_apart(x: Array) -> Array:
  """Return x. On GPUs its gradient is computed before another gradient is added to it.

  XLA would let the 1x1 convolution that computes it begin with the sum, for which it writes out the
  gradient of the shortcut of stride 2, with zeros between the pixels that the shortcut read.
  """
  return x


def _apart_backward(_: None, g: Array) -> tuple[Array]:
  return (jax.lax.platform_dependent(g, cuda=jax.lax.optimization_barrier, default=lambda g: g),)


gradient_apart.defvjp(lambda x: (x, None), _apart_backward)


class Block(nn.Module):
  """A residual block: [N H W C] -> [N H' W' C'].

  It is basic (3x3, 3x3) or a bottleneck (1x1, 3x3, and 1x1 to 4 x width).
  """
  width: int
  stride: int
  bottleneck: bool
  dtype: str
  zero_init: bool
  initial: str

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    conv = functools.partial(Conv, dtype=self.dtype, kernel_init=INITS[self.initial][1])
    if self.bottleneck:
      features = EXPANSION * self.width
      layers = [(self.width, 1, 1), (self.width, 3, self.stride), (features, 1, 1)]
    else:
      features = self.width
      layers = [(features, 3, self.stride), (features, 3, 1)]
    h = gradient_apart(x) if self.stride > 1 else x
    for i, (channels, size, stride) in enumerate(layers, 1):
      last = i == len(layers)
      scale = nn.initializers.zeros if last and self.zero_init else nn.initializers.ones
      h = conv(channels, size, stride, size // 2, name=f'conv{i}')(h)
      h = BatchNorm(scale_init=scale, name=f'bn{i}')(h, train)
      h = h if last else nn.relu(h)
    if x.shape != h.shape:
      x = conv(features, 1, self.stride, name='downsample_0')(x)
      x = BatchNorm(name='downsample_1')(x, train)
    return end_relu(x + h)


class ResNet(nn.Module):
  """A ResNet; see `make`.

  `dims` holds the number of features of each stage, and `dim` that of the last, which a call
  returns.
  """
  depth: int
  stem: str
  width: int
  dtype: str
  zero_init: bool
  remat: bool = False
  initial: str = 'torchvision'

  @property
  def dims(self) -> tuple[int, ...]:
    expansion = EXPANSION if DEPTHS[self.depth][1] else 1
    return tuple(self.width * 2 ** stage * expansion for stage in range(4))

  @property
  def dim(self) -> int:
    return self.dims[-1]

  @nn.compact
  def stages(self, x: Array, train: bool) -> tuple[Array, ...]:
    """The output of each of the four stages for x [N H W C], averaged over its pixels.

    Stage k has [N dims[k]] float32.
    """
    blocks, bottleneck = DEPTHS[self.depth]
    x = Conv(self.width, *STEMS[self.stem], self.dtype, INITS[self.initial][0],
             name='conv1')(x)
    x = nn.relu(BatchNorm(name='bn1')(x, train))
    if self.stem == 'imagenet':
      x = max_pool(x)
    keep_end = jax.checkpoint_policies.save_only_these_names(BLOCK_END)
    block: Any = nn.remat(Block, static_argnums=(2,), policy=keep_end) if self.remat else Block
    pooled = []
    for stage, count in enumerate(blocks):
      for i in range(count):
        stride = 2 if stage > 0 and i == 0 else 1
        x = block(self.width * 2 ** stage, stride, bottleneck, self.dtype, self.zero_init,
                  self.initial, name=f'layer{stage + 1}_{i}')(x, train)
      pooled.append(x.mean((1, 2), dtype=jnp.float32))
    return tuple(pooled)

  def __call__(self, x: Array, train: bool, tap: int | None = None) -> Array:
    """The features [N D] float32 of x [N H W C]: of the last stage, or of stage `tap`, 1 to 4."""
    return self.stages(x, train)[-1 if tap is None else tap - 1]


def make(depth: int = 18, stem: str = 'imagenet', width: int = 64, dtype: str = 'float32',
         zero_init: bool = True, remat: bool = False, init: str = 'torchvision') -> ResNet:
  """A ResNet of `depth` 10 (small, for CPU), 18, 34, 50, 101 or 152.

  stem:      the first convolution: 'imagenet' (7x7, stride 2, then max-pool), 'cifar' (3x3, no
             pool), 'solo' (as 'cifar' but padded by two pixels, solo-learn's: 32 pixels become 34)
             or 'half' (3x3, stride 2, no pool; for small images on CPU).
  width:     the number of channels of the first stage.
  dtype:     the dtype of the computation; 'bfloat16' halves the memory. Weights, BatchNorm
             statistics and the output stay float32.
  zero_init: the last BatchNorm of a block starts at 0, so that the block starts as the identity.
  remat:     keep only the input and the result of each block, and compute the rest again in the
             backward pass: a third more work for less memory.
  init:      how convolutions start: 'torchvision' (normal, by the fan out), 'torch' (torch's
             default, uniform, by the fan in; AugSelf resets them all to it) or 'stem' ('torch' for
             the first convolution alone; EquiMod, CARE and solo-learn replace it for CIFAR).

  Raises UserError for an unknown depth, stem, dtype or init.
  """
  for what, name, known in (('resnet.depth', depth, DEPTHS), ('resnet.stem', stem, STEMS),
                            ('resnet.dtype', dtype, DTYPES), ('resnet.init', init, INITS)):
    if name not in known:
      raise unknown_name(what, str(name), map(str, known))
  return ResNet(depth, stem, width, dtype, zero_init, remat, init)


def to_torch(params: Any, stats: Any) -> dict[str, np.ndarray]:
  """The state dict of torchvision: weights and statistics under its names and in its layouts.

  params, stats: the 'params' and 'batch_stats' of a ResNet. There is no classifier `fc`.
  """
  words = {'kernel': 'weight', 'scale': 'weight', 'bias': 'bias', 'mean': 'running_mean',
           'var': 'running_var'}
  state = {}
  leaves: Any = jax.tree_util.tree_leaves_with_path((params, stats))
  for path, leaf in leaves:
    *modules, word = (part.key for part in path[1:])
    prefix = '.'.join(modules).replace('_', '.')
    array = np.asarray(leaf)
    state[f'{prefix}.{words[word]}'] = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array
    if word == 'mean':
      state[f'{prefix}.num_batches_tracked'] = np.zeros((), np.int64)
  return state

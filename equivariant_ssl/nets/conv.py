"""Convolution as torch computes it, with a weight gradient that is fast on CPU."""
import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from equivariant_ssl.types import Array

# Size of the patches of one slice of the sum, which stay in the caches (see benchmarks/conv.py).
PATCH_BYTES = 5 * 2 ** 20

DTYPES = ('float32', 'bfloat16')   # the dtypes of a network's computation; weights are float32

# torch's default: U(+-1 / sqrt(fan in)).
torch_init = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')
# torchvision's ResNet: kaiming_normal.
fan_out_init = nn.initializers.variance_scaling(2., 'fan_out', 'normal')


def torch_bias(fan_in: int):
  """The initializer of the bias of torch's Linear and Conv2d: U(+-1 / sqrt(fan in))."""
  bound = 1 / math.sqrt(fan_in)
  return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)


def plain(x: jax.Array, kernel: jax.Array, stride: int = 1, padding: int = 0) -> jax.Array:
  """`conv2d` with the gradients that XLA derives."""
  return jax.lax.conv_general_dilated(
      x, kernel.astype(x.dtype), (stride, stride), [(padding, padding)] * 2,
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'))


def _cuda(x: jax.Array, kernel: jax.Array, *, stride: int, padding: int) -> jax.Array:
  """`plain` in a program for CUDA; see `pixel_step`."""
  step = pixel_step(kernel, stride, padding)
  return plain(x[:, ::step, ::step], kernel, stride // step, padding)


def pixel_step(kernel: jax.Array, stride: int, padding: int) -> int:
  """How far apart the pixels are that a program for CUDA gives to a convolution.

  A 1x1 kernel of stride 2 reads a quarter of them, taken out before it. cuDNN would read all, and
  write a gradient of their size with three zeros for each number.
  """
  return stride if kernel.shape[:2] == (1, 1) and not padding else 1


def _taps(x: Array, kernel_size: tuple[int, int], stride: int, padding: int, out_size: list[int]
          ) -> list[Array]:
  """kh x kw arrays [... Ho Wo C]: the part of x [... H W C] that each kernel element meets."""
  x = jnp.pad(x, [(0, 0)] * (x.ndim - 3) + [(padding, padding)] * 2 + [(0, 0)])
  rows, columns = ((n - 1) * stride + 1 for n in out_size)
  return [x[..., i:i + rows:stride, j:j + columns:stride, :]
          for i in range(kernel_size[0]) for j in range(kernel_size[1])]


def _slices(B: int, bytes_per_image: int) -> tuple[int, int]:
  """(shards, slices of a shard): how the sum over B images is cut.

  The number of shards divides both B and the number of devices, so that a slice takes from each
  device images that the device holds.
  """
  shards = math.gcd(B, jax.device_count())
  most = max(1, PATCH_BYTES // bytes_per_image)
  images = max(n for n in range(1, B // shards + 1) if (B // shards) % n == 0 and n <= most)
  return shards, B // shards // images


def _cpu_weight_gradient(x: Array, g: Array, kernel: Array, *, stride: int, padding: int) -> Array:
  """The kernel's gradient, as matrix products over slices of the batch, summed in float32."""
  kh, kw, C, K = kernel.shape
  B, *out_size, _ = g.shape
  shards, n = (1, 1) if kh == kw == 1 else _slices(B, 4 * math.prod(out_size) * kh * kw * C)

  # Arrays [shards b ...]: the shards stay apart until the last sum, the only collective.
  def product(x_g):
    x, g = (a.astype(jnp.float32) for a in x_g)   # exact; XLA:CPU lacks some bfloat16 products
    patches = jnp.concatenate(_taps(x, (kh, kw), stride, padding, out_size), axis=-1)
    contracted = (((1, 2, 3), (1, 2, 3)), ((0,), (0,)))
    return jax.lax.dot_general(g, patches, contracted)   # [shards K kh*kw*C]

  def cut(a):
    return jnp.moveaxis(a.reshape(shards, n, B // shards // n, *a.shape[1:]), 1, 0)

  x_g = cut(x), cut(g)
  if n == 1:
    total = product(jax.tree.map(lambda a: a[0], x_g))
  else:
    zero = jnp.zeros((shards, K, kh * kw * C))
    total = jax.lax.scan(lambda total, x_g: (total + product(x_g), None), zero, x_g)[0]
  return total.sum(0).T.reshape(kernel.shape).astype(kernel.dtype)


def _xla_weight_gradient(x: jax.Array, g: Array, kernel: jax.Array, *, stride: int, padding: int
                         ) -> Array:
  """The kernel's gradient, as XLA derives it."""
  return jax.vjp(lambda kernel: plain(x, kernel, stride, padding), kernel)[1](g)[0]


def _gradient(form: Callable[..., jax.Array], x: jax.Array, g: Array, kernel: jax.Array,
              **settings: int) -> Array:
  """The gradient of x, as XLA derives it from a form of the convolution, `plain` or `_cuda`."""
  return jax.vjp(lambda x: form(x, kernel, **settings), x)[1](g)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def conv2d(x: jax.Array, kernel: jax.Array, stride: int = 1, padding: int = 0) -> jax.Array:
  """The convolution of x [B H W C] with a kernel [kh kw C K]: [B Ho Wo K], in the dtype of x.

  It is `torch.nn.Conv2d`'s: `padding` zeros stand on every side (flax's 'SAME' pads other sides at
  stride 2). In a program for CPU, where XLA's weight gradient is slow at a large B, that gradient
  is a sum of matrix products. Only reverse mode is defined.
  """
  settings = {'stride': stride, 'padding': padding}
  return jax.lax.platform_dependent(x, kernel, cuda=functools.partial(_cuda, **settings),
                                    default=functools.partial(plain, **settings))


def _forward(x, kernel, stride, padding):
  return conv2d(x, kernel, stride, padding), (x, kernel)


def _cuda_weight_gradient(x: jax.Array, g: Array, kernel: jax.Array, *, stride: int, padding: int
                          ) -> tuple[Array, Array]:
  """(the kernel's gradient, g): what uses that g waits for the gradient.

  On several GPUs only the all-reduce of all kernels' gradients waits for them. So XLA computes them
  last of all, and keeps each convolution's x and g until then, also an x that `remat` computes
  again.
  """
  narrow: Any = kernel.astype(x.dtype)
  step = pixel_step(kernel, stride, padding)
  weight = _xla_weight_gradient(x[:, ::step, ::step], g, narrow, stride=stride // step,
                                padding=padding)
  # In the layout of the weights. Else the optimizer would compute in cuDNN's, and each new weight
  # and momentum be copied back.
  weight = with_layout_constraint(weight, Layout((0, 1, 2, 3)))
  weight, g = jax.lax.optimization_barrier((weight, g))
  return weight.astype(kernel.dtype), g


def _backward(stride, padding, saved, g):
  x, kernel = saved
  settings = {'stride': stride, 'padding': padding}
  # The branch is taken at lowering: a program for a GPU or a TPU has no code for CPU.
  weight, g = jax.lax.platform_dependent(
      x, g, kernel, cuda=functools.partial(_cuda_weight_gradient, **settings),
      cpu=lambda x, g, kernel: (_cpu_weight_gradient(x, g, kernel, **settings), g),
      default=lambda x, g, kernel: (_xla_weight_gradient(x, g, kernel, **settings), g))
  d_x = jax.lax.platform_dependent(
      x, g, kernel, cuda=functools.partial(_gradient, _cuda, **settings),
      default=functools.partial(_gradient, plain, **settings))
  return d_x, weight


conv2d.defvjp(_forward, _backward)


class Conv(nn.Module):
  """A convolution: x [B H W C] -> [B Ho Wo features] in `dtype`.

  The kernel [size size C features] and the bias, if there is one, are float32.
  """
  features: int
  size: int = 3
  stride: int = 1
  padding: int = 0
  dtype: str = 'float32'
  kernel_init: nn.initializers.Initializer = torch_init
  bias: bool = False

  @nn.compact
  def __call__(self, x: Array) -> Array:
    shape = (self.size, self.size, x.shape[-1], self.features)
    kernel = self.param('kernel', self.kernel_init, shape, jnp.float32)
    y: Any = conv2d(x.astype(self.dtype), kernel, self.stride, self.padding)
    if self.bias:
      bias_init = torch_bias(self.size ** 2 * x.shape[-1])
      bias = self.param('bias', bias_init, (self.features,), jnp.float32)
      y += bias.astype(y.dtype)[None, None, None]
    return y

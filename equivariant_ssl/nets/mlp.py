"""Multi-layer perceptrons: the projectors, predictors, action encoders and heads."""
import functools
from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp

from equivariant_ssl.nets.conv import DTYPES, torch_bias, torch_init
from equivariant_ssl.nets.norm import BatchNorm
from equivariant_ssl.registry import unknown_name
from equivariant_ssl.types import Array

INITS = ('torch', 'normal')

# `exact`, because heads see few inputs, which may be nearly constant. The names of the norms use
# torch's words for its parts: weight (`use_scale`) and bias.
_batch = functools.partial(BatchNorm, exact=True)
NORMS = {
    'none': None,
    'batch': _batch,
    'batch_nobias': functools.partial(_batch, use_bias=False),
    'batch_noaffine': functools.partial(_batch, use_bias=False, use_scale=False),
    'layer': functools.partial(nn.LayerNorm, epsilon=1e-5, use_fast_variance=False,
                               dtype='float32'),
}


class Mlp(nn.Module):
  """Linear layers: [... D] -> [... out] float32; see `make`.

  A norm and a ReLU follow each hidden layer.
  """
  hidden: tuple[int, ...]
  out: int
  bias: bool
  norm: str
  last_bias: bool
  last_norm: str
  hidden_activation_last: bool
  activation_last: bool
  dtype: str
  initial: str

  def _linear(self, x: Array, i: int, features: int, bias: bool) -> Array:
    torch = self.initial == 'torch'
    return nn.Dense(features, use_bias=bias, dtype=self.dtype, name=f'linear_{i}',
                    kernel_init=torch_init if torch else nn.initializers.normal(.01),
                    bias_init=torch_bias(x.shape[-1]) if torch else nn.initializers.zeros)(x)

  def _norm(self, x: Array, i: int, kind: str, train: bool) -> Array:
    if NORMS[kind] is None:
      return x
    norm = NORMS[kind](name=f'norm_{i}')
    return norm(x).astype(x.dtype) if kind == 'layer' else norm(x, train)

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    x = x.astype(self.dtype)
    last = len(self.hidden)
    for i, features in enumerate(self.hidden):
      x = self._norm(self._linear(x, i, features, self.bias), i, self.norm, train)
      if i < last - 1 or self.hidden_activation_last:
        x = nn.relu(x)
    x = self._linear(x, last, self.out, self.last_bias).astype(jnp.float32)
    x = self._norm(x, last, self.last_norm, train)
    return nn.relu(x) if self.activation_last else x


def make(hidden: Sequence[int] = (2048,), out: int = 128, bias: bool = False,
         norm: str = 'batch', last_bias: bool = False, last_norm: str = 'none',
         hidden_activation_last: bool = True, activation_last: bool = False,
         dtype: str = 'float32', init: str = 'torch') -> Mlp:
  """An MLP: a module (x [... D], train) -> [... out] float32.

  hidden:    the widths of the hidden layers.
  norm:      the norm after each hidden layer: 'none', 'batch', 'batch_nobias', 'batch_noaffine' or
             'layer' (E-SSL). Batch statistics are over all leading axes together.
  last_norm: the norm after the output ('batch_nobias': SimCLR v2; 'batch_noaffine': EquiMod and
             SimSiam).
  bias, last_bias: whether the hidden layers, or the output layer, have a bias.
  hidden_activation_last: whether a ReLU follows the last hidden layer (none in E-SSL's SimSiam
             head).
  activation_last: whether a ReLU follows the output.
  init:      'torch' (`torch.nn.Linear`'s) or 'normal' (SimCLR's N(0, .01), with biases 0).

  Raises UserError for an unknown norm, init or dtype.
  """
  for what, name, known in (('mlp.norm', norm, NORMS), ('mlp.last_norm', last_norm, NORMS),
                            ('mlp.init', init, INITS), ('mlp.dtype', dtype, DTYPES)):
    if name not in known:
      raise unknown_name(what, name, known)
  return Mlp(tuple(hidden), out, bias, norm, last_bias, last_norm, hidden_activation_last,
             activation_last, dtype, init)

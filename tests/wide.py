"""Our own code in float64: where it says float32, float64 is meant; for comparisons that rounding must not decide."""
import contextlib
import functools
from collections.abc import Iterator
from unittest import mock

import jax
import jax.numpy as jnp
from flax import linen as nn

from equivariant_ssl.nets import conv, mlp, resnet, vit

WIDE = 'float64'


@contextlib.contextmanager
def float64() -> Iterator[None]:
  """Networks are made with dtype 'float64', weights are given; what stays float32 shows as an error of 1e-7 or more."""
  layer = functools.partial(nn.LayerNorm, epsilon=1e-5, use_fast_variance=False, dtype=WIDE)
  with contextlib.ExitStack() as stack:
    stack.enter_context(jax.enable_x64(True))
    stack.enter_context(jax.numpy_dtype_promotion('standard'))
    stack.enter_context(mock.patch.object(jnp, 'float32', jnp.float64))
    stack.enter_context(mock.patch.dict(mlp.NORMS, layer=layer))
    for module in (conv, mlp, resnet, vit):
      stack.enter_context(mock.patch.object(module, 'DTYPES', (*module.DTYPES, WIDE)))
    yield

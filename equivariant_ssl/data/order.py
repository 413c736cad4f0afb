"""The order in which a run reads its data: a function of the key and the epoch.

So the position in the data is the training step.
"""
from functools import partial

import jax
import jax.numpy as jnp

from equivariant_ssl.keys import key_for
from equivariant_ssl.types import Array, Key


@partial(jax.jit, static_argnums=2)
def epoch_order(key: Key, epoch: int | Array, n: int) -> Array:
  """A permutation of n records [n] int32.

  Each (key, epoch) has its own, which is the same wherever it is computed.
  """
  return jax.random.permutation(key_for(key, 'order', epoch), jnp.arange(n, dtype=jnp.int32))

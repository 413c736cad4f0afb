"""Predictors of where an embedding goes, and encoders of the conditioning that they receive."""
from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp

from equivariant_ssl.nets import mlp
from equivariant_ssl.registry import unknown_name
from equivariant_ssl.types import Array


class Concat(nn.Module):
  """layers([source [N E], conditioning [N A]]) -> [N E].

  With one layer (EquiMod's) it is affine in both inputs, up to its norm.
  """
  layers: nn.Module

  def setup(self):
    nn.share_scope(self, self.layers)

  def __call__(self, source: Array, conditioning: Array, train: bool) -> Array:
    return self.layers(jnp.concatenate([source, conditioning], axis=-1), train)


class Hyper(nn.Module):
  """A hypernetwork (Garrido et al. 2023): W(a) source, a matrix for each pair: [N E].

  W(a) = W_0 + sum_k a_k W_k for the conditioning a [N A]. W_0 starts as the identity, so that a
  conditioning of zeros moves nothing. SIE's own has no W_0, so that its W(0) is 0.
  """
  @nn.compact
  def __call__(self, source: Array, conditioning: Array, train: bool) -> Array:
    E, A = source.shape[-1], conditioning.shape[-1]
    source, conditioning = source.astype(jnp.float32), conditioning.astype(jnp.float32)
    init = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform', in_axis=(0, 1))
    bias = self.param('bias', lambda key: jnp.eye(E))
    kernel = self.param('kernel', init, (A, E, E))
    # Contracted with the source first: N x A x E numbers, where a matrix a pair has N x E x E.
    products = jnp.einsum('nd,ade->nae', source, kernel, precision='highest')
    change = jnp.einsum('na,nae->ne', conditioning, products, precision='highest')
    return jnp.einsum('nd,de->ne', source, bias, precision='highest') + change


class Identity(nn.Module):
  """The control: an embedding stays where it is, whatever the conditioning says."""

  def __call__(self, source: Array, conditioning: Array, train: bool) -> Array:
    return source


class Unencoded(nn.Module):
  """No encoder: the conditioning as it is."""

  def __call__(self, conditioning: Array, train: bool) -> Array:
    return conditioning


def _concat(hidden: tuple[int, ...], dim: int, dtype: str) -> Concat:
  return Concat(mlp.make(hidden, dim, last_norm='batch_noaffine', dtype=dtype))


PREDICTORS: dict[str, Callable[..., nn.Module]] = {
    'linear': lambda dim, hidden, dtype: _concat((), dim, dtype),
    'mlp': lambda dim, hidden, dtype: _concat(hidden, dim, dtype),
    'hyper': lambda dim, hidden, dtype: Hyper(),
    'identity': lambda dim, hidden, dtype: Identity(),
}
ENCODERS: dict[str, Callable[..., nn.Module]] = {
    'linear': lambda dim, hidden, dtype: mlp.make((), dim, last_norm='batch', dtype=dtype),
    'mlp': lambda dim, hidden, dtype: mlp.make(hidden, dim, last_norm='batch', dtype=dtype),
    'none': lambda dim, hidden, dtype: Unencoded(),
}


def predictor(where: str, kind: str, dim: int, hidden: tuple[int, ...] = (),
              dtype: str = 'float32') -> nn.Module:
  """A predictor: a module (source [N E], conditioning [N A], train) -> [N E], with E = `dim`.

  where: the setting that an error names.
  kind:  'linear', 'mlp' (of `hidden` widths), 'hyper' or 'identity'; UserError for another.
  """
  if kind not in PREDICTORS:
    raise unknown_name(where, kind, PREDICTORS)
  return PREDICTORS[kind](dim, hidden, dtype)


def action_encoder(where: str, kind: str, dim: int, hidden: tuple[int, ...] = (),
                   dtype: str = 'float32') -> nn.Module:
  """An action encoder: a module (conditioning [N A], train) -> [N dim].

  where: the setting that an error names.
  kind:  'linear' (with BatchNorm, EquiMod's), 'mlp' (of `hidden` widths), or 'none', which returns
         the conditioning [N A]; UserError for another.
  """
  if kind not in ENCODERS:
    raise unknown_name(where, kind, ENCODERS)
  return ENCODERS[kind](dim, hidden, dtype)

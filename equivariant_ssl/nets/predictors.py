"""Predictors of where an embedding goes, and encoders of the action that they are told."""
from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp

from equivariant_ssl.nets import mlp
from equivariant_ssl.registry import unknown
from equivariant_ssl.types import Array


class Concat(nn.Module):
  """layers([source [N E], told [N A]]) -> [N E]: affine in both before its norm where it is one layer (EquiMod's)."""
  layers: nn.Module

  def setup(self):
    nn.share_scope(self, self.layers)

  def __call__(self, source: Array, told: Array, train: bool) -> Array:
    return self.layers(jnp.concatenate([source, told], axis=-1), train)


class Hyper(nn.Module):
  """W(told) source with W(told) = W_0 + sum_a told_a W_a, a matrix a pair (Garrido et al. 2023): [N E].

  W_0 starts as the identity: an action of zeros moves nothing. (SIE's own has no W_0, so that its W(0) is 0.)
  """
  @nn.compact
  def __call__(self, source: Array, told: Array, train: bool) -> Array:
    E, A = source.shape[-1], told.shape[-1]
    bias = self.param('bias', lambda key: jnp.eye(E))
    kernel = self.param('kernel', nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform', in_axis=(0, 1)), (A, E, E))
    # Contracted with the source first: N x A x E numbers, where a matrix a pair would be N x E x E.
    turned = jnp.einsum('nd,ade->nae', source.astype(jnp.float32), kernel, precision='highest')
    moved = jnp.einsum('na,nae->ne', told.astype(jnp.float32), turned, precision='highest')
    return jnp.einsum('nd,de->ne', source.astype(jnp.float32), bias, precision='highest') + moved


class Identity(nn.Module):
  """The control: an embedding stays where it is, whatever is told."""

  def __call__(self, source: Array, told: Array, train: bool) -> Array:
    return source


class AsTold(nn.Module):
  """No encoder: the encoded action as it is."""

  def __call__(self, told: Array, train: bool) -> Array:
    return told


PREDICTORS: dict[str, Callable[..., nn.Module]] = {
    'linear': lambda dim, hidden, dtype: Concat(mlp.make((), dim, last_norm='batch_noaffine', dtype=dtype)),
    'mlp': lambda dim, hidden, dtype: Concat(mlp.make(hidden, dim, last_norm='batch_noaffine', dtype=dtype)),
    'hyper': lambda dim, hidden, dtype: Hyper(),
    'identity': lambda dim, hidden, dtype: Identity(),
}
ENCODERS: dict[str, Callable[..., nn.Module]] = {
    'linear': lambda dim, hidden, dtype: mlp.make((), dim, last_norm='batch', dtype=dtype),
    'mlp': lambda dim, hidden, dtype: mlp.make(hidden, dim, last_norm='batch', dtype=dtype),
    'none': lambda dim, hidden, dtype: AsTold(),
}


def predictor(where: str, kind: str, dim: int, hidden: tuple[int, ...] = (), dtype: str = 'float32') -> nn.Module:
  """A module (source [N E = dim], told [N A], train) -> [N E] of `kind` 'linear', 'mlp' (of `hidden` widths), 'hyper' or
  'identity'; UserError, in the name of setting `where`, for another."""
  if kind not in PREDICTORS:
    raise unknown(where, kind, PREDICTORS)
  return PREDICTORS[kind](dim, hidden, dtype)


def action_encoder(where: str, kind: str, dim: int, hidden: tuple[int, ...] = (), dtype: str = 'float32') -> nn.Module:
  """A module (told [N A], train) -> [N dim] of `kind` 'linear' (with BatchNorm: EquiMod's), 'mlp' or 'none' ([N A])."""
  if kind not in ENCODERS:
    raise unknown(where, kind, ENCODERS)
  return ENCODERS[kind](dim, hidden, dtype)

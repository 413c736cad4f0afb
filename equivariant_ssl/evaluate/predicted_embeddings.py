"""Where an equivariance objective's head says that an action moves an embedding."""
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from equivariant_ssl.errors import UserError
from equivariant_ssl.evaluate.frozen import source_action
from equivariant_ssl.registry import unknown_name
from equivariant_ssl.training.recipe import Recipe
from equivariant_ssl.types import Action, Array, Pair


def embed(recipe: Recipe, name: str, values: dict, features: Array) -> Array:
  """The embeddings [N E] of features [N D] for the objective `name`."""
  embedded: Any = recipe.network.apply(values, name, recipe.equivariances, features[:, None], False,
                                       method='embed')
  return embedded[:, 0]


def predict(recipe: Recipe, name: str, values: dict, features: Array, action: Action) -> Array:
  """The embeddings [N E] that objective `name` predicts of features [N D] after actions [N ...]."""
  source, N = embed(recipe, name, values, features), features.shape[0]
  size = jnp.full(2, recipe.canvas, jnp.float32)
  before = source_action(recipe, name, recipe.wirings[name].own_chains[0], size)
  before = jax.tree.map(lambda a: jnp.broadcast_to(a, (N, *jnp.shape(a))), before)
  pair = Pair(source, jnp.zeros_like(source), before, action)
  answer: Any = recipe.network.apply(values, name, pair, False, method='answer')
  return answer.astype(jnp.float32)


def complete_action(recipe: Recipe, name: str, action: Mapping[str, Any], count: int) -> Action:
  """The action [count ...] of the chain of objective `name`, of which `action` says a part.

  See `Encoder.predict`. Raises UserError for an op, field or shape that does not fit.
  """
  identity = recipe.wirings[name].own_chains[0].identity(
      jnp.full(2, recipe.canvas, jnp.float32))
  if unlisted := sorted(set(action) - set(identity)):
    raise unknown_name(f'the chain of {name}', unlisted[0], identity)
  complete = {}
  for op, nothing in identity.items():
    fields, drawn = nothing._asdict(), action.get(op, {})
    drawn = drawn if isinstance(drawn, Mapping) else drawn._asdict()
    if unlisted := sorted(set(drawn) - set(fields)):
      raise unknown_name(f'the action of {op}', unlisted[0], fields)
    for field, value in {**fields, **drawn}.items():
      like = jnp.asarray(fields[field])
      value = jnp.asarray(value, like.dtype)
      if value.shape not in (like.shape, (count, *like.shape)):
        raise UserError(f'{op}.{field} has the shape {value.shape}.',
                        f'Give {like.shape} for all images, or {(count, *like.shape)}.')
      fields[field] = jnp.broadcast_to(value, (count, *like.shape))
    complete[op] = type(nothing)(**fields)
  return complete

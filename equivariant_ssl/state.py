"""The state of a run: all that a checkpoint holds. There is no key in it: key_for(key, name, step) makes them."""
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from equivariant_ssl import shard
from equivariant_ssl.augment import views
from equivariant_ssl.keys import key_for
from equivariant_ssl.recipe import Recipe
from equivariant_ssl.types import Array, Image, Key


class TrainState(NamedTuple):
  """step: int32, steps done. params, stats: weights, BatchNorm statistics. target: (params, stats) of a moving
  average, or (). opt_state: optax's. extras: for an online probe, empty by default."""
  step: Array
  params: dict
  stats: dict
  target: Any
  opt_state: Any
  extras: Any = ()


def build(recipe: Recipe, key: Key) -> TrainState:
  """The state at step 0, a pure function of (recipe, key); no image is needed."""
  side = recipe.canvas
  images = Image(jnp.zeros((2, side, side, 3)), jnp.full((2, 2), side, jnp.float32))
  shown = views(recipe.groups, key_for(key, 'augment', 0), images)
  variables = recipe.network.init(key_for(key, 'init'), shown, recipe.equivariances, True)
  params = variables['params']
  return TrainState(jnp.zeros((), jnp.int32), params, variables.get('batch_stats', {}), (), recipe.tx.init(params))


def initialiser(recipe: Recipe, sharding: NamedSharding | None = None) -> Callable[[Key], TrainState]:
  """`build` as one compiled program for every key (the forward pass that flax traces is dead code, and removed)."""
  return jax.jit(lambda key: build(recipe, key), out_shardings=sharding, compiler_options=shard.ONCE)


def init(recipe: Recipe, key: Key, sharding: NamedSharding | None = None) -> TrainState:
  """`build` of one key, placed by `sharding`."""
  return initialiser(recipe, sharding)(key)

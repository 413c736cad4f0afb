"""The state of a run: all that a checkpoint holds. There is no key in it: key_for(key, name, step) makes them."""
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from equivariant_ssl.augment import views
from equivariant_ssl.keys import key_for
from equivariant_ssl.parallel import sharding
from equivariant_ssl.training.recipe import Recipe
from equivariant_ssl.types import Array, Image, Key


class Head(NamedTuple):
  """A linear classifier: kernel [D K], bias [K]."""
  kernel: Array
  bias: Array


class Probe(NamedTuple):
  """An online probe: its head and its optimiser's memory."""
  head: Head
  memory: Any


class TrainState(NamedTuple):
  """step: int32, steps done. params, stats: weights, BatchNorm statistics. target: (params, stats) of a moving
  average of the encoder and the projector, its statistics its own, or (). opt_state: optax's. extras: the Probe of a run
  that has one, or ()."""
  step: Array
  params: dict
  stats: dict
  target: Any
  opt_state: Any
  extras: Any = ()


def subset(tree: dict, like: dict) -> dict:
  """The part of the nested dict `tree` that `like` has too."""
  return {k: subset(tree[k], v) if isinstance(v, dict) else tree[k] for k, v in like.items()}


def build(recipe: Recipe, key: Key) -> TrainState:
  """The state at step 0, a pure function of (recipe, key); no image is needed.

  The target starts from weights of its own, as BYOL's code has it; where it is updated before the forward pass, as
  a copy, as EquiMod's.
  """
  side = recipe.canvas
  images = Image(jnp.zeros((2, side, side, 3)), jnp.full((2, 2), side, jnp.float32))
  shown = views(recipe.groups, key_for(key, 'augment', 0), images)
  variables = recipe.network.init(key_for(key, 'init'), shown, recipe.equivariances, True)
  params, stats, target = variables['params'], variables.get('batch_stats', {}), ()
  if recipe.invariance.decay is not None:
    its = recipe.network.init(key_for(key, 'target'), {'views': shown['views']}, recipe.equivariances, True,
                              method='target')
    target = its['params'], its.get('batch_stats', {})
    if recipe.invariance.update == 'before':
      target = subset(params, its['params']), target[1]
  extras = ()
  if recipe.probe:
    one = jnp.zeros((1, recipe.size, recipe.size, 3))
    D = jax.eval_shape(lambda v: recipe.network.apply(v, one, method='encode'), variables).shape[-1]
    head = Head(jnp.zeros((D, recipe.probe.classes)), jnp.zeros(recipe.probe.classes))
    extras = Probe(head, recipe.probe.tx.init(head))
  return TrainState(jnp.zeros((), jnp.int32), params, stats, target, recipe.tx.init(params), extras)


def abstract(recipe: Recipe, mesh: Mesh, rule: str = 'replicate') -> TrainState:
  """The shapes, dtypes and placement on `mesh` by `rule`, one of shard.RULES, of a state of `recipe`."""
  return sharding.placed(jax.eval_shape(functools.partial(build, recipe), jax.random.key(0)), mesh, rule)


@functools.lru_cache(8)
def initialiser(recipe: Recipe, mesh: Mesh | None = None, rule: str = 'replicate') -> Callable[[Key], TrainState]:
  """`build` as one compiled program for every key (the forward pass that flax traces is dead code, and removed), the state
  placed on `mesh` by `rule`, one of shard.RULES."""
  if rule == 'replicate':
    out = None if mesh is None else sharding.replicated(mesh)
  else:
    out = jax.tree.map(lambda x: x.sharding, abstract(recipe, mesh, rule))
  return jax.jit(functools.partial(build, recipe), out_shardings=out, compiler_options=sharding.ONCE)

"""The state of a run: all that a checkpoint holds.

It holds no key. A step computes its keys from the seed: key_for(key, name, step).
"""
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


class LinearHead(NamedTuple):
  """A linear classifier: kernel [D K], bias [K]."""
  kernel: Array
  bias: Array


class Probe(NamedTuple):
  """The state of an online probe: its head, and the state of the head's optimizer."""
  head: LinearHead
  memory: Any


class TrainState(NamedTuple):
  """What a training step changes.

  step:      int32, the number of steps done.
  params:    the weights of the networks.
  stats:     their BatchNorm statistics.
  target:    (params, stats) of the target network: the moving average of the encoder's and the
             projector's weights, with BatchNorm statistics of its own. () where there is none.
  opt_state: the state of the optax optimizer.
  extras:    the Probe of a run that has one, else ().
  """
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
  """The state at step 0, a pure function of (recipe, key). It needs no image.

  The target network starts from weights of its own, as in BYOL's code. Where it is updated before
  the forward pass, it starts as a copy, as in EquiMod's code.
  """
  side = recipe.canvas
  images = Image(jnp.zeros((2, side, side, 3)), jnp.full((2, 2), side, jnp.float32))
  first = views(recipe.groups, key_for(key, 'augment', 0), images)

  def init(name: str, inputs: dict, method: str = '__call__') -> tuple[dict, dict]:
    variables: Any = recipe.network.init(key_for(key, name), inputs, recipe.equivariances, True,
                                         method=method)
    return variables['params'], variables.get('batch_stats', {})
  params, stats = init('init', first)
  target = ()
  if recipe.invariance.decay is not None:
    target = init('target', {'views': first['views']}, 'target')
    if recipe.invariance.update == 'before':
      target = subset(params, target[0]), target[1]
  extras = ()
  if recipe.probe:
    image = jnp.zeros((1, recipe.size, recipe.size, 3))
    features: Any = jax.eval_shape(
        lambda v: recipe.network.apply(v, image, method='encode'),
        {'params': params, 'batch_stats': stats})
    classes = recipe.probe.classes
    head = LinearHead(jnp.zeros((features.shape[-1], classes)), jnp.zeros(classes))
    extras = Probe(head, recipe.probe.tx.init(head))
  opt_state = recipe.tx.init(params)
  return TrainState(jnp.zeros((), jnp.int32), params, stats, target, opt_state, extras)


def abstract_train_state(recipe: Recipe, mesh: Mesh, rule: str = 'replicate') -> TrainState:
  """The abstract state of `recipe`: the shape, dtype and sharding of each array, without values.

  rule: how the state is placed on `mesh`, one of sharding.RULES.
  """
  shapes = jax.eval_shape(functools.partial(build, recipe), jax.random.key(0))
  return sharding.sharded_shapes(shapes, mesh, rule)


@functools.lru_cache(8)
def initializer(recipe: Recipe, mesh: Mesh | None = None, rule: str = 'replicate'
                ) -> Callable[[Key], TrainState]:
  """`build` as one compiled program for every key: key -> state, placed on `mesh` by `rule`.

  The forward pass that flax traces to find the shapes is dead code, which XLA removes.
  """
  if mesh is None:
    out = None
  elif rule == 'replicate':
    out = sharding.replicated_sharding(mesh)
  else:
    out = jax.tree.map(lambda x: x.sharding, abstract_train_state(recipe, mesh, rule))
  return jax.jit(functools.partial(build, recipe), out_shardings=out,
                 compiler_options=sharding.ONCE)

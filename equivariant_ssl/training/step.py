"""One step of learning: views, one forward pass, every objective's loss, one update."""
from collections.abc import Callable
from functools import lru_cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from equivariant_ssl import augment
from equivariant_ssl.keys import key_for
from equivariant_ssl.losses import spread
from equivariant_ssl.nets.network import actions, tapped
from equivariant_ssl.parallel import sharding
from equivariant_ssl.training import optim
from equivariant_ssl.training.recipe import Recipe
from equivariant_ssl.training.state import Head, Probe, TrainState, subset
from equivariant_ssl.types import Array, Image, Key, Views

Metrics = dict[str, Array]


class Batch(NamedTuple):
  """images: uint8 [B S S C] canvases; sizes: float32 [B 2], their true (height, width); labels: int32 [B], which an online
  probe alone reads."""
  images: Array
  sizes: Array
  labels: Array | None = None


def views(recipe: Recipe, key: Key, step: Array, batch: Batch) -> dict[str, Views]:
  """The views of a step: a pure function of (seed, step, batch)."""
  images = Image(batch.images.astype(jnp.float32) / 255., batch.sizes)
  return augment.views(recipe.groups, key_for(key, 'augment', step), images)


def encode(recipe: Recipe, params: dict, stats: dict, shown: dict[str, Views], taps: tuple[int, ...]
           ) -> tuple[dict[int, dict[str, Array]], dict]:
  """The features {tap: {group: [B V D]}} of the views, and the new BatchNorm statistics.

  In recipe.accumulate = k parts of B / k images, one after the other, where k > 1: then the features alone are kept, and
  each part is computed a second time when its gradient is (two passes; Gao et al. 2021). What reads the features, heads
  and losses, sees the whole batch, so the gradient is that of the one-pass step exactly where the encoder treats images
  apart (LayerNorm: the ViT), and with BatchNorm in the encoder that of statistics over each part: those of a batch of
  B / k. The running ones move once a step, by the mean of the parts'. A part is every k-th image: no image moves.
  """
  def of(shown: dict[str, Views]) -> tuple[dict[int, dict[str, Array]], dict]:
    features, updated = recipe.network.apply({'params': params, 'batch_stats': stats}, shown, True, taps,
                                             method='features', mutable=['batch_stats'])
    return features, updated.get('batch_stats', {})

  k = recipe.accumulate
  if k == 1:
    return of(shown)
  parts = jax.tree.map(lambda x: x.reshape(-1, k, *x.shape[1:]).swapaxes(0, 1), shown)
  features, updated = jax.lax.map(jax.checkpoint(of, prevent_cse=False), parts)
  whole = lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:])
  # Groups in their order, which a pytree sorts away.
  return ({tap: {name: whole(found[name]) for name in shown} for tap, found in features.items()},
          jax.tree.map(lambda x: x.mean(0), updated))


def watched(recipe: Recipe, features: dict[str, Array]) -> Array:
  """The features [B D] that an online probe reads: of the first of the invariance's views, whatever else is in the pass; of
  the first group where it has none."""
  return features['views' if 'views' in features else next(iter(recipe.groups))][:, 0]


def loss(recipe: Recipe, params: dict, stats: dict, shown: dict[str, Views], target: Array | None = None
         ) -> tuple[Array, tuple[dict, Metrics, Array]]:
  """The weighted sum of the objectives; and (new BatchNorm statistics, each term and the embeddings' spread, the features
  [B D] that a probe reads: see `watched`).

  target: the embeddings [B V E] of a target network, where the invariance has one.
  """
  features, stats = encode(recipe, params, stats, shown, tapped(recipe.equivariances))
  outputs, updated = recipe.network.apply({'params': params, 'batch_stats': stats}, features, actions(shown),
                                          recipe.equivariances, True, method='outputs', mutable=['batch_stats'])
  embeddings = outputs.embeddings if target is None else outputs.embeddings._replace(target=target)
  terms = {'invariance': recipe.invariance.loss(embeddings)}
  for name, objective in recipe.equivariances.items():
    terms[name] = objective.loss(*outputs.answers[name], embeddings)
  total = terms['invariance'] + sum(e.weight * terms[name] for name, e in recipe.equivariances.items())
  z = embeddings.projected
  metrics = {'loss': total, **terms, 'std': spread(z.reshape(-1, z.shape[-1]))}
  return total, (updated.get('batch_stats', {}), metrics, watched(recipe, outputs.features))


def aimed(recipe: Recipe, average: dict, stats: dict, shown: dict[str, Views]) -> tuple[Array, dict]:
  """The embeddings [B V E] of the target network, and its new BatchNorm statistics."""
  features, stats = encode(recipe, average, stats, shown, (0,))
  aim, updated = recipe.network.apply({'params': average, 'batch_stats': stats}, features[0], actions(shown),
                                      recipe.equivariances, True, method='project', mutable=['batch_stats'])
  return aim, updated.get('batch_stats', {})


def averaged(recipe: Recipe, step: Array, average: dict, params: dict) -> dict:
  """The target's weights a step further: tau average + (1 - tau) params, tau rising to 1 by a cosine."""
  tau = optim.decay_at(recipe.invariance.decay, step, recipe.steps)
  return jax.tree.map(lambda a, p: tau * a + (1. - tau) * p, average, subset(params, average))


def probe_step(recipe: Recipe, extras: Probe, features: Array, labels: Array) -> tuple[Probe, Metrics]:
  """A step of the online probe on `features` [B D] of augmented training images, which get no gradient of it; and its
  loss and accuracy before the step. Some points off an evaluation of the frozen network: a monitor, not a result."""
  logits = lambda head: jnp.matmul(jax.lax.stop_gradient(features), head.kernel, precision='highest') + head.bias[None]

  def loss(head: Head) -> tuple[Array, Array]:
    scores = logits(head)
    return optax.softmax_cross_entropy_with_integer_labels(scores, labels).mean(), scores
  (value, scores), grads = jax.value_and_grad(loss, has_aux=True)(extras.head)
  updates, memory = recipe.probe.tx.update(grads, extras.memory, extras.head)
  hits = (scores.argmax(1) == labels).astype(jnp.float32)
  return Probe(optax.apply_updates(extras.head, updates), memory), {'probe_loss': value, 'probe_top1': hits.mean()}


def train_step(recipe: Recipe, key: Key, state: TrainState, batch: Batch, rule: str = 'replicate'
               ) -> tuple[TrainState, Metrics]:
  """state -> next state, and float32 scalars: loss, its terms, std, gradient norm, learning rate.

  rule: how the state lies on the mesh that is set, of shard.RULES. Under 'fsdp' the weights are gathered for the two
  passes alone, and the gradient is scattered before the optimiser and the target move, each device its shard of them.
  """
  lie = partial(sharding.constrain, rule=rule) if rule != 'replicate' else lambda tree: tree
  whole = partial(sharding.constrain, rule='replicate') if rule != 'replicate' else lambda tree: tree
  shown = views(recipe, key, state.step, batch)
  average, target_stats = state.target or (None, None)
  aim = None
  if state.target:
    if recipe.invariance.update == 'before':
      average = averaged(recipe, state.step, average, state.params)
    aim, target_stats = aimed(recipe, whole(average), target_stats, {'views': shown['views']})
  grads, (stats, metrics, features) = jax.grad(partial(loss, recipe), has_aux=True)(
      whole(state.params), state.stats, shown, aim)
  grads = lie(grads)
  updates, opt_state = recipe.tx.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  if state.target and recipe.invariance.update == 'after':
    average = averaged(recipe, state.step, average, params)
  metrics |= {'gradient': optax.tree.norm(grads), 'lr': jnp.asarray(recipe.schedule(state.step), jnp.float32)}
  extras = state.extras
  if recipe.probe:
    extras, seen = probe_step(recipe, extras, features, batch.labels)
    metrics |= seen
  state = state._replace(step=state.step + 1, params=params, stats=stats, opt_state=opt_state, extras=extras,
                         target=(average, target_stats) if state.target else ())
  return lie(state), metrics


def _jitted(recipe: Recipe, mesh: Mesh, donate: bool, rule: str, batch_of: Callable[..., Batch]):
  """`train_step` on `mesh`, of what `batch_of(state, *given)` makes of what is given beside the key and the state."""
  rule = rule if mesh.size > 1 else 'replicate'

  def step(key: Key, state: TrainState, *given) -> tuple[TrainState, Metrics]:
    batch = batch_of(state, *given)
    with sharding.within(mesh):
      return train_step(recipe, key, state, batch, rule)

  out = sharding.replicated(mesh)
  return jax.jit(step, donate_argnums=(1,) if donate else (), out_shardings=out if rule == 'replicate' else (None, out))


@lru_cache(8)
def resident(recipe: Recipe, mesh: Mesh, donate: bool = True, rule: str = 'replicate'):
  """The one jitted step of a run whose data live on the devices: (key, state, data, order) -> state, metrics.

  data: a Batch of the whole training set and order: int32 [num], both replicated. The batch of a step is the
  next B of the epoch's `order`: an index, so no image crosses between devices, nor from the host.
  """
  def batch_of(state: TrainState, data: Batch, order: Array) -> Batch:
    start = state.step % recipe.epoch(len(order)) * recipe.batch
    rows = jax.lax.dynamic_slice_in_dim(order, start, recipe.batch)
    rows = jax.lax.with_sharding_constraint(rows, sharding.split(mesh))
    return jax.lax.with_sharding_constraint(jax.tree.map(lambda x: x[rows], data), sharding.split(mesh))

  return _jitted(recipe, mesh, donate, rule, batch_of)


@lru_cache(8)
def streamed(recipe: Recipe, mesh: Mesh, donate: bool = True, rule: str = 'replicate'):
  """The one jitted step of a run whose data come batch by batch: (key, state, batch) -> state, metrics; the batch is split
  over the devices."""
  return _jitted(recipe, mesh, donate, rule, lambda state, batch: batch)

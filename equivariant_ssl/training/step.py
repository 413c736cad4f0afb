"""One step of learning: views, one forward pass, the loss of every objective, one update."""
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from equivariant_ssl import augment
from equivariant_ssl.keys import key_for
from equivariant_ssl.losses import spread
from equivariant_ssl.nets.network import actions, tapped_stages
from equivariant_ssl.nets.norm import image_groups
from equivariant_ssl.parallel import sharding
from equivariant_ssl.training import optim
from equivariant_ssl.training.recipe import Recipe
from equivariant_ssl.training.state import LinearHead, Probe, TrainState, subset
from equivariant_ssl.types import Array, Image, Key, Views

Metrics = dict[str, Array]
Features = dict[int, dict[str, Array]]  # {tap: {group: [B V D]}}
# Scopes that a compiled program keeps in the names of its operations, for whoever reads it
# (parallel/program_report.py). What is in none of them are the heads and losses.
AUGMENTATION, ENCODER, OPTIMIZER = 'augmentation', 'encoder_pass', 'optimizer'


class Batch(NamedTuple):
  """The canvases of one step.

  images: uint8 [B S S C].
  sizes:  float32 [B 2], the true height and width of each image.
  labels: int32 [B]; an online probe alone reads them.
  """
  images: Array
  sizes: Array
  labels: Array | None = None


def draw_views(recipe: Recipe, key: Key, step: Array | int, batch: Batch) -> dict[str, Views]:
  """The views of a step: a pure function of (seed, step, batch)."""
  images = Image(batch.images.astype(jnp.float32) / 255., batch.sizes)
  return augment.views(recipe.groups, key_for(key, 'augment', step), images)


def _apply(recipe: Recipe, params: dict, stats: dict, *inputs: Any, method: str
           ) -> tuple[Any, dict]:
  """The result of a method of the network in training, and the new BatchNorm statistics."""
  with image_groups(recipe.batchnorm_groups):
    result, updated = recipe.network.apply({'params': params, 'batch_stats': stats}, *inputs,
                                           method=method, mutable=['batch_stats'])
  return result, dict(updated).get('batch_stats', {})


def encode(recipe: Recipe, params: dict, stats: dict, views: dict[str, Views],
           taps: tuple[int, ...]) -> tuple[Features, dict]:
  """The features {tap: {group: [B V D]}} of the views, and the new BatchNorm statistics.

  With recipe.accumulate = k > 1 the encoder computes k parts of B / k images one after the other.
  Only the features are kept, and each part is computed a second time for its gradient (two passes;
  Gao et al. 2021). Heads and losses see the features of the whole batch. So the gradient is exactly
  that of one pass where the encoder treats images apart (LayerNorm: the ViT). With BatchNorm in the
  encoder, the gradient is that of statistics over each part, as in a batch of B / k images. The
  running statistics move once a step, by the mean over the parts. A part is every k-th image, so
  that no image moves between devices.
  """
  def encode_part(views: dict[str, Views]) -> tuple[Features, dict]:
    return _apply(recipe, params, stats, views, True, taps, method='features')

  k = recipe.accumulate
  if k == 1:
    return encode_part(views)

  def join(x: Array) -> Array:
    return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])
  parts = jax.tree.map(lambda x: x.reshape(-1, k, *x.shape[1:]).swapaxes(0, 1), views)
  features, updated = jax.lax.map(jax.checkpoint(encode_part, prevent_cse=False), parts)
  # The groups in their order: a pytree sorts them by name.
  return ({tap: {name: join(groups[name]) for name in views} for tap, groups in features.items()},
          jax.tree.map(lambda x: x.mean(0), updated))


def probe_features(recipe: Recipe, features: dict[str, Array]) -> Array:
  """The features [B D] that an online probe reads: those of the first view of the first group.

  The group is 'views' where the step has it.
  """
  return features['views' if 'views' in features else next(iter(recipe.groups))][:, 0]


def loss(recipe: Recipe, params: dict, stats: dict, views: dict[str, Views],
         target: Array | None = None) -> tuple[Array, tuple[dict, Metrics, Array]]:
  """The weighted sum of the objectives, and (new BatchNorm statistics, metrics, features [B D]).

  The metrics are the terms of the sum and the spread of the embeddings. The features are those that
  a probe reads; see `probe_features`.

  target: the target embeddings [B V E], where the invariance has a target network.
  """
  with jax.named_scope(ENCODER):
    features, stats = encode(recipe, params, stats, views, tapped_stages(recipe.equivariances))
  outputs, stats = _apply(recipe, params, stats, features, actions(views), recipe.equivariances,
                          True, method='outputs')
  embeddings = outputs.embeddings
  if target is not None:
    embeddings = embeddings._replace(target=target)
  terms = {'invariance': recipe.invariance.loss(embeddings)}
  for name, objective in recipe.equivariances.items():
    answer, pair = outputs.answers[name]
    terms[name] = objective.loss(answer, pair, embeddings)
  total = terms['invariance'] + sum(e.weight * terms[name]
                                    for name, e in recipe.equivariances.items())
  z = embeddings.projected
  metrics = {'loss': total, **terms, 'std': spread(z.reshape(-1, z.shape[-1]))}
  return total, (stats, metrics, probe_features(recipe, outputs.features))


def target_embeddings(recipe: Recipe, average: dict, stats: dict, views: dict[str, Views]
                      ) -> tuple[Array, dict]:
  """The target embeddings [B V E], and the target network's new BatchNorm statistics.

  average: the weights of the target network.
  """
  with jax.named_scope(ENCODER):
    features, stats = encode(recipe, average, stats, views, (0,))
  return _apply(recipe, average, stats, features[0], actions(views), recipe.equivariances, True,
                method='project')


def update_average(recipe: Recipe, step: Array, average: dict, params: Any) -> dict:
  """The weights of the target network, one step further: tau average + (1 - tau) params.

  tau rises to 1 by a cosine; see `optim.decay_at`.
  """
  if recipe.invariance.decay is None:
    raise ValueError('This invariance has no target network, so it has no average to update.')
  tau = optim.decay_at(recipe.invariance.decay, step, recipe.steps)
  return jax.tree.map(lambda a, p: tau * a + (1. - tau) * p, average, subset(params, average))


def probe_step(tx: optax.GradientTransformation, probe: Probe, features: Array, labels: Array
               ) -> tuple[Probe, Metrics]:
  """One step of the online probe, and its loss and accuracy before the step.

  tx:       the optimizer of the probe.
  features: [B D], of augmented training images; the gradient stops at them.

  The accuracy is a monitor and not a result: it differs by some points from an evaluation of the
  frozen network.
  """
  def scores_and_loss(head: LinearHead) -> tuple[Array, Array]:
    scores = jnp.matmul(jax.lax.stop_gradient(features), head.kernel,
                        precision='highest') + head.bias[None]
    losses = optax.softmax_cross_entropy_with_integer_labels(scores, labels)
    return losses.mean(), scores
  (value, scores), grads = jax.value_and_grad(scores_and_loss, has_aux=True)(probe.head)
  updates, memory = tx.update(grads, probe.memory, probe.head)
  head: Any = optax.apply_updates(probe.head, updates)
  hits = (scores.argmax(1) == labels).astype(jnp.float32)
  return Probe(head, memory), {'probe_loss': value, 'probe_top1': hits.mean()}


def train_step(recipe: Recipe, key: Key, state: TrainState, batch: Batch, rule: str = 'replicate'
               ) -> tuple[TrainState, Metrics]:
  """(state, batch) -> the next state, and metrics.

  The metrics are float32 scalars: the loss, its terms, the spread ('std'), the gradient's norm, and
  the learning rate.

  rule: how the state is placed on the mesh, one of sharding.RULES. Under 'fsdp' the weights are
        gathered for the forward and backward pass only. The gradient is scattered before the
        optimizer and the moving average run, so that each device updates its own shard.
  """
  def shard_state(tree: Any) -> Any:
    return sharding.constrain(tree, rule) if rule != 'replicate' else tree

  def gather_state(tree: Any) -> Any:
    return sharding.constrain(tree, 'replicate') if rule != 'replicate' else tree

  with jax.named_scope(AUGMENTATION):
    batch_views = draw_views(recipe, key, state.step, batch)
  target, embeddings = state.target, None
  if target:
    average, target_stats = target
    if recipe.invariance.update == 'before':
      with jax.named_scope(OPTIMIZER):
        average = update_average(recipe, state.step, average, state.params)
    embeddings, target_stats = target_embeddings(
        recipe, gather_state(average), target_stats, {'views': batch_views['views']})
    target = average, target_stats
  grads, (stats, metrics, features) = jax.grad(partial(loss, recipe), has_aux=True)(
      gather_state(state.params), state.stats, batch_views, embeddings)
  with jax.named_scope(OPTIMIZER):
    grads = shard_state(grads)
    updates, opt_state = recipe.tx.update(grads, state.opt_state, state.params)
    params: Any = optax.apply_updates(state.params, updates)
    if target and recipe.invariance.update == 'after':
      target = update_average(recipe, state.step, target[0], params), target[1]
    metrics |= {'gradient': optim.tree_norm(grads),
                'lr': jnp.asarray(recipe.schedule(state.step), jnp.float32)}
  extras = state.extras
  if recipe.probe:
    if batch.labels is None:
      raise ValueError('The online probe needs the labels of the batch.')
    extras, probe_metrics = probe_step(recipe.probe.tx, extras, features, batch.labels)
    metrics |= probe_metrics
  state = TrainState(state.step + 1, params, stats, target, opt_state, extras)
  return shard_state(state), metrics


def _jit_step(recipe: Recipe, mesh: Mesh, donate: bool, rule: str,
              build_batch: Callable[..., Batch]) -> jax.stages.Wrapped:
  """`train_step`, jitted on `mesh`: (key, state, *inputs) -> state, metrics.

  build_batch: (state, *inputs) -> the batch of the step.
  """
  rule = rule if mesh.size > 1 else 'replicate'

  # Its name is in the key by which compiled programs are found on disk; names of scopes are not. So
  # a program from before `norm.STATISTICS_SCOPE` is not found, in which a plan would miss them.
  def scoped_step(key: Key, state: TrainState, *inputs: Any) -> tuple[TrainState, Metrics]:
    batch = build_batch(state, *inputs)
    with sharding.use_mesh(mesh):
      return train_step(recipe, key, state, batch, rule)

  out = sharding.replicated_sharding(mesh)
  return jax.jit(scoped_step, donate_argnums=(1,) if donate else (),
                 out_shardings=out if rule == 'replicate' else (None, out))


@lru_cache(8)
def resident_step(recipe: Recipe, mesh: Mesh, donate: bool = True, rule: str = 'replicate'
                  ) -> jax.stages.Wrapped:
  """The jitted step of a run whose data stay on the devices.

  It is (key, state, data, order) -> state, metrics.

  data:  a Batch with the whole training set, a copy on each device; its images are
         `sharding.flatten_canvases` of the canvases.
  order: int32 [num], the order of the images in this epoch, a copy on each device.

  The batch of a step is the next B images of `order`. Each device takes its images by index, so
  that no image crosses between devices, nor comes from the host.
  """
  def build_batch(state: TrainState, data: Batch, order: Array) -> Batch:
    start = state.step % recipe.epoch_steps(len(order)) * recipe.batch
    rows = jax.lax.dynamic_slice_in_dim(order, start, recipe.batch)
    split = sharding.batch_sharding(mesh)
    rows = jax.lax.with_sharding_constraint(rows, split)
    images = sharding.take_canvases(data.images, rows)
    batch = Batch(images, *jax.tree.map(lambda x: x[rows], data[1:]))
    return jax.lax.with_sharding_constraint(batch, split)

  return _jit_step(recipe, mesh, donate, rule, build_batch)


@lru_cache(8)
def streamed_step(recipe: Recipe, mesh: Mesh, donate: bool = True, rule: str = 'replicate'
                  ) -> jax.stages.Wrapped:
  """The jitted step of a run whose data come batch by batch.

  It is (key, state, batch) -> state, metrics. The batch is split over the devices.
  """
  return _jit_step(recipe, mesh, donate, rule, lambda state, batch: batch)

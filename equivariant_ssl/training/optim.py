"""Optimizers as the methods use them.

The mathematics is optax's. What stands here is which weights decay and adapt in published code.
"""
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from equivariant_ssl.errors import UserError
from equivariant_ssl.types import Array

LEFT_OUT = ('bias', 'scale', 'cls_token', 'pos_embed')  # see `weight_mask`


def warmup_cosine(peak: float, warmup: int, total: int, end: float = 0., every: int = 1
                  ) -> optax.Schedule:
  """A learning rate that rises to `peak` in `warmup` steps, then falls to `end` at step `total`.

  The rise is linear from 0, the fall is a cosine. After the warm-up the rate changes once in
  `every` steps (SimSiam: once an epoch). EquiMod starts at `peak` x 1e-8, which float32 cannot tell
  from 0.
  """
  schedule = optax.warmup_cosine_decay_schedule(0., peak, warmup, max(total, warmup + 1), end)

  def rate(count):
    count = jnp.asarray(count)
    count -= jnp.maximum(count - warmup, 0) % every
    return schedule(count.astype(jnp.float32))  # optax mixes the types of its count and bounds
  return rate


def decay_at(base: float, step: Array, total: int) -> Array:
  """The decay of BYOL's moving average at `step` (Grill et al. 2020): a scalar.

  It is 1 - (1 - base) (cos(pi step / total) + 1) / 2, which is `base` at first and 1 at the end.
  """
  progress = jnp.cos(jnp.pi * jnp.asarray(step, jnp.float32) / total)
  return 1. - (1. - base) * (progress + 1.) / 2.


def weight_mask(params: Any) -> Any:
  """The tree of `params` with True for the kernels of Linear and Conv layers, else False.

  In published code the rest neither decays nor adapts: biases of any shape (a hypernetwork's is a
  matrix), the gains of norms, and a ViT's class token and position embedding (timm's
  no_weight_decay).
  """
  return jax.tree_util.tree_map_with_path(
      lambda path, p: p.ndim > 1 and path[-1].key not in LEFT_OUT, params)


def squared_norms(tree: Any) -> Array:
  """[T]: the sum of the squares of each of the T arrays of a tree, in the order of its leaves.

  Each array is summed over its last axis alone, and then all of them at once. Summed one by one, an
  accelerator would run two kernels or more for each of them, most of which are short.
  """
  sums = [jnp.square(x).sum(-1).reshape(-1) if x.ndim > 1 else jnp.square(x).reshape(-1)
          for x in jax.tree.leaves(tree)]
  longest = max(s.size for s in sums)
  rows = jnp.stack([jnp.pad(s, (0, longest - s.size)) for s in sums])
  # The barrier, or XLA would sum the rows one by one again.
  return jax.lax.optimization_barrier(rows).sum(1)


def tree_norm(tree: Any) -> Array:
  """The norm of all numbers of a tree together; `optax.tree.norm` in fewer kernels."""
  return jnp.sqrt(squared_norms(tree).sum())


def scale_by_trust(trust: float) -> optax.GradientTransformation:
  """The update times trust |w| / |update|, or as it is where either norm is exactly 0.

  What is not in `weight_mask` is left as it is. It is `optax.scale_by_trust_ratio`, with the norms
  of all arrays at once.
  """
  def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
    leaves, structure = jax.tree.flatten(updates)
    is_weight = jax.tree.leaves(weight_mask(params))
    if not any(is_weight):
      return updates, state

    def norms(tree: Any) -> Array:
      return jnp.sqrt(squared_norms(list(itertools.compress(jax.tree.leaves(tree), is_weight))))
    w_norm, norm = norms(params), norms(updates)
    is_zero = (w_norm == 0.) | (norm == 0.)
    ratio = jnp.where(is_zero, 1., trust * w_norm / jnp.where(is_zero, 1., norm))
    # The rest takes its 1 from the same array: XLA writes one kernel for the arrays of one shape
    # whose updates all read one array. The barrier hides from it that this is 1.
    factors, weights = jax.lax.optimization_barrier(jnp.append(ratio, 1.)), itertools.count()
    scaled = [u * factors[next(weights) if is_w else -1]
              for u, is_w in zip(leaves, is_weight, strict=True)]
    return jax.tree.unflatten(structure, scaled), state

  # The state is that of `optax.masked`, which older checkpoints hold.
  return optax.GradientTransformation(lambda params: optax.MaskedState(optax.EmptyState()), update)


def clipped_trust(schedule: optax.Schedule, weight_decay: float, trust: float
                  ) -> optax.GradientTransformation:
  """The update of solo-learn's LARS with `clip_lr`.

  It is (g + wd w) min(trust |w| / (|g| + wd |w|) / rate, 1), or g alone, without decay, where
  either norm is exactly 0. So the trust ratio is itself the step, and the rate is its upper bound.
  """
  def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
    rate = schedule(state.count)

    def scale(g: Array, w: Array, g_norm: Array, w_norm: Array) -> Array:
      ratio = trust * w_norm / (g_norm + weight_decay * w_norm + 1e-8)
      scaled = (g + weight_decay * w) * jnp.minimum(ratio / jnp.maximum(rate, 1e-12), 1.)
      return jnp.where((g_norm > 0) & (w_norm > 0), scaled, g)
    grads, structure = jax.tree.flatten(updates)
    norms = (jnp.sqrt(squared_norms(tree)) if grads else () for tree in (grads, params))
    scaled = map(scale, grads, jax.tree.leaves(params), *norms)
    return (jax.tree.unflatten(structure, list(scaled)),
            optax.ScaleByScheduleState(state.count + 1))

  return optax.GradientTransformation(
      lambda params: optax.ScaleByScheduleState(jnp.zeros((), jnp.int32)), update)


def lars(schedule: optax.Schedule, momentum: float = .9, weight_decay: float = 1e-6,
         trust: float = 1e-3, lr_outside: bool = False, bias_scale: float = 1., clip: bool = False
         ) -> optax.GradientTransformation:
  """LARS as EquiMod and SimCLR run it.

  The gradient g + wd w is scaled by trust |w| / |g + wd w| (by 1 where either norm is 0), and the
  learning rate is inside the momentum buffer. What is not in `weight_mask` neither decays nor
  adapts.

  lr_outside: the learning rate multiplies after the momentum (BYOL, VICReg, Barlow Twins).
  bias_scale: what is not in `weight_mask` learns at this multiple of the rate (Barlow Twins:
              .0048 / .2).
  clip:       solo-learn's form; see `clipped_trust`.

  Raises UserError for `clip` without `lr_outside`.
  """
  if clip and not lr_outside:
    raise UserError('optimizer.clip bounds a learning rate that is outside the momentum.',
                    'Add --config.optimizer.lr_outside=True')
  if lr_outside:
    if clip:
      scaled = [optax.masked(clipped_trust(schedule, weight_decay, trust), weight_mask)]
    else:
      scaled = [optax.add_decayed_weights(weight_decay, weight_mask), scale_by_trust(trust)]
    tx = optax.chain(*scaled, optax.trace(momentum), optax.scale_by_learning_rate(schedule))
  else:
    # As optax.lars.
    tx = optax.chain(optax.add_decayed_weights(weight_decay, weight_mask), scale_by_trust(trust),
                     optax.scale_by_learning_rate(schedule), optax.trace(momentum))
  if bias_scale == 1.:
    return tx

  def bias_mask(params: Any) -> Any:
    return jax.tree.map(lambda is_weight: not is_weight, weight_mask(params))
  return optax.chain(tx, optax.masked(optax.scale(bias_scale), bias_mask))


def sgd(schedule: optax.Schedule, momentum: float = .9, weight_decay: float = 5e-4,
        nesterov: bool = False, decay_all: bool = True) -> optax.GradientTransformation:
  """SGD with L2 regularization in the gradient.

  decay_all: every parameter decays (SimSiam, E-SSL); else those of `weight_mask` alone.
  """
  return optax.chain(optax.add_decayed_weights(weight_decay, None if decay_all else weight_mask),
                     optax.sgd(schedule, momentum or None, nesterov))


def adamw(schedule: optax.Schedule, weight_decay: float = 1e-4, b1: float = .9, b2: float = .999
          ) -> optax.GradientTransformation:
  """AdamW. The parameters of `weight_mask` alone decay."""
  return optax.adamw(schedule, b1, b2, weight_decay=weight_decay, mask=weight_mask)


def adam(schedule: optax.Schedule, weight_decay: float = 0., b1: float = .9, b2: float = .999
         ) -> optax.GradientTransformation:
  """Adam with L2 regularization in the gradient of every parameter.

  It is torch.optim.Adam's form (SIE, CARE).
  """
  return optax.chain(optax.add_decayed_weights(weight_decay), optax.adam(schedule, b1, b2))


OPTIMIZERS = {'lars': lars, 'sgd': sgd, 'adam': adam, 'adamw': adamw}


def build(name: str, schedule: optax.Schedule, peak: float, constant: tuple[str, ...] = (), **kw
          ) -> optax.GradientTransformation:
  """The optimizer `name` with the settings `kw`.

  The parts of the network that `constant` names always learn at the rate `peak` (SimSiam's
  predictor).
  """
  tx = OPTIMIZERS[name](schedule, **kw)
  if not constant:
    return tx

  def label(params: dict) -> dict[str, str]:
    return {part: 'constant' if part in constant else 'scheduled' for part in params}
  at_peak = OPTIMIZERS[name](lambda count: jnp.float32(peak), **kw)
  return optax.partition({'scheduled': tx, 'constant': at_peak}, label)

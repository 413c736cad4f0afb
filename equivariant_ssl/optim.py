"""Optimisers as the methods use them: which parameters decay and adapt is theirs, the mathematics is optax's."""
import jax
import jax.numpy as jnp
import optax


def warmup_cosine(peak: float, warmup: int, total: int, end: float = 0.) -> optax.Schedule:
  """Linear from 0 to `peak` over `warmup` steps, then a cosine, step by step, to `end` at step `total`. (EquiMod starts
  at `peak` x 1e-8, which float32 cannot tell from 0.)"""
  schedule = optax.warmup_cosine_decay_schedule(0., peak, warmup, max(total, warmup + 1), end)
  return lambda count: schedule(jnp.asarray(count, jnp.float32))  # optax mixes the types of its count and its bounds


def weights(params: dict) -> dict:
  """True for the kernels of Linear and Conv; False for biases and BatchNorm's gain and bias."""
  return jax.tree.map(lambda p: p.ndim > 1, params)


def lars(schedule: optax.Schedule, momentum: float = .9, weight_decay: float = 1e-6, trust: float = 1e-3,
         lr_outside: bool = False) -> optax.GradientTransformation:
  """LARS as EquiMod and SimCLR run it: g + wd w, scaled by trust |w| / |g + wd w| (1 where either is 0), and the
  learning rate inside the momentum buffer. `lr_outside` multiplies after it (BYOL, VICReg, Barlow Twins). Biases
  and BatchNorm neither decay nor adapt: plain momentum at the same rate."""
  if not lr_outside:
    return optax.lars(schedule, weight_decay, weights, trust, trust_ratio_mask=weights, momentum=momentum)
  return optax.chain(
      optax.add_decayed_weights(weight_decay, weights),
      optax.masked(optax.scale_by_trust_ratio(trust_coefficient=trust), weights),
      optax.trace(momentum),
      optax.scale_by_learning_rate(schedule))


def sgd(schedule: optax.Schedule, momentum: float = .9, weight_decay: float = 5e-4, nesterov: bool = False,
        decay_all: bool = True) -> optax.GradientTransformation:
  """SGD with L2 in the gradient, on every parameter (SimSiam, E-SSL) unless `decay_all` is off."""
  return optax.chain(optax.add_decayed_weights(weight_decay, None if decay_all else weights),
                     optax.sgd(schedule, momentum or None, nesterov))


def adamw(schedule: optax.Schedule, weight_decay: float = 1e-4, b1: float = .9, b2: float = .999
          ) -> optax.GradientTransformation:
  """AdamW; biases and BatchNorm do not decay."""
  return optax.adamw(schedule, b1, b2, weight_decay=weight_decay, mask=weights)


OPTIMIZERS = {'lars': lars, 'sgd': sgd, 'adamw': adamw}



"""Optimisers as the methods use them: which parameters decay and adapt is theirs, the mathematics is optax's."""
import jax
import jax.numpy as jnp
import optax

from equivariant_ssl.errors import UserError

LEFT_OUT = ('bias', 'scale', 'cls_token', 'pos_embed')  # see `weights`


def warmup_cosine(peak: float, warmup: int, total: int, end: float = 0., every: int = 1) -> optax.Schedule:
  """Linear from 0 to `peak` over `warmup` steps, then a cosine to `end` at step `total`, which moves every `every` steps
  from the end of the warm-up (an epoch's: SimSiam). (EquiMod starts at `peak` x 1e-8, which float32 cannot tell from 0.)"""
  schedule = optax.warmup_cosine_decay_schedule(0., peak, warmup, max(total, warmup + 1), end)

  def rate(count):
    count = jnp.asarray(count)
    count -= jnp.maximum(count - warmup, 0) % every
    return schedule(count.astype(jnp.float32))  # optax mixes the types of its count and its bounds
  return rate


def decay_at(base: float, step: jax.Array, total: int) -> jax.Array:
  """BYOL's decay of the target's average at `step`: 1 - (1 - base) (cos(pi step / total) + 1) / 2, `base` at first and 1 at
  the end (Grill et al. 2020)."""
  return 1. - (1. - base) * (jnp.cos(jnp.pi * jnp.asarray(step, jnp.float32) / total) + 1.) / 2.


def weights(params: dict) -> dict:
  """True for the kernels of Linear and Conv; False for what published code lets neither decay nor adapt: biases of any
  shape (a hypernetwork's is a matrix), norms' gains, a ViT's class token and position embedding (timm's no_weight_decay)."""
  return jax.tree_util.tree_map_with_path(lambda path, p: p.ndim > 1 and path[-1].key not in LEFT_OUT, params)


def clipped_trust(schedule: optax.Schedule, weight_decay: float, trust: float) -> optax.GradientTransformation:
  """solo-learn's LARS with `clip_lr`: (g + wd w) min(trust |w| / (|g| + wd |w|) / rate, 1), and g alone, undecayed, where
  either norm is exactly 0: the trust ratio is itself the step, and the rate its upper bound."""
  def update(updates, state, params):
    rate = schedule(state.count)

    def one(g, w):
      g_norm, w_norm = optax.tree.norm(g), optax.tree.norm(w)
      ratio = trust * w_norm / (g_norm + weight_decay * w_norm + 1e-8)
      scaled = (g + weight_decay * w) * jnp.minimum(ratio / jnp.maximum(rate, 1e-12), 1.)
      return jnp.where((g_norm > 0) & (w_norm > 0), scaled, g)
    return jax.tree.map(one, updates, params), optax.ScaleByScheduleState(state.count + 1)

  return optax.GradientTransformation(lambda params: optax.ScaleByScheduleState(jnp.zeros((), jnp.int32)), update)


def lars(schedule: optax.Schedule, momentum: float = .9, weight_decay: float = 1e-6, trust: float = 1e-3,
         lr_outside: bool = False, bias_scale: float = 1., clip: bool = False) -> optax.GradientTransformation:
  """LARS as EquiMod and SimCLR run it: g + wd w, scaled by trust |w| / |g + wd w| (1 where either is 0), and the
  learning rate inside the momentum buffer. `lr_outside` multiplies after it (BYOL, VICReg, Barlow Twins). What is not
  of `weights` neither decays nor adapts: plain momentum at `bias_scale` x the rate (Barlow Twins: .0048 / .2).
  clip: solo-learn's form, see `clipped_trust`; its rate is outside. Raises UserError for `clip` with the rate inside."""
  if clip and not lr_outside:
    raise UserError('optimizer.clip bounds a rate that is outside the momentum.', 'Add --config.optimizer.lr_outside=True')
  if lr_outside:
    scaled = [optax.masked(clipped_trust(schedule, weight_decay, trust), weights)] if clip else [
        optax.add_decayed_weights(weight_decay, weights),
        optax.masked(optax.scale_by_trust_ratio(trust_coefficient=trust), weights)]
    tx = optax.chain(*scaled, optax.trace(momentum), optax.scale_by_learning_rate(schedule))
  else:
    tx = optax.lars(schedule, weight_decay, weights, trust, trust_ratio_mask=weights, momentum=momentum)
  if bias_scale == 1.:
    return tx
  biases = lambda params: jax.tree.map(lambda w: not w, weights(params))
  return optax.chain(tx, optax.masked(optax.scale(bias_scale), biases))


def sgd(schedule: optax.Schedule, momentum: float = .9, weight_decay: float = 5e-4, nesterov: bool = False,
        decay_all: bool = True) -> optax.GradientTransformation:
  """SGD with L2 in the gradient, on every parameter (SimSiam, E-SSL) unless `decay_all` is off."""
  return optax.chain(optax.add_decayed_weights(weight_decay, None if decay_all else weights),
                     optax.sgd(schedule, momentum or None, nesterov))


def adamw(schedule: optax.Schedule, weight_decay: float = 1e-4, b1: float = .9, b2: float = .999
          ) -> optax.GradientTransformation:
  """AdamW; `weights` alone decay."""
  return optax.adamw(schedule, b1, b2, weight_decay=weight_decay, mask=weights)


def adam(schedule: optax.Schedule, weight_decay: float = 0., b1: float = .9, b2: float = .999
         ) -> optax.GradientTransformation:
  """Adam with L2 in the gradient of every parameter, as torch.optim.Adam's (SIE, CARE)."""
  return optax.chain(optax.add_decayed_weights(weight_decay), optax.adam(schedule, b1, b2))


OPTIMIZERS = {'lars': lars, 'sgd': sgd, 'adam': adam, 'adamw': adamw}


def build(name: str, schedule: optax.Schedule, peak: float, constant: tuple[str, ...] = (), **kw
          ) -> optax.GradientTransformation:
  """Optimiser `name` with its settings `kw`; the parts of the network named in `constant` always at the rate `peak`
  (SimSiam's predictor)."""
  tx = OPTIMIZERS[name](schedule, **kw)
  if not constant:
    return tx
  label = lambda params: {part: 'constant' if part in constant else 'scheduled' for part in params}
  return optax.partition({'scheduled': tx, 'constant': OPTIMIZERS[name](lambda count: jnp.float32(peak), **kw)}, label)

"""AugSelf (Lee et al. 2021): say what was done to one view rather than to the other."""
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from equivariant_ssl.equivariance.pairing import between_views
from equivariant_ssl.keys import key_for
from equivariant_ssl.nets import mlp
from equivariant_ssl.types import Action, Array, Equivariance, Pair, Wiring

FACTORS = ('brightness', 'contrast', 'saturation', 'hue')  # of jitter; its order is not asked
DRAWS = 4096  # actions drawn to measure the range of a component


def box(action: Action) -> Array:
  """[4]: centre row, centre column, height, width of the crop in fractions, in the frame of the view: mirrored where the
  view is. (The official code mirrors the second view's by the first's flips.)"""
  crop = action['crop']
  row, column = crop.top + crop.height / 2., crop.left + crop.width / 2.
  for name, axis in (('vflip', 0), ('flip', 1)):
    if name in action:
      applied = action[name].applied
      row, column = ((jnp.where(applied, 1. - x, x) if i == axis else x) for i, x in enumerate((row, column)))
  return jnp.stack([row, column, crop.height, crop.width])


class Head(nn.Module):
  """An MLP of [h1, h2] for each op."""
  ask: dict[str, nn.Module]

  def embed(self, features: Array, train: bool) -> Array:
    return features

  def __call__(self, pair: Pair, train: bool) -> dict[str, Array]:
    both = jnp.concatenate([pair.source, pair.target], axis=-1)
    return {name: module(both, train) for name, module in self.ask.items()}


def components(wiring: Wiring) -> dict[str, Callable[[Action], Array]]:
  """{op: action of a view -> [n]} of the told ops that are asked by regression: the crop's box, jitter's four factors, and
  of any other what its encoding holds, in units of its range over many draws."""
  size = jnp.full(2, wiring.size, jnp.float32)
  identity = wiring.told.identity(size)
  found = {}
  for name in wiring.told.name.split('+'):
    if name in wiring.told.choices:
      continue
    if name == 'crop':
      found[name] = box
    elif name == 'jitter':
      found[name] = lambda action: jnp.stack([getattr(action['jitter'], f) for f in FACTORS])
    else:
      found[name] = lambda action, name=name: wiring.told.encode({**identity, name: action[name]})

  def scaled(name: str, value: Callable[[Action], Array]) -> Callable[[Action], Array]:
    if name == 'crop':
      return value  # fractions: differences are in [-1, 1] as they are
    draw = lambda i: value(wiring.own[0].sample(key_for(jax.random.key(0), 'range', i), size))
    drawn = np.asarray(jax.jit(jax.vmap(draw))(np.arange(DRAWS)))
    spans = np.ptp(drawn, axis=0)
    kept = np.flatnonzero(spans > 1e-6)
    return lambda action: value(action)[kept] / spans[kept]

  return {name: scaled(name, value) for name, value in found.items()}


def make(hidden: tuple[int, ...] = (512, 512)) -> Callable[[Wiring], Equivariance]:
  """The sum over the told ops of  mean (tanh(phi([h1, h2])) - (w1 - w2))^2  or, of a discrete op, the cross-entropy of what
  leads from the first view to the second (same or flipped, turns modulo 4), both ways round.

  On the features, before the projector. w: the crop's centre and size in fractions, mirrored with the view; jitter's
  factors over their ranges, neutral where not applied. phi: one MLP of `hidden` an op, Linear without bias, BatchNorm,
  ReLU. A flip has two logits (the official code one, with a binary cross-entropy). Published: told of crop and jitter
  alone, weight 1 (STL-10) or .5 (ImageNet-100): config.equivariance.told.
  """
  def wire(wiring: Wiring) -> Equivariance:
    uses, groups, pairs = between_views(wiring, both=True)
    regressed, choices = components(wiring), wiring.told.choices
    size = jnp.full(2, wiring.size, jnp.float32)
    identity = wiring.told.identity(size)
    alone = lambda name, action: {**identity, name: action}
    # What leads from one view to another is itself one of the choices: that with the same code.
    codes = {name: np.asarray(jax.vmap(lambda c, name=name: wiring.told.encode(alone(name, c)))(c))
             for name, c in choices.items()}

    def label(name: str, before: Action, after: Action) -> Array:
      code = wiring.told.relative(alone(name, before[name]), alone(name, after[name]))
      return jnp.argmin(jnp.sum(jnp.abs(code[None] - codes[name]), axis=-1))

    def loss(answer: dict[str, Array], pair: Pair, embeddings=None) -> Array:
      total = jnp.zeros(())
      for name, value in regressed.items():
        w = jax.vmap(value)(pair.before) - jax.vmap(value)(pair.after)
        total += jnp.mean(jnp.square(jnp.tanh(answer[name].astype(jnp.float32)) - w))
      for name in choices:
        labels = jax.vmap(lambda a, b, name=name: label(name, a, b))(pair.before, pair.after)
        total += optax.softmax_cross_entropy_with_integer_labels(answer[name].astype(jnp.float32), labels).mean()
      return total

    own = wiring.own[0].identity(size)
    outs = {name: value(own).shape[0] for name, value in regressed.items()} | {n: len(c) for n, c in codes.items()}
    head = Head({name: mlp.make(hidden, out, last_bias=True, dtype=wiring.dtype) for name, out in outs.items()})
    return Equivariance(head, loss, groups, uses, pairs, predicts='action')

  return wire

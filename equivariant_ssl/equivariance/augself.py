"""AugSelf (Lee et al. 2021): say what was done to one view rather than to the other."""
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from equivariant_ssl.augment import class_of
from equivariant_ssl.equivariance.pairing import between_views
from equivariant_ssl.errors import UserError
from equivariant_ssl.keys import key_for
from equivariant_ssl.nets import mlp
from equivariant_ssl.types import Action, Array, Equivariance, Pair, Wiring

Way = Callable[[Action, Action], Array]  # (action of the first view, of the second) -> w = w1 - w2, [n]
DRAWS = 2 ** 16  # actions of each chain, which span the range of a value within 1e-4 of it
PAIRED = 512  # of these, whose pairs measure the range of a w that is no difference of values


class Head(nn.Module):
  """An MLP of [h1, h2] for each op."""
  ask: dict[str, nn.Module]

  def embed(self, features: Array, train: bool) -> Array:
    return features

  def __call__(self, pair: Pair, train: bool) -> dict[str, Array]:
    both = jnp.concatenate([pair.source, pair.target], axis=-1)
    return {name: module(both, train) for name, module in self.ask.items()}


class Asked(NamedTuple):
  """What is asked of an op, by `out` numbers. table: [K K] of a discrete one, the class of (first, second), one of its K
  choices; else None. kept: [n] the components of w that vary. span: [n] what they are divided by."""
  out: int
  table: np.ndarray | None
  kept: np.ndarray
  span: np.ndarray


def box(order: list[str], action: Action) -> Array:
  """[4]: centre row and column, height and width of the crop, in fractions of the image as the view shows it: mirrored or
  turned by what follows the crop in `order`, with this view's own action."""
  crop = action['crop']
  row, column, height, width = crop.top + crop.height / 2., crop.left + crop.width / 2., crop.height, crop.width
  for name in order[order.index('crop'):]:
    if name == 'flip':
      column = jnp.where(action[name].applied, 1. - column, column)
    elif name == 'vflip':
      row = jnp.where(action[name].applied, 1. - row, row)
    elif name == 'rotate':
      turned = [(row, column, height, width), (1. - column, row, width, height),
                (1. - row, 1. - column, height, width), (column, 1. - row, width, height)]
      row, column, height, width = jnp.stack([jnp.stack(t) for t in turned])[action[name].turns]
  return jnp.stack([row, column, height, width])


def colours(action: Action) -> Array:
  """[4]: jitter's factors, neutral where it was not applied; its order is not asked."""
  jitter = action['jitter']
  return jnp.stack([jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue])


def forms(wiring: Wiring) -> dict[str, Callable[[Action], Array]]:
  """{op: its value [n]} of those for which AugSelf has a form: w is the difference of the two views'."""
  order = wiring.own[0].name.split('+')
  return {'crop': lambda action: box(order, action), 'jitter': colours, 'blur': lambda action: action['blur'].sigma[None]}


def ways(wiring: Wiring) -> dict[str, Way]:
  """{told op: w}. What AugSelf names has its form; any other is what the op itself tells of the way between two views."""
  identity, values = wiring.told.identity(jnp.full(2, wiring.size, jnp.float32)), forms(wiring)

  def way(name: str) -> Way:
    if name in values:
      return lambda first, second: values[name](first) - values[name](second)
    alone = lambda action: {**identity, name: action[name]}
    return lambda first, second: wiring.told.relative(alone(second), alone(first))
  return {name: way(name) for name in wiring.told.name.split('+')}


def square(way: Way, actions: Action) -> Array:
  """w of every pair of `actions` stacked [M ...]: [M M n]."""
  return jax.vmap(lambda first: jax.vmap(lambda second: way(first, second))(actions))(actions)


def classes(codes: np.ndarray, none: int) -> np.ndarray | None:
  """[K K] int32: of codes w [K K n] of all pairs of choices, the choice that has the same code beside choice `none`; None
  where a pair has no such choice (the choices are no group): then there is a difference but no class."""
  names = [[code.tobytes() for code in row] for row in np.round(codes, 3) + 0.]
  index = {row[none]: k for k, row in enumerate(names)}
  table = np.array([[index.get(name, -1) for name in row] for row in names], np.int32)
  return None if (table < 0).any() else table


def questions(wiring: Wiring, found: dict[str, Way]) -> dict[str, Asked]:
  """What is asked of each told op; NumPy constants."""
  size, choices, values = jnp.full(2, wiring.size, jnp.float32), wiring.told.choices, forms(wiring)

  def measure(index: Array) -> tuple[dict, dict, dict]:
    key = lambda chain, i: key_for(jax.random.key(0), 'range', chain, i)
    drawn = [jax.vmap(lambda i, v=v, op=op: op.sample(key(v, i), size))(index)
             for v, op in enumerate({id(op): op for op in wiring.own}.values())]
    few = jax.tree.map(lambda *a: jnp.concatenate([x[:PAIRED] for x in a]), *drawn)
    drawn = jax.tree.map(lambda *a: jnp.concatenate(a), *drawn)
    identity = wiring.told.identity(size)
    spans = {name: jnp.abs(square(way, few)).max((0, 1)) for name, way in found.items() if name not in values}
    spans |= {name: jnp.ptp(jax.vmap(values[name])(drawn), axis=0) for name in found if name in values}
    codes = {name: square(lambda a, b, name=name: found[name]({name: a}, {name: b}), c) for name, c in choices.items()}
    return spans, codes, {name: class_of(c, identity[name]) for name, c in choices.items()}

  spans, codes, none = jax.device_get(jax.jit(measure)(np.arange(DRAWS)))
  asked = {}
  for name in found:
    span = spans[name]
    table = classes(codes[name], none[name]) if name in codes else None
    kept = np.flatnonzero(span > 1e-6)
    if len(kept):
      scale = np.ones_like(span) if name == 'crop' else span  # fractions: in [-1, 1] as they are, and published so
      asked[name] = Asked(len(kept) if table is None else len(table), table, kept, scale[kept])
  return asked


def make(weight: float = 1., hidden: tuple[int, ...] = (512, 512)) -> Callable[[Wiring], Equivariance]:
  """The sum over the told ops of  mean (tanh(phi([h1, h2])) - (w1 - w2))^2  or, of a discrete op, the cross-entropy of what
  leads from the second view to the first (same or flipped, turns (r1 - r2) mod 4), both ways round, on the features.

  w: the crop's centre and size in fractions, mirrored with its own view; over their range, and so in [-1, 1], jitter's
  factors and blur's sigma, neutral where not applied, and the encoding of any other op. phi: one MLP of `hidden` an op,
  Linear without bias, BatchNorm, ReLU, then Linear with bias. Published: told of crop and jitter alone, weight 1 (STL-10)
  or .5 (ImageNet-100): config.equivariance.told. The official code mirrors the second view's crop by the first's flip,
  leaves sigma in pixels, and asks a flip by one logit rather than two. Raises UserError where nothing told varies.
  """
  def wire(wiring: Wiring) -> Equivariance:
    uses, groups, pairs = between_views(wiring, both=True)
    found, choices = ways(wiring), wiring.told.choices
    asked = questions(wiring, found)
    if not asked:
      raise UserError(f'{wiring.name} is told of {wiring.told.name}, which never varies.', 'Give it a probability p > 0.')

    def of_op(name: str, question: Asked, answer: Array, pair: Pair) -> Array:
      answer = answer.astype(jnp.float32)
      if question.table is None:
        w = jax.vmap(lambda a, b: found[name](a, b)[question.kept] / question.span)(pair.before, pair.after)
        return jnp.mean(jnp.square(jnp.tanh(answer) - w))
      first, second = (jax.vmap(lambda a: class_of(choices[name], a))(a[name]) for a in (pair.before, pair.after))
      return optax.softmax_cross_entropy_with_integer_labels(answer, jnp.array(question.table)[first, second]).mean()

    def loss(answer: dict[str, Array], pair: Pair, embeddings=None) -> Array:
      return sum(of_op(name, question, answer[name], pair) for name, question in asked.items())

    head = Head({name: mlp.make(hidden, q.out, last_bias=True, dtype=wiring.dtype) for name, q in asked.items()})
    return Equivariance(head, loss, groups, uses, pairs, predicts='action', weight=weight)

  return wire

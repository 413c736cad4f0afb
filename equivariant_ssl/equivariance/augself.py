"""AugSelf (Lee et al. 2021): say how the augmentations of two views differ."""
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from equivariant_ssl.augment import class_of, relative
from equivariant_ssl.equivariance.pairing import between_views
from equivariant_ssl.errors import UserError
from equivariant_ssl.keys import key_for
from equivariant_ssl.nets import mlp
from equivariant_ssl.types import Action, Array, Equivariance, Op, Pair, Size, Wiring

# (action of the first view, of the second) -> w = w1 - w2, [n], for one op.
Difference = Callable[[Action, Action], Array]
DRAWS = 2 ** 16  # actions of each chain; they span the range of a value within 1e-4 of it
PAIRED = 512     # the draws whose pairs measure the range of a w that is no difference


class AugSelfHead(nn.Module):
  """One MLP of [h1, h2] for each op: {op: [N out]}."""
  ask: dict[str, nn.Module]

  def embed(self, features: Array, train: bool) -> Array:
    return features

  def __call__(self, pair: Pair, train: bool) -> dict[str, Array]:
    both = jnp.concatenate([pair.source, pair.target], axis=-1)
    return {name: module(both, train) for name, module in self.ask.items()}


class Question(NamedTuple):
  """What the head is asked of one op.

  out:     the number of outputs that answer it.
  table:   [K K], of a discrete op with K choices: the class of (first, second). Else None.
  varying: [n], the components of w that vary.
  span:    [n], what these components are divided by.
  """
  out: int
  table: np.ndarray | None
  varying: np.ndarray
  span: np.ndarray


def box(order: list[str], action: Action) -> Array:
  """[4]: center row, center column, height and width of the crop, as the view shows the image.

  They are fractions of the image, mirrored or turned by the ops that follow the crop in `order`.
  """
  crop = action['crop']
  row, column = crop.top + crop.height / 2., crop.left + crop.width / 2.
  height, width = crop.height, crop.width
  for name in order[order.index('crop'):]:
    if name == 'flip':
      column = jnp.where(action[name].applied, 1. - column, column)
    elif name == 'vflip':
      row = jnp.where(action[name].applied, 1. - row, row)
    elif name == 'rotate':
      turned = [(row, column, height, width), (1. - column, row, width, height),
                (1. - row, 1. - column, height, width), (column, 1. - row, width, height)]
      boxes = jnp.stack([jnp.stack(t) for t in turned])
      row, column, height, width = boxes[action[name].turns]
  return jnp.stack([row, column, height, width])


def colors(action: Action) -> Array:
  """[4]: jitter's factors and its hue, neutral where it was not applied. Its order is not asked."""
  jitter = action['jitter']
  return jnp.stack([jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue])


def values(wiring: Wiring) -> dict[str, Callable[[Action], Array]]:
  """{op: action -> value [n]} for the ops whose w AugSelf defines as a difference of two values."""
  order = wiring.own_chains[0].name.split('+')
  return {'crop': lambda action: box(order, action), 'jitter': colors,
          'blur': lambda action: action['blur'].sigma[None]}


def differences(wiring: Wiring) -> dict[str, Difference]:
  """{op: w} of the objective's augmentations.

  An op that AugSelf does not name has the relative encoding that the op itself defines.
  """
  identity = wiring.conditioning.identity(jnp.full(2, wiring.size, jnp.float32))
  value = values(wiring)

  def difference(name: str) -> Difference:
    if name in value:
      return lambda first, second: value[name](first) - value[name](second)

    def alone(action: Action) -> Action:
      return {**identity, name: action[name]}
    return lambda first, second: relative(wiring.conditioning, alone(second), alone(first))
  return {name: difference(name) for name in wiring.conditioning.name.split('+')}


def all_pairs(difference: Difference, actions: Action) -> Array:
  """[M M n]: w of every pair of `actions` [M ...]."""
  def against_all(first: Action) -> Array:
    return jax.vmap(lambda second: difference(first, second))(actions)
  return jax.vmap(against_all)(actions)


def class_table(codes: np.ndarray, none: int) -> np.ndarray | None:
  """[K K] int32: for two choices, the choice that has the same w beside the choice `none`.

  codes: [K K n], w of every pair of choices.

  None where a pair has no such choice: the choices are no group, and so w has no class.
  """
  names = [[code.tobytes() for code in row] for row in np.round(codes, 3) + 0.]
  index = {row[none]: k for k, row in enumerate(names)}
  table = np.array([[index.get(name, -1) for name in row] for row in names], np.int32)
  return None if (table < 0).any() else table


def draw_from(chain: Op, number: int, size: Size, index: Array) -> Action:
  """The actions of chain `number` for the draws `index` [M], with keys that no run changes."""
  def draw(i: Array) -> Action:
    return chain.sample(key_for(jax.random.key(0), 'range', number, i), size)
  return jax.vmap(draw)(index)


def measure(wiring: Wiring, differences: dict[str, Difference]) -> tuple[dict, dict, dict]:
  """{op: range of each component of w}, {op: w of all pairs of choices}, {op: identity's class}.

  The second and the third have the discrete ops alone. All are NumPy arrays.
  """
  size, value = jnp.full(2, wiring.size, jnp.float32), values(wiring)
  choices: dict[str, Any] = wiring.conditioning.choices or {}

  def on_choices(name: str) -> Difference:
    return lambda a, b: differences[name]({name: a}, {name: b})

  def compute(index: Array) -> tuple[dict, dict, dict]:
    chains = {id(op): op for op in wiring.own_chains}.values()
    draws = [draw_from(op, number, size, index) for number, op in enumerate(chains)]
    few = jax.tree.map(lambda *a: jnp.concatenate([x[:PAIRED] for x in a]), *draws)
    draws = jax.tree.map(lambda *a: jnp.concatenate(a), *draws)
    identity = wiring.conditioning.identity(size)
    spans = {name: jnp.abs(all_pairs(w, few)).max((0, 1))
             for name, w in differences.items() if name not in value}
    spans |= {name: jnp.ptp(jax.vmap(value[name])(draws), axis=0)
              for name in differences if name in value}
    codes = {name: all_pairs(on_choices(name), c) for name, c in choices.items()}
    return spans, codes, {name: class_of(c, identity[name]) for name, c in choices.items()}

  return jax.device_get(jax.jit(compute)(np.arange(DRAWS)))


def build_questions(wiring: Wiring, differences: dict[str, Difference]) -> dict[str, Question]:
  """{op: Question} of the objective's augmentations that vary, as NumPy constants."""
  spans, codes, none = measure(wiring, differences)
  questions = {}
  for name in differences:
    span = spans[name]
    table = class_table(codes[name], none[name]) if name in codes else None
    varying = np.flatnonzero(span > 1e-6)
    if len(varying):
      # A crop's fractions are in [-1, 1] as they are, and published so.
      scale = np.ones_like(span) if name == 'crop' else span
      out = len(varying) if table is None else len(table)
      questions[name] = Question(out, table, varying, scale[varying])
  return questions


def make(weight: float = 1., hidden: tuple[int, ...] = (512, 512)
         ) -> Callable[[Wiring], Equivariance]:
  """AugSelf: predict the difference of two views' augmentations, summed over the augmentations.

  For most ops the loss is mean (tanh(phi([h1, h2])) - (w1 - w2))^2. For a discrete op it is the
  cross-entropy of what leads from the second view to the first: same or flipped, or (r1 - r2) mod 4
  quarter turns. Both directions between the views are used, and h is the features.

  w is the crop's center and size in fractions, mirrored as its own view is. For jitter's factors
  and the blur's sigma, neutral where not applied, w is divided by the range, and so is in [-1, 1].
  For any other op w is its encoding, divided likewise. phi is one MLP of `hidden` for each op:
  Linear without bias, BatchNorm, ReLU, then Linear with bias.

  It was published with the augmentations crop and jitter alone (config.equivariance.augmentations)
  and weight 1 (STL-10) or .5 (ImageNet-100). The official code differs: it mirrors the second
  view's crop by the first view's flip, leaves sigma in pixels, and predicts a flip by one logit.

  Raises UserError where no augmentation varies.
  """
  def wire(wiring: Wiring) -> Equivariance:
    uses, groups, pairs = between_views(wiring, both=True)
    w = differences(wiring)
    choices: dict[str, Any] = wiring.conditioning.choices or {}
    questions = build_questions(wiring, w)
    if not questions:
      raise UserError(f'{wiring.name} has the augmentations {wiring.conditioning.name}, which '
                      'never vary.', 'Give one of them a probability p > 0.')

    def op_loss(name: str, question: Question, answer: Array, pair: Pair) -> Array:
      answer = answer.astype(jnp.float32)
      if question.table is None:
        def scaled_difference(a: Action, b: Action) -> Array:
          return w[name](a, b)[question.varying] / question.span
        target = jax.vmap(scaled_difference)(pair.before, pair.after)
        return jnp.mean(jnp.square(jnp.tanh(answer) - target))
      first, second = (jax.vmap(lambda a: class_of(choices[name], a))(actions[name])
                       for actions in (pair.before, pair.after))
      classes = jnp.array(question.table)[first, second]
      return optax.softmax_cross_entropy_with_integer_labels(answer, classes).mean()

    def loss(answer: dict[str, Array], pair: Pair, embeddings=None) -> Array:
      terms = [op_loss(name, q, answer[name], pair) for name, q in questions.items()]
      return sum(terms[1:], terms[0])

    head = AugSelfHead({name: mlp.make(hidden, q.out, last_bias=True, dtype=wiring.dtype)
                        for name, q in questions.items()})
    return Equivariance(head, loss, groups, uses, pairs, predicts='action', weight=weight)

  return wire

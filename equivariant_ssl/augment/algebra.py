"""The algebra of ops: chains, chances, what a network is told of them, and views over named groups."""
import jax
import jax.numpy as jnp
import numpy as np

from equivariant_ssl.augment.pixels import resample
from equivariant_ssl.errors import UserError
from equivariant_ssl.keys import key_for
from equivariant_ssl.types import Action, Array, Group, Image, Key, Op, Size, Views


def chain(*ops: Op) -> Op:
  """Ops in order; the action is {op.name: action}, the encoding their concatenation.

  Each op draws from a key folded by its own name, so adding an op leaves the other draws as they were. Names
  of the action that the chain does not have are ignored; `choices` are those of its discrete ops, by name.
  Raises ValueError where two ops have one name.
  """
  names = [op.name for op in ops]
  if len(set(names)) < len(names):
    raise ValueError(f'a chain needs ops of different names, got {names}')

  def apply(action: Action, image: Image) -> Image:
    for op in ops:
      image = op.apply(action[op.name], image)
    return image

  return Op(
      name='+'.join(names),
      identity=lambda size: {op.name: op.identity(size) for op in ops},
      sample=lambda key, size: {op.name: op.sample(key_for(key, op.name), size) for op in ops},
      apply=apply,
      encode=lambda action: jnp.concatenate([jnp.zeros(0), *(op.encode(action[op.name]) for op in ops)]),
      choices={op.name: op.choices for op in ops if op.choices is not None},
      relative=lambda before, after: jnp.concatenate(
          [jnp.zeros(0), *(relative(op, before[op.name], after[op.name]) for op in ops)]))


def relative(op: Op, before: Action, after: Action) -> Array:
  """What a network is told of the way from the view of action `before` to that of `after`, [A] float32."""
  if op.relative:
    return op.relative(before, after)
  return op.encode(after) - op.encode(before)


def class_of(choices: Action, action: Action) -> Array:
  """The class of a discrete op's `action`: its index among `choices` [K ...], a scalar int32."""
  same = [jnp.all(jnp.reshape(all_ == one[None], (all_.shape[0], -1)), axis=1)
          for all_, one in zip(jax.tree.leaves(choices), jax.tree.leaves(action), strict=True)]
  return jnp.argmax(jnp.stack(same).all(0)).astype(jnp.int32)


def select(condition: Array, yes: Action, no: Action) -> Action:
  """`yes` where the scalar `condition` holds, else `no`; the field dtypes of `yes`."""
  return jax.tree.map(lambda a, b: jnp.where(condition, a, b).astype(a.dtype), yes, no)


def sometimes(p: float, op: Op) -> Op:
  """`op` with probability `p`, else its identity: "not applied" is an action like any other.

  Raises UserError where `p` is not a probability.
  """
  if not 0 <= p <= 1:
    raise UserError(f'{op.name}.p = {p} is not a probability.', 'Give a number from 0 to 1.')

  def sample(key: Key, size: Size) -> Action:
    applied = jax.random.bernoulli(key_for(key, 'sometimes'), p)  # a key of its own at each level, also when nested
    return select(applied, op.sample(key_for(key, 'drawn'), size), op.identity(size))
  return op._replace(sample=sample)


def normalised(op: Op, draws: Action) -> Op:
  """`op` telling in units of the spread of `draws` (actions stacked [M ...]): encode / std, a std of 0 -> 1.

  Dividing without centring keeps encode(identity) == 0; a Linear + BatchNorm encoder (EquiMod's) cancels the
  offset in any case. Pool the draws of all chains that the pairs come from, and draw with a fixed key.
  """
  spread = np.std(np.asarray(jax.jit(jax.vmap(op.encode))(draws)), axis=0)  # NumPy's: a constant, on no device
  spread = np.where(spread > 1e-6, spread, 1.).astype(np.float32)
  return op._replace(encode=lambda action: op.encode(action) / spread,
                     relative=lambda before, after: relative(op, before, after) / spread)


def resize(image: Image, size: int) -> Image:
  """The plain resize to a square of side `size` (antialiased bicubic, clipped); nothing where it fits."""
  if image.pixels.shape[:2] == (size, size):
    return image
  # The whole image as a box of its own: were the weights one constant for the batch, a shard's size would round them.
  one = image.size[0] / image.size[0]
  pixels = resample(image.pixels, one - one, one - one, one, one, size, 'bicubic')
  return Image(pixels, jnp.full(2, size, jnp.float32))


def reference(op: Op, side: float = 1.) -> Op:
  """The chain of the un-augmented view: always `op`'s identity action, and no pixel touched.

  side < 1: the central square of that fraction of the shorter side instead (.875: Resize 256, CenterCrop 224), recorded
  as the action of the chain's crop.
  """
  if side == 1.:
    return op._replace(sample=lambda key, size: op.identity(size), apply=lambda action, image: image)

  def sample(key: Key, size: Size) -> Action:
    action = op.identity(size)
    h, w = (side * jnp.min(size) / size[i] for i in range(2))
    return {**action, 'crop': action['crop']._replace(top=(1. - h) / 2., left=(1. - w) / 2., height=h, width=w)}
  return op._replace(sample=sample)


def united(a: Op, b: Op) -> Op:
  """The un-augmented view of two chains (`reference`) as one: `a`, whose action also says that the ops of `b` which it does
  not know did nothing."""
  more = [name for name in b.name.split('+') if name and name not in a.name.split('+')]
  if not more:
    return a

  def joined(action: Action, size: Size) -> Action:
    nothing = b.identity(size)
    return {**action, **{name: nothing[name] for name in more}}
  return a._replace(name='+'.join([a.name, *more]), choices={**b.choices, **a.choices},
                    identity=lambda size: joined(a.identity(size), size),
                    sample=lambda key, size: joined(a.sample(key, size), size))


def only(op: Op, *names: str) -> Op:
  """A chain of which the ops `names` alone draw; the others keep their identity action."""
  def sample(key: Key, size: Size) -> Action:
    drawn = op.sample(key, size)
    return {**op.identity(size), **{name: drawn[name] for name in names}}
  return op._replace(sample=sample)


def augment(op: Op, key: Key, image: Image) -> tuple[Image, Action]:
  """Draw an action, apply it, and return both."""
  action = op.sample(key, image.size)
  return op.apply(action, image), action


def _group(group: Group, key: Key, images: Image) -> Views:
  """The views of one group; see `views`."""
  def view(op: Op, v: Array, index: Array, image: Image) -> tuple[Array, Action]:
    action = op.sample(key_for(key, v, index // group.share), image.size)
    actions, K = jax.tree.map(lambda a: a[None], action), 1
    if group.all_of:
      choices = op.choices[group.all_of]
      K = jax.tree.leaves(choices)[0].shape[0]
      actions = jax.tree.map(lambda a: jnp.broadcast_to(a, (K, *a.shape[1:])), actions)
      actions = {**actions, group.all_of: choices}
    # A chain of no ops has an action without arrays, which does not say how many views there are.
    return jax.vmap(lambda a: resize(op.apply(a, image), group.size).pixels, axis_size=K)(actions), actions

  def of_one(index: Array, image: Image) -> tuple[Array, Action]:
    first, V = group.chains[0], len(group.chains)
    if all(op is first for op in group.chains):  # compiled once, not V times
      parts = jax.vmap(lambda v: view(first, v, index, image))(jnp.arange(V))
    else:
      parts = [view(op, v, index, image) for v, op in enumerate(group.chains)]
      parts = jax.tree.map(lambda *a: jnp.stack(a), *parts)
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), parts)

  return Views(*jax.vmap(of_one)(jnp.arange(images.pixels.shape[0]), images))


def views(groups: dict[str, Group], key: Key, images: Image) -> dict[str, Views]:
  """Every group's views of a batch: `images` of [B H W C] pixels and [B 2] sizes -> {name: Views}.

  A draw depends on (key, group, view, position in the global batch) alone: not on the device, nor on the
  other groups.
  """
  return {name: _group(group, key_for(key, name), images) for name, group in groups.items()}

"""The algebra of ops: chains, probabilities, encodings, and the views of named groups."""
import jax
import jax.numpy as jnp
import numpy as np

from equivariant_ssl.augment.pixels import resample
from equivariant_ssl.errors import UserError
from equivariant_ssl.keys import key_for
from equivariant_ssl.types import Action, Array, Group, Image, Key, Op, Size, Views


def chain(*ops: Op) -> Op:
  """Ops that are applied one after the other, as one op.

  The action is {op.name: action}, and the encoding is the concatenation of the ops' encodings. Each
  op draws from a key folded by its own name, so a further op leaves the other draws as they were.
  An action may have names that the chain does not have; they are ignored. `choices` holds those of
  the discrete ops, by name. Raises ValueError where two ops have one name.
  """
  names = [op.name for op in ops]
  if len(set(names)) < len(names):
    raise ValueError(f'A chain needs ops of different names, but these are {names}.')

  def apply(action: Action, image: Image) -> Image:
    for op in ops:
      image = op.apply(action[op.name], image)
    return image

  def encode(action: Action) -> Array:
    return jnp.concatenate([jnp.zeros(0), *(op.encode(action[op.name]) for op in ops)])

  return Op(
      name='+'.join(names),
      identity=lambda size: {op.name: op.identity(size) for op in ops},
      sample=lambda key, size: {op.name: op.sample(key_for(key, op.name), size) for op in ops},
      apply=apply,
      encode=encode,
      choices={op.name: op.choices for op in ops if op.choices is not None},
      relative=lambda before, after: jnp.concatenate(
          [jnp.zeros(0), *(relative(op, before[op.name], after[op.name]) for op in ops)]))


def relative(op: Op, before: Action, after: Action) -> Array:
  """[A] float32: the encoding of the way from the view of action `before` to that of `after`."""
  if op.relative:
    return op.relative(before, after)
  return op.encode(after) - op.encode(before)


def class_of(choices: Action, action: Action) -> Array:
  """The class of a discrete op's action: its index among `choices` [K ...], a scalar int32."""
  same = [jnp.all(jnp.reshape(all_ == one[None], (all_.shape[0], -1)), axis=1)
          for all_, one in zip(jax.tree.leaves(choices), jax.tree.leaves(action), strict=True)]
  return jnp.argmax(jnp.stack(same).all(0)).astype(jnp.int32)


def select(condition: Array, yes: Action, no: Action) -> Action:
  """`yes` where the scalar `condition` holds, else `no`; the field dtypes are those of `yes`."""
  return jax.tree.map(lambda a, b: jnp.where(condition, a, b).astype(a.dtype), yes, no)


def sometimes(p: float, op: Op) -> Op:
  """`op` with probability `p`, else its identity: "not applied" is an action like any other.

  Raises UserError where `p` is not a probability.
  """
  if not 0 <= p <= 1:
    raise UserError(f'{op.name}.p = {p} is not a probability.', 'Give a number from 0 to 1.')

  def sample(key: Key, size: Size) -> Action:
    # Each draw has a key of its own, also where one `sometimes` is inside another.
    applied = jax.random.bernoulli(key_for(key, 'sometimes'), p)
    return select(applied, op.sample(key_for(key, 'drawn'), size), op.identity(size))
  return op._replace(sample=sample)


def normalized(op: Op, draws: Action) -> Op:
  """`op` with its encodings in units of their standard deviation over `draws` [M ...].

  A component that never varies keeps its unit. The mean is not subtracted, so that
  encode(identity) stays 0; an encoder of Linear and BatchNorm (EquiMod's) cancels an offset anyway.
  The draws must come from a fixed key, and from all chains that make the pairs.
  """
  encodings = np.asarray(jax.jit(jax.vmap(op.encode))(draws))
  spread = np.std(encodings, axis=0)  # by NumPy: a constant of the program, on no device
  spread = np.where(spread > 1e-6, spread, 1.).astype(np.float32)
  return op._replace(encode=lambda action: op.encode(action) / spread,
                     relative=lambda before, after: relative(op, before, after) / spread)


def resize(image: Image, size: int) -> Image:
  """The whole image, resized to a square of side `size` by antialiased bicubic, and clipped.

  An image that has this size is returned as it is.
  """
  if image.pixels.shape[:2] == (size, size):
    return image
  # Each image has its own box. One constant for the batch would let XLA fold the weights, and a
  # device's share of the batch would change their rounding.
  one = image.size[0] / image.size[0]
  pixels = resample(image.pixels, one - one, one - one, one, one, size, 'bicubic')
  return Image(pixels, jnp.full(2, size, jnp.float32))


def reference(op: Op, side: float = 1.) -> Op:
  """The chain of the reference: the view whose action is always `op`'s identity.

  side: below 1, the reference is the central square of this fraction of the shorter side, and the
        action of the chain's crop records it (.875 stands for Resize 256, CenterCrop 224).
  """
  if side == 1.:
    return op._replace(sample=lambda key, size: op.identity(size),
                       apply=lambda action, image: image)

  def sample(key: Key, size: Size) -> Action:
    action = op.identity(size)
    h, w = (side * jnp.min(size) / size[i] for i in range(2))
    crop = action['crop']._replace(top=(1. - h) / 2., left=(1. - w) / 2., height=h, width=w)
    return {**action, 'crop': crop}
  return op._replace(sample=sample)


def unite(a: Op, b: Op) -> Op:
  """The references of two chains (see `reference`) as one: `a`, whose action knows `b`'s ops too.

  The action says of the ops that only `b` has that they did nothing.
  """
  more = [name for name in b.name.split('+') if name and name not in a.name.split('+')]
  if not more:
    return a

  def add_identities(action: Action, size: Size) -> Action:
    identities = b.identity(size)
    return {**action, **{name: identities[name] for name in more}}
  return a._replace(name='+'.join([a.name, *more]),
                    choices={**(b.choices or {}), **(a.choices or {})},
                    identity=lambda size: add_identities(a.identity(size), size),
                    sample=lambda key, size: add_identities(a.sample(key, size), size))


def only(op: Op, *names: str) -> Op:
  """A chain in which the ops `names` alone draw; the other ops keep their identity action."""
  def sample(key: Key, size: Size) -> Action:
    draw = op.sample(key, size)
    return {**op.identity(size), **{name: draw[name] for name in names}}
  return op._replace(sample=sample)


def augment(op: Op, key: Key, image: Image) -> tuple[Image, Action]:
  """Draw an action and apply it: the view, and the action."""
  action = op.sample(key, image.size)
  return op.apply(action, image), action


def _group_views(group: Group, key: Key, images: Image) -> Views:
  """The views of one group; see `views`."""
  def view(op: Op, v: Array | int, index: Array, image: Image) -> tuple[Array, Action]:
    action = op.sample(key_for(key, v, index // group.share), image.size)
    actions, K = jax.tree.map(lambda a: a[None], action), 1
    if group.all_of:
      choices = (op.choices or {})[group.all_of]
      K = jax.tree.leaves(choices)[0].shape[0]
      actions = jax.tree.map(lambda a: jnp.broadcast_to(a, (K, *a.shape[1:])), actions)
      actions = {**actions, group.all_of: choices}

    def apply(action: Action) -> Array:
      return resize(op.apply(action, image), group.size).pixels
    # A chain of no ops has an action without arrays, so the number of views must be said.
    return jax.vmap(apply, axis_size=K)(actions), actions

  def image_views(index: Array, image: Image) -> tuple[Array, Action]:
    first, V = group.chains[0], len(group.chains)
    if all(op is first for op in group.chains):  # compiled once, not V times
      parts = jax.vmap(lambda v: view(first, v, index, image))(jnp.arange(V))
    else:
      parts = [view(op, v, index, image) for v, op in enumerate(group.chains)]
      parts = jax.tree.map(lambda *a: jnp.stack(a), *parts)
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), parts)

  return Views(*jax.vmap(image_views)(jnp.arange(images.pixels.shape[0]), images))


def views(groups: dict[str, Group], key: Key, images: Image) -> dict[str, Views]:
  """{group: Views} of a batch: `images` holds pixels [B H W C] and sizes [B 2].

  A draw depends only on the key, the group, the view, and the image's position in the global batch.
  It depends neither on the device nor on the other groups.
  """
  return {name: _group_views(group, key_for(key, name), images) for name, group in groups.items()}

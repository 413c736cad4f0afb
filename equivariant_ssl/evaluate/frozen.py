"""A network in eval mode as pure functions of its variables, and what they return for held-out
images."""
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from equivariant_ssl import augment, registry
from equivariant_ssl.augment.algebra import resize, select
from equivariant_ssl.data.source import Split
from equivariant_ssl.evaluate import inputs
from equivariant_ssl.evaluate.features import in_batches
from equivariant_ssl.evaluate.gains import Measured, measure
from equivariant_ssl.evaluate.inputs import Inputs
from equivariant_ssl.keys import key_for
from equivariant_ssl.training.recipe import Recipe
from equivariant_ssl.training.state import TrainState
from equivariant_ssl.types import Action, Array, Image, Key, Op, Pair, Size

SEED = 0  # the seed of the held-out views, the same for every run and checkpoint
PANEL = ('crop', 'flip', 'vflip', 'rotate', 'turn', 'jitter', 'gray', 'blur', 'solarize', 'invert')
JITTER = ('brightness', 'contrast', 'saturation', 'hue')
# {op: its config section -> the fields with which it draws beyond the range it was trained on}
OUTSIDE = {
    'crop': lambda crop: {'scale': (crop.scale[0] / 4, crop.scale[0])},
    'jitter': lambda jitter: {k: min(2 * jitter[k], .5 if k == 'hue' else 1.) for k in JITTER},
    'blur': lambda blur: {'sigma': (blur.sigma[1], 2 * blur.sigma[1])},
    'turn': lambda turn: {'degrees': min(2 * turn.degrees, 180.)},
}

Rows = tuple[Array, Array, Array]  # (index [B] int32, canvases uint8 [B S S C], sizes [B 2])
Mask = dict[str, Any]  # {op: whether it draws}; an argument, so that one program serves every op


class Frozen(NamedTuple):
  """Evaluation functions of a network, which compile once for all checkpoints.

  encode: (variables, images [B S S C] in [0, 1]) -> features [B D].
  pairs: {objective: {change: ((variables, (index [B], images uint8 [B S S C], sizes [B 2])) -> Pair
  [B V ...])}}, for the objectives that predict a target embedding. The change 'all' draws the
  objective's own chain; the name of an op that the objective is conditioned on draws that op alone;
  'OP beyond' draws the op outside of the range that it was trained on.
  banks: the same keys: (variables, (index, images, sizes)) -> (embeddings [B M E], actions
  [B M ...]) of M views of each image; the first view is the reference.
  answer: {objective: ((variables, Pair [N ...]) -> [N E])}.
  """
  encode: Any
  pairs: dict[str, dict[str, Any]]
  banks: dict[str, dict[str, Any]]
  answer: dict[str, Any]


def variables(state: TrainState) -> dict:
  """Return what a frozen network needs of a state: its weights and its BatchNorm statistics."""
  return {'params': state.params, 'batch_stats': state.stats}


def objective_augmentations(recipe: Recipe, name: str) -> list[str]:
  """Return the names of the augmentations of objective `name`, which its head is conditioned on."""
  return recipe.wirings[name].conditioning.name.split('+')


def canvas_image(pixels: Array, size: Size) -> Image:
  """Return a uint8 canvas [S S C] as an image in [0, 1] of true `size`."""
  return Image(pixels.astype(jnp.float32) / 255., size)


def indexed_images(split: Split, part: slice | None = None) -> tuple[np.ndarray, Any, Any]:
  """Return (index, images, sizes) of a split, or of a part of it, as the evaluation functions read
  them. The index counts from 0."""
  images, sizes = split.images, split.sizes
  if part is not None:
    images, sizes = images[part], sizes[part]
  return np.arange(len(images), dtype=np.int32), images, sizes


def _apply(recipe: Recipe, *arguments: Any, method: str) -> Any:
  """Call a method of the network in eval mode, where flax returns its result alone."""
  return recipe.network.apply(*arguments, method=method)


def source_action(recipe: Recipe, name: str, chain: Op, size: Size) -> Action:
  """Return the action of `chain` whose view is the source of objective `name`.

  It is that of the objective's reference; without a reference, that of the pixels that an
  evaluation gives a network. (Where images are square and stored at their size: the identity.)
  """
  if 'reference' in recipe.equivariances[name].uses:  # the reference's chain may have more ops
    action = recipe.groups['reference'].chains[0].sample(jax.random.key(SEED), size)
    return {op: action[op] for op in chain.identity(size)}
  return inputs.input_action(inputs.canvas_inputs(recipe.size, recipe.canvas), chain, size)


def _masked(recipe: Recipe, name: str, chain: Op, mask: Mask) -> Op:
  """Return `chain` in which only the ops of `mask` draw; the others keep the source's action."""
  def sample(key: Key, size: Size) -> Action:
    action, source = chain.sample(key, size), source_action(recipe, name, chain, size)
    return {n: select(mask[n], action[n], source[n]) for n in action}
  return chain._replace(sample=sample)


def _pairs(recipe: Recipe, name: str, chains: tuple[Op, ...]):
  """Return the function of Frozen.pairs that draws objective `name`'s views from `chains`."""
  objective = recipe.equivariances[name]
  groups = {g: recipe.groups[g] for g in objective.uses}

  def pairs(mask: Mask, values: dict, rows: Rows) -> Pair:
    masked = {id(c): _masked(recipe, name, c, mask) for c in chains}
    masked_chains = tuple(masked[id(c)] for c in chains)
    masked_groups = {g: group if g == 'reference' else group._replace(chains=masked_chains)
                     for g, group in groups.items()}

    def views_of_image(index: Array, pixels: Array, size: Size):
      image = jax.tree.map(lambda a: a[None], canvas_image(pixels, size))
      key = key_for(jax.random.key(SEED), 'held out', index)
      return jax.tree.map(lambda a: a[0], augment.views(masked_groups, key, image))
    views = jax.vmap(views_of_image)(*rows)
    features = {g: _apply(recipe, values, v.images, False, objective.tap, method='encode')
                for g, v in views.items()}
    actions = {g: v.actions for g, v in views.items()}
    pair = _apply(recipe, values, name, recipe.equivariances, features, actions, False,
                  method='pair')
    return jax.tree.map(lambda a: a.reshape(rows[0].shape[0], -1, *a.shape[1:]), pair)
  return pairs


def _prepend(first: Array, others: Array) -> Array:
  return jnp.concatenate([first[None].astype(others.dtype), others])


def _bank(recipe: Recipe, name: str, chain: Op, M: int):
  """Return the function of Frozen.banks that draws M views of each image from `chain`."""
  objective = recipe.equivariances[name]
  run_inputs = inputs.canvas_inputs(recipe.size, recipe.canvas)

  def source(image: Image, action: Action) -> Array:
    if 'reference' in objective.uses:
      return resize(recipe.groups['reference'].chains[0].apply(action, image), recipe.size).pixels
    if 'crop' in action:
      return inputs.input_pixels(run_inputs, image)
    return resize(image, recipe.size).pixels  # without a crop every view is the whole canvas

  def bank(mask: Mask, values: dict, rows: Rows) -> tuple[Array, Action]:
    masked = _masked(recipe, name, chain, mask)

    def views_of_image(index: Array, pixels: Array, size: Size):
      image = canvas_image(pixels, size)
      numbers = jnp.arange(1, M)
      keys = jax.vmap(lambda m: key_for(jax.random.key(SEED), 'bank', index, m))(numbers)
      augmented, actions = jax.vmap(lambda k: augment.augment(masked, k, image))(keys)
      first = source_action(recipe, name, chain, size)
      views = jax.vmap(lambda p, s: resize(Image(p, s), recipe.size).pixels)(*augmented)
      first_actions = {k: first[k] for k in actions}
      return (_prepend(source(image, first), views),
              jax.tree.map(_prepend, first_actions, actions))
    images, actions = jax.vmap(views_of_image)(*rows)
    h = _apply(recipe, values, images, False, objective.tap, method='encode')
    z = _apply(recipe, values, name, recipe.equivariances, h, False, method='embed')
    return z, actions
  return bank


def _changes(recipe: Recipe, sections: Any, name: str, views: int) -> dict[str, tuple]:
  """Return {change: (a function for Frozen.pairs, one for Frozen.banks)} of objective `name`.

  sections: {op: its config section}, from which the range beyond an op's own is computed.
  """
  wiring = recipe.wirings[name]
  names, ops = wiring.own_chains[0].name.split('+'), objective_augmentations(recipe, name)

  def mask(change: str) -> Mask:
    return {op: np.array(change in ('all', op)) for op in names}

  def programs(chains: tuple[Op, ...]) -> tuple[Callable, Callable]:
    return _pairs(recipe, name, chains), _bank(recipe, name, chains[0], views)
  # One program serves all changes: they differ in the mask alone.
  shared = programs(wiring.own_chains)
  changes = {change: (shared, mask(change)) for change in ('all', *ops)}
  for op in [op for op in ops if op in OUTSIDE and op in sections]:
    fields = OUTSIDE[op](sections[op])
    if all(sections[op].get(k) == value for k, value in fields.items()):
      continue  # the op draws from its whole range, such as a full turn
    changes[f'{op} beyond'] = programs(wiring.build_own_chains(wiring.size, {op: fields})), mask(op)
  return {change: (Partial(pairs, drawing), Partial(bank, drawing))
          for change, ((pairs, bank), drawing) in changes.items()}


def frozen(recipe: Recipe, config: Any = None, views: int = 50) -> Frozen:
  """Return the evaluation functions of a recipe; build them once, since they key the programs.

  config: the run's config, from which what lies beyond an op's range is computed (None leaves that
  out). views: the number of views of each image in a bank.
  """
  def encode(values: dict, images: Array) -> Any:
    return _apply(recipe, values, images, method='encode')

  def answer_of(name: str) -> Callable[[dict, Pair], Any]:
    def answer(values: dict, pair: Pair) -> Any:
      return _apply(recipe, values, name, pair, method='answer')
    return answer

  names = [n for n, e in recipe.equivariances.items() if e.predicts == 'target']
  sections = {} if config is None else config.augment
  changes = {name: _changes(recipe, sections, name, views) for name in names}
  return Frozen(encode, {n: {k: pairs for k, (pairs, _) in c.items()} for n, c in changes.items()},
                {n: {k: bank for k, (_, bank) in c.items()} for n, c in changes.items()},
                {n: answer_of(n) for n in names})


def identity(recipe: Recipe, name: str) -> Action:
  """Return the action of objective `name` that does nothing."""
  return recipe.wirings[name].own_chains[0].identity(jnp.full(2, recipe.canvas, jnp.float32))


def gains(recipe: Recipe, functions: Frozen, state: TrainState, name: str, split: Split,
          change: str = 'all', batch: int = 256) -> Measured:
  """Return EquiMod's gains and their controls for objective `name` on the images of `split`.

  change: 'all', the name of an op, or 'OP beyond'; see Frozen.
  """
  images, values = indexed_images(split), variables(state)
  pair = in_batches(Partial(functions.pairs[name][change], values), images, batch)
  V = pair.target.shape[1]
  pair = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), pair)
  predict = Partial(functions.answer[name], values)
  return measure(predict, pair, identity(recipe, name), jax.random.key(SEED),
                 np.repeat(images[0], V), batch * V)


def bank(functions: Frozen, state: TrainState, name: str, images: tuple, change: str = 'all',
         batch: int = 16) -> tuple[np.ndarray, Action]:
  """Return (embeddings [N M E], actions [N M ...]) of M views of each image, for objective `name`.

  The first view is not augmented. images: what `indexed_images` returns. change: see Frozen.
  """
  return in_batches(Partial(functions.banks[name][change], variables(state)), images, batch)


def panel(side: int, p: float) -> dict[str, Op]:
  """Return the ops of PANEL at their default strengths, for views of `side` pixels.

  p: the probability of each op that has one.
  """
  ops = {}
  for name in PANEL:
    schema = registry.schema(augment, name)
    fields = {k: v for k, v in (('size', side), ('p', p)) if k in schema}
    ops[name] = registry.make(augment, name, **fields)
  return ops


def panel_views(encode: Callable, ops: dict[str, Op], run_inputs: Inputs, views: int,
                shared: int = 0):
  """Return the function (variables, (index [B], uint8 images [B S S C], sizes [B 2])) -> (features
  [B P 1 + V D], {op: actions [B V ...]}).

  Each image is changed by each of the P ops alone, in `views` draws; before these stands the op's
  identity action, so that all have the op's treatment. Ops change the image as a network is given
  it, but a crop is cut from the whole image. shared > 0: all images get the same draws, and a crop
  too is cut from what a network is given.
  """
  def views_of_op(name: str, op: Op, source: Image, number: Array) -> tuple[Array, Action]:
    key = key_for(jax.random.key(SEED), 'panel', name, number)
    keys = jax.vmap(lambda v: key_for(key, v))(jnp.arange(views))
    drawn_actions = jax.vmap(lambda k: op.sample(k, source.size))(keys)
    actions = jax.tree.map(lambda a, b: jnp.concatenate([jnp.asarray(a, b.dtype)[None], b]),
                           op.identity(source.size), drawn_actions)
    return jax.vmap(lambda a: op.apply(a, source).pixels)(actions), drawn_actions

  def views_of_image(index: Array, pixels: Array, size: Size):
    image, pictures, actions = canvas_image(pixels, size), [], {}
    input_image = inputs.input_image(run_inputs, image)
    for name, op in ops.items():
      from_canvas = name == 'crop' and not shared
      number = jnp.zeros((), jnp.int32) if shared else index
      source = image if from_canvas else input_image
      changed, actions[name] = views_of_op(name, op, source, number)
      if from_canvas:  # the first view is what a network is given, as for the other ops
        changed = jnp.concatenate([input_image.pixels[None], changed[1:]])
      pictures.append(changed)
    return jnp.stack(pictures), actions

  def features(values: dict, rows: Rows) -> tuple[Array, Action]:
    images, actions = jax.vmap(views_of_image)(*rows)
    h = encode(values, images.reshape(-1, *images.shape[3:]))
    return h.reshape(*images.shape[:3], -1), actions
  return features

"""A network in eval mode as pure functions of its variables, and what they answer on held-out images."""
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from equivariant_ssl import augment, registry
from equivariant_ssl.augment.algebra import resize, select
from equivariant_ssl.data.source import Split
from equivariant_ssl.evaluate import gains, inputs
from equivariant_ssl.evaluate.features import in_batches
from equivariant_ssl.evaluate.inputs import Inputs
from equivariant_ssl.keys import key_for
from equivariant_ssl.training.recipe import Recipe
from equivariant_ssl.training.state import TrainState
from equivariant_ssl.types import Action, Array, Image, Key, Op, Pair, Size

SEED = 0  # of the held-out views: the same for every run and checkpoint
PANEL = ('crop', 'flip', 'vflip', 'rotate', 'turn', 'jitter', 'gray', 'blur', 'solarize', 'invert')  # of any network
OUTSIDE = {  # what an op draws beyond its own range, from its configured fields
    'crop': lambda crop: {'scale': (crop.scale[0] / 4, crop.scale[0])},
    'jitter': lambda jitter: {k: min(2 * jitter[k], .5 if k == 'hue' else 1.)
                              for k in ('brightness', 'contrast', 'saturation', 'hue')},
    'blur': lambda blur: {'sigma': (blur.sigma[1], 2 * blur.sigma[1])},
    'turn': lambda turn: {'degrees': min(2 * turn.degrees, 180.)},
}


class Frozen(NamedTuple):
  """Functions that compile once for all checkpoints.

  encode: (variables, images [B S S C] in [0, 1]) -> features [B D].
  pairs: {objective: {what was done: ((variables, (index [B], images uint8 [B S S C], sizes [B 2])) -> Pair [B V ...])}}, for
  'all' the objective's own chain, for each op that it is told that op alone, and 'OP beyond': the op outside of the range it
  was trained on; of the objectives that predict where an embedding goes.
  banks: the same keys: (variables, (index, images, sizes)) -> (embeddings [B M E], actions [B M ...]) of M views of each
  image, the first the reference.
  answer: {objective: ((variables, Pair [N ...]) -> [N E])}.
  """
  encode: Any
  pairs: dict[str, dict[str, Any]]
  banks: dict[str, dict[str, Any]]
  answer: dict[str, Any]


def variables(state: TrainState) -> dict:
  """What a frozen network needs of a state."""
  return {'params': state.params, 'batch_stats': state.stats}


def told(recipe: Recipe, name: str) -> list[str]:
  """The names of the ops that objective `name` is told."""
  return recipe.wirings[name].conditioning.name.split('+')


def canvas(pixels: Array, size: Size) -> Image:
  """A uint8 canvas [S S C] as an image in [0, 1] of true `size`."""
  return Image(pixels.astype(jnp.float32) / 255., size)


def rows(split: Split, part: slice | None = None) -> tuple[np.ndarray, Any, Any]:
  """(index, images, sizes) of a split, or of a part of it: what the programs here read. The index counts from 0."""
  images, sizes = (split.images, split.sizes) if part is None else (split.images[part], split.sizes[part])
  return np.arange(len(images), dtype=np.int32), images, sizes


Mask = dict[str, Array]  # {op: whether it draws}; an argument, so that one program serves every op alone


def _still(recipe: Recipe, name: str, chain: Op, size: Size) -> Action:
  """The action of `chain` whose view is the source of objective `name`: its reference's where it has one, else that of what
  an evaluation shows. (Where images are square and stored at their size: the identity.)"""
  if 'reference' in recipe.equivariances[name].uses:  # its own chain may know more ops
    found = recipe.groups['reference'].chains[0].sample(jax.random.key(SEED), size)
    return {op: found[op] for op in chain.identity(size)}
  return inputs.still(inputs.at(recipe.size, recipe.canvas), chain, size)


def _masked(recipe: Recipe, name: str, chain: Op, mask: Mask) -> Op:
  """`chain` of which the ops of `mask` alone draw; the others keep the action of the source."""
  def sample(key: Key, size: Size) -> Action:
    drawn, still = chain.sample(key, size), _still(recipe, name, chain, size)
    return {n: select(mask[n], drawn[n], still[n]) for n in drawn}
  return chain._replace(sample=sample)


def _pairs(recipe: Recipe, name: str, own: tuple[Op, ...]):
  """The objective's own pairs of each image, its views drawn from the chains `own`."""
  objective = recipe.equivariances[name]
  groups = {g: recipe.groups[g] for g in objective.uses}

  def pairs(mask: Mask, values: dict, rows: tuple[Array, Array, Array]) -> Pair:
    masked = {id(c): _masked(recipe, name, c, mask) for c in own}
    drawn = {g: group if g == 'reference' else group._replace(chains=tuple(masked[id(c)] for c in own))
             for g, group in groups.items()}

    def of_one(index: Array, pixels: Array, size: Size):
      image = jax.tree.map(lambda a: a[None], canvas(pixels, size))
      shown = augment.views(drawn, key_for(jax.random.key(SEED), 'held out', index), image)
      return jax.tree.map(lambda a: a[0], shown)
    shown = jax.vmap(of_one)(*rows)
    found = {g: recipe.network.apply(values, v.images, False, objective.tap, method='encode') for g, v in shown.items()}
    actions = {g: v.actions for g, v in shown.items()}
    pair = recipe.network.apply(values, name, recipe.equivariances, found, actions, False, method='pair')
    return jax.tree.map(lambda a: a.reshape(rows[0].shape[0], -1, *a.shape[1:]), pair)
  return pairs


def _bank(recipe: Recipe, name: str, chain: Op, M: int):
  """M views of each image, embedded as the objective embeds; the first is its reference."""
  objective, shows = recipe.equivariances[name], inputs.at(recipe.size, recipe.canvas)

  def source(image: Image, still: Action) -> Array:
    if 'reference' in objective.uses:
      return resize(recipe.groups['reference'].chains[0].apply(still, image), recipe.size).pixels
    # Without a crop every view is the whole canvas, and so is the source.
    return inputs.one(shows, image) if 'crop' in still else resize(image, recipe.size).pixels

  def bank(mask: Mask, values: dict, rows: tuple[Array, Array, Array]) -> tuple[Array, Action]:
    masked = _masked(recipe, name, chain, mask)

    def of_one(index: Array, pixels: Array, size: Size):
      image = canvas(pixels, size)
      keys = jax.vmap(lambda m: key_for(jax.random.key(SEED), 'bank', index, m))(jnp.arange(1, M))
      shown, actions = jax.vmap(lambda k: augment.augment(masked, k, image))(keys)
      still = _still(recipe, name, chain, size)
      join = lambda a, b: jnp.concatenate([a[None].astype(b.dtype), b])
      shown = jax.vmap(lambda p, s: resize(Image(p, s), recipe.size).pixels)(*shown)
      return join(source(image, still), shown), jax.tree.map(join, {k: still[k] for k in actions}, actions)
    images, actions = jax.vmap(of_one)(*rows)
    h = recipe.network.apply(values, images, False, objective.tap, method='encode')
    return recipe.network.apply(values, name, recipe.equivariances, h, False, method='embed'), actions
  return bank


def frozen(recipe: Recipe, config: Any = None, views: int = 50) -> Frozen:
  """The evaluation functions of a recipe; build them once, for the programs are cached by them. config: the run's, for
  what lies beyond an op's range (None: left out). views: of each image's bank."""
  def encode(values: dict, images: Array) -> Array:
    return recipe.network.apply(values, images, method='encode')

  def answer_of(name: str):
    return lambda values, pair: recipe.network.apply(values, name, pair, method='answer')

  names = [n for n, e in recipe.equivariances.items() if e.predicts == 'target']
  pairs, banks = {}, {}
  for name in names:
    wiring, first = recipe.wirings[name], recipe.wirings[name].own_chains
    ops = first[0].name.split('+')
    mask = lambda drawing, ops=ops: {op: np.array(drawing in ('all', op)) for op in ops}
    both = lambda own, name=name: (_pairs(recipe, name, own), _bank(recipe, name, own[0], views))
    shared = both(first)
    found = {what: (shared, mask(what)) for what in ('all', *told(recipe, name))}
    beyond = [op for op in told(recipe, name) if config is not None and op in OUTSIDE]
    found |= {f'{op} beyond': (both(wiring.build_own_chains(wiring.size, {op: OUTSIDE[op](config.augment[op])})), mask(op))
              for op in beyond}
    pairs[name], banks[name] = ({what: Partial(of[i], drawing) for what, (of, drawing) in found.items()} for i in range(2))
  return Frozen(encode, pairs, banks, {n: answer_of(n) for n in names})


def identity(recipe: Recipe, name: str) -> Action:
  """The action of objective `name` that does nothing."""
  return recipe.wirings[name].own_chains[0].identity(jnp.full(2, recipe.canvas, jnp.float32))


def gains(recipe: Recipe, fixed: Frozen, state: TrainState, name: str, split: Split, what: str = 'all',
          batch: int = 256) -> gains.Measured:
  """EquiMod's gains and their controls for objective `name` on the held-out images of `split`, under action `what`."""
  given, values = rows(split), variables(state)
  pair = in_batches(Partial(fixed.pairs[name][what], values), given, batch)
  V = pair.target.shape[1]
  pair = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), pair)
  return gains.measure(Partial(fixed.answer[name], values), pair, identity(recipe, name), jax.random.key(SEED),
                              np.repeat(given[0], V), batch * V)


def bank(fixed: Frozen, state: TrainState, name: str, given: tuple, what: str = 'all', batch: int = 16
         ) -> tuple[np.ndarray, Action]:
  """(embeddings [N M E], actions [N M ...]) of M views of each image, the first un-augmented; given: `rows`."""
  return in_batches(Partial(fixed.banks[name][what], variables(state)), given, batch)


def panel(side: int, p: float) -> dict[str, Op]:
  """The ops of PANEL at their default strengths, for views of `side`, applied with chance `p` where they have one."""
  found = {}
  for name in PANEL:
    schema = registry.schema(augment, name)
    found[name] = registry.make(augment, name, **{k: v for k, v in (('size', side), ('p', p)) if k in schema})
  return found


def panel_views(encode: Callable, ops: dict[str, Op], shows: Inputs, views: int, shared: int = 0):
  """(variables, (index [B], uint8 images [B S S C], sizes [B 2])) -> (features [B P 1 + V D], {op: actions [B V ...]}): each
  image, as it is shown, after each op alone, `views` draws of it; before them its identity action, which has the op's
  treatment. A crop is cut from the whole image. shared > 0: all images get the same draws, of what is shown."""
  def of(values: dict, rows: tuple[Array, Array, Array]) -> tuple[Array, Action]:
    def of_one(index: Array, pixels: Array, size: Size):
      whole, pictures, drawn = canvas(pixels, size), [], {}
      image = inputs.shown(shows, whole)
      for name, op in ops.items():
        source = whole if name == 'crop' and not shared else image
        who = jnp.zeros((), jnp.int32) if shared else index
        key = key_for(jax.random.key(SEED), 'panel', name, who)
        keys = jax.vmap(lambda v, key=key: key_for(key, v))(jnp.arange(views))
        drawn[name] = jax.vmap(lambda k, op=op, source=source: op.sample(k, source.size))(keys)
        still = op.identity(source.size)
        actions = jax.tree.map(lambda a, b: jnp.concatenate([jnp.asarray(a, b.dtype)[None], b]), still, drawn[name])
        found = jax.vmap(lambda a, op=op, source=source: op.apply(a, source).pixels)(actions)
        if source is whole:  # before it is what is shown
          found = jnp.concatenate([image.pixels[None], found[1:]])
        pictures.append(found)
      return jnp.stack(pictures), drawn
    images, drawn = jax.vmap(of_one)(*rows)
    h = encode(values, images.reshape(-1, *images.shape[3:]))
    return h.reshape(*images.shape[:3], -1), drawn
  return of

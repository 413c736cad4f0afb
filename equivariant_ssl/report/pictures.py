"""Pictures with words under them: views with their actions, retrieved views, and neighbors."""
import functools
import io
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from PIL import Image as Pillow

from equivariant_ssl.augment.algebra import resize
from equivariant_ssl.data.source import Source, Split
from equivariant_ssl.evaluate import frozen
from equivariant_ssl.evaluate.gains import predictions
from equivariant_ssl.parallel import sharding
from equivariant_ssl.training import runs, step
from equivariant_ssl.training.recipe import Recipe
from equivariant_ssl.training.state import TrainState
from equivariant_ssl.types import Action, Array, Key, Op, Pair, Size, Views

# Neighbors are looked for among so many training images, whose features take seconds.
TRAINING = 10_000
NEAREST = 5   # views that a strip retrieves
CHUNK = 8192  # rows of a bank that are float64 at a time
UNITS = {'angle': '° counter-clockwise', 'shear': '°', 'sigma': ' px',
         'dropped': ' bits'}  # the units of the fields of actions
PLAIN = 'as it is'


class Tile(NamedTuple):
  """A picture with words. pixels: uint8 [H W 3]. lines: the lines of text under it."""
  pixels: np.ndarray
  lines: tuple[str, ...]


def number(value: Any) -> str:
  """Return a number with up to three significant digits: '1.25', '-.3', '17'."""
  text = f'{float(value):.3g}' if abs(value) >= 1 else f'{float(value):.2g}'
  return text.replace('0.', '.', 1) if text.startswith(('0.', '-0.')) else text


def _box(name: str, box: Action) -> str:
  """Return the action of an op that cuts or erases a box in words."""
  corner = f'({number(box.top)}, {number(box.left)})'
  return f'{name} {100 * box.height * box.width:.0f} % of the area, at {corner}'


def _color_steps(name: str, jitter: Action) -> str:
  """Return the steps of a color jitter that change something, in the order of application."""
  factors = {'brightness': jitter.brightness, 'contrast': jitter.contrast,
             'saturation': jitter.saturation}
  words = {k: f'{word} ×{number(factor)}' for k, (word, factor) in enumerate(factors.items())
           if factor != 1}
  words |= {3: f'hue {number(jitter.hue)} turns'} if jitter.hue else {}
  return f'{name} {" → ".join(words[k] for k in jitter.order.tolist() if k in words)}'.strip()


def _turn(name: str, action: Action) -> str:
  """Return a rotation by quarter turns in degrees."""
  return f'{name} {90 * action.turns}° counter-clockwise'


# {op: (its name, its action) -> words}, for the actions that a list of fields would not explain.
SENTENCES: dict[str, Callable[[str, Action], str]] = {
    'crop': _box, 'erase': _box, 'jitter': _color_steps, 'rotate': _turn}


def _fields(name: str, action: Action) -> str:
  """Return the fields of an action with their values and units."""
  fields = [f'{k} {number(v)}{UNITS.get(k, "")}' for k, v in action._asdict().items()
            if k != 'applied']
  return f'{name} {", ".join(fields)}'.strip()


def describe(action: Action, identity: Action) -> tuple[str, ...]:
  """Return one line per op that did something to a view, or ('as it is',) where none did.

  The lines are in the order of `identity`. A box is at (top, left), in fractions of the image.

  action: the action of one view, {op: NamedTuple of NumPy arrays}.
  identity: the identity action of the same ops (see `host_identity`).
  """
  names = [name for name in identity
           if not all(np.array_equal(a, b)
                      for a, b in zip(action[name], identity[name], strict=True))]
  return tuple(SENTENCES.get(name, _fields)(name, action[name]) for name in names) or (PLAIN,)


def take(tree: Action, *index: int) -> Action:
  """Return the rows `index` of NumPy arrays [B V ...]."""
  return jax.tree.map(lambda a: np.asarray(a)[index], tree)


def png(pixels: np.ndarray) -> bytes:
  """Return a PNG file of uint8 [H W 3]."""
  file = io.BytesIO()
  Pillow.fromarray(pixels).save(file, 'PNG')
  return file.getvalue()


def to_uint8(images: Array | np.ndarray) -> np.ndarray:
  """Return images in [0, 1] as the nearest of the 256 levels."""
  return np.rint(np.asarray(images) * 255.).astype(np.uint8)


def upright(canvas: Any, size: np.ndarray) -> np.ndarray:
  """Return a canvas [S S 3] in the proportions of its true (height, width).

  Its longer side is S.
  """
  sides = np.maximum(np.rint(len(canvas) * np.asarray(size) / np.max(size)), 1).astype(int)
  if (sides == len(canvas)).all():
    return canvas
  image = Pillow.fromarray(canvas)
  return np.asarray(image.resize((int(sides[1]), int(sides[0])), Pillow.Resampling.BICUBIC))


def source_of(run: runs.Run) -> Source:
  """Return the data of a run that was opened with them."""
  assert run.source is not None  # pictures are made of runs that were opened with their data
  return run.source


def page_split(run: runs.Run) -> Split:
  """Return the images that a page shows: the test split (or the validation images that stand in its
  place), or the training split where a run has no test split."""
  source = source_of(run)
  return source.test or source.train


def sample(total: int, count: int) -> np.ndarray:
  """Return `count` of `total` indices in rising order, the same at every call.

  The sample is random, because class folders sort images by class.
  """
  return np.sort(np.random.RandomState(0).permutation(total)[:count])


def host_identity(chain: Op, side: int) -> Action:
  """Return the identity action of a chain in NumPy, its ops in the order of application.

  (The trees that JAX returns are sorted by name.)
  """
  actions = chain.identity(jnp.full(2, side, jnp.float32))
  return {name: jax.device_get(action) for name, action in actions.items()}


@functools.lru_cache(8)
def _views_program(recipe: Recipe) -> Callable[[Key, step.Batch], dict[str, Views]]:
  return jax.jit(lambda key, batch: step.draw_views(recipe, key, jnp.int32(0), batch),
                 compiler_options=sharding.ONCE)


def first_views(recipe: Recipe, key: Key, batch: step.Batch) -> dict[str, Views]:
  """Return {view group: the views of `batch`} that the first step of a run would draw."""
  return _views_program(recipe)(key, batch)


def view_tiles(recipe: Recipe, key: Key, batch: step.Batch) -> dict[str, list[list[Tile]]]:
  """Return {view group: a row of tiles per image of `batch`}: the original, then its views.

  The views are those that the first step of a run would draw.
  """
  views, tiles = jax.device_get(first_views(recipe, key, batch)), {}

  def row(i: int, size: np.ndarray, images: np.ndarray, actions: Action, identity: Action
          ) -> list[Tile]:
    words = f'the image, {size[0]:.0f} x {size[1]:.0f} pixels'
    return [Tile(upright(batch.images[i], size), (words,)),
            *(Tile(view, describe(take(actions, i, v), identity))
              for v, view in enumerate(to_uint8(images[i])))]

  for name, group in recipe.groups.items():
    identity, (images, actions) = host_identity(group.chains[0], recipe.canvas), views[name]
    tiles[name] = [row(i, size, images, actions, identity) for i, size in enumerate(batch.sizes)]
  return tiles


def gallery(run: runs.Run, count: int = 4) -> dict[str, list[list[Tile]]]:
  """Return the `indexed_images` of the first `count` images of the `split`."""
  images, sizes, _ = page_split(run)
  return view_tiles(run.recipe, run.key, step.Batch(images[:count], sizes[:count]))


def _unit(x: np.ndarray) -> np.ndarray:
  """Return vectors [N D] at unit length, in float64."""
  x = x.astype(np.float64)
  return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def nearest(queries: np.ndarray, bank: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
  """Return the rows (int) and cosines (float64), each [Q k], of the k nearest vectors by cosine.

  The nearest vector is first; of equally near vectors, the first in the bank.

  queries: [Q D]. bank: [N D].
  """
  units = _unit(queries).T
  parts = [_unit(bank[start:start + CHUNK]) @ units for start in range(0, len(bank), CHUNK)]
  cosines = np.concatenate(parts).T
  order = np.argsort(-cosines, axis=1, kind='stable')[:, :k]
  return order, np.take_along_axis(cosines, order, axis=1)


def _strip(actions: Action, order: np.ndarray, cosines: np.ndarray, view: Callable,
           identity: Action) -> list[Tile]:
  """Return one row of `strips`.

  actions: [M ...], of the views of a bank. order: the bank's rows, nearest to the prediction first.
  cosines: the cosines of the rows in `order`. view: actions -> their pictures.
  """
  same = np.all([np.reshape(a == a[1], (len(a), -1)).all(1) for a in jax.tree.leaves(actions)],
                axis=0)
  members = [0, 1, *order[:NEAREST]]
  rank = 1 + same[order].argmax()
  words = [('query',), ('requested', f'retrieved at rank {rank} of {len(order)}')]
  for r, (m, cosine) in enumerate(zip(members[2:], cosines, strict=False), 1):
    words.append((f'{r}. cosine {cosine:.3f}', *(('✓ the right one',) if same[m] else ())))
  pixels = to_uint8(view(jax.tree.map(lambda a: a[np.array(members)], actions)))
  return [Tile(p, (*lines, *describe(take(actions, m), identity)))
          for p, lines, m in zip(pixels, words, members, strict=True)]


def _viewer(chain: Op, size: int) -> Callable:
  """Return a program (canvas [S S 3], true size, actions [M ...]) -> views [M size size 3]."""
  def view(pixels: Array, true: Size, action: Action) -> Array:
    return resize(chain.apply(action, frozen.canvas_image(pixels, true)), size).pixels
  return jax.jit(jax.vmap(view, (None, None, 0)), compiler_options=sharding.ONCE)


def _take_view(tree: Any, m: int) -> Any:
  """Return the m-th view of each image, [N ...], from arrays [N M ...]."""
  return jax.tree.map(lambda a: a[:, m], tree)


def strips(run: runs.Run, fixed: frozen.Frozen, state: TrainState, count: int = 4
           ) -> dict[str, list[list[Tile]]]:
  """Return {objective: a row of tiles per image} of the objectives that predict an embedding.

  A row has the query, which is un-augmented, the requested view, and the five views of the image's
  bank that are nearest to the prediction. The images are the first `count` test images.

  The requested view is the first that was drawn, not a chosen one. Every view of the same action is
  right: quarter turns come up many times.
  """
  index_images_sizes = frozen.indexed_images(page_split(run), slice(count))
  _, images, sizes = index_images_sizes
  tiles: dict[str, list[list[Tile]]] = {}
  for name in fixed.banks:
    chain = run.recipe.wirings[name].own_chains[0]
    embeddings, actions = frozen.bank(fixed, state, name, index_images_sizes, batch=len(images))
    pairs = Pair(*(_take_view(embeddings, m) for m in (0, 1)),
                 *(_take_view(actions, m) for m in (0, 1)))
    predict = Partial(fixed.answer[name], frozen.variables(state))
    predicted = predictions(predict, pairs, len(images))
    view, identity = _viewer(chain, run.recipe.size), host_identity(chain, run.recipe.canvas)
    tiles[name] = []
    for i, (prediction, bank) in enumerate(zip(predicted, embeddings, strict=True)):
      order, cosines = nearest(prediction[None], bank, len(bank))
      tiles[name].append(_strip(take(actions, i), order[0], cosines[0],
                                Partial(view, images[i], sizes[i]), identity))
  return tiles

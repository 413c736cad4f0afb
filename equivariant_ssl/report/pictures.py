"""Pictures with what they show written under them: views and their actions, what a prediction retrieves, neighbours."""
import io
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from PIL import Image as Pillow

from equivariant_ssl.augment.algebra import resize
from equivariant_ssl.data.source import Split
from equivariant_ssl.evaluate import frozen, inputs
from equivariant_ssl.evaluate.gains import answers
from equivariant_ssl.parallel import sharding
from equivariant_ssl.training import runs, step
from equivariant_ssl.training.recipe import Recipe
from equivariant_ssl.training.state import TrainState
from equivariant_ssl.types import Action, Array, Key, Op, Pair

TRAINING = 10_000  # training images among which neighbours are sought: their features take seconds
NEAREST = 5        # views that a strip retrieves
CHUNK = 8192       # rows of a bank that are float64 at a time
UNITS = {'angle': '° counter-clockwise', 'shear': '°', 'sigma': ' px', 'dropped': ' bits'}  # of actions' fields
PLAIN = 'as it is'


class Tile(NamedTuple):
  """pixels: uint8 [H W 3]. lines: what is written under it."""
  pixels: np.ndarray
  lines: tuple[str, ...]


def number(value: np.ndarray) -> str:
  """Up to three significant digits: '1.25', '-.3', '17'."""
  text = f'{float(value):.3g}' if abs(value) >= 1 else f'{float(value):.2g}'
  return text.replace('0.', '.', 1) if text.startswith(('0.', '-0.')) else text


def _box(name: str, box: Action) -> str:
  return f'{name} {100 * box.height * box.width:.0f} % of the area, at ({number(box.top)}, {number(box.left)})'


def _colours(name: str, jitter: Action) -> str:
  factors = {'brightness': jitter.brightness, 'contrast': jitter.contrast, 'saturation': jitter.saturation}
  said = {k: f'{word} ×{number(factor)}' for k, (word, factor) in enumerate(factors.items()) if factor != 1}
  said |= {3: f'hue {number(jitter.hue)} turns'} if jitter.hue else {}
  return f'{name} {" → ".join(said[k] for k in jitter.order.tolist() if k in said)}'.strip()


SENTENCES: dict[str, Callable[[str, Action], str]] = {  # of the actions that a list of fields would not make plain
    'crop': _box,
    'erase': _box,
    'jitter': _colours,
    'rotate': lambda name, action: f'{name} {90 * action.turns}° counter-clockwise',
}


def _fields(name: str, action: Action) -> str:
  shown = [f'{k} {number(v)}{UNITS.get(k, "")}' for k, v in action._asdict().items() if k != 'applied']
  return f'{name} {", ".join(shown)}'.strip()


def describe(action: Action, nothing: Action) -> tuple[str, ...]:
  """A line an op that did something, in the order of `nothing`, of one view's `action` {op: NamedTuple of NumPy
  arrays}; where none did, 'as it is'.

  nothing: the identity action of the same ops (`still`). A box lies at (top, left), in fractions.
  """
  same = lambda name: all(np.array_equal(a, b) for a, b in zip(action[name], nothing[name], strict=True))
  return tuple(SENTENCES.get(name, _fields)(name, action[name]) for name in nothing if not same(name)) or (PLAIN,)


def at(tree: Action, *index: int) -> Action:
  """Row `index` of NumPy arrays [B V ...]."""
  return jax.tree.map(lambda a: np.asarray(a)[index], tree)


def png(pixels: np.ndarray) -> bytes:
  """A PNG file of uint8 [H W 3]."""
  file = io.BytesIO()
  Pillow.fromarray(pixels).save(file, 'PNG')
  return file.getvalue()


def to_uint8(images: Array) -> np.ndarray:
  """Images in [0, 1] as the nearest of the 256 levels."""
  return np.rint(np.asarray(images) * 255.).astype(np.uint8)


def upright(canvas: np.ndarray, size: np.ndarray) -> np.ndarray:
  """A canvas [S S 3] as the true (height, width) `size` has it: its longer side S."""
  sides = np.maximum(np.rint(len(canvas) * np.asarray(size) / np.max(size)), 1).astype(int)
  if (sides == len(canvas)).all():
    return canvas
  return np.asarray(Pillow.fromarray(canvas).resize((int(sides[1]), int(sides[0])), Pillow.Resampling.BICUBIC))


def split(run: runs.Run) -> Split:
  """The images to show: the test split (what was held out in its place), or the training split where there is none."""
  return run.source.test or run.source.train


def some(many: int, count: int) -> np.ndarray:
  """`count` of `many` indices in order, always the same: what lies in class folders comes sorted by class."""
  return np.sort(np.random.RandomState(0).permutation(many)[:count])


def still(chain: Op, side: int) -> Action:
  """The identity action of a chain, on the host, its ops in the order of application (a tree of JAX's sorts them)."""
  return {name: jax.device_get(action) for name, action in chain.identity(jnp.full(2, side, jnp.float32)).items()}


def rows(recipe: Recipe, key: Key, batch: step.Batch) -> dict[str, list[list[Tile]]]:
  """{view group: a row an image of `batch`: the original, then its views}, drawn as the first step of a run would."""
  program = jax.jit(lambda key, batch: step.views(recipe, key, 0, batch), compiler_options=sharding.ONCE)
  shown, found = jax.device_get(program(key, batch)), {}
  for name, group in recipe.groups.items():
    nothing, (images, actions) = still(group.chains[0], recipe.canvas), shown[name]
    found[name] = [[Tile(upright(batch.images[i], size), (f'the image, {size[1]:.0f} x {size[0]:.0f} pixels',)),
                    *(Tile(view, describe(at(actions, i, v), nothing)) for v, view in enumerate(to_uint8(images[i])))]
                   for i, size in enumerate(batch.sizes)]
  return found


def gallery(run: runs.Run, count: int = 4) -> dict[str, list[list[Tile]]]:
  """{view group: a row an image: the original, then its views}, of the first `count` test (else training) images."""
  images, sizes, _ = split(run)
  return rows(run.recipe, run.key, step.Batch(images[:count], sizes[:count]))


def nearest(queries: np.ndarray, bank: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
  """(rows int, cosines float64), each [Q k]: of queries [Q D] the k nearest of bank [N D] by cosine, nearest first, of
  equally near ones the first in the bank."""
  unit = lambda x: x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
  asked = unit(queries.astype(np.float64)).T
  parts = (unit(bank[start:start + CHUNK].astype(np.float64)) @ asked for start in range(0, len(bank), CHUNK))
  cosines = np.concatenate(list(parts)).T
  order = np.argsort(-cosines, axis=1, kind='stable')[:, :k]
  return order, np.take_along_axis(cosines, order, axis=1)


def _strip(actions: Action, order: np.ndarray, cosines: np.ndarray, view: Callable, nothing: Action) -> list[Tile]:
  """A row of `strips`, of a bank's `actions` [M ...] in `order` of their cosines. view: actions -> their pictures."""
  right = np.all([np.reshape(a == a[1], (len(a), -1)).all(1) for a in jax.tree.leaves(actions)], axis=0)
  rows = [0, 1, *order[:NEAREST]]
  said = [('query',), ('asked for', f'found at rank {1 + right[order].argmax()} of {len(order)}')]
  said += [(f'{r}. cosine {c:.3f}', *(('✓ the right one',) if right[m] else ()))
           for r, (m, c) in enumerate(zip(rows[2:], cosines, strict=False), 1)]
  pixels = to_uint8(view(jax.tree.map(lambda a: a[np.array(rows)], actions)))
  return [Tile(p, (*words, *describe(at(actions, m), nothing))) for p, words, m in zip(pixels, said, rows, strict=True)]


def strips(run: runs.Run, fixed: frozen.Frozen, state: TrainState, count: int = 4) -> dict[str, list[list[Tile]]]:
  """{objective: a row an image: the query (un-augmented), the view asked for, the five views of its own bank nearest to
  the prediction}, of the objectives that predict where an embedding goes and the first `count` test images.

  Asked for is the first view drawn, not a chosen one. Right is every view of the same action: turns come up many times.
  """
  given, size, found = frozen.rows(split(run), slice(count)), run.recipe.size, {}
  _, images, sizes = given
  for name in fixed.banks:
    chain = run.recipe.wirings[name].own_chains[0]
    embeddings, actions = frozen.bank(fixed, state, name, given, batch=len(images))
    before, after = (jax.tree.map(lambda a, m=m: a[:, m], actions) for m in range(2))
    predict = Partial(fixed.answer[name], frozen.variables(state))
    predicted = answers(predict, Pair(embeddings[:, 0], embeddings[:, 1], before, after), len(images))
    show = lambda pixels, true, action: resize(chain.apply(action, frozen.canvas(pixels, true)), size).pixels
    show = jax.jit(jax.vmap(show, (None, None, 0)), compiler_options=sharding.ONCE)
    found[name] = []
    for i, (guess, bank) in enumerate(zip(predicted, embeddings, strict=True)):
      order, cosines = nearest(guess[None], bank, len(bank))
      found[name].append(_strip(at(actions, i), order[0], cosines[0], lambda a: show(images[i], sizes[i], a),
                                still(chain, run.recipe.canvas)))
  return found


def neighbours(run: runs.Run, fixed: frozen.Frozen, state: TrainState, count: int = 6, k: int = 8) -> list[list[Tile]]:
  """A row a test image: the image, and its k nearest training images by cosine of features, nearest first, of at most
  TRAINING; of both splits, `some`."""
  train, tests = run.source.train, split(run)
  asked, kept = some(len(tests.images), count), some(len(train.images), TRAINING)
  both = Split(*(np.concatenate([a[asked], b[kept]]) for a, b in ((tests.images, train.images), (tests.sizes, train.sizes))),
               None)
  h = inputs.features(Partial(fixed.encode, frozen.variables(state)), both, inputs.of(run.recipe.size, both), mesh=run.mesh)
  order, cosines = nearest(h[:len(asked)], h[len(asked):], k + 1)
  few = len(kept) < len(train.images)
  among = (f'among {len(kept):,} of {len(train.images):,} training images',) if few else ()

  def tile(part: Split, i: int, *words: str) -> Tile:
    classes = run.source.classes if part.labels is not None else None
    return Tile(upright(part.images[i], part.sizes[i]), (*words, *([classes[part.labels[i]]] if classes else ())))

  found = []
  for q, bank_rows, near in zip(asked, order, cosines, strict=True):
    others = [(kept[j], c) for j, c in zip(bank_rows, near, strict=True) if tests is not train or kept[j] != q]
    found.append([tile(tests, q, 'query', *among), *(tile(train, j, f'cosine {c:.3f}') for j, c in others[:k])])
  return found

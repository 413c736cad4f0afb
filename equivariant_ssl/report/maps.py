"""Maps of embeddings, PCA and t-SNE, coloured by class and by what was done to the image."""
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from threadpoolctl import threadpool_limits

from equivariant_ssl.augment.algebra import resize
from equivariant_ssl.data import holdout
from equivariant_ssl.data.source import Split
from equivariant_ssl.evaluate import frozen, inputs
from equivariant_ssl.evaluate.features import features, in_batches
from equivariant_ssl.keys import key_for
from equivariant_ssl.report.pictures import UNITS, at, describe, number, some, split, still
from equivariant_ssl.training import runs
from equivariant_ssl.training.state import TrainState
from equivariant_ssl.types import Action, Array, Op

BY_CLASS, BY_ACTION = 1000, 600  # points: t-SNE takes seconds
DRAWS = 4                        # views of an image by an op that is not discrete
FEWEST = 5                       # points that make a map
CLASSES = 10                     # colours that can be told apart
SHOWN = 2                        # ops whose actions colour a map


class Map(NamedTuple):
  """points: float32 [N 2]. labels: int [N], indices of `names`. about: what it shows, of how many."""
  points: np.ndarray
  labels: np.ndarray
  names: tuple[str, ...]
  about: str


def _both(h: np.ndarray, labels: np.ndarray, names: tuple[str, ...], by: str, what: str) -> dict[str, Map]:
  """PCA and t-SNE of features [N D] at unit length, as cosines compare them; {} of too few, or where all are one."""
  from sklearn.decomposition import PCA  # a second of imports
  from sklearn.manifold import TSNE
  unit = h / np.maximum(np.linalg.norm(h, axis=1, keepdims=True), 1e-12)
  if len(h) < FEWEST or unit.shape[1] < 2 or unit.std(0).max() < 1e-6:
    return {}
  pca = PCA(2, svd_solver='full').fit(unit)
  shares = pca.explained_variance_ratio_
  about = f'{what}, features at unit length'
  near = min(30., (len(h) - 1) / 3)
  with threadpool_limits(1):  # its threads mostly wait for each other: four times as fast
    tsne = TSNE(2, init='pca', perplexity=near, random_state=0).fit_transform(unit)
  return {f'PCA {by}': Map(pca.transform(unit).astype(np.float32), labels, names,
                           f'PCA: {about}; the axes hold {shares[0]:.0%} and {shares[1]:.0%} of the variance.'),
          f't-SNE {by}': Map(tsne.astype(np.float32), labels, names,
                             f't-SNE: {about}; perplexity {near:.0f}. Distances between groups mean little.')}


def _ops(run: runs.Run) -> dict[str, Op]:
  """{op: a chain that has it}: the ops that the objectives are told, or where there is none, all of the first group."""
  recipe = run.recipe
  told = {op: wiring.own_chains[0] for name, wiring in recipe.wirings.items() for op in frozen.told(recipe, name)}
  chain = next(iter(recipe.groups.values())).chains[0]
  return told or {op: chain for op in chain.name.split('+') if op}


def _alone(run: runs.Run, chain: Op, op: str) -> tuple[Action, np.ndarray]:
  """(actions of `op` [N ...], uint8 views [N S S 3]) of images under it alone: its choices in turn, or DRAWS draws."""
  images, sizes, _ = split(run)
  size, choices, shows = run.recipe.size, chain.choices.get(op), inputs.at(run.recipe.size, run.recipe.canvas)
  V = DRAWS if choices is None else len(jax.tree.leaves(choices)[0])

  def of_one(row: tuple[Array, Array, Array]) -> tuple[Action, Array]:
    image = frozen.canvas(*row[1:])
    key, nothing = key_for(jax.random.key(frozen.SEED), 'map', row[0]), inputs.still(shows, chain, image.size)
    drawn = jax.tree.map(jnp.asarray, choices) if choices is not None else jax.vmap(
        lambda v: chain.sample(key_for(key, v), image.size)[op])(jnp.arange(V))
    shown = jax.vmap(lambda a: resize(chain.apply({**nothing, op: a}, image), size).pixels)(drawn)
    return drawn, jnp.rint(shown * 255.).astype(jnp.uint8)

  kept = some(len(images), BY_ACTION // V)
  found = in_batches(jax.vmap(of_one), (kept.astype(np.int32), images[kept], sizes[kept]), min(16, len(kept)))
  return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), found)


def _quartiles(values: np.ndarray) -> tuple[np.ndarray, tuple[str, ...]]:
  """(the quarter of each of values [N], its range); fewer than four where many values are one."""
  edges = np.unique(np.quantile(values, (.25, .5, .75)))
  labels = np.unique(np.searchsorted(edges, values), return_inverse=True)[1]
  ranges = [(values[labels == k].min(), values[labels == k].max()) for k in range(labels.max() + 1)]
  return labels, tuple(number(a) if a == b else f'{number(a)} to {number(b)}' for a, b in ranges)


def _share(h: np.ndarray, labels: np.ndarray) -> float:
  """The share of the variance of features [N D] that lies between the groups of `labels`."""
  means = np.stack([h[labels == k].mean(0) for k in range(labels.max() + 1)])[labels]
  return float(((means - h.mean(0)) ** 2).sum() / np.maximum(((h - h.mean(0)) ** 2).sum(), 1e-12))


def _colours(h: np.ndarray, chain: Op, op: str, action: Action, side: int) -> tuple[float, np.ndarray, tuple[str, ...]]:
  """(share, labels, names): the choices of a discrete `op`; else of its action's fields [N], in quarters, the one
  between whose groups lies most of the variance of features [N D]. share: how much; 0 where nothing varies."""
  if op in chain.choices:
    choices, nothing = chain.choices[op], still(chain, side)[op]
    K = len(jax.tree.leaves(choices)[0])
    labels = np.tile(np.arange(K), len(h) // K)
    return _share(h, labels), labels, tuple(describe({op: at(choices, k)}, {op: nothing})[0] for k in range(K))
  found = [(0., np.zeros(len(h), int), ('',))]
  for field, values in action._asdict().items():
    if values.ndim == 1:
      labels, ranges = _quartiles(values.astype(np.float64))
      words = ('not applied', 'applied') if values.dtype == bool else tuple(
          f'{field} {r}{UNITS.get(field, "")}' for r in ranges)
      found.append((_share(h, labels), labels, words))
  return max(found, key=lambda one: one[0])


def _by_action(run: runs.Run, encode: Partial, what: str) -> dict[str, Map]:
  """The maps of the SHOWN of `_ops` whose actions the features show most."""
  seen, found = [], {}
  for op, chain in _ops(run).items():
    actions, views = _alone(run, chain, op)
    h = features(encode, views, min(256, len(views)), run.mesh)
    seen.append((*_colours(h, chain, op, actions, run.recipe.canvas), op, h))
  for share, labels, names, op, h in sorted(seen, key=lambda one: -one[0])[:SHOWN]:
    if share > 0:
      found |= _both(h, labels, names, f'by action: {op}', f'{len(h)} views of {what} under {op} alone ({share:.0%} of '
                     'the variance of their features lies between the colours)')
  return found


def maps(run: runs.Run, fixed: frozen.Frozen, state: TrainState) -> dict[str, Map]:
  """{'PCA by class', 't-SNE by class', 'PCA by action: OP', ...: Map} of test (else training) images; 'of images', in
  one colour, where there are no labels. A map of too few images, or of features that are all one, is left out."""
  shown, classes = split(run), run.source.classes
  what = f'{holdout.named(run.config.validation) if run.source.test else "training"} images'
  encode, rows = Partial(fixed.encode, frozen.variables(state)), np.arange(len(shown.images))
  labels, names, by, of = np.zeros(len(rows), int), (what,), 'of images', ''
  if shown.labels is not None and classes:
    chosen = some(len(classes), CLASSES)
    rows = rows[np.isin(shown.labels, chosen)]
    labels, names, by = np.searchsorted(chosen, shown.labels), tuple(classes[k] for k in chosen), 'by class'
    of = '' if len(chosen) == len(classes) else f' of {len(chosen)} of the {len(classes)} classes'
  kept = rows[some(len(rows), BY_CLASS)]
  drawn = Split(shown.images[kept], shown.sizes[kept], None)
  h = inputs.features(encode, drawn, inputs.of(run.recipe.size, drawn), mesh=run.mesh)
  return _both(h, labels[kept], names, by, f'{len(kept)} {what}{of}') | _by_action(run, encode, what)

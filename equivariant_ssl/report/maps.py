"""Maps of features (PCA and t-SNE), colored by class and by what was done to the image."""
from typing import Any, NamedTuple

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
from equivariant_ssl.report.pictures import (
  UNITS,
  describe,
  host_identity,
  number,
  page_split,
  sample,
  source_of,
  take,
)
from equivariant_ssl.training import runs
from equivariant_ssl.training.state import TrainState
from equivariant_ssl.types import Action, Array, Op

BY_CLASS, BY_ACTION = 1000, 600  # points of a map, so that t-SNE takes seconds
DRAWS = 4       # views of an image by an op that is not discrete
FEWEST = 5      # points that make a map
CLASSES = 10    # colors that can be told apart
ACTION_MAPS = 2  # ops whose actions color a map


class Map(NamedTuple):
  """Features as points in the plane.

  points: float32 [N 2]. labels: int [N], indices of `names`.
  about: what the map shows, and how many images.
  """
  points: np.ndarray
  labels: np.ndarray
  names: tuple[str, ...]
  about: str


class Coloring(NamedTuple):
  """The colors of points. labels: int [N], indices of `names`.

  share: how much of the variance of the features lies between the labels, from 0 to 1.
  """
  share: float
  labels: np.ndarray
  names: tuple[str, ...]


def _pca_and_tsne(h: np.ndarray, labels: np.ndarray, names: tuple[str, ...], by: str, subject: str
                  ) -> dict[str, Map]:
  """Return the PCA and the t-SNE of features [N D] at unit length, which cosines compare.

  {} is returned where there are fewer than FEWEST points, or where all features are the same.

  by: what the colors mean. subject: what the points are.
  """
  from sklearn.decomposition import PCA  # this import takes a second
  from sklearn.manifold import TSNE
  unit = h / np.maximum(np.linalg.norm(h, axis=1, keepdims=True), 1e-12)
  if len(h) < FEWEST or unit.shape[1] < 2 or unit.std(0).max() < 1e-6:
    return {}
  pca = PCA(2, svd_solver='full').fit(unit)
  shares = pca.explained_variance_ratio_
  about = f'{subject}, features at unit length'
  perplexity = min(30., (len(h) - 1) / 3)
  with threadpool_limits(1):  # four times as fast: the threads mostly wait for each other
    tsne = TSNE(2, init='pca', perplexity=perplexity, random_state=0).fit_transform(unit)
  return {
      f'PCA {by}': Map(
          pca.transform(unit).astype(np.float32), labels, names,
          f'PCA: {about}; the axes hold {shares[0]:.0%} and {shares[1]:.0%} of the variance.'),
      f't-SNE {by}': Map(
          tsne.astype(np.float32), labels, names,
          f't-SNE: {about}; perplexity {perplexity:.0f}. Distances between groups mean little.')}


def _ops(run: runs.Run) -> dict[str, Op]:
  """Return {op: a chain that has it} of the ops that the objectives are conditioned on.

  Where there is no such op, all ops of the first view group are returned.
  """
  recipe = run.recipe
  chains = {op: wiring.own_chains[0] for name, wiring in recipe.wirings.items()
            for op in frozen.objective_augmentations(recipe, name)}
  first = next(iter(recipe.groups.values())).chains[0]
  return chains or {op: first for op in first.name.split('+') if op}


def _choices(chain: Op, op: str) -> Action | None:
  """Return all actions of a discrete op of a chain, stacked [K ...]; None for another op."""
  assert chain.choices is not None  # the choices of a chain are a dict
  return chain.choices.get(op)


def _views_of_op(run: runs.Run, chain: Op, op: str) -> tuple[Action, np.ndarray]:
  """Return the actions [N ...] of `op`, and the uint8 views [N S S 3] of images under `op` alone.

  Each image has one view per choice of a discrete op, or DRAWS views of another op.
  """
  images, sizes, _ = page_split(run)
  size, choices = run.recipe.size, _choices(chain, op)
  evaluation = inputs.canvas_inputs(run.recipe.size, run.recipe.canvas)
  V = DRAWS if choices is None else len(jax.tree.leaves(choices)[0])

  def image_views(row: tuple[Array, Array, Array]) -> tuple[Action, Array]:
    image = frozen.canvas_image(*row[1:])
    key = key_for(jax.random.key(frozen.SEED), 'map', row[0])
    identity = inputs.input_action(evaluation, chain, image.size)

    def draw(v: Array) -> Action:
      return chain.sample(key_for(key, v), image.size)[op]

    def view(action: Action) -> Array:
      return resize(chain.apply({**identity, op: action}, image), size).pixels

    actions = (jax.vmap(draw)(jnp.arange(V)) if choices is None
               else jax.tree.map(jnp.asarray, choices))
    return actions, jnp.rint(jax.vmap(view)(actions) * 255.).astype(jnp.uint8)

  index = sample(len(images), BY_ACTION // V)
  views = in_batches(jax.vmap(image_views), (index.astype(np.int32), images[index], sizes[index]),
                     min(16, len(index)))
  return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), views)


def _quartiles(values: np.ndarray) -> tuple[np.ndarray, tuple[str, ...]]:
  """Return the quarter that each of the values [N] is in, and the range of each quarter.

  There are fewer than four quarters where many values are equal.
  """
  edges = np.unique(np.quantile(values, (.25, .5, .75)))
  labels = np.unique(np.searchsorted(edges, values), return_inverse=True)[1]
  ranges = [(values[labels == k].min(), values[labels == k].max()) for k in range(labels.max() + 1)]
  return labels, tuple(number(a) if a == b else f'{number(a)} to {number(b)}' for a, b in ranges)


def _share(h: np.ndarray, labels: np.ndarray) -> float:
  """Return the share of the variance of features [N D] that lies between the groups of `labels`."""
  means = np.stack([h[labels == k].mean(0) for k in range(labels.max() + 1)])[labels]
  total = ((h - h.mean(0)) ** 2).sum()
  return float(((means - h.mean(0)) ** 2).sum() / np.maximum(total, 1e-12))


def _coloring(h: np.ndarray, chain: Op, op: str, action: Action, side: int) -> Coloring:
  """Return the colors of features [N D] of views by the actions [N ...] of `op`.

  The colors are the choices of a discrete op. For another op, they are the quarters of one field of
  the action: the field whose quarters have most of the features' variance between them. The share
  is 0 where no field varies.
  """
  choices = _choices(chain, op)
  if choices is not None:
    identity = host_identity(chain, side)[op]
    K = len(jax.tree.leaves(choices)[0])
    labels = np.tile(np.arange(K), len(h) // K)
    names = tuple(describe({op: take(choices, k)}, {op: identity})[0] for k in range(K))
    return Coloring(_share(h, labels), labels, names)
  colorings = [Coloring(0., np.zeros(len(h), int), ('',))]
  for field, values in action._asdict().items():
    if values.ndim == 1:
      labels, ranges = _quartiles(values.astype(np.float64))
      names = tuple(f'{field} {r}{UNITS.get(field, "")}' for r in ranges)
      if values.dtype == bool:
        names = ('not applied', 'applied')
      colorings.append(Coloring(_share(h, labels), labels, names))
  return max(colorings, key=lambda coloring: coloring.share)


def _by_action(run: runs.Run, encode: Partial, subject: str) -> dict[str, Map]:
  """Return the maps of the ACTION_MAPS ops whose actions explain the features best."""
  colorings, maps = [], {}
  for op, chain in _ops(run).items():
    actions, views = _views_of_op(run, chain, op)
    h = features(encode, views, min(256, len(views)), run.mesh)
    colorings.append((_coloring(h, chain, op, actions, run.recipe.canvas), op, h))
  colorings.sort(key=lambda one: -one[0].share)
  for (share, labels, names), op, h in colorings[:ACTION_MAPS]:
    if share > 0:
      maps |= _pca_and_tsne(h, labels, names, f'by action: {op}',
                            f'{len(h)} views of {subject} under {op} alone ({share:.0%} of the '
                            'variance of their features lies between the colors)')
  return maps


def maps(run: runs.Run, fixed: frozen.Frozen, state: TrainState) -> dict[str, Map]:
  """Return {'PCA by class', 't-SNE by class', 'PCA by action: OP', ...: Map} of test images.

  The images are training images where a run has no test split. Where they have no labels, the maps
  are 'of images' and have one color. A map of too few images, or of features that are all the same,
  is left out.
  """
  source, images = source_of(run), page_split(run)
  config: Any = run.config
  part = holdout.readout_name(config.validation) if source.test else 'training'
  subject, classes = f'{part} images', source.classes
  encode, rows = Partial(fixed.encode, frozen.variables(state)), np.arange(len(images.images))
  labels, names, by, among = np.zeros(len(rows), int), (subject,), 'of images', ''
  if images.labels is not None and classes:
    chosen = sample(len(classes), CLASSES)
    rows = rows[np.isin(images.labels, chosen)]
    labels, by = np.searchsorted(chosen, images.labels), 'by class'
    names = tuple(classes[k] for k in chosen)
    if len(chosen) < len(classes):
      among = f' of {len(chosen)} of the {len(classes)} classes'
  rows = rows[sample(len(rows), BY_CLASS)]
  points = Split(images.images[rows], images.sizes[rows], None)
  h = inputs.features(encode, points, inputs.split_inputs(run.recipe.size, points), mesh=run.mesh)
  by_class = _pca_and_tsne(h, labels[rows], names, by, f'{len(rows)} {subject}{among}')
  return by_class | _by_action(run, encode, subject)

"""What frozen features know of a digit's quarter turns, and what a predictor makes of them."""
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from equivariant_ssl.data.holdout import held_out_mask
from equivariant_ssl.data.source import Source, Split
from equivariant_ssl.evaluate import fewshot, frozen, inputs, knn, linear, logistic
from equivariant_ssl.evaluate.features import in_batches, labels_of
from equivariant_ssl.evaluate.frozen import Frozen
from equivariant_ssl.evaluate.gains import predictions
from equivariant_ssl.report.pictures import nearest
from equivariant_ssl.training.recipe import Recipe
from equivariant_ssl.types import Array, Pair

TURNS = 4    # 0, 1, 2 and 3 quarter turns, counter-clockwise
NEAREST = 4  # views that are retrieved for a predicted embedding
PENALTIES = (100., 10., 1., .1, .01)  # of the probes of turned digits; see `logistic.logistic`


class TurnRetrieval(NamedTuple):
  """What the nearest view of another held-out digit is to each embedding that a head predicts.

  turn, digit, both: how often, in per cent, its turn is that which the head was conditioned on, its
  class is that of the source, and both. turn_without: the same as `turn`, with a head that is
  conditioned on no turn. nearest: views int [N 4 NEAREST] for each source and turn; view 4 i + t is
  the image i after t quarter turns.
  """
  turn: float
  digit: float
  both: float
  turn_without: float
  nearest: np.ndarray


def turned(split: Split) -> Split:
  """Return the four turns of each image of a split of square canvases, an image after the other.

  The turn of a view is its number modulo 4, in quarters counter-clockwise.
  """
  views = np.stack([np.rot90(split.images, t, axes=(1, 2)) for t in range(TURNS)], axis=1)
  return Split(views.reshape(-1, *split.images.shape[1:]), np.repeat(split.sizes, TURNS, axis=0),
               np.repeat(labels_of(split), TURNS))


def _probe(train: np.ndarray, train_labels: np.ndarray, out: np.ndarray, test: np.ndarray,
           test_labels: np.ndarray, classes: int) -> np.ndarray:
  """Return whether a linear probe is right, bool [M].

  The penalty is chosen on the training rows `out`, bool [N]; then it is fitted to all of them.
  """
  standardize = linear.standardizer(train)
  train, test = standardize(train), standardize(test)
  result = logistic.logistic(train[~out], train_labels[~out], test, test_labels, classes,
                             valid=(train[out], train_labels[out]), penalties=PENALTIES)
  return result.predictions == test_labels


def readouts(encode: Callable[[Array], Array], source: Source, size: int) -> dict[str, float]:
  """Return what linear and other read-outs of frozen features get right, in per cent.

  turn: the quarter turn of a held-out digit, in each of its four turns, by a linear probe. both:
  its class and its turn, by a linear probe each, for the same views. linear, knn, few: the class of
  a held-out digit as it is, by a linear probe, by kNN, and by five labels a class.

  encode: see `inputs.features`. size: the side of the images that the network reads. The probes of
  turns are fitted to the four turns of the training digits; their penalty is chosen on a fifth of
  these digits, all turns of a digit on one side.
  """
  assert source.test is not None and source.classes is not None  # the digits have both
  train, test = turned(source.train), turned(source.test)
  h, h_test = (inputs.features(encode, split, inputs.split_inputs(size, split), batch=512)
               for split in (train, test))
  labels, labels_test, classes = labels_of(train), labels_of(test), len(source.classes)
  turns, turns_test = (np.arange(len(rows)) % TURNS for rows in (h, h_test))
  out = np.repeat(held_out_mask(labels[::TURNS]), TURNS)
  turn = _probe(h, turns, out, h_test, turns_test, TURNS)
  digit = _probe(h, labels, out, h_test, labels_test, classes)
  arrays = h[::TURNS], labels[::TURNS], h_test[::TURNS], labels_test[::TURNS], classes
  fractions = {'turn': turn.mean(), 'both': (turn & digit).mean(),
               'linear': linear.cached(*arrays).top1, 'knn': knn.evaluate(*arrays).top1,
               'few': fewshot.few_labels(*arrays, jax.random.key(0)).mean}
  return {name: 100 * float(fraction) for name, fraction in fractions.items()}


def retriever(recipe: Recipe, network: Frozen, name: str) -> Callable[[dict, Split], TurnRetrieval]:
  """Return the function (variables, split) -> TurnRetrieval of objective `name`.

  The objective is conditioned on `rotate`. Build the function once, since it keys the program.
  """
  tap = recipe.equivariances[name].tap

  def embed(variables: dict, images: Array) -> Array:
    pixels = images[:, None].astype(jnp.float32) / 255.
    h = recipe.network.apply(variables, pixels, False, tap, method='encode')
    z: Any = recipe.network.apply(variables, name, recipe.equivariances, h, False, method='embed')
    return z[:, 0]

  def retrieve(variables: dict, split: Split) -> TurnRetrieval:
    z = in_batches(Partial(embed, variables), turned(split).images, 512)
    labels, numbers = np.repeat(labels_of(split), TURNS), np.arange(len(z))
    identity = frozen.identity(recipe, name)
    nothing = jax.tree.map(lambda a: np.broadcast_to(a, (len(z), *np.shape(a))), identity)

    def nearest_views(turns: np.ndarray) -> np.ndarray:
      """Return the views [4N NEAREST] of other digits, the nearest first."""
      after = {**nothing, 'rotate': nothing['rotate']._replace(turns=turns.astype(np.int32))}
      pair = Pair(np.repeat(z[::TURNS], TURNS, axis=0), z, nothing, after)
      predicted = predictions(Partial(network.answer[name], variables), pair, 512)
      views, _ = nearest(predicted, z, NEAREST + TURNS)
      others = views // TURNS != (numbers // TURNS)[:, None]
      return np.stack([row[other][:NEAREST] for row, other in zip(views, others, strict=True)])
    views = nearest_views(numbers % TURNS)
    turn, digit = views[:, 0] % TURNS == numbers % TURNS, labels[views[:, 0]] == labels
    without = nearest_views(0 * numbers)[:, 0] % TURNS == numbers % TURNS
    right = [100 * float(a.mean()) for a in (turn, digit, turn & digit, without)]
    return TurnRetrieval(*right, nearest=views.reshape(-1, TURNS, NEAREST))
  return retrieve

"""How well a head predicts a target embedding, beside the controls that give the number a
meaning."""
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from equivariant_ssl.errors import UserError
from equivariant_ssl.evaluate.features import as_partial, in_batches
from equivariant_ssl.evaluate.statistics import Interval, interval, over_images, ratio_of_means
from equivariant_ssl.keys import key_for
from equivariant_ssl.losses import cosine
from equivariant_ssl.types import Action, Array, Key, Pair

# The least 1 - cosine in a ratio: float32 cosines tell it from 0 to a part in a thousand.
LEAST = 1e-4


class PerPair(NamedTuple):
  """The gains of each of N pairs, [N] each.

  drift = 1 - cos(target, source); error = 1 - cos(target, predicted); absolute = drift - error;
  relative = drift / error, where both are at least LEAST.
  """
  drift: np.ndarray
  error: np.ndarray
  absolute: np.ndarray
  relative: np.ndarray


class Gains(NamedTuple):
  """Mean gains with intervals over images.

  A predictor that returns its source has 0, 1 and 1; larger is better.
  """
  absolute: Interval
  relative: Interval
  ratio: Interval


class Measured(NamedTuple):
  """The gains of a predictor and of its controls.

  true: the gains with the true actions. shuffled: those with the actions of other images. zeroed:
  those with identity actions. identity: those of the predictor that returns the source.
  over_shuffled, over_zeroed: the paired differences of the absolute gain between `true` and that
  control.
  """
  true: Gains
  shuffled: Gains
  zeroed: Gains
  identity: Gains
  over_shuffled: Interval
  over_zeroed: Interval


def _distance(rows: tuple[Array, Array]) -> Array:
  return 1. - cosine(*rows)


def per_pair(source: np.ndarray, target: np.ndarray, predicted: np.ndarray, batch: int = 1024
             ) -> PerPair:
  """Return the gains of each of N pairs from source, target and predicted embeddings [N E].

  They are computed in chunks of `batch`.
  """
  # The same program twice, so that predicted = source gives a gain of exactly 0.
  drift = in_batches(_distance, (target, source), batch).astype(np.float64)
  error = in_batches(_distance, (target, predicted), batch).astype(np.float64)
  relative = np.maximum(drift, LEAST) / np.maximum(error, LEAST)
  return PerPair(drift, error, drift - error, relative)


def gains(pairs: PerPair, image: np.ndarray | None = None) -> Gains:
  """Return EquiMod's gains (Devillers & Lefort 2022, in the official code), with 95 % intervals
  over images:

    absolute  mean(cos(target, predicted) - cos(target, source))
    relative  mean(drift / error), a mean of ratios: it is unstable where predictions are nearly
              exact, hence clamped
    ratio     mean(drift) / mean(error), the stable form, clamped alike.

  image: int [N], the image of each pair (None: each pair has its own). The pairs of one image are
  averaged first.
  """
  def mean(values: np.ndarray) -> np.ndarray:
    return over_images(values, image)
  drift, error = (mean(np.maximum(a, LEAST)) for a in (pairs.drift, pairs.error))
  return Gains(interval(mean(pairs.absolute)), interval(mean(pairs.relative)),
               ratio_of_means(drift, error))


def shuffle(key: Key, image: np.ndarray) -> np.ndarray:
  """Return a random permutation [N] that gives every pair the place of a pair of another image.

  Pairs are put in a random order, image after image, and shifted by the largest number of pairs
  that an image has. So a view also gets the action of another view number: where all images have
  the same actions in turn (`Group.all_of`), exchanging entire images would change nothing. Raises
  UserError where one image has more than half of the pairs.
  """
  _, image, count = np.unique(np.asarray(image), return_inverse=True, return_counts=True)
  N, most = len(image), int(count.max())
  if N < 2 * most:
    raise UserError(f'Actions cannot be shuffled across images: one image has {most} of {N} pairs.',
                    'Measure on more images.')
  by_image = np.asarray(jax.random.permutation(key_for(key, 'images'), len(count)))[image]
  noise = np.asarray(jax.random.uniform(key_for(key, 'pairs'), (N,)))
  order = np.lexsort((noise, by_image))
  permutation = np.empty(N, np.int64)
  permutation[order] = np.roll(order, -most)
  return permutation


def _answer(predict: Callable[[Pair], Array], pair: Pair) -> Array:
  return predict(pair).astype(jnp.float32)


def predictions(predict: Callable[[Pair], Array], pair: Pair, batch: int) -> np.ndarray:
  """Return what a head `predict` answers for N pairs, `batch` at a time: estimates [N E] of their
  targets."""
  estimates = in_batches(Partial(_answer, as_partial(predict)), pair, batch)
  if estimates.shape != pair.target.shape:
    raise ValueError(f'an estimate of the target is {pair.target.shape}, got {estimates.shape}')
  return estimates


def controls(pair: Pair, identity: Action, key: Key, image: np.ndarray) -> tuple[Pair, Pair]:
  """Return the same N embeddings with two other sets of actions: those of other images, shuffled by
  `key`; and `identity`, the action that does nothing, of one image or [N ...].

  Both `before` and `after` are changed. image: int [N], the image of each pair.
  """
  permutation = shuffle(key, image)

  def permuted(action: Action) -> Action:
    return jax.tree.map(lambda a: a[permutation], action)

  def broadcast(a: Array, like: np.ndarray) -> np.ndarray:
    return np.broadcast_to(np.asarray(a, like.dtype), like.shape)
  nothing = jax.tree.map(broadcast, identity, pair.after)
  return (pair._replace(before=permuted(pair.before), after=permuted(pair.after)),
          pair._replace(before=nothing, after=nothing))


def measure(predict: Callable[[Pair], Array], pair: Pair, identity: Action, key: Key,
            image: np.ndarray | None = None, batch: int = 256) -> Measured:
  """Return the gains of `predict` and of its controls on N pairs.

  predict: a head in eval mode, Pair -> an estimate [N E] of `pair.target`; best a Partial (see
  `features.in_batches`). identity: the action that does nothing, of one image or [N ...]. image:
  int [N], see `gains`. The controls leave source and target as they are and change both `before`
  and `after`. A head that ignores its actions has over_shuffled and over_zeroed at 0.
  """
  N = pair.target.shape[0]
  pair = jax.tree.map(np.asarray, pair)
  images = np.arange(N) if image is None else image
  source, target = np.asarray(pair.source), np.asarray(pair.target)
  pairs = pair, *controls(pair, identity, key, images)
  true, shuffled, zeroed = (per_pair(source, target, predictions(predict, p, batch)) for p in pairs)

  def over(control: PerPair) -> Interval:
    return interval(over_images(true.absolute - control.absolute, image))
  return Measured(gains(true, image), gains(shuffled, image), gains(zeroed, image),
                  gains(per_pair(source, target, source), image), over(shuffled), over(zeroed))

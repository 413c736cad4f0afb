"""How well a head predicts where an embedding goes, beside the controls that make the number mean something."""
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

LEAST = 1e-4  # of 1 - cosine in a ratio: what float32 cosines tell from 0 to a part in a thousand


class PerPair(NamedTuple):
  """[N] each: drift = 1 - cos(target, source), error = 1 - cos(target, predicted), absolute = drift - error,
  relative = drift / error, both of at least LEAST."""
  drift: np.ndarray
  error: np.ndarray
  absolute: np.ndarray
  relative: np.ndarray


class Gains(NamedTuple):
  """Means with intervals over images. An identity predictor has 0, 1 and 1; larger is better."""
  absolute: Interval
  relative: Interval
  ratio: Interval


class Measured(NamedTuple):
  """The gains with the true actions; with those of other images; with identity actions ("zeroed"); and of the
  predictor that answers the source. over_shuffled, over_zeroed: the paired differences of the absolute gain."""
  true: Gains
  shuffled: Gains
  zeroed: Gains
  identity: Gains
  over_shuffled: Interval
  over_zeroed: Interval


def _distance(rows: tuple[Array, Array]) -> Array:
  return 1. - cosine(*rows)


def per_pair(source: Array, target: Array, predicted: Array, batch: int = 1024) -> PerPair:
  """The gains of each of N pairs from three [N E], by chunks of `batch`."""
  # The same program twice, so that predicted = source gives a gain of exactly 0.
  drift = in_batches(_distance, (target, source), batch).astype(np.float64)
  error = in_batches(_distance, (target, predicted), batch).astype(np.float64)
  return PerPair(drift, error, drift - error, np.maximum(drift, LEAST) / np.maximum(error, LEAST))


def gains(pairs: PerPair, image: np.ndarray | None = None) -> Gains:
  """EquiMod's gains (Devillers & Lefort 2022, in the official code), with 95 % intervals over images:

    absolute  mean(cos(target, predicted) - cos(target, source))
    relative  mean(drift / error), a mean of ratios: unstable where predictions are nearly exact, hence clamped
    ratio     mean(drift) / mean(error), the stable form, clamped alike.

  image: int [N], the image of each pair (None: each its own); pairs of one image are averaged first.
  """
  mean = lambda values: over_images(values, image)
  return Gains(interval(mean(pairs.absolute)), interval(mean(pairs.relative)),
               ratio_of_means(*(mean(np.maximum(a, LEAST)) for a in (pairs.drift, pairs.error))))


def shuffle(key: Key, image: np.ndarray) -> np.ndarray:
  """A random permutation [N] that gives every pair the place of a pair of another image.

  Pairs are put in a random order, image after image, and moved on by the pairs that an image has. So a view
  also gets the action of another view number: where all images have the same actions in turn (`Group.all_of`),
  moving whole images would change nothing. Raises UserError where one image has more than half of the pairs.
  """
  _, image, count = np.unique(np.asarray(image), return_inverse=True, return_counts=True)
  N, most = len(image), int(count.max())
  if N < 2 * most:
    raise UserError(f'Actions cannot be shuffled across images: one image has {most} of {N} pairs.',
                    'Measure on more images.')
  by_image = np.asarray(jax.random.permutation(key_for(key, 'images'), len(count)))[image]
  order = np.lexsort((np.asarray(jax.random.uniform(key_for(key, 'pairs'), (N,))), by_image))
  found = np.empty(N, np.int64)
  found[order] = np.roll(order, -most)
  return found


def _answer(predict: Callable[[Pair], Array], pair: Pair) -> Array:
  return predict(pair).astype(jnp.float32)


def answers(predict: Callable[[Pair], Array], pair: Pair, batch: int) -> np.ndarray:
  """What a head `predict` says of N pairs, `batch` at a time: an estimate [N E] of their target."""
  found = in_batches(Partial(_answer, as_partial(predict)), pair, batch)
  if found.shape != pair.target.shape:
    raise ValueError(f'an estimate of the target is {pair.target.shape}, got {found.shape}')
  return found


def controls(pair: Pair, identity: Action, key: Key, image: np.ndarray) -> tuple[Pair, Pair]:
  """The same N embeddings with the actions of other images, shuffled by `key`, and with `identity` (of one image or
  [N ...]); both `before` and `after` are changed. image: int [N], the image of each pair."""
  moved = shuffle(key, image)
  take = lambda action: jax.tree.map(lambda a: a[moved], action)
  still = jax.tree.map(lambda a, like: np.broadcast_to(np.asarray(a, like.dtype), like.shape), identity, pair.after)
  return pair._replace(before=take(pair.before), after=take(pair.after)), pair._replace(before=still, after=still)


def measure(predict: Callable[[Pair], Array], pair: Pair, identity: Action, key: Key,
            image: np.ndarray | None = None, batch: int = 256) -> Measured:
  """The gains of `predict` and of its controls on N pairs.

  predict: a head in eval mode, Pair -> an estimate [N E] of `pair.target`; best a Partial (features.in_batches).
  identity: the action that does nothing, of one image or [N ...]. image: int [N], see `gains`. The controls
  leave source and target as they are and change both `before` and `after`. A head that ignores its actions has
  over_shuffled and over_zeroed at 0.
  """
  N = pair.target.shape[0]
  pair = jax.tree.map(np.asarray, pair)
  asked = (pair, *controls(pair, identity, key, np.arange(N) if image is None else image))
  true, shuffled, zeroed = (per_pair(pair.source, pair.target, answers(predict, a, batch)) for a in asked)
  over = lambda other: interval(over_images(true.absolute - other.absolute, image))
  return Measured(gains(true, image), gains(shuffled, image), gains(zeroed, image),
                  gains(per_pair(pair.source, pair.target, pair.source), image), over(shuffled), over(zeroed))

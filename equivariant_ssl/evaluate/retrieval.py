"""Within-image retrieval (Garrido et al. 2023, SIE): which of an image's own views is nearest to
the predicted embedding?"""
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from equivariant_ssl.evaluate.features import check_finite, in_batches
from equivariant_ssl.evaluate.gains import controls, predictions
from equivariant_ssl.evaluate.statistics import Interval, interval, paired
from equivariant_ssl.losses import unit
from equivariant_ssl.types import Action, Array, Key, Pair

IMAGES = 32  # images at once: 50 views of 2048 numbers, twice, are 25 MiB


class Retrieval(NamedTuple):
  """Mean reciprocal rank, and the fractions of targets at rank 1 and among the first 5, with
  intervals over images."""
  mrr: Interval
  h1: Interval
  h5: Interval


class Retrieved(NamedTuple):
  """The retrieval of a predictor and of its controls.

  true: the retrieval with the true actions. shuffled: that with the actions of other images and
  views. zeroed: that with identity actions. identity: that of the predictor that returns the
  source. chance: (mrr, h1, h5).
  over_shuffled: the paired difference of the mrr over images. picked: {'true' or a control: the
  bank's entry int [N M] at rank 1 for each target}.
  """
  true: Retrieval
  shuffled: Retrieval
  zeroed: Retrieval
  identity: Retrieval
  chance: tuple[float, float, float]
  over_shuffled: Interval
  picked: dict[str, np.ndarray]


def _cosines(predicted: Array, bank: Array) -> Array:
  """Return the cosines [n v m] of predictions [n v E] and bank entries [n m E] of one image."""
  return jnp.einsum('nve,nme->nvm', unit(predicted), unit(bank), precision='highest')


def _ranks(rows: tuple[Array, Array, Array]) -> Array:
  predicted, bank, target = rows
  s = _cosines(predicted, bank)
  target_s = jnp.take_along_axis(s, target[:, :, None], axis=2)
  earlier = jnp.arange(bank.shape[1])[None, None, :] < target[:, :, None]
  before = (s > target_s) | ((s == target_s) & earlier)
  return 1 + jnp.sum(before, axis=2, dtype=jnp.int32)


def _top(rows: tuple[Array, Array]) -> Array:
  return _cosines(*rows).argmax(2).astype(jnp.int32)


def _check(predicted: np.ndarray, bank: np.ndarray) -> None:
  N, M, E = bank.shape
  if predicted.ndim != 3 or (predicted.shape[0], predicted.shape[2]) != (N, E):
    raise ValueError(f'expected predictions [N V E] for a bank {bank.shape}, got {predicted.shape}')
  for values in (predicted, bank):  # a comparison with nan is False, which would be rank 1
    check_finite(values.reshape(N, -1))


def ranks(predicted: Any, bank: Any, target: Any) -> np.ndarray:
  """Return the rank int [N V], from 1, of the entry `target` of the same image's bank.

  Entries rank by their cosine with the prediction; of equally near entries the lower index comes
  first. predicted: [N V E]. bank: [N M E]. target: int [V] or [N V].

  So the ranks of one prediction's M entries are 1 to M, each once, and a collapsed bank scores
  chance. Raises UserError where an embedding is not finite.
  """
  predicted, bank, target = np.asarray(predicted), np.asarray(bank), np.asarray(target, np.int32)
  _check(predicted, bank)
  target = np.broadcast_to(target, predicted.shape[:2])
  if target.min() < 0 or target.max() >= bank.shape[1]:
    raise ValueError(f'targets are 0 to {bank.shape[1] - 1}, got {target.min()} to {target.max()}')
  return in_batches(_ranks, (predicted, bank, target), min(IMAGES, len(bank)))


def top(predicted: Any, bank: Any) -> np.ndarray:
  """Return the entry int [N V] of the same image's bank [N M E] that is nearest to predicted
  [N V E]; see `ranks`."""
  predicted, bank = np.asarray(predicted), np.asarray(bank)
  _check(predicted, bank)
  return in_batches(_top, (predicted, bank), min(IMAGES, len(bank)))


def retrieval(ranks: np.ndarray) -> Retrieval:
  """Return the Retrieval of ranks int [N V], from 1; the V targets of one image are averaged
  first."""
  def over_targets(values: np.ndarray) -> Interval:
    return interval(values.mean(1, dtype=np.float64))
  return Retrieval(over_targets(1. / ranks), over_targets(ranks == 1), over_targets(ranks <= 5))


def chance(M: int) -> tuple[float, float, float]:
  """Return (mrr, h1, h5) of a rank that is drawn uniformly from 1 to M.

  They are H_M / M with H_M = 1 + 1/2 + ... + 1/M, 1 / M, and 5 / M (1 where M < 5).
  """
  return float(np.sum(1. / np.arange(1, M + 1)) / M), 1. / M, min(5., M) / M


def _all_pairs(source: np.ndarray, bank: np.ndarray, actions: Action) -> Pair:
  """Return the N x M pairs in which each view of a bank is the target once; see `measure`."""
  N, M, _ = bank.shape

  def flat(a: np.ndarray) -> np.ndarray:
    return a.reshape(N * M, *a.shape[2:])

  def for_each_view(a: np.ndarray) -> np.ndarray:
    return flat(np.repeat(a[:, None], M, axis=1))
  after = jax.tree.map(flat, actions)
  before = jax.tree.map(lambda a: for_each_view(a[:, 0]), actions)
  views: Any = flat(bank)
  sources: Any = for_each_view(source)
  return Pair(sources, views, before, after)


def measure(predict: Callable[[Pair], Array], source: Any, bank: Any, actions: Action,
            identity: Action, key: Key, batch: int = 256) -> Retrieved:
  """Return the retrieval of `predict` and of its controls on M views of each of N images, each view
  a target once (as in SIE's code).

  predict: a head in eval mode, Pair -> an estimate [batch E] of `pair.target`; best a Partial (see
  `features.in_batches`). source: [N E]. bank: [N M E], of views made by `actions` [N M ...]; its
  first view is the source itself, and a target too. identity: the action that does nothing, of one
  image. The controls leave the embeddings as they are and change both `before` and `after`;
  shuffled actions are those of any view of another image. A head that ignores its actions scores
  chance, with over_shuffled at 0. Where views look alike (a flip gives only two views) no predictor
  comes near 1. Raises UserError for fewer than 2 images, or embeddings that are not finite.
  """
  source, bank, actions = np.asarray(source), np.asarray(bank), jax.tree.map(np.asarray, actions)
  N, M, E = bank.shape
  pair = _all_pairs(source, bank, actions)
  pairs = pair, *controls(pair, identity, key, np.repeat(np.arange(N), M))
  estimates = {name: predictions(predict, p, batch)
               for name, p in zip(('true', 'shuffled', 'zeroed'), pairs, strict=True)}
  estimates = {**estimates, 'identity': np.asarray(pair.source)}
  estimates = {k: estimate.reshape(N, M, E) for k, estimate in estimates.items()}
  rank = {k: ranks(estimate, bank, np.arange(M)) for k, estimate in estimates.items()}
  mrr = {k: (1. / rank[k]).mean(1) for k in ('true', 'shuffled')}
  true, shuffled, zeroed, source_alone = map(retrieval, rank.values())
  return Retrieved(true, shuffled, zeroed, source_alone, chance(M),
                   paired(mrr['true'], mrr['shuffled']),
                   {k: top(estimate, bank) for k, estimate in estimates.items()})


def _checked(a: Any, b: Any) -> tuple[np.ndarray, np.ndarray]:
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  if a.ndim != 2 or a.shape != b.shape or not len(a):
    raise ValueError(f'expected actions [N A] and as many of the top-ranked entries, got {a.shape} '
                     f'and {b.shape}')
  return a, b


def sie_error(q: np.ndarray, q_top: np.ndarray) -> float:
  """Return SIE's prediction error: the mean of 1 - (q . q_top)^2, from 0 to 1.

  q, q_top: unit quaternions [N A] of the target and of the top-ranked entry (for a rotation of the
  plane: cos and sin of half its angle). q and -q are one rotation.
  """
  q, q_top = _checked(q, q_top)
  for values in (q, q_top):
    if np.abs(np.linalg.norm(values, axis=1) - 1.).max() > 1e-3:
      raise ValueError('rotations are unit quaternions')
  return float(np.mean(1. - np.sum(q * q_top, axis=1) ** 2))


def stl_error(a: np.ndarray, a_top: np.ndarray) -> float:
  """Return STL's prediction error, which is another quantity (Yu et al. 2024).

  It is the mean over N and A of the squared difference of the encoded actions [N A] of the target
  and of the top-ranked entry, in the units of the encoding.
  """
  a, a_top = _checked(a, a_top)
  return float(np.mean((a - a_top) ** 2))


def errors(error: Callable[[np.ndarray, np.ndarray], float], encoded: np.ndarray,
           picked: dict[str, np.ndarray]) -> dict[str, float]:
  """Return {name: `error`} between the targets' encoded actions and those of the entries that were
  picked for them.

  error: `sie_error` or `stl_error`. encoded: [N M A]; every entry is a target once. picked: {name:
  int [N M]}. Under 'chance' is the exact error of an entry that is drawn uniformly.
  """
  N, M, A = encoded.shape

  def flat(a: np.ndarray) -> np.ndarray:
    return a.reshape(-1, A)
  by_name = {name: error(flat(encoded), flat(np.take_along_axis(encoded, rows[..., None], axis=1)))
             for name, rows in picked.items()}
  every = np.broadcast_to(encoded[:, None], (N, M, M, A))
  return by_name | {'chance': error(flat(every.swapaxes(1, 2)), flat(every))}


def quaternion(degrees: np.ndarray) -> np.ndarray:
  """Return (cos, sin) of half an angle [... 2]: the non-zero part of the quaternion of a rotation
  of the plane."""
  half = np.deg2rad(np.asarray(degrees, np.float64)) / 2
  return np.stack([np.cos(half), np.sin(half)], axis=-1)

"""Within-image retrieval (Garrido et al. 2023, SIE): which of an image's own views did the predictor mean?"""
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from equivariant_ssl.evaluate.features import check_finite, in_batches
from equivariant_ssl.evaluate.gains import answers, controls
from equivariant_ssl.evaluate.statistics import Interval, interval, paired
from equivariant_ssl.losses import unit
from equivariant_ssl.types import Action, Array, Key, Pair

IMAGES = 32  # at once: 50 views of 2048 numbers, twice, are 25 MiB


class Retrieval(NamedTuple):
  """Mean reciprocal rank, and the fractions of targets at rank 1 and among the first 5, with intervals over images."""
  mrr: Interval
  h1: Interval
  h5: Interval


class Retrieved(NamedTuple):
  """Retrieval with the true actions; with those of other images and views; with identity actions ("zeroed"); of the
  predictor that answers the source. chance: (mrr, h1, h5). over_shuffled: the mrr's paired difference over images. picked:
  {one of the four: the entry int [N M] at rank 1 of each}."""
  true: Retrieval
  shuffled: Retrieval
  zeroed: Retrieval
  identity: Retrieval
  chance: tuple[float, float, float]
  over_shuffled: Interval
  picked: dict[str, np.ndarray]


def _cosines(predicted: Array, bank: Array) -> Array:
  return jnp.einsum('nve,nme->nvm', unit(predicted), unit(bank), precision='highest')


def _ranks(rows: tuple[Array, Array, Array]) -> Array:
  predicted, bank, target = rows
  s = _cosines(predicted, bank)
  own = jnp.take_along_axis(s, target[:, :, None], axis=2)
  earlier = jnp.arange(bank.shape[1])[None, None, :] < target[:, :, None]
  return 1 + jnp.sum((s > own) | ((s == own) & earlier), axis=2, dtype=jnp.int32)


def _top(rows: tuple[Array, Array]) -> Array:
  return _cosines(*rows).argmax(2).astype(jnp.int32)


def _check(predicted: np.ndarray, bank: np.ndarray) -> None:
  N, M, E = bank.shape
  if predicted.ndim != 3 or (predicted.shape[0], predicted.shape[2]) != (N, E):
    raise ValueError(f'expected predictions [N V E] for a bank {bank.shape}, got {predicted.shape}')
  for values in (predicted, bank):  # a comparison with nan is False, which would be rank 1
    check_finite(values.reshape(N, -1))


def ranks(predicted: np.ndarray, bank: np.ndarray, target: np.ndarray) -> np.ndarray:
  """The rank int [N V], from 1, by cosine with predicted [N V E], of the entry `target` (int [V] or [N V]) of the same
  image's bank [N M E]; of equally near entries the lower index comes first.

  So the ranks of one prediction's M entries are 1 to M, each once, and a collapsed bank scores chance. Raises UserError
  where an embedding is not finite.
  """
  predicted, bank, target = np.asarray(predicted), np.asarray(bank), np.asarray(target, np.int32)
  _check(predicted, bank)
  target = np.broadcast_to(target, predicted.shape[:2])
  if target.min() < 0 or target.max() >= bank.shape[1]:
    raise ValueError(f'targets are 0 to {bank.shape[1] - 1}, got {target.min()} to {target.max()}')
  return in_batches(_ranks, (predicted, bank, target), min(IMAGES, len(bank)))


def top(predicted: np.ndarray, bank: np.ndarray) -> np.ndarray:
  """The entry int [N V] of the same image's bank [N M E] that is nearest to predicted [N V E]; see `ranks`."""
  predicted, bank = np.asarray(predicted), np.asarray(bank)
  _check(predicted, bank)
  return in_batches(_top, (predicted, bank), min(IMAGES, len(bank)))


def retrieval(found: np.ndarray) -> Retrieval:
  """The Retrieval of ranks int [N V], from 1; the V targets of one image are averaged first."""
  of = lambda values: interval(values.mean(1, dtype=np.float64))
  return Retrieval(of(1. / found), of(found == 1), of(found <= 5))


def chance(M: int) -> tuple[float, float, float]:
  """(mrr, h1, h5) of a rank drawn evenly from 1 to M: H_M / M with H_M = 1 + 1/2 + ... + 1/M, 1 / M, and 5 / M (1 where
  M < 5)."""
  return float(np.sum(1. / np.arange(1, M + 1)) / M), 1. / M, min(5., M) / M


def measure(predict: Callable[[Pair], Array], source: np.ndarray, bank: np.ndarray, actions: Action, identity: Action,
            key: Key, batch: int = 256) -> Retrieved:
  """Retrieval of `predict` and of its controls on M views of each of N images, each view a target once (SIE's code).

  predict: a head in eval mode, Pair -> an estimate [batch E] of `pair.target`; best a Partial (features.in_batches).
  source: [N E]. bank: [N M E], of views made by `actions` [N M ...]; the first is the source itself, and a target too.
  identity: the action that does nothing, of one image. The controls leave the embeddings as they are and change both
  `before` and `after`; shuffled actions are of any view of another image. A head that ignores its actions scores
  chance, with over_shuffled at 0. Where views look alike (a flip has two looks) no predictor comes near 1.
  Raises UserError for fewer than 2 images, or embeddings that are not finite.
  """
  source, bank, actions = np.asarray(source), np.asarray(bank), jax.tree.map(np.asarray, actions)
  N, M, E = bank.shape
  flat = lambda a: a.reshape(N * M, *a.shape[2:])
  each = lambda a: flat(np.repeat(a[:, None], M, axis=1))
  after, before = jax.tree.map(flat, actions), jax.tree.map(lambda a: each(a[:, 0]), actions)
  pair = Pair(each(source), flat(bank), before, after)
  asked = (pair, *controls(pair, identity, key, np.repeat(np.arange(N), M)))
  guesses = dict(zip(('true', 'shuffled', 'zeroed'), (answers(predict, a, batch) for a in asked), strict=True))
  guesses = {k: guess.reshape(N, M, E) for k, guess in (guesses | {'identity': pair.source}).items()}
  found = {k: ranks(guess, bank, np.arange(M)) for k, guess in guesses.items()}
  mean = lambda found: (1. / found).mean(1)
  return Retrieved(*map(retrieval, found.values()), chance(M), paired(mean(found['true']), mean(found['shuffled'])),
                   {k: top(guess, bank) for k, guess in guesses.items()})


def _squares(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  if a.ndim != 2 or a.shape != b.shape or not len(a):
    raise ValueError(f'expected actions [N A] and as many found ones, got {a.shape} and {b.shape}')
  return a, b


def sie_error(q: np.ndarray, q_found: np.ndarray) -> float:
  """SIE's prediction error: the mean of 1 - (q . q_found)^2, 0 to 1, of unit quaternions [N A] (of a plane's turn: cos
  and sin of half its angle) of the asked and the top-ranked entry; q and -q are one rotation."""
  q, q_found = _squares(q, q_found)
  for values in (q, q_found):
    if np.abs(np.linalg.norm(values, axis=1) - 1.).max() > 1e-3:
      raise ValueError('rotations are unit quaternions')
  return float(np.mean(1. - np.sum(q * q_found, axis=1) ** 2))


def stl_error(a: np.ndarray, a_found: np.ndarray) -> float:
  """STL's prediction error, another quantity (Yu et al. 2024): the mean over N and A of the squared difference of the
  encoded actions [N A] of the asked and the top-ranked entry, in the units of the encoding."""
  a, a_found = _squares(a, a_found)
  return float(np.mean((a - a_found) ** 2))


def errors(error: Callable[[np.ndarray, np.ndarray], float], told: np.ndarray, picked: dict[str, np.ndarray]
           ) -> dict[str, float]:
  """`error` (`sie_error`, `stl_error`) of what was asked for, every entry of told [N M A] once, and what was `picked`
  ({name: int [N M]}); and under 'chance' that of an entry drawn evenly, exactly."""
  N, M, A = told.shape
  flat = lambda a: a.reshape(-1, A)
  of = {k: error(flat(told), flat(np.take_along_axis(told, rows[..., None], axis=1))) for k, rows in picked.items()}
  drawn = np.broadcast_to(told[:, None], (N, M, M, A))
  return of | {'chance': error(flat(drawn.swapaxes(1, 2)), flat(drawn))}


def quaternion(degrees: np.ndarray) -> np.ndarray:
  """[... 2]: the (cos, sin) of half an angle, what is not zero in the quaternion of a plane's turn."""
  half = np.deg2rad(np.asarray(degrees, np.float64)) / 2
  return np.stack([np.cos(half), np.sin(half)], axis=-1)

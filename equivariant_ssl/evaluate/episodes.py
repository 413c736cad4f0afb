"""Few-shot episodes: a small classifier is fitted to a few images of a few new classes, many times
over, on the device."""
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from equivariant_ssl.errors import UserError
from equivariant_ssl.evaluate.features import check_labeled, in_batches
from equivariant_ssl.evaluate.statistics import quantity
from equivariant_ssl.keys import key_for
from equivariant_ssl.losses import unit
from equivariant_ssl.types import Array, Key

CHUNK = 100      # episodes at once: 5-way 5-shot with 16 queries on 512-d is 22 MiB of features
ITERATIONS = 20  # the number of iterations of Newton's method
STEPS = 6        # steps tried along a Newton direction: 1, 1/2, 1/4 ...
# The largest length of a row of features: float32 Gram matrices of longer rows lose digits that 20
# iterations need.
LONGEST = 1000.


class Episodes(NamedTuple):
  """The mean accuracy over episodes, a fraction, and its 95 % interval.

  The interval is as published: +- 1.96 std / sqrt(count), where the std divides by n, not by n - 1.
  It is over draws of images, not over training runs. accuracies: the accuracy of each episode
  [count].
  """
  protocol: str
  mean: float
  low: float
  high: float
  accuracies: np.ndarray


class Pool(NamedTuple):
  """The images that episodes draw from, on the device.

  features: [N D] in the order of their classes. first, size: the first row of each class, and its
  number of images [K].
  """
  features: Array
  first: Array
  size: Array


def draw(pool: Pool, key: Key, ways: int, shots: int, queries: int, most: int
         ) -> tuple[Array, Array]:
  """Return the rows of one episode: its support [ways, shots] and its queries [ways, queries].

  most: the number of images of the largest class. Rows are distinct, but where a class has fewer
  than shots + queries images: then its queries are drawn with replacement from the images that its
  support leaves.
  """
  _, chosen = jax.lax.top_k(jax.random.uniform(key_for(key, 'classes'), pool.size.shape), ways)
  size = pool.size[chosen][:, None]
  width = max(most, shots + queries)
  noise = jax.random.uniform(key_for(key, 'images'), (ways, width + queries))
  real = jnp.arange(width)[None, :] < size
  _, places = jax.lax.top_k(jnp.where(real, noise[:, :width], -1.), shots + queries)
  spare = size - shots
  again = jnp.minimum((noise[:, width:] * spare.astype(jnp.float32)).astype(jnp.int32), spare - 1)
  rank = shots + jnp.where(spare < queries, again, jnp.arange(queries)[None, :])
  rows = pool.first[chosen][:, None] + places
  return rows[:, :shots], jnp.take_along_axis(rows, rank, axis=1)


def _products(a: Array, b: Array) -> Array:
  """Return the products [n m] of rows [n D] and [m D], each with a constant 1 beside it.

  The 1 is the bias, which is penalized as a weight is.
  """
  return jnp.einsum('nd,md->nm', a, b, precision='highest') + 1.


def logistic(support: Array, queries: Array, labels: np.ndarray, ways: int) -> Array:
  """Return one-vs-rest logistic scores [q ways] of queries [q D].

  They minimize, for each class, |w|^2 / 2 + the sum of log losses, with the bias in w (as liblinear
  does with C = 1). support: [n D], of classes `labels` [n].

  w is a combination of the n support rows, so Newton's method runs on its n coefficients.
  """
  gram = _products(support, support)
  sign = jnp.where(labels[None, :] == jnp.arange(ways)[:, None], 1., -1.)
  times = functools.partial(jnp.matmul, precision='highest')

  def slope(f: Array) -> Array:
    return sign * jax.nn.sigmoid(-sign * f)

  def improve(alpha: Array, _) -> tuple[Array, None]:
    f = times(alpha, gram)
    g = slope(f)
    weight = jnp.abs(g) * (1. - jnp.abs(g))
    root = jnp.sqrt(weight)
    identity = jnp.eye(len(labels))[None, :, :]
    system = identity + root[:, :, None] * gram[None, :, :] * root[:, None, :]
    b = weight * f + g
    factor = jnp.linalg.cholesky(system), True
    solved = jax.scipy.linalg.cho_solve(factor, (root * times(b, gram))[:, :, None])
    direction = b - root * solved[:, :, 0] - alpha
    change = times(direction, gram)

    # The step is the one where the slope along the direction is nearest 0: there the objective is
    # not above its start.
    def slope_along(t: Array) -> Array:
      return (change * (alpha + t * direction - slope(f + t * change))).sum(-1)
    steps = .5 ** jnp.arange(STEPS, dtype=jnp.float32)
    step = steps[jnp.abs(jax.vmap(slope_along)(steps)).argmin(0)]
    return alpha + step[:, None] * direction, None

  alpha, _ = jax.lax.scan(improve, jnp.zeros_like(sign), length=ITERATIONS)
  return times(_products(queries, support), alpha.T)


def ridge(support: Array, queries: Array, labels: np.ndarray, ways: int) -> Array:
  """Return the scores [q ways] of ridge regression to +1 (the class) and -1 (the others).

  They minimize |w|^2 + the sum of squares, with the bias in w.
  """
  target = jnp.where(labels[:, None] == jnp.arange(ways)[None, :], 1., -1.)
  system = _products(support, support) + jnp.eye(len(labels))
  alpha = jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(system), True), target)
  return jnp.matmul(_products(queries, support), alpha, precision='highest')


def centroid(support: Array, queries: Array, labels: np.ndarray, ways: int) -> Array:
  """Return the scores [q ways]: the cosine to the mean of each class's support features."""
  direction = jax.ops.segment_sum(support, labels, ways)  # the mean, but for its length
  return jnp.einsum('qd,wd->qw', unit(queries), unit(direction), precision='highest')


CLASSIFIERS = {'logistic': logistic, 'ridge': ridge, 'centroid': centroid}


@functools.lru_cache
def _player(ways: int, shots: int, queries: int, most: int, classifier: str):
  """Return (pool, key, episode numbers [n]) -> the accuracy of each episode [n]."""
  support_labels, query_labels = (np.repeat(np.arange(ways, dtype=np.int32), n)
                                  for n in (shots, queries))

  def play(pool: Pool, key: Key, number: Array) -> Array:
    rows = draw(pool, key_for(key, 'episode', number), ways, shots, queries, most)
    support, query = (pool.features[r.ravel()] for r in rows)
    scores = CLASSIFIERS[classifier](support, query, support_labels, ways)
    return jnp.mean((scores.argmax(1) == query_labels).astype(jnp.float32))

  return lambda pool, key, numbers: jax.vmap(functools.partial(play, pool, key))(numbers)


def _pool(features: np.ndarray, labels: np.ndarray, classes: int, ways: int, shots: int
          ) -> tuple[Pool, int]:
  """Return the pool, and the number of classes that are left out: those of `shots` images or
  fewer."""
  size = np.bincount(labels, minlength=classes)
  large = size > shots
  if large.sum() < ways:
    raise UserError(f'{large.sum()} of {classes} classes have more than {shots} images, '
                    f'too few for {ways} ways.',
                    f'Two classes or more need more than {shots} labeled test images.')
  order = np.argsort(labels, kind='stable')
  order = order[large[labels[order]]]
  size = size[large].astype(np.int32)
  first = jnp.asarray(size.cumsum(dtype=np.int32) - size)
  pool = Pool(jnp.asarray(features[order], jnp.float32), first, jnp.asarray(size))
  return pool, int((~large).sum())


def _check(features: np.ndarray, labels: np.ndarray, classes: int, counts: tuple[int, ...],
           classifier: str) -> None:
  """Raise UserError where episodes cannot be played; counts: (ways, shots, queries, count)."""
  ways, shots, queries, count = counts
  if classifier not in CLASSIFIERS:
    raise UserError(f'there is no classifier {classifier!r}.', f'One of: {", ".join(CLASSIFIERS)}.')
  if ways < 2 or min(shots, queries, count) < 1:
    raise UserError(f'{count} episodes of {ways} ways, {shots} shots and {queries} queries '
                    'cannot be played.', 'Give two ways or more, and one or more of the others.')
  check_labeled(features, labels, classes, 'test')
  squares = np.einsum('nd,nd->n', features, features, dtype=np.float64)
  longest = float(np.sqrt(np.max(squares)))
  if classifier == 'logistic' and longest > LONGEST:
    raise UserError(f'Features of length {longest:.0f} are too long for the logistic classifier '
                    f'({LONGEST:.0f}).',
                    'Use --protocol knn, cached or few_labels, which do not depend on the length.')


def episodes(features: np.ndarray, labels: np.ndarray, classes: int, key: Key, ways: int = 5,
             shots: int = 1, queries: int = 16, count: int = 2000, classifier: str = 'logistic'
             ) -> Episodes:
  """Return the accuracy of `count` episodes on features [N D] and labels [N] of classes that the
  network was not trained on.

  Each episode draws `ways` classes, fits `classifier` ('logistic': one-vs-rest, C = 1; 'ridge';
  'centroid': cosine) to `shots` images a class, and tests it on `queries` other images a class (Lee
  et al. 2021, official code, with logistic). Draws depend on (key, number of the episode, labels)
  alone, so that two networks are compared on the same episodes. Classes of `shots` images or fewer
  are left out, and the protocol's name says how many. Raises UserError where too few classes are
  left.
  """
  _check(features, labels, classes, (ways, shots, queries, count), classifier)
  pool, left_out = _pool(features, labels, classes, ways, shots)
  player = _player(ways, shots, queries, int(pool.size.max()), classifier)
  numbers = np.arange(count, dtype=np.int32)
  accuracies = in_batches(Partial(player, pool, key), numbers, min(CHUNK, count)).astype(np.float64)
  mean, half = float(accuracies.mean()), float(1.96 * accuracies.std() / np.sqrt(count))
  protocol = f'{ways}-way {shots}-shot {classifier}, {count} episodes'
  if left_out:
    protocol += f', {quantity(left_out, "small class", plural="small classes")} left out'
  return Episodes(protocol, mean, mean - half, mean + half, accuracies)

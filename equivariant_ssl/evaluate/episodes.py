"""Few-shot episodes: a small classifier fitted to a few images of a few new classes, again and again, on the device."""
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from equivariant_ssl.errors import UserError
from equivariant_ssl.evaluate.features import check_labelled, in_batches
from equivariant_ssl.evaluate.statistics import counted
from equivariant_ssl.keys import key_for
from equivariant_ssl.losses import unit
from equivariant_ssl.types import Array, Key

CHUNK = 100       # episodes at once: 5-way 5-shot with 16 queries on 512-d is 22 MiB of features
ITERATIONS = 20   # of Newton's method
STEPS = 6         # tried along a Newton direction: 1, 1/2, 1/4 ...
LONGEST = 1000.   # length of a row of features: float32 Gram matrices of longer ones lose what 20 iterations need


class Episodes(NamedTuple):
  """The mean accuracy over episodes, a fraction, and its 95 % interval as published: +- 1.96 std / sqrt(count), the
  std that of n, not n - 1; over draws of images, not over training runs. accuracies: each episode's [count]."""
  protocol: str
  mean: float
  low: float
  high: float
  accuracies: np.ndarray


class Pool(NamedTuple):
  """The images that episodes draw from, on the device: features [N D] in the order of their classes, each class's
  `first` row and `count` [K]."""
  features: Array
  first: Array
  count: Array


def draw(pool: Pool, key: Key, ways: int, shots: int, queries: int, most: int) -> tuple[Array, Array]:
  """Rows of one episode's support [ways, shots] and queries [ways, queries]; `most`: images of the largest class.

  Distinct, but where a class has fewer than shots + queries images: then its queries are drawn with replacement from
  what its support leaves.
  """
  _, which = jax.lax.top_k(jax.random.uniform(key_for(key, 'classes'), pool.count.shape), ways)
  count = pool.count[which][:, None]
  width = max(most, shots + queries)
  noise = jax.random.uniform(key_for(key, 'images'), (ways, width + queries))
  real = jnp.arange(width)[None, :] < count
  _, found = jax.lax.top_k(jnp.where(real, noise[:, :width], -1.), shots + queries)
  spare = count - shots
  again = jnp.minimum((noise[:, width:] * spare.astype(jnp.float32)).astype(jnp.int32), spare - 1)
  rank = shots + jnp.where(spare < queries, again, jnp.arange(queries)[None, :])
  rows = pool.first[which][:, None] + found
  return rows[:, :shots], jnp.take_along_axis(rows, rank, axis=1)


def _products(a: Array, b: Array) -> Array:
  """[n m] of rows [n D], [m D], each with a constant 1 beside it: the bias, penalised as a weight is."""
  return jnp.einsum('nd,md->nm', a, b, precision='highest') + 1.


def logistic(support: Array, queries: Array, own: Array, ways: int) -> Array:
  """One-vs-rest scores [q ways]: for each class the least  |w|^2 / 2 + sum of log losses, the bias in w (liblinear's,
  with C = 1). support [n D] of class `own` [n], queries [q D].

  w is a combination of the n support rows, so Newton's method runs on its n coefficients.
  """
  gram = _products(support, support)
  sign = jnp.where(own[None, :] == jnp.arange(ways)[:, None], 1., -1.)
  times = functools.partial(jnp.matmul, precision='highest')

  def slope(f: Array) -> Array:
    return sign * jax.nn.sigmoid(-sign * f)

  def improve(alpha: Array, _) -> tuple[Array, None]:
    f = times(alpha, gram)
    g = slope(f)
    weight = jnp.abs(g) * (1. - jnp.abs(g))
    root = jnp.sqrt(weight)
    system = jnp.eye(len(own))[None, :, :] + root[:, :, None] * gram[None, :, :] * root[:, None, :]
    b = weight * f + g
    solved = jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(system), True), (root * times(b, gram))[:, :, None])
    direction = b - root * solved[:, :, 0] - alpha
    move = times(direction, gram)
    # The slope along the direction, at each step: where it is nearest 0 the objective is not above its start.
    along = lambda t: (move * (alpha + t * direction - slope(f + t * move))).sum(-1)
    steps = .5 ** jnp.arange(STEPS, dtype=jnp.float32)
    step = steps[jnp.abs(jax.vmap(along)(steps)).argmin(0)]
    return alpha + step[:, None] * direction, None

  alpha, _ = jax.lax.scan(improve, jnp.zeros_like(sign), length=ITERATIONS)
  return times(_products(queries, support), alpha.T)


def ridge(support: Array, queries: Array, own: Array, ways: int) -> Array:
  """Scores [q ways] of ridge regression to +1 (own class) and -1: the least  |w|^2 + sum of squares, the bias in w."""
  target = jnp.where(own[:, None] == jnp.arange(ways)[None, :], 1., -1.)
  system = _products(support, support) + jnp.eye(len(own))
  alpha = jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(system), True), target)
  return jnp.matmul(_products(queries, support), alpha, precision='highest')


def centroid(support: Array, queries: Array, own: Array, ways: int) -> Array:
  """Scores [q ways]: the cosine to the mean of each class's support features."""
  mean = jax.ops.segment_sum(support, own, ways)  # but for its length
  return jnp.einsum('qd,wd->qw', unit(queries), unit(mean), precision='highest')


CLASSIFIERS = {'logistic': logistic, 'ridge': ridge, 'centroid': centroid}


@functools.lru_cache
def _player(ways: int, shots: int, queries: int, most: int, classifier: str):
  own, asked = (np.repeat(np.arange(ways, dtype=np.int32), n) for n in (shots, queries))

  def play(pool: Pool, key: Key, number: Array) -> Array:
    rows = draw(pool, key_for(key, 'episode', number), ways, shots, queries, most)
    support, query = (pool.features[r.ravel()] for r in rows)
    scores = CLASSIFIERS[classifier](support, query, own, ways)
    return jnp.mean((scores.argmax(1) == asked).astype(jnp.float32))

  return lambda pool, key, numbers: jax.vmap(functools.partial(play, pool, key))(numbers)


def _pool(features: np.ndarray, labels: np.ndarray, classes: int, ways: int, shots: int) -> tuple[Pool, int]:
  """The pool, and the number of classes that are left out: those of `shots` images or fewer."""
  count = np.bincount(labels, minlength=classes)
  large = count > shots
  if large.sum() < ways:
    raise UserError(f'{large.sum()} of {classes} classes have more than {shots} images, too few for {ways} ways.',
                    'Two classes or more need so many labelled test images.')
  order = np.argsort(labels, kind='stable')
  kept = order[large[labels[order]]]
  count = count[large].astype(np.int32)
  return Pool(jnp.asarray(features[kept], jnp.float32), jnp.asarray(count.cumsum(dtype=np.int32) - count),
              jnp.asarray(count)), int((~large).sum())


def episodes(features: np.ndarray, labels: np.ndarray, classes: int, key: Key, ways: int = 5, shots: int = 1,
             queries: int = 16, count: int = 2000, classifier: str = 'logistic') -> Episodes:
  """The accuracy of `count` episodes on features [N D] and labels [N] of classes that the network has not seen.

  Each draws `ways` classes, fits `classifier` ('logistic': one-vs-rest, C = 1; 'ridge'; 'centroid': cosine) to `shots`
  images a class and asks it `queries` others a class (Lee et al. 2021, official code, with logistic). Draws depend on
  (key, number of the episode, labels) alone, so two networks are compared on the same episodes. Classes of `shots`
  images or fewer are left out, and the protocol's name says how many. Raises UserError where too few classes are left.
  """
  if classifier not in CLASSIFIERS:
    raise UserError(f'there is no classifier {classifier!r}.', f'One of: {", ".join(CLASSIFIERS)}.')
  if ways < 2 or min(shots, queries, count) < 1:
    raise UserError(f'Episodes of {ways} ways, {shots} shots, {queries} queries, {count} times, cannot be played.',
                    'Two ways or more, and one or more of the others.')
  check_labelled(features, labels, classes, 'test')
  longest = float(np.sqrt(np.max(np.einsum('nd,nd->n', features, features, dtype=np.float64))))
  if classifier == 'logistic' and longest > LONGEST:
    raise UserError(f'Features of length {longest:.0f} are too long for the logistic classifier ({LONGEST:.0f}).',
                    'Use --protocol knn, cached or few_labels, which mind no length.')
  pool, left_out = _pool(features, labels, classes, ways, shots)
  player = _player(ways, shots, queries, int(pool.count.max()), classifier)
  found = in_batches(Partial(player, pool, key), np.arange(count, dtype=np.int32), min(CHUNK, count)).astype(np.float64)
  mean, half = float(found.mean()), float(1.96 * found.std() / np.sqrt(count))
  protocol = f'{ways}-way {shots}-shot {classifier}, {count} episodes'
  protocol += f', {counted(left_out, "small class", plural="small classes")} left out' if left_out else ''
  return Episodes(protocol, mean, mean - half, mean + half, found)

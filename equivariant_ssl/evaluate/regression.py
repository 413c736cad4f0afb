"""R^2 of an action read from frozen features: what the features still know of an augmentation."""
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.linalg
from jax.tree_util import Partial

from equivariant_ssl.errors import UserError
from equivariant_ssl.evaluate.features import check_finite, in_batches
from equivariant_ssl.evaluate.linear import held_out, one_thread, standardiser
from equivariant_ssl.keys import key_for
from equivariant_ssl.types import Array, Key

PENALTIES = tuple(float(10. ** e) for e in range(-5, 3))  # of |w|^2, beside the mean square over images
WIDTH = 1024
STILL = 1e-6  # a component of a smaller std, as a share of its largest value, is constant


class R2(NamedTuple):
  """R^2: 1 at best, 0 for the mean of the test set.

  pooled: over all components and images about one global mean, as SIE's code pools: components of different means
  make it large by themselves. pooled_chance: that of answering each component's training mean, which may be near 1.
  averaged: the mean of the components' own (scikit-learn's 'uniform_average'), of chance 0. components: each one's
  own, by name. chosen: what was used, and the names of the 'constant' components, which are left out.
  """
  protocol: str
  pooled: float
  averaged: float
  components: dict[str, float]
  chosen: dict[str, Any]
  pooled_chance: float


def _ridge(x: np.ndarray, y: np.ndarray, penalties: tuple[float, ...]):
  """Yield (penalty, predict) of ridge regressions of y [N A] on x [N D], intercept free; one Gram matrix for all."""
  x_mean, y_mean = x.mean(0), y.mean(0)
  x, y = x - x_mean, y - y_mean
  gram, product = x.T @ x, x.T @ y
  for penalty in penalties:
    w = scipy.linalg.solve(gram + penalty * len(x) * np.eye(x.shape[1]), product, assume_a='pos')
    yield penalty, lambda z, w=w: (z - x_mean) @ w + y_mean


def _linear(x: np.ndarray, y: np.ndarray, test: np.ndarray, penalties: tuple[float, ...]) -> tuple[np.ndarray, dict]:
  """Predictions [M A] of a ridge regression, its penalty the best on a held-out fifth (of equal ones the largest)."""
  out = held_out(np.zeros(len(x), np.int64))
  with one_thread():
    tried = [(float(np.mean((predict(x[out]) - y[out]) ** 2)), -penalty)
             for penalty, predict in _ridge(x[~out], y[~out], penalties)]
    held, best = min(tried)
    (_, predict), = _ridge(x, y, (-best,))
    return predict(test), {'penalty': -best, 'held_out_error': held}


def _mlp(layers: list, x: Array) -> Array:
  for i, (w, b) in enumerate(layers):
    x = jnp.matmul(jax.nn.relu(x) if i else x, w, precision='highest') + b[None, :]
  return x


def _layers(key: Key, sizes: tuple[int, ...]) -> list:
  make = jax.nn.initializers.he_normal()
  return [(make(key_for(key, 'layer', i), (sizes[i], sizes[i + 1])), jnp.zeros(sizes[i + 1]))
          for i in range(len(sizes) - 1)]


@functools.partial(jax.jit, static_argnames='batch', donate_argnums=(0, 1))
def _epoch(layers: list, state: Any, x: Array, y: Array, key: Key, rate: Array, batch: int):
  """One pass over x [N D], y [N A] in a random order, N // batch steps of Adam."""
  steps = x.shape[0] // batch
  order = jax.random.permutation(key, x.shape[0])[:steps * batch].reshape(steps, batch)
  loss = lambda layers, rows: jnp.mean(jnp.square(_mlp(layers, x[rows]) - y[rows]))

  def step(carry, rows):
    layers, state = carry
    with jax.numpy_dtype_promotion('standard'):  # optax's own bias correction raises a float to an int
      updates, state = optax.adam(rate).update(jax.grad(loss)(layers, rows), state, layers)
    return (optax.apply_updates(layers, updates), state), None
  return jax.lax.scan(step, (layers, state), order)[0]


def _deep(x: np.ndarray, y: np.ndarray, test: np.ndarray, key: Key, epochs: int, rate: float, batch: int
          ) -> tuple[np.ndarray, dict]:
  """Predictions [M A] of D-1024-1024-A with ReLU, trained by Adam on the mean square."""
  x, y, test = (jnp.asarray(a, jnp.float32) for a in (x, y, test))
  batch = min(batch, len(x))
  layers = _layers(key_for(key, 'layers'), (x.shape[1], WIDTH, WIDTH, y.shape[1]))
  state = optax.adam(rate).init(layers)
  for epoch in range(epochs):
    layers, state = _epoch(layers, state, x, y, key_for(key, 'epoch', epoch), jnp.float32(rate), batch)
  return in_batches(Partial(_mlp, layers), test, 1024), {'epochs': epochs, 'rate': rate, 'batch': batch}


def scores(y: np.ndarray, found: np.ndarray) -> tuple[float, np.ndarray]:
  """(pooled R^2, each component's [A]) of predictions `found` of y [M A], see R2; no component of y is constant."""
  y, found = np.asarray(y, np.float64), np.asarray(found, np.float64)
  error = (y - found) ** 2
  return float(1. - error.sum() / np.sum((y - y.mean()) ** 2)), 1. - error.sum(0) / np.sum((y - y.mean(0)) ** 2, axis=0)


def _check(train_x, train_y, test_x, test_y, kind: str, names: tuple[str, ...] | None) -> None:
  if kind not in ('linear', 'mlp'):
    raise UserError(f'there is no regression {kind!r}.', 'One of: linear, mlp.')
  for x, y in ((train_x, train_y), (test_x, test_y)):
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y) or y.shape[1] != train_y.shape[1]:
      raise ValueError(f'expected features [N D] and actions [N A], got {x.shape} and {y.shape}')
    check_finite(x)
  if names is not None and len(names) != train_y.shape[1]:
    raise ValueError(f'{train_y.shape[1]} components have {len(names)} names')
  if len(train_x) < 10 or len(test_x) < 2:
    raise UserError(f'{len(train_x)} training and {len(test_x)} test images are too few for a regression.',
                    'Give 10 and 2, or more.')


def r2(train_x: np.ndarray, train_y: np.ndarray, test_x: np.ndarray, test_y: np.ndarray, kind: str = 'linear',
       key: Key | None = None, names: tuple[str, ...] | None = None, penalties: tuple[float, ...] = PENALTIES,
       epochs: int = 50, rate: float = 1e-3, batch: int = 256) -> R2:
  """The R^2 of encoded actions y [N A] read from features x [N D], tested on other images [M D], [M A].

  'absolute' or 'relative' is what the caller gives: (h of a view, its action) or ([h1, h2], the action between).
  Features and components are standardised with training statistics. kind 'linear': ridge, convex, no key. 'mlp':
  D-1024-1024-A, ReLU, Adam, drawn by `key` (SIE's code, there with features as they are, and 50 epochs for colours, 300
  for rotations). The penalty's held-out fifth is of rows: give one row an image.
  Components that are constant in either set are left out and named in `chosen`. Raises UserError where all are.
  """
  train_x, train_y, test_x, test_y = (np.asarray(a) for a in (train_x, train_y, test_x, test_y))
  _check(train_x, train_y, test_x, test_y, kind, names)
  names = names or tuple(str(i) for i in range(train_y.shape[1]))
  moves = np.all([y.std(0, dtype=np.float64) > STILL * np.abs(y).max(0) for y in (train_y, test_y)], axis=0)
  if not moves.any():
    raise UserError('Every component of the action is constant, with nothing to read.', 'Give an action that varies.')
  mean, std = train_y[:, moves].mean(0, dtype=np.float64), train_y[:, moves].std(0, dtype=np.float64)
  standard, y = standardiser(train_x), (train_y[:, moves] - mean) / std
  train, test = standard(train_x), standard(test_x)
  if kind == 'linear':
    found, chosen = _linear(train, y, test, tuple(sorted(penalties, reverse=True)))
  else:
    found, chosen = _deep(train, y, test, jax.random.key(0) if key is None else key, epochs, rate, batch)
  pooled, each = scores(test_y[:, moves], found * std + mean)
  nothing, _ = scores(test_y[:, moves], mean[None])
  name = lambda which: [n for n, m in zip(names, which, strict=True) if m]
  protocol = f'r2 {kind}' + (f', {epochs} epochs' if kind == 'mlp' else '')
  components = {n: float(value) for n, value in zip(name(moves), each, strict=True)}
  return R2(protocol, pooled, float(each.mean()), components, chosen | {'constant': name(~moves)}, nothing)


def with_controls(train_x: np.ndarray, train_y: np.ndarray, test_x: np.ndarray, test_y: np.ndarray,
                  kind: str = 'linear', key: Key | None = None, names: tuple[str, ...] | None = None,
                  **settings: Any) -> dict[str, R2]:
  """{'true': `r2`, 'shuffled': `r2` with the training actions given to other rows, by `key`}. Of the latter
  `averaged` is about 0 or below, and `pooled` about `pooled_chance`: what is above was read from the features."""
  key = jax.random.key(0) if key is None else key
  moved = np.asarray(jax.random.permutation(key_for(key, 'shuffled'), len(train_y)))
  of = lambda y: r2(train_x, y, test_x, test_y, kind, key, names, **settings)
  return {'true': of(np.asarray(train_y)), 'shuffled': of(np.asarray(train_y)[moved])}

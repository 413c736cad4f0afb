"""R^2 of an action that is read from frozen features: what the features still know of an
augmentation."""
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.linalg
from jax.tree_util import Partial

from equivariant_ssl.errors import UserError
from equivariant_ssl.evaluate.features import check_finite, in_batches
from equivariant_ssl.evaluate.linear import held_out_mask, one_thread, standardizer
from equivariant_ssl.keys import key_for
from equivariant_ssl.types import Array, Key

# Penalties of |w|^2, beside the mean square over images.
PENALTIES = tuple(float(10. ** e) for e in range(-5, 3))
WIDTH = 1024
STILL = 1e-6  # a component of a smaller std, as a share of its largest value, is constant

Predict = Callable[[np.ndarray], np.ndarray]


class R2(NamedTuple):
  """R^2 is 1 at best, and 0 for a prediction of the test set's mean.

  pooled: over all components and images about one global mean, as SIE's code pools; components of
  different means make it large by themselves. pooled_chance: the pooled R^2 of predicting each
  component's training mean, which may be near 1. averaged: the mean of the components' own R^2
  (scikit-learn's 'uniform_average'), which is 0 by chance. components: the R^2 of each component,
  by name.
  chosen: the settings that were used, and the names of the 'constant' components, which are left
  out.
  """
  protocol: str
  pooled: float
  averaged: float
  components: dict[str, float]
  chosen: dict[str, Any]
  pooled_chance: float


def _ridge(x: np.ndarray, y: np.ndarray, penalties: tuple[float, ...]
           ) -> Iterator[tuple[float, Predict]]:
  """Yield (penalty, predict) of ridge regressions of y [N A] on x [N D].

  The intercept is not penalized. One Gram matrix serves all penalties.
  """
  x_mean, y_mean = x.mean(0), y.mean(0)
  x, y = x - x_mean, y - y_mean
  gram, product = x.T @ x, x.T @ y

  def predictor(w: np.ndarray) -> Predict:
    return lambda z: (z - x_mean) @ w + y_mean
  for penalty in penalties:
    system = gram + penalty * len(x) * np.eye(x.shape[1])
    yield penalty, predictor(scipy.linalg.solve(system, product, assume_a='pos'))


def _linear(x: np.ndarray, y: np.ndarray, test: np.ndarray, penalties: tuple[float, ...]
            ) -> tuple[np.ndarray, dict]:
  """Return (predictions [M A] of a ridge regression, the settings that were used).

  The penalty is the best on a held-out fifth (of equal ones the largest).
  """
  out = held_out_mask(np.zeros(len(x), np.int64))
  with one_thread():
    candidates = [(float(np.mean((predict(x[out]) - y[out]) ** 2)), -penalty)
                  for penalty, predict in _ridge(x[~out], y[~out], penalties)]
    error, best = min(candidates)
    (_, predict), = _ridge(x, y, (-best,))
    return predict(test), {'penalty': -best, 'held_out_error': error}


def _mlp(layers: list, x: Array) -> Array:
  for i, (w, b) in enumerate(layers):
    x = jnp.matmul(jax.nn.relu(x) if i else x, w, precision='highest') + b[None, :]
  return x


def _layers(key: Key, sizes: tuple[int, ...]) -> list:
  make = jax.nn.initializers.he_normal()
  return [(make(key_for(key, 'layer', i), (sizes[i], sizes[i + 1])), jnp.zeros(sizes[i + 1]))
          for i in range(len(sizes) - 1)]


@functools.partial(jax.jit, static_argnames='batch', donate_argnums=(0, 1))
def _epoch(layers: list, state: Any, x: Array, y: Array, key: Key, rate: Any, batch: int):
  """Pass once over x [N D], y [N A] in a random order, in N // batch steps of Adam."""
  steps = x.shape[0] // batch
  order = jax.random.permutation(key, x.shape[0])[:steps * batch].reshape(steps, batch)

  def loss(layers: list, rows: Array) -> Array:
    return jnp.mean(jnp.square(_mlp(layers, x[rows]) - y[rows]))

  def step(carry, rows):
    layers, state = carry
    # optax's own bias correction raises a float to an int.
    with jax.numpy_dtype_promotion('standard'):
      updates, state = optax.adam(rate).update(jax.grad(loss)(layers, rows), state, layers)
    return (optax.apply_updates(layers, updates), state), None
  return jax.lax.scan(step, (layers, state), order)[0]


def _deep(x: np.ndarray, y: np.ndarray, test: np.ndarray, key: Key, epochs: int, rate: float,
          batch: int) -> tuple[np.ndarray, dict]:
  """Return (predictions [M A] of an MLP D-1024-1024-A with ReLU, the settings that were used).

  The MLP is trained by Adam on the mean square.
  """
  x32, y32, test32 = (jnp.asarray(a, jnp.float32) for a in (x, y, test))
  batch = min(batch, len(x))
  layers = _layers(key_for(key, 'layers'), (x.shape[1], WIDTH, WIDTH, y.shape[1]))
  state = optax.adam(rate).init(layers)
  for epoch in range(epochs):
    layers, state = _epoch(layers, state, x32, y32, key_for(key, 'epoch', epoch),
                           jnp.float32(rate), batch)
  settings = {'epochs': epochs, 'rate': rate, 'batch': batch}
  return in_batches(Partial(_mlp, layers), test32, 1024), settings


def scores(y: np.ndarray, predicted: np.ndarray) -> tuple[float, np.ndarray]:
  """Return (the pooled R^2, that of each component [A]) of predictions of y [N A]; see R2.

  No component of y is constant.
  """
  y, predicted = np.asarray(y, np.float64), np.asarray(predicted, np.float64)
  error = (y - predicted) ** 2
  pooled = float(1. - error.sum() / np.sum((y - y.mean()) ** 2))
  return pooled, 1. - error.sum(0) / np.sum((y - y.mean(0)) ** 2, axis=0)


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
    raise UserError(f'{len(train_x)} training and {len(test_x)} test images are too few for a '
                    'regression.', 'Give 10 training images and 2 test images, or more.')


def r2(train_x: np.ndarray, train_y: np.ndarray, test_x: np.ndarray, test_y: np.ndarray,
       kind: str = 'linear', key: Key | None = None, names: tuple[str, ...] | None = None,
       penalties: tuple[float, ...] = PENALTIES, epochs: int = 50, rate: float = 1e-3,
       batch: int = 256) -> R2:
  """Return the R^2 of encoded actions y [N A] that are read from features x [N D], tested on other
  images [M D], [M A].

  Whether an action is 'absolute' or 'relative' is decided by what the caller passes: (h of a view,
  its action) or ([h1, h2], the action between the two). Features and components are standardized
  with training statistics. kind: 'linear' is ridge regression, convex, without a key; 'mlp' is
  D-1024-1024-A with ReLU and Adam, drawn by `key` (as in SIE's code, which takes features as they
  are, and 50 epochs for colors, 300 for rotations). The fifth on which the penalty is chosen is a
  fifth of the rows: give each image one row.

  Components that are constant in either set are left out and named in `chosen`. Raises UserError
  where all are constant.
  """
  train_x, train_y, test_x, test_y = (np.asarray(a) for a in (train_x, train_y, test_x, test_y))
  _check(train_x, train_y, test_x, test_y, kind, names)
  component_names = names or tuple(str(i) for i in range(train_y.shape[1]))
  varies = np.all([y.std(0, dtype=np.float64) > STILL * np.abs(y).max(0)
                   for y in (train_y, test_y)], axis=0)
  if not varies.any():
    raise UserError('Every component of the action is constant: there is nothing to read.',
                    'Give an action that varies.')
  train_y, test_y = train_y[:, varies], test_y[:, varies]
  mean, std = train_y.mean(0, dtype=np.float64), train_y.std(0, dtype=np.float64)
  standardize, y = standardizer(train_x), (train_y - mean) / std
  train, test = standardize(train_x), standardize(test_x)
  if kind == 'linear':
    predicted, chosen = _linear(train, y, test, tuple(sorted(penalties, reverse=True)))
  else:
    key = jax.random.key(0) if key is None else key
    predicted, chosen = _deep(train, y, test, key, epochs, rate, batch)
  pooled, by_component = scores(test_y, predicted * std + mean)
  pooled_chance, _ = scores(test_y, mean[None])

  def select(mask: np.ndarray) -> list[str]:
    return [name for name, selected in zip(component_names, mask, strict=True) if selected]
  protocol = f'r2 {kind}' + (f', {epochs} epochs' if kind == 'mlp' else '')
  components = {name: float(value)
                for name, value in zip(select(varies), by_component, strict=True)}
  return R2(protocol, pooled, float(by_component.mean()), components,
            chosen | {'constant': select(~varies)}, pooled_chance)


def with_controls(train_x: np.ndarray, train_y: np.ndarray, test_x: np.ndarray,
                  test_y: np.ndarray, kind: str = 'linear', key: Key | None = None,
                  names: tuple[str, ...] | None = None, **settings: Any) -> dict[str, R2]:
  """Return {'true': `r2`, 'shuffled': `r2` with the training actions permuted over rows by `key`}.

  The `averaged` of the latter is about 0 or below, and its `pooled` about `pooled_chance`: what is
  above was read from the features.
  """
  key, train_y = jax.random.key(0) if key is None else key, np.asarray(train_y)
  permutation = np.asarray(jax.random.permutation(key_for(key, 'shuffled'), len(train_y)))
  return {name: r2(train_x, y, test_x, test_y, kind, key, names, **settings)
          for name, y in (('true', train_y), ('shuffled', train_y[permutation]))}

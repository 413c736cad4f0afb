"""Protocol 'logistic': the field's transfer classifier, its penalty chosen on validation images."""
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from scipy.optimize import minimize
from scipy.special import logsumexp

from equivariant_ssl.errors import UserError
from equivariant_ssl.evaluate.features import check_labeled
from equivariant_ssl.evaluate.linear import held_out_mask, one_thread
from equivariant_ssl.evaluate.statistics import Result, accuracy, result, row_blocks

# Penalties of |theta|^2, beside the sum of the cross-entropies.
PENALTIES = tuple(float(w) for w in np.logspace(-6, 5, 45))
HELD_OUT = .1
ITERATIONS = 5000
# Of the scaled gradient. On separable classes L-BFGS reaches no smaller one in float64 at the
# smallest penalties.
TOLERANCE = 1e-3

Labeled = tuple[np.ndarray, np.ndarray]  # (features [N D], labels [N])


class Fit(NamedTuple):
  """A fitted classifier.

  theta: [D + 1, K]; its last row is the bias. penalty: the penalty that it was fitted at.
  converged: whether L-BFGS converged.
  """
  penalty: float
  theta: np.ndarray
  converged: bool


def mean_per_class(predictions, labels) -> float:
  """Return the accuracy of `predictions` [M] on each class that occurs in `labels` [M], averaged
  over these classes."""
  predictions, labels = np.asarray(predictions), np.asarray(labels)
  if predictions.shape != labels.shape or not labels.size:
    raise ValueError(f'expected two equal lengths >= 1, got {predictions.shape} and {labels.shape}')
  _, index, count = np.unique(labels, return_inverse=True, return_counts=True)
  return float((np.bincount(index, predictions == labels) / count).mean())


METRICS = {'top1': accuracy, 'per_class': mean_per_class}


def _with_one(x: np.ndarray) -> np.ndarray:
  """Return features [N D] with a constant 1 beside them, for the bias: [N D + 1] float64."""
  return np.concatenate([x, np.ones((len(x), 1))], axis=1, dtype=np.float64)


def _log_probabilities(rows: np.ndarray, theta: np.ndarray) -> np.ndarray:
  scores = rows @ theta
  return scores - logsumexp(scores, axis=1, keepdims=True)


def _loss(flat: np.ndarray, scale: np.ndarray, penalty: float, rows: np.ndarray, y: np.ndarray):
  """Return (the loss, its gradient) at theta = scale x flat."""
  theta = scale * flat.reshape(len(scale), -1)
  loss, gradient = penalty * np.sum(theta ** 2), 0.
  for block in row_blocks(len(rows)):
    log_p = _log_probabilities(rows[block], theta)
    index = np.arange(len(log_p))
    loss = loss - log_p[index, y[block]].sum()
    error = np.exp(log_p, out=log_p)
    error[index, y[block]] -= 1.
    gradient = gradient + rows[block].T @ error
  return loss, (scale * (gradient + 2. * penalty * theta)).ravel()


def _doubt(rows: np.ndarray, theta: np.ndarray) -> float:
  """Return the mean over rows of 1 - sum of p^2: 0 where every prediction is certain."""
  return float(np.mean(np.concatenate([
      1. - np.exp(2. * _log_probabilities(rows[block], theta)).sum(1)
      for block in row_blocks(len(rows))])))


def path(x: np.ndarray, y: np.ndarray, classes: int, penalties: tuple[float, ...],
         start: np.ndarray | None = None) -> Iterator[Fit]:
  """Yield the `Fit` of features [N D] and labels [N] at each of `penalties`, each started at the
  one before.

  Rows are rotated to the axes of their scatter, which changes neither loss nor penalty, and each
  axis is scaled by its curvature at the last fit. The features of a network differ so much in scale
  that L-BFGS takes ten times as many iterations without this (247 against 19 on 50,000 x 512,
  measured). All is computed in float64.
  """
  rows = _with_one(x)
  spread, axes = np.linalg.eigh(rows.T @ rows)
  for block in row_blocks(len(rows)):  # in place: there is no second copy in float64
    rows[block] = rows[block] @ axes
  spread = np.maximum(spread, 0.)[:, None]
  theta = np.zeros((rows.shape[1], classes)) if start is None else axes.T @ start
  for penalty in penalties:
    doubt = _doubt(rows, theta)
    scale = 1. / np.sqrt(doubt / classes * spread + 2. * penalty)
    options = {'maxiter': ITERATIONS, 'maxfun': 2 * ITERATIONS, 'ftol': 0.,
               'gtol': TOLERANCE * np.sqrt(doubt)}
    optimum = minimize(_loss, (theta / scale).ravel(), (scale, penalty, rows, y), 'L-BFGS-B',
                       jac=True, options=options)
    theta = scale * optimum.x.reshape(theta.shape)
    yield Fit(penalty, axes @ theta, optimum.status == 0)


def _check_classes(labels: np.ndarray, classes: int, part: str, fix: str) -> None:
  """Raise UserError where a class does not occur in the labels of the `part` images."""
  missing = np.flatnonzero(np.bincount(labels, minlength=classes) == 0)
  if len(missing):
    raise UserError(f'{len(missing)} of {classes} classes have no {part} image, '
                    f'class {missing[0]} for one.', fix)


def _split(x: np.ndarray, y: np.ndarray, valid: Labeled | None, held: float):
  """Return ((x, y) to fit on, (x, y) to choose on).

  The latter is `valid`, or, where this is None, the share `held` of every class.
  """
  if valid is not None:
    return (x, y), valid
  if not 0 < held < 1:
    raise UserError(f'{held:g} of the training images cannot be held out.',
                    'Give a fraction between 0 and 1.')
  out = held_out_mask(y, held)
  if not out.any():
    raise UserError(f'No class has {np.ceil(1 / held):.0f} training images, '
                    f'of which {held:g} could be held out.',
                    'Add labeled images; protocol cached needs fewer.')
  return (x[~out], y[~out]), (x[out], y[out])


def _check(train: Labeled, test: Labeled, classes: int, metric: str,
           penalties: tuple[float, ...]) -> None:
  """Raise UserError where the images or the metric do not serve `logistic`."""
  if metric not in METRICS:
    raise UserError(f'there is no metric {metric!r}.', f'One of: {", ".join(METRICS)}.')
  if not penalties or min(penalties) <= 0:
    raise ValueError(f'penalties are > 0, got {penalties}')
  check_labeled(*train, classes, 'training')
  check_labeled(*test, classes, 'test')
  _check_classes(train[1], classes, 'training', 'Every class needs labeled images.')


def logistic(train_x: np.ndarray, train_y: np.ndarray, test_x: np.ndarray, test_y: np.ndarray,
             classes: int, valid: Labeled | None = None,
             metric: str = 'top1', held: float = HELD_OUT,
             penalties: tuple[float, ...] = PENALTIES) -> Result:
  """Return the accuracy of protocol 'logistic' on features [N D], [M D] of un-augmented images, as
  they are (Lee et al. 2021, official code).

  It is the minimum of sum of cross-entropies + w |theta|^2, the bias in theta. The penalty w is the
  one with the best `metric` on the validation images `valid` (features [V D], labels [V]; None: the
  share `held` of each class); of equal ones it is the smallest. Then theta is fitted to the
  training and validation images and tested once.

  The problem is convex, with one optimum for each w: there is no learning rate and no key. The
  published code starts from the smallest w; here fits start from the largest, where a fit is quick.
  metric: 'top1', or 'per_class', which averages over classes. chosen: the metric and its value;
  Result.top1 is top-1 for both. Raises UserError where a class has no training image, or, for
  'per_class', no validation or test image.
  """
  _check((train_x, train_y), (test_x, test_y), classes, metric, penalties)
  fitted, (valid_x, valid_y) = _split(train_x, train_y, valid, held)
  check_labeled(valid_x, valid_y, classes, 'validation')
  if metric == 'per_class':
    for labels, part in ((valid_y, 'validation'), (test_y, 'test')):
      _check_classes(labels, classes, part,
                     'A mean over classes needs images of each; use the metric top1.')
  score, rows = METRICS[metric], _with_one(valid_x)
  with one_thread():
    candidates = [(score((rows @ fit.theta).argmax(1), valid_y), -fit.penalty, fit.theta)
                  for fit in path(*fitted, classes, tuple(sorted(penalties, reverse=True)))]
    valid_value, best, theta = max(candidates, key=lambda candidate: candidate[:2])
    both = np.concatenate([fitted[0], valid_x]), np.concatenate([fitted[1], valid_y])
    last, = path(*both, classes, (-best,), theta)
    scores = _with_one(test_x) @ last.theta
  tested = result('logistic', scores, test_y, {})
  return tested._replace(chosen={
      'penalty': last.penalty, 'validation': valid_value, 'converged': bool(last.converged),
      'metric': metric, 'value': score(tested.predictions, test_y)})

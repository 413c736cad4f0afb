"""Protocol 'logistic': the field's transfer classifier, at a penalty chosen on validation images."""
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from scipy.optimize import minimize
from scipy.special import logsumexp

from equivariant_ssl.errors import UserError
from equivariant_ssl.evaluate.features import check_labelled
from equivariant_ssl.evaluate.linear import held_out, one_thread
from equivariant_ssl.evaluate.statistics import Result, accuracy, result

PENALTIES = tuple(float(w) for w in np.logspace(-6, 5, 45))  # of |theta|^2, beside the sum of the cross-entropies
HELD_OUT = .1
ITERATIONS = 5000
TOLERANCE = 1e-3  # of the scaled gradient; L-BFGS on separable classes has no more in float64 at the smallest penalties


class Fit(NamedTuple):
  """theta [D + 1, K], its last row the bias, fitted at `penalty`; whether L-BFGS came to rest."""
  penalty: float
  theta: np.ndarray
  converged: bool


def mean_per_class(predictions, labels) -> float:
  """The accuracy of `predictions` [M] on each class that `labels` [M] have, averaged over these classes."""
  predictions, labels = np.asarray(predictions), np.asarray(labels)
  if predictions.shape != labels.shape or not labels.size:
    raise ValueError(f'expected two equal lengths >= 1, got {predictions.shape} and {labels.shape}')
  _, index, count = np.unique(labels, return_inverse=True, return_counts=True)
  return float((np.bincount(index, predictions == labels) / count).mean())


METRICS = {'top1': accuracy, 'per_class': mean_per_class}


def _with_one(x: np.ndarray) -> np.ndarray:
  return np.concatenate([x, np.ones((len(x), 1))], axis=1, dtype=np.float64)


def _log_probabilities(rows: np.ndarray, theta: np.ndarray) -> np.ndarray:
  scores = rows @ theta
  return scores - logsumexp(scores, axis=1, keepdims=True)


def _loss(flat: np.ndarray, scale: np.ndarray, penalty: float, rows: np.ndarray, y: np.ndarray):
  """(L, its gradient) at theta = scale x flat."""
  theta = scale * flat.reshape(len(scale), -1)
  log_p = _log_probabilities(rows, theta)
  each = np.arange(len(y))
  loss = penalty * np.sum(theta ** 2) - log_p[each, y].sum()
  error = np.exp(log_p, out=log_p)
  error[each, y] -= 1.
  return loss, (scale * (rows.T @ error + 2. * penalty * theta)).ravel()


def path(x: np.ndarray, y: np.ndarray, classes: int, penalties: tuple[float, ...], start: np.ndarray | None = None
         ) -> Iterator[Fit]:
  """The `Fit`s of features [N D] and labels [N] at `penalties` in turn, each started at the one before.

  Rows are turned to the axes of their scatter, which moves neither loss nor penalty, and each axis is scaled by its
  curvature there at the last fit: features of a network differ in scale so much that L-BFGS takes ten times as many
  iterations without (247 against 19 on 50,000 x 512, measured). float64.
  """
  rows = _with_one(x)
  spread, axes = np.linalg.eigh(rows.T @ rows)
  rows, spread = rows @ axes, np.maximum(spread, 0.)[:, None]
  theta = np.zeros((rows.shape[1], classes)) if start is None else axes.T @ start
  for penalty in penalties:
    doubt = float(np.mean(1. - np.exp(2. * _log_probabilities(rows, theta)).sum(1)))
    scale = 1. / np.sqrt(doubt / classes * spread + 2. * penalty)
    found = minimize(_loss, (theta / scale).ravel(), (scale, penalty, rows, y), 'L-BFGS-B', jac=True,
                     options={'maxiter': ITERATIONS, 'maxfun': 2 * ITERATIONS, 'ftol': 0.,
                              'gtol': TOLERANCE * np.sqrt(doubt)})
    theta = scale * found.x.reshape(theta.shape)
    yield Fit(penalty, axes @ theta, found.status == 0)


def _check_classes(labels: np.ndarray, classes: int, what: str, fix: str) -> None:
  missing = np.flatnonzero(np.bincount(labels, minlength=classes) == 0)
  if len(missing):
    raise UserError(f'{len(missing)} of {classes} classes have no {what} image, class {missing[0]} for one.', fix)


def _split(x: np.ndarray, y: np.ndarray, valid: tuple[np.ndarray, np.ndarray] | None, held: float):
  """((x, y) to fit, (x, y) to choose on): `valid`, or `held` of every class."""
  if valid is not None:
    return (x, y), valid
  if not 0 < held < 1:
    raise UserError(f'{held:g} of the training images cannot be held out.', 'Give a fraction between 0 and 1.')
  out = held_out(y, held)
  if not out.any():
    raise UserError(f'No class has {np.ceil(1 / held):.0f} training images, of which {held:g} could be held out.',
                    'Add labelled images; protocol cached needs fewer.')
  return (x[~out], y[~out]), (x[out], y[out])


def logistic(train_x: np.ndarray, train_y: np.ndarray, test_x: np.ndarray, test_y: np.ndarray, classes: int,
             valid: tuple[np.ndarray, np.ndarray] | None = None, metric: str = 'top1', held: float = HELD_OUT,
             penalties: tuple[float, ...] = PENALTIES) -> Result:
  """Protocol 'logistic' on features [N D], [M D] of un-augmented images, as they are (Lee et al. 2021, official code):

    the least  sum of cross-entropies + w |theta|^2, the bias in theta; w of the best `metric` on `valid` (features
    [V D], labels [V]; None: on `held` of each class), of equal ones the smallest; then fitted to both, tested once.

  Convex, with one optimum for each w: no learning rate, no key. Published from the smallest w on, here from the
  largest, where a fit is quick. metric: 'top1', or 'per_class', which averages over classes. chosen: the metric and
  its value; Result.top1 is top-1 for both. Raises UserError where a class has no training image, or for 'per_class'
  no validation or test image.
  """
  if metric not in METRICS:
    raise UserError(f'there is no metric {metric!r}.', f'One of: {", ".join(METRICS)}.')
  if not penalties or min(penalties) <= 0:
    raise ValueError(f'penalties are > 0, got {penalties}')
  check_labelled(train_x, train_y, classes, 'training')
  check_labelled(test_x, test_y, classes, 'test')
  _check_classes(train_y, classes, 'training', 'Every class needs labelled images.')
  fitted, (valid_x, valid_y) = _split(train_x, train_y, valid, held)
  check_labelled(valid_x, valid_y, classes, 'validation')
  if metric == 'per_class':
    for labels, what in ((valid_y, 'validation'), (test_y, 'test')):
      _check_classes(labels, classes, what, 'A mean over classes needs images of each; use the metric top1.')
  score, rows = METRICS[metric], _with_one(valid_x)
  with one_thread():
    tried = [(score((rows @ fit.theta).argmax(1), valid_y), -fit.penalty, fit.theta)
             for fit in path(*fitted, classes, tuple(sorted(penalties, reverse=True)))]
    held_value, best, theta = max(tried, key=lambda t: t[:2])
    both = np.concatenate([fitted[0], valid_x]), np.concatenate([fitted[1], valid_y])
    last, = path(*both, classes, (-best,), theta)
    scores = _with_one(test_x) @ last.theta
  found = result('logistic', scores, test_y, {})
  return found._replace(chosen={'penalty': last.penalty, 'validation': held_value, 'converged': bool(last.converged),
                                'metric': metric, 'value': score(found.predictions, test_y)})

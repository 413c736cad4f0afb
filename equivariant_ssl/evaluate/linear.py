"""Protocol 'cached': logistic regression on the features of un-augmented images."""
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from equivariant_ssl.data.holdout import HELD_OUT, held_out_mask
from equivariant_ssl.errors import UserError
from equivariant_ssl.evaluate import softmax_regression
from equivariant_ssl.evaluate.features import check_labeled
from equivariant_ssl.evaluate.statistics import Result, accuracy, result, std_of_columns
from equivariant_ssl.parallel import sharding

PENALTIES = (1., .1, .01, 1e-3, 1e-4, 1e-5)  # factors of |w|^2 / 2 beside the mean cross-entropy
ITERATIONS = 300
LARGE = 5e8      # features x classes from which on the devices solve it: CIFAR-10 x 512 is 2.6e8
ROUNDING = 1e-3  # where float32 and float64 differ by more, the fit does not count as converged


def one_thread():
  """Return a context in which BLAS uses one thread.

  Results have the same bits on any number of cores, and no threads wait for one another (`cached`
  of 1000 x 128 on 2 busy cores: 16.4 s with two threads, .5 with one).
  """
  return threadpool_limits(1, user_api='blas')


def standardizer(train: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
  """Return the function features [N D] -> (features - mean) / std, float64.

  The mean and the std are those of the features `train`; dead dimensions become 0.
  """
  mean, std = train.mean(0, dtype=np.float64), std_of_columns(train)
  alive = std > 1e-5 * max(std.max(), 1e-30)
  scale = np.where(alive, 1. / np.where(alive, std, 1.), 0.)
  return lambda values: (values - mean) * scale


def _fits(x: np.ndarray, y: np.ndarray, penalties: tuple[float, ...]
          ) -> Iterator[tuple[float, LogisticRegression]]:
  """Yield (penalty, model) of multinomial logistic regressions, each started at the one before."""
  model = LogisticRegression(max_iter=ITERATIONS, warm_start=True)
  for penalty in penalties:
    model.set_params(C=1. / (penalty * len(x)))
    with warnings.catch_warnings():
      warnings.simplefilter('ignore', ConvergenceWarning)  # `converged` says so beside the number
      yield penalty, model.fit(x, y)


def is_large(N: int, D: int, classes: int) -> bool:
  """Whether `cached` fits N x D features on the devices, in float32, rather than by scikit-learn.

  scikit-learn takes one thread and several copies of the features in float64.
  """
  return N * D * classes > LARGE


def _scores_on_devices(train: np.ndarray, labels: np.ndarray, out: np.ndarray, test: np.ndarray,
                       classes: int, penalties: tuple[float, ...], mesh: Mesh | None
                       ) -> tuple[np.ndarray, dict[str, Any]]:
  """Return the scores [M K] of test features, and what `softmax_regression` chose."""
  mesh = mesh or sharding.mesh(jax.local_devices()[:1])
  present, y = np.unique(labels, return_inverse=True)
  chosen = softmax_regression.choose(train, y, out, len(present), penalties, mesh)
  scores = np.full((len(test), classes), -np.inf, np.float32)
  scores[:, present] = softmax_regression.scores(chosen, test, mesh)
  exact = chosen.difference <= ROUNDING
  return scores, {'penalty': chosen.penalty, 'held_out_top1': chosen.held_out_top1,
                  'converged': chosen.fit.converged and exact, 'passes': chosen.passes,
                  'float64_difference': chosen.difference}


def cached(train_features: np.ndarray, train_labels: np.ndarray, test_features: np.ndarray,
           test_labels: np.ndarray, classes: int, penalties: tuple[float, ...] = PENALTIES,
           mesh: Mesh | None = None) -> Result:
  """Return the accuracy of protocol 'cached': logistic regression on features [N D], [M D] of
  un-augmented images.

  Features are standardized with training statistics. The L2 penalty is chosen by accuracy on a
  fifth of the training set (of equal accuracies, the largest penalty); then the model is fitted to
  all of the training set by L-BFGS and tested once. The problem is convex, with one optimum: there
  is no learning rate and no key. Where N x D x K is large (`is_large`), it is solved in float32 on
  the devices of `mesh`; the result then says how many passes over the features that took, and how
  far float64 is from float32 on a sample. Raises UserError where the training labels are all of one
  class.
  """
  check_labeled(train_features, train_labels, classes, 'training')
  check_labeled(test_features, test_labels, classes, 'test')
  out = held_out_mask(train_labels, HELD_OUT)
  if len(np.unique(train_labels[~out])) < 2:
    raise UserError('All training images are of one class.',
                    'A linear probe needs two classes or more.')
  N, D = train_features.shape
  if is_large(N, D, classes):
    scores, chosen = _scores_on_devices(train_features, train_labels, out, test_features, classes,
                                        penalties, mesh)
    return result('cached in float32', scores, test_labels, chosen)
  standardize = standardizer(train_features)
  train, test = standardize(train_features), standardize(test_features)
  penalties = tuple(sorted(penalties, reverse=True))
  best, held_out_top1 = penalties[0], None
  with one_thread():
    if out.any():
      candidates = [(accuracy(model.predict(train[out]), train_labels[out]), penalty)
                    for penalty, model in _fits(train[~out], train_labels[~out], penalties)]
      held_out_top1, best = max(candidates)
    (_, model), = _fits(train, train_labels, (best,))
    scores = np.full((len(test), classes), -np.inf)
    scores[:, model.classes_] = model.predict_log_proba(test)
  converged = bool(model.n_iter_[0] < ITERATIONS)
  return result('cached', scores, test_labels,
                {'penalty': best, 'held_out_top1': held_out_top1, 'converged': converged})

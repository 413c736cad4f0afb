"""Protocol 'cached': logistic regression on the features of un-augmented images."""
import warnings
from collections.abc import Callable, Iterator

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from equivariant_ssl.data.holdout import HELD_OUT, held_out_mask
from equivariant_ssl.errors import UserError
from equivariant_ssl.evaluate.features import check_labeled
from equivariant_ssl.evaluate.statistics import Result, accuracy, result

PENALTIES = (1., .1, .01, 1e-3, 1e-4, 1e-5)  # of |w|^2 / 2, beside the mean cross-entropy
ITERATIONS = 300


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
  mean, std = train.mean(0, dtype=np.float64), train.std(0, dtype=np.float64)
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


def cached(train_features: np.ndarray, train_labels: np.ndarray, test_features: np.ndarray,
           test_labels: np.ndarray, classes: int, penalties: tuple[float, ...] = PENALTIES
           ) -> Result:
  """Return the accuracy of protocol 'cached': logistic regression on features [N D], [M D] of
  un-augmented images.

  Features are standardized with training statistics. The L2 penalty is chosen by accuracy on a
  fifth of the training set (of equal accuracies, the largest penalty); then the model is fitted to
  all of the training set by L-BFGS and tested once. The problem is convex, with one optimum: there
  is no learning rate and no key. Raises UserError where the training labels are all of one class.
  """
  check_labeled(train_features, train_labels, classes, 'training')
  check_labeled(test_features, test_labels, classes, 'test')
  out = held_out_mask(train_labels, HELD_OUT)
  if len(np.unique(train_labels[~out])) < 2:
    raise UserError('All training images are of one class.',
                    'A linear probe needs two classes or more.')
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

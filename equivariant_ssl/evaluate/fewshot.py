"""Few labels a class: ridge regression on class-balanced subsets of the training set."""
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.linear_model import RidgeClassifierCV

from equivariant_ssl.errors import UserError
from equivariant_ssl.evaluate.features import check_labeled
from equivariant_ssl.evaluate.linear import one_thread, standardizer
from equivariant_ssl.evaluate.statistics import accuracy, mean_std, quantity
from equivariant_ssl.keys import key_for
from equivariant_ssl.types import Key

# On standardized features; each is multiplied by the number of features.
RIDGES = tuple(float(10. ** e) for e in range(-2, 5))


class FewLabels(NamedTuple):
  """The top-1 accuracy over trials, a fraction.

  mean, std: over trials (std is None at one trial). trials: the accuracy of each trial [T].
  classes: how many classes took part.
  """
  protocol: str
  mean: float
  std: float | None
  trials: np.ndarray
  classes: int


def subsets(labels: np.ndarray, classes: int, key: Key, per_class: int, trials: int) -> np.ndarray:
  """Return indices [T, classes x per_class]: a trial a row, with `per_class` images of every class,
  drawn without replacement.

  They depend on (key, trial, labels) alone, so that two networks are compared on the same images.
  Raises UserError where a class has fewer images.
  """
  count = np.bincount(labels, minlength=classes)
  if count.min() < per_class:
    raise UserError(f'Class {count.argmin()} has {count.min()} training images, '
                    f'fewer than {per_class}.', f'Every class needs {per_class} labeled images.')
  draw = jax.vmap(lambda t: jax.random.uniform(key_for(key, 'few labels', t), labels.shape))
  draws = np.asarray(draw(jnp.arange(trials)))
  first = np.concatenate([[0], count.cumsum()[:-1]])
  rows = (first[:, None] + np.arange(per_class)).ravel()
  return np.stack([np.lexsort((noise, labels))[rows] for noise in draws])


def _large_classes(train: np.ndarray, test: np.ndarray, classes: int, per_class: int
                   ) -> tuple[np.ndarray, np.ndarray, str]:
  """Return which classes have `per_class` training images or more, and so take part.

  They are: a mask [K]; [K] the number of each class among those that take part; the words that say
  how many are left out.
  """
  large = np.bincount(train, minlength=classes) >= per_class
  if large.sum() < 2 or not large[test].any():
    raise UserError(f'{large.sum()} of {classes} classes have {per_class} training images or more; '
                    'two are needed, and test images of them.', 'Add labeled images.')
  small = int((~large).sum())
  words = f', {quantity(small, "small class", plural="small classes")} left out' if small else ''
  return large, large.cumsum() - 1, words


def few_labels(train_features: np.ndarray, train_labels: np.ndarray, test_features: np.ndarray,
               test_labels: np.ndarray, classes: int, key: Key, per_class: int = 5,
               trials: int = 20) -> FewLabels:
  """Return the accuracy on all test images of a ridge classifier that is fitted to `per_class`
  labeled images of each class.

  Features are standardized with statistics of the entire training set, which need no labels. The
  penalty, one of RIDGES x D, has the least leave-one-out error on the few labeled images (in closed
  form). Classes of fewer training images are left out of both sets, and the protocol's name says
  how many; UserError where fewer than two are left.
  """
  check_labeled(train_features, train_labels, classes, 'training')
  check_labeled(test_features, test_labels, classes, 'test')
  standardize = standardizer(train_features)
  large, number, left_out = _large_classes(train_labels, test_labels, classes, per_class)
  in_train, in_test = large[train_labels], large[test_labels]
  row_of, train_labels = np.flatnonzero(in_train), number[train_labels[in_train]]
  test, test_labels = standardize(test_features[in_test]), number[test_labels[in_test]]
  classes, accuracies = int(large.sum()), []
  with one_thread():
    for rows in subsets(train_labels, classes, key, per_class, trials):
      model = RidgeClassifierCV(alphas=np.array(RIDGES) * test.shape[1])
      model.fit(standardize(train_features[row_of[rows]]), train_labels[rows])
      accuracies.append(accuracy(model.predict(test), test_labels))
  protocol = f'few_labels {per_class} a class, ridge, {trials} trials{left_out}'
  return FewLabels(protocol, *mean_std(accuracies), np.array(accuracies), classes)

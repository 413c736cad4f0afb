"""Few labels a class: ridge regression on class-balanced subsets of the training set."""
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.linear_model import RidgeClassifierCV

from equivariant_ssl.errors import UserError
from equivariant_ssl.evaluate.features import check_labelled
from equivariant_ssl.evaluate.linear import one_thread, standardiser
from equivariant_ssl.evaluate.statistics import accuracy, counted, mean_std
from equivariant_ssl.keys import key_for
from equivariant_ssl.types import Key

RIDGES = tuple(float(10. ** e) for e in range(-2, 5))  # on standardised features; times the number of features


class FewLabels(NamedTuple):
  """mean and std (None at one trial) over trials of the top-1 accuracy, a fraction; trials: each of them [T]. classes: how
  many took part."""
  protocol: str
  mean: float
  std: float | None
  trials: np.ndarray
  classes: int


def subsets(labels: np.ndarray, classes: int, key: Key, per_class: int, trials: int) -> np.ndarray:
  """Indices [T, classes x per_class]: `per_class` images of every class, drawn without replacement, a trial a row.

  They depend on (key, trial, labels) alone, so two networks are compared on the same images. Raises UserError
  where a class has fewer images.
  """
  count = np.bincount(labels, minlength=classes)
  if count.min() < per_class:
    raise UserError(f'Class {count.argmin()} has {count.min()} training images, fewer than {per_class}.',
                    'Every class needs so many labelled images.')
  draw = jax.vmap(lambda t: jax.random.uniform(key_for(key, 'few labels', t), labels.shape))
  draws = np.asarray(draw(jnp.arange(trials)))
  first = np.concatenate([[0], count.cumsum()[:-1]])
  rows = (first[:, None] + np.arange(per_class)).ravel()
  return np.stack([np.lexsort((draw, labels))[rows] for draw in draws])


def _large(train: np.ndarray, test: np.ndarray, classes: int, per_class: int) -> tuple[np.ndarray, np.ndarray, str]:
  """([K] whether a class takes part, [K] its number among those that do, words that say how many do not)."""
  kept = np.bincount(train, minlength=classes) >= per_class
  if kept.sum() < 2 or not kept[test].any():
    raise UserError(f'{kept.sum()} of {classes} classes have {per_class} training images or more; two are needed, and test '
                    'images of them.', 'Add labelled images.')
  small = int((~kept).sum())
  return kept, kept.cumsum() - 1, f', {counted(small, "small class", plural="small classes")} left out' if small else ''


def few_labels(train_features: np.ndarray, train_labels: np.ndarray, test_features: np.ndarray,
               test_labels: np.ndarray, classes: int, key: Key, per_class: int = 5, trials: int = 20) -> FewLabels:
  """Accuracy on all test images of a ridge classifier fitted to `per_class` labelled images of each class.

  Features are standardised with statistics of the whole training set, which need no labels. The penalty, from
  RIDGES x D, is that of the least leave-one-out error on the few labelled images (closed form). Classes of fewer training
  images are left out of both sets, and the protocol's name says how many; UserError where fewer than two are left.
  """
  check_labelled(train_features, train_labels, classes, 'training')
  check_labelled(test_features, test_labels, classes, 'test')
  standard = standardiser(train_features)
  kept, number, left = _large(train_labels, test_labels, classes, per_class)
  mine, theirs = kept[train_labels], kept[test_labels]
  train, train_labels = standard(train_features)[mine], number[train_labels[mine]]
  test, test_labels = standard(test_features)[theirs], number[test_labels[theirs]]
  classes, found = int(kept.sum()), []
  with one_thread():
    for rows in subsets(train_labels, classes, key, per_class, trials):
      model = RidgeClassifierCV(alphas=np.array(RIDGES) * train.shape[1]).fit(train[rows], train_labels[rows])
      found.append(accuracy(model.predict(test), test_labels))
  protocol = f'few_labels {per_class} a class, ridge, {trials} trials{left}'
  return FewLabels(protocol, *mean_std(found), np.array(found), classes)

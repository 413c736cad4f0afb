"""Handwritten digits: the 1,797 real 8x8 scans that scikit-learn bundles. Offline, the default."""
import numpy as np

from equivariant_ssl.data.source import Source, Split, moments

TRAIN = 1000


def make() -> Source:
  """16x16 canvases (each pixel repeated, grey in three channels); 1,000 to train, 797 to test, 10 classes.

  The order is `numpy.random.RandomState(0).permutation`. UCI Optical Recognition of Handwritten Digits, test set.
  """
  from sklearn.datasets import load_digits  # a second of imports that other data do not need
  scans, labels = load_digits(return_X_y=True)
  order = np.random.RandomState(0).permutation(len(scans))
  grey = np.rint(scans[order].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
  images = np.repeat(grey.repeat(2, axis=1).repeat(2, axis=2)[..., None], 3, axis=3)
  sizes, labels = np.full((len(images), 2), 16, np.float32), labels[order].astype(np.int32)
  train, test = (Split(images[part], sizes[part], labels[part]) for part in (slice(TRAIN), slice(TRAIN, None)))
  return Source('digits', train, test, tuple('0123456789'), *moments(train.images))

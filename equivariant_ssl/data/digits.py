"""Handwritten digits: the 1,797 real scans of 8x8 pixels that scikit-learn bundles.

They need no download and are the default data set.
"""
import numpy as np

from equivariant_ssl.data.channel_moments import moments
from equivariant_ssl.data.source import Source, Split

TRAIN = 1000


def make() -> Source:
  """1,000 training and 797 test images in 10 classes, on canvases of 16x16.

  Each pixel is repeated, and its gray is in all three channels. The order of the images is
  `numpy.random.RandomState(0).permutation`. Source: UCI Optical Recognition of Handwritten Digits,
  test set.
  """
  from sklearn.datasets import load_digits  # a second of imports that other data do not need
  scans, labels = load_digits(return_X_y=True)
  order = np.random.RandomState(0).permutation(len(scans))
  gray = np.rint(scans[order].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
  images = np.repeat(gray.repeat(2, axis=1).repeat(2, axis=2)[..., None], 3, axis=3)
  sizes = np.full((len(images), 2), 16, np.float32)
  labels = labels[order].astype(np.int32)
  train, test = (Split(images[part], sizes[part], labels[part])
                 for part in (slice(TRAIN), slice(TRAIN, None)))
  return Source('digits', train, test, tuple('0123456789'), *moments(train.images))

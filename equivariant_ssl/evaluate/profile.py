"""Sensitivity profile: how far one augmentation alone moves the features of any network; without a
head and without labels."""
from typing import NamedTuple

import numpy as np

from equivariant_ssl.errors import UserError
from equivariant_ssl.evaluate.features import check_finite
from equivariant_ssl.evaluate.gains import LEAST, shuffle
from equivariant_ssl.evaluate.health import unit_vectors
from equivariant_ssl.evaluate.statistics import Interval, interval, ratio_of_means
from equivariant_ssl.types import Key

# A centered vector shorter than this share of its features is float32's rounding, not a direction.
ROUNDING = 1e-6


class Drift(NamedTuple):
  """1 - cosine, 0 to 2, over images.

  view: between an image and its augmented view. other: between it and another image. ratio =
  mean(view) / mean(other): 0 where the network ignores the augmentation, 1 where a view is as far
  away as another image.
  """
  view: Interval
  other: Interval
  ratio: Interval


def _half_square(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """Return 1 - cosine of unit vectors [N V D], averaged over views: [N]."""
  return ((a - b) ** 2).sum(-1).mean(-1) / 2


def drift(h: np.ndarray, h_views: np.ndarray, key: Key, center: bool = True) -> Drift:
  """Return the Drift of features h [N D] of images and h_views [N V D] of V views of each, after
  one augmentation alone.

  center: whether the mean of h over images is subtracted from both. Features after a ReLU are
  positive and share a large mean, so that any two images have a cosine near 1 and every drift looks
  small. False leaves them as they are. The other image is given by one derangement, drawn by `key`.
  Raises UserError for fewer than 2 images, or features that are not finite.
  """
  h, h_views = np.asarray(h, np.float64), np.asarray(h_views, np.float64)
  if h.ndim != 2 or h_views.ndim != 3 or (h_views.shape[0], h_views.shape[2]) != h.shape:
    raise ValueError(f'expected features [N D] and [N V D], got {h.shape} and {h_views.shape}')
  N = len(h)
  if N < 2:
    raise UserError(f'A profile of {N} images has no other image to compare with.',
                    'Measure on more images.')
  # All in one array: rounding is the same, so that no change is exactly 0.
  every = np.concatenate([h[:, None, :], h_views], axis=1)
  check_finite(every.reshape(N, -1))
  if center:
    length = np.linalg.norm(every, axis=-1, keepdims=True)
    every = every - h.mean(0)
    every[np.linalg.norm(every, axis=-1) <= ROUNDING * length[..., 0]] = 0.
  every = unit_vectors(every)
  images, views = every[:, :1], every[:, 1:]
  view = _half_square(images, views)
  other = _half_square(images, images[shuffle(key, np.arange(N))])
  return Drift(interval(view), interval(other), ratio_of_means(view, np.maximum(other, LEAST)))

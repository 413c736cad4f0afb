"""Sensitivity profile: how far one augmentation alone moves the features of any network; no head, no labels."""
from typing import NamedTuple

import numpy as np

from equivariant_ssl.errors import UserError
from equivariant_ssl.evaluate.features import check_finite
from equivariant_ssl.evaluate.gains import LEAST, shuffle
from equivariant_ssl.evaluate.health import units
from equivariant_ssl.evaluate.statistics import Interval, interval, ratio_of_means
from equivariant_ssl.types import Key

ROUNDING = 1e-6  # a centred vector shorter than this share of its features is float32's rounding, not a direction


class Drift(NamedTuple):
  """1 - cosine, 0 to 2, over images. view: of an image and its augmented view; other: of it and another image.
  ratio = mean(view) / mean(other): 0 where the network ignores the augmentation, 1 where the view is a stranger."""
  view: Interval
  other: Interval
  ratio: Interval


def drift(h: np.ndarray, h_views: np.ndarray, key: Key, centred: bool = True) -> Drift:
  """The Drift of features h [N D] of images and h_views [N V D] of V views of each after one augmentation alone.

  centred: less the mean of h over images, from both: features after a ReLU are positive and share a large mean, so any
  two images have a cosine near 1 and every drift looks small. False: as they are. other: of one derangement, by `key`.
  Raises UserError for fewer than 2 images, or features that are not finite.
  """
  h, h_views = np.asarray(h, np.float64), np.asarray(h_views, np.float64)
  if h.ndim != 2 or h_views.ndim != 3 or (h_views.shape[0], h_views.shape[2]) != h.shape:
    raise ValueError(f'expected features [N D] and [N V D], got {h.shape} and {h_views.shape}')
  N = len(h)
  if N < 2:
    raise UserError(f'A profile of {N} images has no other image to compare with.', 'Measure on more images.')
  every = np.concatenate([h[:, None, :], h_views], axis=1)  # as one: the same rounding, so that no change is exactly 0
  check_finite(every.reshape(N, -1))
  if centred:
    length = np.linalg.norm(every, axis=-1, keepdims=True)
    every = every - h.mean(0)
    every[np.linalg.norm(every, axis=-1) <= ROUNDING * length[..., 0]] = 0.
  every = units(every)
  still, moved = every[:, :1], every[:, 1:]
  distance = lambda a, b: ((a - b) ** 2).sum(-1).mean(-1) / 2  # 1 - cosine of unit vectors
  view, other = distance(still, moved), distance(still, still[shuffle(key, np.arange(N))])
  return Drift(interval(view), interval(other), ratio_of_means(view, np.maximum(other, LEAST)))

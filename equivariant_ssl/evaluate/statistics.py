"""Numbers with their uncertainty, and the result that every labeled protocol returns."""
from typing import Any, NamedTuple

import numpy as np
from scipy.special import stdtrit

CONFIDENCE = .95
BLOCK = 2 ** 16        # rows of features that are taken in float64 at a time
BLOCK_NUMBERS = 2 ** 25  # numbers that are taken in float64 at a time: 256 MiB


class Interval(NamedTuple):
  """A mean of `n` independent values and its 95 % t-interval (low and high are None at n = 1)."""
  mean: float
  low: float | None
  high: float | None
  n: int

  @property
  def excludes_zero(self) -> bool:
    """Whether there is an interval and 0 lies outside it."""
    return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


class Result(NamedTuple):
  """The result of a labeled evaluation.

  protocol: the name to print beside the numbers. top1, top5: accuracies, as fractions (top5 is None
  at five classes or fewer). predictions: int [M]. chosen: the hyper-parameters that were used.
  """
  protocol: str
  top1: float
  top5: float | None
  predictions: np.ndarray
  chosen: dict[str, Any]


def row_blocks(count: int) -> list[slice]:
  """Return the blocks of rows, at most BLOCK each, in which `count` rows are taken in float64."""
  return [slice(start, start + BLOCK) for start in range(0, count, BLOCK)]


def std_of_columns(x: np.ndarray) -> np.ndarray:
  """Return the standard deviation of each column of x [N D], float64 [D].

  Columns are taken in blocks: numpy would make a copy of all of x in float64.
  """
  N, D = x.shape
  width = max(1, min(D, BLOCK_NUMBERS // max(N, 1)))
  return np.concatenate([x[:, start:start + width].std(0, dtype=np.float64)
                         for start in range(0, D, width)])


def mean_value(value) -> float:
  """Return a number of a result file without its interval."""
  return value['mean'] if isinstance(value, dict) else value


def mean_std(values) -> tuple[float, float | None]:
  """Return the mean and the sample standard deviation of `values` [n].

  The deviation divides by n - 1; it is None where n is 1.
  """
  values = np.asarray(values, np.float64)
  if values.ndim != 1 or not values.size:
    raise ValueError(f'expected values [n >= 1], got {values.shape}')
  return float(values.mean()), float(values.std(ddof=1)) if values.size > 1 else None


def interval(values) -> Interval:
  """Return the mean of `values` [n] with its two-sided 95 % t-interval."""
  mean, std = mean_std(values)
  n = len(values)
  if std is None:
    return Interval(mean, None, None, n)
  half = float(stdtrit(n - 1, (1 + CONFIDENCE) / 2)) * std / np.sqrt(n)
  return Interval(mean, float(mean - half), float(mean + half), n)


def paired(a, b) -> Interval:
  """Return the interval of the differences a - b; `a` and `b` [n] are pairs, such as the values of
  two methods at the same seeds in the same order."""
  if np.shape(a) != np.shape(b):
    raise ValueError(f'pairs need two equal lengths, got {np.shape(a)} and {np.shape(b)}')
  return interval(np.asarray(a, np.float64) - np.asarray(b, np.float64))


def ratio_of_means(a, b) -> Interval:
  """Return mean(a) / mean(b) over n independent (a, b), with its 95 % interval.

  The interval is by linearization (the delta method): the interval of (a - R b) / mean(b), around
  the ratio R.
  """
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  ratio = float(a.mean() / b.mean())
  around = interval(ratio + (a - ratio * b) / b.mean())
  return around._replace(mean=ratio)


def over_images(values, image=None) -> np.ndarray:
  """Return the means of `values` [N] over the pairs of each image, [number of images] by rising
  `image` number.

  image: int [N], the image of each pair; None: each pair has an image of its own. Pairs of one
  image are not independent: an interval over all pairs would be too narrow.
  """
  values = np.asarray(values, np.float64)
  if image is None:
    return values
  _, index = np.unique(np.asarray(image), return_inverse=True)
  return np.bincount(index, values) / np.bincount(index)


def interval_text(interval: Interval, scale: float = 1., digits: int = 2, sign: bool = True) -> str:
  """Return an interval as text: '+1.23 [0.80, 1.66]', or '+1.23 (n=1)' where there are no bounds.

  Values are multiplied by `scale` (100 for percent).
  """
  plus = '+' if sign else ''
  mean = f'{interval.mean * scale:{plus}.{digits}f}'
  if interval.low is None or interval.high is None:
    return f'{mean} (n={interval.n})'
  return f'{mean} [{interval.low * scale:.{digits}f}, {interval.high * scale:.{digits}f}]'


FEW = 100     # test images, of fewer of which an accuracy says little
COUNTED = 1000  # test images, of fewer of which the counts and an interval are shown


def counted(accuracy: float, images: int) -> str:
  """Return an accuracy on `images` test images as '5/17 [13-53 %]', with Wilson's 95 % interval."""
  from scipy.stats import binomtest  # it takes a second to import
  right = round(accuracy * images)
  interval = binomtest(right, images).proportion_ci(CONFIDENCE, 'wilson')
  return f'{right}/{images} [{100 * interval.low:.0f}-{100 * interval.high:.0f} %]'


def images_classified(result: dict) -> int:
  """Return how many images a result file classifies, one prediction each; 0 where it has none."""
  predictions = (result['trained'][0].get('detail') or {})
  predictions = predictions.get('predictions') if isinstance(predictions, dict) else None
  return len(predictions) if isinstance(predictions, list) else 0


def few_images_warning(images: int) -> str:
  """Return a warning where `images` test images are classified, and these are few; else ''."""
  if not 0 < images < FEW:
    return ''
  return (f'Warning: there are only {quantity(images, "test image")}. On fewer than {FEW} an '
          'accuracy says little; the brackets show how little.')


def quantity(n: float | str, noun: str, form: str = ',', plural: str = '') -> str:
  """Return a count with its noun: '1 image', '2,048 images'.

  form: the format of the number. plural: the plural of the noun where it is not `noun` + 's'.
  """
  number = f'{n:{form}}'
  return f'{number} {noun if number == "1" else plural or noun + "s"}'


def accuracy(predictions, labels) -> float:
  """Return the fraction of `predictions` [M] that equal the `labels` [M]."""
  predictions, labels = np.asarray(predictions), np.asarray(labels)
  if predictions.shape != labels.shape or not labels.size:
    raise ValueError(f'expected two equal lengths >= 1, got {predictions.shape} and {labels.shape}')
  return float(np.mean(predictions == labels))


def result(protocol: str, scores, labels, chosen: dict[str, Any]) -> Result:
  """Return the Result of class `scores` [M K] against `labels` [M].

  Equal scores rank by class number.
  """
  scores, labels = np.asarray(scores), np.asarray(labels)
  best = np.argsort(-scores, axis=1, kind='stable')[:, :5].astype(np.int32)
  top5 = None
  if scores.shape[1] > 5:
    top5 = float(np.mean((best == labels[:, None]).any(1)))
  return Result(protocol, accuracy(best[:, 0], labels), top5, best[:, 0], chosen)

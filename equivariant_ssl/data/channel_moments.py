"""Mean and standard deviation of the channels of images, and remarks on images that show little."""
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import numpy as np

CHUNK = 256        # images that are counted at a time
FLOOR = 1 / 255    # the least standard deviation, so that a normalized constant channel is finite
FLAT = 2           # of 255: an image whose channels all vary by no more than this shows nothing
OVERSHOOT = 1.15   # a sharp edge that is resized exceeds its own values by up to this factor

RGB = tuple[float, float, float]
Moments = tuple[RGB, RGB]   # (mean, standard deviation) of red, green and blue


class Content(NamedTuple):
  """What there is to see in a set of images.

  images:  how many there are.
  flat:    how many of them have one color throughout.
  largest: the largest value of all pixels, 0 to 255.
  mean:    [3] the mean of each channel, in [0, 1].
  square:  [3] the mean of the square of each channel.
  """
  images: int
  flat: int
  largest: int
  mean: np.ndarray
  square: np.ndarray


def moments(images: np.ndarray) -> Moments:
  """The mean and the standard deviation of each channel of uint8 [N S S 3], for pixels in [0, 1].

  They are exact, for they are computed from histograms. The deviation is at least FLOOR.
  """
  counts = np.zeros((images.shape[-1], 256))
  for start in range(0, len(images), CHUNK):
    for channel, histogram in enumerate(counts):
      values = images[start:start + CHUNK, ..., channel].reshape(-1)
      histogram += np.bincount(values, minlength=256)
  values, weights = np.arange(256) / 255., counts / counts.sum(axis=1, keepdims=True)
  mean = weights @ values
  variance = (weights * (values - mean[:, None])**2).sum(axis=1)
  deviation = np.maximum(np.sqrt(variance), FLOOR)
  return cast(Moments, (tuple(mean.tolist()), tuple(deviation.tolist())))


def measure_content(images: np.ndarray, known: Moments) -> Content:
  """The Content of uint8 images [N S S C], whose moments are `known`."""
  flat, largest, (mean, std) = 0, 0, np.asarray(known)
  for start in range(0, len(images), CHUNK):
    rows = images[start:start + CHUNK]
    high, low = rows.max(axis=(1, 2)), rows.min(axis=(1, 2))
    flat += int((high - low <= FLAT).all(axis=1).sum())
    largest = max(largest, int(high.max()))
  return Content(len(images), flat, largest, mean, std**2 + mean**2)


def merge_contents(contents: Sequence[Content]) -> Content:
  """The Content of the union of several sets with equally many images."""
  images, flat, largest, mean, square = zip(*contents, strict=True)
  return Content(sum(images), sum(flat), max(largest), np.mean(mean, 0), np.mean(square, 0))


def remarks(content: Content, options: str = '--config.data.') -> tuple[str, ...]:
  """What a user would want to know of images that hardly show anything, in one line each.

  options: the start of the names of the options `background` and `bits`.
  """
  constant = np.sqrt(np.maximum(content.square - content.mean**2, 0.)) <= 1.01 * FLOOR
  channels = [name for name, flag in zip(('red', 'green', 'blue'), constant, strict=True) if flag]
  lines = []
  if content.flat:
    lines.append(
        f'{content.flat:,} of {content.images:,} images have one color throughout and show '
        'nothing. Where they are drawn in transparency, a background shows them: '
        f'{options}background=white')
  if 0 < content.largest < OVERSHOOT * 64:
    used = 8 + int(content.largest / OVERSHOOT).bit_length()
    bits = next(bits for bits in (10, 12, 14) if bits >= used)
    lines.append(
        f'no pixel is brighter than {content.largest} of 255. Where gray images of 16 bits use '
        f'only {bits} of them, {options}bits={bits} restores their brightness')
  if channels and content.largest:
    subject = 'channel is' if len(channels) == 1 else 'channels are'
    lines.append(
        f'the {" and ".join(channels)} {subject} nearly the same in all pixels; the standard '
        'deviation is taken as 1/255, because the measured one is nearly 0')
  return tuple(lines)


def measure_moments(known: Moments | None, images: Callable[[], np.ndarray]
                    ) -> tuple[Moments, tuple[str, ...]]:
  """The moments that are `known`, else those of `images`, with remarks on the images."""
  if known:
    return known, ()
  pixels = images()
  measured = moments(pixels)
  return measured, remarks(measure_content(pixels, measured))

"""The fixed arrays that both sides of a golden comparison see, from seeded generators: NumPy alone, no file.

An array is drawn by its name, so the official code and ours need not agree on an order. Weights are named by their path
in our network, in our layouts: [in out] of a linear layer, [rows columns in out] of a convolution.
"""
import zlib

import numpy as np

B, SIDE, SIZE = 8, 8, 32  # images; pixels of a view; of the image that the crops' whole pixels are of


def generator(name: str) -> np.random.Generator:
  return np.random.default_rng(zlib.crc32(name.encode()))


def weight(path: str, shape: tuple[int, ...]) -> np.ndarray:
  """[shape] float64: a kernel of variance 1 / fan in, a gain within .5 and 1.5, a bias of deviation .3."""
  rng, word = generator(path), path.split('/')[-1]
  if word == 'scale':
    return rng.uniform(.5, 1.5, shape)
  return rng.normal(size=shape) * (.3 if word == 'bias' else 1 / np.sqrt(np.prod(shape[:-1])))


def images(name: str, views: int, side: int = SIDE) -> np.ndarray:
  """[B views side side 3] float64 in [0, 1]."""
  return generator(name).uniform(size=(B, views, side, side, 3))


def head_numbers(name: str, numbers: int) -> np.ndarray:
  """[B numbers] float64 of deviation 1: what a head is told, where its own form is not compared."""
  return generator(name).normal(size=(B, numbers))


def actions(views: int = 2, same_flips: bool = False) -> dict[str, np.ndarray]:
  """What was done to each view, [B views ...]: boxes in whole pixels of SIZE, orders and factors of colors.

  same_flips: an image's views are flipped together, or not at all.
  """
  rng, shape = generator('actions'), (B, views)
  height, width = rng.integers(10, SIZE + 1, (2, *shape))
  top, left = (np.floor(rng.uniform(size=shape) * (SIZE - n + 1)) for n in (height, width))
  jittered = rng.uniform(size=shape) < .8
  order = np.where(jittered[..., None], np.argsort(rng.uniform(size=(*shape, 4)), axis=-1), np.arange(4))
  factors = np.where(jittered[..., None], rng.uniform(.6, 1.4, (*shape, 3)), 1.)
  hue = np.where(jittered, rng.uniform(-.1, .1, shape), 0.)
  flip = rng.uniform(size=shape) < .5
  blurred = rng.uniform(size=shape) < .5
  return {'box': np.stack([top, left, height, width], axis=-1), 'jittered': jittered, 'order': order, 'factors': factors,
          'hue': hue, 'flip': flip[:, :1] | np.zeros(shape, bool) if same_flips else flip,
          'gray': rng.uniform(size=shape) < .4, 'blurred': blurred, 'solarized': rng.uniform(size=shape) < .4,
          'sigma': np.where(blurred, rng.uniform(.1, 2., shape), 0.)}


# Of the linear evaluations: images, features, classes, a batch, epochs, and steps of an epoch (what is left is left out).
N, D, K, BATCH, EPOCHS = 22, 5, 6, 8, 3
PER_EPOCH = N // BATCH


def probed(step: int) -> np.ndarray:
  """[BATCH D] float64: the features of the crops that a step sees."""
  return np.abs(generator(f'probe {step}').normal(size=(BATCH, D)))


def probe_labels() -> np.ndarray:
  return generator('probe labels').integers(0, K, N)


def probe_order(epoch: int) -> np.ndarray:
  return generator(f'probe order {epoch}').permutation(N)


def probe_rows(step: int) -> np.ndarray:
  """The images of a step."""
  return np.split(probe_order(step // PER_EPOCH)[:PER_EPOCH * BATCH], PER_EPOCH)[step % PER_EPOCH]

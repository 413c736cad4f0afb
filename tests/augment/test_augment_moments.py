"""A million draws have the moments of the closed forms, and those that EquiMod's authors published."""
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from equivariant_ssl import augment, registry
from equivariant_ssl.keys import key_for

CHUNK, CHUNKS = 125_000, 8
DRAWS = CHUNK * CHUNKS

# EquiMod's p_mean and p_std (github.com/ADevillers/EquiMod, main.py), SimCLR branches; crop in pixels of 32 x 32.
# Order: crop top, left, height, width; flip; jitter flag, order, brightness, contrast, saturation, hue; gray; blur.
CIFAR_MEAN = (4.3122, 4.3216, 23.369, 23.374, .49998, .80087, 1.2025, 1.4007, 1.5964, 1.8004,
              .99993, 1.0002, .99986, 2.2321e-7, .19965)
CIFAR_STD = (3.9740, 3.9851, 4.9544, 4.9539, .5, .3993, 1.1651, 1.0210, 1.0200, 1.1669,
             .2066, .2068, .2066, .0517, .3997)
IMAGENET_MEAN = (.49905, .80054, 1.1998, 1.3994, 1.6014, 1.7995, 1.0001, 1.0, 1.0005, 1.564e-4, .20018, .5003, .52507)
IMAGENET_STD = (.5, .39959, 1.1661, 1.0201, 1.0201, 1.1657, .41347, .41323, .41349, .10333, .40013, .5, .65251)


def flag(p):
  return [(p, math.sqrt(p * (1 - p)))]


def jitter(p, b, c, s, h):
  """(mean, std) of the flag, the four slots of the order, the three factors and the hue."""
  means = [p * 1.5 + (1 - p) * k for k in range(4)]
  order = [(mean, math.sqrt(p * 3.5 + (1 - p) * k * k - mean * mean)) for k, mean in enumerate(means)]
  factors = [(1., math.sqrt(p * x * x / 3)) for x in (b, c, s)]
  return flag(p) + order + factors + [(0., math.sqrt(p * h * h / 3))]


def blur(q, low, high):
  mean = q * (low + high) / 2
  return flag(q) + [(mean, math.sqrt(q * ((low + high) ** 2 / 4 + (high - low) ** 2 / 12) - mean * mean))]


def moments(op, numbers, size):
  """Mean and standard deviation of `numbers(action)` over DRAWS draws."""
  # Unlike the rest of the suite, worth optimizing: most of the time is spent running.
  @functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 3})
  def chunk(first):
    def one(i):
      return numbers(op.sample(key_for(jax.random.key(7), i), jnp.array(size, jnp.float32)))
    return jax.vmap(one)(first + jnp.arange(CHUNK))
  draws = np.concatenate([np.asarray(chunk(jnp.int32(i * CHUNK))) for i in range(CHUNKS)]).astype(np.float64)
  return draws.mean(axis=0), draws.std(axis=0)


def flat(*parts):
  return jnp.concatenate([jnp.ravel(p).astype(jnp.float32) for p in parts])


def same(got, want, std, what):
  """Within 1 % or four standard errors, the larger; within .01 where the mean is 0."""
  want, std = np.asarray(want), np.asarray(std)
  allowed = np.maximum(.01 * np.abs(want), 4 * std / math.sqrt(DRAWS))
  allowed = np.where(np.abs(want) < 1e-3, .01, allowed)
  wrong = np.abs(got - want) > allowed
  assert not wrong.any(), f'{what}: components {np.flatnonzero(wrong)} are {got[wrong]}, not {want[wrong]}'


@pytest.fixture(scope='module')
def cifar():
  op = augment.chain(registry.make(augment, 'crop', scale=(.2, 1.)),
                     *(registry.make(augment, n) for n in ('flip', 'jitter', 'gray', 'vflip', 'solarize', 'rotate')))
  def numbers(a):
    return flat(32 * jnp.stack(a['crop']), a['flip'].applied, *a['jitter'], a['gray'].applied,
                a['vflip'].applied, a['solarize'].applied, jax.nn.one_hot(a['rotate'].turns, 4))
  return moments(op, numbers, (32, 32))


@pytest.fixture(scope='module')
def imagenet():
  strong = registry.make(augment, 'jitter', brightness=.8, contrast=.8, saturation=.8, hue=.2)
  op = augment.chain(strong, *(registry.make(augment, n) for n in ('flip', 'gray', 'blur')))
  def numbers(a):
    return flat(a['flip'].applied, *a['jitter'], a['gray'].applied, *a['blur'])
  return moments(op, numbers, (224, 224))


def test_closed_forms(cifar, imagenet):
  forms = np.array(flag(.5) + jitter(.8, .4, .4, .4, .1) + flag(.2) + flag(.5) + flag(.2) + 4 * flag(.25)).T
  for got, want in zip((c[4:] for c in cifar), forms, strict=True):
    same(got, want, forms[1], 'CIFAR')
  forms = np.array(flag(.5) + jitter(.8, .8, .8, .8, .2) + flag(.2) + blur(.5, .1, 2.)).T
  for got, want in zip(imagenet, forms, strict=True):
    same(got, want, forms[1], 'ImageNet')


def test_published_constants(cifar, imagenet):
  for got, want in zip((c[:15] for c in cifar), (CIFAR_MEAN, CIFAR_STD), strict=True):
    same(got, want, CIFAR_STD, 'CIFAR')
  for got, want in zip(imagenet, (IMAGENET_MEAN, IMAGENET_STD), strict=True):
    same(got, want, IMAGENET_STD, 'ImageNet')


def reference_boxes(rng, many, height, width, scale=(.08, 1.), ratio=(3 / 4, 4 / 3)):
  """torchvision's RandomResizedCrop.get_params, `many` at once, in float64: [many 4] top, left, height, width."""
  area = height * width * rng.uniform(*scale, (many, 10))
  aspect = np.exp(rng.uniform(*np.log(ratio), (many, 10)))
  w, h = np.round(np.sqrt(area * aspect)), np.round(np.sqrt(area / aspect))
  fits = (0 < w) & (w <= width) & (0 < h) & (h <= height)
  first, found, rows = fits.argmax(axis=1), fits.any(axis=1), np.arange(many)
  if width / height < ratio[0]:
    fallback = round(width / ratio[0]), width
  elif width / height > ratio[1]:
    fallback = height, round(height * ratio[1])
  else:
    fallback = height, width
  h, w = np.where(found, h[rows, first], fallback[0]), np.where(found, w[rows, first], fallback[1])
  top, left = rng.integers(0, height - h.astype(int) + 1), rng.integers(0, width - w.astype(int) + 1)
  top, left = np.where(found, top, (height - h) // 2), np.where(found, left, (width - w) // 2)
  return np.stack([top, left, h, w], axis=1), found


def drawn_boxes(op, many):
  """(height, width) -> [many 4] boxes in pixels; the size is traced, so one compilation serves all."""
  @jax.jit
  def draw(size):
    return jax.vmap(lambda i: jnp.stack(op.sample(key_for(jax.random.key(3), i), size)))(jnp.arange(many))
  return lambda h, w: np.asarray(draw(jnp.array([h, w], jnp.float32)), np.float64) * np.array([h, w, h, w])


def test_boxes_are_those_of_torchvision():
  """For images square, photographic, thin (half the draws fall back) and hopeless (all fall back, to one box)."""
  many = 100_000
  draw, rng = drawn_boxes(registry.make(augment, 'crop'), many), np.random.default_rng(0)
  fallbacks = {}
  for size in [(32, 32), (375, 500), (500, 333), (20, 200), (200, 20), (20, 2000)]:
    want, found = reference_boxes(rng, many, *size)
    got = draw(*size)
    fallbacks[size] = 1 - found.mean()
    assert np.abs(got - np.round(got)).max() < 2e-3, f'{size}: not whole pixels'
    got = np.round(got)
    assert (got[:, 2:] >= 1).all() and (got[:, :2] >= 0).all() and (got[:, :2] + got[:, 2:] <= size).all()
    for what, f in {'top': lambda b: b[:, 0], 'left': lambda b: b[:, 1], 'height': lambda b: b[:, 2],
                    'width': lambda b: b[:, 3], 'area': lambda b: b[:, 2] * b[:, 3],
                    'aspect': lambda b: b[:, 3] / b[:, 2]}.items():
      a, b = np.sort(f(got)), np.sort(f(want))
      at = np.union1d(a, b)
      gap = np.abs(np.searchsorted(a, at, 'right') - np.searchsorted(b, at, 'right')).max() / many
      assert gap < 2.2 * math.sqrt(2 / many), f'{size}: {what} is distributed otherwise (gap {gap:.4f})'
  assert .2 < fallbacks[20, 200] < .8 and fallbacks[20, 2000] == 1 and fallbacks[32, 32] < .01, fallbacks


def test_erased_boxes_are_those_of_torchvision():
  """Area uniform in (.02, .33), height / width log-uniform in (.3, 3.3), whole pixels, anywhere, smaller than the image."""
  erase = augment.sometimes(1., registry.make(augment, 'erase', p=1.))
  size = jnp.array([120., 100.])
  drawn = jax.jit(jax.vmap(lambda i: erase.sample(key_for(jax.random.key(3), i), size)))(jnp.arange(20_000))
  top, left, height, width = (np.asarray(x, np.float64) * n for x, n in zip(drawn[1:], (120, 100, 120, 100), strict=True))
  assert drawn.applied.all() and np.abs(top - np.round(top)).max() < 1e-3 and np.abs(width - np.round(width)).max() < 1e-3
  assert (top + height <= 120.001).all() and (left + width <= 100.001).all() and max(height) < 120 and max(width) < 100
  area, aspect = height * width / 12_000, np.log(height / width)
  # A few of the longest boxes do not fit and are drawn again.
  assert abs(area.mean() - .175) < .004 and abs(area.std() - .31 / math.sqrt(12)) < .003
  assert abs(aspect.mean()) < .05 and abs(aspect.std() - math.log(11) / math.sqrt(12)) < .03
  assert abs((top / (120 - height)).mean() - .5) < .01 and abs((left / (100 - width)).mean() - .5) < .01


def test_boxes_without_snapping_keep_area_and_aspect():
  boxes = drawn_boxes(registry.make(augment, 'crop', scale=(.2, .5), snap=False), 10_000)(37, 41)
  area, aspect = boxes[:, 2] * boxes[:, 3] / (37 * 41), boxes[:, 3] / boxes[:, 2]
  assert .2 - 1e-5 < area.min() < .203 and .497 < area.max() < .5 + 1e-5
  assert .75 - 1e-5 < aspect.min() < .753 and 1.33 < aspect.max() < 4 / 3 + 1e-5
  assert abs(np.log(aspect).mean()) < .01 and (boxes[:, :2] + boxes[:, 2:] <= np.array([37, 41]) + 1e-4).all()
  assert np.abs(boxes - np.round(boxes)).max() > .4

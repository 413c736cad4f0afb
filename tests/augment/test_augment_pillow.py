"""Every op, given an action, makes of a real photograph what Pillow makes of it (torchvision's own backend)."""
import colorsys
import itertools
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image as Pil
from PIL import ImageEnhance, ImageOps
from sklearn.datasets import load_sample_images

from equivariant_ssl import augment, registry
from equivariant_ssl.augment import jitter
from equivariant_ssl.augment.crop import Crop
from equivariant_ssl.augment.flip import Flip
from equivariant_ssl.augment.gray import Gray
from equivariant_ssl.augment.invert import Invert
from equivariant_ssl.augment.jigsaw import Jigsaw, permutations
from equivariant_ssl.augment.posterize import Posterize
from equivariant_ssl.augment.rotate import Rotate
from equivariant_ssl.augment.solarize import Solarize
from equivariant_ssl.augment.vflip import VFlip
from equivariant_ssl.types import Image

HEIGHT, WIDTH = 48, 40
LEVEL = 1 / 255


@pytest.fixture(scope='module')
def photos():
  """[16 48 40 3] uint8: patches of scikit-learn's two photographs, shrunk to hold edges as well as areas."""
  patches = []
  for photo in load_sample_images().images:
    small = np.asarray(Pil.fromarray(photo).resize((WIDTH * 4, HEIGHT * 2), Pil.Resampling.LANCZOS))
    patches += list(small.reshape(2, HEIGHT, 4, WIDTH, 3).swapaxes(1, 2).reshape(8, HEIGHT, WIDTH, 3))
  return np.stack(patches)


def square(photos):
  return photos[:, :WIDTH]


_compiled = {}


def ours(name, photos, actions, **kw):
  """The op on uint8 photographs, one action each, as float levels 0..255 before rounding."""
  at = name, tuple(kw.items())
  if at not in _compiled:
    apply = registry.make(augment, name, **kw).apply
    _compiled[at] = jax.jit(jax.vmap(
        lambda pixels, action: apply(action, Image(pixels, jnp.array(pixels.shape[:2], jnp.float32))).pixels))
  return 255. * np.asarray(_compiled[at](photos.astype(np.float32) / np.float32(255), actions), np.float64)


def repeated(photos, action):
  return jax.tree.map(lambda a: np.broadcast_to(a, (len(photos), *np.shape(a))), action)


def pillow(photos, function):
  return np.stack([np.asarray(function(Pil.fromarray(photo))) for photo in photos]).astype(np.float64)


def enhance(kind, factor):
  return lambda photo: kind(photo).enhance(factor)


def jittered(**changed):
  neutral = registry.make(augment, 'jitter').identity(jnp.ones(2))
  return neutral._replace(applied=jnp.array(True), **{k: jnp.float32(v) for k, v in changed.items()})


def pil_hue(turns):
  """torchvision's hue on a PIL image: the 8-bit H channel shifted modulo 256."""
  def shift(photo):
    hue, *others = photo.convert('HSV').split()
    hue = Pil.fromarray(np.asarray(hue) + np.array(int(turns * 255) % 256, np.uint8))
    return Pil.merge('HSV', (hue, *others)).convert('RGB')
  return shift


COLORS = {'brightness': ImageEnhance.Brightness, 'contrast': ImageEnhance.Contrast, 'saturation': ImageEnhance.Color}


@pytest.mark.parametrize('factor', [.2, .6, .93, 1., 1.27, 1.4, 1.8])
@pytest.mark.parametrize('name', COLORS)
def test_blends_equal_pillow(photos, name, factor):
  got = ours('jitter', photos, repeated(photos, jittered(**{name: factor})))
  worst = np.abs(np.round(got) - pillow(photos, enhance(COLORS[name], factor))).max()
  assert worst <= 1, f'{name} x {factor} is {worst} levels from Pillow'


@pytest.mark.parametrize('turns', [-.5, -.2, -.1, -.03, .0, .06, .1, .2, .5])
def test_hue_equals_pillow_on_average(photos, turns):
  got = ours('jitter', photos, repeated(photos, jittered(hue=turns)))
  mean = np.abs(np.round(got) - pillow(photos, pil_hue(turns))).mean()
  assert mean <= 1, f'hue {turns} is {mean:.2f} levels from Pillow on average'


@pytest.mark.parametrize('turns', [-.37, -.1, .0314, .1, .5])
def test_hue_equals_colorsys(photos, turns):
  got = ours('jitter', photos, repeated(photos, jittered(hue=turns)))[:2] / 255
  turns = float(np.float32(turns))
  def reference(rgb):
    h, s, v = colorsys.rgb_to_hsv(*(rgb / 255.))
    return colorsys.hsv_to_rgb((h + turns) % 1., s, v)
  want = np.apply_along_axis(reference, -1, photos[:2].astype(np.float64))
  assert np.abs(got - want).max() < 1e-5


def test_order_is_followed(photos):
  """Several changes in one action are the single ones, in the action's order."""
  orders = np.array([[0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1], [1, 3, 0, 2]], np.int32)
  amounts = {'brightness': 1.3, 'contrast': .7, 'saturation': 1.4, 'hue': .08}
  for order in orders:
    want = photos
    for change in order:
      name = list(amounts)[change]
      want = ours('jitter', want / 1., repeated(want, jittered(**{name: amounts[name]})))
    got = ours('jitter', photos, repeated(photos, jittered(**amounts)._replace(order=jnp.array(order))))
    # Steps of hue and clipping amplify a float's rounding, not more.
    assert np.abs(got - want).max() < 1e-2, f'order {order}'


def test_the_two_passes_of_accelerators_are_the_scans_of_the_cpu(photos):
  """In each of the 24 orders. The means are added in another order, so that they differ by roundings."""
  orders = jnp.array(list(itertools.permutations(range(4))), jnp.int32)
  shift = lambda x: jitter.shift_hue(x, .08)

  @jax.jit
  @jax.vmap
  def both(order):
    action = jittered(brightness=1.3, contrast=.4, saturation=1.4, hue=.08)._replace(order=order)
    pixels = jnp.float32(photos[0]) / 255
    return jitter.changed(action, pixels, jitter.blend, shift), jitter.changed_at_once(action, pixels)
  scans, passes = both(orders)
  assert np.abs(scans - passes).max() < 1e-2 / 255
  assert np.abs(scans[:, None] - scans[None]).max((2, 3, 4)).max(1).min() > LEVEL  # the orders differ


@pytest.mark.parametrize('name, action, function', [
    ('flip', Flip(True), ImageOps.mirror), ('vflip', VFlip(True), ImageOps.flip),
    ('gray', Gray(True), lambda photo: photo.convert('L').convert('RGB')),
    ('solarize', Solarize(True), lambda photo: ImageOps.solarize(photo, 128)),
    ('invert', Invert(True), ImageOps.invert),
    *(('posterize', Posterize(True, np.int32(8 - bits)), lambda photo, bits=bits: ImageOps.posterize(photo, bits))
      for bits in (1, 4, 7)),
    ('rotate', Rotate(1), lambda photo: photo.transpose(Pil.Transpose.ROTATE_90)),
    ('rotate', Rotate(2), lambda photo: photo.transpose(Pil.Transpose.ROTATE_180)),
    ('rotate', Rotate(3), lambda photo: photo.transpose(Pil.Transpose.ROTATE_270))])
def test_whole_ops_equal_pillow(photos, name, action, function):
  photos = square(photos)
  got = np.round(ours(name, photos, repeated(photos, action)))
  worst = np.abs(got - pillow(photos, function)).max()
  assert worst <= (1 if name == 'gray' else 0), f'{name} is {worst} levels from Pillow'


def boxes(many):
  """Boxes of whole pixels, among them the whole image, a single pixel, thin ones and corners."""
  rng = np.random.default_rng(0)
  found = [(0, 0, HEIGHT, WIDTH), (5, 7, 1, 1), (0, 3, HEIGHT, 2), (10, 0, 3, WIDTH), (HEIGHT - 9, WIDTH - 9, 9, 9)]
  while len(found) < many:
    h, w = rng.integers(4, HEIGHT + 1), rng.integers(4, WIDTH + 1)
    found.append((rng.integers(0, HEIGHT - h + 1), rng.integers(0, WIDTH - w + 1), h, w))
  return np.array(found, np.int64)


def cut_and_resize(photo, box, size, filter):
  """Columns, then rows: one pass a call, since Pillow 13 takes the rows first where that is faster."""
  top, left, height, width = map(int, box)
  cut = Pil.fromarray(photo).crop((left, top, left + width, top + height))
  return np.asarray(cut.resize((size, height), filter).resize((size, size), filter), np.float64)


@pytest.mark.parametrize('size', [32, 12])  # 32: some boxes shrink and some grow; 12: most shrink
@pytest.mark.parametrize('method', ['bicubic', 'bilinear'])
def test_crop_equals_pillow(photos, method, size):
  box, filter = boxes(96), Pil.Resampling[method.upper()]
  photos = np.repeat(photos, 6, axis=0)
  top, left, height, width = box.T.astype(np.float32) / np.float32([[HEIGHT], [WIDTH], [HEIGHT], [WIDTH]])
  got = np.round(ours('crop', photos, Crop(top, left, height, width), size=size, method=method))
  want = np.stack([cut_and_resize(p, b, size, filter) for p, b in zip(photos, box, strict=True)])
  error = np.abs(got - want)
  each = error.mean(axis=(1, 2, 3))
  assert error.max() <= 2, f'box {box[error.max(axis=(1, 2, 3)).argmax()]} is {error.max()} levels from Pillow'
  assert each.max() <= .5, f'box {box[each.argmax()]} is {each.max():.2f} levels from Pillow on average'


def keys_weights(start, length, side, size, a=Fraction(-1, 2)):
  """The rows of a resized line, in rationals, from the definition: cut, antialias, normalize."""
  scale = Fraction(length) / size
  reach, rows = max(scale, 1), []
  for i in range(size):
    row = []
    for j in range(side):
      x = abs(Fraction(start) + (Fraction(2 * i + 1, 2)) * scale - Fraction(2 * j + 1, 2)) / reach
      k = (a + 2) * x**3 - (a + 3) * x**2 + 1 if x < 1 else (a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0)
      row.append(k if start <= Fraction(2 * j + 1, 2) < start + length else 0)
    rows.append([float(k / sum(row)) for k in row])
  return np.array(rows)


@pytest.mark.parametrize('start, length', [('0', '12'), ('2.5', '7.25'), ('1.75', '3.5'), ('11.5', '.5')])
def test_fractional_boxes_equal_the_definition(photos, start, length):
  start, length = Fraction(start), Fraction(length)
  pixels = photos[:1, :12, :12]
  box = repeated(pixels, Crop(*(np.float32(v / 12) for v in (start, start, length, length))))
  if length < 1:  # thinner than a pixel: the pixel that it falls in
    start, length = Fraction(11), Fraction(1)
  weights = keys_weights(start, length, 12, 12)
  want = np.clip(np.einsum('pw,hwc->hpc', weights, pixels[0] / 255.), 0, 1)
  want = np.clip(np.einsum('qh,hpc->qpc', weights, want), 0, 1)
  assert np.abs(ours('crop', pixels, box, size=12)[0] / 255 - want).max() < 2e-6


@pytest.mark.parametrize('sigma', [.1, .7, 2., 20.])
@pytest.mark.parametrize('height', [HEIGHT, 12])  # 12 is as low as 23 pixels can be reflected in
def test_blur_equals_its_definition(photos, sigma, height):
  """torchvision's gaussian_blur in float64: the separable kernel of 23 pixels, the border reflected."""
  photos = photos[:2, :height]
  bell = np.exp(-.5 * (np.arange(-11, 12) / np.float64(np.float32(sigma))) ** 2)
  bell /= bell.sum()
  padded = np.pad(photos / 255., [(0, 0), (11, 11), (11, 11), (0, 0)], mode='reflect')
  rows = sum(b * padded[:, i:i + height] for i, b in enumerate(bell))
  want = sum(b * rows[:, :, i:i + WIDTH] for i, b in enumerate(bell))
  blur = registry.make(augment, 'blur')
  action = blur.identity(jnp.ones(2))._replace(applied=np.True_, sigma=np.float32(sigma))
  got = ours('blur', photos, repeated(photos, action)) / 255
  assert np.abs(got - want).max() < 1e-6


def test_blends_equal_torchvision_in_float64(photos):
  """Before rounding: the blends of torchvision's float path, about gray by Pillow's weights."""
  x = photos / 255.
  gray = x @ np.array([.299, .587, .114])
  other = {'brightness': 0., 'contrast': gray.mean(axis=(1, 2))[:, None, None, None], 'saturation': gray[..., None]}
  for name, blank in other.items():
    want = np.clip(1.7 * x - .7 * blank, 0, 1)
    got = ours('jitter', photos, repeated(photos, jittered(**{name: 1.7}))) / 255
    assert np.abs(got - want).max() < 2e-6, name
  assert (jitter.BRIGHTNESS, jitter.CONTRAST, jitter.SATURATION, jitter.HUE) == (0, 1, 2, 3)


@pytest.mark.parametrize('grid', [2, 4])
def test_a_jigsaw_moves_whole_tiles(photos, grid):
  """Without its treatment: cell c shows tile orders[k, c], pixel for pixel."""
  photos, orders = square(photos)[:, :32, :32], permutations(grid)
  drawn = np.arange(len(photos), dtype=np.int32)
  got = ours('jigsaw', photos, Jigsaw(drawn >= 0, drawn), grid=grid, gap=0., level=False)
  side = 32 // grid
  for photo, view, order in zip(photos, np.round(got), orders, strict=False):
    for cell, tile in enumerate(order):
      (y, x), (v, u) = (np.multiply(divmod(c, grid), side) for c in (cell, tile))
      assert np.array_equal(view[y:y + side, x:x + side], photo[v:v + side, u:u + side])


def test_a_turn_by_quarters_and_an_affine_turn(photos):
  """Counter-clockwise, as Pillow's: inside its disc a quarter turn is the smoothed picture, turned; so is an affine's."""
  photos = square(photos)[:, :, :WIDTH]
  turn = registry.make(augment, 'turn').identity(jnp.ones(2))._replace(applied=np.True_)
  views = [ours('turn', photos, repeated(photos, turn._replace(angle=np.float32(90 * k)))) for k in range(4)]
  for k in range(4):
    assert np.abs(np.rot90(views[0], k, (1, 2)) - views[k]).max() < .05
  affine = registry.make(augment, 'affine').identity(jnp.ones(2))._replace(applied=np.True_, scale=np.float32(1.2))
  moved = [ours('affine', photos, repeated(photos, affine._replace(angle=np.float32(a)))) for a in (0, 90)]
  assert np.abs(np.rot90(moved[0], 1, (1, 2)) - moved[1]).max() < .5


def test_the_noise_of_an_erased_box_is_that_of_its_action(photos):
  erase = registry.make(augment, 'erase').identity(jnp.ones(2))
  boxes = [erase._replace(applied=np.True_, **{k: np.float32(v) for k, v in zip(erase._fields[1:], box, strict=True)})
           for box in ((.25, .5, .5, .25), (.25, .5, .5, .25), (.25, .45, .5, .25))]
  views = [ours('erase', square(photos)[:1], repeated(photos[:1], box), fill='noise')[0] for box in boxes]
  inside = np.zeros((WIDTH, WIDTH), bool)
  inside[10:30, 20:30] = True
  assert np.array_equal(views[0], views[1]) and not np.array_equal(views[0], views[2])
  assert np.array_equal(np.round(views[0][~inside]), square(photos)[0][~inside])
  assert (views[0][inside] != square(photos)[0][inside]).mean() > .9 and 100 < views[0][inside].mean() < 155

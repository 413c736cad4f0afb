"""Can a network that has learned nothing read a transformation off the view? Then a trace shows it, and not the picture.

  python benchmarks/shortcuts.py [--photographs cifar10.npz] [--train 3000] [--test 2000]

Prints, for white and 1/f noise, how often a linear probe of a random shallow network names what was done to held-out
images, beside the share of the commonest class. It prints the same for photographs, where a high share is no fault, because
upright pictures show a turn. cifar10.npz is the file that the project's data script writes (`train_images` uint8
[N 32 32 3]).
"""
import argparse
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.ndimage import map_coordinates

from equivariant_ssl import augment, registry
from equivariant_ssl.augment.turn import Turn, rotation
from equivariant_ssl.keys import key_for
from equivariant_ssl.types import Action, Array, Image, Key, Op, Size

SIDE = 32
CHUNK = 500
BAR = .05   # above chance


class Case(NamedTuple):
  """A chain, and its questions: {question: the class [N] of each of the chain's actions}."""
  op: Op
  questions: dict[str, Callable[[Action], np.ndarray]]


class Answer(NamedTuple):
  """Two shares of the held-out images: those whose class is named rightly, and those of the commonest class."""
  right: float
  chance: float


@functools.cache
def noise(kind: str, many: int) -> np.ndarray:
  """[many 32 32 3] uint8, isotropic and Gaussian: 'white', or '1/f', where each frequency has the amplitude 1 / |f|."""
  rng = np.random.default_rng(0)
  if kind == 'white':
    field = rng.standard_normal((many, SIDE, SIDE, 3), np.float32)
  else:
    side = 3 * SIDE // 2  # a part of a period: no border continues at the one across
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
    frequency[0, 0] = np.inf
    field = np.concatenate([
        np.fft.irfft2(np.fft.rfft2(rng.standard_normal((n, 3, side, side), np.float32)) / frequency.astype(np.float32))
        [..., :SIDE, :SIDE].transpose(0, 2, 3, 1) for n in [CHUNK] * (many // CHUNK)])
  return np.clip(np.round(127.5 + 40 * field / field.std()), 0, 255).astype(np.uint8)


def features(views: Array) -> Array:
  """[B 32 32 3] -> [B D]. Two random convolutions have ReLUs. The features are the mean and the mean square of each channel
  of both, and the mean of each channel of the second in each of 3 x 3 places."""
  rng, x, found = np.random.default_rng(1), (views - .5) / .16, []
  for channels, stride in ((12, 1), (24, 2)):
    kernel = (rng.standard_normal((3, 3, x.shape[-1], channels)) / np.sqrt(9 * x.shape[-1])).astype(np.float32)
    x = jax.nn.relu(jax.lax.conv_general_dilated(
        x, jnp.asarray(kernel), (stride, stride), 'VALID', dimension_numbers=('NHWC', 'HWIO', 'NHWC')))
    found += [x.mean((1, 2)), jnp.square(x).mean((1, 2))]
  B, h, w, C = x.shape
  places = x[:, :h // 3 * 3, :w // 3 * 3].reshape(B, 3, h // 3, 3, w // 3, C).mean((2, 4))
  return jnp.concatenate([*found, places.reshape(B, -1)], axis=1)


def draw_views(op: Op, sets: dict[str, np.ndarray]) -> dict[str, tuple[np.ndarray, Action]]:
  """{name: ([N D] features, actions [N ...])} of one view of each image of `sets` {name: [N 32 32 3] uint8}. N is a
  multiple of CHUNK."""
  def one(i: Array, x: Array) -> tuple[Array, Action]:
    view, action = augment.augment(op, key_for(jax.random.key(3), i), Image(x, jnp.full(2, SIDE, jnp.float32)))
    return view.pixels, action

  @functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 3})  # the tests turn it off elsewhere
  def chunk(first: Array, pixels: Array) -> tuple[Array, Action]:
    views, actions = jax.vmap(one)(first + jnp.arange(CHUNK), pixels.astype(jnp.float32) / 255.)
    return features(views), actions
  return {name: jax.tree.map(lambda *a: np.concatenate(a), *(
      chunk(np.int32(i), pixels[i:i + CHUNK]) for i in range(0, len(pixels), CHUNK))) for name, pixels in sets.items()}


def probed(x: np.ndarray, label: np.ndarray, train: int) -> Answer:
  """Ridge regression of the classes `label` [N] on standardized features x [N D], fitted to the first `train` rows."""
  one_hot = np.eye(label.max() + 1)[label]
  mean = one_hot[:train].mean(axis=0)
  gram = x[:train].T @ x[:train] + .03 * train * np.eye(x.shape[1])
  named = (x[train:] @ np.linalg.solve(gram, x[:train].T @ (one_hot[:train] - mean)) + mean).argmax(axis=1)
  return Answer((named == label[train:]).mean(), one_hot[train:].mean(axis=0).max())


def answer_questions(case: Case, sets: dict[str, np.ndarray], train: int) -> dict[tuple[str, str], Answer]:
  """{(set, question): the answer on all images after the first `train`, from which it is learned}."""
  answers = {}
  for name, (x, actions) in draw_views(case.op, sets).items():
    x = x.astype(np.float64)
    x = (x - x[:train].mean(axis=0)) / (x[:train].std(axis=0) + 1e-6)
    for question, classes in case.questions.items():
      answers[name, question] = probed(x, np.asarray(classes(actions)).astype(int), train)
  return answers


def thirds(x: np.ndarray) -> np.ndarray:
  return np.searchsorted(np.quantile(x, [1 / 3, 2 / 3]), x)


def often_in_place(op: Op) -> Op:
  """The jigsaw `op`, where half of the draws have every tile in its place: the order that borders show most easily."""
  def sample(key: Key, size: Size) -> Action:
    drawn = op.sample(key_for(key, 'order'), size)
    return drawn._replace(order=jnp.where(jax.random.bernoulli(key_for(key, 'in place')), 0, jnp.maximum(drawn.order, 1)))
  return op._replace(sample=sample)


def quadrant(box) -> np.ndarray:
  """The quadrant of the box's center. (Thirds would depend on the size too, because a large box is near the middle.)"""
  return 2 * (box.top + box.height / 2 > .5) + (box.left + box.width / 2 > .5)


def angles(of: Callable[[Action], np.ndarray]) -> dict[str, Callable[[Action], np.ndarray]]:
  """Two classes: the eighth of the circle, and the distance to the nearest quarter turn, on which a resampling depends."""
  return {'angle, eighths': lambda a: (of(a) + 180) // 45 % 8,
          'angle off the axes, thirds': lambda a: thirds(np.abs((of(a) + 45) % 90 - 45))}


def naive_turn() -> Op:
  """A turn by bilinear interpolation with black corners, which leaves traces."""
  def apply(action: Turn, image: Image) -> Image:
    at = jnp.stack(jnp.meshgrid(*[jnp.arange(SIDE, dtype=jnp.float32) - (SIDE - 1) / 2] * 2, indexing='ij'))
    at = jnp.einsum('ij,jhw->ihw', rotation(action.angle), at) + (SIDE - 1) / 2
    with jax.numpy_dtype_promotion('standard'):
      return image._replace(pixels=jax.vmap(lambda c: map_coordinates(c, list(at), 1), 2, 2)(image.pixels))
  return registry.make(augment, 'turn')._replace(name='naive', apply=apply)


IN_PLACE = {'tiles in place': lambda a: a['jigsaw'].order == 0}


def cases() -> dict[str, Case]:
  """Every op whose action must not be readable, in a chain; and naive ops, whose action is readable."""
  def chain(*ops: Op) -> Op:
    return augment.chain(*ops)

  def make(name: str, **kw) -> Op:
    return registry.make(augment, name, **kw)
  crop = make('crop', scale=(.2, 1.))
  return {
      'crop, flip, vflip': Case(chain(crop, make('flip'), make('vflip')), {
          'crop, quadrant': lambda a: quadrant(a['crop']), 'flip': lambda a: a['flip'].applied,
          'vflip': lambda a: a['vflip'].applied}),
      'crop, rotate': Case(chain(crop, make('rotate')), {'turns': lambda a: a['rotate'].turns}),
      **{f'jigsaw {grid} x {grid}': Case(chain(make('jigsaw', grid=grid)), {'order': lambda a: a['jigsaw'].order})
         for grid in (2, 4)},
      **{f'jigsaw {grid} x {grid}, often in place': Case(chain(often_in_place(make('jigsaw', grid=grid))), IN_PLACE)
         for grid in (2, 4)},
      'turn': Case(chain(make('turn')), angles(lambda a: a['turn'].angle)),
      'affine': Case(chain(make('affine')), {
          **angles(lambda a: a['affine'].angle),
          **{f'{field}, thirds': lambda a, field=field: thirds(getattr(a['affine'], field))
             for field in ('scale', 'down', 'right', 'shear')}}),
  }


def naive() -> dict[str, Case]:
  """The same ops without treatment: the probe must find their traces."""
  cut = registry.make(augment, 'jigsaw', gap=0., level=False)
  return {'naive turn': Case(augment.chain(naive_turn()), angles(lambda a: a['naive'].angle)),
          'naive jigsaw': Case(augment.chain(often_in_place(cut)), IN_PLACE)}


def pictures(file: str, many: int) -> np.ndarray:
  """The first `many` training images of an .npz, [many 32 32 3] uint8."""
  with np.load(file) as data:
    return data['train_images'][:many]


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--photographs', default='')
  parser.add_argument('--train', type=int, default=3000)
  parser.add_argument('--test', type=int, default=2000)
  given = parser.parse_args()
  many = given.train + given.test
  sets = {kind: noise(kind, many) for kind in ('white', '1/f')}
  if given.photographs:
    sets['photographs'] = pictures(given.photographs, many)
  print('| chain | asked | chance | ' + ' | '.join(sets) + ' |\n|---|---|' + '---|' * (1 + len(sets)))
  for chain, case in {**cases(), **naive()}.items():
    answers = answer_questions(case, sets, given.train)
    for question in case.questions:
      row = [answers[name, question] for name in sets]
      figures = ' | '.join(f'{a.right:.1%}' for a in row)
      print(f'| {chain} | {question} | {row[0].chance:.1%} | {figures} |', flush=True)


if __name__ == '__main__':
  main()

"""The laws of house.md section 5 for every op that is found.

A new file in `equivariant_ssl/augment/` with a `make` is under test here the moment it exists.
"""
import functools
import inspect
import re
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pictures import PICTURES, SIZE, images, repeated, rows, same, sampler, shards

from equivariant_ssl import augment, registry
from equivariant_ssl.augment.algebra import resize
from equivariant_ssl.errors import UserError
from equivariant_ssl.keys import key_for
from equivariant_ssl.types import Action, Image, Op

NAMES = registry.names(augment)
MANY = 4096
UNITS = 'bool|fraction|pixel|turn|factor|degree|radian|index|id of|class'


class Case(NamedTuple):
  """One op, MANY draws of it, whether each does nothing; its 8 drawn then 8 identity views, and their gradients."""
  op: Op
  sample: Callable
  identity: Action
  drawn: Action
  idle: np.ndarray
  views: Image
  gradients: np.ndarray


def views_and_gradients(op: Op):
  """(actions, images) -> (views, gradients in the pixels of a random weighing of the view), jitted over a batch."""
  def one(action, image):
    def weighed(pixels):
      view = op.apply(action, image._replace(pixels=pixels))
      return jnp.vdot(view.pixels, jax.random.normal(jax.random.key(5), view.pixels.shape)), view
    gradient, view = jax.grad(weighed, has_aux=True)(image.pixels)
    return view, gradient
  return jax.jit(jax.vmap(one))


@functools.cache
def case(name: str) -> Case:
  op = registry.make(augment, name)
  sample, identity = sampler(op), op.identity(SIZE)
  drawn = sample(np.arange(MANY))
  idle = (rows(drawn, MANY) == rows(repeated(identity, 1), 1)).all(axis=1)
  apart = np.argsort(idle, kind='stable')[:8]  # draws that do something first
  actions = jax.tree.map(lambda a, b: jnp.concatenate([a[apart], b]), drawn, repeated(identity, 8))
  views, gradients = views_and_gradients(op)(actions, images(np.concatenate([PICTURES, PICTURES])))
  return Case(op, sample, identity, drawn, idle, jax.tree.map(np.asarray, views), np.asarray(gradients))


@pytest.fixture(params=NAMES)
def law_case(request) -> Case:
  return case(request.param)


def test_factory_has_defaults_and_the_op_its_files_name():
  for name in NAMES:
    assert all(p.default is not inspect.Parameter.empty
               for p in inspect.signature(registry.factory(augment, name)).parameters.values()), name
    assert registry.make(augment, name).name == name


def test_identity_is_the_plain_resize(law_case):
  plain = jax.vmap(lambda image: resize(image, law_case.views.pixels.shape[1]))(images())
  assert np.abs(law_case.views.pixels[8:] - plain.pixels).max() <= 1e-6
  assert np.array_equal(law_case.views.size[8:], plain.size)


def test_encoding_of_the_identity_is_zero(law_case):
  code = np.asarray(law_case.op.encode(law_case.identity))
  codes = np.asarray(jax.vmap(law_case.op.encode)(law_case.drawn))
  assert code.ndim == 1 and (code == 0).all() and codes.shape == (MANY, *code.shape)
  assert codes.dtype == np.float32 and np.isfinite(codes).all()
  different = np.unique(rows(law_case.drawn, MANY), axis=0)
  assert len(np.unique(codes, axis=0)) == len(different), 'two actions have one encoding'


def test_the_way_between_two_actions(law_case):
  """From an action to itself: nothing; from the identity: what the action tells."""
  def ways(a, b):
    return [augment.relative(law_case.op, *pair) for pair in ((a, a), (law_case.identity, a), (a, b))]
  few = jax.tree.map(lambda a: a[:256], law_case.drawn)
  still, onward, between = jax.jit(jax.vmap(ways))(few, jax.tree.map(lambda a: a[::-1], few))
  codes = np.asarray(jax.vmap(law_case.op.encode)(few))
  assert (still == 0).all() and np.abs(onward - codes).max() <= 1e-6
  assert between.shape == codes.shape and between.dtype == np.float32 and np.isfinite(between).all()


def test_views_stay_images(law_case):
  side = law_case.views.pixels.shape[1]
  assert law_case.views.pixels.shape == (16, side, side, 3) and law_case.views.pixels.dtype == np.float32
  assert law_case.views.pixels.min() >= 0 and law_case.views.pixels.max() <= 1
  assert law_case.views.size.shape == (16, 2) and law_case.views.size.dtype == np.float32


def test_drawn_actions_change_the_image(law_case):
  moved = np.abs(law_case.views.pixels[:2] - law_case.views.pixels[8:10]).reshape(2, -1).max(axis=1)
  assert (moved > 1e-3).all(), 'an action that is not the identity left an image as it was'


def test_gradient_is_finite(law_case):
  assert np.isfinite(law_case.gradients).all()
  assert (np.abs(law_case.gradients).reshape(16, -1).max(axis=1) > 0)[[0, 1, 8, 9]].all()


def test_same_key_same_draw(law_case):
  shifted = law_case.sample(np.arange(MANY) + 64)
  assert same(law_case.drawn, law_case.sample(np.arange(MANY)))
  assert same(jax.tree.map(lambda a: a[64:], law_case.drawn), jax.tree.map(lambda a: a[:-64], shifted))
  assert not same(jax.tree.map(lambda a: a[:64], law_case.drawn), jax.tree.map(lambda a: a[:64], shifted))


def test_vmap_is_a_loop(law_case):
  apply = jax.jit(law_case.op.apply)
  apart = np.argsort(law_case.idle, kind='stable')
  for i in range(3):
    view = apply(jax.tree.map(lambda a: a[apart[i]], law_case.drawn), Image(PICTURES[i], SIZE))
    assert np.abs(view.pixels - law_case.views.pixels[i]).max() <= 1e-6


def test_docstring_of_the_action_states_each_field_with_its_unit(law_case):
  kind = type(law_case.identity)
  for field in kind._fields:
    line = re.search(rf'\b{field}\b[\w, ]*:[^:]*', kind.__doc__)
    assert line and re.search(UNITS, line[0]), \
        f"{kind.__name__}'s docstring must say '{field}: ...' with its unit (one of {UNITS.replace('|', ', ')})"


def test_a_chance_is_an_action(law_case):
  """sometimes(0) is the identity, sometimes(1) the op, else the rate is right: also of a chance within a chance."""
  chances = [augment.sometimes(p, law_case.op)._replace(name=str(p)) for p in (0., .3, 1.)]
  together = jax.jit(jax.vmap(lambda i: [op.sample(key_for(jax.random.key(1), i), SIZE) for op in chances]))
  for p, drawn in zip((0., .3, 1.), together(np.arange(MANY)), strict=True):
    did = (rows(drawn, MANY) != rows(repeated(law_case.identity, 1), 1)).any(axis=1)
    expected = p * (1 - law_case.idle.mean())
    assert abs(did.mean() - expected) <= 5 * np.sqrt(expected * (1 - expected) / MANY) + 1e-9, f'p = {p}'


def test_the_unapplied_can_be_told(law_case):
  """Where doing nothing is drawn with a chance, a bool says so and leads the encoding (or the op is discrete)."""
  if law_case.idle.mean() > .1 and not (law_case.op.choices and 'applied' not in type(law_case.identity)._fields):
    codes = np.asarray(jax.vmap(law_case.op.encode)(law_case.drawn))
    assert law_case.drawn.applied.dtype == bool and np.array_equal(codes[:, 0], law_case.drawn.applied)
    assert np.array_equal(law_case.drawn.applied, ~law_case.idle)


def test_choices_are_the_classes(law_case):
  """All actions of a discrete op: distinct to a network, each its own class, and each draw is one of them.

  The first is the identity, or the identity with the treatment of all the others (`applied`): were class 0 the image
  untouched, the treatment would tell it.
  """
  if law_case.op.choices is None:
    return
  K = len(jax.tree.leaves(law_case.op.choices)[0])
  choices, drawn = rows(law_case.op.choices, K), rows(law_case.drawn, MANY)
  codes = np.asarray(jax.vmap(law_case.op.encode)(law_case.op.choices))
  assert len(np.unique(codes, axis=0)) == K
  first = jax.tree.map(lambda a: a[0], law_case.op.choices)
  if 'applied' in first._fields and first.applied:
    first = first._replace(applied=law_case.identity.applied)
  assert same(first, law_case.identity)
  classes = jax.vmap(lambda action: augment.class_of(law_case.op.choices, action))
  assert np.array_equal(classes(law_case.op.choices), np.arange(K))
  assert augment.class_of(law_case.op.choices, law_case.identity) == 0
  counts = (drawn[:, None] == choices[None]).all(axis=-1)
  assert (counts.sum(axis=1) == 1).all() and (counts.sum(axis=0) > 0).all()
  for a, b in zip(jax.tree.leaves(law_case.op.choices), jax.tree.leaves(law_case.drawn), strict=True):
    assert a.dtype == b.dtype


def test_one_image_a_device_is_bitwise_eight_on_one(law_case):
  def augmented(index, image):
    view, action = augment.augment(law_case.op, key_for(jax.random.key(2), index), image)
    return view.pixels, action
  got = [jax.jit(jax.vmap(augmented))(*jax.device_put((np.arange(8), images()), shards(n))) for n in (1, 8)]
  assert same(*got)


# What users get wrong.

def test_images_that_do_not_fit_raise():
  tall = Image(jnp.zeros((16, 8, 3)), jnp.array([16., 8.]))
  rotate, blur = registry.make(augment, 'rotate'), registry.make(augment, 'blur', kernel=17)
  with pytest.raises(ValueError, match='square'):
    jax.eval_shape(rotate.apply, rotate.identity(tall.size), tall)
  with pytest.raises(ValueError, match='kernel = 17 is too large .* at most 15'):
    jax.eval_shape(blur.apply, blur.identity(tall.size), tall)
  jax.eval_shape(registry.make(augment, 'blur', kernel=15).apply, blur.identity(tall.size), tall)


def test_orders_of_tiles_compose():
  """The way from one order to another is the order that makes one view of the other."""
  for grid in (2, 4):
    op = registry.make(augment, 'jigsaw', grid=grid, gap=0., level=False)
    pixels = jnp.arange(16.).reshape(4, 4, 1) / 16.
    def both(before, after):
      image = Image(pixels, jnp.full(2, 4.))
      way = augment.relative(op, before, after)[1:]
      order = jnp.where(way.any(), jnp.argmax(way) + 1, 0).astype(jnp.int32)
      return (op.apply(after, image).pixels, op.apply(before._replace(order=order), op.apply(before, image)).pixels)
    rng = np.random.default_rng(0)
    pick = [jax.tree.map(lambda a, i=rng.integers(0, len(op.choices.order), 64): a[i], op.choices) for _ in range(2)]
    straight, around = jax.vmap(both)(*pick)
    assert np.array_equal(straight, around)


def test_a_crop_of_everything_is_the_plain_resize():
  """At another size too, and that of jax.image, which does not clip between its passes (nothing to clip here)."""
  crop = registry.make(augment, 'crop', size=20)
  pixels = .3 + .4 * PICTURES[:2]
  views = jax.jit(jax.vmap(lambda image: crop.apply(crop.identity(SIZE), image)))(images(pixels))
  plain = jax.jit(jax.vmap(lambda image: resize(image, 20)))(images(pixels))
  assert np.abs(views.pixels - plain.pixels).max() <= 1e-6 and np.array_equal(views.size, plain.size)
  assert np.array_equal(views.size, np.full((2, 2), 20.))
  assert np.abs(jax.image.resize(pixels, (2, 20, 20, 3), 'cubic') - views.pixels).max() <= 2e-6


def test_a_turn_turns_the_size():
  rotate = registry.make(augment, 'rotate')
  squashed = Image(jnp.zeros((4, 4, 3)), jnp.array([2., 5.]))
  sizes = jax.vmap(lambda action: rotate.apply(action, squashed).size)(rotate.choices)
  assert np.array_equal(sizes, [[2, 5], [5, 2], [2, 5], [5, 2]])


@pytest.mark.parametrize('name, kw', [
    ('crop', {'method': 'lanczos'}), ('crop', {'scale': (1., .2)}), ('crop', {'ratio': (0., 1.)}),
    ('blur', {'kernel': 4}), ('jitter', {'hue': .6}), ('jitter', {'contrast': -1.}),
    ('jigsaw', {'grid': 3}), ('jigsaw', {'gap': 1.}), ('erase', {'fill': 'red'}), ('erase', {'scale': (0., .3)}),
    ('posterize', {'bits': (0, 4)}), ('blur_levels', {'kernel': 4}), ('blur_levels', {'sigmas': (1., 2.)}),
    ('turn', {'degrees': 200.}), ('turn', {'sigma': .1}), ('affine', {'scale': (1.2, 1.)}), ('affine', {'shear': 60.}),
    ('flip', {'p': 1.5}), ('gray', {'strength': 1.})])
def test_bad_arguments_are_the_users(name, kw):
  with pytest.raises(UserError):
    registry.make(augment, name, **kw)

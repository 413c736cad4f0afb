"""The laws of house.md section 5 for every op that is found, and the laws themselves on ops that break them.

A new file in `equivariant_ssl/augment/` with a `make` is under test here the moment it exists. The laws are those of
`equivariant_ssl/augment/laws.py`, which users run on ops of their own (`check_laws`).
"""
import functools
import inspect
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from equivariant_ssl import augment, registry
from equivariant_ssl.augment import laws
from equivariant_ssl.augment.algebra import resize
from equivariant_ssl.augment.law_cases import PICTURES, SIZE, Case, images, make_case
from equivariant_ssl.errors import UserError
from equivariant_ssl.types import Image, Op

NAMES = registry.names(augment)


@functools.cache
def case(name: str) -> Case:
  return make_case(registry.make(augment, name))


@pytest.mark.parametrize('law', laws.LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize('name', NAMES)
def test_law(name, law):
  assert law(case(name)) == ''


def test_factory_has_defaults_and_the_op_its_files_name():
  for name in NAMES:
    assert all(p.default is not inspect.Parameter.empty
               for p in inspect.signature(registry.factory(augment, name)).parameters.values()), name
    assert registry.make(augment, name).name == name


# An op that keeps the laws, and ops like it that break one each.

class Tint(NamedTuple):
  """amount: float, how far each pixel goes towards red, a fraction."""
  amount: jax.Array


class Plain(NamedTuple):
  """How far each pixel goes towards red."""
  amount: jax.Array


def tinted(action, image):
  red = jnp.array([1., 0., 0.])[None, None]
  return image._replace(pixels=image.pixels + action.amount * (red - image.pixels))


def drawn(key, size):
  return Tint(jax.random.uniform(key, minval=.1, maxval=.5))


TINT = Op('tint', lambda size: Tint(jnp.zeros(())), drawn, tinted, lambda action: action.amount[None])


def with_pixels(change):
  """The tint with `change` of the pixels of each view."""
  def apply(action, image):
    view = tinted(action, image)
    return view._replace(pixels=change(view.pixels))
  return TINT._replace(apply=apply)


def at_each_trace(step: float):
  """A value that is larger by `step` each time that it is asked for: what a pure function has not."""
  count = itertools.count()
  return lambda: step * next(count)


def with_state():
  shift = at_each_trace(.01)
  return with_pixels(lambda pixels: pixels * (1. - shift()))


def with_other_identities():
  amount = at_each_trace(.01)
  return TINT._replace(identity=lambda size: Tint(jnp.float32(amount())))


def rarely(key, size):
  amount = drawn(key, size).amount
  return Tint(jnp.where(jax.random.bernoulli(jax.random.fold_in(key, 1)), amount, 0.))


PLANTED = {
    'identity_is_the_plain_resize': lambda: with_pixels(lambda x: jnp.clip(x + .01, 0., 1.)),
    'identity_encodes_to_zero': lambda: TINT._replace(encode=lambda action: action.amount[None] + 1.),
    'relative_actions_fit': lambda: TINT._replace(relative=lambda a, b: (b.amount - a.amount)[None] + 1.),
    'views_stay_images': lambda: with_pixels(lambda x: 1.5 * x),
    'drawn_actions_change_the_image': lambda: TINT._replace(apply=lambda action, image: image),
    'gradients_are_finite': lambda: with_pixels(lambda x: jnp.sqrt(jnp.square(x))),
    'draws_depend_on_the_key_alone': lambda: TINT._replace(sample=lambda key, size: drawn(jax.random.key(0), size)),
    'vmap_is_a_loop': with_state,
    'fields_state_their_units': lambda: TINT._replace(
        identity=lambda size: Plain(jnp.zeros(())), sample=lambda key, size: Plain(*drawn(key, size))),
    'chances_are_right': with_other_identities,
    'doing_nothing_is_encoded': lambda: TINT._replace(sample=rarely),
    'choices_are_the_classes': lambda: TINT._replace(choices=Tint(np.array([0., .2], np.float32))),
    'devices_change_no_bit': lambda: with_pixels(lambda x: x * jnp.mean(x)),
}


def test_every_law_has_an_op_that_breaks_it():
  assert set(PLANTED) == {law.__name__ for law in laws.LAWS}
  assert laws.broken_laws(TINT) == []


@pytest.mark.parametrize('law', laws.LAWS, ids=lambda law: law.__name__)
def test_a_planted_fault_is_seen(law):
  fault = law(make_case(PLANTED[law.__name__]()))
  assert fault.endswith('.'), 'the law does not see it'


def test_an_op_that_raises_is_a_line():
  def fails(action, image):
    raise KeyError('no such picture')
  assert laws.broken_laws(TINT._replace(apply=fails)) == ["make_case: KeyError: 'no such picture'"]


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

"""The laws of house.md section 5 for every op that is found, and those of the algebra that composes them.

A new file in `equivariant_ssl/augment/` with a `make` is under test here the moment it exists.
"""
import functools
import inspect
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from equivariant_ssl import augment, modules
from equivariant_ssl.augment.algebra import resize
from equivariant_ssl.errors import UserError
from equivariant_ssl.keys import key_for
from equivariant_ssl.types import Action, Group, Image, Op

NAMES = modules.names(augment)
SIDE, MANY = 32, 4096
SIZE = jnp.full(2, SIDE, jnp.float32)
UNITS = 'bool|fraction|pixel|turn|factor|degree|radian|index|id of|class'


def pictures():
  """[8 32 32 3]: noise, a smooth picture, black, white, grey, pure colours, nearly grey, and values on the steps."""
  rng, ramp = np.random.default_rng(0), np.linspace(0, 1, SIDE)
  smooth = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None], np.outer(ramp, ramp)), axis=-1)
  pure = np.eye(3)[rng.integers(0, 3, (SIDE, SIDE))]
  near = .5 + 1e-8 * rng.uniform(-1, 1, (SIDE, SIDE, 3))
  flat = [np.full((SIDE, SIDE, 3), v) for v in (0., 1., .5)]
  stepped = rng.integers(0, 3, (SIDE, SIDE, 3)) / 2
  return np.stack([rng.uniform(0, 1, (SIDE, SIDE, 3)), smooth, *flat, pure, near, stepped]).astype(np.float32)


PICTURES = pictures()


def images(pixels=PICTURES):
  return Image(pixels, np.full((len(pixels), 2), SIDE, np.float32))


def draws(op: Op, many: int) -> Action:
  return jax.jit(lambda key: jax.vmap(lambda i: op.sample(key_for(key, i), SIZE))(jnp.arange(many)))(jax.random.key(1))


def repeated(action: Action, many: int) -> Action:
  return jax.tree.map(lambda a: jnp.broadcast_to(a, (many, *a.shape)), action)


def rows(action: Action, many: int) -> np.ndarray:
  """Actions stacked [many ...] as a float64 matrix, a row an action."""
  return np.concatenate([np.asarray(a, np.float64).reshape(many, -1) for a in jax.tree.leaves(action)], axis=1)


def same(a, b) -> bool:
  """Bitwise, leaf by leaf."""
  return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def shards(devices: int) -> NamedSharding:
  mesh = Mesh(np.array(jax.devices()[:devices]), ('data',), axis_types=(AxisType.Auto,))
  return NamedSharding(mesh, PartitionSpec('data'))


class Case(NamedTuple):
  """One op, MANY draws of it, whether each does nothing; its 8 drawn then 8 identity views, and their gradients."""
  op: Op
  identity: Action
  drawn: Action
  idle: np.ndarray
  views: Image
  gradients: np.ndarray


def seen(op: Op):
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
  op = modules.make(augment, name)
  identity, drawn = op.identity(SIZE), draws(op, MANY)
  idle = (rows(drawn, MANY) == rows(repeated(identity, 1), 1)).all(axis=1)
  apart = np.argsort(idle, kind='stable')[:8]  # draws that do something first
  actions = jax.tree.map(lambda a, b: jnp.concatenate([a[apart], b]), drawn, repeated(identity, 8))
  views, gradients = seen(op)(actions, images(np.concatenate([PICTURES, PICTURES])))
  return Case(op, identity, drawn, idle, jax.tree.map(np.asarray, views), np.asarray(gradients))


@pytest.fixture(params=NAMES)
def found(request) -> Case:
  return case(request.param)


def test_factory_has_defaults_and_the_op_its_files_name():
  for name in NAMES:
    assert all(p.default is not inspect.Parameter.empty
               for p in inspect.signature(modules.factory(augment, name)).parameters.values()), name
    assert modules.make(augment, name).name == name


def test_identity_is_the_plain_resize(found):
  plain = jax.vmap(lambda image: resize(image, found.views.pixels.shape[1]))(images())
  assert np.abs(found.views.pixels[8:] - plain.pixels).max() <= 1e-6
  assert np.array_equal(found.views.size[8:], plain.size)


def test_encoding_of_the_identity_is_zero(found):
  code = np.asarray(found.op.encode(found.identity))
  codes = np.asarray(jax.vmap(found.op.encode)(found.drawn))
  assert code.ndim == 1 and (code == 0).all() and codes.shape == (MANY, *code.shape)
  assert codes.dtype == np.float32 and np.isfinite(codes).all()
  different = np.unique(rows(found.drawn, MANY), axis=0)
  assert len(np.unique(codes, axis=0)) == len(different), 'two actions have one encoding'


def test_views_stay_images(found):
  side = found.views.pixels.shape[1]
  assert found.views.pixels.shape == (16, side, side, 3) and found.views.pixels.dtype == np.float32
  assert found.views.pixels.min() >= 0 and found.views.pixels.max() <= 1
  assert found.views.size.shape == (16, 2) and found.views.size.dtype == np.float32


def test_drawn_actions_change_the_image(found):
  moved = np.abs(found.views.pixels[:2] - found.views.pixels[8:10]).reshape(2, -1).max(axis=1)
  assert (moved > 1e-3).all(), 'an action that is not the identity left an image as it was'


def test_gradient_is_finite(found):
  assert np.isfinite(found.gradients).all()
  assert (np.abs(found.gradients).reshape(16, -1).max(axis=1) > 0)[[0, 1, 8, 9]].all()


def test_same_key_same_draw(found):
  assert same(found.drawn, draws(found.op, MANY))
  assert same(jax.tree.map(lambda a: a[:5], found.drawn), draws(found.op, 5))
  assert not same(jax.tree.map(lambda a: a[:64], found.drawn), jax.tree.map(lambda a: a[64:128], found.drawn))


def test_vmap_is_a_loop(found):
  apply = jax.jit(found.op.apply)
  apart = np.argsort(found.idle, kind='stable')
  for i in range(3):
    view = apply(jax.tree.map(lambda a: a[apart[i]], found.drawn), Image(PICTURES[i], SIZE))
    assert np.abs(view.pixels - found.views.pixels[i]).max() <= 1e-6


def test_docstring_of_the_action_states_each_field_with_its_unit(found):
  kind = type(found.identity)
  for field in kind._fields:
    line = re.search(rf'\b{field}\b[\w, ]*:[^:]*', kind.__doc__)
    assert line and re.search(UNITS, line[0]), \
        f"{kind.__name__}'s docstring must say '{field}: ...' with its unit (one of {UNITS.replace('|', ', ')})"


def test_a_chance_is_an_action(found):
  """sometimes(0) is the identity, sometimes(1) the op, else the rate is right: also of a chance within a chance."""
  busy = 1 - found.idle.mean()
  for p in (0., .3, 1.):
    drawn = rows(draws(augment.sometimes(p, found.op), MANY), MANY)
    did = (drawn != rows(repeated(found.identity, 1), 1)).any(axis=1)
    expected = p * busy
    assert abs(did.mean() - expected) <= 5 * np.sqrt(expected * (1 - expected) / MANY) + 1e-9, f'p = {p}'


def test_the_unapplied_can_be_told(found):
  """Where doing nothing is drawn with a chance, a bool says so and leads the encoding (or the op is discrete)."""
  if found.idle.mean() > .1 and not (found.op.choices and 'applied' not in type(found.identity)._fields):
    codes = np.asarray(jax.vmap(found.op.encode)(found.drawn))
    assert found.drawn.applied.dtype == bool and np.array_equal(codes[:, 0], found.drawn.applied)
    assert np.array_equal(found.drawn.applied, ~found.idle)


def test_choices_are_the_classes(found):
  """All actions of a discrete op: distinct to a network, the identity first, and each draw is one of them."""
  if found.op.choices is None:
    return
  K = len(jax.tree.leaves(found.op.choices)[0])
  choices, drawn = rows(found.op.choices, K), rows(found.drawn, MANY)
  codes = np.asarray(jax.vmap(found.op.encode)(found.op.choices))
  assert len(np.unique(codes, axis=0)) == K
  assert same(jax.tree.map(lambda a: a[0], found.op.choices), found.identity)
  counts = (drawn[:, None] == choices[None]).all(axis=-1)
  assert (counts.sum(axis=1) == 1).all() and (counts.sum(axis=0) > 0).all()
  for a, b in zip(jax.tree.leaves(found.op.choices), jax.tree.leaves(found.drawn), strict=True):
    assert a.dtype == b.dtype


def test_one_image_a_device_is_bitwise_eight_on_one(found):
  def augmented(index, image):
    view, action = augment.augment(found.op, key_for(jax.random.key(2), index), image)
    return view.pixels, action
  got = [jax.jit(jax.vmap(augmented))(*jax.device_put((np.arange(8), images()), shards(n))) for n in (1, 8)]
  assert same(*got)


# The algebra.

@functools.cache
def everything() -> Op:
  """All ops in the order of EquiMod's, the ones that it does not have last."""
  order = ['crop', 'flip', 'jitter', 'gray', 'blur', 'solarize', 'rotate']
  return augment.chain(*(modules.make(augment, n) for n in order + [n for n in NAMES if n not in order]))


def test_an_op_more_moves_no_other_draw():
  whole = draws(everything(), 64)
  for names in (NAMES[::2], NAMES[1::2]):
    part = draws(augment.chain(*(modules.make(augment, n) for n in reversed(names))), 64)
    assert same({n: whole[n] for n in names}, part)


def test_a_chain_is_its_ops_in_order():
  flip, rotate = modules.make(augment, 'flip'), modules.make(augment, 'rotate')
  action = {'flip': flip.choices._replace(applied=jnp.array(True)), 'rotate': rotate.choices._replace(turns=jnp.array(1))}
  image = Image(jnp.asarray(PICTURES[0]), SIZE)
  there, back = augment.chain(flip, rotate), augment.chain(rotate, flip)
  assert np.array_equal(there.apply(action, image).pixels, np.rot90(PICTURES[0][:, ::-1]))
  assert np.array_equal(back.apply(action, image).pixels, np.rot90(PICTURES[0])[:, ::-1])
  assert np.array_equal(there.encode(action), [1, 1, 0, 0]) and set(there.choices) == {'flip', 'rotate'}
  assert np.array_equal(there.encode(there.identity(SIZE)), np.zeros(4))
  with pytest.raises(ValueError, match='different names'):
    augment.chain(flip, flip)


def test_a_chance_within_a_chance_multiplies():
  flip = modules.make(augment, 'flip', p=.5)
  rate = np.mean(draws(augment.sometimes(.5, flip), MANY).applied)
  assert abs(rate - .25) < 5 * np.sqrt(.25 * .75 / MANY)


def test_only_the_named_ops_draw():
  op = augment.only(everything(), 'crop', 'jitter')
  drawn, whole, identity = draws(op, 16), draws(everything(), 16), repeated(op.identity(SIZE), 16)
  for name in drawn:
    assert same(drawn[name], (whole if name in ('crop', 'jitter') else identity)[name]), name


def test_normalised_tells_in_units_of_the_spread():
  op = augment.chain(modules.make(augment, 'crop'), modules.make(augment, 'jitter', hue=0.), modules.make(augment, 'flip'))
  drawn = draws(op, MANY)
  told = augment.normalised(op, drawn)
  raw, codes = (np.asarray(jax.vmap(o.encode)(drawn)) for o in (op, told))
  constant = raw.std(axis=0) < 1e-6
  assert constant.sum() == 1 and np.array_equal(codes[:, constant], raw[:, constant])  # the hue
  assert np.abs(codes[:, ~constant].std(axis=0) - 1).max() < 1e-4
  assert (np.asarray(told.encode(told.identity(SIZE))) == 0).all() and same(draws(told, 8), draws(op, 8))


@functools.cache
def grouped():
  """A small chain that ends in the rotation, and what each of several groups makes of eight images."""
  op = augment.chain(*(modules.make(augment, n, **kw) for n, kw in (('crop', {'size': 16}), ('jitter', {}), ('rotate', {}))))
  other = op._replace(name='other')
  groups = {'views': Group((op, op), 16), 'reference': Group((augment.reference(op),), 16),
            'rotated': Group((op,), 16, all_of='rotate'), 'shared': Group((op, other), 16, share=2)}
  run = jax.jit(lambda groups, key: augment.views(groups, key, images()), static_argnums=0)
  frozen = lambda names: _Frozen({n: groups[n] for n in names})
  return op, run(frozen(groups), jax.random.key(4)), lambda *names: run(frozen(names), jax.random.key(4))


class _Frozen(dict):
  """A dict that jit can take as static."""
  def __hash__(self):
    return hash(tuple(self))


def test_views_are_the_actions_they_return():
  op, found, _ = grouped()
  for name in ('views', 'rotated', 'shared'):
    V = found[name].images.shape[1]
    assert found[name].images.shape == (8, V, 16, 16, 3)
    assert all(a.shape[:2] == (8, V) for a in jax.tree.leaves(found[name].actions))
  replay = jax.jit(jax.vmap(lambda a, image: jax.vmap(lambda a: op.apply(a, image).pixels)(a)))
  assert np.abs(replay(found['views'].actions, images()) - found['views'].images).max() <= 1e-6
  first, second = (jax.tree.map(lambda a: a[:, v], found['views'].actions) for v in (0, 1))
  assert not np.isclose(first['crop'].top, second['crop'].top).all()


def test_the_reference_is_untouched():
  op, found, run = grouped()
  assert same(found['reference'].actions, jax.tree.map(lambda a: a[:, None], repeated(op.identity(SIZE), 8)))
  plain = jax.vmap(lambda image: resize(image, 16).pixels)(images())
  assert np.abs(found['reference'].images[:, 0] - plain).max() <= 1e-6
  whole = augment.views({'reference': Group((augment.reference(op),), SIDE)}, jax.random.key(0), images())
  assert np.array_equal(whole['reference'].images[:, 0], PICTURES)  # where it fits, not a bit changes


def test_all_of_takes_every_choice_of_one_draw():
  _, found, _ = grouped()
  views, actions = found['rotated']
  assert np.array_equal(actions['rotate'].turns, np.tile(np.arange(4), (8, 1)))
  for a in jax.tree.leaves((actions['crop'], actions['jitter'])):
    assert all(np.array_equal(a[:, 0], a[:, k]) for k in range(4))
  for k in range(1, 4):
    assert np.array_equal(views[:, k], np.rot90(views[:, 0], k, axes=(1, 2)))


def test_neighbours_share_a_draw():
  _, found, _ = grouped()
  for a in (found['shared'].actions['crop'].height, found['shared'].actions['jitter'].hue):
    assert np.array_equal(a[::2], a[1::2]) and len(np.unique(a[::2])) > 4
    assert not np.array_equal(a[:, 0], a[:, 1])  # but not the views of an image


def test_a_group_more_moves_no_draw_of_the_others():
  _, found, run = grouped()
  assert same(run('views')['views'], found['views'])


def test_views_are_bitwise_the_same_over_1_2_4_8_devices():
  """The whole chain; in a group that is resized after it too, where a constant matrix would see the shard's size."""
  op = everything()
  groups = {'views': Group((op, op), SIDE), 'reference': Group((augment.reference(op),), 16),
            'rotated': Group((op,), 16, all_of='rotate')}
  run = jax.jit(lambda images: augment.views(groups, jax.random.key(6), images))
  first, *others = [jax.tree.map(np.asarray, run(jax.device_put(images(), shards(n)))) for n in (1, 2, 4, 8)]
  for n, other in zip((2, 4, 8), others, strict=True):
    assert same(first, other), f'{n} devices see other views than 1'


# What users get wrong.

def test_images_that_do_not_fit_raise():
  tall = Image(jnp.zeros((16, 8, 3)), jnp.array([16., 8.]))
  rotate, blur = modules.make(augment, 'rotate'), modules.make(augment, 'blur', kernel=17)
  with pytest.raises(ValueError, match='square'):
    jax.eval_shape(rotate.apply, rotate.identity(tall.size), tall)
  with pytest.raises(ValueError, match='kernel = 17 is too large .* at most 15'):
    jax.eval_shape(blur.apply, blur.identity(tall.size), tall)
  jax.eval_shape(modules.make(augment, 'blur', kernel=15).apply, blur.identity(tall.size), tall)


@pytest.mark.parametrize('name, kw', [
    ('crop', {'method': 'lanczos'}), ('crop', {'scale': (1., .2)}), ('crop', {'ratio': (0., 1.)}), ('blur', {'kernel': 4}),
    ('jitter', {'hue': .6}), ('jitter', {'contrast': -1.}), ('flip', {'p': 1.5}), ('gray', {'strength': 1.})])
def test_bad_arguments_are_the_users(name, kw):
  with pytest.raises(UserError):
    modules.make(augment, name, **kw)

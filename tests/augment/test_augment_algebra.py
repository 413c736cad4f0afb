"""The algebra of ops: chains, chances, units of spread, and views over groups and devices."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pictures import draws, shards

from equivariant_ssl import augment, registry
from equivariant_ssl.augment.algebra import resize
from equivariant_ssl.augment.law_cases import PICTURES, SIDE, SIZE, images, repeated, same
from equivariant_ssl.types import Group, Image, Op

NAMES = registry.names(augment)
MANY = 4096


@functools.cache
def everything() -> Op:
  """All ops in the order of EquiMod's, the ones that it does not have last."""
  order = ['crop', 'flip', 'jitter', 'gray', 'blur', 'solarize', 'rotate']
  return augment.chain(*(registry.make(augment, n) for n in order + [n for n in NAMES if n not in order]))


@functools.cache
def drawn_by_everything():
  return draws(everything(), 64)


def test_an_op_more_moves_no_other_draw():
  whole = drawn_by_everything()
  for names in (NAMES[::2], NAMES[1::2]):
    part = draws(augment.chain(*(registry.make(augment, n) for n in reversed(names))), 64)
    assert same({n: whole[n] for n in names}, part)


def test_a_chain_is_its_ops_in_order():
  flip, rotate = registry.make(augment, 'flip'), registry.make(augment, 'rotate')
  action = {op.name: jax.tree.map(lambda a: a[1], op.choices) for op in (flip, rotate)}
  image = Image(jnp.asarray(PICTURES[0]), SIZE)
  there, back = augment.chain(flip, rotate), augment.chain(rotate, flip)
  assert np.array_equal(there.apply(action, image).pixels, np.rot90(PICTURES[0][:, ::-1]))
  assert np.array_equal(back.apply(action, image).pixels, np.rot90(PICTURES[0])[:, ::-1])
  assert np.array_equal(there.encode(action), [1, 1, 0, 0]) and set(there.choices) == {'flip', 'rotate'}
  assert np.array_equal(there.encode(there.identity(SIZE)), np.zeros(4))
  with pytest.raises(ValueError, match='different names'):
    augment.chain(flip, flip)


def test_a_chance_within_a_chance_multiplies():
  flip = registry.make(augment, 'flip', p=.5)
  rate = np.mean(draws(augment.sometimes(.5, flip), MANY).applied)
  assert abs(rate - .25) < 5 * np.sqrt(.25 * .75 / MANY)


def test_only_the_named_ops_draw():
  op = augment.only(everything(), 'crop', 'jitter')
  drawn, whole, identity = draws(op, 64), drawn_by_everything(), repeated(op.identity(SIZE), 64)
  for name in drawn:
    assert same(drawn[name], (whole if name in ('crop', 'jitter') else identity)[name]), name


def test_normalized_tells_in_units_of_the_spread():
  op = augment.chain(registry.make(augment, 'crop'), registry.make(augment, 'jitter', hue=0.))
  drawn = draws(op, MANY)
  scaled = augment.normalized(op, drawn)
  raw, codes = (np.asarray(jax.vmap(o.encode)(drawn)) for o in (op, scaled))
  constant = raw.std(axis=0) < 1e-6
  assert constant.sum() == 1 and np.array_equal(codes[:, constant], raw[:, constant])  # the hue
  assert np.abs(codes[:, ~constant].std(axis=0) - 1).max() < 1e-4
  assert (np.asarray(scaled.encode(scaled.identity(SIZE))) == 0).all() and same(draws(scaled, 8), draws(op, 8))


@functools.cache
def grouped():
  """A small chain that ends in the rotation, and what each of several groups makes of eight images."""
  op = augment.chain(registry.make(augment, 'crop', size=16), *(registry.make(augment, n) for n in ('gray', 'rotate')))
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
  groups = {'reference': Group((augment.reference(op),), SIDE)}
  whole = jax.jit(lambda images: augment.views(groups, jax.random.key(0), images)['reference'].images)(images())
  assert np.array_equal(whole[:, 0], PICTURES)  # where it fits, not a bit changes


def test_all_of_takes_every_choice_of_one_draw():
  _, found, _ = grouped()
  views, actions = found['rotated']
  assert np.array_equal(actions['rotate'].turns, np.tile(np.arange(4), (8, 1)))
  for a in jax.tree.leaves((actions['crop'], actions['gray'])):
    assert all(np.array_equal(a[:, 0], a[:, k]) for k in range(4))
  for k in range(1, 4):
    assert np.array_equal(views[:, k], np.rot90(views[:, 0], k, axes=(1, 2)))


def test_a_chain_of_nothing_shows_the_image_as_it_is():
  groups = {'views': Group((augment.chain(),) * 2, 16)}
  groups['reference'] = Group((augment.reference(augment.chain()),), 16)
  shown = jax.jit(lambda images: augment.views(groups, jax.random.key(0), images))(images())
  assert shown['views'].actions == {} and shown['views'].images.shape[1] == 2
  np.testing.assert_array_equal(shown['views'].images, np.repeat(shown['reference'].images, 2, axis=1))


def test_neighbors_share_a_draw():
  _, found, _ = grouped()
  actions = found['shared'].actions
  assert same(*(jax.tree.map(lambda a: a[i::2], actions) for i in (0, 1)))
  heights = np.asarray(actions['crop'].height[::2])
  assert len(np.unique(heights)) > 4 and not np.array_equal(heights[:, 0], heights[:, 1])  # the views differ


def test_a_group_more_moves_no_draw_of_the_others():
  _, found, run = grouped()
  assert same(run('views')['views'], found['views'])


@functools.cache
def spread_over(devices: int):
  """The whole chain, and a group that is resized after it, where a constant matrix would see the shard's size."""
  op, few = everything(), augment.chain(*(registry.make(augment, n) for n in ('crop', 'rotate')))
  groups = {'views': Group((op, op), SIDE), 'reference': Group((augment.reference(few),), 16),
            'rotated': Group((few,), 16, all_of='rotate')}
  run = jax.jit(lambda images: augment.views(groups, jax.random.key(6), images))
  return jax.tree.map(np.asarray, run(jax.device_put(images(), shards(devices))))


@pytest.mark.slow  # of every op; of a step's own chain `make test` has it in test_step.py
@pytest.mark.parametrize('devices', [2, 4, 8])
def test_views_are_bitwise_the_same_on_any_devices(devices):
  assert same(spread_over(1), spread_over(devices)), f'{devices} devices see other views than 1'

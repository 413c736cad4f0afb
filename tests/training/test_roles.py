"""What the four roles mean: which ops make which views, and which heads are conditioned on them."""
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from equivariant_ssl import config
from equivariant_ssl.augment import views
from equivariant_ssl.errors import UserError
from equivariant_ssl.training import recipe, run_config
from equivariant_ssl.types import Image

SMALL = {'encoder.width': '4'}


def smoke_recipe(**overrides) -> recipe.Recipe:
  return recipe.make_recipe(config.load_config('smoke', SMALL | {k.replace('__', '.'): v for k, v in overrides.items()}), 64, 8)


def names(chain) -> set:
  return set(chain.name.split('+'))


@pytest.mark.parametrize('role, in_views, in_own, conditioned', [
    ('off', False, False, False), ('invariant', True, True, False), ('sensitive', False, True, True),
    ('both', True, True, True)])
@pytest.mark.parametrize('objective', ['equimod', 'augself', 'sie', 'sen', 'stl', 'care', 'cassle', 'essl'])
def test_a_role_is_two_bits_for_every_objective(role, in_views, in_own, conditioned, objective):
  section = {'name': objective, **({'splits': 4} if objective == 'care' else {})}
  r = smoke_recipe(equivariance=repr(section), augment__rotate__role=role, augment__flip__role='both')
  assert ('rotate' in names(r.groups['views'].chains[0])) == in_views
  wiring = r.wirings[objective]
  assert ('rotate' in names(wiring.conditioning)) == conditioned and 'flip' in names(wiring.conditioning)
  groups = [g for n, g in r.groups.items() if n == objective]
  assert bool(groups) == (role == 'sensitive' or objective in ('stl', 'care'))  # these two share draws
  for group in groups:
    assert ('rotate' in names(group.chains[0])) == in_own


def test_several_objectives_each_have_their_augmentations():
  """EquiMod is about crops alone, so it needs no views of its own; E-SSL turns its own."""
  r = smoke_recipe(equivariance="[{'name': 'equimod', 'augmentations': ('crop',)}, {'name': 'essl', 'augmentations': ('rotate',)}]",
           augment__rotate__role='sensitive', augment__crop__role='both', augment__flip__role='invariant')
  assert set(r.groups) == {'views', 'reference', 'essl'}
  assert names(r.groups['views'].chains[0]) == {'crop', 'flip'}
  assert names(r.groups['essl'].chains[0]) == {'crop', 'flip', 'rotate'} and r.groups['essl'].all_of == 'rotate'
  assert names(r.wirings['equimod'].conditioning) == {'crop'} and names(r.wirings['essl'].conditioning) == {'rotate'}
  assert not r.wirings['equimod'].has_own_views


def test_the_views_may_be_shared():
  """STL as published: the invariance's own views are the aligned ones."""
  r = smoke_recipe(equivariance="{'name': 'stl', 'aligned': 'views'}")
  assert set(r.groups) == {'views'} and r.groups['views'].share == 2


def test_one_name_twice():
  r = smoke_recipe(equivariance="[{'name': 'equimod', 'augmentations': ('crop',)}, "
                        "{'name': 'equimod', 'augmentations': ('rotate',)}]",
           augment__rotate__role='sensitive')
  assert list(r.equivariances) == ['equimod', "equimod'"]
  assert names(r.groups["equimod'"].chains[0]) == {'crop', 'flip', 'rotate'}
  assert names(r.groups['reference'].chains[0]) == {'crop', 'flip', 'rotate'}  # of the two the one that has every op


def test_the_second_view_may_differ():
  r = smoke_recipe(augment__order="('crop', 'flip', 'rotate', 'solarize')", augment__solarize="{'p': 0., 'role': 'both'}",
           augment__second="{'solarize': {'p': 1.}, 'flip': {'p': 0.}}")
  images = Image(jnp.zeros((32, 8, 8, 3)), jnp.full((32, 2), 8.))
  actions = jax.jit(lambda key: views({'views': r.groups['views']}, key, images))(jax.random.key(0))['views'].actions
  assert not actions['solarize'].applied[:, 0].any() and actions['solarize'].applied[:, 1].all()
  assert actions['flip'].applied[:, 0].any() and not actions['flip'].applied[:, 1].any()
  encoded = np.asarray(jax.vmap(r.wirings['equimod'].conditioning.encode)(jax.tree.map(lambda a: a[:, 1], actions)))
  solarized = encoded[:, -1]
  np.testing.assert_allclose(solarized, 2., rtol=1e-3)  # half of the pooled views are: a spread of 1/2


@pytest.mark.parametrize('overrides, cause, fix', [
    ({'equivariance__augmentations': "('rotate',)", 'augment__rotate__role': 'invariant'},
     "augmentations names 'rotate'", 'or both'),
    ({'equivariance__augmentations': "('blur',)"}, "'not in the config'", 'Name some of: crop, rotate'),
    ({'augment__crop__role': 'invariant', 'augment__rotate__role': 'off'}, 'has no augmentations', 'role=both'),
    ({'equivariance': 'cassle', 'invariance': 'none'}, 'nothing to learn', 'invariance=simclr'),
    ({'equivariance': 'none', 'invariance': 'none'}, 'nothing to learn', 'equivariance=equimod'),
    ({'equivariance': "{'name': 'equimod', 'tap_layer': 5}"}, 'tap_layer is 5', '1 to 4'),
    ({'equivariance': 'essl', 'augment__rotate__role': 'off', 'augment__flip__role': 'off'}, 'discrete', 'rotate'),
    ({'equivariance': "{'name': 'care', 'splits': 7}"}, 'splits', '='),
    ({'equivariance': 'stl', 'batch': '15'}, 'batch', '16'),
    ({'augment__second': "{'blur': {'p': .1}}"}, "second has no 'blur'", 'crop'),
    ({'augment__second': "{'flip': {'q': .1}}"}, "second.flip has no 'q'", 'It has: p'),
    ({'equivariance': 'equimod,essl', 'equivariance__weight': '.5'}, 'does not say which', 'equivariance.0.weight'),
])
def test_a_mistake_is_named_with_its_remedy(overrides, cause, fix):
  with pytest.raises(UserError) as error:
    smoke_recipe(**overrides)
  assert cause in str(error.value) and fix in str(error.value), str(error.value)


def test_both_is_invariant_where_no_objective_reads_it():
  names = "{'name': 'equimod', 'augmentations': ('rotate',)}"
  for equivariance, roles in (('none', 'invariant invariant'), (names, 'invariant both'), ('equimod', 'both both')):
    c = config.load_config('smoke', {'equivariance': equivariance, 'augment.rotate.role': 'both'})
    assert ' '.join(run_config.acting_role(c, name) for name in ('crop', 'rotate')) == roles
  c = config.load_config('smoke', {'equivariance': 'essl', 'augment.rotate.role': 'both'})
  assert [run_config.acting_role(c, name) for name in ('crop', 'rotate')] == ['invariant', 'both']  # a crop has no classes


@pytest.mark.parametrize('name', ['photos', 'cifar10_quick'])
def test_one_form_of_an_option_is_enough(name):
  """Where a config has no objective, its name alone makes the section that `.name` makes."""
  for objective in ('none', 'equimod', 'essl'):
    short, long = ({f'equivariance{field}': objective} for field in ('', '.name'))
    assert config.load_config(name, short) == config.load_config(name, long)
  root = pathlib.Path(config.__file__).parents[1]
  texts = [p for kind in ('equivariant_ssl/**/*.py', 'configs/*.py', 'docs/**/*.md') for p in root.glob(kind)]
  assert len(texts) > 100 and not [p for p in texts if '--config.equivariance.name=' in p.read_text(encoding='utf-8')]


def test_what_comes_next_is_what_can_be_done():
  assert run_config.next_command('my run', True) == "eqssl eval 'my run'"
  assert run_config.next_command('my run', False) == "eqssl report 'my run'"


def test_objectives_by_one_line():
  """A name, several names, a list of sections, and a field of one of several."""
  load = lambda **kw: config.load_config('smoke', kw)
  assert load(equivariance='essl').equivariance.name == 'essl'
  assert [e.name for e in load(equivariance='equimod,essl').equivariance] == ['equimod', 'essl']
  several = load(equivariance="['equimod', {'name': 'essl', 'size': 8}]", **{'equivariance.0.temperature': '.5'})
  assert several.equivariance[0].temperature == .5 and several.equivariance[1].size == 8
  assert config.resolve_config(several) == several
  assert load(invariance='byol').invariance.predictor.out == 256


def test_the_reference_knows_the_ops_of_all_that_share_it():
  """Two objectives, each told of a sensitive op of its own: neither chain holds the other's."""
  r = smoke_recipe(equivariance="[{'name': 'equimod', 'told': ('crop', 'rotate')}, {'name': 'equimod', 'told': ('crop', 'flip')}]",
           augment__rotate__role='sensitive', augment__flip__role='sensitive')
  chain, = r.groups['reference'].chains
  assert names(chain) == {'crop', 'flip', 'rotate'}
  assert 'flip' not in names(r.groups['equimod'].chains[0]) and 'rotate' not in names(r.groups["equimod'"].chains[0])
  size = jnp.full(2, 8.)
  action = chain.sample(jax.random.key(0), size)
  for own in (r.groups['equimod'].chains[0], r.groups["equimod'"].chains[0]):
    for name, still in own.identity(size).items():
      for a, b in zip(jax.tree.leaves(action[name]), jax.tree.leaves(still), strict=True):
        np.testing.assert_array_equal(a, b)
  image = Image(jnp.float32(np.random.default_rng(0).uniform(size=(8, 8, 3))), size)
  np.testing.assert_array_equal(chain.apply(action, image).pixels, image.pixels)

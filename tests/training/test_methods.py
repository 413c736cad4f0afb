"""Any invariance with any equivariance objective, or several: three real steps of each (bars 2, 3 and 4)."""
import functools
import itertools

import jax
import numpy as np
import pytest
from additions import ENCODER, TINY, added

from equivariant_ssl import config, equivariance, invariance, nets, registry
from equivariant_ssl.errors import UserError
from equivariant_ssl.parallel import sharding
from equivariant_ssl.training import loop, step
from equivariant_ssl.training.step import Batch
from equivariant_ssl.types import Views

INVARIANCES = registry.names(invariance)
EQUIVARIANCES = registry.names(equivariance)
LISTS = (('equimod', 'essl'), ('augself', 'sie', 'care'))
PAIRS = [p for p in itertools.product(INVARIANCES, EQUIVARIANCES) if p != ('none', 'none')]
PAIRS += [('simclr', LISTS[0]), ('byol', LISTS[1])]
ONCE = [(i, 'none') for i in INVARIANCES if i != 'none']             # each invariance once,
ONCE += [('none', e) for e in EQUIVARIANCES if e != 'none']          # each equivariance once,
ONCE += PAIRS[-2:]                                                   # and both lists
B, STEPS = 16, 3

SMALL = {'hidden': (8,), 'dim': 8, 'action_dim': 8, 'read_hidden': (8,), 'read_dim': 8, 'action_hidden': (8,), 'splits': 4}


@pytest.fixture(scope='module', autouse=True)
def tiny(tmp_path_factory):
  yield from added(tmp_path_factory, {TINY: (nets, ENCODER)})


def small(package, name: str) -> dict:
  """A section of objective `name`, its layers made small."""
  return {'name': name, **{k: v for k, v in SMALL.items() if k in registry.schema(package, name)}}


def settings(inv: str, eqs: str | tuple) -> config.ConfigDict:
  """Crops are invariant, turns sensitive where an objective reads them; eight-pixel digits."""
  section = small(invariance, inv)
  made = registry.make(invariance, inv)
  for part in ('projector', 'predictor'):
    if getattr(made, part):
      section[part] = {'hidden': (8,), 'out': 8}
  names = (eqs,) if isinstance(eqs, str) else eqs
  return config.resolve_config(config.ConfigDict({
      'size': 8, 'batch': B, 'steps': STEPS, 'data': {'name': 'digits'}, 'encoder': {'name': TINY},
      'augment': {'order': ('crop', 'rotate'), 'crop': {'role': 'invariant', 'method': 'bilinear'},
                  'rotate': {'role': 'off' if names == ('none',) else 'sensitive'}},
      'invariance': section, 'equivariance': [small(equivariance, e) for e in names],
      'optimizer': {'name': 'sgd', 'lr': .02, 'warmup_epochs': 0.}}))


@functools.cache
def source():
  return loop.prepare_run(settings('simclr', 'none'), sharding.mesh(jax.devices()[:1])).source


@functools.cache
def trained(inv: str, eqs: str | tuple, devices: int = 1):
  """(run, first state, last state, metrics of each step) of three steps of the real train_step."""
  run = loop.prepare_run(settings(inv, eqs), sharding.mesh(jax.devices()[:devices]))
  first = state = loop.initial_state(run)
  train_step = jax.jit(functools.partial(step.train_step, run.recipe), out_shardings=sharding.replicated_sharding(run.mesh))
  rows = source().train
  seen = []
  for n in range(STEPS):
    batch = Batch(rows.images[n * B:(n + 1) * B], rows.sizes[n * B:(n + 1) * B])
    state, metrics = train_step(run.key, state, sharding.place(batch, sharding.batch_sharding(run.mesh)))
    seen.append({k: float(v) for k, v in metrics.items()})
  return run, jax.device_get(first), jax.device_get(state), seen


def differ(a: dict, b: dict) -> bool:
  return any(not np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def label(pair) -> str:
  return f'{pair[0]}-{pair[1] if isinstance(pair[1], str) else "+".join(pair[1])}'


def check_pair(pair: tuple) -> None:
  """Every term is finite, every part of the network has learnt something."""
  run, first, last, seen = trained(*pair)
  labels = [e for e in ((pair[1],) if isinstance(pair[1], str) else pair[1]) if e != 'none']
  assert list(run.recipe.equivariances) == labels
  assert all(np.isfinite(v) for m in seen for v in m.values())
  assert all(e in seen[0] for e in labels)
  for part in first.params:
    assert differ(first.params[part], last.params[part]), f'{part} did not move'
  if run.recipe.invariance.decay is not None:
    assert differ(first.target[0], last.target[0]) and differ(first.target[1], last.target[1])
  assert int(last.step) == STEPS


# A covering set: each invariance, each equivariance objective and both lists at least once.
COVER = [(i, e) for i, e in zip(itertools.cycle(INVARIANCES), [e for e in EQUIVARIANCES if e != 'none'], strict=False)]
COVER += [PAIRS[-1]]


@pytest.mark.parametrize('pair', COVER, ids=label)
def test_a_covering_set_trains(pair):
  check_pair(pair)


@pytest.mark.slow
@pytest.mark.parametrize('pair', [p for p in PAIRS if p not in COVER], ids=label)
def test_every_pair_trains(pair):
  check_pair(pair)


@pytest.mark.slow
@pytest.mark.parametrize('pair', ONCE, ids=label)
def test_four_devices_compute_what_one_does(pair):
  one, four = trained(*pair), trained(*pair, devices=4)
  for a, b in zip(one[3], four[3], strict=True):
    for k in a:
      assert abs(a[k] - b[k]) <= 1e-4 * max(1., abs(a[k])), k
  largest = max(np.abs(x).max() for x in jax.tree.leaves(one[2].params))
  for a, b in zip(jax.tree.leaves(one[2].params), jax.tree.leaves(four[2].params), strict=True):
    assert np.abs(a - b).max() <= 1e-4 * largest


def gradients(run, aim=None):
  """(of the total loss in params, in the target's embeddings) at the first step, for a batch of the digits."""
  state = loop.initial_state(run)
  batch = Batch(source().train.images[:B], source().train.sizes[:B])

  def both(params, stats, shown, aim):
    return jax.grad(lambda p, a: step.loss(run.recipe, p, stats, shown, a)[0], (0, 1))(params, aim)
  shown = step.draw_views(run.recipe, run.key, 0, batch)
  return jax.device_get(jax.jit(both)(state.params, state.stats, shown, aim))


def test_no_gradient_reaches_the_target():
  """BYOL with EquiMod: exactly zero through the target's embeddings; the network itself has one."""
  run = loop.prepare_run(settings('byol', 'none'), sharding.mesh(jax.devices()[:1]))
  of_params, of_target = gradients(run, jax.random.normal(jax.random.key(0), (B, 2, 8)))
  assert not np.any(of_target)
  assert all(np.any(g) for g in jax.tree.leaves(of_params['predictor']))


def test_the_target_is_the_average_that_was_asked_for():
  """After one step: tau(0) old + (1 - tau(0)) new weights ('after'); of weights that were not yet stepped ('before')."""
  for update in ('after', 'before'):
    made = settings('byol', 'none').unlock()
    made.invariance.update, made.invariance.decay = update, .75
    run = loop.prepare_run(config.resolve_config(made), sharding.mesh(jax.devices()[:1]))
    first = loop.initial_state(run)
    batch = Batch(source().train.images[:B], source().train.sizes[:B])
    last = jax.jit(functools.partial(step.train_step, run.recipe))(run.key, first, batch)[0]
    new = last.params if update == 'after' else first.params
    for name in first.target[0]:
      for old, weight, got in zip(*(jax.tree.leaves(t[name]) for t in (first.target[0], new, last.target[0])), strict=True):
        np.testing.assert_allclose(got, .75 * old + .25 * weight, rtol=1e-5, atol=1e-7)
    same = jax.tree.map(np.array_equal, first.target[0]['encoder'], first.params['encoder'])
    assert all(jax.tree.leaves(same)) == (update == 'before')  # EquiMod's target starts as a copy


def test_simsiams_predictor_keeps_its_rate():
  """The schedule is at 0 in the last step's place: everything stands still but the predictor."""
  made = settings('simsiam', 'none').unlock()
  made.optimizer.warmup_epochs = 1000.  # the rate of the first step is 0
  run = loop.prepare_run(config.resolve_config(made), sharding.mesh(jax.devices()[:1]))
  first = loop.initial_state(run)
  batch = Batch(source().train.images[:B], source().train.sizes[:B])
  last = jax.jit(functools.partial(step.train_step, run.recipe))(run.key, first, batch)[0]
  assert differ(first.params['predictor'], last.params['predictor'])
  assert not differ(first.params['encoder'], last.params['encoder'])


def test_a_stage_can_be_tapped():
  """EquiMod on the second of ResNet's stages reads its width; the invariance still reads the last."""
  run = loop.prepare_run(config.load_config('smoke', {'equivariance.tap_layer': '2'}), sharding.mesh(jax.devices()[:1]))
  params = loop.abstract_state(run).params
  assert params['heads_equimod']['project']['linear_0']['kernel'].shape[0] == run.recipe.network.encoder.dims[1]
  assert params['projector']['linear_0']['kernel'].shape[0] == run.recipe.network.encoder.dims[3]


def test_views_apart_have_statistics_of_their_own():
  """With batchnorm 'view', each view's features are those of a pass of its own; with 'joint', of one pass of both."""
  images = jax.random.uniform(jax.random.key(0), (4, 2, 8, 8, 3))
  shown = {'views': Views(images, {})}
  found = {}
  for how in ('joint', 'view'):
    made = settings('simclr', 'essl').unlock()
    made.batchnorm = how
    run = loop.prepare_run(config.resolve_config(made), sharding.mesh(jax.devices()[:1]))
    state = loop.initial_state(run)
    values = {'params': state.params, 'batch_stats': state.stats}
    of = jax.jit(lambda v, x, n=run.recipe.network: n.apply(v, x, True, method='features', mutable=['batch_stats'])[0][0])
    found[how] = of(values, shown)['views']
    if how == 'view':
      alone = [of(values, {'views': Views(images[:, v:v + 1], {})})['views'] for v in range(2)]
      np.testing.assert_allclose(found['view'], np.concatenate(alone, axis=1), rtol=1e-4, atol=1e-5)
  assert np.abs(found['joint'] - found['view']).max() > 1e-3


def test_the_empty_pair_is_refused():
  with pytest.raises(UserError, match='nothing to learn'):
    loop.prepare_run(settings('none', 'none'), sharding.mesh(jax.devices()[:1]))

"""BatchNorm over groups of images: each as if alone, the same on any devices, and no statistic crosses between groups."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import one_process
import pytest
import test_step

from equivariant_ssl.config import load_config
from equivariant_ssl.errors import UserError
from equivariant_ssl.nets import norm
from equivariant_ssl.parallel import sharding, step_cost
from equivariant_ssl.training import feeds, runs, step
from equivariant_ssl.types import Views


@pytest.mark.parametrize('exact', [False, True])
def test_a_group_is_normalized_as_if_it_were_alone(exact):
  """With its gradient; the gradients of scale and bias are the sums over the groups."""
  random = np.random.default_rng(0)
  x, up = random.normal(2., 3., (2, 12, 5, 4)).astype(np.float32)
  scale, bias = random.normal(size=(2, 4)).astype(np.float32)

  def together(x, scale, bias):
    y, mean, var = norm.normalize(x, scale, bias, exact, 3)
    return (y * up).sum(), (y, mean, var)

  def apart(x, scale, bias):
    results = [norm.normalize(part, scale, bias, exact) for part in jnp.split(x, 3)]
    y, mean, var = jnp.concatenate([r[0] for r in results]), *(jnp.stack(s) for s in list(zip(*results, strict=True))[1:])
    return (y * up).sum(), (y, mean, var)
  (_, values), gradients = jax.jit(jax.value_and_grad(together, (0, 1, 2), has_aux=True))(x, scale, bias)
  (_, alone), expected = jax.jit(jax.value_and_grad(apart, (0, 1, 2), has_aux=True))(x, scale, bias)
  assert values[1].shape == (3, 4)
  for a, b in zip((*values, *gradients), (*alone, *expected), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
  assert np.abs(values[0] - norm.normalize(x, scale, bias, exact)[0]).max() > .1


def test_running_statistics_move_by_the_mean_over_the_groups():
  x = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
  module = norm.BatchNorm()
  variables = module.init(jax.random.key(0), x, True)
  with norm.image_groups(2):
    _, updated = module.apply(variables, x, True, mutable=['batch_stats'])
  halves = x.reshape(2, 4, 3)
  stats = updated['batch_stats']
  np.testing.assert_allclose(stats['mean'], .1 * x.mean(0), atol=1e-6)
  np.testing.assert_allclose(stats['var'], .9 + .1 * halves.var(1, ddof=1).mean(0), rtol=1e-5)
  with pytest.raises(RuntimeError), norm.image_groups(2):
    raise RuntimeError
  _, whole = module.apply(variables, x, True, mutable=['batch_stats'])
  np.testing.assert_allclose(whole['batch_stats']['var'], .9 + .1 * x.var(0, ddof=1), rtol=1e-5)


def test_one_group_is_the_program_without_groups():
  """Bitwise today's: the same jaxpr."""
  module, x = norm.BatchNorm(), np.ones((8, 3), np.float32)
  variables = module.init(jax.random.key(0), x, True)

  def program():
    return str(jax.make_jaxpr(jax.grad(lambda x: module.apply(variables, x, True, mutable=['batch_stats'])[0].sum()))(x))
  plain = program()
  with norm.image_groups(1):
    assert program() == plain
  with norm.image_groups(2):
    assert program() != plain


@functools.cache
def trained(devices: int, groups: int) -> dict:
  """Three steps of the smallest config on `devices` devices: the losses, the first gradient and statistics, the program."""
  config = load_config(one_process.__file__, {'batchnorm_groups': str(groups), 'optimizer.weight_decay': '0.'})
  run = runs.prepare_run(config, sharding.mesh(jax.devices()[:devices]))
  state, (program, data) = runs.initial_state(run), feeds.compiled(run)
  order = sharding.place(np.arange(len(data.images), dtype=np.int32), sharding.replicated_sharding(run.mesh))
  text = program.lower(run.key, state, data, order).compile().as_text()
  losses, first = [], {}
  for n in range(3):
    state, metrics = program(run.key, state, data, order)
    losses.append(float(metrics['loss']))
    if n == 0:
      first = {'gradient': jax.device_get(state.opt_state), 'stats': jax.device_get(state.stats)}
  return {'losses': losses, 'text': text, 'run': run, **first}


MORE = [pytest.param(*case, marks=pytest.mark.slow) for case in ((2, 8), (4, 8), (8, 2))]


@pytest.mark.parametrize(('devices', 'groups'), [(8, 8), *MORE])
def test_the_groups_are_the_same_on_any_number_of_devices(devices, groups):
  """Which images are a group is a matter of the batch, not of the machine."""
  one, many = trained(1, groups), trained(devices, groups)
  assert abs(many['losses'][0] / one['losses'][0] - 1) <= 1e-6
  assert abs(many['losses'][2] / one['losses'][2] - 1) <= 1e-4
  for kind in ('gradient', 'stats'):
    pairs = list(zip(jax.tree.leaves(one[kind]), jax.tree.leaves(many[kind]), strict=True))
    largest = max(np.abs(a).max() for a, _ in pairs)
    assert largest > 0 and all(np.abs(a - b).max() <= 1e-5 * largest for a, b in pairs), kind


def statistics(text: str) -> list[step_cost.Collective]:
  """The collectives that BatchNorm's statistics need."""
  return [c for c in step_cost.list_collectives(text) if norm.STATISTICS_SCOPE in c.source]


def test_no_statistic_leaves_its_device_where_the_groups_line_up():
  """And no image moves: what crosses are gradients, running statistics, metrics and embeddings."""
  result = trained(8, 8)
  assert statistics(result['text']) == []
  state = runs.abstract_state(result['run'])
  largest = max(x.size for x in jax.tree.leaves((state.params, state.stats)))
  embeddings = 2 * 16 * 8  # 2B of E numbers
  for kind, shapes in test_step.crossing(result['text']):
    assert all(np.prod(s) <= max(largest, embeddings) for s in shapes), kind


@pytest.mark.slow
@pytest.mark.parametrize(('groups', 'together'), [(1, 8), (2, 4)])
def test_statistics_cross_the_devices_of_their_group_alone(groups, together):
  collectives = statistics(trained(8, groups)['text'])
  assert collectives and {c.devices for c in collectives} == {together}
  assert {c.kind for c in collectives} == {'all-reduce'}


def test_the_step_is_that_of_each_group_alone_up_to_the_heads():
  """The encoder sees each group as a batch of its own. The loss sees the whole batch."""
  run = trained(1, 8)['run']
  state, recipe = runs.initial_state(run), run.recipe
  views = {'views': Views(np.random.default_rng(0).uniform(size=(16, 2, 8, 8, 3)).astype(np.float32), {})}

  def encode(groups: int):
    return jax.jit(lambda views: step.encode(recipe._replace(batchnorm_groups=groups), state.params, state.stats, views,
                                             (0,)))
  (features, stats), encode_one = encode(8)(views), encode(1)
  alone = [encode_one(jax.tree.map(lambda x: x[2 * g:2 * g + 2], views)) for g in range(8)]  # noqa: B023
  np.testing.assert_allclose(features[0]['views'], jnp.concatenate([f[0]['views'] for f, _ in alone]), atol=1e-5)
  mean = jax.tree.map(lambda *x: jnp.stack(x).mean(0), *(s for _, s in alone))
  jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), stats, mean)


@pytest.mark.parametrize(('over', 'says'), [
    ({'batchnorm_groups': '3'}, r'batch of 16 cannot be cut .*=2'),
    ({'batchnorm_groups': '16'}, r'two images or more\..*=8'),
    ({'batchnorm_groups': '0'}, '--config.batchnorm_groups=1'),
    ({'batchnorm_groups': '8', 'accumulate': '2'}, r'in 2 parts .*=4')])
def test_groups_that_cannot_be_are_a_user_error(over, says):
  with pytest.raises(UserError, match=f'(?s){says}'):
    load_config(one_process.__file__, over)


def test_groups_and_devices_line_up_or_it_is_said():
  for devices, groups in ((8, 4), (8, 16), (1, 5), (6, 3), (3, 1)):
    sharding.check_batch(240, devices, groups=groups)
  for groups, size in ((8, 8), (5, 1)):  # a run of five GPUs is read on one of these eight devices
    assert runs.mesh_for(load_config(one_process.__file__, {'batch': '80', 'batchnorm_groups': str(groups)})).size == size
  with pytest.raises(UserError, match='(?s)6 groups .* do not line up with 4 devices.*use 2 or 12 devices'):
    sharding.check_batch(240, 4, groups=6)


@pytest.mark.parametrize(('written', 'devices'), [
    ('{{0,1,2},{3,4,5}}', 3), ('[2,4]<=[8]', 4), ("mesh['a'=2,'b'=4,'c'=1] {'b'}", 4), ("mesh['a'=2,'b'=4] {'a','b'}", 8),
    ('{}', 0)])
def test_who_takes_part_in_a_collective(written, devices):
  line = f'ENTRY %main () -> f32[] {{\n  %r = f32[4] all-reduce(%x), replica_groups={written}, to_apply=%add\n}}\n'
  found, = step_cost.list_collectives(line)
  assert (found.devices, found.results) == (devices, [('f32', (4,))])

"""The step on 1, 2, 4 and 8 devices: the same views, the same numbers, and only small things cross (bar 5)."""
import functools

import jax
import numpy as np
import pytest

from equivariant_ssl.config import load_config
from equivariant_ssl.parallel import sharding, step_cost
from equivariant_ssl.training import feeds, loop, step
from equivariant_ssl.training.recipe import Recipe

DEVICES = (1, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 4)), 8)


@functools.cache
def run(devices: int) -> loop.Run:
  """The smoke recipe on `devices` devices; its optimizer's momentum after one step is the gradient."""
  config = load_config('smoke', {'optimizer.weight_decay': '0.'})
  return loop.prepare_run(config, sharding.mesh(jax.devices()[:devices]))


@functools.cache
def trained(devices: int) -> dict:
  """Three steps: the losses, the first gradient, the compiled program's text, and how often it was compiled."""
  r = run(devices)
  state, (program, data) = loop.initial_state(r), feeds.compiled(r)
  order = sharding.place(np.arange(len(data.images), dtype=np.int32), sharding.replicated_sharding(r.mesh))
  text = program.lower(r.key, state, data, order).compile().as_text()
  losses, gradient = [], None
  for n in range(3):
    state, metrics = program(r.key, state, data, order)
    losses.append({k: float(v) for k, v in metrics.items()})
    if n == 0:
      gradient = [np.asarray(x) for x in jax.tree.leaves(state.opt_state)]
  shapes = {tuple(x.shape) for x in jax.tree.leaves(state.params)}
  return {'losses': losses, 'gradient': gradient, 'text': text, 'compilations': program._cache_size(),
          'shapes': shapes, 'stats': {tuple(x.shape) for x in jax.tree.leaves(state.stats)}}


@functools.cache
def step_views(devices: int):
  """The views of step 5, with the batch split over the devices."""
  r = run(devices)
  batch = sharding.place(step.Batch(r.source.train.images[:16], r.source.train.sizes[:16]), sharding.batch_sharding(r.mesh))
  return jax.device_get(jax.jit(functools.partial(step.draw_views, r.recipe))(r.key, 5, batch))


@pytest.mark.parametrize('devices', DEVICES[1:])
def test_views_and_actions_are_bitwise_the_same(devices):
  assert jax.tree.structure(step_views(1)) == jax.tree.structure(step_views(devices))
  for a, b in zip(jax.tree.leaves(step_views(1)), jax.tree.leaves(step_views(devices)), strict=True):
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize('devices', DEVICES[1:])
def test_loss_and_gradient_are_the_same(devices):
  one, many = trained(1), trained(devices)
  assert abs(many['losses'][0]['loss'] / one['losses'][0]['loss'] - 1) <= 1e-6
  assert abs(many['losses'][2]['loss'] / one['losses'][2]['loss'] - 1) <= 1e-4
  largest = max(np.abs(g).max() for g in one['gradient'])
  assert largest > 0
  for a, b in zip(one['gradient'], many['gradient'], strict=True):
    assert np.abs(a - b).max() <= 1e-5 * largest


@pytest.mark.parametrize('devices', DEVICES)
def test_one_compilation(devices):
  assert trained(devices)['compilations'] == 1


def crossing(text: str) -> list[tuple[str, list[tuple[int, ...]]]]:
  """(collective, shapes of its result) for every collective of a compiled program."""
  return [(c.kind, [shape for _, shape in c.results]) for c in step_cost.list_collectives(text)]


@pytest.mark.parametrize('devices', DEVICES[1:])
def test_nothing_large_crosses_between_devices(devices):
  """Only gradients, BatchNorm statistics, metrics and embeddings: no image and no activation."""
  r, result = run(devices), trained(devices)
  small = result['shapes'] | result['stats'] | {()}
  sizes = {int(np.prod(s)) for s in small}
  B, E = r.config.batch, r.config.invariance.projector.out
  rows = 2 * B, 4 * B
  for kind, shapes in crossing(result['text']):
    for shape in shapes:
      flat = tuple(d for d in shape if d != 1)
      sums = kind == 'all-reduce' and (  # a convolution's gradient is summed as the matrix it was computed as
          shape in small or len(flat) == 2 and int(np.prod(shape)) in sizes or len(flat) <= 1 and np.prod(shape) <= 4 * B)
      embeddings = len(flat) <= 3 and int(np.prod(shape)) in {n * E for n in rows}
      assert sums or embeddings, f'{kind} of {shape} on {devices} devices'
  assert any(kind == 'all-reduce' for kind, _ in crossing(result['text']))


@pytest.mark.parametrize('platform', ['cuda', 'tpu'])
def test_the_step_lowers_for_accelerators_without_the_cpu_convolution(platform):
  r = run(1)
  state, (program, data) = loop.abstract_state(r), feeds.compiled(r)
  order = jax.ShapeDtypeStruct((len(data.images),), np.int32)
  lowered = {p: program.trace(r.key, state, data, order).lower(lowering_platforms=(p,)).as_text()
             for p in (platform, 'cpu')}
  loops = {p: text.count('stablehlo.while') for p, text in lowered.items()}
  convolutions = {p: text.count('stablehlo.convolution') for p, text in lowered.items()}
  assert convolutions[platform] > convolutions['cpu'] and loops[platform] < loops['cpu']


def test_recipes_are_static():
  """A recipe holds no array that could be traced or donated."""
  assert isinstance(run(1).recipe, Recipe)
  assert not [x for x in jax.tree.leaves(run(1).recipe) if isinstance(x, jax.Array)]


def test_canvases_taken_of_rows_are_those_of_the_data():
  canvases = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3), np.uint8)
  rows, index = sharding.flatten_canvases(canvases), np.array([3, 0, 3])
  assert rows.shape == (5, 48)
  np.testing.assert_array_equal(jax.jit(sharding.take_canvases)(rows, index), canvases[index])

"""The protocols that read the panel: features of images before and after each augmentation
alone."""
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.tree_util import Partial

from equivariant_ssl import augment
from equivariant_ssl.data.source import Source
from equivariant_ssl.evaluate import frozen, health, inputs, profile, regression
from equivariant_ssl.evaluate.care_measure import over_actions
from equivariant_ssl.evaluate.features import in_batches
from equivariant_ssl.evaluate.frozen import Frozen, variables
from equivariant_ssl.evaluate.statistics import quantity
from equivariant_ssl.evaluate.subject import Measurement, Subject, held_out, source_of
from equivariant_ssl.training.runs import Run
from equivariant_ssl.training.state import TrainState
from equivariant_ssl.types import Op

# The most images to fit on, to test on, and for CARE; the actions that all images share in CARE.
PANEL_TRAIN, PANEL_TEST, CARE, SHARED = 2000, 1000, 256, 8


@functools.lru_cache  # a jitted program is keyed by its function: one function for all checkpoints
def _panel_program(encode: Callable, run_inputs: inputs.Inputs, p: float, views: int,
                   shared: int) -> Callable:
  return frozen.panel_views(encode, frozen.panel(run_inputs.size, p), run_inputs, views, shared)


def _panel(run: Run, functions: Frozen, state: TrainState, images: tuple, p: float, views: int,
           shared: int = 0, batch: int = 16) -> tuple[np.ndarray, Any]:
  """Return (features [N P 1 + V D], {op: actions [N V ...]}) of the P ops of frozen.PANEL.

  images: what `frozen.indexed_images` returns. p, views, shared: see `frozen.panel_views`.
  """
  run_inputs = inputs.canvas_inputs(run.recipe.size, run.recipe.canvas)
  program = _panel_program(functions.encode, run_inputs, p, views, shared)
  return in_batches(Partial(program, variables(state)), images, batch)


def panel_features(run: Run, functions: Frozen, state: TrainState) -> np.ndarray:
  """Return the features [N P 2 D] of held-out images before and after each op of frozen.PANEL
  alone, always applied."""
  images = frozen.indexed_images(held_out(run), slice(PANEL_TEST))
  return _panel(run, functions, state, images, 1., 1)[0]


def measure_profile(s: Subject) -> Measurement:
  """Measure protocol 'profile': `profile.drift` of each op."""
  h = s.panel_features()
  drifts = {op: profile.drift(h[:, i, 0], h[:, i, 1:], jax.random.key(frozen.SEED))
            for i, op in enumerate(frozen.PANEL)}
  controls = {op: {'to another image': d.other, 'ratio': d.ratio} for op, d in drifts.items()}
  return Measurement('profile', {op: d.view for op, d in drifts.items()}, controls, drifts)


def _fit_and_test(source: Source) -> tuple[tuple, tuple]:
  """Return (images to fit on, other images to test on), as `frozen.indexed_images` returns them.

  Without a test split, a third of the training split is tested on.
  """
  if source.test is not None:
    return (frozen.indexed_images(source.train, slice(PANEL_TRAIN)),
            frozen.indexed_images(source.test, slice(PANEL_TEST)))
  N = len(source.train.images)
  first = N - min(PANEL_TEST, N // 3)
  return (frozen.indexed_images(source.train, slice(min(PANEL_TRAIN, first))),
          frozen.indexed_images(source.train, slice(first, None)))


def _regression_data(op: Op, h: np.ndarray, actions: Any) -> dict[str, tuple]:
  """Return {form: (features [N ...], the encoded action [N A] to read from them)}.

  The form 'absolute' reads the action of one view, 'relative' the action between two views.
  """
  def view_actions(number: int) -> Any:
    return jax.tree.map(lambda a: a[:, number], actions)
  first, second = view_actions(0), view_actions(1)
  alone = np.asarray(jax.jit(jax.vmap(op.encode))(second))
  relative = jax.vmap(lambda a, b: augment.relative(op, a, b))
  between = np.asarray(jax.jit(relative)(first, second))
  return {'absolute': (h[:, 2], alone), 'relative': (h[:, 1:].reshape(len(h), -1), between)}


def measure_regression(s: Subject, kind: str) -> Measurement:
  """Measure protocol 'regression' (kind 'linear') or 'regression-mlp' (kind 'mlp')."""
  (h, actions), (test_h, test_actions) = (
      _panel(s.run, s.functions, s.state, images, .5, 2)
      for images in _fit_and_test(source_of(s.run)))
  numbers, controls, detail = {}, {}, {}
  for i, (name, op) in enumerate(frozen.panel(s.run.recipe.size, .5).items()):
    data = _regression_data(op, h[:, i], actions[name])
    test_data = _regression_data(op, test_h[:, i], test_actions[name])
    for form in data:
      (x, y), (test_x, test_y) = data[form], test_data[form]
      scores = regression.with_controls(x, y, test_x, test_y, kind, s.key)
      detail[f'{name} {form}'] = scores
      for mean in ('pooled', 'averaged'):
        row = f'{name} {form} {mean}'
        numbers[row] = getattr(scores['true'], mean)
        chance = scores['true'].pooled_chance if mean == 'pooled' else 0.
        controls[row] = {'shuffled': getattr(scores['shuffled'], mean), 'chance': chance}
  protocol = f'regression {kind}: {len(h):,} and {quantity(len(test_h), "image")}'
  return Measurement(protocol, numbers, controls, detail)


def measure_care(s: Subject) -> Measurement:
  """Measure protocol 'care': CARE's gamma and Wahba's error of each op."""
  images = frozen.indexed_images(s.held_out, slice(CARE))
  h, _ = _panel(s.run, s.functions, s.state, images, 1., SHARED, shared=1)
  cares = {op: over_actions(h[:, i, 0], h[:, i, 1:].transpose(1, 0, 2))
           for i, op in enumerate(frozen.PANEL)}
  numbers = {f'{op} {k}': getattr(care, k) for op, care in cares.items()
             for k in ('gamma', 'relative')}
  worst = {k: {'ignores it': 1.} for k in numbers if k.endswith('gamma')}
  return Measurement(f'care: {SHARED} actions, {quantity(len(h), "image")}', numbers, worst, cares)


def measure_health(s: Subject) -> Measurement:
  """Measure protocol 'health' on crops of held-out images."""
  crops = s.panel_features()[:, frozen.PANEL.index('crop')]
  measured = health.health(crops[:, 0], crops)
  numbers = {k: v for k, v in measured._asdict().items() if np.ndim(v) == 0 and v is not None}
  return Measurement('health', numbers, {}, measured)

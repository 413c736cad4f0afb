"""The demo's figure: views with their actions, loss curves, and the gain for the turn."""
import pathlib
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure  # without pyplot: no display, no global state

from equivariant_ssl.config import load_config
from equivariant_ssl.demo.arms import TrainedArm
from equivariant_ssl.evaluate.statistics import mean_std
from equivariant_ssl.parallel.sharding import mesh
from equivariant_ssl.shipped import shipped_config
from equivariant_ssl.training import step
from equivariant_ssl.training.runs import prepare_run

# Colors that color-blind readers can tell apart too.
COLORS = ('#7f7f7f', '#0072b2', '#d55e00', '#009e73', '#cc79a7')
IMAGES, TURNS = 4, ('no turn', '1/4 turn', '1/2 turn', '3/4 turn')
CONTROLS = {'true': 'true turns', 'shuffled': 'turns of other images', 'zeroed': 'no turn'}


def caption(actions: dict, index: tuple[int, int]) -> str:
  """Return the action that made one view, in words. index: (image, view)."""
  action = jax.tree.map(lambda values: np.asarray(values)[index], actions)
  crop = action['crop']
  words = [f'rows {crop.top:.2f}-{crop.top + crop.height:.2f}',
           f'cols {crop.left:.2f}-{crop.left + crop.width:.2f}']
  if 'rotate' in action:
    words.append(TURNS[int(action['rotate'].turns)])
  return '\n'.join(words)


def _draw_views(figure: Any) -> None:
  """Draw each of a few digits, then two of its views with the actions that made them."""
  name = 'digits_simclr_equimod'
  config = load_config(name, {'augment.rotate.role': 'both'}, shipped_config(name))
  run = prepare_run(config, mesh(jax.devices()[:1]))
  assert run.source is not None  # prepare loads the data
  train = run.source.train
  batch = step.Batch(train.images[:IMAGES], train.sizes[:IMAGES])
  views = jax.device_get(step.draw_views(run.recipe, jax.random.key(0), 0, batch))['views']
  figure.suptitle('Digits: each image, two of its views, and what was done to them')
  panels = figure.subplots(1, 3 * IMAGES)
  for axes, (i, k) in zip(panels, np.ndindex(IMAGES, 3), strict=True):
    axes.imshow(batch.images[i] if k == 0 else views.images[i, k - 1], interpolation='nearest')
    axes.set_xticks([])
    axes.set_yticks([])
    label = 'image\n\n' if k == 0 else caption(views.actions, (i, k - 1))
    axes.set_xlabel(label, fontsize=7.5)


def _draw_losses(axes: Any, arms: dict[str, TrainedArm]) -> None:
  """Draw the loss of each arm, a mean over seeds and over neighboring steps."""
  for color, (name, arm) in zip(COLORS, arms.items(), strict=True):
    if arm.losses:
      losses = np.array(arm.losses)
      kernel = np.ones(8) / 8 if losses.shape[1] >= 16 else np.ones(1)
      mean = np.convolve(losses.mean(0), kernel, 'valid')
      axes.plot(np.arange(len(mean)), mean, color=color, label=name, linewidth=1.5)
  axes.set(xlabel='step', ylabel='training loss (all terms), mean over seeds', title='Loss')
  axes.legend(frameon=False)


def _draw_gains(axes: Any, arms: dict[str, TrainedArm]) -> None:
  """Draw the gain of each arm with EquiMod, for the true turns and for the controls."""
  # The untrained network's gains are far below this scale.
  with_gains = {name: arm for name, arm in arms.items() if arm.gains and name != 'untrained'}
  for j, (control, label) in enumerate(CONTROLS.items()):
    values = [[100 * getattr(gain['rotate'], control).absolute.mean for gain in arm.gains or ()]
              for arm in with_gains.values()]
    stats = [mean_std(over_seeds) for over_seeds in values]
    axes.bar(np.arange(len(with_gains)) + (j - 1) * .27, [mean for mean, _ in stats], .25,
             yerr=[std or 0. for _, std in stats], color=COLORS[1 + j], label=label, capsize=3)
  axes.axhline(0, color='black', linewidth=.8)
  axes.set_xticks(np.arange(len(with_gains)), [f'rotate\n(arm: {name})' for name in with_gains])
  axes.set(ylabel='absolute gain x 100, mean ± std over seeds',
           title='Does the predictor use the turn that it is given?')
  axes.margins(y=.18)  # room for the legend
  axes.legend(frameon=False, fontsize=8, ncols=3, loc='upper center')


def draw(path: pathlib.Path, arms: dict[str, TrainedArm]) -> None:
  """Write the figure of the demo's arms, {name: arm}, to `path`."""
  figure = Figure(figsize=(13, 6.6), layout='constrained')
  halves: Any = figure.subfigures(2, 1, height_ratios=(1, 2.2))
  top, bottom = halves
  _draw_views(top)
  curves, bars = bottom.subplots(1, 2, width_ratios=(7, 5))
  _draw_losses(curves, arms)
  _draw_gains(bars, arms)
  figure.savefig(path, dpi=110)

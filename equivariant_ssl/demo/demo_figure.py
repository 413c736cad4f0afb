"""The demo's figure: views with their actions under them, loss curves, and the gain per augmentation."""
import pathlib

import jax
import numpy as np
from matplotlib.figure import Figure  # without pyplot: no display, no global state

from equivariant_ssl import config as configs
from equivariant_ssl import shipped
from equivariant_ssl.evaluate.statistics import mean_std
from equivariant_ssl.parallel import sharding
from equivariant_ssl.training import loop, step

COLOURS = ('#7f7f7f', '#0072b2', '#d55e00', '#009e73', '#cc79a7')  # told apart by colour-blind readers too
IMAGES, TURNS = 4, ('no turn', '1/4 turn', '1/2 turn', '3/4 turn')


def caption(action: dict, index: tuple[int, int]) -> str:
  """What an action did to one view, in words."""
  at = jax.tree.map(lambda a: np.asarray(a)[index], action)
  crop = at['crop']
  words = [f'rows {crop.top:.2f}-{crop.top + crop.height:.2f}', f'cols {crop.left:.2f}-{crop.left + crop.width:.2f}']
  if 'rotate' in at:
    words.append(TURNS[int(at['rotate'].turns)])
  return '\n'.join(words)


def draw(path: pathlib.Path, arms: dict) -> None:
  """Write the figure of the demo's `arms` {name: demo.Arm} to `path`."""
  name = 'digits_simclr_equimod'
  run = loop.prepare(configs.load(name, {'augment.rotate.role': 'both'}, shipped.config(name)),
                      sharding.mesh(jax.devices()[:1]))
  batch = step.Batch(run.source.train.images[:IMAGES], run.source.train.sizes[:IMAGES])
  shown = jax.device_get(step.views(run.recipe, jax.random.key(0), 0, batch))['views']
  figure = Figure(figsize=(13, 6.6), layout='constrained')
  top, bottom = figure.subfigures(2, 1, height_ratios=(1, 2.2))
  top.suptitle('Digits: each image, two of its views, and what was done to them')
  for axes, (i, k) in zip(top.subplots(1, 3 * IMAGES), np.ndindex(IMAGES, 3), strict=True):
    axes.imshow(batch.images[i] if k == 0 else shown.images[i, k - 1], interpolation='nearest')
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_xlabel('image\n\n' if k == 0 else caption(shown.actions, (i, k - 1)), fontsize=7.5)
  curves, bars = bottom.subplots(1, 2, width_ratios=(7, 5))
  for colour, (name, arm) in zip(COLOURS, arms.items(), strict=True):
    if arm.losses:
      losses = np.array(arm.losses)
      kernel = np.ones(8) / 8 if losses.shape[1] >= 16 else np.ones(1)
      mean = np.convolve(losses.mean(0), kernel, 'valid')
      curves.plot(np.arange(len(mean)), mean, color=colour, label=name, linewidth=1.5)
  curves.set(xlabel='step', ylabel='training loss (all terms), mean over seeds', title='Loss')
  curves.legend(frameon=False)
  kinds = [(name, arm) for name, arm in arms.items() if arm.gains and name != 'untrained']  # far below this scale
  controls = ('true', 'shuffled', 'zeroed')
  for j, control in enumerate(controls):
    values = [[100 * getattr(g['rotate'], control).absolute.mean for g in arm.gains] for _, arm in kinds]
    stats = [mean_std(v) for v in values]
    bars.bar(np.arange(len(kinds)) + (j - 1) * .27, [m for m, _ in stats], .25, yerr=[s or 0. for _, s in stats],
             color=COLOURS[1 + j], label={'true': 'true turns', 'shuffled': 'turns of other images',
                                         'zeroed': 'no turn'}[control], capsize=3)
  bars.axhline(0, color='black', linewidth=.8)
  bars.set_xticks(np.arange(len(kinds)), [f'rotate\n(arm: {name})' for name, _ in kinds])
  bars.set(ylabel='absolute gain x 100, mean ± std over seeds', title='Does the predictor use the turn it is told?')
  bars.margins(y=.18)  # room for the legend
  bars.legend(frameon=False, fontsize=8, ncols=3, loc='upper center')
  figure.savefig(path, dpi=110)

"""The demo's figure: what the arms do, what their features keep, and what a predictor knows."""
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure  # without pyplot: no display, no global state
from matplotlib.ticker import MaxNLocator

from equivariant_ssl.demo.arms import ArmSpec, Budget, TrainedArm, arm_config, readout_split
from equivariant_ssl.demo.turns import NEAREST, TURNS, turned
from equivariant_ssl.evaluate.features import labels_of
from equivariant_ssl.evaluate.statistics import interval, interval_text, paired
from equivariant_ssl.parallel.sharding import mesh
from equivariant_ssl.training import step
from equivariant_ssl.training.runs import prepare_run

# For each arm a color that color-blind readers can tell apart too, a shape, and where its name
# stands: (points from the mark), alignment.
STYLES = {'untrained': ('#7f7f7f', 's', (9, 8), 'left'),
          'crops': ('#0072b2', 'o', (9, -18), 'left'),
          'invariant': ('#d55e00', 'v', (9, -18), 'left'),
          'both': ('#cc79a7', 'D', (-9, 8), 'right'),
          'sensitive': ('#009e73', '^', (-9, 9), 'right')}
RIGHT, WRONG = '#009e73', '#d55e00'
HEADING: Any = {'fontsize': 13, 'fontweight': 'bold', 'ha': 'left', 'x': .01}
WORDS = ('not turned', '1/4 turn', '1/2 turn', '3/4 turn')
# The first training digit and the first held-out digit of these classes are shown: a turned 6 is a
# 9, and the four turns of a 3 look different. In step 1 the two views of the 6 are turned apart.
TRAINED_CLASS, QUERY_CLASS, STEP = 6, 3, 1


def action_words(actions: Any, index: tuple[int, int]) -> str:
  """Return the action that made one view, in words. index: (image, view)."""
  action = jax.tree.map(lambda values: np.asarray(values)[index], actions)
  crop = action['crop']
  words = [f'crop {100 * crop.height:.0f} % x {100 * crop.width:.0f} %']
  if 'rotate' in action:
    words.append(WORDS[int(action['rotate'].turns)])
  return '\n'.join(words)


def _show(axes: Any, pixels: np.ndarray, words: str = '', color: str = '') -> None:
  """Draw a picture [H W 3] in [0, 1] with words under it, and a frame of a color."""
  axes.imshow(pixels, interpolation='nearest')
  axes.set_xticks([])
  axes.set_yticks([])
  axes.set_xlabel(words, fontsize=10, labelpad=3)
  for spine in axes.spines.values():
    spine.set(color=color or '#999999', linewidth=3 if color else .8)


def _views(spec: ArmSpec, budget: Budget, number: int) -> tuple[np.ndarray, dict[str, Any]]:
  """Return a training digit [S S 3], and its views {group: Views} in step `number` of an arm."""
  run = prepare_run(arm_config(spec, budget), mesh(jax.devices()[:1]))
  assert run.source is not None  # prepare_run loads the data
  train = run.source.train
  first = int(np.flatnonzero(labels_of(train) == TRAINED_CLASS)[0])
  one = slice(first, first + 1)
  batch = step.Batch(train.images[one], train.sizes[one])
  views = jax.device_get(step.draw_views(run.recipe, jax.random.key(0), number, batch))
  return train.images[first] / 255., views


def _draw_roles(figure: Any, specs: Mapping[str, ArmSpec], budget: Budget) -> None:
  """Draw what `invariant` and `sensitive` do with a digit: its views and their actions."""
  figure.suptitle('In training: one digit, its views, and what was done to each', **HEADING)
  panels = figure.subplots(1, 8, width_ratios=(1, 1, 1, .12, 1, 1, 1, 1))
  panels[3].set_axis_off()
  for row, name in ((panels[:3], 'invariant'), (panels[4:], 'sensitive')):
    image, views = _views(specs[name], budget, STEP)
    color = STYLES[name][0]
    _show(row[0], image, 'the image')
    row[0].set_title(name, loc='left', color=color, fontsize=13, fontweight='bold')
    for k in (0, 1):
      _show(row[1 + k], views['views'].images[0, k], action_words(views['views'].actions, (0, k)),
            color)
    row[1].set_title('features must agree', loc='left', fontsize=10.5)
    if 'equimod' in views:
      _show(row[3], views['equimod'].images[0, 0],
            action_words(views['equimod'].actions, (0, 0)), color)
      row[3].set_title('must be predicted\nfrom image + turn', loc='left', fontsize=10.5)


def _spread(values: list[float]) -> tuple[float, float]:
  """Return the mean over seeds and half of its 95 % interval (0 where there is one seed)."""
  over_seeds = interval(values)
  half = 0. if over_seeds.high is None else over_seeds.high - over_seeds.mean
  return over_seeds.mean, half


def _draw_accuracies(axes: Any, arms: dict[str, TrainedArm]) -> None:
  """Draw class accuracy against turn accuracy, a point an arm."""
  points = {name: (*_spread(arm.readouts['linear']), *_spread(arm.readouts['turn']))
            for name, arm in arms.items()}
  for name, (x, dx, y, dy) in points.items():
    color, marker, place, side = STYLES[name]
    axes.errorbar(x, y, dy or None, dx or None, color=color, marker=marker, markersize=10,
                  capsize=3, linewidth=1.4)
    axes.annotate(name, (x, y), place, textcoords='offset points', ha=side, color=color,
                  fontsize=13, fontweight='bold')
  low_x, low_y = (min(p[i] - p[i + 1] for p in points.values()) for i in (0, 2))
  high_x, high_y = (max(p[i] + p[i + 1] for p in points.values()) for i in (0, 2))
  axes.set_xlim(low_x - 1.5, min(high_x + 1.5, 101.))
  axes.set_ylim(low_y - 3, min(high_y + 3, 101.))
  seeds = len(arms['crops'].readouts['turn'])
  axes.set_xlabel('class of a held-out digit read right, %', fontsize=11)
  axes.set_ylabel('turn of a held-out digit read right, %', fontsize=11)
  axes.set_title('What a linear probe reads off frozen features', **HEADING)
  axes.text(.02, .025, '↙ chance: class 10 %, turn 25 %', transform=axes.transAxes, fontsize=11)
  axes.text(.98, .025, f'95 % intervals over {seeds} seeds' if seeds > 1 else 'one seed',
            transform=axes.transAxes, fontsize=10, ha='right', color='#555555')
  difference = paired(arms['sensitive'].readouts['turn'], arms['invariant'].readouts['turn'])
  (x0, _, y0, _), (x1, _, y1, _) = points['invariant'], points['sensitive']
  axes.annotate('', (x1, y1), (x0, y0), zorder=0, arrowprops={
      'arrowstyle': '-|>', 'color': '#aaaaaa', 'linewidth': 2, 'shrinkA': 12, 'shrinkB': 12})
  axes.text(.02, .975, f'invariant → sensitive: turn {interval_text(difference, digits=1)}',
            transform=axes.transAxes, fontsize=11, va='top')
  for axis in (axes.xaxis, axes.yaxis):
    axis.set_major_locator(MaxNLocator(6, integer=True))
  axes.grid(color='#eeeeee')
  axes.set_axisbelow(True)
  axes.spines[['top', 'right']].set_visible(False)


def _draw_retrieved(figure: Any, arm: TrainedArm, budget: Budget) -> None:
  """Draw a held-out digit, and the nearest views to what is predicted for each of its turns."""
  assert arm.retrieved is not None
  split, retrieved = readout_split(budget), arm.retrieved[0]
  views, labels = turned(split).images, labels_of(split)
  query = int(np.flatnonzero(labels == QUERY_CLASS)[0])
  figure.suptitle('Where does a turn take this digit? `sensitive` predicts the\nembedding; '
                  'nearest to it are these views of other digits', **HEADING)
  panels = figure.subplots(TURNS, 2 + NEAREST, width_ratios=(1.25, .95, *(1,) * NEAREST))
  for t, row in enumerate(panels):
    row[0].set_axis_off()
    row[1].set_axis_off()
    row[1].text(1., .5, f'{WORDS[t]} →', ha='right', va='center', fontsize=12,
                transform=row[1].transAxes)
    for axes, view in zip(row[2:], retrieved.nearest[query, t], strict=True):
      right = view % TURNS == t and labels[view // TURNS] == labels[query]
      _show(axes, views[view] / 255., color=RIGHT if right else WRONG)
  big = figure.add_axes((.02, .38, .2, .26))
  big.set_in_layout(False)
  _show(big, split.images[query] / 255., 'held-out digit')
  turn, digit = (np.mean([getattr(one, field) for one in arm.retrieved])
                 for field in ('turn', 'digit'))  # over seeds: the views are the first seed's
  figure.supxlabel(f'Green: class and turn are right. Mean over seeds, nearest view of all '
                   f'{len(split.images)} digits:\nright turn {turn:.0f} % (chance 25 %), right '
                   f'class {digit:.0f} % (chance 10 %).', fontsize=10.5, x=.02, ha='left')


def draw(path: pathlib.Path, arms: dict[str, TrainedArm], specs: Mapping[str, ArmSpec],
         budget: Budget) -> None:
  """Write the figure of the demo's arms, {name: arm}, to `path`.

  specs: {name: spec} of the arms that have one.
  """
  figure = Figure(figsize=(12.4, 8.5), layout='constrained')
  rows: Any = figure.subfigures(2, 1, height_ratios=(1, 2), hspace=.03)
  halves: Any = rows[1].subfigures(1, 2, width_ratios=(1, 1), wspace=.03)
  _draw_roles(rows[0], specs, budget)
  _draw_accuracies(halves[0].subplots(), arms)
  _draw_retrieved(halves[1], arms['sensitive'], budget)
  figure.savefig(path, dpi=110)

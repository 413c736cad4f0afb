"""The demo's figure: what the arms do, what their features keep, and what a predictor knows."""
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure  # without pyplot: no display, no global state

from equivariant_ssl.demo.arms import ArmSpec, Budget, TrainedArm, arm_config, readout_split
from equivariant_ssl.demo.turns import NEAREST, TURNS, turned
from equivariant_ssl.evaluate.features import labels_of
from equivariant_ssl.evaluate.statistics import interval, interval_text, paired
from equivariant_ssl.parallel.sharding import mesh
from equivariant_ssl.training import step
from equivariant_ssl.training.runs import prepare_run

# Colors that color-blind readers can tell apart too, and a shape for each arm.
STYLES = {'untrained': ('#7f7f7f', 's'), 'crops': ('#0072b2', 'o'), 'invariant': ('#d55e00', 'v'),
          'both': ('#cc79a7', 'D'), 'sensitive': ('#009e73', '^')}
RIGHT, WRONG = '#009e73', '#d55e00'
WORDS = ('not turned', '1/4 turn', '1/2 turn', '3/4 turn')
SHOWN_CLASS = 4  # its four turns look different; the first held-out one is the query


def action_words(actions: Any, index: tuple[int, int]) -> str:
  """Return the action that made one view, in words. index: (image, view)."""
  action = jax.tree.map(lambda values: np.asarray(values)[index], actions)
  crop = action['crop']
  words = [f'crop {100 * crop.height:.0f} x {100 * crop.width:.0f} %']
  if 'rotate' in action:
    words.append(WORDS[int(action['rotate'].turns)])
  return '\n'.join(words)


def _show(axes: Any, pixels: np.ndarray, words: str = '', color: str = '') -> None:
  """Draw a picture [H W 3] in [0, 1] with words under it, and a frame of a color."""
  axes.imshow(pixels, interpolation='nearest')
  axes.set_xticks([])
  axes.set_yticks([])
  axes.set_xlabel(words, fontsize=9, labelpad=3)
  for spine in axes.spines.values():
    spine.set(color=color or '#999999', linewidth=2.5 if color else .8)


def _views(spec: ArmSpec, budget: Budget) -> tuple[np.ndarray, dict[str, Any]]:
  """Return a training digit [S S 3] and the views of it, {group: Views}, of an arm's first step."""
  run = prepare_run(arm_config(spec, budget), mesh(jax.devices()[:1]))
  assert run.source is not None  # prepare loads the data
  train = run.source.train
  one = slice(first := int(np.flatnonzero(labels_of(train) == SHOWN_CLASS)[0]), first + 1)
  batch = step.Batch(train.images[one], train.sizes[one])
  views = jax.device_get(step.draw_views(run.recipe, jax.random.key(0), 0, batch))
  return train.images[first] / 255., views


def _draw_roles(figure: Any, specs: Mapping[str, ArmSpec], budget: Budget) -> None:
  """Draw what `invariant` and `sensitive` do with a digit: its views and their actions."""
  figure.suptitle('One digit in training: views, and what was done to them', fontsize=12,
                  fontweight='bold', x=.02, ha='left')
  panels = figure.subplots(2, 4)
  for row, name in zip(panels, ('invariant', 'sensitive'), strict=True):
    image, views = _views(specs[name], budget)
    color = STYLES[name][0]
    _show(row[0], image, 'the image')
    row[0].set_ylabel(name, color=color, fontsize=12, fontweight='bold')
    for k in (0, 1):
      _show(row[1 + k], views['views'].images[0, k], action_words(views['views'].actions, (0, k)))
    row[1].set_title('features must agree', loc='left', fontsize=10)
    if 'equimod' in views:
      _show(row[3], views['equimod'].images[0, 0],
            action_words(views['equimod'].actions, (0, 0)), color)
      row[3].set_title('and here be predicted\nfrom image and turn', loc='left', fontsize=10)
    else:
      row[3].set_axis_off()


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
    color, marker = STYLES[name]
    axes.errorbar(x, y, dy or None, dx or None, color=color, marker=marker, markersize=9,
                  capsize=3, linewidth=1.3)
    axes.annotate(name, (x, y), (9, 7), textcoords='offset points', color=color, fontsize=12,
                  fontweight='bold')
  low_x, low_y = (min(p[i] - p[i + 1] for p in points.values()) for i in (0, 2))
  high_x, high_y = (max(p[i] + p[i + 1] for p in points.values()) for i in (0, 2))
  axes.set_xlim(low_x - 2, high_x + .28 * (high_x - low_x) + 1)
  axes.set_ylim(low_y - 6, high_y + 3)
  seeds = len(arms['crops'].readouts['turn'])
  axes.set(xlabel='class of a held-out digit read right, %',
           ylabel='turn of a held-out digit read right, %')
  axes.set_title('What a linear probe reads off frozen features', fontsize=12, fontweight='bold',
                 loc='left')
  axes.text(.02, .02, '↙ chance: class 10 %, turn 25 %', transform=axes.transAxes, fontsize=10)
  axes.text(.98, .02, f'95 % intervals over {seeds} seeds' if seeds > 1 else 'one seed',
            transform=axes.transAxes, fontsize=9, ha='right', color='#555555')
  difference = paired(arms['sensitive'].readouts['turn'], arms['invariant'].readouts['turn'])
  (x0, _, y0, _), (x1, _, y1, _) = points['invariant'], points['sensitive']
  axes.annotate('', (x1, y1), (x0, y0), arrowprops={
      'arrowstyle': '-|>', 'color': '#bbbbbb', 'linewidth': 1.5, 'shrinkA': 12, 'shrinkB': 12},
      zorder=0)
  axes.annotate(f'turn {interval_text(difference, digits=1)}', ((x0 + x1) / 2, (y0 + y1) / 2),
                (8, -4), textcoords='offset points', fontsize=10, color='#555555')
  axes.grid(color='#eeeeee')
  axes.set_axisbelow(True)
  axes.spines[['top', 'right']].set_visible(False)


def _draw_retrieved(figure: Any, arm: TrainedArm, budget: Budget) -> None:
  """Draw a held-out digit, and the nearest views to what is predicted for each of its turns."""
  assert arm.retrieved is not None
  split, retrieved = readout_split(budget), arm.retrieved[0]
  views, labels = turned(split).images, labels_of(split)
  query = int(np.flatnonzero(labels == SHOWN_CLASS)[0])
  figure.suptitle('Where would a turn take this digit? Nearest views of other held-out digits',
                  fontsize=12, fontweight='bold', x=.02, ha='left')
  panels = figure.subplots(TURNS, 2 + NEAREST, width_ratios=(1.2, .9, *(1,) * NEAREST))
  for t, row in enumerate(panels):
    row[0].set_axis_off()
    row[1].set_axis_off()
    row[1].text(.95, .5, f'{WORDS[t]} →', ha='right', va='center', fontsize=11,
                transform=row[1].transAxes)
    for axes, view in zip(row[2:], retrieved.nearest[query, t], strict=True):
      right = view % TURNS == t and labels[view // TURNS] == labels[query]
      _show(axes, views[view] / 255., color=RIGHT if right else WRONG)
  _show(big := figure.add_axes((.02, .36, .2, .3)), split.images[query] / 255., 'the query')
  big.set_in_layout(False)
  figure.supxlabel(f'Over all {len(split.images)} digits the nearest view has the right turn in '
                   f'{retrieved.turn:.0f} % (chance 25 %), the right class in '
                   f'{retrieved.digit:.0f} %.', fontsize=10, x=.02, ha='left')


def draw(path: pathlib.Path, arms: dict[str, TrainedArm], specs: Mapping[str, ArmSpec],
         budget: Budget) -> None:
  """Write the figure of the demo's arms, {name: arm}, to `path`.

  specs: {name: spec} of the arms that have one.
  """
  figure = Figure(figsize=(12.6, 8.4), layout='constrained')
  halves: Any = figure.subfigures(1, 2, width_ratios=(1, 1.08), wspace=.03)
  left, right = halves
  top, bottom = right.subfigures(2, 1, height_ratios=(1, 1.25))
  _draw_accuracies(left.subplots(), arms)
  _draw_roles(top, specs, budget)
  _draw_retrieved(bottom, arms['sensitive'], budget)
  figure.savefig(path, dpi=110)

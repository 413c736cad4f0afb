"""The thesis on real scans, offline: a digit's turn as an invariance, as a sensitivity, as both.

An invariance to turns makes features forget how a digit is turned, and that a turned 6 is a 9; the
question is whether sensitivity in its place keeps both.
"""
import json
import pathlib
import sys
import time
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from equivariant_ssl.demo import demo_figure, demo_page
from equivariant_ssl.demo.arms import (
  READOUTS,
  ArmSpec,
  Budget,
  TrainedArm,
  readout_images,
  show_mean,
)
from equivariant_ssl.demo.workers import train_all
from equivariant_ssl.evaluate.result_files import as_json
from equivariant_ssl.evaluate.statistics import Interval, interval_text, paired
from equivariant_ssl.storage import record

ARMS = {
    'crops': ArmSpec('digits_simclr', {}, 'SimCLR with crops; nothing turns', untrained=True),
    'invariant': ArmSpec(
        'digits_simclr_equimod',
        {'equivariance': "{'name': 'none'}", 'augment.rotate.role': 'invariant'},
        'and quarter turns as one more invariance: features should not change'),
    'both': ArmSpec(
        'digits_simclr_equimod', {'augment.rotate.role': 'both'},
        'the same, and EquiMod is conditioned on the turns: its published wiring'),
    'sensitive': ArmSpec(
        'digits_simclr_equimod', {},
        'SimCLR with crops; only EquiMod\'s own views turn: it predicts where features go'),
}
LONGEST_FIRST = ('sensitive', 'both', 'invariant', 'crops')
IN_TABLE = ('turn', 'linear', 'both')  # the other read-outs are on the page
WIDTH = 120  # of what is printed where there is no terminal
CHANCE = {'turn': 25., 'linear': 10., 'both': 2.5, 'knn': 10., 'few': 10.}


def difference(arms: dict[str, TrainedArm], readout: str, arm: str, other: str) -> Interval:
  """Return how much more of a read-out one arm has than another, in points, paired by seed."""
  return paired(arms[arm].readouts[readout], arms[other].readouts[readout])


def _points(interval: Interval) -> str:
  return f'{interval_text(interval, digits=1)} points'


def _verb(interval: Interval, up: str, down: str) -> str:
  if not interval.excludes_zero:
    return 'makes no difference that these seeds can show to'
  return up if interval.mean > 0 else down


def conclude(arms: dict[str, TrainedArm]) -> list[str]:
  """Return what the numbers say, the most important sentence first."""
  def mean(readout: str, arm: str) -> str:
    return f'{np.mean(arms[arm].readouts[readout]):.1f} %'
  turn, digit, both = (difference(arms, readout, 'sensitive', other) for readout, other in
                       (('turn', 'invariant'), ('linear', 'crops'), ('both', 'invariant')))
  verdict = ('Sensitivity keeps more of the turn than the invariance' if turn.mean > 0 else
             'The invariance keeps more of the turn than sensitivity')
  if not turn.excludes_zero:
    verdict = 'These seeds do not show that sensitivity keeps more of the turn than the invariance'
  lead = (f'{verdict}: the turn of a held-out digit is read off the features of `sensitive` in '
          f'{mean("turn", "sensitive")}, of `invariant` in {mean("turn", "invariant")} '
          f'({_points(turn)}; untrained {mean("turn", "untrained")}, chance 25 %), while '
          f'sensitivity {_verb(digit, "adds to", "takes from")} the class accuracy of crops alone '
          f'({_points(digit)}).')
  at_once = (f'Class and turn are both right in {mean("both", "sensitive")} against '
             f'{mean("both", "invariant")} ({_points(both)}).')
  over_crops = difference(arms, 'turn', 'sensitive', 'crops')
  knn_cost, repair = (difference(arms, 'knn', *pair) for pair in
                      (('invariant', 'crops'), ('both', 'invariant')))
  more = (f'Against crops alone, sensitivity {_verb(over_crops, "adds to", "takes from")} what is '
          f'kept of the turn ({_points(over_crops)}). The invariance '
          f'{_verb(knn_cost, "adds to", "takes from")} the kNN accuracy of crops alone '
          f'({_points(knn_cost)}); EquiMod on top of the invariance '
          f'{_verb(repair, "wins back some of", "loses more of")} it ({_points(repair)}).')
  return [lead, at_once, more]


def accuracy_table(arms: dict[str, TrainedArm], images: str) -> Table:
  """Return the read-outs of each arm, with the differences that the conclusion is about."""
  seeds = len(arms['crops'].readouts['turn'])
  table = Table(title=f'{images}: mean ± std of {seeds} seeds; differences are paired by seed, '
                      'with 95 % intervals')
  columns = 'arm', *(READOUTS[name] for name in IN_TABLE), 'turn - invariant', 'class - crops'
  for column in columns:
    table.add_column(column, justify='left' if column == 'arm' else 'right')
  for name, arm in arms.items():
    against = [('turn', 'invariant'), ('linear', 'crops')]
    table.add_row(name, *(show_mean(arm.readouts[key]) for key in IN_TABLE),
                  *('' if name == other else
                    interval_text(difference(arms, readout, name, other), digits=1)
                    for readout, other in against))
  table.add_row('chance', *(f'{CHANCE[key]:g}' for key in IN_TABLE), '', '')
  return table


def _numbers(arms: dict[str, TrainedArm]) -> dict[str, Any]:
  """Return the arms as JSON, without the views that each digit retrieves."""
  return {name: as_json(arm._replace(retrieved=[retrieved._replace(nearest=retrieved.nearest[:0])
                                                for retrieved in arm.retrieved or ()]))
          for name, arm in arms.items()}


def print_results(arms: dict[str, TrainedArm], images: str, console: Console) -> None:
  """Print what the arms are, their accuracies, and what they say."""
  for name, spec in ARMS.items():
    console.print(f'{name:10s} {spec.story}', highlight=False)
  console.print(accuracy_table(arms, images))
  for sentence in conclude(arms):
    console.print(sentence, markup=False, highlight=False)


def run_demo(out: pathlib.Path, budget: Budget = Budget(3)) -> dict[str, TrainedArm]:
  """Train every arm of a budget; print the table and the conclusion.

  Writes results.json, table.txt, figure.png and report.html into `out`.
  """
  start = time.perf_counter()
  console = Console(soft_wrap=True, width=None if sys.stdout.isatty() else WIDTH)
  out.mkdir(parents=True, exist_ok=True)
  images = readout_images(budget)
  console.print(f'{len(ARMS)} arms x {budget.seeds} seeds: the network, the steps and the images '
                'are the same; only the role of the turn differs.')
  trained = train_all({name: ARMS[name] for name in LONGEST_FIRST}, budget)
  arms = {name: trained[name] for name in ('untrained', *ARMS)}
  minutes = (time.perf_counter() - start) / 60
  with open(out / 'table.txt', 'w', encoding='utf-8') as file:
    for printer in (console, Console(file=file, width=WIDTH)):
      print_results(arms, images, printer)
  content = {'arms': _numbers(arms), 'conclusion': conclude(arms), 'readout': budget.readout,
             'images': images, 'seeds': list(budget.seed_numbers), 'steps': budget.steps,
             'minutes': minutes, 'environment': record.environment()}
  record.write_atomically(out / 'results.json', json.dumps(content, indent=1) + '\n')
  demo_figure.draw(out / 'figure.png', arms, ARMS, budget)
  page = demo_page.write(out, arms, ARMS, budget, content)
  console.print(f'{minutes:.1f} minutes. Figure: {out / "figure.png"}  Report: {page}  '
                f'Numbers: {out / "results.json"}\n'
                'Next: eqssl train --config digits_simclr_equimod --workdir runs/mine',
                markup=False, highlight=False)
  return arms

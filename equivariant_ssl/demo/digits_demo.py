"""The thesis on real scans, offline: a digit's turn as an invariance, as a sensitivity, as both.

A digit's turn matters: a turned 6 is a 9.
"""
import json
import pathlib
import time

from rich.console import Console
from rich.table import Table

from equivariant_ssl.demo import demo_figure
from equivariant_ssl.demo.arms import READOUTS, ArmSpec, TrainedArm, show_mean, train_all
from equivariant_ssl.evaluate.evaluation import as_json
from equivariant_ssl.evaluate.statistics import Interval, interval_text, paired
from equivariant_ssl.storage import record

ARMS = {
    'crops': ArmSpec('digits_simclr', {}, 'SimCLR with crops', untrained=True),
    'invariant': ArmSpec(
        'digits_simclr_equimod',
        {'equivariance': "{'name': 'none'}", 'augment.rotate.role': 'invariant'},
        'SimCLR with crops, and quarter turns as one more invariance: 6 becomes 9'),
    'both': ArmSpec(
        'digits_simclr_equimod', {'augment.rotate.role': 'both'},
        'the same, and EquiMod is conditioned on the turns: its published wiring', untrained=True),
    'sensitive': ArmSpec(
        'digits_simclr_equimod', {},
        'SimCLR with crops alone; only EquiMod\'s own views turn: '
        'sensitivity instead of invariance'),
}
LONGEST_FIRST = ('sensitive', 'both', 'invariant', 'crops')


def _verb(difference: Interval, up: str, down: str) -> str:
  if not difference.excludes_zero:
    return 'makes no difference that these seeds can show to'
  return up if difference.mean > 0 else down


def conclude(arms: dict[str, TrainedArm]) -> str:
  """Return what the numbers say, in one sentence."""
  def difference(arm: str, other: str) -> Interval:
    return paired(arms[arm].readouts['knn'], arms[other].readouts['knn'])
  cost, addition = difference('invariant', 'crops'), difference('sensitive', 'crops')
  repair = difference('both', 'invariant')
  over_shuffled = [gain['all'].over_shuffled for gain in arms['sensitive'].gains or ()]
  uses = all(interval.excludes_zero and interval.mean > 0 for interval in over_shuffled)
  return (f'On these digits, turning as an invariance {_verb(cost, "helps", "costs")} kNN accuracy '
          f'({interval_text(cost)} points against crops alone); conditioning EquiMod on the turns '
          f'{_verb(repair, "wins back some of", "loses more of")} it ({interval_text(repair)}); '
          f'and sensitivity instead of invariance {_verb(addition, "adds to", "takes from")} crops '
          f'alone ({interval_text(addition)}), while the predictor '
          f'{"uses" if uses else "does not use"} the turn that it is given.')


def tables(arms: dict[str, TrainedArm], console: Console) -> None:
  """Print what the arms are, the accuracies, the paired differences, and EquiMod's gains."""
  for name, spec in ARMS.items():
    console.print(f'{name:10s} {spec.story}')
  seeds = len(arms['crops'].readouts['knn'])
  table = Table(title=f'797 held-out digits: mean ± std of {seeds} seeds; '
                      'paired difference [95 %]')
  for column in ('arm', *READOUTS.values(), 'kNN - crops'):
    table.add_column(column, justify='left' if column == 'arm' else 'right')
  for name, arm in arms.items():
    against_crops = paired(arm.readouts['knn'], arms['crops'].readouts['knn'])
    table.add_row(name, *(show_mean(arm.readouts[key]) for key in READOUTS),
                  '' if name == 'crops' else interval_text(against_crops, digits=1))
  console.print(table)
  console.print(_gain_table(arms))


def _gain_table(arms: dict[str, TrainedArm]) -> Table:
  table = Table(title='EquiMod\'s gain x 100, given the true turns, those of other images, none; '
                      'doing nothing is 0')
  for column in ('arm', 'true', 'shuffled', 'zeroed', 'true - shuffled', 'ratio'):
    table.add_column(column, justify='left' if column == 'arm' else 'right')
  for name, arm in arms.items():
    if arm.gains:
      gains = [gain['all'] for gain in arm.gains]
      cells = [show_mean([100 * getattr(gain, control).absolute.mean for gain in gains])
               for control in ('true', 'shuffled', 'zeroed')]
      table.add_row(name, *cells, show_mean([100 * gain.over_shuffled.mean for gain in gains]),
                    show_mean([gain.true.ratio.mean for gain in gains]))
  return table


def run_demo(out: pathlib.Path, seeds: int = 3, steps: int = 0) -> dict[str, TrainedArm]:
  """Train every arm over `seeds` seeds and print the tables and the conclusion.

  steps: the steps to train instead of the configs' epochs, where more than 0. Writes results.json,
  table.txt and figure.png into `out`.
  """
  start, console = time.perf_counter(), Console(soft_wrap=True)
  out.mkdir(parents=True, exist_ok=True)
  console.print(f'{len(ARMS)} arms x {seeds} seeds: the network, the steps and the images are the '
                'same; only the role of the turn differs.')
  trained = train_all({name: ARMS[name] for name in LONGEST_FIRST}, seeds, steps, console)
  arms = {name: trained[name] for name in ('untrained', *ARMS)}
  minutes = (time.perf_counter() - start) / 60
  with open(out / 'table.txt', 'w', encoding='utf-8') as file:
    for printer in (console, Console(file=file, width=110)):
      tables(arms, printer)
      printer.print(conclude(arms))
  content = {'arms': as_json(arms), 'minutes': minutes, 'environment': record.environment()}
  record.write_atomically(out / 'results.json', json.dumps(content, indent=1) + '\n')
  demo_figure.draw(out / 'figure.png', arms)
  print(f'{minutes:.1f} minutes. Figure: {out / "figure.png"}  Numbers: {out / "results.json"}\n'
        'Next: eqssl train --config digits_simclr_equimod --workdir runs/mine')
  return arms

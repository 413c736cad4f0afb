"""Every invariance objective on the digits, alone, with EquiMod and with E-SSL, in one table."""
import json
import pathlib
import time

import numpy as np
from rich.console import Console
from rich.table import Table

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
from equivariant_ssl.evaluate.statistics import interval_text, paired
from equivariant_ssl.storage import record
from equivariant_ssl.training.step_log import COLLAPSED

INVARIANCES = ('simclr', 'byol', 'simsiam', 'barlow', 'vicreg')
TURNS = {'augment.order': "('crop', 'rotate')", 'augment.rotate': "{'role': 'sensitive'}"}
EQUIVARIANCES = {
    '': {},
    '+ equimod': {**TURNS, 'equivariance':
                  "{'name': 'equimod', 'hidden': (128,), 'dim': 64, 'action_dim': 64}"},
    '+ essl': {**TURNS, 'equivariance':
               "{'name': 'essl', 'weight': .4, 'hidden': (128, 128)}"},
}


def specs() -> dict[str, ArmSpec]:
  """Return the arms, {name: spec}; those that take longest come first."""
  return {f'{invariance} {equivariance}'.strip():
          ArmSpec(f'digits_{invariance}', overrides,
                  untrained=invariance == 'simclr' and not equivariance)
          for equivariance, overrides in reversed(EQUIVARIANCES.items())
          for invariance in INVARIANCES}


def table(arms: dict[str, TrainedArm], images: str) -> Table:
  """Return the accuracies, what the equivariance changed, and whether the embeddings collapsed.

  images: what the arms are read out on, in words.
  """
  seeds = len(arms['untrained'].readouts['knn'])
  result = Table(title=f'{images} (chance: turn 25 %, class 10 %): mean ± std of {seeds} seeds; '
                       'paired difference [95 %]; spread: 1 fills the sphere, under '
                       f'{COLLAPSED} is a collapse')
  for column in ('arm', *READOUTS.values(), 'kNN - alone', 'spread'):
    result.add_column(column, justify='left' if column == 'arm' else 'right')

  def add_row(name: str, difference: str, spread: str) -> None:
    accuracies = (show_mean(arms[name].readouts[key]) for key in READOUTS)
    result.add_row(name, *accuracies, difference, spread)
  add_row('untrained', '', '')
  for invariance in INVARIANCES:
    for equivariance in EQUIVARIANCES:
      name = f'{invariance} {equivariance}'.strip()
      spread = np.array([last['std'] for last in arms[name].last])
      difference = paired(arms[name].readouts['knn'], arms[invariance].readouts['knn'])
      add_row(name, interval_text(difference, digits=1) if equivariance else '',
              f'{spread.mean():.2f}' + (' COLLAPSED' if spread.min() < COLLAPSED else ''))
  return result


def conclude(arms: dict[str, TrainedArm]) -> str:
  """Return whether anything collapsed, and what was best, in words."""
  collapsed = [name for name, arm in arms.items()
               if any(last['std'] < COLLAPSED for last in arm.last)]
  best = max((name for name in arms if name != 'untrained'),
             key=lambda name: np.mean(arms[name].readouts['knn']))
  first = f'Collapsed: {", ".join(collapsed)}.' if collapsed else 'No run collapsed.'
  return (f'{first} Highest mean kNN accuracy: {best}, {show_mean(arms[best].readouts["knn"])} %. '
          'The settings of each method are those of its digits config, tuned little: the table '
          'shows that every pair trains, not which method is best.')


def run_demo(out: pathlib.Path, budget: Budget = Budget(1)) -> dict[str, TrainedArm]:
  """Train every arm of a budget and print the table.

  Writes methods.json and methods.txt into `out`.
  """
  start, console = time.perf_counter(), Console(soft_wrap=True)
  out.mkdir(parents=True, exist_ok=True)
  arms = train_all(specs(), budget)
  minutes = (time.perf_counter() - start) / 60
  with open(out / 'methods.txt', 'w', encoding='utf-8') as file:
    for printer in (console, Console(file=file, width=140)):
      printer.print(table(arms, readout_images(budget)))
      printer.print(conclude(arms))
  content = {'arms': as_json(arms), 'minutes': minutes, 'environment': record.environment()}
  record.write_atomically(out / 'methods.json', json.dumps(content, indent=1) + '\n')
  print(f'{minutes:.1f} minutes. Numbers: {out / "methods.json"}')
  return arms

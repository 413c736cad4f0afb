"""Every invariance objective on the digits, alone, with EquiMod and with E-SSL: one table."""
import json
import pathlib
import time

import numpy as np
from rich.console import Console
from rich.table import Table

from equivariant_ssl.demo.arms import READOUTS, Arm, Spec, show_mean, train_all
from equivariant_ssl.evaluate import evaluation
from equivariant_ssl.evaluate.statistics import paired, show
from equivariant_ssl.storage import record
from equivariant_ssl.training.loop import COLLAPSED

INVARIANCES = ('simclr', 'byol', 'simsiam', 'barlow', 'vicreg')
TURNS = {'augment.order': "('crop', 'rotate')", 'augment.rotate': "{'role': 'sensitive'}"}
WITH = {
    '': {},
    '+ equimod': {**TURNS, 'equivariance': "{'name': 'equimod', 'hidden': (128,), 'dim': 64, 'action_dim': 64}"},
    '+ essl': {**TURNS, 'equivariance': "{'name': 'essl', 'weight': .4, 'hidden': (128, 128)}"},
}


def specs() -> dict[str, Spec]:
  """The arms, those that take longest first."""
  return {f'{inv} {what}'.strip(): Spec(f'digits_{inv}', overrides, untrained=inv == 'simclr' and not what)
          for what, overrides in reversed(WITH.items()) for inv in INVARIANCES}


def table(arms: dict[str, Arm]) -> Table:
  """Accuracies, what the equivariance changed, and whether the embeddings collapsed."""
  seeds = len(arms['untrained'].readouts['knn'])
  found = Table(title=f'797 held-out digits, chance 10 %: mean ± std of {seeds} seeds; paired difference [95 %]; spread: 1 '
                      f'fills the sphere, under {COLLAPSED} is a collapse')
  for column in ('arm', *READOUTS.values(), 'kNN - alone', 'spread'):
    found.add_column(column, justify='left' if column == 'arm' else 'right')
  row = lambda name, difference, spread: found.add_row(
      name, *(show_mean(arms[name].readouts[k]) for k in READOUTS), difference, spread)
  row('untrained', '', '')
  for inv in INVARIANCES:
    for what in WITH:
      name = f'{inv} {what}'.strip()
      spread = np.array([last['std'] for last in arms[name].last])
      row(name, show(paired(arms[name].readouts['knn'], arms[inv].readouts['knn']), digits=1) if what else '',
          f'{spread.mean():.2f}' + (' COLLAPSED' if spread.min() < COLLAPSED else ''))
  return found


def conclude(arms: dict[str, Arm]) -> str:
  """Whether anything collapsed, and what was best."""
  collapsed = [n for n, arm in arms.items() if any(last['std'] < COLLAPSED for last in arm.last)]
  best = max((n for n in arms if n != 'untrained'), key=lambda n: np.mean(arms[n].readouts['knn']))
  return ((f'Collapsed: {", ".join(collapsed)}. ' if collapsed else 'No run collapsed. ') +
          f'Highest mean kNN accuracy: {best}, {show_mean(arms[best].readouts["knn"])} %. The settings of each method are '
          'those of its digits config, tuned little: the table says that every pair trains, not which method is best.')


def run_demo(out: pathlib.Path, seeds: int = 1, steps: int = 0) -> dict[str, Arm]:
  """Train every arm over `seeds` seeds (for `steps` steps instead of the configs' epochs where > 0), print the table,
  and write methods.json and methods.txt into `out`."""
  start, console = time.perf_counter(), Console(soft_wrap=True)
  out.mkdir(parents=True, exist_ok=True)
  arms = train_all(specs(), seeds, steps, console)
  minutes = (time.perf_counter() - start) / 60
  with open(out / 'methods.txt', 'w', encoding='utf-8') as file:
    for printer in (console, Console(file=file, width=120)):
      printer.print(table(arms))
      printer.print(conclude(arms))
  record.write_whole(out / 'methods.json', json.dumps(
      {'arms': evaluation.as_json(arms), 'minutes': minutes, 'environment': record.environment()}, indent=1) + '\n')
  print(f'{minutes:.1f} minutes. Numbers: {out / "methods.json"}')
  return arms

"""The thesis on real scans, offline: a digit's turn as an invariance, as a sensitivity, as both. 6 becomes 9."""
import json
import pathlib
import time

from rich.console import Console
from rich.table import Table

from equivariant_ssl.demo import demo_figure
from equivariant_ssl.demo.arms import READOUTS, Arm, Spec, show_mean, train_all
from equivariant_ssl.evaluate import evaluation
from equivariant_ssl.evaluate.statistics import Interval, paired, show
from equivariant_ssl.storage import record

ARMS = {
    'crops': Spec('digits_simclr', {}, 'SimCLR with crops', untrained=True),
    'invariant': Spec('digits_simclr_equimod', {'equivariance': "{'name': 'none'}", 'augment.rotate.role': 'invariant'},
                      'SimCLR with crops, and quarter turns as one more invariance: 6 becomes 9'),
    'both': Spec('digits_simclr_equimod', {'augment.rotate.role': 'both'},
                 'the same, and EquiMod is told of the turns: its published wiring', untrained=True),
    'sensitive': Spec('digits_simclr_equimod', {},
                      'SimCLR with crops alone; only EquiMod\'s own views turn: sensitivity instead of invariance'),
}
LONGEST_FIRST = ('sensitive', 'both', 'invariant', 'crops')


def conclude(arms: dict[str, Arm]) -> str:
  """One sentence, from the numbers."""
  against = lambda a, b, what: paired(arms[a].readouts[what], arms[b].readouts[what])

  def verb(of: Interval, up: str, down: str) -> str:
    return (up if of.mean > 0 else down) if of.excludes_zero else 'makes no difference that these seeds can show to'
  cost, keep, gain = (against('invariant', 'crops', 'knn'), against('sensitive', 'crops', 'knn'),
                      against('both', 'invariant', 'knn'))
  told = [g['all'].over_shuffled for g in arms['sensitive'].gains]
  uses = all(t.excludes_zero and t.mean > 0 for t in told)
  return (f'On these digits, turning as an invariance {verb(cost, "helps", "costs")} kNN accuracy ({show(cost)} points '
          f'against crops alone); telling EquiMod of the turns {verb(gain, "wins back some of", "loses more of")} it '
          f'({show(gain)}); and sensitivity instead of invariance {verb(keep, "adds to", "takes from")} crops alone '
          f'({show(keep)}), while the predictor {"uses" if uses else "does not use"} what it is told.')


def tables(arms: dict[str, Arm], console: Console) -> None:
  """What the arms are, the results, the paired differences, and what the predictor learnt."""
  for name, spec in ARMS.items():
    console.print(f'{name:10s} {spec.story}')
  seeds = len(arms['crops'].readouts['knn'])
  table = Table(title=f'797 held-out digits: mean ± std of {seeds} seeds; paired difference [95 %]')
  for column in ('arm', *READOUTS.values(), 'kNN - crops'):
    table.add_column(column, justify='left' if column == 'arm' else 'right')
  for name, arm in arms.items():
    difference = '' if name == 'crops' else show(paired(arm.readouts['knn'], arms['crops'].readouts['knn']), digits=1)
    table.add_row(name, *(show_mean(arm.readouts[k]) for k in READOUTS), difference)
  console.print(table)
  table = Table(title='EquiMod\'s gain x 100, told the true turns, those of other images, none; doing nothing is 0')
  for column in ('arm', 'true', 'shuffled', 'zeroed', 'true - shuffled', 'ratio'):
    table.add_column(column, justify='left' if column == 'arm' else 'right')
  for name, arm in arms.items():
    if arm.gains:
      g = [x['all'] for x in arm.gains]
      gains = lambda control, g=g: show_mean([100 * getattr(x, control).absolute.mean for x in g])
      table.add_row(name, *map(gains, ('true', 'shuffled', 'zeroed')),
                    show_mean([100 * x.over_shuffled.mean for x in g]), show_mean([x.true.ratio.mean for x in g]))
  console.print(table)


def run_demo(out: pathlib.Path, seeds: int = 3, steps: int = 0) -> dict[str, Arm]:
  """Train every arm over `seeds` seeds (for `steps` steps instead of the configs' epochs where > 0), print the
  tables and the conclusion, and write results.json, table.txt and figure.png into `out`."""
  start, console = time.perf_counter(), Console(soft_wrap=True)
  out.mkdir(parents=True, exist_ok=True)
  console.print(f'{len(ARMS)} arms x {seeds} seeds: the same network, steps and images; only the role of the turn differs.')
  trained = train_all({name: ARMS[name] for name in LONGEST_FIRST}, seeds, steps, console)
  arms = {name: trained[name] for name in ('untrained', *ARMS)}
  minutes = (time.perf_counter() - start) / 60
  with open(out / 'table.txt', 'w', encoding='utf-8') as file:
    for printer in (console, Console(file=file, width=110)):
      tables(arms, printer)
      printer.print(conclude(arms))
  record.write_whole(out / 'results.json', json.dumps(
      {'arms': evaluation.as_json(arms), 'minutes': minutes, 'environment': record.environment()}, indent=1) + '\n')
  demo_figure.draw(out / 'figure.png', arms)
  print(f'{minutes:.1f} minutes. Figure: {out / "figure.png"}  Numbers: {out / "results.json"}\n'
        'Next: eqssl train --config digits_simclr_equimod --workdir runs/mine')
  return arms

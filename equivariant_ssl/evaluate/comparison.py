"""Compare evaluated runs: mean and spread over seeds, and differences paired by seed with their intervals."""
import csv
import json
import pathlib
import shlex
import sys
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from equivariant_ssl import config as configs
from equivariant_ssl.errors import UserError
from equivariant_ssl.evaluate.evaluation import WIDTH
from equivariant_ssl.evaluate.protocols import PROTOCOLS
from equivariant_ssl.evaluate.result_files import NEW, WORDS, result, says
from equivariant_ssl.evaluate.statistics import Interval, mean_std, paired, plain, show
from equivariant_ssl.storage import record


class Row(NamedTuple):
  """One number of one group of runs. seeds: {seed: its value}; difference: to the first group, paired by seed (None: of the
  first itself, or no seed in common). scale: 100 where it is shown in per cent."""
  protocol: str
  number: str
  group: str
  seeds: dict[int, float]
  untrained: float | None
  difference: Interval | None
  scale: float


def method(config: Any) -> str:
  """'simclr + equimod': what a run's objectives are called."""
  given = config.equivariance if isinstance(config.equivariance, (list, tuple)) else [config.equivariance]
  return ' + '.join([config.invariance.name, *(e.name for e in given if e.name != 'none')])


def group(config: Any, by: str) -> str:
  """The group of a run: its method, or the value of the config's field `by` ('augment.rotate.role')."""
  if by == 'method':
    return method(config)
  node = config
  for part in by.split('.'):
    if not hasattr(node, 'get') or part not in node:
      raise UserError(f'config has no {by!r} to group by.', 'e.g. --group-by method or --group-by augment.rotate.role')
    node = node[part]
  parts = node if isinstance(node, (list, tuple)) else [node]
  if any(hasattr(p, 'get') for p in parts):
    fields = [k for k in record.leaves(configs.as_json(config)) if k.startswith(f'{by}.')]
    raise UserError(f'config.{by} is a whole section: it is no name of a group.',
                    f'e.g. --group-by {" or --group-by ".join(["method", *fields[:1]])}')
  return str(node)


def read(workdir: pathlib.Path, by: str) -> tuple[str, int, dict[tuple[str, str], tuple[float, float, float]]]:
  """(group, seed, {(protocol, number): (trained, untrained, what to show them times)}) of a run, each a mean over the
  evaluation's seeds. The protocol is named as its file, which says what epochs and batch it was given."""
  config = configs.read(workdir / 'config.json')
  found = {}
  for path in sorted((workdir / 'eval').glob('*.json')):
    content = result(path)
    if content.get('protocol') not in PROTOCOLS or 'trained' not in content:
      continue
    scale = 100. if PROTOCOLS[content['protocol']].percent else 1.
    for number in content['trained'][0]['numbers']:
      mean = lambda who, number=number, of=content: mean_std([plain(f['numbers'][number]) for f in of[who]])[0] if (
          who in of) else None  # a study measures the untrained network once a seed, not in every arm
      found[path.stem, number] = mean('trained'), mean('untrained'), scale
  if not found:
    raise UserError(f'{str(workdir)!r} has no results to compare.', f'First: eqssl eval {shlex.quote(str(workdir))}')
  return group(config, by), config.seed, found


def _mean(values: list[float | None]) -> float | None:
  known = [v for v in values if v is not None]
  return mean_std(known)[0] if known else None


def rows(workdirs: list[pathlib.Path], by: str = 'method', protocols: tuple[str, ...] = ()) -> list[Row]:
  """Every number that the runs share, a row a group, in the order of the runs; UserError where two runs of a group have
  one seed."""
  groups: dict[str, dict[int, dict]] = {}
  for workdir in workdirs:
    name, seed, found = read(workdir, by)
    if seed in groups.setdefault(name, {}):
      raise UserError(f'{str(workdir)!r} is a second run of {name!r} with seed {seed}.',
                      'Give one run a seed, or --group-by a field in which they differ.')
    groups[name][seed] = found
  shared = set.intersection(*(set(found) for seeds in groups.values() for found in seeds.values()))
  first, out = next(iter(groups)), []
  every = [k for k in next(iter(groups[first].values())) if k in shared and (not protocols or k[0] in protocols)]
  if not every:
    raise UserError('These runs share no result.', 'Evaluate all of them alike: eqssl eval DIR... --protocol NAME')
  for key in every:
    for name, seeds in groups.items():
      values = {seed: found[key][0] for seed, found in sorted(seeds.items())}
      common = [s for s in values if s in groups[first]]
      difference = paired([values[s] for s in common], [groups[first][s][key][0] for s in common]) if common else None
      out.append(Row(*key, name, values, _mean([found[key][1] for found in seeds.values()]),
                     None if name == first else difference, next(iter(seeds.values()))[key][2]))
  return out


def doubts(workdirs: list[pathlib.Path], protocols: tuple[str, ...] = ()) -> list[str]:
  """A line for each result file that the runs have and that is no like for like: of an earlier version, which did not write
  down what its numbers are of; or of other data, pixels or constants in one run than in another."""
  found: dict[str, dict[pathlib.Path, dict]] = {}
  for workdir in workdirs:
    for path in sorted((workdir / 'eval').glob('*.json')):
      if not protocols or path.stem in protocols:
        found.setdefault(path.stem, {})[workdir] = result(path)
  lines = []
  for stem, of in found.items():
    old = [w for w, one in of.items() if not says(one)]
    if old:
      lines.append(f'{stem} of {", ".join(map(str, old))}: of an earlier version, which did not write down on what data and '
                   f'pixels. Again: eqssl eval {" ".join(shlex.quote(str(w)) for w in old)} --protocol {stem}')
    for field in NEW:
      kinds = {json.dumps(one[field] if field != 'inputs' else one[field]['version'], sort_keys=True)
               for one in of.values() if says(one)}
      if len(kinds) > 1:
        lines.append(f'{stem}: not of the same {WORDS[field]} in all runs.')
  return lines


def table(found: list[Row]) -> Table:
  """A row a number and group."""
  first = found[0].group
  out = Table(title=f'mean ± standard deviation over seeds; difference from {first} paired by seed [95 %]')
  for column in ('protocol', 'number', 'group', 'seeds', 'trained', 'untrained', 'difference'):
    out.add_column(column, justify='left' if column in ('protocol', 'number', 'group') else 'right', overflow='fold')
  before = None
  for r in found:
    mean, std = mean_std(list(r.seeds.values()))
    s, here = r.scale, (r.protocol, r.number)
    out.add_row(*(here if here != before else ('', '')), r.group, str(len(r.seeds)),
                f'{s * mean:.2f}' + (f' ± {s * std:.2f}' if std is not None else ''),
                f'{s * r.untrained:.2f}' if r.untrained is not None else '',
                show(r.difference, s) if r.difference else '')
    before = here
  return out


def write(found: list[Row], path: pathlib.Path) -> None:
  """The same as CSV, unscaled: one line a number and group, with every seed's value."""
  seeds = sorted({s for r in found for s in r.seeds})
  with open(path, 'w', newline='', encoding='utf-8') as file:
    out = csv.writer(file)
    out.writerow(['protocol', 'number', 'group', 'n', 'mean', 'std', 'untrained', 'difference', 'low', 'high',
                  *(f'seed {s}' for s in seeds)])
    for r in found:
      d = r.difference or Interval(None, None, None, 0)
      out.writerow([r.protocol, r.number, r.group, len(r.seeds), *mean_std(list(r.seeds.values())), r.untrained,
                    d.mean, d.low, d.high, *(r.seeds.get(s, '') for s in seeds)])


def compare(workdirs: list[pathlib.Path], by: str = 'method', protocols: tuple[str, ...] = (),
            out: pathlib.Path = pathlib.Path('compare.csv'), console: Console | None = None) -> list[Row]:
  """Print the table of evaluated runs and write it to `out`."""
  found = rows(workdirs, by, protocols)
  console = console or Console(soft_wrap=True, width=None if sys.stdout.isatty() else WIDTH)
  console.print(table(found))
  for line in doubts(workdirs, protocols):
    console.print(line)
  write(found, out)
  console.print(f'Written to {out}')
  return found

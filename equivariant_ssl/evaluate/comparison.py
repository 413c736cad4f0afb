"""Compare evaluated runs: mean and spread over seeds, and differences paired by seed with their
intervals."""
import csv
import json
import pathlib
import shlex
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from equivariant_ssl.config import config_to_json, read_config
from equivariant_ssl.errors import UserError
from equivariant_ssl.evaluate.evaluation import WIDTH
from equivariant_ssl.evaluate.protocols import PROTOCOLS
from equivariant_ssl.evaluate.result_files import NEW, WORDS, read_result, states_origin
from equivariant_ssl.evaluate.statistics import (
  Interval,
  interval_text,
  mean_std,
  mean_value,
  paired,
)
from equivariant_ssl.storage import record

DEPTH = 3  # folders in folders in which runs are searched
COLUMNS = ('protocol', 'number', 'group', 'seeds', 'trained', 'untrained', 'difference')


class ComparisonRow(NamedTuple):
  """One number of one group of runs.

  seeds: {seed: its value}. untrained: the mean value of the untrained networks. difference: to the
  first group, paired by seed (None for the first group itself, or without a common seed). scale:
  100 where the number is shown in percent.
  """
  protocol: str
  number: str
  group: str
  seeds: dict[int, float]
  untrained: float | None
  difference: Interval | None
  scale: float


class Number(NamedTuple):
  """One number of one run, each value a mean over the evaluation's seeds.

  scale: see ComparisonRow.
  """
  trained: float
  untrained: float | None
  scale: float


Numbers = dict[tuple[str, str], Number]  # {(protocol, number): its values}


def expand_runs(dirs: Sequence[str | pathlib.Path]) -> list[pathlib.Path]:
  """Return the folders of runs, with the runs in each folder that is neither a run nor a study.

  They are searched DEPTH folders deep; studies in such a folder, and exported weights, are left
  out. A folder without a run stays, so that it is reported as a mistake.
  """
  def runs_in(folder: pathlib.Path, depth: int) -> list[pathlib.Path]:
    if (folder / 'config.json').is_file() and not (folder / 'model.safetensors').exists():
      return [folder]
    if not depth or (folder / 'study.json').is_file() or not folder.is_dir():
      return []
    return [run for child in sorted(folder.iterdir()) if not child.name.startswith('.')
            for run in runs_in(child, depth - 1)]

  folders = []
  for folder in map(pathlib.Path, dirs):
    alone = any((folder / name).is_file() for name in ('config.json', 'study.json'))
    folders += [folder] if alone else runs_in(folder, DEPTH) or [folder]
  return folders


def method(config: Any) -> str:
  """Return what a run's objectives are called, such as 'simclr + equimod'."""
  sections = config.equivariance
  if not isinstance(sections, (list, tuple)):
    sections = [sections]
  return ' + '.join([config.invariance.name, *(e.name for e in sections if e.name != 'none')])


def group(config: Any, by: str) -> str:
  """Return the group of a run: its method, or the value of the config's field `by`
  ('augment.rotate.role')."""
  if by == 'method':
    return method(config)
  node = config
  for part in by.split('.'):
    if isinstance(node, (list, tuple)):  # of sections: 'equivariance.0.name'
      node = {str(i): section for i, section in enumerate(node)}
    if not hasattr(node, 'get') or part not in node:
      raise UserError(f'config has no {by!r} to group by.',
                      'e.g. --group-by method or --group-by augment.rotate.role')
    node = node[part]
  parts = node if isinstance(node, (list, tuple)) else [node]
  if any(hasattr(p, 'get') for p in parts):
    fields = [k for k in record.config_leaves(config_to_json(config)) if k.startswith(f'{by}.')]
    raise UserError(f'config.{by} is a whole section, and does not name a group.',
                    f'e.g. --group-by {" or --group-by ".join(["method", *fields[:1]])}')
  return str(node)


def _mean_over_seeds(seeds: list[dict], number: str) -> float:
  return mean_std([mean_value(seed['numbers'][number]) for seed in seeds])[0]


def read_numbers(workdir: pathlib.Path, by: str) -> tuple[str, int, Numbers]:
  """Return (group, seed, Numbers) of a run.

  A protocol is named as its file is, which says what epochs and batch it was given.
  """
  config: Any = read_config(workdir / 'config.json')
  numbers: Numbers = {}
  for path in sorted((workdir / 'eval').glob('*.json')):
    result = read_result(path)
    if result.get('protocol') not in PROTOCOLS or 'trained' not in result:
      continue
    scale = 100. if PROTOCOLS[result['protocol']].percent else 1.
    for number in result['trained'][0]['numbers']:
      untrained = None  # a study measures the untrained network once a seed, not in every arm
      if 'untrained' in result:
        untrained = _mean_over_seeds(result['untrained'], number)
      trained = _mean_over_seeds(result['trained'], number)
      numbers[path.stem, number] = Number(trained, untrained, scale)
  if not numbers:
    raise UserError(f'{str(workdir)!r} has no results to compare.',
                    f'First: eqssl eval {shlex.quote(str(workdir))}')
  return group(config, by), config.seed, numbers


def _mean(values: list[float | None]) -> float | None:
  known = [v for v in values if v is not None]
  return mean_std(known)[0] if known else None


def _row(key: tuple[str, str], name: str, runs: dict[int, Numbers],
         first: dict[int, Numbers] | None) -> ComparisonRow:
  """Return the ComparisonRow of number `key` of the group `name`.

  runs, first: the Numbers of its runs and of those of the first group by seed (None for the first
  group itself).
  """
  values = {seed: numbers[key].trained for seed, numbers in sorted(runs.items())}
  difference = None
  if first is not None and (common := [s for s in values if s in first]):
    difference = paired([values[s] for s in common], [first[s][key].trained for s in common])
  protocol, number = key
  return ComparisonRow(protocol, number, name, values,
             _mean([numbers[key].untrained for numbers in runs.values()]), difference,
             next(iter(runs.values()))[key].scale)


def rows(workdirs: list[pathlib.Path], by: str = 'method', protocols: tuple[str, ...] = ()
         ) -> list[ComparisonRow]:
  """Return every number that the runs share, a row for each group, in the order of the runs.

  Raises UserError where two runs of a group have one seed.
  """
  groups: dict[str, dict[int, Numbers]] = {}
  for workdir in workdirs:
    name, seed, numbers = read_numbers(workdir, by)
    if seed in groups.setdefault(name, {}):
      raise UserError(f'{str(workdir)!r} is a second run of {name!r} with seed {seed}.',
                      'Name one run for each seed, or add --group-by with a field that differs.')
    groups[name][seed] = numbers
  shared = set.intersection(*(set(n) for runs in groups.values() for n in runs.values()))
  first = next(iter(groups))
  keys = [k for k in next(iter(groups[first].values()))
          if k in shared and (not protocols or k[0] in protocols)]
  if not keys:
    raise UserError('These runs share no result.',
                    'Evaluate all of them alike: eqssl eval DIR... --protocol NAME')
  return [_row(key, name, runs, None if name == first else groups[first])
          for key in keys for name, runs in groups.items()]


def _request(result: dict) -> str:
  """Return the options of `eqssl eval` that ask for a result."""
  options = result.get('options', {})
  settings = {'protocol': result['protocol'],
              **{k: options.get(k) for k in ('epochs', 'batch', 'images', 'readout')}}
  return ' '.join(f'--{k} {shlex.quote(str(v))}' for k, v in settings.items() if v)


def caveats(workdirs: list[pathlib.Path], protocols: tuple[str, ...] = ()) -> list[str]:
  """Return a line for each result file of the runs that does not compare like with like.

  Either an earlier version wrote it, which did not record what its numbers depend on; or its data,
  pixels or constants differ between the runs.
  """
  files: dict[str, dict[pathlib.Path, dict]] = {}
  for workdir in workdirs:
    for path in sorted((workdir / 'eval').glob('*.json')):
      if not protocols or path.stem in protocols:
        files.setdefault(path.stem, {})[workdir] = read_result(path)
  lines = []
  for stem, results in files.items():
    old = [workdir for workdir, result in results.items() if not states_origin(result)]
    if old:
      folders = ' '.join(shlex.quote(str(workdir)) for workdir in old)
      lines.append(f'{stem} of {", ".join(map(str, old))}: an earlier version wrote it, which did '
                   'not record the data and the pixels. '
                   f'Again: eqssl eval {folders} {_request(results[old[0]])}')
    new = [result for result in results.values() if states_origin(result)]
    for field in NEW:
      values = [r['inputs']['version'] if field == 'inputs' else r[field] for r in new]
      if len({json.dumps(value, sort_keys=True) for value in values}) > 1:
        lines.append(f'{stem}: the runs were not measured with the same {WORDS[field]}.')
  return lines


def unequal_budgets(trained: Iterable[tuple[Any, Sequence[dict]]], by: str = 'method') -> str:
  """Return a sentence that says how many images each group was trained on; '' where they are equal.

  trained: (config, rows of the log) of each run. A run without a log is left out.
  """
  budgets: dict[str, list[int]] = {}
  for config, log in trained:
    if not log:  # imported, so that nobody here knows what it was trained on
      continue
    images = config.batch * log[-1]['step']
    budgets.setdefault(group(config, by), []).append(images)
  if len({images for budget in budgets.values() for images in budget}) < 2:
    return ''
  texts = (f'{name} {min(images):,}' + (f' to {max(images):,}' if min(images) < max(images) else '')
           for name, images in budgets.items())
  return ('The budgets are not equal, so a difference may come from the longer training: images '
          f'trained on, a run: {"; ".join(texts)}.')


def table(rows: list[ComparisonRow]) -> Table:
  """Return the comparison as a table: a line for each number and group."""
  title = ('mean ± standard deviation over seeds; '
           f'difference from {rows[0].group} paired by seed [95 %]')
  out = Table(title=title)
  for column in COLUMNS:
    left = column in ('protocol', 'number', 'group')
    out.add_column(column, justify='left' if left else 'right', overflow='fold')
  before = None
  for r in rows:
    mean, std = mean_std(list(r.seeds.values()))
    s, name = r.scale, (r.protocol, r.number)
    out.add_row(*(name if name != before else ('', '')), r.group, str(len(r.seeds)),
                f'{s * mean:.2f}' + (f' ± {s * std:.2f}' if std is not None else ''),
                f'{s * r.untrained:.2f}' if r.untrained is not None else '',
                interval_text(r.difference, s) if r.difference else '')
    before = name
  return out


def write(rows: list[ComparisonRow], path: pathlib.Path) -> None:
  """Write the comparison as CSV, unscaled: one line for each number and group, with the value of
  every seed."""
  seeds = sorted({s for r in rows for s in r.seeds})
  with open(path, 'w', newline='', encoding='utf-8') as file:
    out = csv.writer(file)
    out.writerow(['protocol', 'number', 'group', 'n', 'mean', 'std', 'untrained', 'difference',
                  'low', 'high', *(f'seed {s}' for s in seeds)])
    for r in rows:
      d = r.difference
      interval = (d.mean, d.low, d.high) if d else (None, None, None)
      out.writerow([r.protocol, r.number, r.group, len(r.seeds), *mean_std(list(r.seeds.values())),
                    r.untrained, *interval, *(r.seeds.get(s, '') for s in seeds)])


def compare(workdirs: list[pathlib.Path], by: str = 'method', protocols: tuple[str, ...] = (),
            out: pathlib.Path = pathlib.Path('compare.csv'), console: Console | None = None
            ) -> list[ComparisonRow]:
  """Print the table of evaluated runs and write it to `out`.

  workdirs: folders of runs, or folders that hold such.
  """
  workdirs = expand_runs(workdirs)
  compared = rows(workdirs, by, protocols)
  console = console or Console(soft_wrap=True, width=None if sys.stdout.isatty() else WIDTH)
  console.print(table(compared))
  trained = ((read_config(d / 'config.json'), record.read_metrics(d)) for d in workdirs)
  for line in filter(None, [unequal_budgets(trained, by), *caveats(workdirs, protocols)]):
    console.print(line)
  write(compared, out)
  console.print(f'Written to {out}')
  return compared

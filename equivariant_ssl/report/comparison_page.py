"""The report that compares several runs: their numbers, paired by seed, their curves, and how their
configs differ."""
import os
import pathlib
import shlex
import urllib.parse
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.console import Console

from equivariant_ssl import config
from equivariant_ssl.errors import UserError
from equivariant_ssl.evaluate import comparison
from equivariant_ssl.evaluate.protocols import PROTOCOLS
from equivariant_ssl.evaluate.statistics import interval_text, mean_std, mean_value, quantity
from equivariant_ssl.report import charts, page, panels, results, run_folder
from equivariant_ssl.report.page import Chart, Charts, Link, Missing, Paragraph, Section, Table
from equivariant_ssl.report.run_folder import RunFolder


def _names(folders: Sequence[RunFolder]) -> list[str]:
  """Return the paths of the runs' folders, shortened to the last parts that tell them apart."""
  parts = [folder.workdir.absolute().parts for folder in folders]
  names = ['/'.join(p) for p in parts]
  for k in range(1, max(map(len, parts)) + 1):
    names = ['/'.join(p[-k:]) for p in parts]
    if len(set(names)) == len(names):
      break
  return names


def _link(name: str, workdir: pathlib.Path, out: pathlib.Path) -> str | Link:
  """Return the name of a run, with a link to its page where the run has one."""
  target = workdir / 'report.html'
  if not target.exists():
    return name
  path = os.path.relpath(target.absolute(), out.absolute().parent)
  return Link(name, urllib.parse.quote(path))


def _runs(folders: Sequence[RunFolder], names: Sequence[str], groups: Sequence[str],
          out: pathlib.Path) -> Section:
  """Return the section with a table of the runs and a table of how their configs differ."""
  rows = []
  for folder, name, group in zip(folders, names, groups, strict=True):
    steps = folder.log[-1]['step'] if folder.log else 0
    rows.append((_link(name, folder.workdir, out), group, folder.config.data.name,
                 folder.config.seed, steps, panels.duration(panels.training_seconds(folder)),
                 panels.devices(folder.env), panels.commit(folder.env),
                 folder.env.get('time', 'unknown')))
  columns = ('run', 'group', 'data', 'seed', 'steps', 'time', 'devices', 'commit', 'started')
  fields = [run_folder.leaves(config.config_to_json(folder.config)) for folder in folders]
  differences = [(k, *(one.get(k, 'absent') for one in fields))
                 for k in dict.fromkeys(k for one in fields for k in one)
                 if len({one.get(k) for one in fields}) > 1
                 and not run_folder.added_whole(k, fields)]
  blocks: list[Any] = [Table('The runs', columns, rows, 3)]
  if differences:
    blocks.append(Table('Config fields in which they differ', ('field', *names), differences,
                        len(names) + 1))
  else:
    blocks.append(Paragraph('Their configs do not differ in any field.'))
  return Section('What ran', 'ran', blocks)


def _protocol(stem: str) -> str:
  """Return the protocol of a result file: 'linear' for 'linear-epochs2'."""
  return max((p for p in PROTOCOLS if stem == p or stem.startswith(f'{p}-')), key=len)


def _chance(folders: Sequence[RunFolder], row: comparison.ComparisonRow) -> str:
  """Return what guessing achieves for a number, '' where that is not known."""
  controls = folders[0].results[row.protocol]['trained'][0]['controls']
  chance = controls.get(row.number, {}).get('chance')
  return '' if chance is None else f'{row.scale * mean_value(chance):.2f}'


def _table(folders: Sequence[RunFolder], rows: Sequence[comparison.ComparisonRow]) -> Table:
  """Return the table of every number of every group."""
  cells = []
  for row in rows:
    mean, std = mean_std(list(row.seeds.values()))
    trained = f'{row.scale * mean:.2f}'
    trained += f' ± {row.scale * std:.2f}' if std is not None else ''
    untrained = '' if row.untrained is None else f'{row.scale * row.untrained:.2f}'
    difference = interval_text(row.difference, row.scale) if row.difference else ''
    cells.append((f'{row.protocol} {row.number}', row.group, len(row.seeds), trained, untrained,
                  _chance(folders, row), difference))
  columns = ('number', 'group', 'seeds', 'trained', 'untrained', 'chance', 'difference')
  caption = ('Mean ± standard deviation over seeds; difference from '
             f'{rows[0].group}, paired by seed [95 %]')
  return Table(caption, columns, cells, 2)


def _difference_dot(row: comparison.ComparisonRow, label: str, several: bool) -> charts.Dot:
  """Return the difference of a row from the first group, as a row of a dot plot.

  several: more than two groups are compared, so that a dot has the name of its group.
  """
  assert row.difference is not None  # the caller leaves out the rows without a difference
  mean, low, high = (None if value is None else row.scale * value for value in row.difference[:3])
  assert mean is not None  # an interval always has a mean
  name, group = (row.group, label) if several else (label, '')
  return charts.Dot(name, mean, low, high, group=group)


def _differences(rows: Sequence[comparison.ComparisonRow]) -> list[Chart]:
  """Return dot plots of the difference of each group from the first.

  One plot has all accuracies; each protocol about actions has a plot.
  """
  first, several = rows[0].group, len({row.group for row in rows}) > 2
  plots: dict[str, list[comparison.ComparisonRow]] = {}
  for row in rows:
    name = _protocol(row.protocol)
    accuracy = PROTOCOLS[name].needs == 'labels' or name == 'transfer'
    if row.difference and name != 'health':  # the numbers of `health` have many units
      plots.setdefault('Accuracies' if accuracy else row.protocol, []).append(row)
  drawings = []
  for kind, members in plots.items():
    dots = [_difference_dot(row, f'{row.protocol} {row.number}' if kind == 'Accuracies'
                            else row.number, several) for row in members]
    percent, title = members[0].scale == 100., f'{kind}: difference from {first}'
    chart = charts.dot_plot(title, dots, 'percentage points' if percent else 'difference',
                            digits=1 if percent else 3)
    drawings.append(Chart(title, chart))
  return drawings


def _heat_row(cells: dict[tuple[str, str], comparison.ComparisonRow], number: str,
              groups: Sequence[str], scale: float) -> list[float | None]:
  """Return the means of a number for each group, and then its value for the untrained network.

  cells: {(number, group): its row}.
  """
  means = [scale * float(np.mean(list(cells[number, g].seeds.values()))) for g in groups]
  untrained = [scale * value for g in groups if (value := cells[number, g].untrained) is not None]
  return [*means, untrained[0] if untrained else None]


def _heats(rows: Sequence[comparison.ComparisonRow]) -> list[Chart]:
  """Return one heat map per kind of number of the protocols about actions, a column per group."""
  drawings, groups = [], list(dict.fromkeys(row.group for row in rows))
  for protocol in dict.fromkeys(row.protocol for row in rows):
    name = _protocol(protocol)
    if name not in ('profile', *results.ACTION_PROTOCOLS):
      continue
    cells = {(row.number, row.group): row for row in rows if row.protocol == protocol}
    scale, form = next(iter(cells.values())).scale, '.1f' if PROTOCOLS[name].percent else '.2f'
    numbers = dict.fromkeys(number for number, _ in cells)
    for kind, labels in results.labels_by_kind(numbers).items():
      title = f'{protocol}{f": {kind}" if kind else ""}'
      values = [_heat_row(cells, number, groups, scale) for number in labels]
      chart = charts.heat_map(title, list(labels.values()), [*groups, 'untrained'], values, form)
      drawings.append(Chart(title, chart, results.meaning(name, kind)))
  return drawings


def _results(folders: Sequence[RunFolder], by: str) -> list[Section]:
  """Return the sections that compare results; one sentence where there is nothing to compare."""
  try:
    rows = comparison.rows([folder.workdir for folder in folders], by)
    rows.sort(key=lambda row: list(PROTOCOLS).index(_protocol(row.protocol)))
  except UserError as error:
    return [Section('Results', 'results', [panels.error_block(error)])]
  blocks: list[Any] = []
  if min(len(row.seeds) for row in rows) == 1:
    blocks.append(Paragraph('A group with one seed has n = 1: no interval and no standard '
                            'deviation exist. Train more seeds: --config.seed=1.'))
  if line := comparison.unequal_budgets([(folder.config, folder.log) for folder in folders], by):
    blocks.append(Paragraph(line))
  table, differences, heats = _table(folders, rows), _differences(rows), _heats(rows)
  blocks.append(Charts(differences) if differences else
                Paragraph('There is one group, so there is no difference to show.'
                          if len({row.group for row in rows}) == 1 else
                          'The groups share no seed, so there is no difference paired by seed.'))
  blocks.append(table._replace(folded=len(rows) > 40))
  sections = [Section('Results', 'results', blocks)]
  if heats:
    sections.append(Section('Sensitivity and equivariance', 'equivariance', [Charts(heats)]))
  return sections


def _curves(folders: Sequence[RunFolder], names: Sequence[str], groups: Sequence[str]) -> Section:
  """Return the section with the curves of the logs."""
  logs = {name: folder.log for name, folder in zip(names, folders, strict=True)}
  numbers = dict.fromkeys(term for folder in folders for term in panels.terms(folder.config))
  drawings = panels.group_charts(logs, groups, [*numbers, *panels.TITLES])
  blocks = [Charts(drawings)] if drawings else [Missing('Nothing was logged yet.')]
  return Section('Curves', 'curves', blocks)


def _again(folders: Sequence[RunFolder], workdirs: Sequence[pathlib.Path], out: pathlib.Path,
           by: str) -> Section:
  """Return the section that says how the runs and the comparison are run again."""
  typed = ' '.join(shlex.quote(str(w)) for w in workdirs)
  group_by = '' if by == 'method' else f' --group-by {shlex.quote(by)}'
  commands = [*(line for folder in folders for line in folder.commands), f'eqssl eval {typed}',
              f'eqssl report {typed} --out {shlex.quote(str(out))}{group_by}']
  section = panels.rerun_section(folders[0].env, commands, 'configs, logs and results')
  if len({folder.env.get('git') for folder in folders}) == 1:
    return section
  note = Paragraph('The runs have different commits. The table above has the commit of each run; '
                   'the lines here name the commit of the first run.')
  return section._replace(blocks=[*section.blocks, note])


def write(workdirs: Sequence[pathlib.Path], out: pathlib.Path, by: str = 'method',
          console: Console | None = None) -> pathlib.Path:
  """Write the page that compares the runs in `workdirs` to `out` and return its path.

  by: what the runs are grouped by: 'method', or a field of the config.
  Raises UserError where a folder holds no run, or a run has no field `by`.
  """
  folders = [run_folder.read(pathlib.Path(w)) for w in workdirs]
  groups = [comparison.group(folder.config, by) for folder in folders]
  names = _names(folders)
  sections = [*_results(folders, by), _runs(folders, names, groups, out),
              _curves(folders, names, groups), _again(folders, workdirs, out, by)]
  about = (f'{len(folders)} runs in {quantity(len(set(groups)), "group")}: '
           f'{", ".join(dict.fromkeys(groups))}')
  data = {'kind': 'comparison', 'by': by,
          'runs': {name: run_folder.data(folder)
                   for name, folder in zip(names, folders, strict=True)}}
  path = page.save(out, page.render(f'Comparison of {len(folders)} runs', about, sections, data))
  if console:
    console.print(f'Written to {path}')
  return path

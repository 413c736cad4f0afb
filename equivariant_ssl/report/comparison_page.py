"""The report of several runs beside each other: their numbers, paired by seed, their curves, and where they differ."""
import os
import pathlib
import shlex
import urllib.parse
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.console import Console

from equivariant_ssl import config as configs
from equivariant_ssl.errors import UserError
from equivariant_ssl.evaluate import comparison
from equivariant_ssl.evaluate.protocols import PROTOCOLS
from equivariant_ssl.evaluate.statistics import counted, mean_std, plain, show
from equivariant_ssl.report import charts, page, panels, results, run_folder
from equivariant_ssl.report.page import Chart, Charts, Link, Missing, Section, Table, Text
from equivariant_ssl.report.run_folder import Left


def _names(lefts: Sequence[Left]) -> list[str]:
  """The runs' folders, by as much of their paths as tells them apart."""
  parts = [left.workdir.absolute().parts for left in lefts]
  for k in range(1, max(map(len, parts)) + 1):
    names = ['/'.join(p[-k:]) for p in parts]
    if len(set(names)) == len(names):
      break
  return names


def _link(name: str, workdir: pathlib.Path, out: pathlib.Path) -> str | Link:
  """The name of a run, linked to its page where it has one."""
  there = workdir / 'report.html'
  if not there.exists():
    return name
  path = os.path.relpath(there.absolute(), out.absolute().parent)
  return Link(name, urllib.parse.quote(path))


def _runs(lefts: Sequence[Left], names: Sequence[str], groups: Sequence[str], out: pathlib.Path) -> Section:
  rows = [(_link(name, left.workdir, out), group, left.config.data.name, left.config.seed,
           left.rows[-1]['step'] if left.rows else 0, panels.duration(panels.seconds(left)), panels.devices(left.env),
           panels.commit(left.env), left.env.get('time', 'unknown')) for left, name, group in zip(lefts, names, groups,
                                                                                                  strict=True)]
  columns = ('run', 'group', 'data', 'seed', 'steps', 'time', 'devices', 'commit', 'started')
  own = [run_folder.leaves(configs.as_json(left.config)) for left in lefts]
  every = dict.fromkeys(k for one in own for k in one)
  differ = [(k, *(one.get(k, 'absent') for one in own)) for k in every if len({one.get(k) for one in own}) > 1]
  blocks = [Table('The runs', columns, rows, 3),
            Table('Config fields in which they differ', ('field', *names), differ, len(names) + 1) if differ
            else Text('Their configs do not differ in any field.')]
  return Section('What ran', 'ran', blocks)


def _protocol(stem: str) -> str:
  """The protocol of a result file: 'linear' of 'linear-epochs2'."""
  return max((p for p in PROTOCOLS if stem == p or stem.startswith(f'{p}-')), key=len)


def _chance(lefts: Sequence[Left], r: comparison.Row) -> str:
  """What guessing gets of a number, where that is known."""
  found = lefts[0].results[r.protocol]['trained'][0]['controls'].get(r.number, {}).get('chance')
  return '' if found is None else f'{r.scale * plain(found):.2f}'


def _table(lefts: Sequence[Left], rows: Sequence[comparison.Row]) -> Table:
  first, out = rows[0].group, []
  for r in rows:
    mean, std = mean_std(list(r.seeds.values()))
    own = f'{r.scale * mean:.2f}' + (f' ± {r.scale * std:.2f}' if std is not None else '')
    out.append((f'{r.protocol} {r.number}', r.group, len(r.seeds), own,
                '' if r.untrained is None else f'{r.scale * r.untrained:.2f}',
                _chance(lefts, r), show(r.difference, r.scale) if r.difference else ''))
  columns = ('number', 'group', 'seeds', 'trained', 'untrained', 'chance', 'difference')
  caption = f'Mean ± standard deviation over seeds; difference from {first}, paired by seed [95 %]'
  return Table(caption, columns, out, 2)


def _differences(rows: Sequence[comparison.Row]) -> list[Chart]:
  """Dot plots of each group's difference from the first: one of all accuracies, one a protocol about actions."""
  made, first, several = [], rows[0].group, len({r.group for r in rows}) > 2
  plots: dict[str, list[comparison.Row]] = {}
  for r in rows:
    name = _protocol(r.protocol)
    kind = 'Accuracies' if PROTOCOLS[name].needs == 'labels' or name == 'transfer' else r.protocol
    if r.difference and name != 'health':  # its numbers are of many units
      plots.setdefault(kind, []).append(r)
  for kind, own in plots.items():
    label = lambda r, kind=kind: f'{r.protocol} {r.number}' if kind == 'Accuracies' else r.number
    scaled = lambda v, r: None if v is None else r.scale * v
    dots = [charts.Dot(r.group if several else label(r), *(scaled(v, r) for v in r.difference[:3]),
                       group=label(r) if several else '') for r in own]
    percent, title = own[0].scale == 100., f'{kind}: difference from {first}'
    made.append(Chart(title, charts.dots(title, dots, 'percentage points' if percent else 'difference',
                                         digits=1 if percent else 3)))
  return made


def _heats(rows: Sequence[comparison.Row]) -> list[Chart]:
  """A heat map a kind of number of the protocols about actions: a column a group."""
  made, groups = [], list(dict.fromkeys(r.group for r in rows))
  for protocol in dict.fromkeys(r.protocol for r in rows):
    own = {(r.number, r.group): r for r in rows if r.protocol == protocol}
    name = _protocol(protocol)
    about_actions = name in ('profile', *results.OF_ACTIONS)
    for kind, numbers in results.kinds(dict.fromkeys(n for n, _ in own)).items() if about_actions else ():
      scale = next(iter(own.values())).scale
      before = lambda n, own=own, scale=scale: next(
          (scale * own[n, g].untrained for g in groups if own[n, g].untrained is not None), None)
      values = [[*(scale * float(np.mean(list(own[n, g].seeds.values()))) for g in groups), before(n)] for n in numbers]
      title = f'{protocol}{f": {kind}" if kind else ""}'
      made.append(Chart(title, charts.heat(title, list(numbers.values()), [*groups, 'untrained'], values,
                                           '.1f' if PROTOCOLS[name].percent else '.2f'), results.meaning(name, kind)))
  return made


def _results(lefts: Sequence[Left], by: str) -> list[Section]:
  """The sections that compare results; a line where there are none to compare."""
  try:
    rows = comparison.rows([left.workdir for left in lefts], by)
    rows.sort(key=lambda r: list(PROTOCOLS).index(_protocol(r.protocol)))
  except UserError as error:
    return [Section('Results', 'results', [panels.why(error)])]
  fewest = min(len(r.seeds) for r in rows)
  words = [Text('A group with one seed has n = 1: no interval and no standard deviation exist. Train more seeds: '
                '--config.seed=1.')] if fewest == 1 else []
  table, differences, heats = _table(lefts, rows), _differences(rows), _heats(rows)
  blocks = [*words, *([Charts(differences)] if differences else [Text('One group: nothing to subtract.')])]
  found = [Section('Results', 'results', [*blocks, table._replace(folded=len(rows) > 40)])]
  return found + ([Section('Sensitivity and equivariance', 'equivariance', [Charts(heats)])] if heats else [])


def _curves(lefts: Sequence[Left], names: Sequence[str], groups: Sequence[str]) -> Section:
  made = panels.compared({name: left.rows for name, left in zip(names, lefts, strict=True)}, groups)
  return Section('Curves', 'curves', [Charts(made)] if made else [Missing('Nothing was logged yet.')])


def write(workdirs: Sequence[pathlib.Path], out: pathlib.Path, by: str = 'method', console: Console | None = None
          ) -> pathlib.Path:
  """Write the page that compares the runs in `workdirs`, grouped `by` their method or a field of the config, to `out`.

  Raises UserError where one is no run, or has no field `by`.
  """
  lefts = [run_folder.read(pathlib.Path(w)) for w in workdirs]
  groups, names = [comparison.group(left.config, by) for left in lefts], _names(lefts)
  found = [*_results(lefts, by), _runs(lefts, names, groups, out), _curves(lefts, names, groups)]
  again: list[Any] = [c for left in lefts for c in left.commands]
  folders = ' '.join(shlex.quote(str(w)) for w in workdirs)
  commands = [*again, f'eqssl eval {folders}', f'eqssl report {folders} --out {shlex.quote(str(out))}'
              + ('' if by == 'method' else f' --group-by {shlex.quote(by)}')]
  found.append(panels.again(lefts[0].env, commands, 'configs, logs and results'))
  if len({left.env.get('git') for left in lefts}) > 1:
    found[-1] = found[-1]._replace(blocks=[*found[-1].blocks, Text(
        'The runs are of several commits: each run\'s is in the table above; the lines here are the first one\'s.')])
  about = f'{len(lefts)} runs in {counted(len(set(groups)), "group")}: {", ".join(dict.fromkeys(groups))}'
  data = {'kind': 'comparison', 'by': by, 'runs': {n: run_folder.data(left) for n, left in zip(names, lefts, strict=True)}}
  path = page.save(out, page.render(f'Comparison of {len(lefts)} runs', about, found, data))
  if console:
    console.print(f'Written to {path}')
  return path

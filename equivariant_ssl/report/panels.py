"""Blocks that the pages share: what ran, its curves, and how to run it again."""
import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from equivariant_ssl import config as configs
from equivariant_ssl.errors import UserError
from equivariant_ssl.evaluate.statistics import counted
from equivariant_ssl.report import charts, run_folder
from equivariant_ssl.report.page import Chart, Charts, Code, Missing, Section, Table, Text
from equivariant_ssl.report.run_folder import Left
from equivariant_ssl.training.loop import COLLAPSED

BESIDE = ('step', 'loss', 'invariance', 'gradient', 'lr', 'std', 'images_per_s', 'data_wait', 'epoch', 'memory_gib',
          'probe_loss', 'probe_top1', 'knn_top1')  # of the log; the others are terms of the loss
READ = 'json.loads(re.search(r\'id="data">(.*?)</script>\', open("report.html").read(), re.S)[1])'
TITLES = {'std': 'Spread of the embeddings', 'knn_top1': 'kNN accuracy on the images of the read-out, %',
          'probe_top1': 'Online probe: accuracy on augmented training images, %', 'images_per_s': 'Images a second'}
PINNED = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy')


def why(error: UserError) -> Missing:
  """A mistake as a block: its cause, and its fix."""
  cause, _, fix = str(error).partition('\n')
  return Missing(cause, fix.strip())


def terms(rows: Sequence[Mapping[str, Any]]) -> list[str]:
  """The names of the loss and its terms in a log."""
  keys = dict.fromkeys(k for row in rows for k in row)
  return [k for k in ('loss', 'invariance') if k in keys] + [k for k in keys if k not in BESIDE]


def series(rows: Sequence[Mapping[str, Any]], name: str, scale: float = 1.) -> charts.Series | None:
  """(steps, values) of a number of the log; None where it was never logged."""
  kept = [r for r in rows if name in r]
  return ([r['step'] for r in kept], [None if r[name] is None else scale * r[name] for r in kept]) if kept else None


def curve(title: str, rows: Sequence[Mapping[str, Any]], names: Mapping[str, str], scale: float = 1., note: str = '',
          log_y: bool = False, rules: Mapping[str, float] | None = None) -> Chart | None:
  """A chart of numbers of the log, {name in the log: what to call it}; None where none was logged."""
  found = {shown: s for name, shown in names.items() if (s := series(rows, name, scale))}
  return Chart(title, charts.lines(title, found, log_y=log_y, rules=rules), note) if found else None


def _means(group: str, own: Mapping[str, charts.Series]) -> tuple[dict[str, charts.Series], bool]:
  """({legend: curve} of a group's `own` curves, whether it is interpolated): their mean at each step that one run logged
  and that lies between the first and the last of all; each run's own where there is none."""
  first, last = max(steps[0] for steps, _ in own.values()), min(steps[-1] for steps, _ in own.values())
  grid = sorted({s for steps, _ in own.values() for s in steps if first <= s <= last})
  if not grid:
    return {f'{group}: {name}': curve for name, curve in own.items()}, False
  mean = np.mean([np.interp(grid, *curve) for curve in own.values()], 0)
  return {f'{group} (n={len(own)})': (grid, mean.tolist())}, any(not set(grid) <= set(steps) for steps, _ in own.values())


def _logged(rows: Sequence[Mapping[str, Any]], name: str) -> charts.Series | None:
  """The (steps, values) of a number of a log where it was finite; None where it nowhere was."""
  return series([r for r in rows if r.get(name) is not None], name, 100. if name.endswith('top1') else 1.)


def compared(logs: Mapping[str, Sequence[Mapping[str, Any]]], groups: Sequence[str], before: str = '',
             without: Sequence[str] = ()) -> list[Chart]:
  """A chart a number of the `logs` {run: its rows}, a line a group: the mean over its runs that logged it.

  groups: of the runs, in their order. before: of the titles. without: the numbers to leave out.
  """
  made = []
  for name in dict.fromkeys([*(n for rows in logs.values() for n in terms(rows)), *TITLES]):
    found, between, title = {}, False, before + TITLES.get(name, name)
    for group in dict.fromkeys(groups) if name not in without else ():
      curves = {run: _logged(rows, name) for (run, rows), g in zip(logs.items(), groups, strict=True) if g == group}
      if own := {run: c for run, c in curves.items() if c}:
        lines, interpolated = _means(group, own)
        found, between = found | lines, between or interpolated
    if found:
      notes = ['Methods add different terms: compare shapes, not heights.'] * (name == 'loss')
      notes += ['Interpolated between the steps that a run logged.'] * between
      made.append(Chart(title, charts.lines(title, found), ' '.join(notes)))
  return made


def charted(*made: Chart | None) -> list[Any]:
  """Those of the charts that there are, as a block."""
  there = [c for c in made if c]
  return [Charts(there)] if there else []


def wide_range(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> bool:
  """Whether numbers of the log are all positive and span more than a factor of 30."""
  values = [r[n] for r in rows for n in names if r.get(n) is not None]
  return bool(values) and min(values) > 0 and max(values) > 30 * min(values)


def _sum(config: Any) -> str:
  """'loss = invariance + 1 x equimod': how the terms make the loss."""
  given = config.equivariance if isinstance(config.equivariance, (list, tuple)) else [config.equivariance]
  parts = [f'{e.get("weight", 1.):g} x {e.name}' for e in given if e.name != 'none']
  return 'loss = ' + ' + '.join(['invariance', *parts])


def training(left: Left) -> Section:
  """The loss and its terms, the rate and the gradient over time."""
  rows, names = left.rows, terms(left.rows)
  if not rows:
    return Section('Training', 'training', [Missing('Nothing was logged yet.', left.command('resume'))])
  return Section('Training', 'training', charted(
      curve('Loss and its terms', rows, {n: n for n in names}, log_y=wide_range(rows, names), note=_sum(left.config)),
      curve('Gradient norm', rows, {'gradient': 'gradient'}, log_y=wide_range(rows, ['gradient'])),
      curve('Learning rate', rows, {'lr': 'rate'})))


def spread(rows: Sequence[Mapping[str, Any]]) -> Chart | None:
  """The spread of the embeddings over time, beside what counts as a collapse."""
  return curve(TITLES['std'], rows, {'std': 'spread'}, rules={f'collapsing under {COLLAPSED}': COLLAPSED},
               note='1 fills the sphere, 0 is a single point.')


def seconds(left: Left) -> float | None:
  """Time spent in training steps, from the log; None where it says none."""
  total, before = 0., 0
  for row in left.rows:
    if row.get('images_per_s'):
      total += left.config.batch * (row['step'] - before) / row['images_per_s']
    before = row['step']
  return total or None


def duration(value: float | None) -> str:
  """'51 s', '12.3 min', '4.2 h'; 'unknown'."""
  if value is None:
    return 'unknown'
  return f'{value:.0f} s' if value < 90 else f'{value / 60:.1f} min' if value < 5400 else f'{value / 3600:.1f} h'


def commit(env: Mapping[str, Any]) -> str:
  """The commit of an environment in words."""
  git = env.get('git')
  if not git:
    return f'unknown (not a git checkout); package {env.get("equivariant-ssl", "unknown")}'
  return git[:12] + (' with changes that were not committed' if git.endswith('+modified') else '')


def devices(env: Mapping[str, Any]) -> str:
  """'8 x NVIDIA H100 (cuda), 2 processes'."""
  kinds = env.get('devices') or ['unknown']
  told = ', '.join(f'{kinds.count(k)} x {k}' for k in dict.fromkeys(kinds))
  many = env.get('processes', 1)
  return f'{told} ({env.get("backend", "unknown")})' + (f', {many} processes' if many > 1 else '')


def environment(env: Mapping[str, Any]) -> Table:
  """Everything that was written down about where it ran."""
  text = lambda v: v if isinstance(v, str) else json.dumps(v)
  return Table('Environment', ('what', 'value'), [(k, text(v)) for k, v in env.items() if k != 'earlier'], 2, True)


def config_table(config: Any, caption: str = 'The whole config') -> Table:
  """A config as JSON, a row a field."""
  return Table(caption, ('field', 'value'), list(run_folder.leaves(config).items()), 2, True)


def ran(left: Left) -> Section:
  """What ran: in a few lines, the difference from the config as shipped, where, and everything else folded."""
  c, base, changed = left.config, run_folder.base(left), run_folder.changed(left)
  last = left.rows[-1] if left.rows else {}
  rows = [('method', left.method), ('data', c.data.name),
          ('encoder', ', '.join([c.encoder.name, *(f'{k} {v}' for k, v in c.encoder.items() if k != 'name')])),
          ('augmentations', ', '.join(f'{op} ({c.augment[op].role})' for op in c.augment.order)),
          ('length', f'{counted(last.get("step", 0), "step", "")} of {counted(c.batch, "image", "")}, '
                     f'{counted(last.get("epoch", 0.), "epoch", ".4g")}; asked for '
                     + (counted(c.steps, 'step', '') if c.steps else counted(c.epochs, 'epoch', 'g'))),
          ('seed', c.seed), ('started', left.env.get('time', 'unknown')),
          ('time in training steps', duration(seconds(left))), ('devices', devices(left.env)),
          ('machine', f'{left.env.get("cpu", "unknown")}, {counted(left.env.get("cores", "?"), "core", "")}'),
          ('commit', commit(left.env))]
  blocks: list[Any] = [Table('The run', ('what', 'value'), rows, 2)]
  if not base:
    blocks.append(Text('Its command names no config file that can be read here: the whole config is below.'))
  elif changed:
    caption = f'What differs from the config {base[0]} as shipped'
    blocks.append(Table(caption, ('field', 'as shipped', 'here'), changed, 3))
  else:
    blocks.append(Text(f'Nothing differs from the config {base[0]} as shipped.'))
  earlier = left.env.get('earlier', [])
  if earlier:
    blocks.append(Text(f'The run was continued in another environment; {len(earlier)} before it: '
                       + '; '.join(f'{devices(e)}, commit {commit(e)}, {e.get("time", "")}' for e in earlier) + '.'))
  whole = config_table(configs.as_json(c))
  return Section('What ran', 'ran', [*blocks, whole._replace(folded=base is not None), environment(left.env)])


def throughput(left: Left) -> Section:
  """Images a second, the wait for data, memory."""
  rates = [r['images_per_s'] for r in left.rows if r.get('images_per_s')]
  if not rates:
    return Section('Throughput', 'throughput', [Missing('No throughput was logged yet.', left.command('resume'))])
  text = (f'Median {counted(np.median(rates), "image", ",.0f")} a second over {counted(len(rates), "logged span")}, '
          f'{duration(seconds(left))} in all; a span holds compilation and checkpoints where they fell into it.')
  return Section('Throughput', 'throughput', [Text(text), *charted(
      curve(TITLES['images_per_s'], left.rows, {'images_per_s': 'images/s'}),
      curve('Waiting for data, % of the time', left.rows, {'data_wait': 'wait'}, 100.),
      curve('Peak device memory, GiB', left.rows, {'memory_gib': 'GiB'}))])


def again(env: Mapping[str, Any], commands: Sequence[str], data: str) -> Section:
  """How to run it again: commit, versions, the exact commands. data: what the page holds as JSON."""
  git, flags = env.get('git') or '', env.get('xla_flags', '')
  lines = [f'git checkout {git.removesuffix("+modified")}'] if git else []
  pins = ' '.join(f'{p}=={env[p]}' for p in PINNED if p in env)
  lines += [f'pip install -e . {pins}'.strip()] + ([f'export XLA_FLAGS={shlex.quote(flags)}'] if flags else [])
  blocks: list[Any] = [Code('\n'.join([*lines, *commands]))]
  if git.endswith('+modified') or not git:
    blocks.append(Text('The code had changes that no commit holds, so this may not give the same numbers.' if git else
                       'The code was in no git checkout: its commit is not known.'))
  blocks.append(Text(f'The page holds {data} as JSON, in its element with id "data". In Python:'))
  return Section('Run it again', 'again', [*blocks, Code(READ)])

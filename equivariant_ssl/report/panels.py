"""Blocks that the pages share: what ran, its curves, and how it is run again."""
import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from equivariant_ssl import config
from equivariant_ssl.errors import UserError
from equivariant_ssl.evaluate.statistics import quantity
from equivariant_ssl.report import charts, run_folder
from equivariant_ssl.report.page import Chart, Charts, Code, Missing, Paragraph, Section, Table
from equivariant_ssl.report.run_folder import RunFolder
from equivariant_ssl.training.recipe import objective_sections
from equivariant_ssl.training.run_config import acting_role
from equivariant_ssl.training.step_log import COLLAPSED, FIRST_STEP, MONITOR, SAVE

Rows = Sequence[Mapping[str, Any]]  # the rows of a log

READ = ('json.loads(re.search(r\'id="data">(.*?)</script>\', open("report.html").read(), '
        're.S)[1])')
TITLES = {'std': 'Spread of the embeddings',
          'knn_top1': 'kNN accuracy on the images of the read-out, %',
          'probe_top1': 'Online probe: accuracy on augmented training images, %',
          'images_per_s': 'Images per second'}
PINNED = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy')


def error_block(error: UserError) -> Missing:
  """Return an error of the user as a block: its cause, and its fix as the command."""
  cause, _, fix = str(error).partition('\n')
  return Missing(cause, fix.strip())


def terms(settings: Any) -> list[str]:
  """Return the names that the loss and its terms have in the log of a run with these settings."""
  return ['loss', 'invariance', *objective_sections(settings)]


def series(rows: Rows, name: str, scale: float = 1.) -> charts.Series | None:
  """Return the steps and the values of a number of the log; None where it was never logged."""
  logged = [r for r in rows if name in r]
  if not logged:
    return None
  values = [None if r[name] is None else scale * r[name] for r in logged]
  return [r['step'] for r in logged], values


def curve(title: str, rows: Rows, names: Mapping[str, str], scale: float = 1., note: str = '',
          log_y: bool = False, rules: Mapping[str, float] | None = None) -> Chart | None:
  """Return a chart of numbers of the log; None where none of them was logged.

  names: {name in the log: name in the legend}.
  """
  curves = {label: one for name, label in names.items() if (one := series(rows, name, scale))}
  if not curves:
    return None
  return Chart(title, charts.line_chart(title, curves, log_y=log_y, rules=rules), note)


def _means(group: str, curves: Mapping[str, charts.Series]
           ) -> tuple[dict[str, charts.Series], bool]:
  """Return {legend: curve} of a group of runs, and whether the curve is interpolated.

  The curve is the mean over the runs, at each step that some run logged and that lies within the
  steps of all of them. Where there is no such step, each run keeps its curve.
  """
  first = max(steps[0] for steps, _ in curves.values())
  last = min(steps[-1] for steps, _ in curves.values())
  grid = sorted({s for steps, _ in curves.values() for s in steps if first <= s <= last})
  if not grid:
    return {f'{group}: {run}': one for run, one in curves.items()}, False
  interpolated = any(not set(grid) <= set(steps) for steps, _ in curves.values())
  mean = np.mean([np.interp(grid, steps, np.array(values, np.float64))
                  for steps, values in curves.values()], 0)
  return {f'{group} (n={len(curves)})': (grid, mean.tolist())}, interpolated


def _finite_series(rows: Rows, name: str) -> charts.Series | None:
  """Return the steps and values of a number where it was finite; None where it never was.

  Accuracies are in percent.
  """
  finite = [r for r in rows if r.get(name) is not None]
  return series(finite, name, 100. if name.endswith('top1') else 1.)


def group_charts(logs: Mapping[str, Rows], groups: Sequence[str], names: Iterable[str],
                 before: str = '') -> list[Chart]:
  """Return one chart per number of the `logs`, with one line per group of runs.

  A line is the mean over the runs of the group that logged the number.

  logs: {run: the rows of its log}. groups: the group of each run, in the order of `logs`.
  names: the numbers. before: the beginning of each title.
  """
  drawings = []
  for name in names:
    curves, interpolated, title = {}, False, before + TITLES.get(name, name)
    for group in dict.fromkeys(groups):
      members = {run: one for (run, rows), g in zip(logs.items(), groups, strict=True)
                 if g == group and (one := _finite_series(rows, name))}
      if members:
        mean, between = _means(group, members)
        curves, interpolated = curves | mean, interpolated or between
    if curves:
      notes = ['Methods add different terms: compare shapes, not heights.'] * (name == 'loss')
      notes += ['The line is interpolated between the steps that a run logged.'] * interpolated
      drawings.append(Chart(title, charts.line_chart(title, curves), ' '.join(notes)))
  return drawings


def chart_blocks(*drawings: Chart | None) -> list[Any]:
  """Return the charts that are not None as one block, or no block where all are."""
  present = [c for c in drawings if c]
  return [Charts(present)] if present else []


def wide_range(rows: Rows, names: Sequence[str]) -> bool:
  """Return whether numbers of the log are all positive and span more than a factor of 30."""
  values = [r[n] for r in rows for n in names if r.get(n) is not None]
  return bool(values) and min(values) > 0 and max(values) > 30 * min(values)


def _sum(settings: Any) -> str:
  """Return how the terms make the loss: 'loss = invariance + 1 x equimod'."""
  parts = [f'{section.get("weight", 1.):g} x {label}'
           for label, section in objective_sections(settings).items()]
  return 'loss = ' + ' + '.join(['invariance', *parts])


def training_section(folder: RunFolder) -> Section:
  """Return the section with the loss and its terms, the gradient and the rate over time."""
  rows, names = folder.log, terms(folder.config)
  if not rows:
    blocks = [Missing('Nothing was logged yet.', folder.command('resume'))]
    return Section('Training', 'training', blocks)
  return Section('Training', 'training', chart_blocks(
      curve('Loss and its terms', rows, {n: n for n in names}, log_y=wide_range(rows, names),
            note=_sum(folder.config)),
      curve('Gradient norm', rows, {'gradient': 'gradient'}, log_y=wide_range(rows, ['gradient'])),
      curve('Learning rate', rows, {'lr': 'rate'})))


def spread_chart(rows: Rows) -> Chart | None:
  """Return the chart of the embeddings' spread over time, with a line at the collapse limit."""
  return curve(TITLES['std'], rows, {'std': 'spread'},
               rules={f'collapsing under {COLLAPSED}': COLLAPSED},
               note='At 1 the embeddings fill the sphere; at 0 they are a single point.')


def training_seconds(folder: RunFolder) -> float | None:
  """Return the seconds that training steps took, from the log; None where the log does not say."""
  total, before = 0., 0
  for row in folder.log:
    if row.get('images_per_s'):
      total += folder.config.batch * (row['step'] - before) / row['images_per_s']
    before = row['step']
  return total or None


def time_between_steps(folder: RunFolder) -> str:
  """Return a sentence on the time that the log counts beside the training steps."""
  totals = {words: sum(row.get(name, 0.) for row in folder.log)
            for name, words in ((FIRST_STEP, 'first steps with their compilation'),
                                (MONITOR, 'measuring'), (SAVE, 'saving'))}
  if not any(totals.values()):  # an older version wrote this log
    return 'The time of a span includes any compilation and checkpoints that fell into it.'
  parts = ', '.join(f'{words} {duration(seconds)}' for words, seconds in totals.items() if seconds)
  return f'Not in it: {parts}.'


def duration(value: float | None) -> str:
  """Return seconds as '51 s', '12.3 min' or '4.2 h'; None is 'unknown'."""
  if value is None:
    return 'unknown'
  if value < 90:
    return f'{value:.0f} s'
  return f'{value / 60:.1f} min' if value < 5400 else f'{value / 3600:.1f} h'


def commit(env: Mapping[str, Any]) -> str:
  """Return the commit of an environment in words."""
  git = env.get('git')
  if not git:
    return f'unknown (not a git checkout); package {env.get("equivariant-ssl", "unknown")}'
  return git[:12] + (' with changes that were not committed' if git.endswith('+modified') else '')


def devices(env: Mapping[str, Any]) -> str:
  """Return the devices of an environment in words: '8 x NVIDIA H100 (cuda), 2 processes'."""
  kinds = env.get('devices') or ['unknown']
  counts = ', '.join(f'{kinds.count(k)} x {k}' for k in dict.fromkeys(kinds))
  processes = env.get('processes', 1)
  return (f'{counts} ({env.get("backend", "unknown")})'
          + (f', {processes} processes' if processes > 1 else ''))


def environment_table(env: Mapping[str, Any]) -> Table:
  """Return a table of everything that is known about where a run ran, without earlier starts."""
  rows = [(k, v if isinstance(v, str) else json.dumps(v)) for k, v in env.items()
          if k != 'earlier']
  return Table('Environment', ('what', 'value'), rows, 2, True)


def config_table(settings: Any, caption: str = 'The whole config') -> Table:
  """Return a table of a config as JSON, with one row per field."""
  rows = list(run_folder.leaves(settings).items())
  return Table(caption, ('field', 'value'), rows, 2, True)


def _run_table(folder: RunFolder) -> Table:
  """Return the table of what a reader asks first about a run."""
  settings, env = folder.config, folder.env
  last = folder.log[-1] if folder.log else {}
  encoder = [settings.encoder.name,
             *(f'{k} {v}' for k, v in settings.encoder.items() if k != 'name')]
  augmentations = [f'{op} ({acting_role(settings, op)})' for op in settings.augment.order]
  planned = (quantity(settings.steps, 'step', '') if settings.steps
             else quantity(settings.epochs, 'epoch', 'g'))
  length = (f'{quantity(last.get("step", 0), "step", "")} of '
            f'{quantity(settings.batch, "image", "")}, '
            f'{quantity(last.get("epoch", 0.), "epoch", ".4g")}; planned: {planned}')
  machine = f'{env.get("cpu", "unknown")}, {quantity(env.get("cores", "?"), "core", "")}'
  rows = [('method', folder.method), ('data', settings.data.name), ('encoder', ', '.join(encoder)),
          ('augmentations', ', '.join(augmentations)), ('length', length),
          ('seed', settings.seed), ('started', env.get('time', 'unknown')),
          ('time in training steps', duration(training_seconds(folder))), ('devices', devices(env)),
          ('machine', machine), ('commit', commit(env))]
  return Table('The run', ('what', 'value'), rows, 2)


def run_section(folder: RunFolder) -> Section:
  """Return the section that says what ran.

  It has the run in a few lines, how its config differs from the config as shipped, and, folded,
  the whole config and the environment.
  """
  base, changed = run_folder.base(folder), run_folder.changed(folder)
  blocks: list[Any] = [_run_table(folder)]
  if not base:
    blocks.append(Paragraph('The command of the run names no config file that can be read here, so '
                            'the whole config is below.'))
  elif changed:
    caption = f'What differs from the config {base[0]} as shipped'
    blocks.append(Table(caption, ('field', 'as shipped', 'in the run'), changed, 3))
  else:
    blocks.append(Paragraph(f'Nothing differs from the config {base[0]} as shipped.'))
  earlier = folder.env.get('earlier', [])
  if earlier:
    starts = '; '.join(f'{devices(e)}, commit {commit(e)}, {e.get("time", "")}' for e in earlier)
    blocks.append(Paragraph(f'The run was continued in another environment. '
                            f'It ran in {len(earlier)} before: {starts}.'))
  table = config_table(config.config_to_json(folder.config))
  blocks += [table._replace(folded=base is not None), environment_table(folder.env)]
  return Section('What ran', 'ran', blocks)


def throughput_section(folder: RunFolder) -> Section:
  """Return the section with the images per second, the wait for data, and the memory."""
  rates = [r['images_per_s'] for r in folder.log if r.get('images_per_s')]
  if not rates:
    return Section('Throughput', 'throughput', [Paragraph('No throughput was logged yet.')])
  text = (f'Median {quantity(float(np.median(rates)), "image", ",.0f")} a second over '
          f'{quantity(len(rates), "logged span")}, {duration(training_seconds(folder))} in all. '
          + time_between_steps(folder))
  return Section('Throughput', 'throughput', [Paragraph(text), *chart_blocks(
      curve(TITLES['images_per_s'], folder.log, {'images_per_s': 'images/s'}),
      curve('Waiting for data, % of the time', folder.log, {'data_wait': 'wait'}, 100.),
      curve('Peak device memory, GiB', folder.log, {'memory_gib': 'GiB'}))])


def rerun_section(env: Mapping[str, Any], commands: Sequence[str], data: str) -> Section:
  """Return the section that says how to run it again: commit, versions, and exact commands.

  data: what the page holds as JSON.
  """
  git, flags = env.get('git') or '', env.get('xla_flags', '')
  pins = ' '.join(f'{package}=={env[package]}' for package in PINNED if package in env)
  lines = [f'git checkout {git.removesuffix("+modified")}'] if git else []
  lines.append(f'pip install -e . {pins}'.strip())
  lines += [f'export XLA_FLAGS={shlex.quote(flags)}'] if flags else []
  blocks: list[Any] = [Code('\n'.join([*lines, *commands]))]
  if not git:
    blocks.append(Paragraph('The code was in no git checkout, so its commit is not known.'))
  elif git.endswith('+modified'):
    blocks.append(Paragraph('The code had changes that no commit holds, so these commands may not '
                            'give the same numbers.'))
  blocks.append(Paragraph(f'The page holds {data} as JSON, in its element whose id is "data". '
                          'Python reads them so:'))
  return Section('Run it again', 'again', [*blocks, Code(READ)])

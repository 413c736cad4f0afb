"""The page of a study: what each augmentation's role does, and everything that was run for it."""
import contextlib
import json
import pathlib
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from rich.console import Console

from equivariant_ssl.config import resolve_config
from equivariant_ssl.errors import UserError
from equivariant_ssl.parallel.sharding import mesh
from equivariant_ssl.report import charts, page, panels, pictures, study_numbers
from equivariant_ssl.report.gallery import picture_block
from equivariant_ssl.report.page import Chart, Charts, Missing, Paragraph, Section, Table
from equivariant_ssl.report.results import ACTION_PROTOCOLS, MEANINGS, labels_by_kind, meaning
from equivariant_ssl.report.run_page import PICTURE_SIDE
from equivariant_ssl.storage import record
from equivariant_ssl.study.effect_sentences import in_todays_words
from equivariant_ssl.training import run_config
from equivariant_ssl.training.recipe import view_chains
from equivariant_ssl.training.runs import prepare_run
from equivariant_ssl.training.step import Batch
from equivariant_ssl.training.step_log import COLLAPSED
from equivariant_ssl.types import ROLES, Group

MOST_NAMED = 10  # waiting runs that a sentence names
IMAGES = 3  # the number of images whose views are on the page
FORMS = ('absolute', 'relative')  # the forms of an action that is read from features


def _read(path: pathlib.Path) -> dict[str, Any]:
  """Return the content of a JSON file of a study; raise UserError where it is missing or torn."""
  try:
    return json.loads(path.read_text(encoding='utf-8'))
  except FileNotFoundError:
    raise UserError(f'{str(path.parent)!r} has no {path.name}, so there is no study to report.',
                    'Run it first, or go on with it: eqssl study --resume '
                    f'{shlex.quote(str(path.parent))}') from None
  except ValueError as error:
    raise UserError(f'{str(path)!r} is not JSON: {error}',
                    'Run the same eqssl study again: it writes the file anew.') from None


def _done_runs(results: dict) -> dict[str, dict]:
  """Return the finished runs of the full budget, {name: entry of results.json}."""
  return {name: run for name, run in results['runs'].items()
          if run['status'] == 'done' and run.get('share', 1) == 1}


def _by_arm(runs: Sequence[dict],
            pick: Callable[[dict], Mapping | None]) -> dict[str, dict[str, list[float]]]:
  """Return {arm: {name: a value for each run}} of the numbers that `pick` takes from a run.

  Ratios are left out, because their scale is another.
  """
  rows: dict[str, dict[str, list[float]]] = {}
  for run in runs:
    for name, value in (pick(run) or {}).items():
      if not name.startswith('ratio'):
        rows.setdefault(run['arm'], {}).setdefault(name, []).append(value)
  return rows


def _heat(title: str, rows: Mapping[str, Mapping[str, Sequence[float]]], scale: float, form: str,
          note: str) -> Chart:
  """Return a heat map of means over runs. rows: {row: {column: a value for each run}}."""
  columns = list(dict.fromkeys(column for row in rows.values() for column in row))
  values = [[scale * float(np.mean(row[column])) if column in row else None for column in columns]
            for row in rows.values()]
  return Chart(title, charts.heat_map(title, list(rows), columns, values, form), note)


def _kind(protocol: str, number: str) -> tuple[str, str]:
  """Return the heat map that a number of a protocol belongs to, and its column there."""
  if protocol not in ACTION_PROTOCOLS:  # its numbers have many units
    return number, number
  (kind, labels), = labels_by_kind([number]).items()
  subject, _, form = labels[number].rpartition(' ')
  return (f'{form}, {kind}', subject) if form in FORMS else (kind, labels[number])


def _other_protocols(runs: Sequence[dict]) -> list[Charts]:
  """Return heat maps of the other protocols asked for, one for each kind of number.

  A row is an arm; under the arms stand the controls, over all arms together.
  """
  arms, maps = {run['arm'] for run in runs}, {}
  for run in runs:
    for protocol, rows in (run.get('more') or {}).items():
      for number, values in rows.items():
        kind, column = _kind(protocol, number)
        heat_rows = maps.setdefault((protocol, kind), {})
        for name, value in values.items():
          if not name.startswith('ratio'):
            row = run['arm'] if name == 'true' else name
            heat_rows.setdefault(row, {}).setdefault(column, []).append(value)
  heats = []
  for (protocol, kind), heat_rows in maps.items():
    arms_first = dict(sorted(heat_rows.items(), key=lambda item: item[0] not in arms))
    heats.append(_heat(f'{protocol}: {kind}', arms_first, 1., '.2f',
                       meaning(protocol, kind)))
  return [Charts(heats)] if heats else []


def _actions(results: dict) -> list[Section]:
  """Return how far each augmentation moves each arm's features, and whether predictors use it."""
  runs, none = list(_done_runs(results).values()), Paragraph('No finished run has any.')
  profile = _by_arm(runs, lambda run: run.get('profile'))
  drift = none
  if profile:
    note = f'Mean over seeds. {MEANINGS["profile", ""]}'
    drift = Charts([_heat('Drift: arm x augmentation', profile, 1., '.2f', note)])
  blocks: list[Any] = []
  for kind, unit, scale, form in (('gains', '', 100., '.1f'), ('retrieval', 'mrr', 1., '.2f')):
    rows = dict.fromkeys(row for run in runs for row in run.get(kind) or ())
    heats = [_heat(f'{kind}: {row}', _by_arm(runs, _picker(kind, row)), scale, form, '')
             for row in rows]
    if heats:
      text = f'Mean over seeds. {MEANINGS[kind, unit]}'
      blocks += [Paragraph(text), Charts(heats)]
  blocks += _other_protocols(runs)
  return [Section('Sensitivity', 'sensitivity', [drift]),
          Section('Prediction', 'prediction', blocks or [none])]


def _picker(kind: str, row: str) -> Callable[[dict], Mapping | None]:
  """Return a function that takes the numbers of a row of 'gains' or 'retrieval' from a run."""
  return lambda run: (run.get(kind) or {}).get(row)


def _logged_numbers(study: dict) -> list[str]:
  """Return the numbers of the runs' logs that have charts.

  The loss has none: arms add different terms to it. The images per second say nothing of roles.
  """
  names: dict[str, None] = {}
  for arm in study['made']:
    with contextlib.suppress(UserError):  # an older version made the config
      names |= dict.fromkeys(panels.terms(resolve_config(ConfigDict(arm['config']))))
  return [name for name in (*names, *panels.TITLES) if name not in ('loss', 'images_per_s')]


def _training(folder: pathlib.Path, study: dict, results: dict) -> Section:
  """Return the roles of each augmentation over time: the loss's terms, collapse, the monitors."""
  done = _done_runs(results)
  logs = {name: record.read_metrics(folder / run['workdir']) for name, run in done.items()}
  base = next(iter(results['runs'].values()), {}).get('roles', {})
  several = len(study['objective']) > 1
  factorial = study['design'] == 'factorial'
  names = _logged_numbers(study)
  plots = []
  for aug in study['augs']:
    # Where augmentations change one at a time, the others have their roles of the base.
    lines = sorted((ROLES.index(run['roles'][aug]), run['objective'] if several else '', name)
                   for name, run in done.items()
                   if factorial or {**run['roles'], aug: ''} == {**base, aug: ''})
    groups = [f'{ROLES[i]}, {objective}' if objective else ROLES[i] for i, objective, _ in lines]
    plots += panels.group_charts({name: logs[name] for *_, name in lines}, groups, names,
                                 f'{aug}: ')
  over = 'every other augmentation\'s roles' if factorial else 'seeds'
  about = Paragraph(f'A line for each role: the mean over {over}, at the full budget. A spread '
                    f'under {COLLAPSED} is a collapse.')
  return Section('Training', 'training',
                 [about, Charts(plots)] if plots else [Paragraph('Nothing was logged yet.')])


def _group_of_one(values: dict, aug: str) -> Group:
  """Return the views that one augmentation makes alone. values: a config as JSON values."""
  ops = {op: {**values['augment'][op], 'role': 'invariant' if op == aug else 'off'}
         for op in values['augment']['order']}
  config = resolve_config(ConfigDict({**values, 'augment': {**values['augment'], **ops}}))
  return Group(view_chains(config), values['size'])


def _views(study: dict, place: str) -> Section:
  """Return what each augmentation does alone, with its settings.

  place: the folder where the data are now, '' for that of the config.
  """
  values = study['made'][0]['config']
  try:
    config = run_config.relocate_data(resolve_config(ConfigDict(values)), place)
    run = prepare_run(config, mesh(jax.devices()[:1]), advice=run_config.DATA_PATH_OPTION)
    images, sizes, _ = pictures.page_split(run)
    groups = {aug: _group_of_one(values, aug) for aug in study['augs']}
    tiles = pictures.view_tiles(run.recipe._replace(groups=groups), run.key,
                                Batch(images[:IMAGES], sizes[:IMAGES]))
  except UserError as error:
    return Section('Views', 'views', [panels.error_block(error)])
  about = Paragraph('Each augmentation alone, with its settings. A row for each image: the '
                    'original, then two views.')
  blocks = [picture_block(aug, '', rows, PICTURE_SIDE) for aug, rows in tiles.items()]
  return Section('Views', 'views', [about, *blocks])


def _run_table(study: dict, runs: dict[str, dict]) -> Table:
  """Return the accuracies, time and folder of every run."""
  readouts = list(dict.fromkeys(name for run in runs.values()
                                for name in run.get('readouts') or ()))
  rows = []
  for name, run in runs.items():
    values = run.get('readouts') or {}
    cells = [f'{100 * values[readout]:.1f}' if readout in values else '' for readout in readouts]
    time = panels.duration(run.get('seconds') or None)
    rows.append((name, run['status'], *cells, time, run['workdir']))
  columns = ('run', 'status', *map(study_numbers.readout_name, readouts), 'time', 'folder')
  return Table(f'Every run, accuracies on {study_numbers.split(study)} in %', columns, rows, 2,
               True)


def _runs(folder: pathlib.Path, study: dict, results: dict) -> Section:
  """Return what failed and why, what still waits, and how long every run took."""
  runs = results['runs']
  failed = [(name, run['error']) for name, run in runs.items() if run['status'] == 'failed']
  waiting = [name for name, run in runs.items() if run['status'] == 'waiting']
  seconds = [run['seconds'] for run in runs.values() if run.get('seconds')]
  blocks: list[Any] = [Table('Failed, and why', ('run', 'error'), failed, 2) if failed else
                       Paragraph('No run failed.')]
  more = f' and {len(waiting) - MOST_NAMED} more' if len(waiting) > MOST_NAMED else ''
  names = ', '.join(waiting[:MOST_NAMED])
  blocks.append(Missing(f'{len(waiting)} of {len(runs)} runs still wait: {names}{more}.',
                        study['command']) if waiting else Paragraph('No run is waiting.'))
  blocks.append(Paragraph(f'{panels.duration(sum(seconds))} in all, '
                     f'{panels.duration(float(np.median(seconds)))} a run (median of '
                     f'{len(seconds)}).' if seconds else 'No time was recorded yet.'))
  blocks.append(_run_table(study, runs))
  first = next((run['workdir'] for run in runs.values() if run['status'] == 'done'), None)
  if first:
    workdir = shlex.quote(str(folder / first))
    blocks.append(Missing('The map, neighbors and retrieval of one run are on a page of its own.',
                          f'eqssl report {workdir}'))
  return Section('Runs', 'runs', blocks)


def _commits(env: dict, results: dict) -> str:
  """Return the commits of the code that the runs were made with."""
  commits = dict.fromkeys(run['git'] for run in results['runs'].values() if run.get('git'))
  if len(commits) < 2:
    return panels.commit(env)
  names = ', '.join(panels.commit({'git': commit}) for commit in commits)
  return f'the runs were made with {len(commits)} commits: {names}'


def _settings(study: dict, results: dict) -> Section:
  """Return what the study was asked, and the environment in which it ran."""
  env = study.get('environment', {})
  overrides = ', '.join(f'{key}={value}' for key, value in study['overrides'].items())
  rows = [('augmentations', ', '.join(study['augs'])), ('arms', ', '.join(study['arms'])),
          ('objective', ' or '.join(study['objective']) or 'the config\'s'),
          ('config', study['config']), ('overrides', overrides or 'none'),
          ('seeds', ', '.join(map(str, study['seeds']))), ('design', study['design']),
          ('read-out', study_numbers.split(study)),
          ('epochs', f'{study["epochs"]:g}' if study['epochs'] else 'the config\'s steps'),
          ('equal', study['equal']), ('devices', panels.devices(env)),
          ('commit', _commits(env, results)), ('started', env.get('time', 'unknown'))]
  return Section('What ran', 'ran', [Table('The study', ('what', 'value'), rows, 2),
                                     panels.environment_table(env)])


def _about(study: dict) -> str:
  """Return the line under the title: the config, the seeds, the budget and the read-out."""
  n = len(study['seeds'])
  epochs = f', {study["epochs"]:g} epochs' if study['epochs'] else ''
  return (f'Config {study["config"]}, {n} seed{"s" if n > 1 else ""}{epochs}, read out on '
          f'{study_numbers.split(study)}')


def write(folder: pathlib.Path, images: bool = True, console: Console | None = None,
          out: pathlib.Path | None = None, place: str = '') -> pathlib.Path:
  """Write the page of the study in `folder` (study.json, results.json); return its path.

  images: whether there are panels that read the data. out: the file, None for report.html in the
  folder. place: the folder where the data are now, '' for that of the config. Raises UserError
  where study.json or results.json is missing or is not JSON.
  """
  folder, command = pathlib.Path(folder), f'eqssl report {shlex.quote(str(folder))}'
  study = _read(folder / 'study.json')
  results = in_todays_words(_read(folder / 'results.json'))
  again = panels.rerun_section(study.get('environment', {}), [study['command'], command],
                               'the study and its results')
  views = _views(study, place) if images else Section(
      'Views', 'views', [Missing('Left out as asked.', command)])
  sections = [study_numbers.answer(study, results), study_numbers.effects(study, results),
              study_numbers.arms(study, results), *_actions(results),
              study_numbers.proxies(study, results), _training(folder, study, results), views,
              _runs(folder, study, results), _settings(study, results), again]
  text = page.render(f'Study of {", ".join(study["augs"])}', _about(study), sections,
                     {'kind': 'study', 'study': study, 'results': results})
  path = page.save(out or folder / 'report.html', text)
  if console:
    console.print(f'Written to {path}')
  return path

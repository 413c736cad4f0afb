"""The report of a study: what each augmentation's role does, with intervals, and everything that was run for it."""
import json
import pathlib
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from rich.console import Console

from equivariant_ssl import config as configs
from equivariant_ssl import record, runs, shard
from equivariant_ssl.errors import UserError
from equivariant_ssl.recipe import seen
from equivariant_ssl.report import charts, page, panels, pictures, results
from equivariant_ssl.report import study_numbers as numbers
from equivariant_ssl.report.gallery import block
from equivariant_ssl.report.page import Chart, Charts, Missing, Section, Table, Text
from equivariant_ssl.report.run import SIDE
from equivariant_ssl.step import Batch
from equivariant_ssl.train import COLLAPSED
from equivariant_ssl.types import ROLES, Group

NAMED = 10  # runs that wait
IMAGES = 3  # whose views are shown
FORMS = ('absolute', 'relative')  # of an action that is read from features


def _read(path: pathlib.Path) -> dict[str, Any]:
  try:
    found = json.loads(path.read_text(encoding='utf-8'))
  except FileNotFoundError:
    raise UserError(f'{str(path.parent)!r} has no {path.name}, so there is no study to report.',
                    f'Run it first, or go on with it: eqssl study --resume {shlex.quote(str(path.parent))}') from None
  except ValueError as error:
    raise UserError(f'{str(path)!r} is not JSON: {error}',
                    'Run the same eqssl study again: it writes the file anew.') from None
  return found


def _over(runs: Sequence[dict], pick) -> dict[str, dict[str, list[float]]]:
  """{arm: {name: a value a run}} of `pick(run)`, a dict or None; ratios, of another scale, left out."""
  out: dict[str, dict[str, list[float]]] = {}
  for run in runs:
    for k, v in (pick(run) or {}).items():
      if not k.startswith('ratio'):
        out.setdefault(run['arm'], {}).setdefault(k, []).append(v)
  return out


def _heat(title: str, of: Mapping[str, Mapping[str, Sequence[float]]], scale: float, form: str, note: str) -> Chart:
  columns = list(dict.fromkeys(k for row in of.values() for k in row))
  values = [[scale * float(np.mean(row[c])) if c in row else None for c in columns] for row in of.values()]
  return Chart(title, charts.heat(title, list(of), columns, values, form), note)


def _kind(protocol: str, number: str) -> tuple[str, str]:
  """(the heat map that a number of a protocol is in, its column there)."""
  if protocol not in results.OF_ACTIONS:  # numbers of many units
    return number, number
  (kind, labels), = results.kinds([number]).items()
  what, _, form = labels[number].rpartition(' ')
  return (f'{form}, {kind}', what) if form in FORMS else (kind, labels[number])


def _more(runs: Sequence[dict]) -> list[Charts]:
  """What else was asked for, a heat map a kind of number: a row an arm, under them the controls of all arms together."""
  arms, maps = {r['arm'] for r in runs}, {}
  every = ((r['arm'], protocol, number, values) for r in runs for protocol, numbers in (r.get('more') or {}).items()
           for number, values in numbers.items())
  for arm, protocol, number, values in every:
    kind, column = _kind(protocol, number)
    rows = maps.setdefault((protocol, kind), {})
    for name, value in values.items():
      if not name.startswith('ratio'):
        rows.setdefault(arm if name == 'true' else name, {}).setdefault(column, []).append(value)
  made = [_heat(f'{protocol}: {kind}', dict(sorted(rows.items(), key=lambda item: item[0] not in arms)), 1., '.2f',
                results.meaning(protocol, kind)) for (protocol, kind), rows in maps.items()]
  return [Charts(made)] if made else []


def _actions(found: dict) -> list[Section]:
  """How far each augmentation moves each arm's features, and whether predictors use what they are told."""
  done = [r for r in found['runs'].values() if r['status'] == 'done' and r.get('share', 1) == 1]
  profile, none = _over(done, lambda r: r.get('profile')), Text('No finished run has any.')
  drift = Charts([_heat('Drift: arm x augmentation', profile, 1., '.2f',
                        f'Mean over seeds. {results.MEANS["profile", ""]}')]) if profile else none
  blocks: list[Any] = []
  for kind, of, scale, form in (('gains', '', 100., '.1f'), ('retrieval', 'mrr', 1., '.2f')):
    whats = dict.fromkeys(w for r in done for w in r.get(kind) or ())
    made = [_heat(f'{kind}: {what}', _over(done, lambda r, k=kind, w=what: (r.get(k) or {}).get(w)), scale, form, '')
            for what in whats]
    blocks += [Text(f'Mean over seeds. {results.MEANS[kind, of]}'), Charts(made)] if made else []
  blocks += _more(done)
  return [Section('Sensitivity', 'sensitivity', [drift]), Section('Prediction', 'prediction', blocks or [none])]


def _training(folder: pathlib.Path, study: dict, found: dict) -> Section:
  """Each augmentation's roles beside each other over time: the loss's terms, collapse, the monitors."""
  done = {k: r for k, r in found['runs'].items() if r['status'] == 'done' and r.get('share', 1) == 1}
  logs = {k: record.read_metrics(folder / r['workdir']) for k, r in done.items()}
  base, made = next(iter(found['runs'].values()), {}).get('roles', {}), []
  several = len(study['objective']) > 1
  for aug in study['augs']:
    alone = lambda r, aug=aug: {**r['roles'], aug: ''} == {**base, aug: ''}  # the others as in the base
    own = sorted((ROLES.index(r['roles'][aug]), r['objective'] if several else '', k) for k, r in done.items()
                 if study['design'] == 'factorial' or alone(r))
    groups = [f'{ROLES[i]}, {objective}' if objective else ROLES[i] for i, objective, _ in own]
    made += panels.compared({k: logs[k] for *_, k in own}, groups, f'{aug}: ', ('loss', 'images_per_s'))
  over = 'every other augmentation\'s roles' if study['design'] == 'factorial' else 'seeds'
  return Section('Training', 'training', [
      Text(f'A line a role: the mean over {over}, at the full budget. A spread under {COLLAPSED} is a collapse.'),
      Charts(made)] if made else [Text('Nothing was logged yet.')])


def _views(study: dict, place: str) -> Section:
  """What each augmentation does alone, as its settings have it. place: where the data are now."""
  given = study['made'][0]['config']

  def alone(aug: str) -> Group:
    ops = {op: {**given['augment'][op], 'role': 'invariant' if op == aug else 'off'} for op in given['augment']['order']}
    return Group(seen(configs.resolve(ConfigDict({**given, 'augment': {**given['augment'], **ops}}))), given['size'])
  try:
    run = runs.prepare(runs.moved(configs.resolve(ConfigDict(given)), place), shard.mesh(jax.devices()[:1]),
                       advice=runs.MOVED)
    images, sizes, _ = pictures.split(run)
    found = pictures.rows(run.recipe._replace(groups={aug: alone(aug) for aug in study['augs']}), run.key,
                          Batch(images[:IMAGES], sizes[:IMAGES]))
  except UserError as error:
    return Section('Views', 'views', [panels.why(error)])
  return Section('Views', 'views', [Text('Each augmentation alone, as its settings have it. A row an image: the original, '
                                         'then two views.'), *(block(k, '', rows, SIDE) for k, rows in found.items())])


def _state(folder: pathlib.Path, study: dict, found: dict) -> Section:
  """What failed and why, what still waits, what every run took."""
  runs = found['runs']
  failed = [(k, r['error']) for k, r in runs.items() if r['status'] == 'failed']
  waiting = [k for k, r in runs.items() if r['status'] == 'waiting']
  took = [r['seconds'] for r in runs.values() if r.get('seconds')]
  blocks: list[Any] = [Table('Failed, and why', ('run', 'error'), failed, 2) if failed else Text('No run failed.')]
  more = f' and {len(waiting) - NAMED} more' if len(waiting) > NAMED else ''
  blocks.append(Missing(f'{len(waiting)} of {len(runs)} runs still wait: {", ".join(waiting[:NAMED])}{more}.',
                        study['command'])
                if waiting else Text('No run is waiting.'))
  blocks.append(Text(f'{panels.duration(sum(took))} in all, {panels.duration(float(np.median(took)))} a run (median of '
                     f'{len(took)}).' if took else 'No time was recorded yet.'))
  names = list(dict.fromkeys(x for r in runs.values() for x in r.get('readouts') or ()))
  read = lambda r, x: f'{100 * r["readouts"][x]:.1f}' if x in (r.get('readouts') or {}) else ''
  rows = [(k, r['status'], *(read(r, x) for x in names), panels.duration(r.get('seconds') or None), r['workdir'])
          for k, r in runs.items()]
  columns = ('run', 'status', *map(numbers.named, names), 'time', 'folder')
  blocks.append(Table(f'Every run, accuracies on {numbers.split(study)} in %', columns, rows, 2, True))
  first = next((r['workdir'] for r in runs.values() if r['status'] == 'done'), None)
  if first:
    where = shlex.quote(str(folder / first))
    blocks.append(Missing('Map, neighbours and retrieval of one run are on a page of its own.',
                          f'eqssl report {where}'))
  return Section('Runs', 'runs', blocks)


def _commits(env: dict, found: dict) -> str:
  """The code that the runs were made with, all of it where it changed between them."""
  of = dict.fromkeys(r['git'] for r in found['runs'].values() if r.get('git'))
  every = ', '.join(panels.commit({'git': g}) for g in of)
  return panels.commit(env) if len(of) < 2 else f'the runs are of {len(of)}: {every}'


def write(folder: pathlib.Path, images: bool = True, console: Console | None = None, out: pathlib.Path | None = None,
          place: str = '') -> pathlib.Path:
  """Write the page of the study in `folder` (study.json, results.json) to `out` (None: report.html in it); its path.

  Raises UserError where either is missing or is not JSON.
  """
  folder, command = pathlib.Path(folder), f'eqssl report {shlex.quote(str(folder))}'
  study, found = (_read(folder / name) for name in ('study.json', 'results.json'))
  env = study.get('environment', {})
  objective, epochs = ' or '.join(study['objective']), f'{study["epochs"]:g}' if study['epochs'] else ''
  settings = [('augmentations', ', '.join(study['augs'])), ('arms', ', '.join(study['arms'])),
              ('objective', objective or 'the config\'s'), ('config', study['config']),
              ('overrides', ', '.join(f'{k}={v}' for k, v in study['overrides'].items()) or 'none'),
              ('seeds', ', '.join(map(str, study['seeds']))), ('design', study['design']),
              ('read-out', numbers.split(study)), ('epochs', epochs or 'the config\'s steps'), ('equal', study['equal']),
              ('devices', panels.devices(env)),
              ('commit', _commits(env, found)), ('started', env.get('time', 'unknown'))]
  ran = Section('What ran', 'ran', [Table('The study', ('what', 'value'), settings, 2), panels.environment(env)])
  again = panels.again(env, [study['command'], command], 'the study and its results')
  views = _views(study, place) if images else Section('Views', 'views', [Missing('Left out as asked.', command)])
  parts = [numbers.answer(study, found), numbers.effects(study, found), numbers.arms(study, found), *_actions(found),
           numbers.proxies(study, found), _training(folder, study, found), views, _state(folder, study, found), ran, again]
  title = f'Study of {", ".join(study["augs"])}'
  n = len(study['seeds'])
  about = f'Config {study["config"]}, {n} seed{"s" if n > 1 else ""}' + (f', {epochs} epochs' if epochs else '')
  about += f', read out on {numbers.split(study)}'
  text = page.render(title, about, parts, {'kind': 'study', 'study': study, 'results': found})
  path = page.save(out or folder / 'report.html', text)
  if console:
    console.print(f'Written to {path}')
  return path

"""The report of one run: what came of it, what ran, what its views and features look like, how to run it again."""
import pathlib
from typing import Any

import numpy as np
from rich.console import Console

from equivariant_ssl.data import holdout
from equivariant_ssl.errors import UserError
from equivariant_ssl.evaluate.frozen import frozen
from equivariant_ssl.evaluate.result_files import says
from equivariant_ssl.report import charts, maps, page, panels, pictures, results, run_folder
from equivariant_ssl.report.gallery import block
from equivariant_ssl.report.page import Chart, Charts, Missing, Section, Text
from equivariant_ssl.report.run_folder import Left
from equivariant_ssl.storage import checkpoint
from equivariant_ssl.training import runs

SIDE = 96  # of a picture in the page, pixels: a hundred of them are 3 MB


def _views(run: runs.Run) -> list[Any]:
  found = []
  for name, rows in pictures.gallery(run).items():
    group = run.recipe.groups[name]
    chain = ' or '.join(dict.fromkeys(c.name.replace('+', ', ') for c in group.chains)) or 'nothing'
    found.append(block(f'Group {name}', f'A row an image: the original, then its views of {group.size} pixels with '
                       f'what was done to each, drawn as in the first step. Chain: {chain}.', rows, SIDE))
  return found


def _of_features(run: runs.Run, left: Left, say) -> tuple[dict[str, list[Any]], dict[str, Any]]:
  """({panel: its blocks}, maps as data) of the newest checkpoint."""
  number, state = checkpoint.load(left.workdir / 'checkpoints', runs.abstract(run), None, say)[:2]
  fixed, at = frozen(run.recipe, run.config), f'of the checkpoint of step {number}'
  found = maps.maps(run, fixed, state)
  drawn = [Chart(k, charts.scatter(k, m.points, m.labels, m.names, m.about), m.about) for k, m in found.items()]
  strips = [block(f'Objective {name}', f'A row an image, {at}: the query, the view asked for with its action, then the '
                    'views nearest to where the predictor moves the query\'s embedding, best first.', rows, SIDE)
            for name, rows in pictures.strips(run, fixed, state).items()]
  near = block('Nearest training images', 'A row a test image: the query, then its neighbours by cosine of the '
               f'features {at}.', pictures.neighbours(run, fixed, state), SIDE)
  data = {k: {'points': np.round(np.asarray(m.points, float), 4).tolist(), 'labels': np.asarray(m.labels).tolist(),
              'names': list(m.names)} for k, m in found.items()}
  nothing = Missing('No objective of this run predicts where an embedding goes; train with',
                    '--config.equivariance=equimod')
  few = Text('Too few images, or features that are all the same, make no map.')
  return {'map': [Charts(drawn) if drawn else few], 'neighbours': [near], 'strips': strips or [nothing]}, data


def _pictured(left: Left, images: bool, say, asked: runs.Asked) -> tuple[dict[str, list[Any]], dict[str, Any]]:
  """The panels that need the images or the network, and the maps as data; a line where one cannot be."""
  every = lambda block: {panel: [block] for panel in ('views', 'map', 'neighbours', 'strips')}
  if not images:
    return every(Missing('Left out as asked.', left.command('report'))), {}
  try:
    run = runs.reopen(left.workdir, None, say, asked)
  except UserError as error:
    return every(panels.why(error)), {}
  try:
    found, data = _of_features(run, left, say)
  except UserError as error:
    found, data = every(panels.why(error)), {}
  return found | {'views': _views(run)}, data


def _equivariance(left: Left) -> list[Any]:
  blocks, there = results.heats(left, results.OF_ACTIONS), {f['protocol'] for f in left.results.values()}
  if left.method == left.config.invariance.name:
    blocks.append(Text('The run has no equivariance objective, so nothing predicts: no gain and no retrieval.'))
  elif 'gains' not in there:  # eval leaves it out by itself where the objective predicts something else
    blocks.append(Missing('No gain was measured yet; an objective that predicts where an embedding goes has one.',
                          left.command('eval')))
  wanted = [p for p in ('retrieval', 'regression', 'care') if p not in there and (p != 'retrieval' or 'gains' in there)]
  if wanted:
    blocks.append(Missing(f'Not evaluated yet: {", ".join(wanted)}.',
                          left.command('eval', f'--protocol {",".join(wanted)}')))
  return blocks


def _monitors(left: Left) -> list[Any]:
  on = holdout.named(left.config.validation)
  made = panels.charted(
      panels.curve(panels.TITLES['knn_top1'], left.rows, {'knn_top1': 'kNN'}, 100.,
                   f'On the {on} images, as a monitor' + (
                       ': to choose a checkpoint by it is to choose on test images.' if on == 'test' else '.')),
      panels.curve(panels.TITLES['probe_top1'], left.rows, {'probe_top1': 'probe'}, 100.),
      panels.curve('Online probe: loss', left.rows, {'probe_loss': 'probe loss'}))
  missing = [flag for name, flag in (('knn_top1', '--config.knn_every=1'), ('probe_top1', '--config.probe=True'))
             if not any(name in r for r in left.rows)]
  return made + ([Missing('Not logged while this run trained (both need labels); train with', ' '.join(missing))]
                 if missing else [])


def sections(left: Left, pictured: dict[str, list[Any]]) -> list[Section]:
  """The sections of a run's page, without how to run it again."""
  profile = results.heats(left, ['profile']) or [
      Missing('The sensitivity profile was not measured yet.', left.command('eval', '--protocol profile'))]
  spectrum, health = results.health(left)
  return [
      Section('Results', 'results', results.accuracy(left)), panels.ran(left), panels.training(left),
      Section('Collapse', 'collapse', [*panels.charted(panels.spread(left.rows), spectrum), health]),
      Section('Accuracy while training', 'monitors', _monitors(left)),
      Section('Views', 'views', pictured['views']), Section('Sensitivity', 'sensitivity', profile),
      Section('Equivariance', 'equivariance', _equivariance(left)),
      Section('Map of the features', 'map', pictured['map']),
      Section('Neighbours', 'neighbours', pictured['neighbours']),
      Section('What a prediction retrieves', 'strips', pictured['strips']), panels.throughput(left)]


def write(workdir: pathlib.Path, images: bool = True, console: Console | None = None, out: pathlib.Path | None = None,
          asked: runs.Asked = runs.Asked()) -> pathlib.Path:
  """Write the page of the run in `workdir` to `out` (None: report.html in it) and return its path; what is not there
  becomes a line that says which command makes it. images: with the panels that read the data and the newest checkpoint.
  asked: of these data.

  Raises UserError where `workdir` holds no run.
  """
  say = console.print if console else lambda line: None
  left = run_folder.read(pathlib.Path(workdir))
  pictured, maps = _pictured(left, images, say, asked)
  found = sections(left, pictured)
  if left.unread:
    found[0] = found[0]._replace(blocks=[*found[0].blocks, Text(
        f'Of another form, and not shown: {", ".join(f"eval/{name}" for name in left.unread)}.')])
  old = [name for name, one in left.results.items() if not says(one)]
  if old:
    found[0] = found[0]._replace(blocks=[*found[0].blocks, Missing(
        f'Of an earlier version, which did not write down on what data and pixels: {", ".join(old)}; computed again by',
        left.command('eval', f'--protocol {",".join(sorted({left.results[n]["protocol"] for n in old}))}'))])
  done = sorted({f['protocol'] for f in left.results.values()})
  evals = [left.command('eval', f'--protocol {",".join(done)}')] if done else []
  found.append(panels.again(left.env, [*left.commands, *evals, left.command('report')],
                            'config, environment, log and results'))
  about = f'{left.method} on {left.config.data.name}, started {left.env.get("time", "at an unknown time")}'
  text = page.render(f'Run {left.name}', about, found, {'kind': 'run', **run_folder.data(left), 'maps': maps})
  path = page.save(out or left.workdir / 'report.html', text)
  say(f'Written to {path}')
  return path

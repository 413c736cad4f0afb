"""The report of one run.

It says what the run achieved, what ran, what its views and features look like, and how it is run
again.
"""
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from rich.console import Console

from equivariant_ssl.data import holdout
from equivariant_ssl.errors import UserError
from equivariant_ssl.evaluate.frozen import frozen
from equivariant_ssl.evaluate.result_files import states_origin
from equivariant_ssl.report import (
  charts,
  maps,
  neighbor_tiles,
  page,
  panels,
  pictures,
  results,
  run_folder,
  unmeasured,
  verdict,
)
from equivariant_ssl.report.gallery import picture_block
from equivariant_ssl.report.page import Chart, Charts, Hint, Missing, Paragraph, Points, Section
from equivariant_ssl.report.run_folder import RunFolder
from equivariant_ssl.storage import checkpoint
from equivariant_ssl.training import runs
from equivariant_ssl.training.recipe import objective_sections

PICTURE_SIDE = 96  # pixels of a picture's longer side in the page: a hundred of them are 3 MB
# The panels that need the data, and the titles of their sections.
TITLES = {'views': 'Views', 'map': 'Map of the features', 'neighbors': 'Neighbors',
          'strips': 'What a prediction retrieves'}
PANELS = tuple(TITLES)
Panels = dict[str, list[Any]]  # {panel: its blocks}
Say = Callable[[str], None]


def _views(run: runs.Run) -> list[Any]:
  """Return one block of pictures per view group."""
  blocks = []
  for name, rows in pictures.gallery(run).items():
    group = run.recipe.groups[name]
    chains = dict.fromkeys(c.name.replace('+', ', ') for c in group.chains)
    about = (f'A row is an image: the original, then its views of {group.size} pixels with what '
             'was done to each, drawn as in the first step. '
             f'Chain: {" or ".join(chains) or "nothing"}.')
    blocks.append(picture_block(f'Group {name}', about, rows, PICTURE_SIDE))
  return blocks


def _map_data(one: maps.Map) -> dict[str, Any]:
  """Return a map as JSON."""
  return {'points': np.round(np.asarray(one.points, float), 4).tolist(),
          'labels': np.asarray(one.labels).tolist(), 'names': list(one.names)}


def _feature_panels(run: runs.Run, folder: RunFolder, say: Say) -> tuple[Panels, dict[str, Any]]:
  """Return the panels of the newest checkpoint's features, and the maps as JSON."""
  number, state = checkpoint.load_checkpoint(folder.workdir / 'checkpoints',
                                             runs.abstract_state(run), None, say)[:2]
  fixed, source = frozen(run.recipe, run.config), f'of the checkpoint of step {number}'
  feature_maps = maps.maps(run, fixed, state)
  drawings = [Chart(title, charts.scatter_plot(title, m.points, m.labels, m.names, m.about),
                    m.about)
              for title, m in feature_maps.items()]
  strips = [picture_block(f'Objective {name}',
                          f'A row is an image, with the features {source}: the query, '
                          'the requested view with its action, then the views nearest to where the '
                          'predictor moves the query\'s embedding, nearest first.', rows,
                          PICTURE_SIDE)
            for name, rows in pictures.strips(run, fixed, state).items()]
  near = picture_block('Nearest training images',
                       'A row is a test image: the query, then its neighbors by '
                       f'the cosine of the features {source}.',
                       neighbor_tiles.neighbors(run, fixed, state), PICTURE_SIDE)
  no_prediction = Hint('No objective of this run predicts where an embedding goes. One that '
                       'does is trained with', '--config.equivariance=equimod')
  no_map = Paragraph('There is no map: there are too few images, or all features are the same.')
  data = {title: _map_data(m) for title, m in feature_maps.items()}
  return {'map': [Charts(drawings) if drawings else no_map], 'neighbors': [near],
          'strips': strips or [no_prediction]}, data


def _left_out(content: Any, panels: Sequence[str] = PANELS) -> Panels:
  """Return panels that could not be made. The first of them has the block that says why."""
  again = Paragraph(f'Left out as well: see {TITLES[panels[0]]}.')
  blocks: Panels = {panel: [again] for panel in panels}
  return blocks | {panels[0]: [content]}


def _panels(folder: RunFolder, images: bool, say: Say, data_request: runs.DataRequest
            ) -> tuple[Panels, dict[str, Any]]:
  """Return the panels that need the images or the network, and the maps as JSON.

  A panel that cannot be made says why.
  """
  if not images:
    return _left_out(Missing('Pictures and maps were left out on request.',
                             folder.command('report'))), {}
  try:
    run = runs.reopen_run(folder.workdir, None, say, data_request)
  except UserError as error:
    return _left_out(panels.error_block(error)), {}
  try:
    blocks, data = _feature_panels(run, folder, say)
  except UserError as error:
    blocks, data = _left_out(panels.error_block(error), PANELS[1:]), {}
  return blocks | {'views': _views(run)}, data


def _not_measured(folder: RunFolder, names: Sequence[str]) -> list[Any]:
  """Return a sentence on those of the protocols `names` that the run could have and lacks."""
  missing = [name for name in unmeasured.protocols(folder) if name in names]
  text = f'Not measured yet: {", ".join(missing)}. {unmeasured.AT_THE_TOP}'
  return [Paragraph(text)] if missing else []


def _equivariance(folder: RunFolder) -> list[Any]:
  """Return the blocks of the results about actions; a sentence says which of them do not exist."""
  blocks = results.heat_blocks(folder, results.ACTION_PROTOCOLS)
  if not unmeasured.predicts_embeddings(folder) and 'gains' not in folder.results:
    lacks = ('The run has no equivariance objective, so nothing predicts'
             if not objective_sections(folder.config) else
             'No objective of the run predicts where an embedding goes')
    blocks.append(Paragraph(f'{lacks}: there is no gain and no retrieval. How the features follow '
                            'an augmentation (regression, care) is measured without a prediction.'))
  return blocks + _not_measured(folder, results.ACTION_PROTOCOLS)


def _monitors(folder: RunFolder) -> list[Any]:
  """Return the charts of the accuracies that were logged while the run trained."""
  split = holdout.readout_name(folder.config.validation)
  warning = ('; choosing a checkpoint by it means choosing on test images.' if split == 'test'
             else '.')
  blocks = panels.chart_blocks(
      panels.curve(panels.TITLES['knn_top1'], folder.log, {'knn_top1': 'kNN'}, 100.,
                   f'A monitor on the {split} images{warning}'),
      panels.curve(panels.TITLES['probe_top1'], folder.log, {'probe_top1': 'probe'}, 100.),
      panels.curve('Online probe: loss', folder.log, {'probe_loss': 'probe loss'}))
  if folder.labeled is False:
    return [*blocks, Paragraph('The data have no labels, so there is no accuracy.')]
  logged = {name for row in folder.log for name in row}
  off = {'kNN accuracy': (folder.config.knn_every or 'knn_top1' in logged
                          or not unmeasured.has_accuracies(folder), '--config.knn_every=1'),
         'online probe': (folder.config.probe or 'probe_top1' in logged, '--config.probe=True')}
  names = [name for name, (on, _) in off.items() if not on]
  if names:
    were = 'were' if len(names) > 1 else 'was'
    labels = '' if folder.labeled else ' on data with labels'
    blocks.append(Hint(f'The {" and the ".join(names)} {were} off in this run. To log '
                       f'{"them" if len(names) > 1 else "it"} in the next one, train{labels} with',
                       ' '.join(option for on, option in off.values() if not on)))
  return blocks


def sections(folder: RunFolder, blocks: Panels) -> list[Section]:
  """Return the sections of a run's page, but for how the run is run again.

  blocks: the blocks of the panels that need the data.
  """
  profile = results.heat_blocks(folder, ['profile']) or _not_measured(folder, ['profile'])
  spectrum, health = results.health_blocks(folder)
  collapse = [*panels.chart_blocks(panels.spread_chart(folder.log), spectrum),
              *([health] if health else _not_measured(folder, ['health']))]
  return [
      Section('Results', 'results', [Points(verdict.lines(folder)), *unmeasured.blocks(folder),
                                     *results.accuracy_blocks(folder)]), panels.run_section(folder),
      panels.training_section(folder),
      Section('Collapse', 'collapse', collapse),
      Section('Accuracy while training', 'monitors', _monitors(folder)),
      Section(TITLES['views'], 'views', blocks['views']),
      Section('Sensitivity', 'sensitivity', profile),
      Section('Equivariance', 'equivariance', _equivariance(folder)),
      *(Section(TITLES[panel], panel, blocks[panel]) for panel in PANELS[1:]),
      panels.throughput_section(folder)]


def _file_notes(folder: RunFolder) -> list[Any]:
  """Return the blocks that say which result files were not read, or come from an old version."""
  blocks: list[Any] = []
  if folder.unread:
    names = ', '.join(f'eval/{name}' for name in folder.unread)
    blocks.append(Paragraph('These files are no result files of this version and are not shown: '
                            f'{names}.'))
  old = [name for name, result in folder.results.items() if not states_origin(result)]
  if old:
    protocols = sorted({folder.results[name]['protocol'] for name in old})
    blocks.append(Missing('An earlier version, which did not write down the data and the pixels '
                          f'that it used, made these results: {", ".join(old)}. They are computed '
                          'again by', folder.command('eval', f'--protocol {",".join(protocols)}')))
  return blocks


def write(workdir: pathlib.Path, images: bool = True, console: Console | None = None,
          out: pathlib.Path | None = None, data_request: runs.DataRequest = runs.DataRequest()
          ) -> pathlib.Path:
  """Write the page of the run in `workdir` and return its path.

  Where something is missing, the page says the command that makes it.

  out: the file; None means report.html in the run's folder.
  images: whether the page has the panels that read the data and the newest checkpoint.
  data_request: where the data of the run are, and whether other data are accepted.
  Raises UserError where `workdir` holds no run.
  """
  def say(line: str) -> None:
    if console:
      console.print(line)

  folder = run_folder.read(pathlib.Path(workdir))
  blocks, map_data = _panels(folder, images, say, data_request)
  parts = sections(folder, blocks)
  parts[0] = parts[0]._replace(blocks=[*parts[0].blocks, *_file_notes(folder)])
  done = sorted({result['protocol'] for result in folder.results.values()})
  evals = [folder.command('eval', f'--protocol {",".join(done)}')] if done else []
  parts.append(panels.rerun_section(folder.env,
                                    [*folder.commands, *evals, folder.command('report')],
                                    'config, environment, log and results'))
  about = (f'{folder.method} on {folder.config.data.name}, started '
           f'{folder.env.get("time", "at an unknown time")}')
  text = page.render(f'Run {folder.name}', about, parts,
                     {'kind': 'run', **run_folder.data(folder), 'maps': map_data})
  path = page.save(out or folder.workdir / 'report.html', text)
  say(f'Written to {path}')
  return path

"""Results of evaluations as blocks of a page.

Each number stands beside that of the untrained network, chance, and its other controls.
"""
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from equivariant_ssl.evaluate.protocols import GROUPS, PROTOCOLS
from equivariant_ssl.evaluate.statistics import (
  COUNTED,
  Interval,
  counted,
  images_classified,
  interval_text,
  mean_std,
  mean_value,
)
from equivariant_ssl.report import charts
from equivariant_ssl.report.page import Cards, Chart, Charts, KeyNumber, Missing, Paragraph, Table
from equivariant_ssl.report.run_folder import RunFolder

NETWORKS = ('trained', 'untrained')
# The last words of a number's name say what kind of number it is.
KINDS = re.compile(r' ?(mrr|h1|h5|STL error|SIE error.*|gamma|relative|pooled|averaged)$')
MEANINGS = {  # (protocol, kind): how the number is read
    ('profile', ''): '1 - cosine between the features of an image and the features after the '
                     'augmentation alone: 0 where the features ignore the augmentation, near 1 '
                     'where the two have nothing in common.',
    ('gains', ''): 'Absolute gain x 100: how much nearer (in cosine) the prediction is than the '
                   'embedding of the un-augmented image. Doing nothing gains 0. "shuffled" '
                   'predicts with the action of another image, "zeroed" with no action.',
    ('retrieval', 'mrr'): 'Mean reciprocal rank of the requested view among 50 views of its image; '
                          '1 is best.',
    ('retrieval', 'h1'): 'How often the requested view ranks first.',
    ('retrieval', 'h5'): 'How often the requested view is among the first five.',
    ('retrieval', 'STL error'): 'Squared error of the retrieved action, in units of its encoding; '
                                '0 is best.',
    ('care', 'gamma'): 'CARE\'s gamma: 0 where the augmentation acts as a rotation of the '
                       'features, 1 at worst and where the features ignore it.',
    ('care', 'relative'): 'Relative error of the best rotation. It is 0 also where the features '
                          'ignore the augmentation, so read it beside gamma.',
}
ZERO = 1e-8  # a singular value below this share of the largest one is rounding
R2 = 'R² of the action that is read from frozen features. 1 is exact; chance stands beside it.'


def network_mean(result: dict, network: str, row: str) -> float:
  """Return the mean of a number of a network over the evaluation's seeds."""
  return mean_std([mean_value(one['numbers'][row]) for one in result[network]])[0]


def cell(values: Sequence[Any], scale: float) -> str:
  """Return a number as text: '46.10', with its interval '33.31 [32.98, 33.65]', or, for several
  seeds, '26.93 ± 0.41'."""
  if len(values) > 1:
    center, std = mean_std([mean_value(v) for v in values])
    assert std is not None  # there are at least two values
    return f'{scale * center:.2f} ± {scale * std:.2f}'
  value = values[0]
  if isinstance(value, Mapping):
    return interval_text(Interval(**value), scale, sign=False)
  return f'{scale * value:.2f}'


def _scale(result: dict) -> float:
  """Return 100 where the numbers of a result are shown in percent, else 1."""
  return 100. if PROTOCOLS[result['protocol']].percent else 1.


def _controls(result: dict, row: str, scale: float, named: bool) -> str:
  """Return the controls of a number in words, or without their names. A ratio is not scaled."""
  controls = {k: f'{(1. if k.startswith("ratio") else scale) * mean_value(v):.2f}'
              for k, v in result['trained'][0]['controls'].get(row, {}).items()}
  return ', '.join(f'{k} {v}' if named else v for k, v in controls.items())


def _network_cell(result: dict, network: str, row: str) -> str:
  """Return a number of a network as text, '' where the network was not measured."""
  if network not in result:
    return ''
  values, images = [one['numbers'][row] for one in result[network]], images_classified(result)
  text = cell(values, _scale(result))
  if 0 < images < COUNTED and len(values) == 1 and not isinstance(values[0], Mapping):
    text += f' = {counted(values[0], images)}'
  return text


def table(results: dict[str, dict], caption: str, folded: bool = False) -> Table:
  """Return a table of every number of `results`.

  A number has its interval or its standard deviation over the evaluation's seeds, and n, the count
  of values that it is the mean of. A column that would be the same in all rows is in the caption.
  """
  kinds = {control for result in results.values()
           for controls in result['trained'][0]['controls'].values() for control in controls}
  steps = sorted({result['checkpoint'] for result in results.values()})
  rows = []
  for stem, result in results.items():
    name = result['trained'][0]['name'] if stem == result['protocol'] else stem
    for row in result['trained'][0]['numbers']:
      values = [one['numbers'][row] for one in result['trained']]
      draws = values[0]['n'] if isinstance(values[0], Mapping) else 1
      n = len(values) if len(values) > 1 else draws
      cells = [_network_cell(result, network, row) for network in NETWORKS]
      if kinds:
        cells.append(_controls(result, row, _scale(result), kinds != {'chance'}))
      rows.append((name, row, *cells, n, result['checkpoint']))
  beside = ['chance' if kinds == {'chance'} else 'controls'] if kinds else []
  columns, left = ['protocol', 'number', *NETWORKS, *beside, 'n', 'step'], 2
  if len(steps) == 1:
    rows, columns = [r[:-1] for r in rows], columns[:-1]
    caption = f'{caption}; checkpoint of step {steps[0]}'
  if len(results) == 1:
    caption, left = f'{caption}; protocol {rows[0][0]}', 1
    rows, columns = [r[1:] for r in rows], columns[1:]
  return Table(caption, tuple(columns), rows, left, folded)


def accuracies(folder: RunFolder) -> dict[str, dict]:
  """Return the results that are accuracies, which are shares of labeled images."""
  return {stem: result for stem, result in folder.results.items()
          if result['trained'][0]['numbers']
          and (PROTOCOLS[result['protocol']].needs == 'labels'
               or result['protocol'] == 'transfer')}


def _dot(result: dict, row: str, label: str) -> charts.Dot:
  """Return an accuracy in percent as a row of a dot plot."""
  values = [one['numbers'][row] for one in result['trained']]
  chance = result['trained'][0]['controls'].get(row, {}).get('chance')
  beside = {}
  if 'untrained' in result:
    beside['untrained'] = 100 * network_mean(result, 'untrained', row)
  if chance is not None:
    beside['chance'] = 100 * mean_value(chance)
  low, high = None, None
  if len(values) == 1 and isinstance(values[0], Mapping) and values[0]['low'] is not None:
    low, high = (100 * values[0][end] for end in ('low', 'high'))
  return charts.Dot(label, 100 * network_mean(result, 'trained', row), low, high, beside)


def _accuracy_note(folder: RunFolder) -> str:
  """Return the sentences that say what the accuracies' errors mean, and on what images they are."""
  note = (f'This is one run, of seed {folder.config.seed}: n = 1, so no interval over training '
          'exists. Brackets are 95 % intervals over the n things that a protocol draws; ± is the '
          'standard deviation over n evaluation seeds. To compare several runs, type: '
          'eqssl report DIR DIR ...')
  if folder.config.validation:
    note += (f'. The run is read out on validation images, {folder.config.validation:.0%} of each '
             'class, which are held out of training, and on the test split where the name says '
             'so.')
  return note


def accuracy_blocks(folder: RunFolder) -> list[Any]:
  """Return the blocks of the accuracies: the first six large, all as dots, and all in a table."""
  files = accuracies(folder)
  if not files:
    lacking = ('labels' if folder.labeled is False else
               'test images' if folder.tested is False else '')
    return ([Paragraph(f'The data have no {lacking}, so there is no accuracy.')] if lacking else
            [Paragraph('No accuracy was evaluated yet.')])
  dots = {(stem, row): _dot(result, row, f'{stem} {row}') for stem, result in files.items()
          for row in result['trained'][0]['numbers']}
  first = [(dots[stem, next(iter(result['trained'][0]['numbers']))], images_classified(result))
           for stem, result in files.items()]
  cards = tuple(KeyNumber(f'{dot.label}, %', f'{dot.mean:.1f}', ', '.join(
      ([counted(dot.mean / 100, images)] if 0 < images < COUNTED and dot.low is None else [])
      + [f'{k} {v:.1f}' for k, v in dot.beside.items()])) for dot, images in first[:6])
  chart = Chart('Accuracy beside the untrained network and chance',
                charts.dot_plot('Accuracy', list(dots.values()), '%', zero=False))
  blocks: list[Any] = [Cards(cards), Paragraph(_accuracy_note(folder)), Charts([chart]),
            table(files, 'Accuracies, %')]
  if not all('untrained' in result for result in files.values()):
    # A study measures the untrained network for one of its arms.
    blocks.append(Missing('The untrained network was not measured for every number.',
                          folder.command('eval')))
  return blocks


def labels_by_kind(rows: Iterable[str]) -> dict[str, dict[str, str]]:
  """Return {kind of number: {row: the row without its kind}}.

  The kind of 'equimod crop mrr' is 'mrr', and 'equimod crop' remains.
  """
  labels: dict[str, dict[str, str]] = {}
  for row in rows:
    ending = KINDS.search(row)
    kind, label = (ending[1], row[:ending.start()]) if ending else ('', row)
    labels.setdefault(kind, {})[row] = label
  return labels


def meaning(protocol: str, kind: str) -> str:
  """Return how the numbers of one kind of a protocol are read, '' where nothing needs saying."""
  return R2 if protocol.startswith('regression') else MEANINGS.get((protocol, kind), '')


def _heat(stem: str, result: dict, kind: str, rows: dict[str, str]) -> Chart:
  """Return the heat map of one kind of number of a result. rows: {row: its label}."""
  scale, trained = _scale(result), result['trained'][0]
  names = dict.fromkeys(c for row in rows for c in trained['controls'].get(row, ()))
  # A ratio has another scale, so the table alone has it.
  controls = [c for c in names if not c.startswith('ratio')]
  values, networks = [], [network for network in NETWORKS if network in result]
  for row in rows:
    beside = trained['controls'].get(row, {})
    values.append([*(scale * network_mean(result, network, row) for network in networks),
                   *(scale * mean_value(beside[c]) if c in beside else None for c in controls)])
  title = f'{stem}{f": {kind}" if kind else ""}'
  # The numbers of the untrained network may be far from all others: they do not set the colors.
  columns = [*networks, *controls]
  most = max(abs(v) for row in values for c, v in zip(columns, row, strict=True)
             if c != 'untrained' and v is not None)
  chart = charts.heat_map(title, list(rows.values()), columns, values,
                          '.1f' if scale == 100. else '.2f', most)
  return Chart(title, chart, meaning(result['protocol'], kind))


def heat_blocks(folder: RunFolder, protocols: Sequence[str]) -> list[Any]:
  """Return the blocks of the results of `protocols` about actions.

  They are one heat map per kind of number, and a table of all numbers.
  """
  files = {stem: result for stem, result in folder.results.items()
           if result['protocol'] in protocols and result['trained'][0]['numbers']}
  if not files:
    return []
  maps = [_heat(stem, result, kind, rows) for stem, result in files.items()
          for kind, rows in labels_by_kind(result['trained'][0]['numbers']).items()]
  return [Charts(maps), table(files, 'The same with intervals', folded=True)]


def health_blocks(folder: RunFolder) -> tuple[Chart | None, Table | None]:
  """Return the chart of both networks' spectra, and the table of the protocol `health`.

  Both are None where the protocol was not run.
  """
  files = {stem: result for stem, result in folder.results.items()
           if result['protocol'] == 'health'}
  if not files:
    return None, None
  spectra: dict[str, charts.Series] = {}
  notes = ['A cliff is a collapse to the dimensions before it.']
  result = next(iter(files.values()))
  for network in NETWORKS:
    if network in result:
      values = result[network][0]['detail']['spectrum']
      rank = len(np.trim_zeros(values, 'b'))
      if 0 < rank < len(values):
        notes.append(f'The curve of the {network} network ends after {rank:,} of {len(values):,} '
                     'dimensions; the others are exactly 0.')
        values = values[:rank]
      spectra[network] = [*range(1, len(values) + 1)], [max(v, ZERO * values[0]) for v in values]
  if len(notes) > 1:  # the file does not say how many images there were
    notes.append('There were too few images to span them, or features are always 0, which is a '
                 'collapse too.')
  chart = Chart('Singular values of the features',
                charts.line_chart('Spectrum', spectra, 'dimension', log_y=True),
                ' '.join(notes))
  return chart, table(files, 'Health of the features of held-out images')


ACTION_PROTOCOLS = tuple(p for p in (*GROUPS['equivariance'], 'regression-mlp') if p != 'profile')

"""Results of evaluations as blocks of a page: each number beside the untrained network's, chance and its controls."""
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from equivariant_ssl.evaluate.protocols import GROUPS, PROTOCOLS
from equivariant_ssl.evaluate.statistics import Interval, mean_std, plain, show
from equivariant_ssl.report import charts
from equivariant_ssl.report.page import Card, Cards, Chart, Charts, Missing, Table, Text
from equivariant_ssl.report.run_folder import Left

# What kind of number it is: its last words.
KINDS = re.compile(r' ?(mrr|h1|h5|STL error|SIE error.*|gamma|relative|pooled|averaged)$')
MEANS = {  # (protocol, kind): how to read it
    ('profile', ''): '1 - cosine between an image\'s features and those after the augmentation alone: 0 where they '
                     'ignore it, near 1 where the view is a stranger.',
    ('gains', ''): 'Absolute gain x 100: by how much (cosine) the prediction is nearer than the un-augmented '
                   'embedding. Doing nothing is 0; shuffled is told another image\'s action, zeroed none.',
    ('retrieval', 'mrr'): 'Mean reciprocal rank of the view asked for among 50 of its image; 1 is best.',
    ('retrieval', 'h1'): 'How often the view asked for ranks first.',
    ('retrieval', 'h5'): 'How often the view asked for is among the first five.',
    ('retrieval', 'STL error'): 'Squared error of the retrieved action, in units of its encoding; 0 is best.',
    ('care', 'gamma'): 'CARE\'s gamma: 0 where the augmentation acts as a rotation of the features, 1 at worst and '
                       'where they ignore it.',
    ('care', 'relative'): 'Relative error of the best rotation; 0 also where the features ignore the augmentation: '
                          'read it beside gamma.',
}
ZERO = 1e-8  # of the largest singular value: under it is rounding
R2 = 'R² of the action read from frozen features; 1 is exact, chance beside it.'


def over(found: dict, who: str, row: str) -> float:
  """The mean of a number over the evaluation's seeds."""
  return mean_std([plain(one['numbers'][row]) for one in found[who]])[0]


def cell(values: Sequence[Any], scale: float) -> str:
  """'46.10'; '33.31 [32.98, 33.65]' of a value with its interval; '26.93 ± 0.41' of several seeds'."""
  if len(values) > 1:
    centre, std = mean_std([plain(v) for v in values])
    return f'{scale * centre:.2f} ± {scale * std:.2f}'
  value = values[0]
  return show(Interval(**value), scale, sign=False) if isinstance(value, Mapping) else f'{scale * value:.2f}'


def _scale(found: dict) -> float:
  return 100. if PROTOCOLS[found['protocol']].percent else 1.


def _controls(found: dict, row: str, scale: float, named: bool) -> str:
  shown = {k: f'{(1. if k.startswith("ratio") else scale) * plain(v):.2f}'
           for k, v in found['trained'][0]['controls'].get(row, {}).items()}
  return ', '.join(f'{k} {v}' if named else v for k, v in shown.items())


def table(results: dict[str, dict], caption: str, folded: bool = False) -> Table:
  """Every number of `results` with its interval, or over the evaluation's seeds, and of how many values that is."""
  kinds = {c for f in results.values() for row in f['trained'][0]['controls'].values() for c in row}
  steps = sorted({f['checkpoint'] for f in results.values()})
  rows = []
  for stem, found in results.items():
    name = found['trained'][0]['name'] if stem == found['protocol'] else stem
    for row in found['trained'][0]['numbers']:
      own = [one['numbers'][row] for one in found['trained']]
      n = len(own) if len(own) > 1 else own[0]['n'] if isinstance(own[0], Mapping) else 1
      cells = [cell([one['numbers'][row] for one in found[who]], _scale(found)) if who in found else ''
               for who in ('trained', 'untrained')]
      if kinds:
        cells.append(_controls(found, row, _scale(found), kinds != {'chance'}))
      rows.append((name, row, *cells, n, found['checkpoint']))
  beside = ['chance' if kinds == {'chance'} else 'controls'] if kinds else []
  columns, left = ['protocol', 'number', 'trained', 'untrained', *beside, 'n', 'step'], 2
  if len(steps) == 1:  # what is the same for all is said once
    rows, columns, caption = [r[:-1] for r in rows], columns[:-1], f'{caption}; checkpoint of step {steps[0]}'
  if len(results) == 1:
    rows, columns, caption, left = [r[1:] for r in rows], columns[1:], f'{caption}; protocol {rows[0][0]}', 1
  return Table(caption, tuple(columns), rows, left, folded)


def accuracies(left: Left) -> dict[str, dict]:
  """The results that are accuracies: shares of labelled images."""
  return {k: f for k, f in left.results.items()
          if f['trained'][0]['numbers'] and (PROTOCOLS[f['protocol']].needs == 'labels' or f['protocol'] == 'transfer')}


def _dot(found: dict, row: str, label: str) -> charts.Dot:
  own = [one['numbers'][row] for one in found['trained']]
  chance = found['trained'][0]['controls'].get(row, {}).get('chance')
  beside = {'untrained': 100 * over(found, 'untrained', row)} if 'untrained' in found else {}
  if chance is not None:
    beside['chance'] = 100 * plain(chance)
  low, high = ((100 * own[0][k] for k in ('low', 'high')) if len(own) == 1 and isinstance(own[0], Mapping)
               and own[0]['low'] is not None else (None, None))
  return charts.Dot(label, 100 * over(found, 'trained', row), low, high, beside)


def accuracy(left: Left) -> list[Any]:
  """Blocks of the accuracies: the first ones large, all as dots, all in a table."""
  found = accuracies(left)
  if not found:
    return [Missing('No accuracy was evaluated yet (data without labels have none).', left.command('eval'))]
  dots = [_dot(f, row, f'{stem} {row}') for stem, f in found.items() for row in f['trained'][0]['numbers']]
  first = [_dot(f, row, f'{stem} {row}') for stem, f in found.items() for row in list(f['trained'][0]['numbers'])[:1]]
  cards = tuple(Card(f'{d.label}, %', f'{d.mean:.1f}', ', '.join(f'{k} {v:.1f}' for k, v in d.beside.items()))
                for d in first[:6])
  note = (f'One run, seed {left.config.seed}: n = 1, so no interval over training exists. Brackets are 95 % intervals '
          'over the n things that a protocol draws; ± is the standard deviation over n evaluation seeds. Several '
          'runs: eqssl report DIR DIR ...')
  if left.config.validation:
    note += (f'. Read out on validation images, {left.config.validation:.0%} of each class, held out of training; on the '
             'test split where the name says so.')
  beside = Chart('Accuracy beside the untrained network and chance', charts.dots('Accuracy', dots, '%', zero=False))
  blocks = [Cards(cards), Text(note), Charts([beside]), table(found, 'Accuracies, %')]
  if not all('untrained' in f for f in found.values()):  # a study measures it for one arm
    blocks.append(Missing('The untrained network was not measured beside every number.', left.command('eval')))
  return blocks


def kinds(rows: Iterable[str]) -> dict[str, dict[str, str]]:
  """{what kind of number: {its row: the row without the kind}}: 'equimod crop mrr' is 'mrr' of 'equimod crop'."""
  found: dict[str, dict[str, str]] = {}
  for row in rows:
    ending = KINDS.search(row)
    found.setdefault(ending[1] if ending else '', {})[row] = row[:ending.start()] if ending else row
  return found


def meaning(protocol: str, kind: str) -> str:
  """How to read a heat map of `kind` of numbers of a protocol."""
  return R2 if protocol.startswith('regression') else MEANS.get((protocol, kind), '')


def _heat(stem: str, found: dict, kind: str, rows: dict[str, str]) -> Chart:
  scale, own = _scale(found), found['trained'][0]
  every = dict.fromkeys(c for row in rows for c in own['controls'].get(row, ()))
  controls = [c for c in every if not c.startswith('ratio')]  # of another scale: the table has it
  values, networks = [], [who for who in ('trained', 'untrained') if who in found]
  for row in rows:
    beside = own['controls'].get(row, {})
    values.append([*(scale * over(found, who, row) for who in networks),
                   *(scale * plain(beside[c]) if c in beside else None for c in controls)])
  title = f'{stem}{f": {kind}" if kind else ""}'
  # The untrained network may be far off: it does not set the colours.
  columns = [*networks, *controls]
  most = max(abs(v) for row in values for c, v in zip(columns, row, strict=True) if c != 'untrained' and v is not None)
  return Chart(title, charts.heat(title, list(rows.values()), columns, values,
                                  '.1f' if scale == 100. else '.2f', most), meaning(found['protocol'], kind))


def heats(left: Left, protocols: Sequence[str]) -> list[Any]:
  """Blocks of the equivariance results of `protocols`: a heat map a kind of number, and all of them in a table."""
  found = {k: f for k, f in left.results.items() if f['protocol'] in protocols and f['trained'][0]['numbers']}
  if not found:
    return []
  made = [_heat(stem, f, kind, rows) for stem, f in found.items()
          for kind, rows in kinds(f['trained'][0]['numbers']).items()]
  return [Charts(made), table(found, 'The same with intervals', folded=True)]


def health(left: Left) -> tuple[Chart | None, Table | Missing]:
  """Of protocol health: both networks' spectra, and its numbers; or what to type for them."""
  found = {k: f for k, f in left.results.items() if f['protocol'] == 'health'}
  if not found:
    return None, Missing('The health of the features (RankMe, LiDAR, spectrum) was not measured yet.',
                         left.command('eval', '--protocol health'))
  shown = {}
  one = next(iter(found.values()))
  for who in [who for who in ('trained', 'untrained') if who in one]:
    values = one[who][0]['detail']['spectrum']
    shown[who] = [*range(1, len(values) + 1)], [max(v, ZERO * values[0]) for v in values]
  spectra = Chart('Singular values of the features', charts.lines('Spectrum', shown, 'dimension', log_y=True),
                  'A cliff is a collapse to the dimensions before it.')
  return spectra, table(found, 'Health of the features of held-out images')


OF_ACTIONS = tuple(p for p in (*GROUPS['equivariance'], 'regression-mlp') if p != 'profile')

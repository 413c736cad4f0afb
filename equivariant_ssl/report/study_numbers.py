"""What a study found, as sections of its page: the answer, effects, arms and smaller budgets."""
from typing import Any

from equivariant_ssl.evaluate.statistics import quantity
from equivariant_ssl.report import charts
from equivariant_ssl.report.page import Chart, Charts, Missing, Paragraph, Points, Section, Table
from equivariant_ssl.study.contrasts import parse
from equivariant_ssl.study.effect_sentences import READOUT_NAMES, advice, effect_of

# The lines of the verdict in results.json about single augmentations, of this version and earlier.
VERDICTS = ('Should not be invariances', 'Useful as invariances', 'May be invariances',
            'No difference seen, as invariances')
MOST_ROWS = 12  # a table of effects with more rows is closed at first


def readout_name(readout: str) -> str:
  """Return the name of a read-out for a reader."""
  return READOUT_NAMES.get(readout, readout)


def _points(value: float | None) -> str:
  return 'none' if value is None else f'{100 * value:+.1f}'


def _percent(mean: float, std: float | None, n: int) -> str:
  """Return '91.0 ± 1.0, n=3', or '91.0, n=1'."""
  return f'{100 * mean:.1f}' + (f' ± {100 * std:.1f}' if std is not None else '') + f', n={n}'


def split(study: dict) -> str:
  """Return the name of the images that the arms were compared on.

  A study of an older version does not say it: it used the test split.
  """
  return study.get('readout', 'test')


def _readout_sentence(study: dict) -> str:
  if split(study) != 'validation':
    return 'Read out on the test split.'
  share = study['made'][0]['config'].get('validation')
  return (f'Read out on validation images, {share:.0%} of each class of the training split, which '
          'no run trained on.')


def answer(study: dict, results: dict) -> Section:
  """Return what the study found for each augmentation, a line for each, and how many runs are done.
  """
  runs, blocks = list(results['runs'].values()), []
  done = sum(run['status'] == 'done' for run in runs)
  blocks.append(Paragraph(f'{done} of {len(runs)} runs are done; seeds '
                          f'{", ".join(map(str, study["seeds"]))}; {study["design"]}; equal '
                          f'{study["equal"]} in every arm. {_readout_sentence(study)}'))
  effects = results['effects']
  without = [effect for effect in effects if effect['low'] is None]
  lines = advice([effect_of(effect) for effect in effects])
  if lines:
    blocks.insert(0, Points(tuple(lines)))
  elif effects:
    blocks.insert(0, Paragraph('Nothing can be concluded yet: no difference has an interval, '
                               'because one seed, or too few runs, measure no noise. The '
                               'differences themselves are in the table of the effects.'))
  if results.get('recommendation'):
    blocks.append(Points(tuple(results['recommendation'])))
  notes = [line for line in results.get('verdict') or () if not line.startswith(VERDICTS)]
  if notes:  # the lines above say what the others would
    blocks.append(Points(tuple(notes)))
  for aug in dict.fromkeys(effect['aug'] for effect in effects if effect not in without):
    sentences = [effect['sentence'] for effect in effects
                 if effect['aug'] == aug and effect not in without]
    blocks.append(Points(tuple(sentences), f'{aug}: {quantity(len(sentences), "contrast")} in '
                                           'words'))
  if not effects:
    blocks.append(Missing('No contrast can be made yet: it needs two finished arms.',
                          study['command']))
  if without and lines:
    augs = ', '.join(dict.fromkeys(effect['aug'] for effect in without))
    blocks.append(Paragraph(f'Nothing can be concluded from {quantity(len(without), "contrast")} '
                            f'of {augs}: one seed, or too few runs, leave no interval. The table '
                            'of the effects has them.'))
  return Section('Answer', 'answer', blocks)


def _dot(effect: dict) -> charts.Dot:
  """Return an effect as a row of a dot plot, whose label is short enough for a phone."""
  setting, first, second, objective = parse(effect['contrast'])
  label = f'{first} - {second}' if second else 'interaction'
  group = f'{effect["aug"]} {setting}'.strip() if second else first
  mean, low, high = (None if effect[key] is None else 100 * effect[key]
                     for key in ('mean', 'low', 'high'))
  assert mean is not None  # every effect has a mean
  return charts.Dot(label + (f' ({objective})' if objective else ''), mean, low, high, group=group)


def _effect_row(effect: dict) -> tuple[Any, ...]:
  interval = (f'none (n = {effect["n"]})' if effect['low'] is None else
              f'[{100 * effect["low"]:.1f}, {100 * effect["high"]:.1f}]')
  p, smallest = effect.get('holm'), effect.get('smallest')
  return (effect['aug'], effect['contrast'], readout_name(effect['readout']),
          _points(effect['mean']), interval,
          'unknown' if p is None else f'{p:.2g}' if p >= .001 else '< .001', effect['n'],
          'unknown' if smallest is None else f'{100 * smallest:.1f}')


def effects(study: dict, results: dict) -> Section:
  """Return a dot plot of the effects for each read-out, and the same numbers as a table."""
  noise = ('the noise is what main effects leave unexplained of the runs'
           if study['design'] == 'factorial' else
           'paired by seed, the noise pooled over all arms')
  every, dot_plots = results['effects'], []
  if not every:
    return Section('Effects', 'effects', [Paragraph('There are none yet.')])
  for readout in dict.fromkeys(effect['readout'] for effect in every):
    dots = [_dot(effect) for effect in every if effect['readout'] == readout]
    title = f'Effects on {readout_name(readout)} accuracy on {split(study)}'
    dot_plots.append(Chart(title, charts.dot_plot(title, dots, 'percentage points'),
                           f'95 % intervals: {noise}; a ring has none: too few runs.'))
  rows = [_effect_row(effect) for effect in every]
  columns = ('augmentation', 'contrast', 'read-out', 'effect', '95 % interval', 'Holm p', 'n',
             'smallest')
  corrected = sum(effect.get('holm') is not None for effect in every)
  title = (f'Effects on {split(study)} in percentage points. Holm p: corrected for all {corrected} '
           'contrasts, which the intervals are not. Smallest: the difference that such a study '
           'sees four times in five')
  table = Table(title, columns, rows, 3, folded=len(rows) > MOST_ROWS)
  return Section('Effects', 'effects', [Charts(dot_plots), table])


def _cell(row: dict | None) -> str:
  return _percent(row['mean'], row['std'], row['n']) if row else 'not done'


def arms(study: dict, results: dict) -> Section:
  """Return the accuracies of the arms as tables.

  The untrained network and chance stand in the same table; the recommended arm on the test split
  has a table of its own.
  """
  table, untrained, chance = results['table'], results['untrained'], results['chance']
  readouts = list(dict.fromkeys([*(row['readout'] for row in table), *untrained]))
  cells = {(row['arm'], row['readout']): row for row in table}
  rows = [(arm, *(_cell(cells.get((arm, readout))) for readout in readouts))
          for arm in dict.fromkeys(row['arm'] for row in table)]
  for name, values in (('untrained', untrained), ('chance', chance)):
    rows.append((name, *(f'{100 * values[readout]:.1f}' if values.get(readout) is not None else
                         'unknown' for readout in readouts)))
  about = 'mean ± standard deviation over seeds (none where n = 1)'
  columns = ('arm', *map(readout_name, readouts))
  blocks = [Table(f'Accuracy on {split(study)}, %: {about}', columns, rows)]
  test_cells = {(row['arm'], row['readout']): row for row in results.get('test', ())}
  if test_cells:
    rows = [(arm, *(_cell(test_cells.get((arm, readout))) for readout in readouts))
            for arm in dict.fromkeys(arm for arm, _ in test_cells)]
    title = f'Accuracy on the test split, for the recommended arms alone, %: {about}'
    blocks.append(Table(title, columns, rows))
  return Section('Arms', 'arms', blocks)


def _proxy_row(proxy: dict) -> tuple[Any, ...]:
  interval = ('none' if proxy['low'] is None else f'[{proxy["low"]:.2f}, {proxy["high"]:.2f}]')
  signs = proxy.get('signs')
  return (f'{100 * proxy["budget"]:g} %', readout_name(proxy['readout']), f'{proxy["rank"]:.2f}',
          interval, proxy['n'], *('unknown' if proxy.get(key) is None else f'{proxy[key]:.2f}'
                                  for key in ('repeat', 'effects')),
          'none to compare' if signs is None else f'{100 * signs:.0f} %')


def proxies(study: dict, results: dict) -> Section:
  """Return how well smaller budgets predict the full budget."""
  every = results.get('proxies') or []
  if not every:
    return Section('Smaller budgets', 'proxies',
                   [Paragraph('No smaller budget was compared with the full one.')])
  curves = {}
  for readout in dict.fromkeys(proxy['readout'] for proxy in every):
    ranks = sorted((proxy['budget'], proxy['rank']) for proxy in every
                   if proxy['readout'] == readout)
    curves[readout_name(readout)] = ([100 * budget for budget, _ in ranks],
                                     [rank for _, rank in ranks])
  lines = charts.line_chart('Rank agreement', curves, '% of the budget',
                            rules={'the same order': 1.})
  return Section('Smaller budgets', 'proxies', [
      Paragraph(f'How well the order of the arms on {split(study)} after part of the training '
                'agrees with the order after all of it: 1 is the same order, 0 is no relation. '
                'Arms that differ by less than seeds do have no order: "a repeat" is the agreement '
                'that the full budget would reach with itself, repeated with other seeds.'),
      Charts([Chart('Rank agreement with the full budget', lines)]),
      Table('Rank correlation of the arms; of the effects; and how many of the clear effects had '
            'the same sign',
            ('budget', 'read-out', 'arms', '95 % interval', 'n', 'a repeat', 'effects',
             'same sign'), [_proxy_row(proxy) for proxy in every], 2)])

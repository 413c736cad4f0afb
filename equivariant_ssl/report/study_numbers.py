"""What a study found, as sections of its page: the answer, the effects, the arms, and what smaller budgets would say."""

from equivariant_ssl.report import charts
from equivariant_ssl.report.page import Chart, Charts, Missing, Points, Section, Table, Text

READOUTS = {'linear': 'linear', 'knn': 'kNN', 'few': 'five labels'}


def named(readout: str) -> str:
  return READOUTS.get(readout, readout)


def _points(value: float | None) -> str:
  return 'none' if value is None else f'{100 * value:+.1f}'


def _percent(mean: float, std: float | None, n: int) -> str:
  """'91.0 ± 1.0, n=3'; '91.0, n=1'."""
  return f'{100 * mean:.1f}' + (f' ± {100 * std:.1f}' if std is not None else '') + f', n={n}'


def split(study: dict) -> str:
  """The images that the arms were compared on; a study of an older version knew the test split alone."""
  return study.get('readout', 'test')


def _read_out(study: dict) -> str:
  share = study['made'][0]['config'].get('validation')
  return (f'Read out on validation images, {share:.0%} of each class of the training split, which no run trained on.'
          if split(study) == 'validation' else 'Read out on the test split.')


def answer(study: dict, found: dict) -> Section:
  """What the study found, in sentences, an augmentation at a time; and from how much of it."""
  runs, blocks = list(found['runs'].values()), []
  done = sum(r['status'] == 'done' for r in runs)
  blocks.append(Text(f'{done} of {len(runs)} runs are done; seeds {", ".join(map(str, study["seeds"]))}; '
                     f'{study["design"]}; equal {study["equal"]} in every arm. {_read_out(study)}'))
  if found.get('recommendation'):
    blocks.append(Points(tuple(found['recommendation'])))
  if found.get('verdict'):
    blocks.append(Points(tuple(found['verdict'])))
  for aug in dict.fromkeys(e['aug'] for e in found['effects']):
    own = [e for e in found['effects'] if e['aug'] == aug]
    unseen = [e for e in own if e['low'] is not None and e['low'] <= 0 <= e['high']]
    seen = [e for e in own if e not in unseen]
    blocks.append(Points(tuple(e['sentence'] for e in seen)) if seen else Text(f'{aug}: no difference seen.'))
    if unseen:
      blocks.append(Points(tuple(e['sentence'] for e in unseen),
                           f'{aug}: {len(unseen)} of {len(own)} contrasts in which no difference was seen'))
  if not found['effects']:
    blocks.append(Missing('No contrast can be made yet: it needs two finished arms.', study['command']))
  if any(e['low'] is None for e in found['effects']):
    blocks.append(Text('Where no interval exists (n = 1, or too few runs), a difference cannot be told from noise.'))
  return Section('Answer', 'answer', blocks)


def effects(study: dict, found: dict) -> Section:
  """A dot plot a read-out, and the same as a table."""
  noise = ('the noise is what main effects leave unsaid of the runs' if study['design'] == 'factorial' else
           'paired by seed, the noise pooled over all arms')
  every, made = found['effects'], []
  if not every:
    return Section('Effects', 'effects', [Text('None yet.')])
  percent = lambda v: None if v is None else 100 * v
  for readout in dict.fromkeys(e['readout'] for e in every):
    dots = [charts.Dot(e['contrast'], *(percent(e[k]) for k in ('mean', 'low', 'high')), group=e['aug'])
            for e in every if e['readout'] == readout]
    title = f'Effects on {named(readout)} accuracy on {split(study)}'
    made.append(Chart(title, charts.dots(title, dots, 'percentage points'),
                      f'95 % intervals: {noise}; a ring has none: too few runs.'))
  rows = [(e['aug'], e['contrast'], named(e['readout']), _points(e['mean']),
           f'none (n = {e["n"]})' if e['low'] is None else f'[{100 * e["low"]:.1f}, {100 * e["high"]:.1f}]',
           'unknown' if e.get('holm') is None else f'{e["holm"]:.2g}' if e['holm'] >= .001 else '< .001', e['n'],
           'unknown' if e.get('smallest') is None else f'{100 * e["smallest"]:.1f}') for e in every]
  columns = ('augmentation', 'contrast', 'read-out', 'effect', '95 % interval', 'Holm p', 'n', 'smallest')
  told = sum(e.get('holm') is not None for e in every)
  title = (f'Effects on {split(study)} in percentage points. Holm p: corrected for all {told} contrasts, which the '
           'intervals are not. Smallest: the difference that such a study sees four times in five')
  table = Table(title, columns, rows, 3, folded=len(rows) > 12)
  return Section('Effects', 'effects', [Charts(made), table])


def arms(study: dict, found: dict) -> Section:
  """Arm x read-out, the untrained network and chance beside it, and the recommended arm on the test split, as tables."""
  table, untrained, chance = found['table'], found['untrained'], found['chance']
  readouts = list(dict.fromkeys([*(r['readout'] for r in table), *untrained]))
  cells = {(r['arm'], r['readout']): r for r in table}
  every = list(dict.fromkeys(r['arm'] for r in table))
  of = lambda c: _percent(c['mean'], c['std'], c['n']) if c else 'not done'
  plain = lambda row: [f'{100 * row[r]:.1f}' if row.get(r) is not None else 'unknown' for r in readouts]
  rows = [(arm, *(of(cells.get((arm, r))) for r in readouts)) for arm in every]
  rows += [('untrained', *plain(untrained)), ('chance', *plain(chance))]
  over, columns = 'mean ± standard deviation over seeds (none where n = 1)', ('arm', *(named(r) for r in readouts))
  blocks = [Table(f'Accuracy on {split(study)}, %: {over}', columns, rows)]
  once = {(r['arm'], r['readout']): r for r in found.get('test', ())}
  if once:
    rows = [(arm, *(of(once.get((arm, r))) for r in readouts)) for arm in dict.fromkeys(arm for arm, _ in once)]
    blocks.append(Table(f'Accuracy on the test split, of what was recommended alone, %: {over}', columns, rows))
  return Section('Arms', 'arms', blocks)


def proxies(study: dict, found: dict) -> Section:
  """What a smaller budget would have said."""
  every = found.get('proxies') or []
  if not every:
    return Section('Smaller budgets', 'proxies', [Text('No smaller budget was compared with the whole one.')])
  rows = [(f'{100 * p["budget"]:g} %', named(p['readout']), f'{p["rank"]:.2f}',
           'none' if p['low'] is None else f'[{p["low"]:.2f}, {p["high"]:.2f}]', p['n'],
           *('unknown' if p.get(k) is None else f'{p[k]:.2f}' for k in ('repeat', 'effects')),
           'none to compare' if p.get('signs') is None else f'{100 * p["signs"]:.0f} %') for p in every]
  shown = {}
  for readout in dict.fromkeys(p['readout'] for p in every):
    own = sorted((p['budget'], p['rank']) for p in every if p['readout'] == readout)
    shown[named(readout)] = [100 * b for b, _ in own], [r for _, r in own]
  chart = Chart('Rank agreement with the whole budget', charts.lines('Rank agreement', shown, '% of the budget',
                                                                     rules={'the same order': 1.}))
  return Section('Smaller budgets', 'proxies', [
      Text(f'How well the order of the arms on {split(study)} after part of the training agrees with that after all of it: '
           '1 is the same order, 0 no relation. Arms that differ by less than seeds do have no order: "a repeat" is what '
           'the whole budget would reach if it were repeated with other seeds.'), Charts([chart]),
      Table('Rank correlation of the arms; of the effects; and how many of the clear effects had the same sign',
            ('budget', 'read-out', 'arms', '95 % interval', 'n', 'a repeat', 'effects', 'same sign'), rows, 2)])

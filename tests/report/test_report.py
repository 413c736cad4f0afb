"""Reports: a page has the numbers of its inputs, a text for every figure, and a command for what is
missing, and no input becomes HTML."""

import json
import pathlib
import re

import pytest
import reports
from reports import HOSTILE, SVG, Parsed

from equivariant_ssl.config import load_config
from equivariant_ssl.data import card
from equivariant_ssl.errors import UserError
from equivariant_ssl.evaluate import comparison, statistics
from equivariant_ssl.report import (
  gallery,
  page,
  report,
  results,
  run_folder,
  run_page,
  unmeasured,
  verdict,
)
from equivariant_ssl.training import step_log


def read(path: pathlib.Path) -> Parsed:
  """A page taken apart; what holds for every page is checked on the way."""
  text = path.read_text()
  assert len(text) < 6e6 and not path.with_name(path.name + '.tmp').exists()
  parsed = Parsed(text)
  names = [name for name, _ in parsed.elements]
  for name, attributes in parsed.elements:
    assert (
      name != 'img'
      or attributes['alt'].strip()
      and attributes['src'].startswith('data:image/png;base64,')
    )
    assert not any(k.startswith('on') for k in attributes) and attributes.get('src') != 'x'
    assert name != 'th' or attributes['scope'] in ('row', 'col')
  for one in parsed.svgs:
    assert one.get('role') == 'img' and [c.tag for c in one[:2]] == [f'{SVG}title', f'{SVG}desc']
    assert one[0].text.strip() and re.search(r'\d', one[1].text)
  ids = [a['id'] for _, a in parsed.elements if 'id' in a]
  links = [a['href'] for name, a in parsed.elements if name == 'a' and a['href'].startswith('#')]
  assert (
    len(set(ids)) == len(ids) and {link[1:] for link in links} <= set(ids) and links[0] == '#main'
  )
  assert names.count('table') == names.count('caption') and names.count('svg') == len(parsed.svgs)
  assert names.count('script') == 1
  assert not re.search(r'(src|href)="(https?:)?//|url\(|@import', text)
  return parsed


def test_a_run(tmp_path):
  folder = reports.run(tmp_path / 'mine', **{'optimizer.lr': '.07'})
  parsed = read(report([folder], images=False))
  table = {(r[0], r[1]): r[2:] for r in parsed.table('Accuracies')[1:]}
  assert table['knn', 'top1'] == ['43.21', '21.61', '10.00', '1']
  assert table['episodes', '5-way 1-shot'] == [
    '30.00 [29.00, 31.00]',
    '15.00 [14.50, 15.50]',
    '20.00',
    '2000',
  ]
  assert parsed.table('What differs from the config smoke')[1:] == [
    ['optimizer.lr', '0.05', '0.07']
  ]
  dots = next(s for s in parsed.svgs if s[0].text == 'Accuracy')[1].text
  assert 'knn top1: 43.2, untrained 21.6, chance 10.0. ' in dots
  assert 'episodes 5-way 1-shot: 30.0 [29.0, 31.0], untrained 15.0, chance 20.0.' in dots
  gains = next(s for s in parsed.svgs if s[0].text == 'gains')[1].text
  assert (
    'equimod all: trained 5.7, untrained 2.8, shuffled -10.0, zeroed -3.0, identity 0.0;' in gains
  )
  assert 'ratio' not in gains
  profile = next(s for s in parsed.svgs if s[0].text == 'profile')[1].text
  assert 'rotate: trained 1.25, untrained 0.62, to another image 0.99' in profile
  curve = next(s for s in parsed.svgs if s[0].text == 'Loss and its terms')[1].text
  assert 'loss: 8 at 2, 0.4 at 40' in curve and 'equimod: 3 at 2' in curve
  ran = dict(parsed.table('The run'))
  assert (ran['commit'], ran['seed'], ran['time in training steps']) == (
    'abcdef012345',
    '0',
    '20 s',
  )
  for words in (
    'n = 1, so no interval over training exists',
    '2 x cpu (cpu)',
    'loss = invariance + 1 x equimod',
    'git checkout abcdef0123456789',
    'jax==0.10.2',
    f'eqssl train --config smoke --workdir {folder} --config.seed=0 --config.optimizer.lr=.07',
    'collapsing under 0.3',
    'Median 32 images a second',
    'checkpoint of step 40',
  ):
    assert words in parsed.text, words
  data = parsed.data()
  assert data['results']['knn']['trained'][0]['numbers'] == {'top1': 0.4321, 'top5': 0.9}
  assert data['metrics'] == [
    json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()
  ]
  assert (
    data['config'] == json.loads((folder / 'config.json').read_text())
    and data['environment'] == reports.ENV
  )


def test_what_is_missing_says_its_command(tmp_path):
  folder = reports.run(tmp_path / 'bare', result_files={}, rows=0, equivariance='none')
  parsed = read(report([folder], images=False))
  for command in (
    'Not measured yet: knn, cached, few_labels, profile, health, regression, care. One command measures all of it: '
    f'eqssl eval {folder} --protocol default,equivariance',
    f'eqssl report {folder}',
    f'eqssl resume {folder}',
    '--config.knn_every=1 --config.probe=True',
  ):
    assert command in parsed.text, command
  assert 'no equivariance objective' in parsed.text
  boxes = [a for name, a in parsed.elements if a.get('class') == 'missing']
  assert len(boxes) == 3  # what to measure, an empty log, and the pictures: a command each
  ran = dict(parsed.table('The run'))
  assert ran['augmentations'].startswith('crop (invariant), ') and '(both)' not in ran['augmentations']
  for name in ('env.json', 'command.txt', 'metrics.jsonl'):
    (folder / name).unlink()
  (folder / 'eval' / 'torn.json').write_text('{"torn')
  (folder / 'eval' / 'old.json').write_text(
    json.dumps({'protocol': 'knn', 'trained': {'top1': 0.5}})
  )
  parsed = read(report([folder], images=False))
  assert 'eval/old.json, eval/torn.json' in parsed.text and 'names no config file' in parsed.text
  reports.run(tmp_path / 'new', result_files={})
  assert 'eqssl eval' in read(report([tmp_path / 'new'], images=False)).text
  failed = read(
    report([tmp_path / 'new'])
  )  # no checkpoint: the views are there, the features are not
  assert (
    'has no checkpoint' in failed.text and sum(name == 'img' for name, _ in failed.elements) > 8
  )
  reports.run(tmp_path / 'gone', **{'data': "{'name': 'folder', 'path': '/nowhere'}"})
  assert '/nowhere' in read(report([tmp_path / 'gone'])).text


def test_a_run_of_a_study_has_no_untrained_network(tmp_path):
  result_files = reports.results()
  for one in result_files.values():
    del one['untrained']
  folder = reports.run(tmp_path / 'run', result_files=result_files)
  parsed = read(report([folder], images=False))
  assert parsed.table('Accuracies')[1] == ['knn', 'top1', '43.21', '', '10.00', '1']
  assert (
    'untrained network was not measured' in parsed.text
    and 'eval/' not in parsed.table('Accuracies')[0]
  )
  assert (
    'equimod all: trained 5.7, shuffled'
    in next(s for s in parsed.svgs if s[0].text == 'gains')[1].text
  )


def test_pictures_have_words_and_fit(tmp_path, monkeypatch):
  reports.fake_panels(monkeypatch, 224)
  parsed = read(report([reports.run(tmp_path / 'run')]))
  images = [a for name, a in parsed.elements if name == 'img']
  assert len(images) == 4 * (3 + 2 + 5) + 4 * 7 + 6 * 9
  assert all(a['alt'] == f'crop 62 % {HOSTILE}; flip' and 'class' not in a for a in images)
  scatters = [s for s in parsed.svgs if s[0].text == 't-SNE by action']
  assert len(scatters) == 1 and f'class 3 {HOSTILE} 60' in scatters[0][1].text
  points = parsed.data()['maps']['PCA by class']
  assert len(points['points']) == 600 and points['names'][0] == f'class 0 {HOSTILE}'
  reports.fake_panels(monkeypatch, 16)
  assert 'class="sharp"' in report([tmp_path / 'run']).read_text()


def test_hostile_text_stays_text(tmp_path, monkeypatch):
  result_files = reports.results()
  result_files['knn']['trained'][0]['name'] = HOSTILE
  result_files['gains'] = reports.result(
    'gains', {f'{HOSTILE} all': 0.1}, {f'{HOSTILE} all': {HOSTILE: 0.1}}
  )
  reports.fake_panels(monkeypatch)
  name = HOSTILE.replace('/', '')
  folders = [reports.run(tmp_path / f'{name}{seed}', seed, result_files) for seed in range(2)]
  for folder in folders:
    (folder / 'command.txt').write_text(f'eqssl train --config {HOSTILE}\n')
    with open(folder / 'metrics.jsonl', 'a') as file:
      file.write(
        json.dumps({'step': 99, HOSTILE: 1.0, 'loss': None}) + '\n'
      )  # null: it was not finite
    parsed = read(report([folder]))
    assert HOSTILE in parsed.text and parsed.data()['metrics'][-1] == {
      'step': 99,
      HOSTILE: 1.0,
      'loss': None,
    }
  parsed = read(report(folders, tmp_path / 'c.html'))
  assert name in parsed.text
  read(report([reports.study(tmp_path / 'study')], images=False))


def test_json_has_no_number_that_is_not_finite():
  nan, inf = float('nan'), float('inf')
  assert page.finite({'a': [nan, 1.0], 2: (inf, {'b': -inf})}) == {
    'a': [None, 1.0],
    '2': [None, {'b': None}],
  }


def test_a_comparison(tmp_path):
  values = {'none': [0.40, 0.45, 0.38], 'equimod': [0.45, 0.52, 0.41]}
  folders = [
    reports.run(tmp_path / f'{name}{seed}', seed, reports.results(top1), equivariance=name)
    for name, tops in values.items()
    for seed, top1 in enumerate(tops)
  ]
  (folders[0] / 'report.html').write_text('')
  parsed = read(report(folders, tmp_path / 'out' / 'c.html'))
  rows = {(r[0], r[1]): r[2:] for r in parsed.table('Mean ± standard deviation')[1:]}
  expected = statistics.paired(values['equimod'], values['none'])
  mean, std = statistics.mean_std(values['equimod'])
  assert rows['knn top1', 'simclr + equimod'] == [
    '3',
    f'{100 * mean:.2f} ± {100 * std:.2f}',
    f'{50 * mean:.2f}',
    '10.00',
    statistics.interval_text(expected, 100.0),
  ]
  assert rows['knn top1', 'simclr'][-1] == ''
  accuracies = next(s for s in parsed.svgs if s[0].text == 'Accuracies: difference from simclr')[
    1
  ].text
  assert (
    f'knn top1: {100 * expected.mean:+.1f} [{100 * expected.low:.1f}, {100 * expected.high:.1f}]'
    in accuracies
  )
  differ = {r[0]: r[1:] for r in parsed.table('Config fields in which they differ')[1:]}
  assert (
    differ['seed'] == ['0', '1', '2'] * 2
    and differ['equivariance.name'] == ['none'] * 3 + ['equimod'] * 3
  )
  assert not any(k.startswith(('optimizer', 'augment')) for k in differ)
  assert [a['href'] for n, a in parsed.elements if n == 'a' and 'report.html' in a['href']] == [
    '../none0/report.html'
  ]
  loss = next(s for s in parsed.svgs if s[0].text == 'loss')[1].text
  assert (
    'simclr (n=3): 9 at 2, 1.4 at 40' in loss and 'simclr + equimod (n=3)' in loss
  )  # 8 + mean of seeds 0, 1, 2
  profile = next(s for s in parsed.svgs if s[0].text == 'profile')[1].text
  assert 'crop: simclr 0.25, simclr + equimod 0.25, untrained 0.12' in profile
  assert 'no interval' not in parsed.text and set(parsed.data()['runs']) == {
    f.name for f in folders
  }
  assert 'n = 1: no interval' in read(report([folders[0], folders[3]], tmp_path / 'one.html')).text


def test_a_comparison_without_results(tmp_path):
  folders = [reports.run(tmp_path / 'a' / 'run', 0, {}), reports.run(tmp_path / 'b' / 'run', 1, {})]
  parsed = read(report(folders, tmp_path / 'c.html'))
  assert (
    f'eqssl eval {folders[0]}' in parsed.text and 'Curves' in parsed.text and 'a/run' in parsed.text
  )
  with pytest.raises(UserError, match="no 'augment.spin' to group by"):
    report(folders, tmp_path / 'd.html', 'augment.spin')


def test_curves_of_runs_that_share_no_step(tmp_path):
  logs = {'a': {10: 4.0, 20: 2.0}, 'b': {5: 8.0, 15: 4.0}, 'far': {50: 1.0}}
  for seed, (name, log) in enumerate(logs.items()):
    folder = reports.run(tmp_path / name, seed)
    (folder / 'metrics.jsonl').write_text(
      ''.join(json.dumps({'step': s, 'loss': v}) + '\n' for s, v in log.items())
    )
  for runs, words, between in (
    (('a', 'b'), 'simclr + equimod (n=2): 5 at 10, 3.5 at 15', True),  # (4 + 6) / 2, (3 + 4) / 2
    (('a', 'far'), 'simclr + equimod: a: 4 at 10, 2 at 20', False),
  ):
    parsed = read(report([tmp_path / r for r in runs], tmp_path / 'c.html'))
    loss = next(s for s in parsed.svgs if s[0].text == 'loss')[1].text
    assert words in loss, loss
    assert (
      'interpolated between the steps' in parsed.text
    ) == between and 'Nothing was logged' not in parsed.text
  assert 'far: 1 at 50' in loss


def test_a_study(tmp_path):
  folder = reports.study(tmp_path / 'study')
  parsed = read(report([folder]))
  lead = 'rotate: better sensitive than invariant, kNN +5.0 [3.0, 7.0]'
  assert parsed.text.index(lead) < parsed.text.index('3 of 5 runs are done')
  assert reports.SENTENCES[0] in parsed.text and reports.SENTENCES[2] in parsed.text
  assert parsed.text.index(reports.SENTENCES[0]) < parsed.text.index(
    'Effects on kNN accuracy on validation'
  )
  assert 'rotate: 2 contrasts in words' in parsed.text
  assert reports.SENTENCES[1] not in parsed.text and 'concluded from 1 contrast of crop' in parsed.text
  effects = next(s for s in parsed.svgs if s[0].text == 'Effects on kNN accuracy on validation')[
    1
  ].text
  for words in (
    'rotate, sensitive - invariant: +5.0 [3.0, 7.0].',
    'crop, sensitive - invariant: +5.0.',
  ):
    assert words in effects
  assert parsed.table('Effects')[1][4:] == ['[3.0, 7.0]', '0.021', '3', '2.0']
  assert parsed.table('Effects')[2] == [
    'crop',
    'sensitive - invariant',
    'kNN',
    '+5.0',
    'none (n = 1)',
    'unknown',
    '1',
    'unknown',
  ]
  assert (
    'read out on validation' in parsed.text
    and '20% of each class of the training split' in parsed.text
  )
  assert parsed.table('Accuracy on the test split')[1] == [
    'rotate=invariant',
    '88.0 ± 1.0, n=2',
    'not done',
    'not done',
  ]
  assert parsed.text.index('Recommended: rotate=invariant') < parsed.text.index(
    reports.SENTENCES[0]
  )
  arms = {r[0]: r[1:] for r in parsed.table('Accuracy on validation')}
  columns = arms.pop('arm')
  cell = lambda arm: arms[arm][columns.index('kNN')]
  assert [cell(a) for a in arms] == ['91.2 ± 1.5, n=2', '95.0, n=1', '64.0', '10.0']
  assert list(arms)[2:] == ['untrained', 'chance']
  drift = next(s for s in parsed.svgs if s[0].text.startswith('Drift'))[1].text
  assert drift == 'rotate=invariant: rotate 0.35, crop 0.22.'  # finished runs alone
  gain, mrr = (
    next(s for s in parsed.svgs if s[0].text == t)[1].text
    for t in ('gains: equimod all', 'retrieval: equimod all mrr')
  )
  assert gain == 'rotate=invariant: true 5.0, shuffled -10.0, zeroed -2.0, identity 0.0.'
  assert mrr == 'rotate=invariant: true 0.38, chance 0.09.'
  gamma = next(s for s in parsed.svgs if s[0].text == 'care: gamma')[1].text
  assert gamma == 'rotate=invariant: crop 0.50; ignores it: crop 1.00.'
  r2 = next(s for s in parsed.svgs if s[0].text == 'regression: absolute, pooled')[1].text
  assert r2 == 'rotate=invariant: crop 0.60, flip 0.90; chance: crop 0.00, flip 0.10.'
  lines = {s[0].text: s[1].text for s in parsed.svgs if 'invariant (n' in s[1].text}
  assert list(lines) == [
    'rotate: invariance',
    'rotate: Spread of the embeddings',
  ]  # no loss: arms add different terms
  assert (
    'invariant (n=2): 4.5 at 1, 2.5 at 2' in lines['rotate: invariance']
  )  # without the smaller budget's
  assert (
    parsed.text.count('the image, ') == 2 * 3
    and 'rotate 180°' in parsed.text
    and 'crop ' in parsed.text
  )
  assert ['commit', 'the runs were made with 3 commits: 000000000000, 111111111111, 999999999999'] in parsed.table(
    'The study'
  )
  assert parsed.table('Failed')[1] == ['rotate=sensitive/0', f'the loss {HOSTILE} is not finite']
  assert parsed.table('Every run')[1][:5] == ['rotate=invariant/0', 'done', '93.0', '91.0', '80.0']
  assert parsed.table('Every run')[4][1:5] == ['waiting', '', '', '']
  for words in (
    '3 of 5 runs are done',
    '1 of 5 runs still wait: rotate=sensitive/1',
    f'eqssl study --workdir {folder}',
    '3.0 min in all, 60 s a run',
  ):
    assert words in parsed.text, words
  assert parsed.table('Rank')[1:] == [
    ['12.5 %', 'kNN', '0.83', '[0.50, 0.95]', '12', '0.90', '0.60', '75 %'],
    ['50 %', 'kNN', '0.97', 'none', '2', 'unknown', 'unknown', 'none to compare'],
  ]
  assert 'No difference seen, as invariances' not in parsed.text  # the first lines say it
  stored = {k: json.loads((folder / f'{k}.json').read_text()) for k in ('study', 'results')}
  assert parsed.data() == {'kind': 'study', **stored}
  two = {
    k: {**r, 'objective': ('equimod', 'essl')[r['seed'] % 2]}
    for k, r in stored['results']['runs'].items()
  }
  (folder / 'results.json').write_text(json.dumps({**stored['results'], 'runs': two}))
  (folder / 'study.json').write_text(
    json.dumps({**stored['study'], 'objective': ['equimod', 'essl']})
  )
  words = next(
    s for s in read(report([folder], images=False)).svgs if s[0].text == 'rotate: invariance'
  )[1].text
  assert (
    'invariant, equimod (n=1): 4 at 1' in words and 'invariant, essl (n=1): 5 at 1' in words
  )  # not one mean of both
  one_seed = [e | {'low': None, 'high': None} for e in stored['results']['effects']]
  (folder / 'results.json').write_text(json.dumps({**stored['results'], 'runs': two, 'effects': one_seed}))
  text = read(report([folder], images=False)).text
  assert text.count('Nothing can be concluded') == 1 and 'no interval)' not in text
  early = {**stored['results'], 'runs': {}, 'table': [], 'effects': [], 'proxies': []}
  (folder / 'results.json').write_text(json.dumps(early))
  assert 'needs two finished arms' in read(report([folder])).text  # nothing is done yet


def test_only_runs_and_studies(tmp_path):
  run, study = reports.run(tmp_path / 'run'), reports.study(tmp_path / 'study')
  (tmp_path / 'empty').mkdir()
  for dirs, words in (
    ([tmp_path / 'empty'], 'neither a run nor a study'),
    ([run, study], 'reported alone'),
    ([], 'no folder'),
  ):
    with pytest.raises(UserError, match=words):
      report(dirs)
  (study / 'results.json').unlink()
  with pytest.raises(UserError, match='has no results.json'):
    report([study])
  (study / 'results.json').write_text('{"torn')
  with pytest.raises(UserError, match='is not JSON'):
    report([study])


def test_a_run_leads_with_its_verdict(tmp_path):
  """Of a small test set it has counts with Wilson's interval, and a warning."""
  small = reports.result('knn', {'top1': 5 / 17}, {'top1': {'chance': 0.2}}, detail={'predictions': [0] * 17})
  small['untrained'][0]['numbers'] = {'top1': 4 / 17}
  folder = reports.run(tmp_path / 'run', result_files={'knn': small})
  parsed = read(report([folder], images=False))
  assert statistics.counted(5 / 17, 17) == '5/17 [13-53 %]'
  for words in ('The run is finished: 40 steps.', 'within the noise of 17 test images', '5/17 [13-53 %]',
                'Warning: there are only 17 test images'):
    assert words in parsed.text, words
  assert parsed.text.index('The run is finished') < parsed.text.index('This is one run, of seed')
  assert '29.41 = 5/17 [13-53 %]' in sum(parsed.table('Accuracies'), [])
  log = (folder / 'metrics.jsonl').read_text().splitlines()
  (folder / 'metrics.jsonl').write_text('\n'.join([*log[:2], log[2].replace('"std": 0.9', '"std": 0.1')]) + '\n')
  text = read(report([folder], images=False)).text
  assert 'it is at step 6 of 8' in text and 'The embeddings collapsed' in text and 'They hardly tell images apart' in text


def test_a_verdict_names_its_noise_and_claims_nothing_without_it(tmp_path):
  """Half a point is within the noise of 10,000 images; of an accuracy without predictions no noise is known."""
  for stem, detail, trained, untrained, words in (
    ('few_labels', {'trials': [0.59]}, 0.59, 0.589, 'few_labels top1 is 59.0 %, and 58.9 % without training.'),
    ('knn', {'predictions': [0] * 10000}, 0.505, 0.5, 'The difference is within the noise of 10,000 test images: knn'),
    ('knn', {'predictions': [0] * 10000}, 0.55, 0.5, 'Training improved the features by 5.0 points: knn'),
  ):
    content = reports.result(stem, {'top1': trained}, {}, detail=detail)
    content['untrained'][0]['numbers'] = {'top1': untrained}
    folder = run_folder.read(reports.run(tmp_path / f'{stem}{trained}', result_files={stem: content}))
    line = verdict.lines(folder)[-1]
    assert line.startswith(words), line


def test_a_spectrum_says_of_which_network_the_curve_ends(tmp_path):
  health = reports.results()['health']
  folder = run_folder.read(reports.run(tmp_path / 'run', result_files={'health': health}))
  ends = 'network ends after 3 of 4 dimensions; the others are exactly 0.'
  note = lambda: results.health_blocks(folder)[0].note
  assert f'trained {ends} The curve of the untrained {ends} There were too few images' in note()
  folder.results['health']['untrained'][0]['detail'] = {'spectrum': [9.0, 3.0, 1.0, 0.5]}
  assert f'of the trained {ends}' in note() and 'untrained' not in note()
  folder.results['health']['trained'][0]['detail'] = {'spectrum': [9.0, 3.0, 1.0, 0.5]}
  assert note() == 'A cliff is a collapse to the dimensions before it.'


def test_data_without_labels_are_not_asked_for_labels(tmp_path, monkeypatch):
  folder = reports.run(tmp_path / 'run', result_files={k: v for k, v in reports.results().items() if k == 'profile'})
  assert 'No accuracy was evaluated yet' in read(report([folder], images=False)).text
  facts = card.Card('mine', {}, card.SplitFacts(9), None, None, 8, (), (), 9)
  for known, lack in ((facts, 'labels'), (facts._replace(classes=('a', 'b')), 'test images')):
    monkeypatch.setattr(card, 'read_card', lambda workdir, known=known: known)
    text = read(report([folder], images=False)).text
    assert f'The data have no {lack}, so' in text and 'No accuracy was' not in text
    assert 'Not measured yet: gains, health, retrieval, regression, care. One' in text
    assert 'knn_every=1' not in text and ('--config.probe=True' in text) == (lack == 'test images')


@pytest.mark.parametrize('objective, has', [('none', False), ('essl', False), ('equimod', True)])
def test_only_what_a_run_can_have_is_offered(tmp_path, objective, has):
  """One box has one command; what is measured already is not in it, and a prediction only where something predicts."""
  every = {name: reports.result(name, {}, {}) for name in ('knn', 'profile', 'health', 'regression', 'care')}
  every['health'] = reports.results()['health']
  every['knn'] = reports.results()['knn']
  folder = run_folder.read(reports.run(tmp_path / 'run', result_files=every, equivariance=objective))
  assert unmeasured.protocols(folder) == (['gains', 'retrieval'] if has else [])
  text = read(report([folder.workdir], images=False)).text
  assert ('Not measured yet' in text) == has and ('there is no gain and no retrieval' in text) == (not has)
  del folder.results['health']
  block, = unmeasured.blocks(folder)
  assert block.command == f'eqssl eval {folder.workdir}' + ' --protocol default,equivariance' * has
  del folder.results['knn']
  folder.config.knn_every = 1.0
  hint = run_page._monitors(folder)[-1]
  assert hint.command == '--config.probe=True' and hint.text.startswith('The online probe was off')


def test_the_terms_of_a_loss_are_named_by_what_they_are(tmp_path):
  """Whatever else a row of the log has, such as the seconds of the step clock, is no term."""
  several = "[{'name': 'equimod'}, {'name': 'essl'}, {'name': 'equimod'}]"
  other = {step_log.FIRST_STEP: 40.0, step_log.SAVE: 3.0, step_log.MONITOR: 2.0, 'invented': 1.0}
  folder = reports.run(tmp_path / 'run', equivariance=several)
  study = reports.study(tmp_path / 'study')
  for path in [folder / 'metrics.jsonl', *study.glob('runs/*/*/metrics.jsonl')]:
    rows = [json.loads(line) | other for line in path.read_text().splitlines()]
    path.write_text(''.join(json.dumps(row | {"equimod'": 1.5}) + '\n' for row in rows))
  terms = ['loss', 'invariance', 'equimod', "equimod'"]  # essl was not logged
  parsed = read(report([folder], images=False))
  curve = next(s for s in parsed.svgs if s[0].text == 'Loss and its terms')[1].text
  assert re.findall(r"([\w']+): [\d.]+ at", curve) == terms
  assert re.search(r"loss = invariance \+ 1 x equimod \+ [\d.]+ x essl \+ 1 x equimod'", parsed.text)
  for path in ([folder, reports.run(tmp_path / 'b', 1)], [study]):
    titles = [s[0].text.split(': ')[-1] for s in read(report(path, tmp_path / 'p.html', images=False)).svgs]
    assert 'invariance' in titles and not set(titles) & set(other), titles


def test_an_objective_that_was_added_whole_is_one_difference(tmp_path):
  folder = reports.run(tmp_path / 'run', **{'equivariance.name': 'none'})
  (differences,) = [run_folder.changed(run_folder.read(folder))]
  assert ('equivariance.name', 'equimod', 'none') in differences
  assert [k for k, *_ in differences if k.startswith('equivariance.')] == [
    'equivariance.action_dim', 'equivariance.dim', 'equivariance.hidden', 'equivariance.name']  # smoke sets them


def test_unequal_budgets_are_said_beside_the_difference(tmp_path, capsys):
  folders = [reports.run(tmp_path / 'a'), reports.run(tmp_path / 'b', rows=10, **{'equivariance.name': 'none'})]
  text = read(report(folders, tmp_path / 'r.html')).text
  comparison.compare(folders, out=tmp_path / 'c.csv')
  assert 'images trained on, a run: simclr + equimod 640; simclr 320.' in capsys.readouterr().out
  assert 'The budgets are not equal' in text and 'simclr + equimod 640; simclr 320' in text
  (folders[1] / 'metrics.jsonl').unlink()  # as of imported weights: what they were trained on is not known
  assert 'budgets are not equal' not in read(report(folders, tmp_path / 'r.html')).text
  folders[1] = reports.run(tmp_path / 'c', **{'equivariance.name': 'none'})
  assert 'budgets are not equal' not in read(report(folders, tmp_path / 'r.html')).text
  comparison.compare(folders, out=tmp_path / 'c.csv')
  assert 'budgets are not equal' not in capsys.readouterr().out


def test_a_folder_of_runs_is_the_runs(tmp_path):
  one, two = reports.run(tmp_path / 'runs' / 'one'), reports.run(tmp_path / 'runs' / 'deep' / 'two', 1)
  reports.study(tmp_path / 'runs' / 'study')
  (tmp_path / 'runs' / 'export').mkdir()
  for name in ('config.json', 'model.safetensors'):
    (tmp_path / 'runs' / 'export' / name).write_text('{}')
  assert comparison.expand_runs([tmp_path / 'runs']) == [two, one] == comparison.expand_runs([two, one])
  assert 'Comparison of 2 runs' in report([tmp_path / 'runs'], tmp_path / 'r.html').read_text()
  assert comparison.expand_runs([tmp_path / 'runs' / 'one' / 'eval']) == [one / 'eval']


def test_a_folder_is_no_page(tmp_path):
  run, out = reports.run(tmp_path / 'run'), tmp_path / 'imgs'
  out.mkdir()
  for write in (
    lambda: report([run], out, images=False),
    lambda: report([run, run], out),
    lambda: gallery.write_gallery(load_config('smoke'), out=out),
    lambda: page.save(out, ''),
  ):
    with pytest.raises(UserError, match=r"imgs' is a folder, not a file to write") as e:
      write()
    assert len(str(e.value).splitlines()) == 2
  assert sorted(p.name for p in tmp_path.iterdir()) == ['imgs', 'run'] and not list(out.iterdir())


def test_one_is_one(tmp_path):
  folder = reports.run(tmp_path / 'run', batch='1', steps='0', epochs='1', rows=1)
  (folder / 'env.json').write_text(json.dumps({**reports.ENV, 'cores': 1}))
  (folder / 'metrics.jsonl').write_text(
    '{"step": 1, "epoch": 1.0, "loss": 1.0, "images_per_s": 1.0}\n'
  )
  parsed = read(report([folder], images=False))
  ran = dict(parsed.table('The run'))
  assert ran['length'] == '1 step of 1 image, 1 epoch; planned: 1 epoch' and ran[
    'machine'
  ].endswith(', 1 core')
  assert 'Median 1 image a second over 1 logged span, 1 s in all' in parsed.text


def test_arms_of_a_study_are_compared_without_their_untrained_network(tmp_path):
  bare = {
    k: {n: v for n, v in f.items() if n != 'untrained'} for k, f in reports.results(0.5).items()
  }
  folders = [
    reports.run(tmp_path / 'base'),
    reports.run(tmp_path / 'arm', result_files=bare, **{'invariance.temperature': '.3'}),
  ]
  text = report(folders, tmp_path / 'c.html', by='invariance.temperature').read_text()
  assert '+6.79 (n=1)' in text and '21.61' in text and '50.00' in text
  text = report(folders[::-1], tmp_path / 'd.html', by='invariance.temperature').read_text()
  assert '-6.79 (n=1)' in text and '21.61' in text


def test_a_page_is_written_whole(tmp_path, monkeypatch):
  path = page.save(tmp_path / 'a' / 'page.html', 'old \udcff')
  assert path.read_text() == 'old ?'
  monkeypatch.setattr(pathlib.Path, 'replace', lambda *_: (_ for _ in ()).throw(OSError('full')))
  with pytest.raises(OSError):
    page.save(path, 'new')
  assert path.read_text() == 'old ?'

"""No choice is made on the test split: what is held out, recommended, and read on the test split."""

import csv
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
import reports
import tiny
from scipy import stats

from equivariant_ssl.config import config_to_json, load_config
from equivariant_ssl.data import holdout, source, stream
from equivariant_ssl.errors import IN_USE, NOT_FINITE, OTHER_CONFIG, UserError
from equivariant_ssl.evaluate import evaluation, frozen, knn, target_data, targets, transfer
from equivariant_ssl.evaluate.features import features
from equivariant_ssl.evaluate.protocols import PROTOCOLS, Options
from equivariant_ssl.parallel import sharding
from equivariant_ssl.report import report
from equivariant_ssl.storage import checkpoint, record
from equivariant_ssl.study import (
  effect_sentences,
  effects,
  least_squares,
  recommend,
  runner,
  study_plan,
  study_results,
  study_session,
  worker,
)
from equivariant_ssl.training import loop, run_config, runs

# -- what is held out


def labeled_source(count=40, classes=4, names=True):
  labels = np.arange(count, dtype=np.int32) % classes
  part = source.Split(
    np.arange(count, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8),
    np.ones((count, 2), np.float32),
    labels,
  )
  return source.Source(
    'made',
    part,
    part._replace(images=part.images + 100),
    tuple('abcd'),
    (0.5,) * 3,
    (0.2,) * 3,
    names=tuple(f'{i}.png' for i in range(count)) if names else None,
  )


def test_a_share_of_each_class_is_held_out_always_the_same():
  whole = labeled_source()
  found, again, there = (holdout.hold_out(whole, 0.2, r) for r in ('', 'validation', 'test'))
  first = lambda split: split.images[:, 0, 0, 0].tolist()
  assert (
    np.bincount(found.test.labels).tolist() == [2] * 4
    and np.bincount(found.train.labels).tolist() == [8] * 4
  )
  assert sorted(first(found.train) + first(found.test)) == list(range(40)) and first(
    again.test
  ) == first(found.test)
  assert (
    first(found.train) == first(there.train) and there.test is whole.test
  )  # the test split, where it is asked for
  assert found.names == tuple(f'{i}.png' for i in first(found.train))
  assert [int(i) % 4 for i in first(found.test)] == found.test.labels.tolist()
  assert holdout.hold_out(whole, 0.0) is whole and (found.mean, found.std) == (whole.mean, whole.std)
  bare = holdout.hold_out(whole._replace(train=whole.train._replace(labels=None), names=None), 0.2)
  assert len(bare.test.images) == 8 and bare.test.labels is None and bare.names is None


def test_of_a_labeled_split_of_its_own_it_is_held_out():
  """STL-10: its training images have no labels, those that are read out on have."""
  whole = labeled_source(names=False)
  whole = whole._replace(labeled=whole.train, train=whole.train._replace(labels=None))
  found, want = holdout.hold_out(whole, 0.2), holdout.hold_out(labeled_source(), 0.2)
  assert found.train is whole.train and found.bank is found.labeled
  for part, same in ((found.labeled, want.train), (found.test, want.test)):
    np.testing.assert_array_equal(part.images, same.images)
    np.testing.assert_array_equal(part.labels, same.labels)


def test_what_streams_is_held_out_without_being_decoded():
  def read(rows):
    raise AssertionError('decoded')

  whole = labeled_source()
  lazy = stream.lazy_split(
    'made', source.Records(str, read, whole.train.labels, 40), 2, whole.train.labels
  )
  found, want = holdout.hold_out(whole._replace(train=lazy), 0.2), holdout.hold_out(whole, 0.2)
  for part, same in ((found.train, want.train), (found.test, want.test)):
    assert (
      part.images.rows.tolist() == same.images[:, 0, 0, 0].tolist()
      and part.labels.tolist() == same.labels.tolist()
    )
    assert len(part.sizes) == len(part.images)


@pytest.mark.parametrize(
  'share, said',
  [(0.05, 'no class has the 20 images'), (1.0, 'it is a share'), (-0.1, 'it is a share')],
)
def test_what_cannot_be_held_out(share, said):
  with pytest.raises(UserError, match=f'config.validation is {share:g}.*{said}'):
    holdout.hold_out(labeled_source(), share)


def test_a_run_trains_on_the_rest_and_knows_all_of_its_data():
  config = load_config('digits_study', {'validation': '.2'})
  one, other, there = (
    runs.prepare_run(c, sharding.mesh(jax.devices()[:1]), readout=r)
    for c, r in (
      (config, ''),
      (load_config('digits_study', {'validation': '.2', 'seed': '7'}), ''),
      (config, 'test'),
    )
  )
  whole = runs.prepare_run(load_config('digits_study'), sharding.mesh(jax.devices()[:1]))
  assert (
    len(one.source.train.images),
    len(one.source.test.images),
    len(there.source.test.images),
  ) == (804, 196, 797)
  np.testing.assert_array_equal(one.source.test.images, other.source.test.images)
  assert (
    one.recipe.steps_per_epoch == 804 // config.batch
    and one.card.images == 804
    and one.card.train == whole.card.train
  )
  assert one.card.test == there.card.test == whole.card.test  # another read-out is not other data


def test_a_run_of_an_older_version_held_nothing_out(tmp_path):
  def start(config):
    free = run_config.free_fields(config, tmp_path)
    record.start_record(tmp_path, config_to_json(config), 'eqssl resume', free=free)

  old = config_to_json(load_config('smoke'))
  del old['validation']
  record.start_record(tmp_path, old, 'eqssl train')
  with pytest.raises(UserError, match='validation: absent -> 0.2') as e:
    start(load_config('smoke', {'validation': '.2'}))
  assert e.value.code == OTHER_CONFIG
  start(load_config('smoke'))
  assert json.loads((tmp_path / 'config.json').read_text())['validation'] == 0.0


def test_a_run_is_evaluated_on_what_it_held_out_or_as_asked_on_the_test_split(tmp_path, capsys):
  config = load_config(tiny.NAME, {'steps': '2', 'checkpoint_every': '2', 'validation': '.25'})
  loop.train(config, tmp_path / 'run', mesh=sharding.mesh(jax.devices()[:1]), quiet=True)
  found = {
    r: evaluation.evaluate(tmp_path / 'run', ['knn'], options=Options(readout=r), untrained=False)[
      'knn'
    ]
    for r in ('', 'test')
  }
  said = capsys.readouterr().out
  assert 'on the validation images: ' in ' '.join(
    said.split()
  ) and 'on the test images: ' in ' '.join(said.split())
  assert {
    p.stem: json.loads(p.read_text())['readout'] for p in (tmp_path / 'run' / 'eval').glob('*.json')
  } == {'knn': 'validation', 'knn-test': 'test'}
  run = runs.prepare_run(config, sharding.mesh(jax.devices()[:1]))
  state = checkpoint.load_checkpoint(
    tmp_path / 'run' / 'checkpoints', runs.abstract_state(run), None, lambda line: None
  )[1]
  encode = jax.tree_util.Partial(
    frozen.frozen(run.recipe, run.config).encode, frozen.variables(state)
  )
  for r, result in found.items():
    a, b = (runs.prepare_run(config, run.mesh, readout=r).source[i] for i in (1, 2))
    want = knn.evaluate(
      features(encode, a.images), a.labels, features(encode, b.images), b.labels, 10
    ).top1
    assert result['trained'][0]['numbers']['top1'] == pytest.approx(want)
  known = json.loads((tmp_path / 'run' / 'data.json').read_text())
  assert known['images'] == len(run.source.train.images) < known['train']['count']
  with pytest.raises(
    UserError, match='held 0.25 of its images out of training, not 0'
  ):  # it has seen the others
    longer = load_config(tiny.NAME, {'steps': '4'})
    loop.train(
      longer,
      tmp_path / 'longer',
      mesh=sharding.mesh(jax.devices()[:1]),
      quiet=True,
      start_from=tmp_path / 'run',
    )
  with pytest.raises(UserError, match='--readout tset is neither'):
    evaluation.evaluate(tmp_path / 'run', ['knn'], options=Options(readout='tset'))
  with pytest.raises(UserError, match='held no images out'):
    holdout.readout_name(0.0, 'validation')


def test_transfer_is_read_out_on_a_part_of_the_targets_training_images(monkeypatch):
  """Without a look at the target's test split."""
  seen, whole = [], labeled_source(names=False)

  def read(split, data):
    return lambda size: seen.append(split) or (data,)

  opened = target_data.OpenTarget(
    targets.Target('made', held=0.25),
    4,
    {k: target_data.Part(k, read(k, s)) for k, s in (('train', whole.train), ('test', whole.test))},
  )
  monkeypatch.setattr(transfer, 'open_target', lambda *_: opened)
  monkeypatch.setattr(transfer, 'check_targets', lambda *_: None)
  monkeypatch.setattr(
    transfer,
    'central_features',
    lambda encode, split, size, mesh: (
      np.eye(4)[split.labels] + 1e-3 * np.asarray(split.images)[:, 0, 0, :1]
    ),
  )
  (row,), _ = transfer.transfer(None, ('made',), 2, validation=0.2)
  assert seen == ['train'] and row.value == 1.0 and row.note == '24 + 8 / 8'
  (row,), _ = transfer.transfer(None, ('made',), 2)
  assert seen == ['train', 'train', 'test'] and row.note == '32 + 8 / 40'


# -- Holm's correction


def test_holms_correction_is_rs():
  """R's p.adjust(c(.01, .04, .03, .005), 'holm'); also one p-value, none, ties, more than 1."""
  assert least_squares.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
  assert least_squares.holm([0.04]) == [0.04] and least_squares.holm([]) == []
  assert least_squares.holm([0.6, 0.6, 0.001]) == pytest.approx([1.0, 1.0, 0.003])


def test_an_interval_stands_beside_its_correction():
  arms = study_plan.design.one_at_a_time({'rotate': 'off'}, ('off', 'invariant'))
  arms = [study_plan.design.Arm(str(i), r) for i, r in enumerate(arms)]
  random = np.random.RandomState(0)
  a, b = random.randn(4), random.randn(4) + 1.0
  values = [(arm, s, v[s]) for arm, v in (('0', a), ('1', b)) for s in range(4)]
  (e,) = effects.one_at_a_time_effects(arms, values, 'linear')
  assert e.p == pytest.approx(stats.ttest_rel(b, a).pvalue)
  clear, none, one = effect_sentences.complete(
    [
      e._replace(p=0.004, low=0.01, high=0.03, mean=0.02),
      e._replace(p=0.3, low=-0.1, high=0.1, smallest=0.07),
      e._replace(p=None, low=None),
    ]
  )
  assert (clear.holm, none.holm, one.holm) == (
    0.008,
    0.3,
    None,
  )  # of two: what has no p is none of them
  assert clear.sentence.endswith('points of linear accuracy on test (4 seeds, Holm p = 0.008)')
  assert (
    'could have seen is 7.0 points of linear accuracy on test (4 seeds, Holm p = 0.3)'
    in none.sentence
  )
  assert '1 of 2 intervals of 95 % exclude zero' in effect_sentences.caution([clear, none, one])[0]
  assert 'for all 2, 1 are clear' in effect_sentences.caution([clear, none, one])[0]
  assert 'Holm p = 0.008' in effect_sentences.verdict([clear])[
    0
  ] and 'Holm p < .001' in effect_sentences.sentence(clear._replace(holm=1e-5))


# -- a planted study: validation and test disagree

VALIDATION = {'base': 0.80, 'rotate=invariant': 0.90, 'rotate=sensitive': 0.70, 'rotate=both': 0.60}
TEST = {'base': 0.95, 'rotate=invariant': 0.40, 'rotate=sensitive': 0.97, 'rotate=both': 0.99}
WRITE = 'import pathlib, sys; pathlib.Path(sys.argv[1]).write_text(sys.argv[2])'


@pytest.fixture
def planted(monkeypatch):
  """Runs that find what VALIDATION and TEST have for their arm; a list of what was started."""
  started = []

  def start(folder, plan, number, kind, slot, workers, what='found'):
    run = study_plan.runs(plan)[number]
    value = round((VALIDATION if what == 'found' else TEST)[run.arm] + 0.01 * run.seed, 3)
    started.append((run.name, what))
    (folder / run.workdir).mkdir(parents=True, exist_ok=True)
    text = json.dumps(
      {
        'readouts': {'linear': value, 'knn': value / 2},
        'chance': {'linear': 0.1, 'knn': 0.1},
        'seconds': 1.0,
      }
    )
    command = [sys.executable, '-S', '-c', WRITE, str(folder / run.workdir / f'{what}.json'), text]
    return runner.Worker(subprocess.Popen(command), run, slot)

  monkeypatch.setattr(runner, '_start', start)
  monkeypatch.setattr(runner, 'POLL_SECONDS', 0.01)
  return started


def make_plan(**kw):
  return study_plan.make_plan(
    study_plan.Settings('digits_study', ('rotate',), {}, **{'seeds': (0, 1), **kw}),
    'eqssl study',
    {},
  )


def done(folder, given):
  study_plan.write(folder, given)
  failed = runner.execute(folder, given, 'cpu', 4, lambda line: None)
  runner.write_results(folder, study_results.results(folder, given, failed))
  return json.loads((folder / 'results.json').read_text())


def test_the_recommendation_follows_validation_and_the_test_is_read_once(planted, tmp_path):
  given = make_plan()
  assert {a['config']['validation'] for a in given['made']} == {0.2}
  found = done(tmp_path, given)
  best = 'rotate=invariant'
  assert (
    found['recommended']['arm'] == best
    and found['recommended']['split'] == found['readout'] == 'validation'
  )
  assert (
    [s for s in planted if s[1] == 'test']
    == planted[-2:]
    == [(f'{best}/{seed}', 'test') for seed in (0, 1)]
  )
  first, second = found['recommendation']
  assert first.startswith(
    f'Recommended: {best}, of 4 arms the one with the highest mean linear accuracy on validation,'
  )
  assert 'is distinguishable from every other arm (Holm, 6 pairs)' in first
  assert (
    second.startswith('On the test split, which chose nothing')
    and f'{best} has 40.5 ± 0.7 % linear accuracy' in second
  )
  assert {(r['arm'], r['readout'], r['split']) for r in found['test']} == {
    (best, n, 'test') for n in ('linear', 'knn')
  }
  assert (
    {r['split'] for r in found['table']} == {e['split'] for e in found['effects']} == {'validation'}
  )
  assert all(
    ' on validation' in line
    for line in (*(e['sentence'] for e in found['effects']), *found['verdict'][:-1])
  )
  rows = list(csv.reader((tmp_path / 'table.csv').read_text().splitlines()))
  assert [r[:4] for r in rows if r[2:3] == ['test']] == [
    [best, 'linear', 'test', '2'],
    [best, 'knn', 'test', '2'],
  ]
  parsed = reports.Parsed(report([tmp_path], images=False).read_text())
  assert parsed.table('Accuracy on the test split')[1:] == [
    [best, '40.5 ± 0.7, n=2', '20.2 ± 0.4, n=2']
  ]
  assert (
    'Effects on linear accuracy on validation' in parsed.text
    and 'Accuracy on validation, %' in parsed.text
  )
  for never in ('95.5', '97.5', '99.5'):  # what the test split says of the others is nowhere
    assert never not in parsed.text and never not in (tmp_path / 'table.csv').read_text()
  before = {
    p: p.stat().st_mtime_ns
    for p in tmp_path.rglob('*.json')
    if p.name in ('found.json', 'test.json')
  }
  assert done(tmp_path, given) == found and len(planted) == 8 + 2  # nothing is read again
  assert all(p.stat().st_mtime_ns == t for p, t in before.items())


def test_what_the_terminal_says(planted, tmp_path, capsys):
  found = done(tmp_path, make_plan(proxies=(0.5,)))
  study_session.show(found, study_session.Console(width=200))
  said = capsys.readouterr().out
  assert (
    'accuracy on the validation images, %' in said
    and said.count('40.5 ± 0.7 % linear accuracy') == 1
  )
  assert 'arms, on the validation images, as the full budget does' in said
  assert [s[0] for s in planted if s[1] == 'test'] == [
    'rotate=invariant/0',
    'rotate=invariant/1',
  ]  # no smaller budget


def test_more_seeds_may_recommend_another_arm_and_the_earlier_look_is_said(
  planted, tmp_path, monkeypatch
):
  done(tmp_path, make_plan(seeds=(0,)))
  monkeypatch.setitem(VALIDATION, 'rotate=both', 1.5)
  found = done(tmp_path, make_plan())
  assert (
    found['recommended']['arm'] == 'rotate=both'
    and 'Not distinguishable' in found['recommendation'][0]
  )
  assert 'The test split was read for rotate=invariant too' in found['recommendation'][-1]
  assert [r['arm'] for r in found['test'] if r['readout'] == 'linear'] == [
    'rotate=invariant',
    'rotate=both',
  ]


def test_a_study_read_out_on_the_test_split_says_so(planted, tmp_path):
  given = make_plan(readout='test')
  assert {a['config']['validation'] for a in given['made']} == {0.0}
  found = done(tmp_path, given)
  assert (
    found['test'] == []
    and len(planted) == 8
    and 'highest mean linear accuracy on test' in found['recommendation'][0]
  )
  assert 'chosen on the test split itself' in found['recommendation'][1]
  assert all(' on test' in e['sentence'] for e in found['effects'])


def test_a_study_of_an_older_version_goes_on_as_it_was(planted, tmp_path):
  """It knew the test split alone, and its configs hold nothing out."""
  old = make_plan(readout='test')
  del old['readout']
  for arm in old['made']:
    del arm['config']['validation']
  tmp_path.joinpath('study.json').write_text(json.dumps(old))
  given = study_plan.read(tmp_path)
  assert (
    given['readout'] == 'test'
    and study_plan.run_config(given, study_plan.runs(given)[0]).validation == 0.0
  )
  with pytest.raises(UserError, match=r'another --readout \(test\)') as e:
    study_plan.write(tmp_path, make_plan())
  assert e.value.code == OTHER_CONFIG
  found = done(tmp_path, make_plan(readout='test'))  # as the same command of this version
  assert found['readout'] == 'test' and 'on test' in found['recommendation'][0]


def test_a_share_of_ones_own_is_kept_and_other_words_are_refused():
  given = study_plan.make_plan(
    study_plan.Settings('digits_study', ('rotate',), {'validation': '.1'}), '', {}
  )
  assert given['made'][0]['config'][
    'validation'
  ] == 0.1 and '(10% of each class' in study_plan.readout_images(given)
  with pytest.raises(UserError, match="--readout has no 'tset'"):
    make_plan(readout='tset')


# -- the recommendation


def record_of(arm, seed, value, status='done', **more):
  return {
    'arm': arm,
    'seed': seed,
    'share': 1,
    'status': status,
    'readouts': {} if value is None else {'knn': value},
  } | more


def test_arms_that_are_not_told_apart_are_named():
  random = np.random.RandomState(0)
  values = {
    arm: mean + 0.01 * random.randn(4) for arm, mean in (('a', 0.5), ('b', 0.505), ('c', 0.3))
  }
  found = {
    f'{a}/{s}': record_of(a, s, float(v)) for a, of in values.items() for s, v in enumerate(of)
  }
  got = recommend.recommended_arm(found, 'knn', 'validation')
  assert (
    got['arm'] in 'ab'
    and got['close'] == [{'a': 'b', 'b': 'a'}[got['arm']]]
    and (got['n'], got['arms']) == (4, 3)
  )
  one = {k: r for k, r in found.items() if r['seed'] == 0}
  assert (
    len(recommend.recommended_arm(one, 'knn', 'validation')['close']) == 2
  )  # one seed measures no noise
  told = {
    'recommended': recommend.recommended_arm(one, 'knn', 'validation'),
    'runs': one,
    'test': [],
  }
  assert 'one seed measures no noise' in recommend.recommendation(told, 'eqssl study --resume x')[0]
  assert '1 seed of ' in (
    more := recommend.recommendation(told, 'eqssl study --resume x')[1]
  ) and more.endswith('--resume x')
  alike = {f'{a}/0': record_of(a, 0, 0.5) for a in 'ba'}
  assert (
    recommend.recommended_arm(alike, 'knn', 'validation')['arm'] == 'b'
  )  # of equal ones the first: the base


def test_an_arm_that_lacks_a_seed_is_not_recommended_and_nothing_is_before_all_is_over():
  found = {
    'a/0': record_of('a', 0, 0.5),
    'b/0': record_of('b', 0, 0.9),
    'a/1': record_of('a', 1, 0.5),
    'b/1': record_of('b', 1, None, 'failed'),
  }
  got = recommend.recommended_arm(found, 'knn', 'validation')
  assert (got['arm'], got['left_out']) == ('a', ['b'])
  assert (
    'Left out, because a seed is missing: b.'
    in recommend.recommendation({'recommended': got, 'runs': found, 'test': []}, '')[0]
  )
  assert (
    recommend.recommended_arm(
      {**found, 'c/0': record_of('c', 0, None, 'waiting')}, 'knn', 'validation'
    )
    == {}
  )
  assert recommend.recommended_arm({'b/1': found['b/1']}, 'knn', 'validation') == {}
  tested = {k: r | ({'test': {}} if r['arm'] == 'a' else {}) for k, r in found.items()}
  told = {'recommended': got, 'runs': tested, 'test': recommend.rows_on_test(tested)}
  assert (
    recommend.unread_runs(told) == []
    and 'no labeled test images' in recommend.recommendation(told, '')[1]
  )


# -- the worker's part


def test_a_job_of_an_array_that_fails_says_so_to_the_others(tmp_path, monkeypatch):
  """And reads out what it may be the last to read out; what may pass leaves the run waiting."""
  given, ended = make_plan(), []
  study_plan.write(tmp_path, given)
  name = study_plan.runs(given)[0].name

  def fail(code):
    def run(folder, number):
      raise UserError('the loss is not finite', 'Lower the rate.', code)
    monkeypatch.setattr(worker, 'run', run)
    with pytest.raises(UserError):
      worker.run_of_array(tmp_path, given, 0, local=False)
    return study_results.results(tmp_path, given, {})['runs'][name]
  monkeypatch.setattr(worker, 'end_of_array', lambda folder, plan: ended.append(folder))
  assert fail(IN_USE)['status'] == 'waiting' and not ended
  found = fail(NOT_FINITE)
  assert (found['status'], found['error']) == ('failed', 'the loss is not finite') and len(ended) == 1
  assert fail(IN_USE)['status'] == 'waiting'  # the job was submitted again
  fail(NOT_FINITE)
  study_plan.forget_failures(tmp_path, given)
  assert study_results.results(tmp_path, given, {})['runs'][name]['status'] == 'waiting'


def test_the_test_split_is_read_once_by_accuracies_alone(planted, tmp_path, monkeypatch):
  """Of an array of jobs by the last; one that is as late leaves it to the other."""
  given, calls = make_plan(protocols=('linear', 'retrieval')), []
  study_plan.write(tmp_path, given)
  runner._do(
    tmp_path,
    given,
    'cpu',
    4,
    lambda line: None,
    [r.name for r in study_plan.runs(given)],
    'found',
    {},
  )

  def evaluate(workdir, names, options, **kw):
    calls.append((workdir.parent.name, workdir.name, names, options.readout))
    return {
      'cached': {'trained': [{'numbers': {'top1': 0.4}, 'controls': {'top1': {'chance': 0.1}}}]}
    }

  monkeypatch.setattr(evaluation, 'evaluate', evaluate)
  monkeypatch.setattr(runs, 'keep_compiled_programs', lambda: None)
  holder = tmp_path / 'runs' / 'rotate=invariant' / '0'
  with record.lock_folder(holder):
    worker.end_of_array(tmp_path, given)
    assert [c[:2] for c in calls] == [('rotate=invariant', '1')]
    with pytest.raises(UserError) as e:
      worker.read_test_split(tmp_path, given, study_plan.runs(given)[1])
    assert e.value.code == IN_USE
  worker.end_of_array(tmp_path, given)
  worker.end_of_array(tmp_path, given)
  assert [c[:2] for c in calls] == [('rotate=invariant', '1'), ('rotate=invariant', '0')]
  assert all(
    names == ['cached', 'knn', 'few_labels', 'linear'] and r == 'test' for *_, names, r in calls
  )
  assert all(PROTOCOLS[p].needs == 'labels' for p in calls[0][2])
  assert json.loads((holder / 'test.json').read_text()) == {'readouts': {'linear': 0.4}}
  assert os.listdir(tmp_path / 'runs' / 'base' / '0') == ['found.json']

"""The study: its designs, its least squares, and that a killed one ends as if left alone."""

import csv
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from PIL import Image
from scipy import stats

from equivariant_ssl import cli
from equivariant_ssl.config import config_to_json, load_config
from equivariant_ssl.errors import UserError
from equivariant_ssl.evaluate import statistics
from equivariant_ssl.parallel import sharding
from equivariant_ssl.study import (
  design,
  effect_sentences,
  effects,
  proxies,
  runner,
  study_command,
  study_plan,
  study_results,
)
from equivariant_ssl.study.design import Arm
from equivariant_ssl.training import runs
from equivariant_ssl.types import ROLES

AUGS = ('rotate', 'blur', 'flip', 'erase')
BASE = load_config('digits_study')
AS_INVARIANCE = 'as an invariance: with - without'
IN_EQUIVARIANCE = 'in the equivariance: with - without'


def settings(**kw):
  return study_plan.Settings(
    **{'config': 'digits_study', 'augs': ('rotate', 'blur'), 'overrides': {}, **kw}
  )


def planned(**kw):
  return study_plan.make_plan(settings(**kw), 'eqssl study', {})


# -- designs


def test_one_at_a_time_is_the_base_and_each_augmentation_in_each_other_role():
  arms = design.make_arms(BASE, AUGS, ROLES, ('equimod',), 'one-at-a-time')
  assert len(arms) == 1 + 4 * 3 and arms[0] == Arm('base', dict.fromkeys(AUGS, 'off'), 'equimod')
  assert [a.name for a in arms[1:5]] == [f'{a}=invariant' for a in AUGS]
  assert all(sum(r != 'off' for r in a.roles.values()) == 1 for a in arms[1:])
  several = design.make_arms(BASE, ('rotate',), ROLES, ('equimod', 'essl'), 'one-at-a-time')
  assert (
    'rotate=both:essl' in [a.name for a in several] and len(several) == 8
  )  # crop is sensitive in the base too
  silent = load_config('digits_simclr')
  arms = design.make_arms(
    design.base_config(silent, ('rotate',)), ('rotate',), ROLES, ('equimod',), 'one-at-a-time'
  )
  assert {a.name: a.objective for a in arms} == {
    'base': '',
    'rotate=invariant': '',
    'rotate=sensitive': 'equimod',
    'rotate=both': 'equimod',
  }


def test_an_arm_is_the_base_in_other_roles_and_nothing_else():
  config = design.base_config(load_config('digits_simclr'), ('rotate', 'jitter'))
  sections = design.objective_sections(config, ())
  arm = Arm('rotate=both', {'rotate': 'both', 'jitter': 'off'}, 'equimod')
  made, plain = design.arm_config(config, arm, sections), config_to_json(config)
  assert (
    made['augment'].pop('rotate')['role'] == 'both'
    and plain['augment'].pop('rotate')['role'] == 'off'
  )
  assert (
    made.pop('equivariance')['name'] == 'equimod' and plain.pop('equivariance')['name'] == 'none'
  )
  assert made == plain and made['augment']['order'] == ['crop', 'rotate', 'jitter']
  tuned = design.objective_sections(BASE, ('equimod', 'essl'))
  assert tuned['equimod'][0]['dim'] == 64 and tuned['essl'] == [{'name': 'essl'}]


@pytest.mark.parametrize(
  'augs, roles, runs',
  [(AUGS, ROLES, 16), (AUGS, ('off', 'invariant'), 8), (AUGS[:1], ROLES, 4), (AUGS[:3], ROLES, 16)],
)
def test_a_factorial_is_balanced_and_small(augs, roles, runs):
  found = design.factorial(augs, roles)
  assert len(found) == len({tuple(f.values()) for f in found}) == runs
  bits = np.array([[b for a in augs for b in design.LEVELS[f[a]]] for f in found]) - 0.5
  bits = bits[:, bits.std(0) > 0]
  assert np.allclose(
    bits.T @ bits, runs / 4 * np.eye(bits.shape[1])
  )  # each half on, no two together
  for i, j in zip(
    *np.triu_indices(bits.shape[1], 1), strict=True
  ):  # nor with two others' interaction
    assert np.allclose(bits.T @ (bits[:, i] * bits[:, j]), 0.0)


def test_chosen_interactions_are_distinguished():
  pairs = tuple((f'{a}.seen', f'{a}.told') for a in AUGS)
  arms = [Arm(str(i), r) for i, r in enumerate(design.factorial(AUGS, ROLES, pairs))]
  truth = lambda r: 0.1 * (r['rotate'] == 'both') + 0.02 * (r['blur'] in ('invariant', 'both'))
  runs = [(a.name, s, 0.5 + truth(a.roles) + 0.01 * s) for a in arms for s in (0, 1)]
  found = {
    (e.aug, e.contrast): e.mean
    for e in effects.factorial_effects(arms, ROLES, pairs, runs, 'linear')
  }
  assert found['rotate', 'rotate as an invariance x rotate in the equivariance'] == pytest.approx(
    0.1
  )
  assert found['rotate', AS_INVARIANCE] == pytest.approx(
    0.05
  )  # half the time it is in the equivariance too
  assert found['blur', AS_INVARIANCE] == pytest.approx(0.02)
  for none in (('erase', IN_EQUIVARIANCE), ('rotate', 'sensitive - invariant')):
    assert found[none] == pytest.approx(0.0, abs=1e-12)


def test_an_interaction_says_what_it_is_mixed_with():
  """Of 16 runs for eight factors, each is mixed with three others; of 8 for four, with one."""
  pair = (('rotate.seen', 'rotate.told'),)
  arms = [Arm(str(i), r) for i, r in enumerate(design.factorial(AUGS, ROLES, pair))]
  of = lambda worth: effects.factorial_effects(
    arms, ROLES, pair, [(a.name, 0, worth(a.roles)) for a in arms], 'knn'
  )[-1]
  other = of(lambda r: -0.1 * (r['erase'] == 'both'))
  name = 'erase as an invariance x erase in the equivariance'
  assert other.mean == pytest.approx(-0.1) and name in other.mixed and len(other.mixed) == 3
  words = effect_sentences.sentence(other)
  assert 'cannot tell it from the interaction' in words and name in words
  few = [
    Arm(str(i), r)
    for i, r in enumerate(
      design.factorial(AUGS, ('off', 'invariant'), (('rotate.seen', 'flip.seen'),))
    )
  ]
  assert (
    len(
      effects.factorial_effects(
        few,
        ('off', 'invariant'),
        (('rotate.seen', 'flip.seen'),),
        [(a.name, s, 0.1 * s) for a in few for s in (0, 1)],
        'knn',
      )[-1].mixed
    )
    == 1
  )


def test_objectives_are_distinguished():
  """What costs under one objective and helps under another is not one number."""
  sign = {'equimod': -1.0, 'augself': 1.0, '': 0.0}
  for name, pick in (('one-at-a-time', 'invariant - off'), ('factorial', IN_EQUIVARIANCE)):
    arms = design.make_arms(BASE, AUGS, ROLES, ('equimod', 'augself'), name)
    worth = lambda a, name=name: (
      0.1
      * sign[a.objective]
      * (a.roles['rotate'] in (('invariant',) if name[0] == 'o' else ('sensitive', 'both')))
    )
    runs = [(a.name, s, worth(a) + 0.001 * s) for a in arms for s in (0, 1)]
    found = (
      effects.one_at_a_time_effects(arms, runs, 'knn')
      if name[0] == 'o'
      else effects.factorial_effects(arms, ROLES, (), runs, 'knn')
    )
    means = {e.contrast: e.mean for e in found if e.aug == 'rotate'}
    assert means[f'{pick} (equimod)'] == pytest.approx(-0.1) and means[
      f'{pick} (augself)'
    ] == pytest.approx(0.1)
    said = effect_sentences.verdict(
      [e._replace(low=e.mean - 0.01, high=e.mean + 0.01) for e in found]
    )
    if name[0] == 'o':
      assert (
        'cost kNN accuracy on test: rotate (equimod) (-10.0' in said[0]
        and 'rotate (augself) (+10.0' in said[1]
      )


def test_an_objective_without_augmentations_is_left_out():
  """E-SSL predicts discrete actions: it has no arm beside a crop, and blur cannot be sensitive."""
  made = {
    a['name']: a['objective'] for a in planned(augs=('rotate', 'flip'), objective=('essl',))['made']
  }
  assert {n for n, o in made.items() if o} == {
    f'{a}={r}' for a in ('rotate', 'flip') for r in ('sensitive', 'both')
  }
  with pytest.raises(
    UserError, match='(?s)essl predicts discrete .*Study other augmentations than blur'
  ):
    planned(objective=('essl',))


def test_objectives_that_predict_actions_are_read_out_by_regression():
  of = lambda *objective: planned(augs=('rotate', 'flip'), objective=objective)['protocols']
  assert of('augself') == of('equimod', 'essl') == ['regression'] and of('equimod') == []


@pytest.mark.parametrize(
  'change, match',
  [
    ({'augs': ('nope',)}, 'nope'),
    ({'augs': ()}, 'no augmentation'),
    ({'arms': ('of',)}, "no 'of'"),
    ({'arms': ('off', 'sensitive', 'both'), 'design': 'factorial'}, 'no factorial design'),
    ({'design': 'latin'}, 'latin'),
    ({'equal': 'time'}, 'not time'),
    ({'seeds': (0, 0)}, 'seeds'),
    ({'proxies': (1.0,)}, 'proxies'),
    ({'interactions': (('blur.seen', 'blur.told'),)}, 'need a factorial'),
    ({'objective': ('nope',)}, 'nope'),
    ({'interactions': (('blur.seen', 'blur.tol'),), 'design': 'factorial'}, 'blur.tol'),
    ({'budget': float('nan')}, 'budget nan'),
    ({'arms': ()}, 'no role'),
    ({'protocols': ('nope',)}, 'nope'),
    ({'transfer': ('nope',)}, 'nope'),
    ({'transfer': ('digits', 'pets'), 'root': '/nowhere'}, 'pets: this data set is not on disk'),
    ({'config': 'nowhere'}, 'not found'),
  ],
)
def test_what_no_study_can_be(change, match):
  with pytest.raises(UserError, match=match):
    planned(**change)


# -- effects

ARMS = [
  Arm('base', {'rotate': 'off'}),
  *(Arm(f'rotate={r}', {'rotate': r}, 'equimod') for r in ROLES[1:]),
]


def noisy(arms, seeds, mean, noise=0.01):
  random, own = np.random.RandomState(0), np.random.RandomState(1).randn(9) * 0.1
  return [
    (a.name, s, mean(a.roles) + own[s] + noise * random.randn()) for s in range(seeds) for a in arms
  ]


def test_two_arms_are_the_paired_interval():
  runs = noisy(ARMS[:2], 4, lambda r: 0.1 * (r['rotate'] == 'invariant'))
  (e,) = effects.one_at_a_time_effects(ARMS[:2], runs, 'linear')
  a, b = ([v for n, _, v in runs if n == arm.name] for arm in ARMS[1::-1])
  want = statistics.paired(a, b)
  assert (e.aug, e.contrast, e.n) == ('rotate', 'invariant - off', 4)
  assert (e.mean, e.low, e.high) == pytest.approx((want.mean, want.low, want.high))
  # what it sees four times in five: of noncentral t, nearly
  error = (want.high - want.low) / 2 / stats.t.ppf(0.975, 3)
  assert e.smallest == pytest.approx((stats.t.ppf(0.975, 3) + stats.t.ppf(0.8, 3)) * error)


def test_intervals_cover_the_truth_as_often_as_they_say():
  hits = 0
  for i in range(400):
    random = np.random.RandomState(i)
    runs = [(a.name, s, 0.1 * (a.name == 'base') + random.randn()) for a in ARMS for s in range(3)]
    hits += sum(
      e.low <= {'invariant - off': -0.1, 'sensitive - off': -0.1}.get(e.contrast, 0.0) <= e.high
      for e in effects.one_at_a_time_effects(ARMS, runs, 'linear')
    )
  assert 0.93 < hits / 1600 < 0.97


def test_a_failed_run_leaves_the_rest_and_one_seed_no_interval():
  runs = noisy(ARMS, 3, lambda r: 0.05 * (r['rotate'] == 'sensitive'), 1e-3)
  found = {
    e.contrast: e
    for e in effects.one_at_a_time_effects(
      ARMS, [r for r in runs if r[:2] != ('rotate=sensitive', 1)], 'knn'
    )
  }
  assert found['sensitive - invariant'].n == 2 and found['both - invariant'].n == 3
  assert (
    found['sensitive - invariant'].low > 0.04
    and found['both - invariant'].low < 0 < found['both - invariant'].high
  )
  one, *_ = effects.one_at_a_time_effects(ARMS, runs[:4], 'knn')
  assert one.low is None and 'no interval' in effect_sentences.sentence(one)
  assert effects.one_at_a_time_effects(ARMS, runs[:1], 'knn') == []
  crossed = [Arm(str(i), r) for i, r in enumerate(design.factorial(AUGS, ROLES))]
  assert (
    effects.factorial_effects(crossed, ROLES, (), [(a.name, 0, 0.5) for a in crossed[:5]], 'knn')
    == []
  )  # too few


def test_any_runs_that_are_done_tell_what_they_tell():
  """With more workers than arms, or after a failure, seeds and arms need not hang together."""
  runs = noisy(ARMS, 3, lambda r: 0.05 * (r['rotate'] == 'sensitive'), 1e-9)
  apart = [r for r in runs if (r[0] == 'base') == (r[1] == 1)]  # seed 1: the base alone
  found = {e.contrast: e.mean for e in effects.one_at_a_time_effects(ARMS, apart, 'knn')}
  assert found == pytest.approx({'sensitive - invariant': 0.05, 'both - invariant': 0.0}, abs=1e-6)
  for i in range(60):
    chosen = [r for r in runs if np.random.RandomState(i).rand(len(runs))[runs.index(r)] < 0.4]
    for e in effects.one_at_a_time_effects(ARMS, chosen, 'knn'):
      first, second = e.contrast.split(' - ')
      assert e.mean == pytest.approx(
        0.05 * ((first == 'sensitive') - (second == 'sensitive')), abs=1e-6
      )


def test_sentences():
  of = lambda mean, half: effect_sentences.sentence(
    effects.Effect(
      'rotate', 'sensitive - invariant', 'linear', mean, mean - half, mean + half, 3, 0.04
    )
  )
  assert of(0.05, 0.02) == (
    'rotate: sensitive beats invariant by 5.0 ± 2.0 points of linear accuracy on test (3 seeds)'
  )
  assert of(-0.05, 0.02).startswith('rotate: invariant beats sensitive by 5.0 ± 2.0 points')
  assert of(0.01, 0.02) == (
    'rotate: no difference seen between sensitive and invariant; the smallest difference that '
    'this study could have seen is 4.0 points of linear accuracy on test (3 seeds)'
  )


def test_a_proxys_rank_is_scipys():
  full = dict(zip('abcdef', [0.1, 0.4, 0.2, 0.5, 0.3, 0.6], strict=True))
  short = dict(zip('abcdef', [0.1, 0.3, 0.2, 0.5, 0.4, 0.35], strict=True))
  of = lambda *means: [
    effects.Effect('a', str(i), 'linear', m, m - 0.02, m + 0.02, 3, None)
    for i, m in enumerate(means)
  ]
  found = proxies.compare_budgets(
    0.125, 'linear', short, full, of(0.1, 0.2, 0.3), of(0.1, -0.05, 0.01)
  )
  assert found.rank == pytest.approx(
    stats.spearmanr(list(full.values()), list(short.values())).statistic
  )
  assert found.low < found.rank < found.high and (found.n, found.signs, found.effects) == (
    6,
    0.5,
    pytest.approx(-0.5),
  )
  assert proxies.compare_budgets(0.5, 'linear', {'a': 1.0}, full, [], []) is None


def test_what_a_repeat_would_reach_is_what_repeats_reach():
  random = np.random.RandomState(0)
  truth, ranks, said = random.randn(40), [], []
  for _ in range(200):
    of = lambda seeds, truth=truth: [
      (str(a), s, t + random.randn()) for a, t in enumerate(truth) for s in seeds
    ]
    one, other = of(range(3)), of(range(3, 6))
    mean = lambda runs: [np.mean([v for a, _, v in runs if a == str(i)]) for i in range(40)]
    ranks.append(stats.spearmanr(mean(one), mean(other)).statistic)
    said.append(proxies.expected_repeat(one))
  assert np.mean(said) == pytest.approx(np.mean(ranks), abs=0.03)
  assert proxies.expected_repeat(of((0,))) is None


# -- plans


def test_the_full_budget_comes_first_seed_by_seed():
  made = planned(proxies=(0.5,), seeds=(0, 3))
  runs = study_plan.runs(made)
  assert len(runs) == 7 * 2 * 2 and [r.seed for r in runs[:14]] == [0] * 7 + [3] * 7
  assert (
    runs[0].name == 'base/0'
    and runs[14].name == 'base/0@0.5'
    and len({r.workdir for r in runs}) == 28
  )
  full, half = study_plan.run_config(made, runs[8]), study_plan.run_config(made, runs[22])
  assert (full.epochs, full.seed, full.optimizer.warmup_epochs) == (20.0, 3, 3.0)
  assert (half.epochs, half.optimizer.warmup_epochs) == (10.0, 1.5) and half.augment == full.augment
  short = study_plan.run_config(planned(budget=6.0), runs[0])
  assert (short.epochs, short.optimizer.warmup_epochs) == (6.0, pytest.approx(0.9))


def test_equal_compute_counts_the_views():
  made = planned(equal='compute', augs=('rotate',), overrides={'augment.crop.role': 'invariant'})
  epochs = {r.arm: study_plan.run_config(made, r).epochs for r in study_plan.runs(made)}
  assert epochs['base'] == epochs['rotate=invariant'] == 20.0  # two views
  assert epochs['rotate=both'] == pytest.approx(20.0 * 2 / 3)  # and the reference
  assert epochs['rotate=sensitive'] == pytest.approx(20.0 * 2 / 5)  # and EquiMod's own two


def found_json(value):
  return json.dumps(
    {
      'readouts': {'linear': value, 'knn': value / 2},
      'untrained': {'linear': 0.3, 'knn': 0.2},
      'chance': {'linear': 0.1, 'knn': 0.1},
      'profile': {'rotate': 0.1},
      'gains': {},
      'retrieval': {},
      'seconds': 1.0,
    }
  )


def test_what_is_done_is_reported_while_the_rest_waits(tmp_path):
  made = planned(augs=('rotate',))
  study_plan.write(tmp_path, made)
  assert study_plan.read(tmp_path) == made
  for i, run in enumerate(study_plan.runs(made)[:6]):
    (tmp_path / run.workdir).mkdir(parents=True)
    (tmp_path / run.workdir / 'found.json').write_text(found_json(0.5 + 0.01 * i))
  found = study_results.results(tmp_path, made, {'base/2': 'it was killed'})
  assert [r['status'] for r in found['runs'].values()] == ['done'] * 6 + ['waiting'] * 2 + [
    'failed'
  ] + ['waiting'] * 3
  assert found['runs']['base/2']['error'] == 'it was killed'
  assert found['untrained'] == pytest.approx({'linear': 0.3, 'knn': 0.2})
  rows = list(csv.reader(study_results.table(found).splitlines()))
  assert rows[0] == ['arm', 'readout', 'split', 'n', 'mean', 'std', 'seed 0', 'seed 1']
  assert rows[1][:4] == ['base', 'linear', 'validation', '2'] and float(
    rows[1][4]
  ) == pytest.approx(0.52)
  assert (
    float(rows[1][7]) == 0.54
    and 'before every run is over: 5 of 12 wait.' in found['recommendation'][0]
  )
  assert 'rotate: ' in found['effects'][0]['sentence']


@pytest.mark.parametrize('name', ['one-at-a-time', 'factorial'])
def test_results_can_be_had_after_every_run(tmp_path, name):
  """Shorter budgets too, whose runs come last."""
  made = planned(proxies=(0.25, 0.5), seeds=(0,), design=name)
  study_plan.write(tmp_path, made)
  found, value = study_results.results(tmp_path, made, {}), np.random.default_rng(0)
  assert not found['effects'] and not found['proxies']
  for run in study_plan.runs(made):
    (tmp_path / run.workdir).mkdir(parents=True)
    (tmp_path / run.workdir / 'found.json').write_text(found_json(value.uniform(0.4, 0.6)))
    found = study_results.results(tmp_path, made, {})
  assert [(p['budget'], p['readout'], p['n']) for p in found['proxies']] == [
    (share, name, len(made['made'])) for share in (0.25, 0.5) for name in ('linear', 'knn')
  ]
  assert all(-1 <= p['rank'] <= 1 for p in found['proxies'])
  assert len(found['effects']) == 2 * 2 * (
    4 if name[0] == 'o' else 3
  )  # augmentations, read-outs, contrasts


def test_a_folder_holds_one_study(tmp_path):
  study_plan.write(tmp_path, planned())
  study_plan.write(tmp_path, planned(seeds=(0, 1, 2, 3)))  # more seeds of the same one
  assert len(study_plan.read(tmp_path)['seeds']) == 4
  with pytest.raises(UserError, match='another study|another .*budget'):
    study_plan.write(tmp_path, planned(budget=7.0))
  with pytest.raises(UserError, match='study.json is missing'):
    study_plan.read(tmp_path / 'none')
  (tmp_path / 'run').mkdir()
  (tmp_path / 'run' / 'config.json').write_text('{}')
  with pytest.raises(UserError, match='holds a run'):
    study_plan.write(tmp_path / 'run', planned())


# A data set of its own, in a folder that is named by a relative path.
OF_FOLDER = {'data': "{'name': 'folder', 'path': 'images', 'size': 8}", 'batch': '4', 'size': '8'}


@pytest.fixture
def two_folders(tmp_path, monkeypatch):
  """Two folders; the first is the current one and has a data set in `images`."""
  for name in ('home', 'away'):
    (tmp_path / name).mkdir()
  pixels = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), np.uint8)
  for i, image in enumerate(pixels):
    (tmp_path / 'home' / 'images' / 'ab'[i % 2]).mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(tmp_path / 'home' / 'images' / 'ab'[i % 2] / f'{i}.png')
  monkeypatch.chdir(tmp_path / 'home')
  return tmp_path / 'home', tmp_path / 'away'


def test_a_study_goes_on_from_another_folder(two_folders, tmp_path, monkeypatch):
  home, away = two_folders
  overrides = {**OF_FOLDER, 'data.path': 'images'}
  plan = planned(overrides=overrides, transfer=('images',), root='tfds')
  assert {arm['config']['data']['path'] for arm in plan['made']} == {str(home / 'images')}
  assert plan['overrides']['data.path'] == plan['transfer'][0] == str(home / 'images')
  assert plan['root'] == str(home / 'tfds') and planned()['root'] == ''
  study_plan.write(tmp_path / 'study', plan)
  monkeypatch.chdir(away)
  plan = study_plan.read(tmp_path / 'study')
  study_plan.write(tmp_path / 'study', plan)
  config = study_plan.run_config(plan, study_plan.runs(plan)[0])
  run = runs.prepare_run(config, sharding.mesh(jax.devices()[:1]))
  assert run.source.classes == ('a', 'b') and len(run.source.train.images) == 16


def test_an_older_study_keeps_its_test_images(two_folders, tmp_path):
  """Studies of before `data.test_of` held a share of all images out at once."""
  plan = planned(overrides=OF_FOLDER)
  old = json.loads(json.dumps(plan))
  assert all(arm['config']['data'].pop('test_of') == 'class' for arm in old['made'])
  (tmp_path / 'study').mkdir()
  (tmp_path / 'study' / 'study.json').write_text(json.dumps(old))
  for _ in range(2):   # the second time meets what the first one has written
    study_plan.write(tmp_path / 'study', plan)
    again = study_plan.read(tmp_path / 'study')
    assert {study_plan.run_config(again, run).data.test_of for run in study_plan.runs(again)} == {'all'}


def test_an_older_study_keeps_its_relative_paths(two_folders, tmp_path, monkeypatch):
  """Its own command is not refused, from the folder that it was begun in."""
  home, away = two_folders
  (home / 'tfds').mkdir()
  overrides = {**OF_FOLDER, 'data.path': 'images'}
  ask = lambda **kw: planned(overrides=overrides, root='tfds', **kw)
  old = json.loads(json.dumps(ask()).replace(f'{home}/', ''))
  assert old['made'][0]['config']['data']['path'] == old['overrides']['data.path'] == 'images'
  study_plan.write(tmp_path / 'study', old)
  study_plan.write(tmp_path / 'study', ask(seeds=(0, 1, 2, 3)))
  plan = study_plan.read(tmp_path / 'study')
  assert plan == {**old, 'seeds': [0, 1, 2, 3]}
  monkeypatch.chdir(away)
  study_plan.write(tmp_path / 'study', plan)  # --resume
  assert study_plan.read(tmp_path / 'study') == plan
  with pytest.raises(UserError, match='another --overrides, --root'):
    study_plan.write(
      tmp_path / 'study',
      planned(overrides={**overrides, 'data.path': str(home / 'images')}, root=str(home / 'tfds')),
    )


def test_resuming_takes_nothing_new(tmp_path, capsys):
  """What it would ask for would be left undone without a word."""
  assert cli.main(['study', '--resume', str(tmp_path), '--proxies', '1/2', '--config.size=8']) == 2
  assert '--proxies, --config.size would change it' in capsys.readouterr().err


def test_shares_of_a_budget():
  assert [study_command._share(t) for t in ('1/8', '.25')] == [0.125, 0.25]
  with pytest.raises(UserError, match='1/0'):
    study_command._share('1/0')


# -- runs

TINY = [
  '--config.encoder.width=4',
  '--config.size=16',
  '--config.log_every=1',
  '--config.checkpoint_every=1',
]


def start(folder, *more, steps=6):
  env = {
    **os.environ,
    'JAX_PLATFORMS': 'cpu',
    'EQSSL_CACHE': os.environ.get(
      'EQSSL_TEST_CACHE', str(pathlib.Path(__file__).parents[2] / '.cache' / 'xla-tests')
    ),
  }
  args = [
    sys.executable,
    '-m',
    'equivariant_ssl.cli',
    'study',
    '--out',
    str(folder),
    '--config',
    'digits_simclr',
    *more,
    f'--config.steps={steps}',
    *TINY,
  ]
  return subprocess.Popen(
    args, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
  )


def finished(process, code=0):
  out = process.communicate(timeout=900)[0]
  assert process.returncode == code, out
  return out


def killed(folder, after, *more, how=signal.SIGKILL):
  """Start, wait for `after()`, kill the study; its workers end by themselves, after it."""
  process = start(folder, *more)
  while not after() and process.poll() is None:
    time.sleep(0.02)
  process.send_signal(how)
  out = process.communicate()[0]
  return process.returncode, out


def same(folder, whole):
  assert (folder / 'table.csv').read_bytes() == (whole / 'table.csv').read_bytes()
  said = lambda of: {
    k: json.loads((of / 'results.json').read_text())[k] for k in ('verdict', 'effects', 'table')
  }
  assert said(folder) == said(whole)


MINIATURE = '''
import json, pathlib, subprocess, sys
from equivariant_ssl.study import runner, study_plan, study_results

folder = pathlib.Path(sys.argv[1])
WORK = """
import json, pathlib, random, sys, time
time.sleep(.3)
values = {name: random.Random(f'{sys.argv[2]} {n}').random()
          for n, name in enumerate(('linear', 'knn'))}
content = {'readouts': values, 'untrained': {}, 'chance': {}, 'seconds': time.time()}
pathlib.Path(sys.argv[1]).write_text(json.dumps(content))
"""

def start(folder, plan, number, kind, slot, workers, what='found'):
  asked = study_plan.runs(plan)[number]
  (folder / asked.workdir).mkdir(parents=True, exist_ok=True)
  found = folder / asked.workdir / f'{what}.json'
  command = [sys.executable, '-c', WORK, str(found), asked.name]
  return runner.Worker(subprocess.Popen(command), asked, slot)

runner._start = start
settings = study_plan.Settings('digits_study', ('rotate', 'blur'), {}, seeds=(0, 1))
plan = study_plan.make_plan(settings, 'eqssl study', {})
study_plan.write(folder, plan)
failed = runner.execute(folder, plan, 'cpu', 2, print)
runner.write_results(folder, study_results.results(folder, plan, failed))
'''


def test_in_miniature_a_killed_study_ends_as_if_left_alone(tmp_path):
  """The study's own process is killed after three runs, which find what their name says."""

  def begin(folder):
    return subprocess.Popen(
      [sys.executable, '-c', MINIATURE, str(folder)],
      env={**os.environ, 'JAX_PLATFORMS': 'cpu'},
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )

  whole, torn = tmp_path / 'whole', tmp_path / 'torn'
  alone, process = begin(whole), begin(torn)
  while len(list(torn.rglob('found.json'))) < 3 and process.poll() is None:
    time.sleep(0.02)
  process.kill()
  process.communicate()
  time.sleep(1.0)  # what it had started may end
  before = {p: p.stat().st_mtime_ns for p in torn.rglob('found.json')}
  assert 3 <= len(before) < 14, 'it was not killed half-way'
  out = finished(begin(torn))
  assert f'{len(before)} of 14 runs are done' in out
  finished(alone)
  same(torn, whole)
  assert all(p.stat().st_mtime_ns == t for p, t in before.items())  # a finished run is not repeated


def test_what_is_still_held_is_tried_again(tmp_path, monkeypatch):
  """A killed study's own processes may still be saving what its successor wants to go on with."""
  made, tries, said = planned(augs=('rotate',), arms=('off', 'invariant'), seeds=(0,)), [], []
  study_plan.write(tmp_path, made)

  def begin(folder, plan, number, kind, slot, workers, what='found'):
    asked = study_plan.runs(plan)[number]
    tries.append((number, slot))
    where = folder / asked.workdir
    where.mkdir(parents=True, exist_ok=True)
    (where / 'log.txt').write_text('eqssl: it broke [/red]\n')
    code = 3 if tries.count((number, slot)) == 1 and not number else 1
    if number == 0 and code == 1:
      (where / f'{what}.json').write_text(found_json(0.5))
    return runner.Worker(subprocess.Popen(['sh', '-c', f'exit {code}']), asked, slot)

  monkeypatch.setattr(runner, '_start', begin)
  monkeypatch.setattr(runner, 'RETRY_SECONDS', 0.1)
  failed = runner.execute(tmp_path, made, 'cpu', 1, said.append)
  assert tries == [(0, 0), (1, 0), (0, 0), (0, 0)] and failed == {
    'rotate=invariant/0': 'it broke [/red]'
  }
  assert [line.split(';')[0] for line in said[1:]] == [
    '1/2 rotate=invariant/0: it broke [/red]',
    '2/2 base/0: done',
    'Reading out on the test split: base/0.',
    '1/1 base/0: done',
  ]


def test_workers_have_a_device_each_of_those_that_may_be_seen(monkeypatch):
  monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '4,6')
  assert [runner._worker_variables('gpu', i, 2) for i in (0, 1)] == [
    {'CUDA_VISIBLE_DEVICES': d} for d in '46'
  ]
  monkeypatch.delenv('CUDA_VISIBLE_DEVICES')
  assert runner._worker_variables('gpu', 1, 2) == {
    'CUDA_VISIBLE_DEVICES': '1'
  } and not runner._worker_variables('gpu', 0, 1)
  assert 'eigen=false' in runner._worker_variables('cpu', 0, 2)[
    'XLA_FLAGS'
  ] and not runner._worker_variables('cpu', 0, 1)


def test_slurm_gets_the_runs(tmp_path, monkeypatch):
  monkeypatch.setenv('PATH', '/nowhere')
  said = []
  runner.slurm(tmp_path, planned(), 0, said.append)
  text = (tmp_path / 'slurm.sh').read_text()
  assert (
    '--array=0-20%32' in text
    and 'scontrol requeue "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"' in text
  )
  assert f'eqssl study --resume {tmp_path} --collect' in said[1]


@pytest.mark.slow
def test_a_killed_study_ends_as_if_left_alone(tmp_path):
  asked = ('--augs', 'flip', '--arms', 'off', '--seeds', '0')
  out = finished(start(tmp_path / 'whole', *asked))
  assert (
    'Report:' in out
    and 'base,linear,validation,1,' in (tmp_path / 'whole' / 'table.csv').read_text()
  )
  torn = tmp_path / 'torn'
  code, _ = killed(torn, lambda: any(p.stat().st_size for p in torn.rglob('metrics.jsonl')), *asked)
  assert code == -signal.SIGKILL and not (torn / 'table.csv').exists()
  out = finished(start(torn, *asked))
  assert 'resum' not in out and (torn / 'report.html').stat().st_size < 6e6
  same(torn, tmp_path / 'whole')
  (torn / 'results.json').unlink()
  assert cli.main(['study', '--resume', str(torn), '--collect']) == 0
  same(torn, tmp_path / 'whole')


@pytest.mark.slow
def test_killed_at_five_random_moments(tmp_path):
  asked = ('--augs', 'flip,rotate', '--arms', 'off,invariant,both', '--seeds', '0,1')
  began = time.time()
  finished(start(tmp_path / 'whole', *asked))
  whole, random, torn = (
    time.time() - began,
    np.random.RandomState(int(time.time())),
    tmp_path / 'torn',
  )
  for i in range(5):
    until = time.time() + random.uniform(0.05, 0.3) * whole
    code, out = killed(
      torn,
      lambda until=until: time.time() > until,
      *asked,
      how=[signal.SIGKILL, signal.SIGTERM][i % 2],
    )
    assert code in (-signal.SIGKILL, 75, 0, -signal.SIGTERM), out
  before = {p: p.stat().st_mtime_ns for p in torn.rglob('found.json')}
  finished(start(torn, *asked))
  same(torn, tmp_path / 'whole')
  assert all(p.stat().st_mtime_ns == t for p, t in before.items())  # a finished run is not repeated


@pytest.mark.slow
def test_a_run_that_fails_is_reported_and_the_rest_goes_on(tmp_path):
  (tmp_path / 'runs' / 'blur=sensitive' / '0' / 'config.json').mkdir(
    parents=True
  )  # its run cannot write there
  out = finished(start(tmp_path, '--augs', 'blur', '--arms', 'off,sensitive', '--seeds', '0'), 2)
  found = json.loads((tmp_path / 'results.json').read_text())['runs']
  assert {k: r['status'] for k, r in found.items()} == {
    'base/0': 'done',
    'blur=sensitive/0': 'failed',
  }
  assert 'config.json' in found['blur=sensitive/0']['error'] and 'failed: blur=sensitive/0: ' in out

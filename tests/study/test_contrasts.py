"""The names of contrasts, in a person's words everywhere; the names of older versions are read."""
import csv
import json

import pytest
import reports

from equivariant_ssl import cli
from equivariant_ssl.report import report
from equivariant_ssl.study import contrasts, study_plan, study_results
from equivariant_ssl.study.contrasts import Contrast
from equivariant_ssl.study.design import Arm, factorial
from equivariant_ssl.study.effect_sentences import (
  advice,
  in_todays_words,
  sentence,
  verdict,
)
from equivariant_ssl.study.effects import Effect, factorial_effects
from equivariant_ssl.types import ROLES

AS_INVARIANCE = 'as an invariance: with - without'
IN_EQUIVARIANCE = 'in the equivariance: with - without'
INTERACTION = 'rotate as an invariance x blur in the equivariance'
OLD = {AS_INVARIANCE: 'seen - unseen', IN_EQUIVARIANCE: 'told - untold',
       INTERACTION: 'rotate.seen x blur.told'}


def effect(contrast, mean=.05, half=.02, **fields):
  return Effect('rotate', contrast, 'knn', mean, mean - half, mean + half, 3, .04, **fields)


def test_a_factorial_names_its_contrasts():
  pairs = (('rotate.seen', 'blur.told'),)
  arms = [Arm(str(i), roles)
          for i, roles in enumerate(factorial(('rotate', 'blur'), ROLES, pairs))]
  values = [(arm.name, seed, .1 * seed + .01 * (arm.roles['rotate'] == 'both'))
            for arm in arms for seed in (0, 1)]
  names = [effect.contrast for effect in factorial_effects(arms, ROLES, pairs, values, 'knn')]
  assert names == [*2 * [AS_INVARIANCE, IN_EQUIVARIANCE, 'sensitive - invariant'], INTERACTION]


@pytest.mark.parametrize('name, parts', [
    (AS_INVARIANCE, ('as an invariance', 'with', 'without', '')),
    (f'{IN_EQUIVARIANCE} (essl)', ('in the equivariance', 'with', 'without', 'essl')),
    ('sensitive - invariant', ('', 'sensitive', 'invariant', '')),
    ('invariant - off (equimod)', ('', 'invariant', 'off', 'equimod')),
    (INTERACTION, ('', INTERACTION, '', '')),
    (f'{INTERACTION} (essl)', ('', INTERACTION, '', 'essl'))])
def test_a_name_has_parts(name, parts):
  assert contrasts.parse(name) == Contrast(*parts)


@pytest.mark.parametrize('contrast, mean, words', [
    (AS_INVARIANCE, .05, 'rotate as an invariance: with beats without by 5.0 ± 2.0 points'),
    (AS_INVARIANCE, -.05, 'rotate as an invariance: without beats with by 5.0 ± 2.0 points'),
    (f'{IN_EQUIVARIANCE} (essl)', .01, 'rotate in the equivariance (essl): no difference seen '
     'between with and without; the smallest difference that this study could have seen is 4.0'),
    ('sensitive - invariant (essl)', .05, 'rotate (essl): sensitive beats invariant by 5.0'),
    (INTERACTION, .05, f'rotate: the interaction {INTERACTION} is +5.0 [3.0, 7.0] points')])
def test_sentences_use_the_words(contrast, mean, words):
  assert sentence(effect(contrast, mean)).startswith(words)


def test_the_verdict_is_on_invariances():
  line, = verdict([effect(f'{AS_INVARIANCE} (essl)'), effect(IN_EQUIVARIANCE, -.05)])
  assert line.endswith('add to kNN accuracy on test: rotate (essl) (+5.0 [3.0, 7.0])')


def test_the_advice_is_a_line_for_each_augmentation():
  effects = [effect('sensitive - invariant', .04), effect(f'{AS_INVARIANCE} (essl)'), effect('both - invariant', .3),
             effect('invariant - off', .01)._replace(aug='blur'), effect('sensitive - off')._replace(aug='blur', low=None),
             effect('invariant - off', -.05)._replace(aug='gray'), effect('invariant - off')._replace(aug='crop', low=None),
             effect('invariant - off', .3)._replace(readout='linear')]
  assert advice(effects) == [
    'rotate: better as an invariance than not (essl), kNN +5.0 [3.0, 7.0]; better sensitive than invariant, kNN +4.0 [2.0, 6.0]',
    'blur: no difference seen, kNN +1.0 [-1.0, 3.0]', 'gray: worse as an invariance than off, kNN -5.0 [-7.0, -3.0]']
  assert advice([]) == []


@pytest.mark.parametrize('label', ['', ' (essl)'])
def test_old_names_are_read(label):
  for new, old in OLD.items():
    assert contrasts.in_todays_words(old + label) == new + label
    assert contrasts.in_todays_words(new + label) == new + label
  for same in ('sensitive - invariant', 'invariant - off', 'both - invariant'):
    assert contrasts.in_todays_words(same + label) == same + label


def old_results(folder):
  """A study's folder whose results.json an older version wrote; the effects that it has."""
  effects = [effect(new, p=.01, split='validation', holm=.03,
                    mixed=(INTERACTION,) if new == INTERACTION else ()) for new in OLD]
  reports.study(folder)
  old = [{**e._asdict(), 'contrast': OLD[e.contrast], 'mixed': [OLD[name] for name in e.mixed],
          'sentence': 'rotate: seen beats unseen, told beats untold'} for e in effects]
  path = folder / 'results.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | {'effects': old}))
  return effects


def test_an_older_study_is_reported_in_todays_words(tmp_path):
  effects = old_results(tmp_path / 'study')
  stored = (tmp_path / 'study' / 'results.json').read_bytes()
  parsed = reports.Parsed(report([tmp_path / 'study'], images=False).read_text())
  assert [row[1] for row in parsed.table('Effects')[1:]] == list(OLD)
  for e in effects:
    assert sentence(e) in parsed.text
  assert 'rotate as an invariance, with - without: +5.0 [3.0, 7.0].' in parsed.text
  assert f'{INTERACTION}, interaction: +5.0 [3.0, 7.0].' in parsed.text
  for word in ('unseen', 'untold', '.seen', '.told'):
    assert word not in parsed.text
  assert (tmp_path / 'study' / 'results.json').read_bytes() == stored  # a report only reads


def test_todays_results_are_read_unchanged():
  results = {'effects': [effect(name)._asdict() | {'sentence': 'as it was'} for name in OLD]}
  assert in_todays_words(results) == results


def test_an_older_study_goes_on_and_its_files_are_written_in_todays_words(tmp_path):
  """Its plan has the factors' words of the command line, which stay."""
  plan = study_plan.make_plan(study_plan.Settings(
      'digits_study', ('rotate', 'blur'), {}, seeds=(0,), design='factorial',
      interactions=(('rotate.seen', 'blur.told'),)), 'eqssl study', {})
  study_plan.write(tmp_path, plan)
  for i, run in enumerate(study_plan.runs(plan)):
    (tmp_path / run.workdir).mkdir(parents=True)
    found = {'readouts': {'knn': .5 + .01 * (i % 7)}, 'seconds': 1.}
    (tmp_path / run.workdir / 'found.json').write_text(json.dumps(found))
  results = study_results.results(tmp_path, plan, {})
  old = {e['contrast']: OLD.get(e['contrast'], e['contrast']) for e in results['effects']}
  (tmp_path / 'results.json').write_text(json.dumps({**results, 'effects': [
      {**e, 'contrast': old[e['contrast']]} for e in results['effects']]}))
  assert cli.main(['study', '--resume', str(tmp_path), '--collect']) == 0
  written = json.loads((tmp_path / 'results.json').read_text())['effects']
  assert [e['contrast'] for e in written] == [e['contrast'] for e in results['effects']]
  rows = list(csv.reader((tmp_path / 'table.csv').read_text().splitlines()))
  start = next(i for i, row in enumerate(rows) if row[:1] == ['augmentation'])
  assert [row[1] for row in rows[start + 1:]] == [e['contrast'] for e in written]
  assert {AS_INVARIANCE, IN_EQUIVARIANCE, INTERACTION} <= {e['contrast'] for e in written}

"""The arm that a study recommends, and what the test split says of that arm alone."""
import itertools
from typing import Any

import numpy as np

from equivariant_ssl.evaluate.statistics import CONFIDENCE, mean_std, quantity
from equivariant_ssl.study.effect_sentences import readout_phrase, seed_count
from equivariant_ssl.study.effects import Values
from equivariant_ssl.study.least_squares import estimate, fit, holm, seed_columns

MOST_NAMED = 6  # arms that a sentence names as indistinguishable from the recommended one


def indistinguishable_arms(best: str, values: Values) -> list[str]:
  """Return the arms whose difference from the arm `best` could be chance.

  The p-values are Holm-corrected for all pairs of arms, because which arm is the best is known
  from the same values. values: every arm with every seed.
  """
  names = list(dict.fromkeys(arm for arm, *_ in values))
  columns = np.array([[float(arm == name) for name in names] for arm, *_ in values])
  design = np.concatenate([columns, seed_columns([seed for _, seed, _ in values])], axis=1)
  fitted = fit(design, np.array([value for *_, value in values]))
  pairs = list(itertools.combinations(range(len(names)), 2))
  unit = np.eye(len(fitted.coefficients))
  estimates = [estimate(fitted, unit[i] - unit[j], 1) for i, j in pairs]
  p = [estimated.p for estimated in estimates if estimated.p is not None]
  if len(p) < len(pairs):
    return [name for name in names if name != best]
  index = names.index(best)
  corrected = {i + j - index: q for (i, j), q in zip(pairs, holm(p), strict=True)
               if index in (i, j)}
  return [names[i] for i in sorted(corrected) if corrected[i] > 1 - CONFIDENCE]


def recommended_arm(runs: dict[str, dict], readout: str, split: str) -> dict[str, Any]:
  """Return the recommended arm with its numbers, as results.json holds them.

  It is the arm with the highest mean `readout` on `split` among those with every seed done; of
  equal arms, the first. {} while a run waits, or where no arm has every seed. runs: the runs
  of results.json.
  """
  full = [run for run in runs.values() if run['share'] == 1]
  if any(run['status'] == 'waiting' for run in runs.values()):
    return {}
  arms = dict.fromkeys(run['arm'] for run in full)
  incomplete = {run['arm'] for run in full if readout not in run.get('readouts', ())}
  left_out = [arm for arm in arms if arm in incomplete]
  values = [(run['arm'], run['seed'], run['readouts'][readout]) for run in full
            if run['arm'] not in incomplete]
  if not values:
    return {}
  means = {arm: mean_std([value for other, _, value in values if other == arm])
           for arm in arms if arm not in incomplete}
  best = max(means, key=lambda arm: means[arm][0])
  return {'arm': best, 'readout': readout, 'split': split, 'mean': means[best][0],
          'std': means[best][1], 'n': len(values) // len(means), 'arms': len(means),
          'close': indistinguishable_arms(best, values), 'left_out': left_out}


def rows_on_test(runs: dict[str, dict]) -> list[dict[str, Any]]:
  """Return the rows of the arms that were read out on the test split, like the table's rows."""
  values: dict[tuple[str, str], list[float]] = {}
  for run in runs.values():
    for name, value in (run.get('test') or {}).items():
      values.setdefault((run['arm'], name), []).append(value)
  rows = []
  for (arm, name), over_seeds in values.items():
    mean, std = mean_std(over_seeds)
    rows.append({'arm': arm, 'readout': name, 'split': 'test', 'n': len(over_seeds), 'mean': mean,
                 'std': std})
  return rows


def unread_runs(results: dict[str, Any]) -> list[str]:
  """Return the names of the recommended arm's runs that are not read out on the test split yet.

  [] where the arm was recommended on the test split itself.
  """
  chosen = results['recommended']
  if not chosen or chosen['split'] != 'validation':
    return []
  return [name for name, run in results['runs'].items()
          if run['arm'] == chosen['arm'] and run['share'] == 1 and 'test' not in run]


def _percent(mean: float, std: float | None) -> str:
  return f'{100 * mean:.1f}' + (f' ± {100 * std:.1f}' if std is not None else '') + ' %'


def _test_sentences(results: dict[str, Any], resume: str) -> list[str]:
  """Return what the test split says. resume: the command that reads out what is missing."""
  chosen, rows = results['recommended'], results['test']
  if chosen['split'] == 'test':
    return ['It was chosen on the test split itself, so its accuracy there tends to be higher '
            'than on new images; a study with --readout validation chooses on images that it '
            'holds out of training.']
  arm_rows = [row for row in rows if row['arm'] == chosen['arm']]
  sentences = []
  if arm_rows:
    numbers = (f'{_percent(row["mean"], row["std"])} {readout_phrase(row["readout"])}'
               for row in arm_rows)
    sentences.append('On the test split, which chose nothing and is read for this arm alone, '
                     f'{chosen["arm"]} has {", ".join(numbers)} ({seed_count(arm_rows[0]["n"])}).')
  if waiting := unread_runs(results):
    sentences.append(f'{seed_count(len(waiting))} of {chosen["arm"]} '
                     f'{"is" if len(waiting) == 1 else "are"} not read out on the test split yet: '
                     f'{resume}')
  elif not arm_rows:
    sentences.append('There are no labeled test images to read it out on.')
  if earlier := list(dict.fromkeys(row['arm'] for row in rows if row['arm'] != chosen['arm'])):
    verb = 'was' if len(earlier) == 1 else 'were'
    sentences.append(f'The test split was read for {", ".join(earlier)} too, which {verb} '
                     'recommended when fewer seeds were done.')
  return sentences


def recommendation(results: dict[str, Any], resume: str) -> list[str]:
  """Return the recommendation in words, then what the test split says of the recommended arm.

  results: the content of results.json. resume: the command that goes on with the study.
  """
  chosen = results['recommended']
  if not chosen:
    waiting = sum(run['status'] == 'waiting' for run in results['runs'].values())
    verb = 'waits' if waiting == 1 else 'wait'
    return [f'No arm is recommended before every run is over: {waiting} of '
            f'{len(results["runs"])} {verb}.' if waiting else
            'No arm is recommended, because none has an accuracy for every seed.']
  close = chosen['close']
  more = f' and {len(close) - MOST_NAMED} more' if len(close) > MOST_NAMED else ''
  pairs = quantity(chosen['arms'] * (chosen['arms'] - 1) // 2, 'pair')
  why = f'Holm, {pairs}' if chosen['n'] > 1 else 'one seed measures no noise'
  sentences = [f'Recommended: {chosen["arm"]}, of {chosen["arms"]} arms the one with the highest '
               f'mean {readout_phrase(chosen["readout"])} on {chosen["split"]}, '
               f'{_percent(chosen["mean"], chosen["std"])} ({seed_count(chosen["n"])}).']
  if close:
    sentences.append(f'Not distinguishable from it ({why}): {", ".join(close[:MOST_NAMED])}{more}.')
  elif chosen['arms'] > 1:
    sentences.append(f'It is distinguishable from every other arm ({why}).')
  else:
    sentences.append('It is the only arm.')
  if chosen['left_out']:
    sentences.append(f'Left out, because a seed is missing: {", ".join(chosen["left_out"])}.')
  return [' '.join(sentences), *_test_sentences(results, resume)]

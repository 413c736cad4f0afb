"""What the runs of a study have found so far: results.json and table.csv."""
import csv
import io
import pathlib
import shlex
from typing import Any

from equivariant_ssl.evaluate.statistics import mean_std
from equivariant_ssl.study.design import Arm
from equivariant_ssl.study.effect_sentences import caution, complete, verdict
from equivariant_ssl.study.effects import (
  Effect,
  Values,
  factorial_effects,
  one_at_a_time_effects,
)
from equivariant_ssl.study.proxies import Proxy, compare_budgets, expected_repeat
from equivariant_ssl.study.recommend import recommendation, recommended_arm, rows_on_test
from equivariant_ssl.study.study_plan import read_part, runs
from equivariant_ssl.training.step_log import COLLAPSED


def _run_entries(folder: pathlib.Path, plan: dict[str, Any], outcomes: dict[str, dict],
                 failed: dict[str, str]) -> dict[str, dict[str, Any]]:
  """Return the entry of each run in results.json, {run's name: entry}.

  outcomes: {run's name: the content of its found.json, {} where there is none}.
  """
  arms = {arm['name']: arm for arm in plan['made']}
  entries = {}
  for run in runs(plan):
    outcome, arm = outcomes[run.name], arms[run.arm]
    # A job of an array knows why another one failed from its folder alone.
    error = failed.get(run.name) or read_part(folder / run.workdir, 'failed').get('error', '')
    status = 'done' if outcome else 'failed' if error else 'waiting'
    entry = {**run._asdict(), 'roles': arm['roles'], 'objective': arm['objective'],
             'status': status, 'error': '' if outcome else error,
             **{key: v for key, v in outcome.items() if key not in ('untrained', 'chance')}}
    if on_test := read_part(folder / run.workdir, 'test'):
      entry['test'] = on_test['readouts']
    entries[run.name] = entry
  return entries


def _references(plan: dict[str, Any], outcomes: dict[str, dict]) -> tuple[dict, dict]:
  """Return the read-outs of the untrained network, a mean over seeds, and those of chance."""
  untrained, chance = [], {}
  for run in runs(plan):
    outcome = outcomes[run.name]
    chance |= outcome.get('chance', {})
    if outcome.get('untrained') and run.share == 1:
      untrained.append(outcome['untrained'])
  names = untrained[0] if untrained else ()
  return {name: mean_std([values[name] for values in untrained])[0] for name in names}, chance


def _collapsed(entries: dict[str, dict]) -> list[str]:
  """Return a sentence that names the runs whose embeddings collapsed; [] where none did."""
  collapsed = [f'{entry["name"]} ({entry["spread"]:.2f})' for entry in entries.values()
               if entry.get('spread') is not None and entry['spread'] < COLLAPSED]
  if not collapsed:
    return []
  return [f'Collapsed (embeddings under {COLLAPSED} of a full sphere\'s spread): '
          f'{", ".join(collapsed)}; such runs widen every interval here.']


def results(folder: pathlib.Path, plan: dict[str, Any], failed: dict[str, str]) -> dict[str, Any]:
  """Return what the runs have found so far, the effects and the proxies: results.json.

  failed: {run's name: why it failed}.
  """
  outcomes = {run.name: read_part(folder / run.workdir) for run in runs(plan)}
  entries = _run_entries(folder, plan, outcomes, failed)
  untrained, chance = _references(plan, outcomes)
  names = list(dict.fromkeys(name for entry in entries.values()
                             for name in entry.get('readouts', ())))

  def values(readout: str, share: float) -> Values:
    return [(entry['arm'], entry['seed'], entry['readouts'][readout]) for entry in entries.values()
            if entry['status'] == 'done' and entry['share'] == share
            and readout in entry['readouts']]
  rows = []
  for name in names:
    for arm in (entry['name'] for entry in plan['made']):
      over_seeds = [value for other, _, value in values(name, 1.) if other == arm]
      if over_seeds:
        mean, std = mean_std(over_seeds)
        rows.append({'arm': arm, 'readout': name, 'split': plan['readout'], 'n': len(over_seeds),
                     'mean': mean, 'std': std})
  effects = complete([effect for name in names
                      for effect in study_effects(plan, values(name, 1.), name)])
  by_readout = {name: [effect for effect in effects if effect.readout == name] for name in names}
  lines = [line for name in names for line in verdict(by_readout[name])]
  lines += caution(effects) + _collapsed(entries)
  proxies = [_proxy(plan, share, name, values(name, share), values(name, 1.), by_readout[name])
             for share in plan['proxies'] for name in names]
  recommended = recommended_arm(entries, names[0], plan['readout']) if names else {}
  content = {'readout': plan['readout'], 'runs': entries, 'test': rows_on_test(entries),
             'recommended': recommended}
  resume = f'eqssl study --resume {shlex.quote(str(folder))}'
  return {**content, 'recommendation': recommendation(content, resume), 'verdict': lines,
          'untrained': untrained, 'chance': chance, 'table': rows,
          'effects': [effect._asdict() for effect in effects],
          'proxies': [proxy._asdict() for proxy in proxies if proxy]}


def study_effects(plan: dict[str, Any], values: Values, readout: str) -> list[Effect]:
  """Return the effects of a study on a read-out."""
  arms = [Arm(arm['name'], arm['roles'], arm['objective']) for arm in plan['made']]
  if plan['design'] == 'factorial':
    pairs = tuple((first, second) for first, second in plan['interactions'])
    effects = factorial_effects(arms, tuple(plan['arms']), pairs, values, readout)
  else:
    effects = one_at_a_time_effects(arms, values, readout)
  return [effect._replace(split=plan['readout']) for effect in effects]


def _proxy(plan: dict, share: float, readout: str, short: Values, full: Values,
           full_effects: list[Effect]) -> Proxy | None:
  def means(values: Values) -> dict[str, float]:
    return {arm: mean_std([value for other, _, value in values if other == arm])[0]
            for arm, *_ in values}
  return compare_budgets(share, readout, means(short), means(full),
                         study_effects(plan, short, readout), full_effects, expected_repeat(full))


def table(content: dict[str, Any]) -> str:
  """Return the study as CSV; it has nothing that a clock measured.

  A line for each arm and read-out has the images, n, mean, standard deviation and every seed; the
  last of these lines are the recommended arm's on the test split. Then come the effects.
  """
  text = io.StringIO()
  done = [run for run in content['runs'].values()
          if run['status'] == 'done' and run['share'] == 1]
  seeds = sorted({run['seed'] for run in done})
  writer = csv.writer(text, lineterminator='\n')
  columns = ('arm', 'readout', 'split', 'n', 'mean', 'std')
  writer.writerow([*columns, *(f'seed {seed}' for seed in seeds)])
  for key, rows in (('readouts', content['table']), ('test', content['test'])):
    for row in rows:
      by_seed = {run['seed']: run.get(key, {}).get(row['readout'], '')
                 for run in done if run['arm'] == row['arm']}
      writer.writerow([*(row[column] for column in columns),
                       *(by_seed.get(seed, '') for seed in seeds)])
  writer.writerow([])
  fields = 'aug', 'contrast', 'readout', 'split', 'mean', 'low', 'high', 'holm', 'n', 'smallest'
  heads = {'aug': 'augmentation', 'mean': 'difference', 'holm': 'Holm p'}
  writer.writerow([heads.get(field, field) for field in fields])
  for effect in content['effects']:
    writer.writerow([effect[field] for field in fields])
  return text.getvalue()

"""The arm that a study recommends, by what it is read out on, and what the test split says of that arm alone."""
import itertools
from typing import Any

import numpy as np

from equivariant_ssl.evaluate.statistics import CONFIDENCE, counted, mean_std
from equivariant_ssl.study import effects

NAMED = 6  # arms that are not told apart from the recommended one


def close(best: str, values: list[tuple[str, int, float]]) -> list[str]:
  """The arms whose difference from `best` could be chance: after Holm's correction for all pairs of arms, since which is
  the best is known from the same values. values: (arm, seed, value), every arm with every seed."""
  names = list(dict.fromkeys(arm for arm, *_ in values))
  columns = np.array([[float(arm == n) for n in names] for arm, *_ in values])
  found = effects.fit(np.concatenate([columns, effects.by_seed([s for _, s, _ in values])], axis=1),
                      np.array([v for *_, v in values]))
  pairs = list(itertools.combinations(range(len(names)), 2))
  unit = np.eye(len(found.coefficients))
  p = [effects.contrast(found, unit[i] - unit[j], 1)[-1] for i, j in pairs]
  if None in p:
    return [n for n in names if n != best]
  at = names.index(best)
  own = {i + j - at: q for (i, j), q in zip(pairs, effects.holm(p), strict=True) if at in (i, j)}
  return [names[i] for i in sorted(own) if own[i] > 1 - CONFIDENCE]


def recommended(runs: dict[str, dict], readout: str, split: str) -> dict[str, Any]:
  """{arm, ...}: of the arms with every seed done, the one of the highest mean `readout` on `split`, of equal ones the
  first; {} while a run waits or where there is none. runs: of results.json."""
  full = [r for r in runs.values() if r['share'] == 1]
  if any(r['status'] == 'waiting' for r in runs.values()):
    return {}
  arms = dict.fromkeys(r['arm'] for r in full)
  out = [a for a in arms if any(readout not in r.get('readouts', ()) for r in full if r['arm'] == a)]
  values = [(r['arm'], r['seed'], r['readouts'][readout]) for r in full if r['arm'] not in out]
  if not values:
    return {}
  of = {a: mean_std([v for arm, _, v in values if arm == a]) for a in arms if a not in out}
  best = max(of, key=lambda a: of[a][0])
  return {'arm': best, 'readout': readout, 'split': split, 'mean': of[best][0], 'std': of[best][1],
          'n': len(values) // len(of), 'arms': len(of), 'close': close(best, values), 'left_out': out}


def tested(runs: dict[str, dict]) -> list[dict[str, Any]]:
  """The rows of the arms whose runs were read out on the test split, as those of the table."""
  out: dict[tuple[str, str], list[float]] = {}
  for run in runs.values():
    for name, value in (run.get('test') or {}).items():
      out.setdefault((run['arm'], name), []).append(value)
  return [{'arm': arm, 'readout': name, 'split': 'test', 'n': len(values),
           **dict(zip(('mean', 'std'), mean_std(values), strict=True))} for (arm, name), values in out.items()]


def untested(found: dict[str, Any]) -> list[str]:
  """The runs of the arm that was recommended on validation images that are still to be read out on the test split."""
  chosen = found['recommended']
  return [name for name, r in found['runs'].items() if chosen and chosen['split'] == 'validation'
          and r['arm'] == chosen['arm'] and r['share'] == 1 and 'test' not in r]


def _percent(mean: float, std: float | None) -> str:
  return f'{100 * mean:.1f}' + (f' ± {100 * std:.1f}' if std is not None else '') + ' %'


def _on_test(found: dict[str, Any], more: str) -> list[str]:
  """What is said of the test split. more: what to type for what is missing."""
  chosen, rows = found['recommended'], found['test']
  if chosen['split'] == 'test':
    return ['It was chosen on the test split itself, so its accuracy there says more than new images would; a study with '
            '--readout validation chooses on images that it holds out of training.']
  own = [r for r in rows if r['arm'] == chosen['arm']]
  said = [f'On the test split, which chose nothing and is read for this arm alone, {chosen["arm"]} has ' + ', '.join(
      f'{_percent(r["mean"], r["std"])} {effects.points(r["readout"])}' for r in own)
      + f' ({effects.seeds(own[0]["n"])}).'] if own else []
  if waiting := untested(found):
    said.append(f'{effects.seeds(len(waiting))} of {chosen["arm"]} not read out on the test split yet: {more}')
  elif not own:
    said.append('There are no labelled test images to read it out on.')
  if earlier := list(dict.fromkeys(r['arm'] for r in rows if r['arm'] != chosen['arm'])):
    said.append(f'The test split was read for {", ".join(earlier)} too, recommended when fewer seeds were done.')
  return said


def sentences(found: dict[str, Any], more: str) -> list[str]:
  """The recommendation in words, then what the test split says of it."""
  chosen, waiting = found['recommended'], sum(r['status'] == 'waiting' for r in found['runs'].values())
  if not chosen:
    return [f'No arm is recommended before every run is over: {waiting} of {len(found["runs"])} wait.' if waiting else
            'No arm is recommended: none has an accuracy for every seed.']
  near = chosen['close']
  rest = f' and {len(near) - NAMED} more' if len(near) > NAMED else ''
  pairs = counted(chosen['arms'] * (chosen['arms'] - 1) // 2, 'pair')
  why = f'Holm, {pairs}' if chosen['n'] > 1 else 'one seed measures no noise'
  left = f' Left out, for want of a seed: {", ".join(chosen["left_out"])}.' if chosen['left_out'] else ''
  return [f'Recommended: {chosen["arm"]}, of {chosen["arms"]} arms the one with the highest mean '
          f'{effects.points(chosen["readout"])} on {chosen["split"]}, {_percent(chosen["mean"], chosen["std"])} '
          f'({effects.seeds(chosen["n"])}). '
          + (f'Not told apart from it ({why}): {", ".join(near[:NAMED])}{rest}.' if near else
             f'It is told apart from every other arm ({why}).' if chosen['arms'] > 1 else 'It is the only one.') + left,
          *_on_test(found, more)]

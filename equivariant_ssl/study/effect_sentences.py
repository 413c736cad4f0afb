"""The effects of a study in words."""
from typing import Any

from equivariant_ssl.evaluate.statistics import CONFIDENCE
from equivariant_ssl.study import contrasts
from equivariant_ssl.study.effects import Effect
from equivariant_ssl.study.least_squares import holm

READOUT_PHRASES = {'linear': 'linear accuracy', 'knn': 'kNN accuracy',
                   'few': 'accuracy on five labels a class'}
READOUT_NAMES = {'linear': 'linear', 'knn': 'kNN', 'few': 'five labels'}
# What is said of an augmentation where a contrast is above zero, and where it is below. These are
# comparisons: a line joins two of them, and two commands could contradict each other. The first
# contrasts matter most.
ADVICE = {
    'invariant - off': ('better as an invariance than off', 'worse as an invariance than off'),
    contrasts.AS_INVARIANCE: ('better as an invariance than not',
                              'worse as an invariance than not'),
    'sensitive - invariant': ('better sensitive than invariant', 'better invariant than sensitive'),
    contrasts.IN_EQUIVARIANCE: ('better in the equivariance than not',
                                'worse in the equivariance than not'),
    'sensitive - off': ('better sensitive than off', 'worse sensitive than off'),
    'both - invariant': ('better in the equivariance too than as an invariance alone',
                         'better as an invariance alone than in the equivariance too')}
# The contrasts that say what an augmentation does as an invariance.
INVARIANCE_CONTRASTS = ('invariant - off', contrasts.AS_INVARIANCE)


def complete(effects: list[Effect]) -> list[Effect]:
  """Return all effects of a study with their Holm-corrected p-values and their sentences."""
  corrected = iter(holm([effect.p for effect in effects if effect.p is not None]))
  effects = [effect._replace(holm=None if effect.p is None else next(corrected))
             for effect in effects]
  return [effect._replace(sentence=sentence(effect)) for effect in effects]


def seed_count(n: int) -> str:
  """Return a number of seeds in words: '1 seed', '3 seeds'."""
  return f'{n} seed{"s" if n > 1 else ""}'


def readout_phrase(readout: str) -> str:
  """Return the words for what a read-out measures."""
  return READOUT_PHRASES.get(readout, readout)


def holm_phrase(p: float | None) -> str:
  """Return a corrected p-value in words, to follow other words in brackets; '' for None."""
  return '' if p is None else f', Holm p {f"= {p:.2g}" if p >= .001 else "< .001"}'


def percent_interval(effect: Effect) -> str:
  """Return the interval of an effect in percentage points: '[1.0, 3.0]'; '' where it has none."""
  if effect.low is None or effect.high is None:
    return ''
  return f'[{100 * effect.low:.1f}, {100 * effect.high:.1f}]'


def sentence(effect: Effect) -> str:
  """Return an effect in words: what is better and by how much, or what could have been seen."""
  setting, first, second, objective = contrasts.parse(effect.contrast)
  subject = ' '.join(filter(None, (effect.aug, setting, objective and f'({objective})')))
  points = f'points of {readout_phrase(effect.readout)} on {effect.split}'
  seeds = seed_count(effect.n)
  noise = f'{seeds}{holm_phrase(effect.holm)}'
  if not second:
    interval = f' {percent_interval(effect)}'.rstrip()
    mixed = (f'; this design cannot tell it from the interaction {", or ".join(effect.mixed)}'
             if effect.mixed else '')
    return (f'{subject}: the interaction {first} is {100 * effect.mean:+.1f}{interval} {points} '
            f'({noise}){mixed}')
  if effect.low is None or effect.high is None:
    return (f'{subject}: {first} and {second} differ by {100 * effect.mean:+.1f} {points} '
            f'({seeds}: no interval)')
  if not effect.excludes_zero:
    smallest = (f'; the smallest difference that this study could have seen is '
                f'{100 * effect.smallest:.1f} {points}' if effect.smallest is not None else '')
    return f'{subject}: no difference seen between {first} and {second}{smallest} ({noise})'
  if effect.mean < 0:
    first, second = second, first
  half = 50 * (effect.high - effect.low)
  return (f'{subject}: {first} beats {second} by {100 * abs(effect.mean):.1f} ± {half:.1f} '
          f'{points} ({noise})')


def verdict(effects: list[Effect]) -> list[str]:
  """Return what augmentations do as invariances: a line of those that cost, help, and neither.

  effects: the effects on one read-out. In a line, the augmentation that costs most comes first.
  """
  def words(effect: Effect) -> str:
    objective = contrasts.parse(effect.contrast).objective
    return (effect.aug + (f' ({objective})' if objective else '')
            + f' ({100 * effect.mean:+.1f} {percent_interval(effect)}{holm_phrase(effect.holm)})')
  invariances = sorted((effect for effect in effects if effect.low is not None and
                        effect.contrast.partition(' (')[0] in INVARIANCE_CONTRASTS),
                       key=lambda effect: effect.mean)
  costly = [effect for effect in invariances if effect.excludes_zero and effect.mean < 0]
  helpful = [effect for effect in invariances if effect.excludes_zero and effect.mean > 0]
  neutral = [effect for effect in invariances if not effect.excludes_zero]
  lines = (('Should not be invariances, because as such they cost', costly),
           ('Useful as invariances, because as such they add to', helpful),
           ('No difference seen, as invariances, to', neutral))
  return [f'{start} {readout_phrase(group[0].readout)} on {group[0].split}: '
          f'{", ".join(map(words, group))}' for start, group in lines if group]


def _advice(effect: Effect) -> str:
  """Return what an effect says if its interval excludes zero, or that no difference was seen."""
  setting, first, second, objective = contrasts.parse(effect.contrast)
  words = ADVICE[f'{setting}: {first} - {second}' if setting else f'{first} - {second}']
  what = words[effect.mean < 0] if effect.excludes_zero else 'no difference seen'
  return (what + (f' ({objective})' if objective else '')
          + f', {READOUT_NAMES.get(effect.readout, effect.readout)} {100 * effect.mean:+.1f} '
          + percent_interval(effect))


def advice(effects: list[Effect]) -> list[str]:
  """Return a line for each augmentation: where it is better, by the study's first read-out.

  It names at most two contrasts whose intervals exclude zero; else one in which no difference was
  seen. An augmentation without an interval has no line.
  """
  lines = []
  for aug in dict.fromkeys(effect.aug for effect in effects):
    usable = [effect for effect in effects
              if effect.aug == aug and effect.readout == effects[0].readout
              and effect.low is not None and effect.contrast.partition(' (')[0] in ADVICE]
    usable.sort(key=lambda effect: list(ADVICE).index(effect.contrast.partition(' (')[0]))
    clear = [effect for effect in usable if effect.excludes_zero][:2]
    if usable:
      lines.append(f'{aug}: {"; ".join(map(_advice, clear or usable[:1]))}')
  return lines


def caution(effects: list[Effect]) -> list[str]:
  """Return how many intervals exclude zero, how many would by chance, and how many are clear.

  A contrast is clear where its p-value is small after Holm's correction. [] without intervals.
  """
  intervals = [effect for effect in effects if effect.low is not None]
  if not intervals:
    return []
  excluding = sum(effect.excludes_zero for effect in intervals)
  clear = sum(effect.holm is not None and effect.holm <= 1 - CONFIDENCE for effect in intervals)
  chance = (1 - CONFIDENCE) * len(intervals)
  return [f'{excluding} of {len(intervals)} intervals of 95 % exclude zero; if nothing mattered, '
          f'about {chance:.0f} would. After Holm\'s correction for all {len(intervals)}, '
          f'{clear} are clear.']


def in_todays_words(results: dict[str, Any]) -> dict[str, Any]:
  """Return the content of results.json with the contrasts' names that this version gives.

  An older version named them 'seen - unseen' and 'told - untold', and wrote sentences with these
  words.
  """
  return results | {'effects': [_renamed(effect) for effect in results.get('effects', ())]}


def effect_of(values: dict[str, Any]) -> Effect:
  """Return an effect of results.json, which an older version may have written."""
  fields: dict[str, Any] = {'smallest': None}
  return Effect(**fields | {key: value for key, value in values.items() if key in Effect._fields})


def _renamed(effect: dict[str, Any]) -> dict[str, Any]:
  contrast = contrasts.in_todays_words(effect['contrast'])
  if contrast == effect['contrast']:
    return effect
  effect = effect | {'contrast': contrast}
  if 'mixed' in effect:
    effect['mixed'] = [contrasts.in_todays_words(name) for name in effect['mixed']]
  return effect | {'sentence': sentence(effect_of(effect))}

"""A study on disk: its plan, its runs in the order in which they tell most, and what they have found so far."""
import csv
import io
import json
import math
import pathlib
import shlex
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from equivariant_ssl import augment
from equivariant_ssl import config as configs
from equivariant_ssl.data import holdout
from equivariant_ssl.errors import BAD_DATA, OTHER_CONFIG, UserError
from equivariant_ssl.evaluate import transfer
from equivariant_ssl.evaluate.evaluation import chosen
from equivariant_ssl.evaluate.statistics import mean_std
from equivariant_ssl.parallel import sharding
from equivariant_ssl.registry import unknown_name
from equivariant_ssl.storage import record
from equivariant_ssl.study import design, effects, recommend
from equivariant_ssl.training import runs as prepared
from equivariant_ssl.training.loop import COLLAPSED
from equivariant_ssl.types import ROLES, Image

READOUTS = {'linear': 'cached', 'knn': 'knn', 'few': 'few_labels'}  # read-out: the protocol whose top1 it is
PROTOCOLS = (*READOUTS.values(), 'profile', 'gains')  # of every run; more where they are asked for
FREE = ('command', 'environment', 'seeds', 'proxies')  # what a second command in the same folder may change


class Settings(NamedTuple):
  """What `eqssl study` was asked; see its --help. budget: epochs, 0: the config's. proxies: shares of it. protocols: of the
  evaluation, beside PROTOCOLS. readout: the images that arms are compared on, of holdout.READOUTS."""
  config: str
  augs: tuple[str, ...]
  overrides: dict[str, str]
  arms: tuple[str, ...] = ('off', 'invariant', 'sensitive', 'both')
  objective: tuple[str, ...] = ()
  seeds: tuple[int, ...] = (0, 1, 2)
  design: str = 'one-at-a-time'
  interactions: tuple[tuple[str, str], ...] = ()
  budget: float = 0.
  equal: str = 'images'
  proxies: tuple[float, ...] = ()
  protocols: tuple[str, ...] = ()
  transfer: tuple[str, ...] = ()
  root: str = ''
  readout: str = 'validation'


class Run(NamedTuple):
  """share: of the study's budget. workdir: within the study's folder."""
  name: str
  arm: str
  seed: int
  share: float
  workdir: str


def cost(config: ConfigDict) -> float:
  """Pixels of the views of one image: what the encoder reads in a step, whose compute is nearly in proportion."""
  run = prepared.prepare(config, sharding.mesh(jax.devices()[:1]))
  image = Image(jnp.zeros((1, *run.source.train.images.shape[1:])), jnp.ones((1, 2)))
  shown = jax.eval_shape(lambda key: augment.views(run.recipe.groups, key, image), run.key)
  return float(sum(np.prod(v.images.shape[1:4]) for v in shown.values()))


def make(s: Settings, command: str, environment: dict) -> dict[str, Any]:
  """The plan, as study.json holds it. Raises UserError for a setting that cannot be."""
  if s.equal not in ('images', 'compute'):
    raise UserError(f'--equal {s.equal} is neither.', 'Give images (seen by every arm) or compute.')
  if (not s.seeds or len(set(s.seeds)) < len(s.seeds) or not 0 <= s.budget < math.inf
      or not all(0 < p < 1 for p in s.proxies)):
    listed = lambda values: ','.join(f'{v:g}' for v in values) or 'none'
    raise UserError(f'--seeds {listed(s.seeds)} --budget {s.budget:g} --proxies {listed(s.proxies)}: not what they can be.',
                    'e.g. --seeds 0,1,2 --budget 40 --proxies 1/8,1/4,1/2')
  if not s.augs or len(set(s.augs)) < len(s.augs):
    raise UserError('--augs names no augmentation, or one twice.', 'e.g. --augs rotate,jitter')
  if not s.arms:
    raise UserError('--arms names no role.', f'Give some of {",".join(ROLES)}.')
  if s.readout not in holdout.READOUTS:
    raise unknown_name('--readout', s.readout, holdout.READOUTS)
  chosen(list(s.protocols))
  transfer.check_targets(s.transfer, s.root)
  for found in (transfer.find(name, s.root) for name in s.transfer):
    if isinstance(found, transfer.Missing):
      raise UserError(f'--transfer {found.name}: it is not on disk.', found.command, BAD_DATA)
  loaded = configs.load(s.config, s.overrides)
  if s.readout == 'validation' and not loaded.validation:  # one that has a share of its own keeps it
    loaded = configs.resolve(ConfigDict(configs.as_json(loaded) | {'validation': holdout.HELD_OUT}))
  config = design.base(loaded, s.augs)
  sections = design.objectives(config, s.objective)
  arms = design.make(config, s.augs, s.arms, tuple(sections), s.design, s.interactions)
  usable = design.usable(config, arms, sections)
  made = [{**arm._asdict(), 'config': own} for arm, own, _ in usable]
  if any('action' in predicted for *_, predicted in usable):  # what is for them as gains are for others
    s = s._replace(protocols=tuple(dict.fromkeys([*s.protocols, 'regression'])))
  epochs = s.budget or (config.epochs if not config.steps else 0.)
  if s.equal == 'compute':
    costs = [cost(configs.resolve(ConfigDict(arm['config']))) for arm in made]
    for arm, own in zip(made, costs, strict=True):
      arm['scale'] = costs[0] / own
  plan = s._asdict() | {'epochs': epochs, 'made': made, 'command': command, 'environment': environment}
  return json.loads(json.dumps(plan))


def write(folder: pathlib.Path, plan: dict[str, Any]) -> None:
  """study.json; UserError where the folder holds another study."""
  folder.mkdir(parents=True, exist_ok=True)
  path = folder / 'study.json'
  if (folder / 'config.json').exists():
    raise UserError(f'{folder} holds a run.', 'Give the study a folder of its own, with --out.')
  if path.exists():
    old = read(folder)
    whole = lambda of: of | {'made': [a | {'config': _resolved(a['config'])} for a in of['made']]}
    old, new = whole(old), whole(plan)  # an older version's configs do not have every field
    changed = [k for k in new if k not in FREE and old.get(k) != new[k]]
    if changed:
      asked = [f'--{k}' + (f' ({old[k]})' if k == 'readout' else '') for k in changed if k not in ('made', 'epochs')]
      asked = asked or ['version of a config or of eqssl']
      raise UserError(f'{folder} holds a study with another {", ".join(asked)}.',
                      f'Use another --out; or go on with that one as it was: '
                      f'eqssl study --resume {shlex.quote(str(folder))}', OTHER_CONFIG)
  record.write_whole(path, json.dumps(plan, indent=1) + '\n')


def _resolved(config: dict) -> dict:
  """A config of JSON values with every field; as it is where this version cannot have it."""
  try:
    return configs.as_json(configs.resolve(ConfigDict(config)))
  except UserError:
    return config


def read(folder: pathlib.Path) -> dict[str, Any]:
  """The plan in `folder`; one without a read-out is of a version that knew the test split alone. UserError where it is none,
  or its runs would be elsewhere."""
  try:
    plan = json.loads((folder / 'study.json').read_text(encoding='utf-8'))
  except (OSError, ValueError) as e:
    raise UserError(f'no study in {str(folder)!r}: study.json {"is missing" if isinstance(e, OSError) else "is not JSON"}.',
                    'Start one: eqssl study --config NAME --augs rotate,jitter --out DIR') from None
  fix = 'Restore it from a copy, or do the study again with another --out.'
  try:
    plan = {'readout': 'test'} | plan
    outside = [r.name for r in runs(plan) if '..' in pathlib.PurePath(r.workdir).parts]
  except (KeyError, TypeError, ValueError, AttributeError) as e:
    raise UserError(f'{folder / "study.json"} is not a study: {type(e).__name__}: {e}.', fix) from None
  if outside:
    raise UserError(f'{folder / "study.json"} names a run outside of its folder: {outside[0]!r}.', fix)
  return plan


def runs(plan: dict[str, Any]) -> list[Run]:
  """Every run: the full budget first, seed by seed, so that the first hour has every arm once; then the proxies."""
  found = []
  for share in (1., *plan['proxies']):
    for seed in plan['seeds']:
      for arm in plan['made']:
        name = f'{arm["name"]}/{seed}' + (f'@{share:g}' if share < 1 else '')
        found.append(Run(name, arm['name'], seed, share, f'runs/{name}'))
  return found


def config(plan: dict[str, Any], run: Run) -> ConfigDict:
  """The resolved config of a run: its arm's, with its seed, and the whole schedule squeezed into its budget."""
  arm = next(a for a in plan['made'] if a['name'] == run.arm)
  given = json.loads(json.dumps(arm['config']))
  share = run.share * arm.get('scale', 1.)
  squeeze = share * (plan['budget'] / given['epochs'] if plan['budget'] else 1.)
  if plan['budget']:
    given['steps'] = 0
  asked = given['steps']
  given |= {'seed': run.seed, 'epochs': given['epochs'] * squeeze, 'steps': round(asked * squeeze)}
  given['optimizer']['warmup_epochs'] *= squeeze
  if asked and not given['steps']:  # 0 would mean: as many as the epochs have
    raise _no_step(run, f'{asked} steps')
  return configs.resolve(ConfigDict(given))


def _no_step(run: Run, of: str) -> UserError:
  return UserError(f'run {run.name}: {run.share:g} of its {of} are no whole step to train.',
                   'Give it more: --budget EPOCHS, --config.steps=N, or larger --proxies.')


def check_steps(plan: dict[str, Any], per_epoch: int) -> None:
  """UserError where some run has no step to train, epochs being of `per_epoch` steps."""
  for run in runs(plan):
    found = config(plan, run)
    if not (found.steps or round(found.epochs * per_epoch)):
      raise _no_step(run, f'{plan["epochs"]:g} epochs')


def results(folder: pathlib.Path, plan: dict[str, Any], failed: dict[str, str]) -> dict[str, Any]:
  """What the runs have found so far, the effects and the proxies: results.json. failed: {run: why}."""
  found, untrained, chance = {}, [], {}
  arms = {a['name']: a for a in plan['made']}
  for run in runs(plan):
    kept = _found(folder / run.workdir)
    status = 'done' if kept else 'failed' if run.name in failed else 'waiting'
    found[run.name] = {**run._asdict(), 'roles': arms[run.arm]['roles'], 'objective': arms[run.arm]['objective'],
                       'status': status, 'error': failed.get(run.name, ''),
                       **{k: v for k, v in kept.items() if k not in ('untrained', 'chance')}}
    if on_test := _found(folder / run.workdir, 'test.json'):
      found[run.name]['test'] = on_test['readouts']
    chance |= kept.get('chance', {})
    untrained += [kept['untrained']] if kept.get('untrained') and run.share == 1 else []
  of = lambda name, share: [(r['arm'], r['seed'], r['readouts'][name]) for r in found.values()
                            if r['status'] == 'done' and r['share'] == share and name in r['readouts']]
  names = list(dict.fromkeys(n for r in found.values() for n in r.get('readouts', ())))
  table = [{'arm': arm, 'readout': name, 'split': plan['readout'], 'n': len(values),
            **dict(zip(('mean', 'std'), mean_std(values), strict=True))}
           for name in names for arm in arms if (values := [v for a, _, v in of(name, 1.) if a == arm])]
  every = effects.corrected([e for name in names for e in fitted(plan, of(name, 1.), name)])
  said = {name: [e for e in every if e.readout == name] for name in names}
  before = {n: mean_std([u[n] for u in untrained])[0] for n in (untrained[0] if untrained else ())}
  verdict = [line for name in names for line in effects.verdict(said[name])]
  verdict += effects.caution(every)
  fallen = [f'{r["name"]} ({r["spread"]:.2f})' for r in found.values()
            if r.get('spread') is not None and r['spread'] < COLLAPSED]
  if fallen:
    verdict.append(f'Collapsed (embeddings under {COLLAPSED} of a full sphere\'s spread): {", ".join(fallen)}; such runs '
                   'widen every interval here.')
  out = {'readout': plan['readout'], 'runs': found, 'test': recommend.tested(found),
         'recommended': recommend.recommended(found, names[0], plan['readout']) if names else {}}
  return {**out, 'recommendation': recommend.sentences(out, f'eqssl study --resume {shlex.quote(str(folder))}'),
          'verdict': verdict, 'untrained': before, 'chance': chance, 'table': table,
          'effects': [e._asdict() for e in every],
          'proxies': [p._asdict() for share in plan['proxies'] for name in names
                      if (p := _proxy(plan, share, name, of(name, share), of(name, 1.), said[name]))]}


def fitted(plan: dict[str, Any], values: list[tuple[str, int, float]], readout: str) -> list[effects.Effect]:
  """The study's effects on a read-out. values: (arm, seed, value)."""
  arms = [design.Arm(a['name'], a['roles'], a['objective']) for a in plan['made']]
  if plan['design'] == 'factorial':
    found = effects.crossed(arms, tuple(plan['arms']), tuple(map(tuple, plan['interactions'])), values, readout)
  else:
    found = effects.single(arms, values, readout)
  return [e._replace(split=plan['readout']) for e in found]


def _proxy(plan: dict, share: float, readout: str, short: list, full: list, said: list[effects.Effect]
           ) -> effects.Proxy | None:
  mean = lambda values: {arm: mean_std([v for a, _, v in values if a == arm])[0] for arm, *_ in values}
  return effects.proxy(share, readout, mean(short), mean(full), fitted(plan, short, readout), said, effects.repeated(full))


def done(folder: pathlib.Path, run: Run, what: str = '') -> bool:
  """Whether a run has been trained and read out; of `what` 'test': on the test split too."""
  return bool(_found(folder / run.workdir, f'{what or "found"}.json'))


def read_on(plan: dict[str, Any]) -> str:
  """The images that a study compares its arms on, in words."""
  share = plan['made'][0]['config'].get('validation', 0.)
  return (f'validation images ({share:.0%} of each class, in no run\'s training)' if plan['readout'] == 'validation' else
          'the test split')


def _found(workdir: pathlib.Path, name: str = 'found.json') -> dict:
  try:
    return json.loads((workdir / name).read_text(encoding='utf-8'))
  except (OSError, ValueError):
    return {}


def table(found: dict[str, Any]) -> str:
  """The study as CSV: a line an arm and read-out with its images, n, mean, std and every seed, last the recommended arm on
  the test split; then the effects. Nothing that a clock measured."""
  out = io.StringIO()
  done = [r for r in found['runs'].values() if r['status'] == 'done' and r['share'] == 1]
  seeds = sorted({r['seed'] for r in done})
  write = csv.writer(out, lineterminator='\n')
  write.writerow(['arm', 'readout', 'split', 'n', 'mean', 'std', *(f'seed {s}' for s in seeds)])
  for key, rows in (('readouts', found['table']), ('test', found['test'])):
    for row in rows:
      of = {r['seed']: r.get(key, {}).get(row['readout'], '') for r in done if r['arm'] == row['arm']}
      write.writerow([*(row[k] for k in ('arm', 'readout', 'split', 'n', 'mean', 'std')), *(of.get(s, '') for s in seeds)])
  write.writerow([])
  fields = 'aug', 'contrast', 'readout', 'split', 'mean', 'low', 'high', 'holm', 'n', 'smallest'
  write.writerow([{'aug': 'augmentation', 'mean': 'difference', 'holm': 'Holm p'}.get(k, k) for k in fields])
  for e in found['effects']:
    write.writerow([e[k] for k in fields])
  return out.getvalue()

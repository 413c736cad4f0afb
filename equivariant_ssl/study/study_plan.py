"""The plan of a study: its arms with their configs, its runs and their order; study.json."""
import json
import math
import pathlib
import shlex
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from equivariant_ssl import augment, renamed
from equivariant_ssl.config import config_to_json, load_config, resolve_config
from equivariant_ssl.data import holdout
from equivariant_ssl.dotted import EVERY, allow_imports, is_dotted, short_name
from equivariant_ssl.errors import BAD_DATA, OTHER_CONFIG, UserError
from equivariant_ssl.evaluate import transfer
from equivariant_ssl.evaluate.evaluation import protocol_names
from equivariant_ssl.parallel.sharding import mesh
from equivariant_ssl.registry import unknown_name
from equivariant_ssl.storage import disk, record
from equivariant_ssl.study import design
from equivariant_ssl.study.data_paths import KEYS, with_absolute_paths
from equivariant_ssl.training.runs import prepare_run
from equivariant_ssl.types import ROLES, Image

# The protocol whose top-1 accuracy each read-out is.
READOUTS = {'linear': 'cached', 'knn': 'knn', 'few': 'few_labels'}
PROTOCOLS = (*READOUTS.values(), 'profile', 'gains')  # for every run; a study may ask for more
# The settings that a second command in the same folder may change.
FREE = ('command', 'environment', 'seeds', 'proxies')


class Settings(NamedTuple):
  """The settings of `eqssl study`; its --help explains each of them.

  budget: the epochs of a run, 0 for the config's. proxies: shares of the budget. protocols: the
  protocols of the evaluation beside PROTOCOLS. readout: the images that arms are compared on, a
  word of holdout.READOUTS.
  """
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


class PlannedRun(NamedTuple):
  """A run of a study.

  share: its share of the study's budget. workdir: its folder, within the study's folder.
  """
  name: str
  arm: str
  seed: int
  share: float
  workdir: str


def view_pixels(config: ConfigDict) -> float:
  """Return the number of pixels in all views of one image.

  The encoder reads them in a step, and its compute is nearly in proportion to them.
  """
  run = prepare_run(config, mesh(jax.devices()[:1]))
  assert run.source is not None  # prepare loads the data
  image = Image(jnp.zeros((1, *run.source.train.images.shape[1:])), jnp.ones((1, 2)))
  views = jax.eval_shape(lambda key: augment.views(run.recipe.groups, key, image), run.key)
  return float(sum(np.prod(group.images.shape[1:4]) for group in views.values()))


def _check(s: Settings) -> None:
  """Raise UserError for a setting that no study can have."""
  if s.equal not in ('images', 'compute'):
    raise UserError(f'--equal is images or compute, not {s.equal}.',
                    'Give images (every arm sees as many images) or compute.')
  if (not s.seeds or len(set(s.seeds)) < len(s.seeds) or not 0 <= s.budget < math.inf
      or not all(0 < share < 1 for share in s.proxies)):
    joined = lambda values: ','.join(f'{value:g}' for value in values) or 'none'
    raise UserError(f'--seeds {joined(s.seeds)} --budget {s.budget:g} --proxies '
                    f'{joined(s.proxies)}: seeds must differ, the budget is a number of epochs, '
                    'and a proxy is a share between 0 and 1.',
                    'e.g. --seeds 0,1,2 --budget 40 --proxies 1/8,1/4,1/2')
  if not s.augs or len(set(s.augs)) < len(s.augs):
    raise UserError('--augs names no augmentation, or names one twice.',
                    'e.g. --augs rotate,jitter')
  if not s.arms:
    raise UserError('--arms names no role.', f'Give some of {",".join(ROLES)}.')
  if s.readout not in holdout.READOUTS:
    raise unknown_name('--readout', s.readout, holdout.READOUTS)
  protocol_names(list(s.protocols))
  transfer.check_targets(s.transfer, s.root)
  for name in s.transfer:
    target = transfer.open_target(name, s.root)
    if isinstance(target, transfer.MissingTarget):
      raise UserError(f'--transfer {target.name}: this data set is not on disk.', target.command,
                      BAD_DATA)


def make_plan(s: Settings, command: str, environment: dict) -> dict[str, Any]:
  """Return the plan of a study, as study.json holds it.

  Its data have absolute paths. Modules that the settings name by dotted paths are imported, because
  a user has written them. Raises UserError for a setting that no study can have.
  """
  with allow_imports(EVERY):
    return _make_plan(s, command, environment)


def _make_plan(s: Settings, command: str, environment: dict) -> dict[str, Any]:
  _check(s)
  loaded: Any = load_config(s.config, s.overrides)
  if s.readout == 'validation' and not loaded.validation:  # else the config's own share is kept
    loaded = resolve_config(ConfigDict(config_to_json(loaded) | {'validation': holdout.HELD_OUT}))
  config: Any = design.base_config(loaded, s.augs)
  s = s._replace(augs=tuple(short_name(name) if is_dotted(name) else name for name in s.augs))
  sections = design.objective_sections(config, s.objective)
  arms = design.make_arms(config, s.augs, s.arms, tuple(sections), s.design, s.interactions)
  usable = design.usable_arms(config, arms, sections)
  arm_entries = [{**arm._asdict(), 'config': values} for arm, values, _ in usable]
  if any('action' in predicts for *_, predicts in usable):
    # An objective that predicts actions has no gains; regression is its measure.
    s = s._replace(protocols=tuple(dict.fromkeys([*s.protocols, 'regression'])))
  epochs = s.budget or (config.epochs if not config.steps else 0.)
  if s.equal == 'compute':
    pixels = [view_pixels(resolve_config(ConfigDict(entry['config']))) for entry in arm_entries]
    for entry, arm_pixels in zip(arm_entries, pixels, strict=True):
      entry['scale'] = pixels[0] / arm_pixels
  plan = s._asdict() | {'epochs': epochs, 'made': arm_entries, 'command': command,
                        'environment': environment}
  return with_absolute_paths(json.loads(json.dumps(plan)))


def write(folder: pathlib.Path, plan: dict[str, Any]) -> None:
  """Write study.json; raise UserError where the folder holds another study, or a run."""
  folder.mkdir(parents=True, exist_ok=True)
  path = folder / 'study.json'
  if (folder / 'config.json').exists():
    raise UserError(f'{folder} holds a run.', 'Give the study a folder of its own, with --out.')
  if path.exists():
    begun = read(folder)
    plan = _keep_rules(plan, begun)
    old, new = _comparable(begun), _comparable(plan)
    changed = [key for key in new if key not in FREE and old.get(key) != new[key]]
    if changed:
      options = [f'--{key}' + (f' ({old[key]})' if key == 'readout' else '')
                 for key in changed if key not in ('made', 'epochs')]
      options = options or ['version of a config or of eqssl']
      raise UserError(f'{folder} holds a study with another {", ".join(options)}.',
                      f'Use another --out; or go on with that one as it was: '
                      f'eqssl study --resume {shlex.quote(str(folder))}', OTHER_CONFIG)
    if with_absolute_paths(begun) != begun:  # an older version's relative paths stay
      plan = plan | {key: begun[key] for key in KEYS}
  record.write_atomically(path, json.dumps(plan, indent=1) + '\n')


def _keep_rules(plan: dict[str, Any], begun: dict[str, Any]) -> dict[str, Any]:
  """Return a plan with the rules of the study that it goes on with, where today's are others."""
  before = {arm['name']: arm['config'].get('data') for arm in begun['made']}
  arms = []
  for arm in plan['made']:
    config = arm['config']
    rules = renamed.rules_to_keep(config['data'], before.get(arm['name']))
    arms.append(arm | {'config': config | {'data': config['data'] | rules}})
  return plan | {'made': arms}


def _comparable(plan: dict[str, Any]) -> dict[str, Any]:
  """Return a plan as this version would make it: an older version's lacks fields, for example."""
  arms = [arm | {'config': _with_every_field(arm['config'])} for arm in plan['made']]
  return with_absolute_paths(plan | {'made': arms})


def _with_every_field(config: dict) -> dict:
  """Return a config of JSON values with every field, or unchanged where this version refuses it."""
  try:
    return config_to_json(resolve_config(ConfigDict(config)))
  except UserError:
    return config


def read(folder: pathlib.Path) -> dict[str, Any]:
  """Return the plan in `folder`.

  A plan without a read-out is that of an older version, which read out on the test split only.
  Raises UserError where there is no plan, or where it names runs outside of the folder.
  """
  path = folder / 'study.json'
  start = 'Start one: eqssl study --config NAME --augs rotate,jitter --out DIR'
  try:
    plan = json.loads(disk.retry(lambda: path.read_text(encoding='utf-8'), path))
  except (OSError, ValueError) as error:
    state = 'is missing' if isinstance(error, OSError) else 'is not JSON'
    raise UserError(f'no study in {str(folder)!r}: study.json {state}.', start) from None
  fix = 'Restore it from a copy, or do the study again with another --out.'
  try:
    plan = {'readout': 'test'} | plan
    plan['made'] = [arm | {'config': renamed.stored(arm['config'])} for arm in plan['made']]
    outside = [run.name for run in runs(plan) if '..' in pathlib.PurePath(run.workdir).parts]
  except (KeyError, TypeError, ValueError, AttributeError) as error:
    raise UserError(f'{path} is not a study: {type(error).__name__}: {error}.', fix) from None
  if outside:
    raise UserError(f'{path} names a run outside of its folder: {outside[0]!r}.', fix)
  return plan


def runs(plan: dict[str, Any]) -> list[PlannedRun]:
  """Return every run of a study, in the order in which they are done.

  The full budget comes first, seed by seed, so that every arm has been trained once early; the
  smaller budgets follow.
  """
  planned = []
  for share in (1., *plan['proxies']):
    for seed in plan['seeds']:
      for arm in plan['made']:
        name = f'{arm["name"]}/{seed}' + (f'@{share:g}' if share < 1 else '')
        planned.append(PlannedRun(name, arm['name'], seed, share, f'runs/{name}'))
  return planned


def run_config(plan: dict[str, Any], run: PlannedRun) -> Any:
  """Return the resolved config of a run.

  It is its arm's with the run's seed, and with the whole schedule scaled to the run's budget.
  """
  arm = next(arm for arm in plan['made'] if arm['name'] == run.arm)
  values = json.loads(json.dumps(arm['config']))
  share = run.share * arm.get('scale', 1.)
  scale = share * (plan['budget'] / values['epochs'] if plan['budget'] else 1.)
  if plan['budget']:
    values['steps'] = 0
  steps = values['steps']
  values |= {'seed': run.seed, 'epochs': values['epochs'] * scale, 'steps': round(steps * scale)}
  values['optimizer']['warmup_epochs'] *= scale
  if steps and not values['steps']:  # 0 would mean: as many as the epochs have
    raise _no_step(run, f'{steps} steps')
  return resolve_config(ConfigDict(values))


def _no_step(run: PlannedRun, budget: str) -> UserError:
  return UserError(f'run {run.name}: {run.share:g} of {budget} is no whole step to train.',
                   'Give it more: --budget EPOCHS, --config.steps=N, or larger --proxies.')


def check_steps(plan: dict[str, Any], steps_per_epoch: int) -> None:
  """Raise UserError where some run has no step to train."""
  for run in runs(plan):
    config = run_config(plan, run)
    if not (config.steps or round(config.epochs * steps_per_epoch)):
      raise _no_step(run, f'{plan["epochs"]:g} epochs')


def is_done(folder: pathlib.Path, run: PlannedRun, part: str = 'found') -> bool:
  """Return whether a part of a run is done.

  part: 'found', which is training and the read-out, or 'test', the read-out on the test split.
  """
  return bool(read_part(folder / run.workdir, part))


def read_part(workdir: pathlib.Path, part: str = 'found') -> dict[str, Any]:
  """Return what found.json, test.json or failed.json of a run holds; {} where there is none."""
  return disk.read_json_or_empty(workdir / f'{part}.json')


def forget_failures(folder: pathlib.Path, plan: dict[str, Any]) -> None:
  """Delete what the runs of a study in `folder` say of why they failed; they are tried again."""
  for run in runs(plan):
    (folder / run.workdir / 'failed.json').unlink(missing_ok=True)


def readout_images(plan: dict[str, Any]) -> str:
  """Return the images that a study compares its arms on, in words."""
  if plan['readout'] != 'validation':
    return 'the test split'
  share = plan['made'][0]['config'].get('validation', 0.)
  return f'validation images ({share:.0%} of each class, which no run trains on)'

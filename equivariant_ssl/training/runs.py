"""Runs before their first step: the data, the recipe, and the shape of the state."""
import contextlib
import functools
import json
import os
import pathlib
import re
import shlex
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from equivariant_ssl import data, registry
from equivariant_ssl.config import config_to_json, read_config, resolve_config
from equivariant_ssl.config_fields import FREE
from equivariant_ssl.data import card, holdout
from equivariant_ssl.data.card import Card
from equivariant_ssl.data.source import Source
from equivariant_ssl.errors import OTHER_CONFIG, OTHER_DATA, USAGE, UserError
from equivariant_ssl.parallel import processes, sharding
from equivariant_ssl.storage import checkpoint, record
from equivariant_ssl.training.recipe import Recipe, make_recipe
from equivariant_ssl.training.run_config import (
  DATA_PATH_OPTION,
  change_config,
  check_roles,
  fit_batch,
  place_field,
  relocate_data,
)
from equivariant_ssl.training.state import TrainState, abstract_train_state, initializer

Say = Callable[[str], None]  # prints a line for the user
# The option in an error message about data that are missing.
PLACE_OPTION = re.compile(r'--config\.data\.(path|root)=\S+')


class Run(NamedTuple):
  """A run before its first step: enough to train it, to resume it, or to read its checkpoint.

  source: the data; None where a run is read without its data, or planned without data.
  card:   what the run knows of its data; a planned run has no card.
  """
  config: Any
  source: Source | None
  recipe: Recipe
  mesh: Mesh
  key: jax.Array
  card: Card


class DataRequest(NamedTuple):
  """What a command says of the data of an existing run.

  path:    the folder that the data are in now; '' for the folder that the run names.
  accept:  whether to take data that are not the run's, on purpose.
  readout: 'test' to read out on the test split; '' for the split that the run reads out on.
  """
  path: str = ''
  accept: bool = False
  readout: str = ''


def mesh_for(config: Any) -> Mesh:
  """Return the mesh for reading a run that was made elsewhere.

  The mesh has all devices if the run's batch can be split over them, else one. Raises UserError if
  it cannot be, in a job of several processes, of which each must have a device of the mesh.
  """
  devices = jax.devices()
  try:
    sharding.check_batch(config.batch, len(devices), config.accumulate, config.batchnorm_groups)
  except UserError:
    if jax.process_count() > 1:
      raise
    devices = devices[:1]
  return sharding.mesh(devices)


def _load_source(config: Any, advice: str) -> Source:
  """Load the data of a config.

  advice: for an existing run, what to type to say where its data are now; '' for a new run.
  """
  try:
    return registry.make(data, config.data.name,
                         **{k: v for k, v in config.data.items() if k != 'name'})
  except UserError as error:
    if not advice or error.code != USAGE:
      raise
    text = PLACE_OPTION.sub(lambda match: advice, str(error))
    if advice not in text and place_field(config):
      text = f'{text} If the data have moved: {advice}'
    raise UserError(text) from error


def _checked_card(config: Any, known: Card, now: Card, accept: bool, advice: str) -> Card:
  """Compare the data that were loaded with those that a run knows, and return the run's card.

  Raises UserError OTHER_DATA if the data are others and may not be taken.
  """
  changes = card.card_differences(known, now)
  if not changes:
    return known._replace(images=known.images or now.images)
  cause = f'these are not the data that the run knows: {"; ".join(changes)}.'
  if not accept:
    elsewhere = (f'If the right ones are elsewhere: {advice}; to' if place_field(config) else 'To')
    raise UserError(cause, f'{elsewhere} take these on purpose: --accept-data', OTHER_DATA)
  if known.canvas != now.canvas:
    raise UserError(f'{cause} Canvases of another side cannot be taken.', 'Use a new --workdir.',
                    OTHER_DATA)
  if config.probe and known.classes != now.classes:
    raise UserError(f'{cause} The run trains a probe of its own classes, and these cannot '
                    'change.',
                    'Use a new --workdir, and --config.probe=False if it starts from this run.',
                    OTHER_DATA)
  return card.accept_data(known, now)


def prepare_run(config: Any, mesh: Mesh | None = None, log: Say = lambda line: None,
                known_card: Card | None = None, accept: bool = False, advice: str = '',
                readout: str = '') -> Run:
  """Load the data of a resolved config and build its recipe.

  known_card: the data card of an existing run. The recipe then follows that card, whatever the
              data are now.
  accept:     take data that are not the run's.
  advice:     for an existing run, what to type to say where its data are; '' for a new run.
  readout:    'test' to read out on the test split although the run held images out of training.

  The config of the run that is returned finds its data from any folder. Raises UserError if the
  batch does not fit the devices, and UserError OTHER_DATA if the data are not the run's.
  """
  mesh = mesh or sharding.mesh()
  sharding.check_batch(config.batch, mesh.devices.size, config.accumulate, config.batchnorm_groups)
  if not known_card and not advice:
    check_roles(config)
  source = _load_source(config, advice)
  for line in source.problems[:10]:
    log(line)
  if len(source.problems) > 10:
    log(f'... and {len(source.problems) - 10} more such lines: eqssl data check lists them')
  place = {k: v for k, v in source.place if config.data.get(k, v) != v}
  config = change_config(config, {'data': place}) if place else config
  moments = (tuple(config.mean), tuple(config.std)) if config.mean else None
  if known_card and moments and moments != (known_card.mean, known_card.std):
    raise UserError(f'config.mean is {config.mean} and config.std {config.std}; the run '
                    f'knows {known_card.mean} and {known_card.std}.',
                    'A network needs the values it was trained with: leave both out.', OTHER_CONFIG)
  now = card.make_card(source, config)  # the card of all data, whichever split is read out on
  source = holdout.hold_out(source, config.validation, readout)
  now = now._replace(images=len(source.train.images))
  data_card = _checked_card(config, known_card, now, accept, advice) if known_card else now
  requested, config = config.batch, fit_batch(config, data_card.images)
  if config.batch < requested:
    log(f'the batch is {config.batch}, not {requested}: there are {data_card.images} training '
        'images')
    sharding.check_batch(config.batch, mesh.devices.size, config.accumulate,
                         config.batchnorm_groups)
  if now.images < config.batch and known_card:
    raise UserError(f'{now.images} training images are fewer than a batch of the run, '
                    f'{config.batch}.', f'If there are more elsewhere: {advice}', OTHER_DATA)
  return Run(config, source, _recipe(config, data_card), mesh, jax.random.key(config.seed),
             data_card)


def _recipe(config: Any, data_card: Card) -> Recipe:
  """Return the recipe of a config for the data of a card."""
  fields = {k: v for k, v in config_to_json(config).items() if k not in ('seed', *FREE)}
  return _cached_recipe(json.dumps(fields), data_card.images, data_card.canvas, data_card.mean,
                        data_card.std, len(data_card.classes or ()))


@functools.lru_cache(8)
def _cached_recipe(config: str, *facts) -> Recipe:
  """Return the recipe of a config's JSON and the facts of its data.

  Runs that differ only in their seed get the same object, so that their step is traced once.
  """
  return make_recipe(resolve_config(ConfigDict(json.loads(config))), *facts)


def read_known_card(workdir: pathlib.Path, log: Say = lambda line: None) -> Card | None:
  """Return the data card of the run in `workdir`, as process 0 reads it.

  The card is read from data.json, else from the newest checkpoint. The result is None if there is
  no run, or a run without a card. Raises UserError if data.json is damaged and no checkpoint has
  the card.
  """
  damage, stored = None, None
  try:
    stored = card.read_card(workdir)
  except UserError as error:
    damage = error
  values, broken = processes.gather((stored and card.card_to_json(stored), str(damage or '')))[0]
  if values:
    return card.card_from_json(values)
  with contextlib.suppress(UserError):  # reading the state will say what is wrong
    like = {'step': jax.ShapeDtypeStruct((), 'int32')}
    step, _, meta = checkpoint.load_checkpoint(workdir / 'checkpoints', like, None,
                                               lambda line: None)
    if 'data' in meta:
      log(f'{workdir / card.CARD_FILE} is {"damaged" if broken else "missing"}: '
          f'taken from the checkpoint of step {step}')
      return card.card_from_json(meta['data'])
  if broken:
    raise damage or UserError(broken)
  return None


def add_first_card(workdir: pathlib.Path, run: Run, log: Say) -> Run:
  """Give a data card to the run in `workdir` if an older version, which had none, trained it.

  The number of steps in an epoch is read from the run's log. A new run is returned as it is.
  """
  saved_steps = checkpoint.saved_steps(workdir / 'checkpoints')
  if not saved_steps:
    return run
  log(f'{workdir.name} has no data card, as older versions wrote none. One is made now; what its '
      f'data were before step {saved_steps[0]} is not known')
  logged = [round(row['step'] / row['epoch']) for row in record.read_metrics(workdir)
            if row.get('epoch')]
  images, batch = run.card.images, run.config.batch
  if logged and logged[-1] != images // batch:
    images = logged[-1] * batch
    log(f'its log counts {logged[-1]} steps an epoch, while {run.card.images:,} images make '
        f'{run.card.images // batch}: the log is believed')
  data_card = run.card._replace(since=saved_steps[0], images=images)
  return run._replace(card=data_card, recipe=_recipe(run.config, data_card))


def reopen_run(workdir: pathlib.Path, mesh: Mesh | None = None, log: Say = lambda line: None,
               data_request: DataRequest = DataRequest(), needs_data: bool = True,
               changes: dict[str, Any] = {}) -> Run:  # noqa: B006
  """Return the run in `workdir`, for reading its checkpoint.

  needs_data: whether to load the data. Without them the run's source is None; a run that has no
              data card yet loads them all the same, and gets one.
  changes:    other values for some fields of its config.

  Raises the errors of `prepare_run`, and UserError NO_CHECKPOINT.
  """
  config = read_config(workdir / 'config.json')
  config = relocate_data(change_config(config, changes) if changes else config, data_request.path)
  mesh, data_card = mesh or mesh_for(config), read_known_card(workdir, log)
  if data_card and not needs_data:
    return Run(config, None, _recipe(config, data_card), mesh, jax.random.key(config.seed),
               data_card)
  run = prepare_run(config, mesh, log, data_card, data_request.accept, DATA_PATH_OPTION,
                    data_request.readout)
  if data_card is None and checkpoint.saved_steps(workdir / 'checkpoints'):
    run = add_first_card(workdir, run, log)
    if processes.is_main():
      with contextlib.suppress(OSError):  # the folder may be read-only
        card.write_card(workdir, run.card)
  return run


def initial_state(run: Run, rule: str = 'replicate') -> TrainState:
  """Return the run's state at step 0, placed on the devices by one of `sharding.RULES`."""
  return initializer(run.recipe, run.mesh, rule)(run.key)


def abstract_state(run: Run, rule: str = 'replicate') -> TrainState:
  """Return the shapes, dtypes and placement of the run's state.

  A checkpoint is read into this form, by whichever rule it was saved.
  """
  return abstract_train_state(run.recipe, run.mesh, rule)


def keep_compiled_programs() -> None:
  """Keep compiled programs on disk, for later processes.

  $EQSSL_CACHE names the folder; an empty $EQSSL_CACHE turns this off. Without a home folder nothing
  is kept.
  """
  root = os.environ.get('EQSSL_CACHE', os.path.expanduser('~/.cache/equivariant_ssl/xla'))
  if root and not root.startswith('~'):
    jax.config.update('jax_compilation_cache_dir', root)
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 1.)


def interrupted_line(workdir: pathlib.Path) -> str:
  """Return what a training that ended at once has saved in its folder, and what to type."""
  steps = checkpoint.saved_steps(workdir / 'checkpoints')
  if not steps:
    return 'interrupted; no checkpoint was saved yet. Type the same command again to start anew.'
  return (f'interrupted; the newest checkpoint is of step {max(steps)}. '
          f'Resume: eqssl resume {shlex.quote(str(workdir))}')

"""A run before its first step: its data, its recipe, and the shape of its state."""
import contextlib
import functools
import json
import os
import pathlib
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from equivariant_ssl import checkpoint, data, distributed, modules, record, shard
from equivariant_ssl import config as configs
from equivariant_ssl import recipe as recipes
from equivariant_ssl import state as states
from equivariant_ssl.data import card as cards
from equivariant_ssl.data import holdout
from equivariant_ssl.data.card import Card
from equivariant_ssl.data.source import Source
from equivariant_ssl.errors import OTHER_CONFIG, OTHER_DATA, USAGE, UserError

Say = Callable[[str], None]
PLACE = re.compile(r'--config\.data\.(path|root)=\S+')  # in the advice on data that are not found
MOVED = '--data-path DIR'


class Run(NamedTuple):
  """What a run is made of, before its first step: enough to train it, resume it, or read its checkpoint. source: None of a
  run that is read without its data (with its card), or planned without them (with none)."""
  config: ConfigDict
  source: Source | None
  recipe: recipes.Recipe
  mesh: Mesh
  key: jax.Array
  card: Card


class Asked(NamedTuple):
  """What a command says of the data of a run that is there: where they are now ('': where the run says), whether data that
  are not the run's are taken on purpose, and on which it is read out ('test', or '': as the run says)."""
  path: str = ''
  accept: bool = False
  readout: str = ''


def mesh_for(config: ConfigDict) -> Mesh:
  """The mesh over all devices where they divide the batch, else over one: for what reads a run that was made elsewhere."""
  devices = jax.devices()
  return shard.mesh(devices if config.batch // config.accumulate % len(devices) == 0 else devices[:1])


def changed(config: ConfigDict, over: dict[str, Any]) -> ConfigDict:
  """A resolved config with other values of some of its fields, of those of `data` where they are a dict."""
  given = configs.as_json(config)
  return configs.resolve(ConfigDict(given | {k: given[k] | v if isinstance(v, dict) else v for k, v in over.items()}))


def _field(config: ConfigDict) -> str | None:
  """The field of a config's `data` that says where they lie, None of data that come with a package."""
  return next((k for k in ('path', 'root') if k in config.data), None)


def where(config: ConfigDict) -> str:
  """What says where the data of a new run are."""
  return f'--config.data.{_field(config)}=DIR' if _field(config) else ''


def free(config: ConfigDict) -> tuple[str, ...]:
  """The fields in which a config may differ from that of its run: where its data lie among them, since their card says
  whether they are others, and how they are read."""
  named, always = config.data.get('dataset'), (*configs.FREE, 'data.path', 'data.root', 'data.stream')
  path = pathlib.Path(named or '', 'dataset_info.json').expanduser()
  return (*always, 'data.dataset') if named and path.is_file() else always


def since(config: ConfigDict, workdir: pathlib.Path) -> tuple[str, ...]:
  """The fields that an older version did not have when it wrote the config.json of `workdir`, where `config` has them as
  that run had: at their default. () where no run is there, or one that is not readable."""
  try:
    found = record.read_object(workdir / 'config.json', '')
    old = record.leaves(configs.as_json(configs.resolve(ConfigDict(found))))
  except (FileNotFoundError, UserError):
    return ()
  own, now = record.leaves(found), record.leaves(configs.as_json(config))
  return tuple(k for k in old if k not in own and k in now and now[k] == old[k])


def moved(config: ConfigDict, path: str) -> ConfigDict:
  """The config of data that are in the folder `path` now; UserError where they are in none."""
  if not path:
    return config
  field = _field(config)
  if field is None:
    raise UserError(f'{MOVED.replace("DIR", path)}: the data set {config.data.name} is in no folder.', 'Leave it out.')
  here = pathlib.Path(os.path.abspath(os.path.expanduser(path)))
  if 'dataset' in config.data:  # of a data set named by the folder of a version: that, or one that it is somewhere in
    tails = (pathlib.Path(config.data.dataset).parts[-n:] for n in (1, 2, 3))
    versions = (p for p in (here, *(here.joinpath(*t) for t in tails)) if (p / 'dataset_info.json').is_file())
    field, here = next((('dataset', p) for p in versions), (field, here))
  return changed(config, {'data': {field: str(here)}})


def _source(config: ConfigDict, advice: str) -> Source:
  """The data of a config. advice: what says where they are now, of a run that is there; '' of a new one."""
  try:
    return modules.make(data, config.data.name, **{k: v for k, v in config.data.items() if k != 'name'})
  except UserError as error:
    if not advice or error.code != USAGE:
      raise
    text = PLACE.sub(lambda _: advice, str(error))
    raise UserError(text if advice in text or not _field(config) else f'{text} If the data have moved: {advice}') from error


def _settled(config: ConfigDict, known: Card, now: Card, accept: bool, advice: str) -> Card:
  """The card of a run that knows its data, and found these; UserError OTHER_DATA where they are others and not taken."""
  other = cards.differences(known, now)
  if not other:
    return known._replace(images=known.images or now.images)
  cause = f'these are not the data that the run knows: {"; ".join(other)}.'
  if not accept:
    elsewhere = f'If the right ones are elsewhere: {advice}; to' if _field(config) else 'To'
    raise UserError(cause, f'{elsewhere} take these on purpose: --accept-data', OTHER_DATA)
  if known.canvas != now.canvas:
    raise UserError(f'{cause} Canvases of another side cannot be taken.', 'Use a new --workdir.', OTHER_DATA)
  if config.probe and known.classes != now.classes:
    raise UserError(f'{cause} The run trains a probe of its own classes, which cannot be others.',
                    'Use a new --workdir, and --config.probe=False if it starts from this run.', OTHER_DATA)
  return cards.taken(known, now)


def prepare(config: ConfigDict, mesh: Mesh | None = None, log: Say = lambda line: None, known: Card | None = None,
            accept: bool = False, advice: str = '', readout: str = '') -> Run:
  """Load the data and build the recipe of a resolved config; UserError where they do not fit the devices.

  known: the card of a run that is there: its recipe is of that, whatever the data are now, and OTHER_DATA is raised where
  they are others, unless these are to `accept`. advice: what says where its data are, '' of a new run. readout: 'test':
  although the run holds images out of its training, read out on the test split. The config of the run that is returned
  finds its data from any folder.
  """
  mesh = mesh or shard.mesh()
  shard.check_batch(config.batch, mesh.devices.size, config.accumulate)
  source = _source(config, advice)
  for line in source.problems[:10]:
    log(line)
  if len(source.problems) > 10:
    log(f'... and {len(source.problems) - 10} more such lines: eqssl data check lists them')
  place = {k: v for k, v in source.place if config.data.get(k, v) != v}
  config = changed(config, {'data': place}) if place else config
  if known and config.mean and (tuple(config.mean), tuple(config.std)) != (known.mean, known.std):
    raise UserError(f'config.mean is {config.mean} and config.std {config.std}; the run knows {known.mean} and {known.std}.',
                    'A network sees what it was trained on: leave them out.', OTHER_CONFIG)
  now = cards.of(source, config)  # of all that is there, whatever part is read out on
  source = holdout.split(source, config.validation, readout)
  now = now._replace(images=len(source.train.images))
  card = _settled(config, known, now, accept, advice) if known else now
  if now.images < config.batch and known:
    raise UserError(f'{now.images} training images are fewer than a batch of the run, {config.batch}.',
                    f'If there are more elsewhere: {advice}', OTHER_DATA)
  return Run(config, source, _recipe_of(config, card), mesh, jax.random.key(config.seed), card)


def _recipe_of(config: ConfigDict, card: Card) -> recipes.Recipe:
  matters = {k: v for k, v in configs.as_json(config).items() if k not in ('seed', *configs.FREE)}
  return _recipe(json.dumps(matters), card.images, card.canvas, card.mean, card.std, len(card.classes or ()))


@functools.lru_cache(8)
def _recipe(config: str, *of) -> recipes.Recipe:
  """The recipe of a config's JSON: one object for runs that differ in their seed alone, whose step is traced once."""
  return recipes.make(configs.resolve(ConfigDict(json.loads(config))), *of)


def known(workdir: pathlib.Path, log: Say = lambda line: None) -> Card | None:
  """The card of the run in `workdir`, as process 0 finds it: in its data.json, else in its newest checkpoint; None of a run
  that has none, or of no run. UserError where it is damaged and no checkpoint has it."""
  damage, found = None, None
  try:
    found = cards.read(workdir)
  except UserError as error:
    damage = error
  found, broken = distributed.gather((found and cards.as_json(found), str(damage or '')))[0]
  if found:
    return cards.from_json(found)
  with contextlib.suppress(UserError):  # who reads its state will say what is the matter
    step, _, meta = checkpoint.load(workdir / 'checkpoints', {'step': jax.ShapeDtypeStruct((), 'int32')}, None,
                                    lambda line: None)
    if 'data' in meta:
      log(f'{workdir / cards.FILE} is {"damaged" if broken else "missing"}: taken from the checkpoint of step {step}')
      return cards.from_json(meta['data'])
  if broken:
    raise damage or UserError(broken)
  return None


def first_card(workdir: pathlib.Path, run: Run, log: Say) -> Run:
  """`run` with a card for what is in `workdir`, a run of an older version that wrote none: its steps an epoch are those of
  its log. A new run stays as it is."""
  there = checkpoint.steps(workdir / 'checkpoints')
  if not there:
    return run
  log(f'{workdir.name} has no data card, older versions wrote none: it is made now, and what its data were before step '
      f'{there[0]} is not known')
  counted = [round(row['step'] / row['epoch']) for row in record.read_metrics(workdir) if row.get('epoch')]
  images = run.card.images
  if counted and counted[-1] != images // run.config.batch:
    images = counted[-1] * run.config.batch
    log(f'its log counts {counted[-1]} steps an epoch, and {run.card.images:,} images make '
        f'{run.card.images // run.config.batch}: the log is believed')
  card = run.card._replace(since=there[0], images=images)
  return run._replace(card=card, recipe=_recipe_of(run.config, card))


def reopen(workdir: pathlib.Path, mesh: Mesh | None = None, log: Say = lambda line: None, asked: Asked = Asked(),
           needs_data: bool = True, over: dict[str, Any] = {}) -> Run:  # noqa: B006
  """The run in `workdir`, to read its checkpoint: without its data (source None) where these are not needed and the run has
  a card; a run without one gets it. over: other values of fields of its config. UserError as `prepare`; NO_CHECKPOINT."""
  config = configs.read(workdir / 'config.json')
  config = moved(changed(config, over) if over else config, asked.path)
  mesh, card = mesh or mesh_for(config), known(workdir, log)
  if card and not needs_data:
    return Run(config, None, _recipe_of(config, card), mesh, jax.random.key(config.seed), card)
  run = prepare(config, mesh, log, card, asked.accept, MOVED, asked.readout)
  if card is None and checkpoint.steps(workdir / 'checkpoints'):
    run = first_card(workdir, run, log)
    with contextlib.suppress(OSError):  # a folder that may only be read
      cards.write(workdir, run.card)
  return run


def initial(run: Run, rule: str = 'replicate') -> states.TrainState:
  """The run's state at step 0, a copy on every device, or by another of shard.RULES."""
  return states.initialiser(run.recipe, run.mesh, rule)(run.key)


def abstract(run: Run, rule: str = 'replicate') -> states.TrainState:
  """The shapes, dtypes and placement of the run's state: what a checkpoint is read into, by whatever rule it was saved."""
  return states.abstract(run.recipe, run.mesh, rule)


def keep_programs() -> None:
  """Keep compiled programs between processes; $EQSSL_CACHE moves them, an empty one turns this off, and so does no home."""
  root = os.environ.get('EQSSL_CACHE', os.path.expanduser('~/.cache/equivariant_ssl/xla'))
  if root and not root.startswith('~'):
    jax.config.update('jax_compilation_cache_dir', root)
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 1.)

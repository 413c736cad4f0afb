"""A run before its first step: its data, its recipe, and the shape of its state."""
import functools
import json
import os
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from equivariant_ssl import config as configs
from equivariant_ssl import data, modules, shard
from equivariant_ssl import recipe as recipes
from equivariant_ssl import state as states
from equivariant_ssl.data import card as cards
from equivariant_ssl.data import holdout
from equivariant_ssl.data.card import Card
from equivariant_ssl.data.source import Source


class Run(NamedTuple):
  """What a run is made of, before its first step: enough to train it, resume it, or read its checkpoint."""
  config: ConfigDict
  source: Source
  recipe: recipes.Recipe
  mesh: Mesh
  key: jax.Array
  card: Card


def mesh_for(config: ConfigDict) -> Mesh:
  """The mesh over all devices where they divide the batch, else over one: for what reads a run that was made elsewhere."""
  devices = jax.devices()
  return shard.mesh(devices if config.batch // config.accumulate % len(devices) == 0 else devices[:1])


def prepare(config: ConfigDict, mesh: Mesh | None = None, log: Callable[[str], None] = lambda line: None,
            readout: str = '') -> Run:
  """Load the data and build the recipe of a resolved config; UserError where they do not fit the devices. readout: 'test':
  although the run holds images out of its training, read out on the test split."""
  mesh = mesh or shard.mesh()
  shard.check_batch(config.batch, mesh.devices.size, config.accumulate)
  source = modules.make(data, config.data.name, **{k: v for k, v in config.data.items() if k != 'name'})
  for line in source.problems[:10]:
    log(line)
  if len(source.problems) > 10:
    log(f'... and {len(source.problems) - 10} more such lines: eqssl data check lists them')
  card = cards.of(source, config)  # of all that is there, whatever part is read out on
  source = holdout.split(source, config.validation, readout)
  card = card._replace(images=len(source.train.images))
  matters = {k: v for k, v in configs.as_json(config).items() if k not in ('seed', *configs.FREE)}
  recipe = _recipe(json.dumps(matters), card.images, card.canvas, card.mean, card.std, len(card.classes or ()))
  return Run(config, source, recipe, mesh, jax.random.key(config.seed), card)


@functools.lru_cache(8)
def _recipe(config: str, *of) -> recipes.Recipe:
  """The recipe of a config's JSON: one object for runs that differ in their seed alone, whose step is traced once."""
  return recipes.make(configs.resolve(ConfigDict(json.loads(config))), *of)


def initial(run: Run, rule: str = 'replicate') -> states.TrainState:
  """The run's state at step 0, a copy on every device, or by another of shard.RULES."""
  return states.initialiser(run.recipe, run.mesh, rule)(run.key)


def abstract(run: Run, rule: str = 'replicate') -> states.TrainState:
  """The shapes, dtypes and placement of the run's state: what a checkpoint is read into, by whatever rule it was saved."""
  return states.abstract(run.recipe, run.mesh, rule)


def keep_programs() -> None:
  """Keep compiled programs between processes; $EQSSL_CACHE moves them, an empty one turns this off."""
  root = os.environ.get('EQSSL_CACHE', str(pathlib.Path.home() / '.cache' / 'equivariant_ssl' / 'xla'))
  if root:
    jax.config.update('jax_compilation_cache_dir', root)
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 1.)

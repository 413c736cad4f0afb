"""A recipe is everything static about a run: functions, modules, the optimiser. Built here alone from a config."""
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from equivariant_ssl import augment, equivariance, invariance, modules, nets, optim, shard
from equivariant_ssl.errors import UserError
from equivariant_ssl.keys import key_for
from equivariant_ssl.nets import mlp
from equivariant_ssl.nets.network import Network
from equivariant_ssl.types import ROLES, Action, Equivariance, Group, Invariance, Key, Op, Wiring

SPREAD_DRAWS = 4096  # actions drawn to measure the units in which a head is told


class Recipe(NamedTuple):
  """groups: every view group of a step. weights: of the equivariance objectives. canvas: side of the stored
  images, pixels. batch: global. steps: of the whole run. wirings: what each objective was told of the roles."""
  network: Network
  groups: dict[str, Group]
  invariance: Invariance
  equivariances: dict[str, Equivariance]
  wirings: dict[str, Wiring]
  weights: dict[str, float]
  tx: optax.GradientTransformation
  schedule: optax.Schedule
  batch: int
  steps_per_epoch: int
  steps: int
  size: int
  canvas: int


def ops(config: ConfigDict) -> dict[str, tuple[Op, str]]:
  """{name: (op, role)} in the order of application, those that are off left out."""
  found = {}
  for name in config.augment.order:
    kw = {k: v for k, v in config.augment[name].items() if k != 'role'}
    if 'size' in modules.schema(augment, name):
      kw['size'] = config.size
    if config.augment[name].role != 'off':
      found[name] = modules.make(augment, name, **kw), config.augment[name].role
  return found


def draws(chains: tuple[Op, ...], key: Key, side: int, count: int = SPREAD_DRAWS) -> Action:
  """`count` actions of each of `chains`, pooled, for images of true size (side, side)."""
  size = jnp.full(2, side, jnp.float32)
  drawn = [jax.jit(jax.vmap(lambda k, c=c: c.sample(k, size)), compiler_options=shard.ONCE)(
      jax.random.split(key_for(key, i), count))
           for i, c in enumerate({id(c): c for c in chains}.values())]
  return jax.tree.map(lambda *a: jnp.concatenate(a), *drawn)


def chains(config: ConfigDict) -> tuple[Op, Op, Op, bool]:
  """(seen, own, told, sensitive) as the roles say: the ops that the invariance's views have, those of an
  objective's own views (every op that is not off), those it is told, and whether it needs views of its own."""
  found = list(ops(config).values())
  with_role = lambda *roles: augment.chain(*(op for op, role in found if role in roles))
  sensitive = any(role == 'sensitive' for _, role in found)
  seen = with_role('invariant', 'both')
  return seen, with_role(*ROLES[1:]) if sensitive else seen, with_role('sensitive', 'both'), sensitive


def wire(config: ConfigDict, label: str, canvas: int) -> Wiring:
  """The wiring of objective `label`; UserError where no role tells it anything."""
  seen, own, told, sensitive = chains(config)
  if not told.name:
    raise UserError(f'{label} is told no augmentation: every role is invariant or off.',
                    f'e.g. --config.augment.{config.augment.order[0] if config.augment.order else "crop"}.role=both')
  # A fixed key: the units in which a head is told must not depend on the run's seed.
  told = augment.normalised(told, draws((own,), jax.random.key(0), canvas))
  return Wiring(label, (seen, seen), (own, own), told, sensitive, config.size, config.dtype)


def objectives(config: ConfigDict) -> dict[str, ConfigDict]:
  """{label: section} of the equivariance objectives, 'none' left out; equal names are numbered."""
  given = config.equivariance
  given = list(given) if isinstance(given, (list, tuple)) else [given]
  found = {}
  for section in given:
    if section.name != 'none':
      label = section.name
      while label in found:
        label += "'"
      found[label] = section
  return found


def make(config: ConfigDict, num: int, canvas: int, mean: tuple = (0., 0., 0.), std: tuple = (1., 1., 1.)) -> Recipe:
  """The recipe of a resolved `config` for `num` training images of side `canvas`, inputs of `mean` and `std`."""
  if num < config.batch:
    raise UserError(f'batch {config.batch} is larger than the {num} training images.',
                    f'e.g. --config.batch={2 ** int(math.log2(max(num, 1)))}')
  own = lambda section, *drop: {k: v for k, v in section.items() if k not in ('name', *drop)}
  inv = modules.make(invariance, config.invariance.name, **own(config.invariance, 'projector', 'predictor'))
  head = lambda part: mlp.make(**config.invariance[part], dtype=config.dtype) if part in config.invariance else None
  seen = chains(config)[0]
  groups = {'views': Group((seen, seen), config.size)}
  wirings = {label: wire(config, label, canvas) for label in objectives(config)}
  equivariances = {label: modules.make(equivariance, section.name, **own(section, 'weight'))(wirings[label])
                   for label, section in objectives(config).items()}
  for e in equivariances.values():
    groups |= e.groups
  per_epoch = num // config.batch
  steps = config.steps or round(config.epochs * per_epoch)
  o = config.optimizer
  schedule = optim.warmup_cosine(o.lr, round(o.warmup_epochs * per_epoch), steps, o.end)
  network = Network(
      encoder=modules.make(nets, config.encoder.name, **own(config.encoder), dtype=config.dtype),
      projector=head('projector'), predictor=head('predictor'),
      heads={k: e.head for k, e in equivariances.items()},
      mean=tuple(mean), std=tuple(std), joint=config.batchnorm == 'joint')
  weights = {label: section.weight for label, section in objectives(config).items()}
  return Recipe(network, groups, inv, equivariances, wirings, weights,
                optim.OPTIMIZERS[o.name](schedule, **own(o, 'lr', 'warmup_epochs', 'end')), schedule,
                config.batch, per_epoch, steps, config.size, canvas)

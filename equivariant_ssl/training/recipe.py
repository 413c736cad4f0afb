"""A recipe is everything static about a run: functions, modules, the optimiser. Built here alone from a config."""
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from equivariant_ssl import augment, equivariance, invariance, nets, registry
from equivariant_ssl.errors import UserError
from equivariant_ssl.keys import key_for
from equivariant_ssl.nets import mlp
from equivariant_ssl.nets.network import Network
from equivariant_ssl.parallel import sharding
from equivariant_ssl.training import optim
from equivariant_ssl.types import Action, Equivariance, Group, Invariance, Key, Op, Wiring

PROBE_RATE = .1  # of the online probe, as solo-learn's
SPREAD_DRAWS = 4096  # actions drawn to measure the units in which a head is told


class Monitor(NamedTuple):
  """An online probe of `classes` classes, trained by `tx`."""
  classes: int
  tx: optax.GradientTransformation


class Recipe(NamedTuple):
  """groups: every view group of a step. canvas: side of the stored images, pixels. batch: global. steps: of the whole
  run. wirings: what each objective was told of the roles. probe: a linear head trained beside, on stopped features.
  accumulate: parts of the batch that are encoded one after the other."""
  network: Network
  groups: dict[str, Group]
  invariance: Invariance
  equivariances: dict[str, Equivariance]
  wirings: dict[str, Wiring]
  tx: optax.GradientTransformation
  schedule: optax.Schedule
  batch: int
  steps_per_epoch: int
  steps: int
  size: int
  canvas: int
  probe: Monitor | None = None
  accumulate: int = 1

  def epoch(self, num: int) -> int:
    """The steps in which all of `num` images are seen once: of fewer images than the run began with, fewer."""
    return min(self.steps_per_epoch, num // self.batch)

  # Itself alone: what is compiled for it is found again.
  __hash__, __eq__ = object.__hash__, object.__eq__


def ops(config: ConfigDict, view: int, size: int, changes: dict[str, dict]) -> dict[str, tuple[Op, str]]:
  """{name: (op, role)} of the invariance's view number `view`, in the order of application, those that are off left
  out; for views of `size`, with the fields `changes` {name: {field: value}} of its ops changed."""
  found = {}
  for name in config.augment.order:
    kw = {k: v for k, v in config.augment[name].items() if k != 'role'}
    if view and name in config.augment.second:
      kw |= config.augment.second[name]
    kw |= changes.get(name, {})
    if 'size' in registry.schema(augment, name):
      kw['size'] = size
    if config.augment[name].role != 'off':
      found[name] = registry.make(augment, name, **kw), config.augment[name].role
  return found


def chains(config: ConfigDict, size: int, changes: dict[str, dict], wanted: Callable[[str, str], bool]) -> tuple[Op, ...]:
  """A chain a view of the ops for which wanted(name, role); one object twice where the views have the same chance."""
  of = lambda view: augment.chain(*(op for name, (op, role) in ops(config, view, size, changes).items()
                                    if wanted(name, role)))
  return (of(0), of(1)) if config.augment.second else (of(0),) * 2


def seen(config: ConfigDict) -> tuple[Op, ...]:
  """The chain of each of the invariance's views: roles `invariant` and `both`."""
  return chains(config, config.size, {}, lambda name, role: role in ('invariant', 'both'))


def draws(chains: tuple[Op, ...], key: Key, side: int, count: int = SPREAD_DRAWS) -> Action:
  """`count` actions of each of `chains`, pooled, for images of true size (side, side)."""
  size = jnp.full(2, side, jnp.float32)
  drawn = [jax.jit(jax.vmap(lambda k, c=c: c.sample(k, size)), compiler_options=sharding.ONCE)(
      jax.random.split(key_for(key, i), count))
           for i, c in enumerate({id(c): c for c in chains}.values())]
  return jax.tree.map(lambda *a: jnp.concatenate(a), *drawn)


def wire(config: ConfigDict, label: str, section: ConfigDict, canvas: int) -> Wiring:
  """The wiring of objective `label`: its own views have what the invariance's have, and the sensitive ops it is told, in
  units measured on images of side `canvas` (0: in none, of a wiring that is not trained).

  Raises UserError where no role tells it anything, or its `told` names an op that no role tells.
  """
  roles = {name: config.augment[name].role for name in config.augment.order}
  told = [n for n, role in roles.items() if role in ('sensitive', 'both')]
  first = config.augment.order[0] if config.augment.order else 'crop'
  if not told:
    raise UserError(f'{label} is told no augmentation: every role is invariant or off.',
                    f'e.g. --config.augment.{first}.role=both')
  for name in section.told:
    if name not in told:
      raise UserError(f'{label}.told names {name!r}, whose role is {roles.get(name, "not in the config")!r}.',
                      f'Name some of: {", ".join(told)}; or give it the role sensitive or both.')
  told = [n for n in told if n in section.told] if section.told else told
  own = lambda name, role: role in ('invariant', 'both') or role == 'sensitive' and name in told
  build = lambda size, changes: chains(config, size, changes, own)
  chain = chains(config, config.size, {}, lambda name, role: name in told)[0]
  if canvas:  # a fixed key: the units in which a head is told must not depend on the run's seed
    chain = augment.normalised(chain, draws(build(config.size, {}), jax.random.key(0), canvas))
  sensitive = any(roles[n] == 'sensitive' for n in told)
  visible = seen(config)
  return Wiring(label, visible, build(config.size, {}) if sensitive else visible, chain, sensitive, config.size,
                config.batch, build, config.dtype)


def objectives(config: ConfigDict) -> dict[str, ConfigDict]:
  """{label: section} of the equivariance objectives, 'none' left out; a name met again gets a prime."""
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


def own(section: ConfigDict, *drop: str) -> dict:
  """The fields of a section of a config, without its name and those to `drop`."""
  return {k: v for k, v in section.items() if k not in ('name', *drop)}


def wired(config: ConfigDict, canvas: int) -> tuple[dict[str, Wiring], dict[str, Equivariance]]:
  """{label: wiring} and {label: objective} of the equivariance objectives; canvas: see `wire`."""
  sections = objectives(config)
  wirings = {label: wire(config, label, section, canvas) for label, section in sections.items()}
  return wirings, {label: registry.make(equivariance, section.name, **own(section, 'told'))(wirings[label])
                   for label, section in sections.items()}


def merged(own: dict[str, Group], groups: dict[str, Group]) -> dict[str, Group]:
  """`groups` and an objective's `own`. Of a shared one (the reference; the views, where images share draws) the actions hold
  the ops of both, and the sharing is the wider."""
  def one(a: Group, b: Group) -> Group:
    most, other = (a, b) if a.chains[0].name.count('+') >= b.chains[0].name.count('+') else (b, a)
    chains = tuple(augment.united(c, d) for c, d in zip(most.chains, other.chains, strict=True))
    return most._replace(chains=chains, share=max(a.share, b.share))
  return groups | {n: one(groups[n], g) if n in groups else g for n, g in own.items()}


def check(config: ConfigDict, inv: Invariance, equivariances: dict[str, Equivariance], encoder: object) -> None:
  """UserError where there is nothing to learn, or a stage is tapped that the encoder does not have."""
  if inv.projector is None and all(e.feeds and e.predicts is None for e in equivariances.values()):
    raise UserError(f'invariance none with {" and ".join(equivariances) or "equivariance none"}: there is nothing to learn.',
                    'e.g. --config.invariance.name=simclr or --config.equivariance.name=equimod')
  for label, e in equivariances.items():
    stages = len(getattr(encoder, 'dims', ()))
    if e.tap and not 1 <= e.tap <= stages:
      raise UserError(f'{label}.tap_layer is {e.tap}, but encoder {config.encoder.name} has {stages} stages to tap.',
                      'Give 0, the last features' + (f', or 1 to {stages}.' if stages else '.'))


def slow_start(config: ConfigDict, recipe: Recipe) -> str:
  """The line that says that the warm-up of `config` leaves no step for the cosine, '' where it does."""
  epochs = config.optimizer.warmup_epochs
  warmup = round(epochs * recipe.steps_per_epoch)
  if recipe.steps > warmup:
    return ''
  return (f'the warm-up of {epochs:g} epochs, {warmup:,} steps, is not shorter than the run of {recipe.steps:,}: the rate '
          f'only rises, to {recipe.steps / warmup:.3g} of its peak. A tenth of the run: '
          f'--config.optimizer.warmup_epochs={recipe.steps / recipe.steps_per_epoch / 10:.2g}')


def make(config: ConfigDict, num: int, canvas: int, mean: tuple = (0., 0., 0.), std: tuple = (1., 1., 1.),
         classes: int = 0) -> Recipe:
  """The recipe of a resolved `config` for `num` training images of side `canvas`, inputs of `mean` and `std`, in `classes`
  classes where there are labels."""
  if num < config.batch:
    raise UserError(f'batch {config.batch} is larger than the {num} training images.',
                    f'e.g. --config.batch={2 ** int(math.log2(max(num, 1)))}')
  inv = registry.make(invariance, config.invariance.name, **own(config.invariance, 'projector', 'predictor'))
  head = lambda part: mlp.make(**config.invariance[part], dtype=config.dtype) if part in config.invariance else None
  wirings, equivariances = wired(config, canvas)
  encoder = registry.make(nets, config.encoder.name, **own(config.encoder), dtype=config.dtype)
  check(config, inv, equivariances, encoder)
  needed = inv.projector is not None or any('views' in e.uses for e in equivariances.values())
  groups = {'views': Group(seen(config), config.size)} if needed else {}
  for e in equivariances.values():
    groups = merged(e.groups, groups)
  per_epoch = num // config.batch
  steps = config.steps or round(config.epochs * per_epoch)
  if not steps:
    raise UserError(f'config.epochs is {config.epochs:g}, of {per_epoch} steps each: no whole step to train.',
                    'e.g. --config.epochs=1 or --config.steps=10')
  o = config.optimizer
  schedule = optim.warmup_cosine(o.lr, round(o.warmup_epochs * per_epoch), steps, o.end,
                                 per_epoch if o.cosine == 'epoch' else 1)
  network = Network(
      encoder, head('projector'), head('predictor'), heads={k: e.head for k, e in equivariances.items()},
      mean=tuple(mean), std=tuple(std), joint=config.batchnorm == 'joint',
      together=tuple(name for name, group in groups.items() if group.all_of))
  tx = optim.build(o.name, schedule, o.lr, inv.constant, **own(o, 'lr', 'warmup_epochs', 'end', 'cosine'))
  if config.probe and not classes:
    raise UserError(f'config.probe needs labels, and {config.data.name} has none.', 'Leave it out: --config.probe=False')
  probe = Monitor(classes, optax.sgd(PROBE_RATE, momentum=.9)) if config.probe else None
  return Recipe(network, groups, inv, equivariances, wirings, tx, schedule,
                config.batch, per_epoch, steps, config.size, canvas, probe, config.accumulate)

"""A recipe holds all of a run that does not change while it trains; a config becomes one here."""
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from equivariant_ssl import augment, equivariance, invariance, registry
from equivariant_ssl.dotted import short_name
from equivariant_ssl.errors import UserError
from equivariant_ssl.keys import key_for
from equivariant_ssl.nets import mlp
from equivariant_ssl.nets.network import Network
from equivariant_ssl.parallel import sharding
from equivariant_ssl.training import optim
from equivariant_ssl.training.factories import build_encoder, factory_arguments, op_settings
from equivariant_ssl.types import Action, Config, Equivariance, Group, Invariance, Key, Op, Wiring

PROBE_RATE = .1  # learning rate of the online probe, as in solo-learn
SPREAD_DRAWS = 4096  # actions that are drawn to measure the units of the conditioning


class Monitor(NamedTuple):
  """The setting of an online probe: a classifier of `classes` classes, trained by `tx`."""
  classes: int
  tx: optax.GradientTransformation


class Recipe(NamedTuple):
  """The functions, modules and numbers of a run.

  groups:     every view group of a step.
  wirings:    {objective: what the roles of the augmentations mean for it}.
  batch, steps: the number of images of the global batch, and of steps of the whole run.
  size, canvas: the side of a view, and of the stored images, in pixels.
  probe:      a linear classifier that is trained beside the network, on stopped features.
  accumulate, batchnorm_groups: parts and groups of the batch; see config_fields.
  """
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
  batchnorm_groups: int = 1

  def epoch_steps(self, num: int) -> int:
    """The number of steps that show all of `num` images once.

    It is smaller than `steps_per_epoch` where the run began with more images.
    """
    return min(self.steps_per_epoch, num // self.batch)

  # A recipe equals itself alone, so that a function compiled for it is found again.
  __hash__, __eq__ = object.__hash__, object.__eq__


def build_ops(config: Config, view: int, size: int, changes: dict[str, dict]
              ) -> dict[str, tuple[Op, str]]:
  """{name: (op, role)} for view number `view` of the invariance, in the order of application.

  Ops whose role is 'off' are left out. The ops are for views of side `size`; `changes` {name:
  {field: value}} replaces fields of the config.
  """
  ops = {}
  for name in config.augment.order:
    kw, factory = op_settings(config.augment[name]), config.augment[name].get('module', name)
    if view and name in config.augment.second:
      kw |= config.augment.second[name]
    kw |= changes.get(name, {})
    if 'size' in registry.schema(augment, factory):
      kw['size'] = size
    if config.augment[name].role != 'off':
      op = registry.make(augment, factory, **kw)._replace(name=name)
      ops[name] = op, config.augment[name].role
  return ops


def build_chains(config: Config, size: int, changes: dict[str, dict],
                 select: Callable[[str, str], bool]) -> tuple[Op, ...]:
  """The chain of each view, with the ops for which select(name, role) holds.

  Where both views have the same settings, the two chains are one object.
  """
  def build_chain(view: int) -> Op:
    ops = build_ops(config, view, size, changes)
    return augment.chain(*(op for name, (op, role) in ops.items() if select(name, role)))
  if config.augment.second:
    return build_chain(0), build_chain(1)
  return (build_chain(0),) * 2


def view_chains(config: Config) -> tuple[Op, ...]:
  """The chain of each of the invariance's views: the roles `invariant` and `both`."""
  return build_chains(config, config.size, {}, lambda name, role: role in ('invariant', 'both'))


def draw_actions(chains: tuple[Op, ...], key: Key, side: int, count: int = SPREAD_DRAWS) -> Action:
  """`count` actions of each distinct chain of `chains`, for images of true size (side, side)."""
  size = jnp.full(2, side, jnp.float32)

  def draw_from(chain: Op, key: Key) -> Action:
    sample = jax.vmap(lambda k: chain.sample(k, size))
    return jax.jit(sample, compiler_options=sharding.ONCE)(jax.random.split(key, count))
  distinct = {id(chain): chain for chain in chains}.values()
  draws = [draw_from(chain, key_for(key, i)) for i, chain in enumerate(distinct)]
  return jax.tree.map(lambda *a: jnp.concatenate(a), *draws)


def select_augmentations(config: Config, label: str, section: Config) -> list[str]:
  """The augmentations of the objective `label`, in the order of application.

  They are those with the role `sensitive` or `both`, or those of them that `augmentations` of its
  section names. Raises UserError where there are none, or where it names another one.
  """
  roles = {name: config.augment[name].role for name in config.augment.order}
  available = [name for name, role in roles.items() if role in ('sensitive', 'both')]
  first = config.augment.order[0] if config.augment.order else 'crop'
  if not available:
    raise UserError(f'{label} has no augmentations: every role is invariant or off.',
                    f'e.g. --config.augment.{first}.role=both')
  for name in section.augmentations:
    if name not in available:
      raise UserError(f'{label}.augmentations names {name!r}, whose role is '
                      f'{roles.get(name, "not in the config")!r}.',
                      f'Name some of: {", ".join(available)}; or give it the role sensitive or '
                      'both.')
  return [n for n in available if n in (section.augmentations or available)]


def build_wiring(config: Config, label: str, section: Config, canvas: int) -> Wiring:
  """The wiring of the objective `label`, whose settings are `section`.

  canvas: the side of the images on which the units of the conditioning are measured; 0 leaves the
          conditioning without units, for a wiring that is not trained.
  """
  names = select_augmentations(config, label, section)

  def build_own_chains(size: int, changes: dict[str, dict]) -> tuple[Op, ...]:
    return build_chains(config, size, changes, lambda name, role: (
        role in ('invariant', 'both') or role == 'sensitive' and name in names))
  conditioning = build_chains(config, config.size, {}, lambda name, role: name in names)[0]
  if canvas:  # with a fixed key, so that the units do not depend on the seed of the run
    draws = draw_actions(build_own_chains(config.size, {}), jax.random.key(0), canvas)
    conditioning = augment.normalized(conditioning, draws)
  has_own_views = any(config.augment[name].role == 'sensitive' for name in names)
  chains = view_chains(config)
  return Wiring(label, chains, build_own_chains(config.size, {}) if has_own_views else chains,
                conditioning, has_own_views, config.size, config.batch, build_own_chains,
                config.dtype)


def objective_sections(config: Config) -> dict[str, Config]:
  """{label: section} of the equivariance objectives, without 'none'.

  The label is the name of the objective (the last part of a dotted path); a second objective of
  the same name gets a prime.
  """
  several = isinstance(config.equivariance, (list, tuple))
  sections = {}
  for section in config.equivariance if several else [config.equivariance]:
    if section.name != 'none':
      label = short_name(section.name)
      while label in sections:
        label += "'"
      sections[label] = section
  return sections


def build_objectives(config: Config, canvas: int
                     ) -> tuple[dict[str, Wiring], dict[str, Equivariance]]:
  """{label: wiring} and {label: objective} of the equivariance objectives.

  canvas: see `build_wiring`.
  """
  sections = objective_sections(config)
  wirings = {label: build_wiring(config, label, section, canvas)
             for label, section in sections.items()}
  objectives = {}
  for label, section in sections.items():
    arguments = factory_arguments(section, 'augmentations')
    objectives[label] = registry.make(equivariance, section.name, **arguments)(wirings[label])
  return wirings, objectives


def merge_groups(added: dict[str, Group], groups: dict[str, Group]) -> dict[str, Group]:
  """`groups`, with the view groups `added` that an objective needs.

  A group may be in both: the reference, or the views, where images share draws. The actions of the
  merged group hold the ops of both, and as many images share a draw as in the one that shares more.
  """
  def merge(a: Group, b: Group) -> Group:
    more = a.chains[0].name.count('+') >= b.chains[0].name.count('+')
    longer, shorter = (a, b) if more else (b, a)
    chains = tuple(augment.unite(c, d)
                   for c, d in zip(longer.chains, shorter.chains, strict=True))
    return longer._replace(chains=chains, share=max(a.share, b.share))
  return groups | {name: merge(groups[name], group) if name in groups else group
                   for name, group in added.items()}


def check_trainable(config: Config, inv: Invariance, equivariances: dict[str, Equivariance],
                    encoder: object) -> None:
  """Raise a UserError where there is nothing to learn, or a stage to tap does not exist."""
  if inv.projector is None and all(e.feeds and e.predicts is None for e in equivariances.values()):
    raise UserError(f'With invariance none and {" and ".join(equivariances) or "equivariance none"}'
                    ' there is nothing to learn.', 'e.g. --config.invariance=simclr or '
                    '--config.equivariance=equimod')
  for label, e in equivariances.items():
    stages = len(getattr(encoder, 'dims', ()))
    if e.tap and not 1 <= e.tap <= stages:
      raise UserError(f'{label}.tap_layer is {e.tap}, but encoder {config.encoder.name} has '
                      f'{stages} stages to tap.', 'Give 0 for the last features'
                      + (f', or a stage from 1 to {stages}.' if stages else '.'))


def warmup_warning(config: Config, recipe: Recipe) -> str:
  """A line of warning where the warm-up leaves no step for the cosine, else ''."""
  epochs = config.optimizer.warmup_epochs
  warmup = round(epochs * recipe.steps_per_epoch)
  if recipe.steps > warmup:
    return ''
  tenth = recipe.steps / recipe.steps_per_epoch / 10
  return (f'the warm-up of {epochs:g} epochs, {warmup:,} steps, is not shorter than the run of '
          f'{recipe.steps:,} steps: the learning rate only rises, to '
          f'{recipe.steps / warmup:.3g} of its peak. For a warm-up of a tenth of the run: '
          f'--config.optimizer.warmup_epochs={tenth:.2g}')


def count_steps(config: Config, num: int) -> tuple[int, int]:
  """(steps per epoch, steps of the run) on `num` training images; UserError where either is 0."""
  if num < config.batch:
    raise UserError(f'A batch of {config.batch} is larger than the {num} training images.',
                    f'e.g. --config.batch={2 ** int(math.log2(max(num, 1)))}, or '
                    '--config.fit_batch=True')
  per_epoch = num // config.batch
  steps = config.steps or round(config.epochs * per_epoch)
  if not steps:
    raise UserError(f'config.epochs is {config.epochs:g}, of {per_epoch} steps each: there is no '
                    'whole step to train.', 'e.g. --config.epochs=1 or --config.steps=10')
  return per_epoch, steps


def build_groups(config: Config, inv: Invariance, equivariances: dict[str, Equivariance]
                 ) -> dict[str, Group]:
  """Every view group of a step: the invariance's views, if they are used, and the objectives'."""
  used = inv.projector is not None or any('views' in e.uses for e in equivariances.values())
  groups = {'views': Group(view_chains(config), config.size)} if used else {}
  for e in equivariances.values():
    groups = merge_groups(e.groups, groups)
  return groups


def make_recipe(config: Config, num: int, canvas: int, mean: tuple = (0., 0., 0.),
                std: tuple = (1., 1., 1.), classes: int = 0) -> Recipe:
  """The recipe of a resolved config.

  num:       the number of training images.
  canvas:    the side of the stored images, in pixels.
  mean, std: the mean and the standard deviation of the inputs, for each channel.
  classes:   the number of classes; 0 where there are no labels.

  Raises UserError where the config and the data do not fit together.
  """
  per_epoch, steps = count_steps(config, num)
  inv = registry.make(invariance, config.invariance.name,
                     **factory_arguments(config.invariance, 'projector', 'predictor'))
  wirings, equivariances = build_objectives(config, canvas)
  encoder = build_encoder(config)
  check_trainable(config, inv, equivariances, encoder)
  groups = build_groups(config, inv, equivariances)
  o = config.optimizer
  schedule = optim.warmup_cosine(o.lr, round(o.warmup_epochs * per_epoch), steps, o.end,
                                 per_epoch if o.cosine == 'epoch' else 1)
  projector, predictor = (
      mlp.make(**config.invariance[part], dtype=config.dtype) if part in config.invariance else None
      for part in ('projector', 'predictor'))
  network = Network(
      encoder, projector, predictor, heads={k: e.head for k, e in equivariances.items()},
      mean=tuple(mean), std=tuple(std), joint=config.batchnorm == 'joint',
      together=tuple(name for name, group in groups.items() if group.all_of))
  tx = optim.build(o.name, schedule, o.lr, inv.constant,
                   **factory_arguments(o, 'lr', 'warmup_epochs', 'end', 'cosine'))
  if config.probe and not classes:
    raise UserError(f'config.probe needs labels, and the data set {config.data.name} has none.',
                    'Leave the probe out: --config.probe=False')
  probe = Monitor(classes, optax.sgd(PROBE_RATE, momentum=.9)) if config.probe else None
  return Recipe(network, groups, inv, equivariances, wirings, tx, schedule, config.batch, per_epoch,
                steps, config.size, canvas, probe, config.accumulate, config.batchnorm_groups)

"""The arms of a demonstration: configs that are trained over seeds and read out alike."""
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.tree_util import Partial

from equivariant_ssl.config import load_config
from equivariant_ssl.data import digits, holdout
from equivariant_ssl.data.source import Split
from equivariant_ssl.demo.turns import TurnRetrieval, readouts, retriever
from equivariant_ssl.evaluate.frozen import frozen, gains, variables
from equivariant_ssl.evaluate.statistics import mean_std
from equivariant_ssl.parallel import sharding
from equivariant_ssl.shipped import shipped_config
from equivariant_ssl.training.loop import fit
from equivariant_ssl.training.runs import initial_state, prepare_run

# The head of each read-out's column; `turns.readouts` says what each is.
READOUTS = {'turn': 'turn %', 'linear': 'class %', 'both': 'class and turn %',
            'knn': 'class, kNN %', 'few': 'class, 5 labels %'}
LAST_STEPS = 10     # over which the last metrics are averaged
VALIDATION = .2     # of the training digits, where settings are chosen on them
FIRST_SEED = {'test': 0, 'validation': 100}  # no setting is chosen by a seed that is reported
READOUT_COST = 100  # of a read-out, in training steps of an arm without an equivariance objective


class ArmSpec(NamedTuple):
  """An arm to train: a config with overrides, and what it is in words.

  untrained: whether its untrained network is read out too.
  """
  config: str
  overrides: dict[str, str]
  story: str = ''
  untrained: bool = False


class Budget(NamedTuple):
  """How much every arm of a demonstration is trained, and what it is read out on.

  steps: 0 for those of the config. readout: a word of `holdout.READOUTS`.
  """
  seeds: int
  steps: int = 0
  readout: str = 'test'

  @property
  def seed_numbers(self) -> range:
    """The seeds that each arm is trained with."""
    first = FIRST_SEED[self.readout]
    return range(first, first + self.seeds)


class TrainedArm(NamedTuple):
  """What one arm gave over its seeds.

  readouts: {name: per cent for each seed}. gains: EquiMod's gains for each seed, None without
  EquiMod. losses: the loss curve of each seed. last: the mean of each metric over the last steps,
  for each seed. retrieved: of each seed, None without EquiMod; all but the first seed's have no
  `nearest`.
  """
  readouts: dict[str, list[float]]
  gains: list[Any] | None
  losses: list[list[float]]
  last: list[dict[str, float]]
  retrieved: list[TurnRetrieval] | None = None


def arm_config(spec: ArmSpec, budget: Budget) -> Any:
  """Return the config of an arm for a budget."""
  steps = {'steps': str(budget.steps)} if budget.steps else {}
  held_out = {'validation': str(VALIDATION)} if budget.readout == 'validation' else {}
  overrides = {**spec.overrides, **steps, **held_out}
  return load_config(spec.config, overrides, shipped_config(spec.config))


def readout_split(budget: Budget) -> Split:
  """Return the digits that arms are read out on."""
  source = holdout.hold_out(digits.make(), VALIDATION if budget.readout == 'validation' else 0.)
  assert source.test is not None  # the digits have a test split
  return source.test


def readout_images(budget: Budget) -> str:
  """Return what the digits are that arms are read out on, in words."""
  return f'{len(readout_split(budget).images)} ' + {
      'validation': 'training digits that are held out to choose settings on',
      'test': 'held-out test digits'}[budget.readout]


def costs(spec: ArmSpec, budget: Budget) -> tuple[int, int, int]:
  """Return (the steps of one seed, the cost of a step, the cost of a read-out) of an arm."""
  config = arm_config(spec, budget)
  images = round(1000 * (1 - config.validation))
  has_views = not hasattr(config.equivariance, 'name') or config.equivariance.name != 'none'
  return (config.steps or round(config.epochs * (images // config.batch)), 1 + has_views,
          READOUT_COST)


def _empty(with_head: bool) -> TrainedArm:
  return TrainedArm({name: [] for name in READOUTS}, [] if with_head else None, [], [],
                    [] if with_head else None)


def train_arm(name: str, spec: ArmSpec, budget: Budget,
              advance: Callable[[int], None] = lambda cost: None) -> dict[str, TrainedArm]:
  """Train and read out one arm over seeds; return {name: arm}.

  Where the spec says so, its untrained network is another arm, 'untrained'. advance: is called with
  the cost of what was done, step by step.
  """
  run = prepare_run(arm_config(spec, budget), sharding.mesh(jax.devices()[:1]))
  recipe, source = run.recipe, run.source
  assert source is not None and source.test is not None  # the digits have a test split
  network, test = frozen(recipe), source.test
  _, step_cost, readout_cost = costs(spec, budget)
  groups = list(network.pairs.get('equimod', ()))  # the groups whose gains are measured
  retrieve = retriever(recipe, network, 'equimod') if 'rotate' in groups else None
  arms = {name: _empty(bool(groups))} | ({'untrained': _empty(False)} if spec.untrained else {})

  def read_out(key: str, state: Any) -> None:
    arm, values = arms[key], variables(state)
    accuracies = readouts(Partial(network.encode, values), source, recipe.size)
    for readout, value in accuracies.items():
      arm.readouts[readout].append(value)
    if arm.gains is not None and arm.retrieved is not None:
      arm.gains.append({group: gains(recipe, network, state, 'equimod', test, group, 512)
                        for group in groups})
      if retrieve is not None:
        retrieved = retrieve(values, test)
        arm.retrieved.append(retrieved._replace(nearest=retrieved.nearest[:0])
                             if arm.retrieved else retrieved)
    advance(readout_cost)

  for seed in budget.seed_numbers:
    seeded = run._replace(key=jax.random.key(seed))
    first = initial_state(seeded)
    if spec.untrained:
      read_out('untrained', first)
    trained, metrics = _train(seeded, first, lambda: advance(step_cost))
    arms[name].losses.append([float(row['loss']) for row in metrics])
    arms[name].last.append({key: float(np.mean([row[key] for row in metrics[-LAST_STEPS:]]))
                            for key in metrics[0]})
    read_out(name, trained)
  return arms


def _train(run: Any, state: Any, step_done: Callable[[], None]) -> tuple[Any, list[dict]]:
  """Train a run from a state; return the trained state and the metrics of each step."""
  metrics = []

  def on_step(_, step: int, row: dict, clock: Any) -> bool:
    metrics.append(row)
    step_done()
    return False

  trained = fit(run, state, on_step)
  return trained, jax.device_get(metrics)


def show_mean(values) -> str:
  """Return '91.0 ± 1.6', or '91.0' for one seed."""
  mean, std = mean_std(values)
  return f'{mean:.1f}' + (f' ± {std:.1f}' if std is not None else '')

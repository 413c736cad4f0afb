"""What an evaluation is given and what it finds: the nouns of the protocols."""
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jax.tree_util import Partial

from equivariant_ssl.data import card
from equivariant_ssl.data.source import Split
from equivariant_ssl.evaluate import frozen
from equivariant_ssl.training import runs
from equivariant_ssl.training.state import TrainState
from equivariant_ssl.types import Key


def held_out(run: runs.Run) -> Split:
  """The images to measure equivariance on: the test split, or the training split where there is none."""
  return run.source.test or run.source.train


class Options(NamedTuple):
  """epochs, batch: of the probes and of fine-tuning, 0: the protocol's own. images: a file, the list of those to fine-tune
  on. targets: data sets of transfer, () all. root: TFDS's folder. cache: where transfer's features are kept.
  readout: 'test': on the test split, of a run that holds images out of its training to be read out on."""
  epochs: int = 0
  batch: int = 0
  images: str = ''
  targets: tuple[str, ...] = ()
  root: str = ''
  cache: str = ''
  readout: str = ''


class Subject(NamedTuple):
  """A network to evaluate. arrays: its (training features, labels, test features, labels, classes); alone: its `applied`;
  each computed once. key: of the evaluation's own draws."""
  run: runs.Run
  fixed: frozen.Frozen
  state: TrainState
  arrays: Callable[[], tuple]
  alone: Callable[[], np.ndarray]
  key: Key
  options: Options

  @property
  def encode(self) -> Partial:
    return Partial(self.fixed.encode, frozen.variables(self.state))

  @property
  def held_out(self) -> Split:
    return held_out(self.run)


class Found(NamedTuple):
  """numbers: {row: a value, or an Interval}. controls: {row: {control: value or Interval}}. detail: the rest, for the
  result file. name: the protocol, with what was used where it is not the default. complete: whether nothing that was asked
  for was missing; else the result is not read again, but sought anew."""
  name: str
  numbers: dict[str, Any]
  controls: dict[str, dict[str, Any]]
  detail: Any = None
  missing: tuple[str, ...] = ()


class Protocol(NamedTuple):
  """find: Subject -> Found. needs: 'labels', 'target' (an objective that predicts where an embedding goes) or ''.
  percent: whether its numbers are shown times 100. seeded: whether it draws anything of its own. of: () -> the modules,
  functions and constants that a number of it depends on (see `evaluate.cached`). packages: those of others that it computes
  with. version: to be raised when the same constants give other numbers. data: (run, options) -> marks of what it reads."""
  find: Callable[[Subject], Found]
  about: str
  needs: str = ''
  percent: bool = True
  seeded: bool = False
  of: Callable[[], tuple] = tuple
  packages: tuple[str, ...] = ()
  version: int = 1
  data: Callable[[runs.Run, Options], Any] = lambda run, options: card.mark(run.card)

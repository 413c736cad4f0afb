"""What a protocol is given and what it returns: the types that all protocols share."""
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.tree_util import Partial

from equivariant_ssl.data import card
from equivariant_ssl.data.source import Source, Split
from equivariant_ssl.evaluate.frozen import Frozen, variables
from equivariant_ssl.parallel import sharding
from equivariant_ssl.training.runs import Run
from equivariant_ssl.training.state import TrainState
from equivariant_ssl.types import Key


def source_of(run: Run) -> Source:
  """Return the data of a run that was opened with them, as every run in an evaluation is."""
  assert run.source is not None
  return run.source


def config_of(run: Run) -> Any:
  """Return the resolved config of a run, whose sections are read as attributes."""
  return run.config


def process_state(state: TrainState) -> TrainState:
  """Return a state that process 0 of a job can compute with alone, on its first device."""
  return state if jax.process_count() == 1 else jax.tree.map(np.asarray, state)


def held_out(run: Run) -> Split:
  """Return the images to measure equivariance on: the test split, or, without one, the training
  split."""
  source = source_of(run)
  return source.test or source.train


class Options(NamedTuple):
  """The options of an evaluation, as the command line gives them.

  epochs, batch: those of probes and fine-tuning; 0 means the protocol's own. images: a file that
  lists the images to fine-tune on. targets: the data sets of transfer, () for all. root: the folder
  of TFDS. cache: the folder in which transfer keeps its features. readout: 'test' reads out on the
  test split, although the run holds images out of its training to be read out on.
  """
  epochs: int = 0
  batch: int = 0
  images: str = ''
  targets: tuple[str, ...] = ()
  root: str = ''
  cache: str = ''
  readout: str = ''


class Subject(NamedTuple):
  """A network to evaluate.

  functions: the network's evaluation functions. state: its weights. labeled_features: () ->
  (training features, labels, test features, labels, classes). panel_features: () -> features
  before and after each op of the panel (`panel_protocols.panel_features`). Both are computed once.
  key: the key of the evaluation's own draws.
  """
  run: Run
  functions: Frozen
  state: TrainState
  labeled_features: Callable[[], tuple]
  panel_features: Callable[[], np.ndarray]
  key: Key
  options: Options

  @property
  def alone(self) -> 'Subject':
    """The same network for process 0 of a job alone, on the devices of that process."""
    if jax.process_count() == 1:
      return self
    return self._replace(state=process_state(self.state),
                         run=self.run._replace(mesh=sharding.mesh(jax.local_devices())))

  @property
  def encode(self) -> Partial:
    """The frozen encoder: images [B S S C] in [0, 1] -> features [B D]."""
    return Partial(self.functions.encode, variables(self.state))

  @property
  def held_out(self) -> Split:
    """The images to measure equivariance on."""
    return held_out(self.run)


class Measurement(NamedTuple):
  """What a protocol measured of one network.

  name: the protocol, with the settings that were used where they are not the default. numbers:
  {row: a value, or an Interval}. controls: {row: {control: a value, or an Interval}}. detail: the
  rest, for the result file. missing: a line for each thing that was asked for and is not on disk; a
  result with missing things is not read again, but computed anew.
  """
  name: str
  numbers: dict[str, Any]
  controls: dict[str, dict[str, Any]]
  detail: Any = None
  missing: tuple[str, ...] = ()


def _card_mark(run: Run, options: Options) -> Any:
  return card.data_mark(run.card)


class Protocol(NamedTuple):
  """A named way to measure a frozen network.

  measure: Subject -> Measurement. about: one line that describes it. needs: 'labels', 'target' (an
  objective that predicts a target embedding) or ''. reads: 'features' where it reads
  `Subject.labeled_features`, which all processes of a job compute together. together: whether all
  processes measure it, on all of their devices; else process 0 does, alone. percent: whether its
  numbers are shown times 100. seeded: whether it makes random draws of its own. depends_on: () ->
  the modules, functions and constants that its numbers depend on (see `result_files.constants`).
  packages: the installed packages that compute its numbers. version: to be raised when the same
  constants give other numbers. data: (run, options) -> marks of the data that it reads.
  """
  measure: Callable[[Subject], Measurement]
  about: str
  needs: str = ''
  reads: str = ''
  together: bool = False
  percent: bool = True
  seeded: bool = False
  depends_on: Callable[[], tuple] = tuple
  packages: tuple[str, ...] = ()
  version: int = 1
  data: Callable[[Run, Options], Any] = _card_mark

"""The jitted training step of a run, and the data that the step is called with.

Small data sets lie on the devices as a whole; large ones are decoded batch by batch, ahead of the
step. Both give the same batches, bit for bit.
"""
import functools
from collections.abc import Callable, Iterator

import numpy as np

from equivariant_ssl.data import stream
from equivariant_ssl.data.order import epoch_order
from equivariant_ssl.parallel import sharding
from equivariant_ssl.training.runs import Run
from equivariant_ssl.training.step import Batch, resident_step, streamed_step


def compiled(run: Run) -> tuple[Callable, Batch]:
  """Return the jitted step of a run, and its training data on the devices.

  The step is a function (key, state, data, order) -> (state, metrics).
  """
  assert run.source is not None  # a run that trains has its data
  train = run.source.train
  labels = train.labels if run.recipe.probe else None
  data = sharding.place(Batch(sharding.flatten_canvases(train.images), train.sizes, labels),
                        sharding.replicated_sharding(run.mesh))
  return resident_step(run.recipe, run.mesh, rule=run.config.sharding), data


def resident(run: Run, start: int) -> tuple[Callable, Iterator[tuple]]:
  """Return the step of a run whose data are on the devices, and an iterator of its arguments.

  The iterator begins at step `start`. Each item is the tuple of arguments that follow the state.
  """
  step, data = compiled(run)

  def arguments() -> Iterator[tuple]:
    order, count = None, len(data.images)
    epoch_steps = run.recipe.epoch_steps(count)
    for n in range(start, run.recipe.steps):
      if order is None or n % epoch_steps == 0:
        order = sharding.place(np.asarray(epoch_order(run.key, n // epoch_steps, count)),
                               sharding.replicated_sharding(run.mesh))
      yield data, order
  return step, arguments()


def streamed(run: Run, start: int) -> tuple[Callable, Iterator[tuple]]:
  """Return what `resident` returns, for a run whose data are decoded when they are needed."""
  assert run.source is not None  # a run that trains has its data
  recipe, split, train = run.recipe, sharding.batch_sharding(run.mesh), run.source.train
  # The rows of a batch that this process loads.
  local_rows = stream.process_rows(split, recipe.batch)
  epoch_steps = recipe.epoch_steps(len(train.images))

  @functools.lru_cache(2)
  def order(epoch: int) -> np.ndarray:
    return np.asarray(epoch_order(run.key, epoch, len(train.images)))

  def rows(n: int) -> np.ndarray:
    return order(n // epoch_steps)[n % epoch_steps * recipe.batch + local_rows]

  arrays = stream.batches(train, rows, start, recipe.steps)
  batches = (Batch(images, sizes, labels if recipe.probe else None)
             for images, sizes, labels in arrays)
  step = streamed_step(recipe, run.mesh, rule=run.config.sharding)
  return step, ((batch,) for batch in stream.place_batches(batches, split, recipe.batch))

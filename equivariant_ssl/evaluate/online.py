"""kNN accuracy of a network that is still training."""
from collections.abc import Callable
from typing import Any, cast

import numpy as np
from jax.tree_util import Partial

from equivariant_ssl.data.source import Split
from equivariant_ssl.errors import UserError
from equivariant_ssl.evaluate import inputs, knn
from equivariant_ssl.evaluate.frozen import variables
from equivariant_ssl.training.runs import Run
from equivariant_ssl.training.state import TrainState


def monitor(run: Run) -> Callable[[TrainState], dict[str, float]]:
  """Return the function state -> {'knn_top1': a fraction}.

  It is measured on the run's test images (or on those that it holds out in their place); the
  labeled training images are the bank. It is a monitor: to choose a checkpoint by it is to choose
  on test images. Raises UserError where there are no labels.
  """
  source, config = run.source, cast(Any, run.config)
  assert source is not None  # a run that trains has its data
  bank, test = source.bank, source.test
  if bank.labels is None or test is None or test.labels is None:
    raise UserError(f'config.knn_every needs labels, and {config.data.name} has none.',
                    'e.g. --config.knn_every=0')
  bank_labels, test_labels = bank.labels, test.labels
  classes = len(source.classes or ())

  def encode(values: dict, images: Any) -> Any:
    return run.recipe.network.apply(values, images, method='encode')

  def measure(state: TrainState) -> dict[str, float]:
    def features(split: Split) -> np.ndarray:
      return inputs.features(Partial(encode, variables(state)), split,
                             inputs.split_inputs(run.recipe.size, split), mesh=run.mesh)
    result = knn.evaluate(features(bank), bank_labels, features(test), test_labels, classes,
                          k=knn.usual_k(len(bank_labels)), mesh=run.mesh)
    return {'knn_top1': result.top1}
  return measure

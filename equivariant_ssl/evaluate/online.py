"""kNN accuracy of a network that is still training."""
from collections.abc import Callable

from jax.tree_util import Partial

from equivariant_ssl.errors import UserError
from equivariant_ssl.evaluate import inputs, knn
from equivariant_ssl.evaluate.frozen import variables
from equivariant_ssl.training.runs import Run
from equivariant_ssl.training.state import TrainState


def monitor(run: Run) -> Callable[[TrainState], dict[str, float]]:
  """state -> {'knn_top1': a fraction}, on the run's test images (or those it holds out in their place), its labelled
  training images the bank. A monitor: to choose a checkpoint by it is to choose on test images. Raises UserError where there
  are no labels."""
  a, b = run.source.bank, run.source.test
  if a.labels is None or b is None or b.labels is None:
    raise UserError(f'config.knn_every needs labels, and {run.config.data.name} has none.', 'e.g. --config.knn_every=0')

  def encode(values: dict, images):
    return run.recipe.network.apply(values, images, method='encode')

  def measure(state: TrainState) -> dict[str, float]:
    of = lambda split: inputs.features(Partial(encode, variables(state)), split, inputs.of(run.recipe.size, split),
                                       mesh=run.mesh)
    return {'knn_top1': knn.evaluate(of(a), a.labels, of(b), b.labels, len(run.source.classes)).top1}
  return measure

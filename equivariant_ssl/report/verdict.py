"""What a run's page says first: whether the run is over, and whether it has learned anything."""
import math

from equivariant_ssl.evaluate.statistics import (
  COUNTED,
  counted,
  few_images_warning,
  images_classified,
  mean_value,
  quantity,
)
from equivariant_ssl.report import results
from equivariant_ssl.report.run_folder import RunFolder
from equivariant_ssl.training.step_log import COLLAPSED


def _length(folder: RunFolder) -> str:
  """Return whether the run is finished. Its log and its config say it."""
  if not folder.log:
    return 'The run has logged no step yet.'
  last, config = folder.log[-1], folder.config
  step = last['step']
  total = config.steps
  if not total and last.get('epoch'):
    total = round(config.epochs * step / last['epoch'])
  if not total:
    return f'The run is at step {step:,}.'
  return (f'The run is finished: {quantity(step, "step")}.' if step >= total else
          f'The run is not finished: it is at step {step:,} of {total:,}.')


def _collapse(folder: RunFolder) -> str:
  """Return a sentence where the embeddings collapsed, else ''."""
  spread = next((row['std'] for row in reversed(folder.log) if row.get('std') is not None), None)
  return '' if spread is None or spread >= COLLAPSED else (
    f'The embeddings collapsed: their spread is {spread:.2g}, under {COLLAPSED}. They hardly '
    'tell images apart, so the numbers below say little about the method.')


def _accuracy(stem: str, result: dict) -> str:
  """Return the first accuracy of a result beside the untrained network, and what that says.

  A result without a prediction for each image has no noise to compare with: it has numbers alone.
  """
  row = next(iter(result['trained'][0]['numbers']))
  trained, images = results.network_mean(result, 'trained', row), images_classified(result)
  chance = result['trained'][0]['controls'].get(row, {}).get('chance')
  count = f' ({counted(trained, images)})' if 0 < images < COUNTED else ''
  text = f'{stem} {row} is {100 * trained:.1f} %{count}'
  beside = '' if chance is None else f'; chance is {100 * mean_value(chance):.1f} %'
  if 'untrained' not in result:
    return f'{text}{beside}. The untrained network was not measured.'
  untrained = results.network_mean(result, 'untrained', row)
  beside = f', and {100 * untrained:.1f} % without training{beside}'
  if not images:
    return f'{text}{beside}.'
  # Both networks classify the same images, so the spread of the difference is smaller than this.
  spread = sum(p * (1 - p) for p in (trained, untrained))
  noise = 1.96 * math.sqrt(spread / images)
  difference = trained - untrained
  if abs(difference) <= noise or difference == 0:
    says = f'The difference is within the noise of {quantity(images, "test image")}'
  else:
    says = ('Training improved the features' if difference > 0 else
            'Training made the features worse')
    says += f' by {100 * abs(difference):.1f} points'
  return f'{says}: {text}{beside}.'


def lines(folder: RunFolder) -> tuple[str, ...]:
  """Return the sentences that a run's page begins with."""
  files = results.accuracies(folder)
  said = [_length(folder), _collapse(folder)]
  if files:
    stem = next((stem for stem in ('linear', 'cached', 'knn') if stem in files), next(iter(files)))
    images = images_classified(files[stem])
    said.append(_accuracy(stem, files[stem]))
    said.append(few_images_warning(images))
  return tuple(filter(None, said))

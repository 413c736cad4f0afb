"""The named protocols: what each measures of one network, and the controls that stand beside its
numbers."""
import functools
import hashlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.tree_util import Partial

from equivariant_ssl import augment, registry
from equivariant_ssl.data import card
from equivariant_ssl.data.source import Split
from equivariant_ssl.evaluate import (
  care_measure,
  episodes,
  fewshot,
  finetune,
  frozen,
  gains,
  health,
  inputs,
  knn,
  linear,
  logistic,
  panel_protocols,
  probe,
  profile,
  regression,
  retrieval,
  softmax_regression,
  transfer,
)
from equivariant_ssl.evaluate.features import labels_of
from equivariant_ssl.evaluate.statistics import Interval, Result, quantity
from equivariant_ssl.evaluate.subject import (
  Measurement,
  Options,
  Protocol,
  Subject,
  config_of,
  source_of,
)
from equivariant_ssl.training.runs import Run
from equivariant_ssl.training.state import TrainState

BANK = 200  # images whose views are retrieved, at most


def labeled_features(run: Run, functions: frozen.Frozen, state: TrainState) -> tuple:
  """Return (training features, labels, test features, labels, classes), as a classifier of frozen
  features reads them."""
  source, encode = source_of(run), Partial(functions.encode, frozen.variables(state))

  def features(split: Split | None) -> np.ndarray:
    assert split is not None  # `evaluation.unmet_need` has seen to it
    return inputs.features(encode, split, inputs.split_inputs(run.recipe.size, split),
                           mesh=run.mesh)
  return (features(source.bank), source.bank.labels, features(source.test), labels_of(source.test),
          len(source.classes or ()))


def _accuracy(s: Subject, result: Result) -> Measurement:
  """Return the accuracies of a Result on the run's test images.

  Chance is the share of the most common class (for top5, of the five most common classes).
  """
  labels = labels_of(source_of(s.run).test)
  share = np.sort(np.bincount(labels) / len(labels))[::-1]
  numbers = {k: v for k, v in (('top1', result.top1), ('top5', result.top5)) if v is not None}
  chance = {k: float(share[:5 if k == 'top5' else 1].sum()) for k in numbers}
  controls = {k: {'chance': v} for k, v in chance.items()}
  return Measurement(result.protocol, numbers, controls, result)


def _of_features(classify: Callable[..., Result]) -> Callable[[Subject], Measurement]:
  """Return the measure of a protocol that classifies frozen features."""
  return lambda s: _accuracy(s, classify(*s.labeled_features()))


def _of_split_features(classify: Callable[..., Result]) -> Callable[[Subject], Measurement]:
  """Return the measure of a protocol that classifies frozen features on all devices of the run."""
  return lambda s: _accuracy(s, classify(*s.labeled_features(), mesh=s.run.mesh))


def _measure_knn(s: Subject) -> Measurement:
  features = s.labeled_features()
  return _accuracy(s, knn.evaluate(*features, k=knn.usual_k(len(features[0])), mesh=s.run.mesh))


def _measure_probe(s: Subject, name: str) -> Measurement:
  source = source_of(s.run)
  assert source.test is not None  # `evaluation.unmet_need` has seen to it
  return _accuracy(s, probe.evaluate(
      name, s.encode, source.bank, source.test, s.run.recipe.size, len(source.classes or ()), s.key,
      s.options.epochs, s.options.batch, s.run.mesh))


def _measure_few_labels(s: Subject) -> Measurement:
  features = s.labeled_features()
  few = fewshot.few_labels(*features, key=s.key)
  _, train_labels, _, labels, K = features
  counts = np.bincount(labels, minlength=K)
  counts = counts[np.argsort(-np.bincount(train_labels, minlength=K))[:few.classes]]  # took part
  return Measurement(few.protocol, {'top1': few.mean},
                     {'top1': {'chance': float(counts.max() / counts.sum())}}, few)


def _measure_episodes(s: Subject) -> Measurement:
  *_, h, labels, K = s.labeled_features()
  by_row = {}
  for shots in (1, 5):
    large = int((np.bincount(labels, minlength=K) > shots).sum())  # classes that can be drawn
    ways = max(min(5, large), 2)
    by_row[f'{ways}-way {shots}-shot'] = episodes.episodes(h, labels, K, s.key, ways, shots)
  left_out = [f'{row}: {e.protocol.split(", ")[-1]}' for row, e in by_row.items()
              if e.protocol.endswith('left out')]
  numbers = {row: Interval(e.mean, e.low, e.high, len(e.accuracies)) for row, e in by_row.items()}
  controls = {row: {'chance': 1. / int(row.partition('-')[0])} for row in by_row}
  return Measurement('; '.join(['episodes', *left_out]), numbers, controls, by_row)


def _measure_finetune(s: Subject, fraction: float) -> Measurement:
  return _accuracy(s, finetune.evaluate(s.run, s.state, fraction, s.key, s.options.epochs,
                                        s.options.batch, s.options.images))


def _measure_gains(s: Subject) -> Measurement:
  numbers, controls, detail = {}, {}, {}
  for name, pairs in s.functions.pairs.items():
    for change in pairs:
      row = f'{name} {change}'
      m = frozen.gains(s.run.recipe, s.functions, s.state, name, s.held_out, change)
      detail[row], numbers[row] = m, m.true.absolute
      controls[row] = {'shuffled': m.shuffled.absolute, 'zeroed': m.zeroed.absolute, 'identity': 0.,
                       'true - shuffled': m.over_shuffled, 'ratio of means': m.true.ratio}
  return Measurement('gains', numbers, controls, detail)


def _measure_retrieval(s: Subject) -> Measurement:
  numbers, controls, detail = {}, {}, {}
  images = frozen.indexed_images(s.held_out, slice(BANK))
  for name, banks in s.functions.banks.items():
    for change in banks:
      embeddings, actions = frozen.bank(s.functions, s.state, name, images, change)
      predict = Partial(s.functions.answer[name], frozen.variables(s.state))
      retrieved = retrieval.measure(predict, embeddings[:, 0], embeddings, actions,
                                    frozen.identity(s.run.recipe, name),
                                    jax.random.key(frozen.SEED))
      detail[f'{name} {change}'] = retrieved._replace(picked={})
      for k, chance in zip(('mrr', 'h1', 'h5'), retrieved.chance, strict=True):
        row = f'{name} {change} {k}'
        numbers[row] = getattr(retrieved.true, k)
        controls[row] = {control: getattr(getattr(retrieved, control), k)
                         for control in ('shuffled', 'zeroed', 'identity')} | {'chance': chance}
      for k, errors in _errors(s, name, actions, retrieved.picked).items():
        row = f'{name} {change} {k}'
        numbers[row], controls[row] = errors.pop('true'), errors
  return Measurement(f'retrieval of {quantity(len(images[0]), "image")}', numbers, controls, detail)


# {op that rotates: action -> its angle in degrees}
ANGLES = {'turn': lambda action: action.angle, 'rotate': lambda action: 90. * action.turns}


def _errors(s: Subject, name: str, actions: Any, picked: dict[str, np.ndarray]
            ) -> dict[str, dict[str, float]]:
  """Return {'STL error', 'SIE error of OP': {'true' or a control: the value}}.

  The SIE error is given where the objective is conditioned on a rotation and one was drawn.
  """
  ops = frozen.objective_augmentations(s.run.recipe, name)
  encode = jax.jit(jax.vmap(jax.vmap(s.run.recipe.wirings[name].conditioning.encode)))
  encoded = np.asarray(encode({op: actions[op] for op in ops}))
  errors = {'STL error': retrieval.errors(retrieval.stl_error, encoded, picked)}
  for op, angle in ANGLES.items():
    if op in ops and np.ptp(degrees := np.asarray(angle(actions[op]))):
      quaternions = retrieval.quaternion(degrees)
      errors[f'SIE error of {op}'] = retrieval.errors(retrieval.sie_error, quaternions, picked)
  return errors


def _measure_transfer(s: Subject) -> Measurement:
  validation = 0. if s.options.readout == 'test' else config_of(s.run).validation
  rows, missing = transfer.transfer(s.encode, s.options.targets, s.run.recipe.size, s.run.mesh,
                                    s.options.root, s.options.cache, validation)
  lines = tuple(f'transfer to {m.name} left out: it is not on disk. {m.command}' for m in missing)
  return Measurement('transfer', {f'{r.name} ({r.metric})': r.value for r in rows}, {}, rows, lines)


def _finetune_marks(run: Run, options: Options) -> tuple[str, str]:
  """Return the marks of what fine-tuning reads: the data, and the list of images."""
  names = ' '.join(finetune.read_list(options.images)) if options.images else ''
  return card.data_mark(run.card), hashlib.sha256(names.encode()).hexdigest()[:16]


def _transfer_marks(run: Run, options: Options) -> dict[str, Any]:
  """Return the marks of the data sets that transfer reads."""
  return transfer.marks(options.targets, options.root)


def _panel_depends_on(*more: Any) -> tuple:
  """Return what the numbers of a protocol that reads the panel depend on."""
  schemas = {name: registry.schema(augment, name) for name in frozen.PANEL}
  return (frozen.SEED, schemas, panel_protocols.PANEL_TRAIN, panel_protocols.PANEL_TEST,
          panel_protocols.CARE, panel_protocols.SHARED, *more)


def _pairs_depend_on(*more: Any) -> tuple:
  """Return what the numbers of a protocol that reads pairs or banks depend on."""
  return frozen.SEED, sorted(frozen.OUTSIDE), frozen.frozen, gains, *more


def _probe_protocol(name: str) -> Protocol:
  return Protocol(
      functools.partial(_measure_probe, name=name),
      f'SGD of a linear head on augmented images, as {name} has it', 'labels', together=True,
      seeded=True,
      depends_on=lambda: (probe.definition(probe.PROTOCOLS[name]), probe.HELD_OUT,
                          inputs.CENTER_MULTIPLE))


def _finetune_protocol(fraction: float) -> Protocol:
  return Protocol(
      functools.partial(_measure_finetune, fraction=fraction),
      f'fine-tuning on {fraction:.0%} of the labels', 'labels', together=True,
      seeded=True, data=_finetune_marks,
      depends_on=lambda: (finetune.EPOCHS, finetune.BATCH, [*finetune.RATES.items()], fraction))


SKLEARN, SCIPY = ('scikit-learn',), ('scipy',)
PROTOCOLS = {
    'knn': Protocol(
        _measure_knn, 'weighted kNN, k=200 (of under 500 images a tenth), T=.1', 'labels',
        reads='features', together=True, depends_on=lambda: (knn, knn.evaluate)),
    'cached': Protocol(
        _of_split_features(linear.cached), 'logistic regression on un-augmented features', 'labels',
        reads='features', together=True, packages=SKLEARN,
        depends_on=lambda: (linear, linear.cached, softmax_regression)),
    **{name: _probe_protocol(name) for name in probe.PROTOCOLS},
    'logistic': Protocol(
        _of_features(logistic.logistic), 'L-BFGS, 45 penalties (transfer\'s)', 'labels',
        reads='features', packages=SCIPY, depends_on=lambda: (logistic, logistic.logistic)),
    'few_labels': Protocol(
        _measure_few_labels, 'ridge on five labels a class', 'labels',
        reads='features', seeded=True, packages=SKLEARN,
        depends_on=lambda: (fewshot, fewshot.few_labels)),
    'episodes': Protocol(
        _measure_episodes, '2,000 5-way episodes of the test images', 'labels',
        reads='features', seeded=True, depends_on=lambda: (episodes, episodes.episodes)),
    **{f'finetune{round(100 * f)}': _finetune_protocol(f) for f in (.01, .1, 1.)},
    'gains': Protocol(
        _measure_gains, 'EquiMod\'s absolute gain on held-out images', 'target',
        depends_on=_pairs_depend_on),
    'retrieval': Protocol(
        _measure_retrieval, 'which of 50 views of an image is the predicted one', 'target',
        percent=False, depends_on=lambda: _pairs_depend_on(retrieval, BANK)),
    'regression': Protocol(
        functools.partial(panel_protocols.measure_regression, kind='linear'),
        'R^2 of actions read from features, linear', percent=False,
        depends_on=lambda: _panel_depends_on(regression, regression.r2), packages=SCIPY),
    'regression-mlp': Protocol(
        functools.partial(panel_protocols.measure_regression, kind='mlp'),
        'R^2 of actions read from features, MLP', percent=False,
        depends_on=lambda: _panel_depends_on(regression, regression.r2)),
    'care': Protocol(
        panel_protocols.measure_care, 'CARE\'s gamma and Wahba error, no predictor needed',
        percent=False,
        depends_on=lambda: _panel_depends_on(care_measure.gamma, care_measure.over_actions)),
    'profile': Protocol(
        panel_protocols.measure_profile,
        '1 - cosine between an image and itself after one augmentation', percent=False,
        depends_on=lambda: _panel_depends_on(profile, profile.drift)),
    'health': Protocol(
        panel_protocols.measure_health,
        'RankMe, LiDAR, alignment, uniformity, spread of features', percent=False,
        depends_on=lambda: _panel_depends_on(health, health.lidar)),
    'transfer': Protocol(
        _measure_transfer, 'logistic regression on other data sets', packages=SCIPY,
        data=_transfer_marks,
        depends_on=lambda: (transfer.VERSION, transfer.DATASETS, logistic, logistic.logistic)),
}
DEFAULT = ('knn', 'cached', 'few_labels', 'gains', 'profile', 'health')
GROUPS = {'default': DEFAULT,
          'equivariance': ('gains', 'retrieval', 'regression', 'care', 'profile')}

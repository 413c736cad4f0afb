"""The named protocols: what each measures of one network, and the controls that stand beside its numbers."""
import functools
import hashlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.tree_util import Partial

from equivariant_ssl import augment, registry
from equivariant_ssl.data import card
from equivariant_ssl.data.source import Source
from equivariant_ssl.evaluate import care_measure as cares
from equivariant_ssl.evaluate import (
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
  probe,
  profile,
  regression,
  retrieval,
)
from equivariant_ssl.evaluate import transfer as transfers
from equivariant_ssl.evaluate.features import in_batches
from equivariant_ssl.evaluate.statistics import Interval, Result, counted
from equivariant_ssl.evaluate.subject import Found, Options, Protocol, Subject, held_out
from equivariant_ssl.training import runs
from equivariant_ssl.training.state import TrainState

PANEL_TRAIN, PANEL_TEST, BANK, CARE, SHARED = 2000, 1000, 200, 256, 8  # images, at most; actions that all images share


def arrays(run: runs.Run, fixed: frozen.Frozen, state: TrainState) -> tuple:
  """(training features, labels, test features, labels, classes): what a classifier of frozen features reads."""
  source, encode = run.source, Partial(fixed.encode, frozen.variables(state))
  of = lambda split: inputs.features(encode, split, inputs.of(run.recipe.size, split), mesh=run.mesh)
  return of(source.bank), source.bank.labels, of(source.test), source.test.labels, len(source.classes)


def _accuracy(found: Result, labels: np.ndarray) -> Found:
  """Of a Result: chance is the share of the commonest class (of the five commonest)."""
  share = np.sort(np.bincount(labels) / len(labels))[::-1]
  numbers = {k: v for k, v in (('top1', found.top1), ('top5', found.top5)) if v is not None}
  chance = {k: float(share[:5 if k == 'top5' else 1].sum()) for k in numbers}
  return Found(found.protocol, numbers, {k: {'chance': v} for k, v in chance.items()}, found)


def _of_arrays(f: Callable[..., Result]) -> Callable[[Subject], Found]:
  return lambda s: _accuracy(f(*s.arrays()), s.run.source.test.labels)


def _of_images(name: str) -> Callable[[Subject], Found]:
  def find(s: Subject) -> Found:
    a, b, size = s.run.source.bank, s.run.source.test, s.run.recipe.size
    return _accuracy(probe.evaluate(name, s.encode, a, b, size, len(s.run.source.classes), s.key, s.options.epochs,
                                    s.options.batch, s.run.mesh), b.labels)
  return find


def _few_labels(s: Subject) -> Found:
  found = fewshot.few_labels(*s.arrays(), s.key)
  return Found(found.protocol, {'top1': found.mean}, {'top1': {'chance': 1. / found.classes}}, found)


def _episodes(s: Subject) -> Found:
  *_, h, labels, K = s.arrays()
  found = {}
  for shots in (1, 5):
    ways = max(min(5, int((np.bincount(labels, minlength=K) > shots).sum())), 2)  # of classes that are large enough
    found[f'{ways}-way {shots}-shot'] = episodes.episodes(h, labels, K, s.key, ways, shots)
  left = [f'{row}: {e.protocol.split(", ")[-1]}' for row, e in found.items() if e.protocol.endswith('left out')]
  numbers = {k: Interval(e.mean, e.low, e.high, len(e.accuracies)) for k, e in found.items()}
  return Found('; '.join(['episodes', *left]), numbers, {k: {'chance': 1. / int(k.partition('-')[0])} for k in found}, found)


def _finetune(fraction: float) -> Callable[[Subject], Found]:
  def find(s: Subject) -> Found:
    return _accuracy(finetune.evaluate(s.run, s.state, fraction, s.key, s.options.epochs, s.options.batch,
                                       s.options.images), s.run.source.test.labels)
  return find


def _gains(s: Subject) -> Found:
  numbers, controls, detail = {}, {}, {}
  for name, by_op in s.fixed.pairs.items():
    for op in by_op:
      m = detail[f'{name} {op}'] = frozen.gains(s.run.recipe, s.fixed, s.state, name, s.held_out, op)
      numbers[f'{name} {op}'] = m.true.absolute
      controls[f'{name} {op}'] = {'shuffled': m.shuffled.absolute, 'zeroed': m.zeroed.absolute, 'identity': 0.,
                                  'true - shuffled': m.over_shuffled, 'ratio of means': m.true.ratio}
  return Found('gains', numbers, controls, detail)


def _retrieval(s: Subject) -> Found:
  numbers, controls, detail, rows = {}, {}, {}, frozen.rows(s.held_out, slice(BANK))
  for name, by_op in s.fixed.banks.items():
    for op in by_op:
      embeddings, actions = frozen.bank(s.fixed, s.state, name, rows, op)
      predict = Partial(s.fixed.answer[name], frozen.variables(s.state))
      found = retrieval.measure(predict, embeddings[:, 0], embeddings, actions, frozen.identity(s.run.recipe, name),
                                jax.random.key(frozen.SEED))
      detail[f'{name} {op}'] = found._replace(picked={})
      for k, chance in zip(('mrr', 'h1', 'h5'), found.chance, strict=True):
        row = f'{name} {op} {k}'
        numbers[row] = getattr(found.true, k)
        controls[row] = {c: getattr(getattr(found, c), k) for c in ('shuffled', 'zeroed', 'identity')} | {'chance': chance}
      for k, error in _errors(s, name, actions, found.picked).items():
        numbers[f'{name} {op} {k}'], controls[f'{name} {op} {k}'] = error.pop('true'), error
  return Found(f'retrieval of {counted(len(rows[0]), "image")}', numbers, controls, detail)


def _errors(s: Subject, name: str, actions: Any, picked: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
  """{'STL error', and 'SIE error' where a turn is told and drawn: {'true' or a control: the value}}."""
  told = frozen.told(s.run.recipe, name)
  encoded = jax.jit(jax.vmap(jax.vmap(s.run.recipe.wirings[name].conditioning.encode)))({n: actions[n] for n in told})
  found = {'STL error': retrieval.errors(retrieval.stl_error, np.asarray(encoded), picked)}
  angles = {'turn': lambda a: a.angle, 'rotate': lambda a: 90. * a.turns}
  for n in angles:
    if n in told and np.ptp(degrees := np.asarray(angles[n](actions[n]))):
      found[f'SIE error of {n}'] = retrieval.errors(retrieval.sie_error, retrieval.quaternion(degrees), picked)
  return found


def _panel(run: runs.Run, fixed: frozen.Frozen, state: TrainState, rows: tuple, p: float, views: int, shared: int = 0,
           batch: int = 16) -> tuple[np.ndarray, Any]:
  """(features [N P 1 + V D], {op: actions [N V ...]}) of the ops of frozen.PANEL; rows: see `frozen.rows`."""
  shows = inputs.at(run.recipe.size, run.recipe.canvas)
  return in_batches(Partial(_panel_program(fixed.encode, shows, p, views, shared), frozen.variables(state)), rows, batch)


def applied(run: runs.Run, fixed: frozen.Frozen, state: TrainState) -> np.ndarray:
  """Features [N P 2 D] of held-out images before and after each op of frozen.PANEL alone, always applied."""
  return _panel(run, fixed, state, frozen.rows(held_out(run), slice(PANEL_TEST)), 1., 1)[0]


@functools.lru_cache  # a jitted program is found by its function: the same function for every checkpoint
def _panel_program(encode: Callable, shows: inputs.Inputs, p: float, views: int, shared: int) -> Callable:
  return frozen.panel_views(encode, frozen.panel(shows.size, p), shows, views, shared)


def _profile(s: Subject) -> Found:
  h = s.alone()
  found = {op: profile.drift(h[:, i, 0], h[:, i, 1:], jax.random.key(frozen.SEED)) for i, op in enumerate(frozen.PANEL)}
  return Found('profile', {op: d.view for op, d in found.items()},
               {op: {'to another image': d.other, 'ratio': d.ratio} for op, d in found.items()}, found)


def _apart(source: Source) -> tuple[tuple, tuple]:
  """(rows to fit on, rows of other images to test on): of the training split a third, where there is no test split."""
  if source.test is not None:
    return frozen.rows(source.train, slice(PANEL_TRAIN)), frozen.rows(source.test, slice(PANEL_TEST))
  N = len(source.train.images)
  first = N - min(PANEL_TEST, N // 3)
  return frozen.rows(source.train, slice(min(PANEL_TRAIN, first))), frozen.rows(source.train, slice(first, None))


def _regression(kind: str) -> Callable[[Subject], Found]:
  def find(s: Subject) -> Found:
    (h, a), (ht, at) = (_panel(s.run, s.fixed, s.state, rows, .5, 2) for rows in _apart(s.run.source))
    numbers, controls, detail = {}, {}, {}
    for i, (name, op) in enumerate(frozen.panel(s.run.recipe.size, .5).items()):
      x, y = _targets(op, h[:, i], a[name])
      xt, yt = _targets(op, ht[:, i], at[name])
      for form in x:
        found = regression.with_controls(x[form], y[form], xt[form], yt[form], kind, s.key)
        detail[f'{name} {form}'] = found
        for how in ('pooled', 'averaged'):
          numbers[f'{name} {form} {how}'] = getattr(found['true'], how)
          chance = found['true'].pooled_chance if how == 'pooled' else 0.
          controls[f'{name} {form} {how}'] = {'shuffled': getattr(found['shuffled'], how), 'chance': chance}
    return Found(f'regression {kind}: {len(h):,} and {counted(len(ht), "image")}', numbers, controls, detail)
  return find


def _targets(op, h: np.ndarray, actions: Any) -> tuple[dict, dict]:
  """({form: inputs [N ...]}, {form: what to read off them [N A]}): the action of one view, and that between two."""
  first, second = (jax.tree.map(lambda a, v=v: a[:, v], actions) for v in (0, 1))
  alone = np.asarray(jax.jit(jax.vmap(op.encode))(second))
  between = np.asarray(jax.jit(jax.vmap(lambda a, b: augment.relative(op, a, b)))(first, second))
  return ({'absolute': h[:, 2], 'relative': h[:, 1:].reshape(len(h), -1)}, {'absolute': alone, 'relative': between})


def _care(s: Subject) -> Found:
  h, _ = _panel(s.run, s.fixed, s.state, frozen.rows(s.held_out, slice(CARE)), 1., SHARED, shared=1)
  found = {op: cares.over_actions(h[:, i, 0], h[:, i, 1:].transpose(1, 0, 2)) for i, op in enumerate(frozen.PANEL)}
  numbers = {f'{op} {k}': getattr(f, k) for op, f in found.items() for k in ('gamma', 'relative')}
  worst = {k: {'ignores it': 1.} for k in numbers if k.endswith('gamma')}
  return Found(f'care: {SHARED} actions, {counted(len(h), "image")}', numbers, worst, found)


def _health(s: Subject) -> Found:
  crops = s.alone()[:, frozen.PANEL.index('crop')]
  found = health.health(crops[:, 0], crops)
  return Found('health', {k: v for k, v in found._asdict().items() if np.ndim(v) == 0 and v is not None}, {}, found)


def _transfer(s: Subject) -> Found:
  rows, missing = transfers.transfer(s.encode, s.options.targets, s.run.recipe.size, s.run.mesh, s.options.root,
                                     s.options.cache, 0. if s.options.readout == 'test' else s.run.config.validation)
  return Found('transfer', {f'{r.name} ({r.metric})': r.value for r in rows}, {}, rows,
               tuple(f'transfer to {m.name} left out: it is not on disk. {m.command}' for m in missing))


def _tuned_on(run: runs.Run, options: Options) -> tuple[str, str]:
  """The marks of what fine-tuning reads: the data, and the list of images."""
  listed = ' '.join(finetune.read_list(options.images)) if options.images else ''
  return card.mark(run.card), hashlib.sha256(listed.encode()).hexdigest()[:16]


def _transferred_to(run: runs.Run, options: Options) -> dict[str, Any]:
  return transfers.marks(options.targets, options.root)


SKLEARN, SCIPY = ('scikit-learn',), ('scipy',)
PANEL_OF = lambda *more: (frozen.SEED, {name: registry.schema(augment, name) for name in frozen.PANEL}, PANEL_TRAIN,
                          PANEL_TEST, CARE, SHARED, *more)
PAIRS_OF = lambda *more: (frozen.SEED, sorted(frozen.OUTSIDE), frozen.frozen, gains, *more)
PROTOCOLS = {
    'knn': Protocol(_of_arrays(knn.evaluate), 'weighted kNN, k=200 or all of fewer, T=.1', 'labels',
                    of=lambda: (knn, knn.evaluate)),
    'cached': Protocol(_of_arrays(linear.cached), 'logistic regression on un-augmented features', 'labels',
                       of=lambda: (linear, linear.cached), packages=SKLEARN),
    **{name: Protocol(_of_images(name), f'SGD of a linear head on augmented images, as {name} has it', 'labels', seeded=True,
                      of=lambda name=name: (probe.PROTOCOLS[name], probe.HELD_OUT, inputs.CENTRE))
       for name in probe.PROTOCOLS},
    'logistic': Protocol(_of_arrays(logistic.logistic), 'L-BFGS, 45 penalties (transfer\'s)', 'labels',
                         of=lambda: (logistic, logistic.logistic), packages=SCIPY),
    'few_labels': Protocol(_few_labels, 'ridge on five labels a class', 'labels', seeded=True,
                           of=lambda: (fewshot, fewshot.few_labels), packages=SKLEARN),
    'episodes': Protocol(_episodes, '2,000 5-way episodes of the test images', 'labels', seeded=True,
                         of=lambda: (episodes, episodes.episodes)),
    **{f'finetune{round(100 * f)}': Protocol(_finetune(f), f'fine-tuning on {f:.0%} of the labels', 'labels', seeded=True,
                                             data=_tuned_on,
                                             of=lambda f=f: (finetune.EPOCHS, finetune.BATCH, [*finetune.RATES.items()], f))
       for f in (.01, .1, 1.)},
    'gains': Protocol(_gains, 'EquiMod\'s absolute gain on held-out images', 'target', of=lambda: PAIRS_OF()),
    'retrieval': Protocol(_retrieval, 'which of 50 views of an image was asked for', 'target', percent=False,
                          of=lambda: PAIRS_OF(retrieval, BANK)),
    'regression': Protocol(_regression('linear'), 'R^2 of actions read from features, linear', percent=False,
                           of=lambda: PANEL_OF(regression, regression.r2), packages=SCIPY),
    'regression-mlp': Protocol(_regression('mlp'), 'R^2 of actions read from features, MLP', percent=False,
                               of=lambda: PANEL_OF(regression, regression.r2)),
    'care': Protocol(_care, 'CARE\'s gamma and Wahba error, no predictor needed', percent=False,
                     of=lambda: PANEL_OF(cares.gamma, cares.over_actions)),
    'profile': Protocol(_profile, '1 - cosine between an image and itself after one augmentation', percent=False,
                        of=lambda: PANEL_OF(profile, profile.drift)),
    'health': Protocol(_health, 'RankMe, LiDAR, alignment, uniformity, spread of features', percent=False,
                       of=lambda: PANEL_OF(health, health.lidar)),
    'transfer': Protocol(_transfer, 'logistic regression on other data sets', packages=SCIPY, data=_transferred_to,
                         of=lambda: (transfers.VERSION, transfers.DATASETS, logistic, logistic.logistic)),
}
GROUPS = {'equivariance': ('gains', 'retrieval', 'regression', 'care', 'profile')}
DEFAULT = ('knn', 'cached', 'few_labels', 'gains', 'profile', 'health')

"""Protocol 'finetune': the whole network trained on few labels, from the weights of a checkpoint."""
import functools
import math
import os
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jax.tree_util import Partial

from equivariant_ssl.data import stream
from equivariant_ssl.data.holdout import rank_in_class
from equivariant_ssl.data.order import epoch_order
from equivariant_ssl.data.source import Source, Split
from equivariant_ssl.errors import NOT_FINITE, UserError
from equivariant_ssl.evaluate import inputs
from equivariant_ssl.evaluate.features import check_labels
from equivariant_ssl.evaluate.probe import Head
from equivariant_ssl.evaluate.statistics import Result, result
from equivariant_ssl.keys import key_for
from equivariant_ssl.nets.network import Network
from equivariant_ssl.parallel import sharding
from equivariant_ssl.storage import fingerprint
from equivariant_ssl.training.recipe import Recipe
from equivariant_ssl.training.runs import Run
from equivariant_ssl.training.state import TrainState
from equivariant_ssl.types import Array, Key

EPOCHS, BATCH = 20, 256
RATES = {.01: (.03, .08), .1: (.01, .1)}  # {share of the labels: (backbone, head)}, VICReg's (Bardes et al. 2022)


class Tuned(NamedTuple):
  """variables: of the encoder alone, as `network.apply` takes them. head: kernel [D K], bias [K]. losses [steps]."""
  variables: dict
  head: Head
  losses: np.ndarray


def subset(labels: np.ndarray, classes: int, key: Key, fraction: float) -> np.ndarray:
  """Indices of floor(fraction x its size) images of every class, at least 1, drawn without replacement, rising.

  They depend on (key, labels) and `fraction`, and a smaller fraction's are among a larger's. Raises UserError where a
  class has no image, or `fraction` is not in (0, 1].
  """
  if not 0 < fraction <= 1:
    raise UserError(f'{fraction:g} is not a share of the labels.', 'Give a fraction above 0, of at most 1.')
  count = np.bincount(labels, minlength=classes)
  if not count.all():
    raise UserError(f'Class {count.argmin()} has no training image; fine-tuning needs at least 1 of each class.',
                    'Add labelled images of it, or remove the class.')
  rank = rank_in_class(labels, np.asarray(jax.random.uniform(key_for(key, 'subset'), labels.shape)))
  return np.flatnonzero(rank < np.maximum(np.floor(fraction * count + 1e-9), 1.)[labels])


def read_list(path: str | os.PathLike) -> list[str]:
  """The names in a list of images, one a line: SimCLR's imagenet_subsets/1percent.txt and 10percent.txt."""
  try:
    lines = pathlib.Path(path).expanduser().read_text('utf-8-sig').splitlines()  # a BOM is no name
  except (OSError, UnicodeDecodeError) as e:
    raise UserError(f'the list of images {str(path)!r} cannot be read: {e}') from e
  return [line.strip() for line in lines if line.strip()]


def listed(images: Sequence[str] | Sequence[int] | np.ndarray, names: Sequence[str] | None, N: int) -> np.ndarray:
  """Rising indices of the listed `images` among N: they are indices, or file names, matched to the `names` [N].

  A name is matched whole or, where it is the name of one file alone, without its folders. Raises UserError where some
  are not there, are there twice or the names are not known.
  """
  if not len(images):
    raise UserError('The list of images is empty.')
  rows = list(images)
  if isinstance(rows[0], str):
    if names is None:
      raise UserError('The images are listed by name, but the data set keeps no names.', 'List them by number, from 0.')
    where = {}
    for i, name in enumerate(names):
      where[os.path.basename(name)] = -1 if os.path.basename(name) in where else i
    where |= {name: i for i, name in enumerate(names)}
    rows = [where.get(name, -1) for name in rows]
  lost = [image for image, i in zip(images, rows, strict=True) if not 0 <= i < N]
  if lost:
    raise UserError(f'{len(rows) - len(lost):,} of the {len(rows):,} listed images are among the {N:,} training '
                    f'images; {lost[0]} is not.', 'Is it the list of this data set?')
  if len(set(rows)) < len(rows):
    raise UserError(f'{len(rows) - len(set(rows)):,} of the {len(rows):,} listed images are listed twice.')
  return np.sort(np.array(rows, np.int64))


_programs = {}  # {what they depend on: (network, ...)}: a network cannot be hashed; kept, so that its id stays its own


def _step(network: Network, size: int, batch: int, mesh: Mesh | None):
  """(the momentum, one jitted step, (state, key, data, order, index, start, rates) -> (state, loss))."""
  if (id(network), size, batch, mesh) not in _programs:
    _programs[id(network), size, batch, mesh] = network, *_build(network, size, batch, mesh)
  return _programs[id(network), size, batch, mesh][1:]


def _build(network: Network, size: int, batch: int, mesh: Mesh | None):
  trace = optax.trace(.9)
  op = inputs.crop_and_flip(size)

  @functools.partial(jax.jit, donate_argnums=(0,))
  def step(state, key: Key, data: Split, order: Array, index: Array, start: Array, rates: dict):
    weights, stats, memory = state
    rows = jax.lax.dynamic_slice_in_dim(order, start, batch)
    if mesh is not None:
      rows = jax.lax.with_sharding_constraint(rows, sharding.batch_sharding(mesh))
    views = inputs.augmented(op, size, key_for(key, 'augment', index), 'tune', data.images[rows], data.sizes[rows])

    def loss(weights: dict) -> tuple[Array, dict]:
      h, updated = network.apply({'params': weights['backbone'], 'batch_stats': stats}, views, True, method='encode',
                                 mutable=['batch_stats'])
      head = weights['head']
      logits = jnp.matmul(h.astype(jnp.float32), head.kernel, precision='highest') + head.bias[None]
      each = optax.softmax_cross_entropy_with_integer_labels(logits, data.labels[rows])
      return each.mean(), updated.get('batch_stats', {})
    (value, stats), gradient = jax.value_and_grad(loss, has_aux=True)(weights)
    directions, memory = trace.update(gradient, memory)
    weights = {part: jax.tree.map(lambda p, d, rate=rates[part]: p - rate * d, weights[part], directions[part])
               for part in weights}
    return (weights, stats, memory), value

  return trace, step


def train(network: Network, variables: dict, data: Split, size: int, classes: int, key: Key, epochs: int = EPOCHS,
          lr_backbone: float = .01, lr_head: float = .1, batch: int = BATCH, mesh: Mesh | None = None) -> Tuned:
  """SGD of the encoder and of a new linear head on all of `data`; images that do not fill a batch wait an epoch.

  Momentum .9, no weight decay, a cosine to 0 a step; random resized crops (.08, 1) to `size` and flips; BatchNorm by
  the batch's own statistics. The head starts at N(0, .01) and 0, as VICReg's. `variables` are copied.
  """
  N = len(data.images)
  if mesh is not None:
    batch -= batch % mesh.size
  if not 0 < batch <= N:
    raise ValueError(f'a batch of {batch} is not between 1 and the {N} images')
  place = (lambda tree: sharding.place(tree, sharding.replicated_sharding(mesh))) if mesh is not None else jax.device_put
  params, stats = jax.tree.map(lambda a: jnp.array(a, copy=True), (variables['params'], variables['batch_stats']))
  D = jax.eval_shape(lambda v: network.apply(v, jnp.zeros((1, size, size, 3)), method='encode'), variables).shape[-1]
  kernel = .01 * jax.random.normal(key_for(key, 'init'), (D, classes))
  weights = {'backbone': params, 'head': Head(kernel, jnp.zeros(classes))}
  trace, step = _step(network, size, batch, mesh)
  state = place((weights, stats, trace.init(weights)))
  data = data._replace(labels=data.labels.astype(np.int32))
  per_epoch, losses = N // batch, []
  order = lambda epoch: np.asarray(epoch_order(key, epoch, N))
  for index, rows in enumerate(stream.epochs(data, order, batch, per_epoch, epochs * per_epoch, place)):
    cosine = .5 * (1. + math.cos(math.pi * index / (epochs * per_epoch)))
    rates = {'backbone': np.float32(lr_backbone * cosine), 'head': np.float32(lr_head * cosine)}
    state, value = step(state, key, Split(*rows[:3]), rows.order, index, rows.start, rates)
    losses.append(value)
  weights, stats, _ = state
  return Tuned({'params': weights['backbone'], 'batch_stats': stats}, weights['head'], np.array(jax.device_get(losses)))


def _scores(network: Network, tuned: Tuned, data: Split, size: int, batch: int, mesh: Mesh | None) -> np.ndarray:
  """[M K] of the central crops, in eval mode, in float64 so that no rounding decides."""
  def encode(variables: dict, images: Array) -> Array:
    return network.apply(variables, images, method='encode')
  _, encode = _programs.setdefault(id(network), (network, encode))
  h = inputs.encoded(Partial(encode, tuned.variables), data, inputs.centred(inputs.of(size, data)), batch, mesh)
  kernel, bias = (np.asarray(a, np.float64) for a in tuned.head)
  with np.errstate(all='ignore'):  # what has diverged is said by the caller
    return h.astype(np.float64) @ kernel + bias


def _check(state: TrainState, source: Source) -> None:
  for split, what in ((source.bank, 'training'), (source.test, 'test')):
    if split is None or split.labels is None:
      raise UserError(f'{source.name} has no labelled {what} images.', 'Fine-tuning needs labels.')
    check_labels(split.labels, len(split.images), len(source.classes), what)
  bad = fingerprint.survey(fingerprint.flat((state.params, state.stats)))[1]
  if bad:
    raise UserError(f'The weights of the network are not finite: {bad[0]}.',
                    'It has diverged: fine-tune an earlier checkpoint: --step N', NOT_FINITE)


def finetune(recipe: Recipe, state: TrainState, source: Source, key: Key, fraction: float = .1,
             images: Sequence[str] | Sequence[int] | np.ndarray | None = None, names: Sequence[str] | None = None,
             epochs: int = EPOCHS, lr_backbone: float | None = None, lr_head: float | None = None, batch: int = BATCH,
             mesh: Mesh | None = None) -> Result:
  """The test accuracy of the encoder of `state` and a linear head, both trained on a `fraction` of the labels.

  See `subset` for the images, `train` for the training. images: a published list instead (`listed`, `read_list`),
  names: of the training images. lr_backbone, lr_head: None: those of RATES whose share is the nearest. batch: global;
  of fewer images, all of them. Tested on the central crop (`inputs.centred`); the last epoch counts. `state` is
  left as it is. Raises UserError where labels or classes are missing, weights are not finite or training diverged.
  """
  _check(state, source)
  whole = source.bank
  N, K, key = len(whole.images), len(source.classes), key_for(key, 'fine-tune')
  rows = subset(whole.labels, K, key, fraction) if images is None else listed(images, names, N)
  share = fraction if images is None else len(rows) / N
  own = RATES[min(RATES, key=lambda f: abs(math.log(f / share)))]
  rates = tuple(mine if given is None else given for given, mine in zip((lr_backbone, lr_head), own, strict=True))
  B, devices = min(batch, len(rows)), 1 if mesh is None else mesh.size
  if B < devices:
    raise UserError(f'{B} images do not fill {devices} devices.', 'Use more labels: --protocol finetune10 or finetune100.')
  variables = {part: {'encoder': tree['encoder']} if 'encoder' in tree else {}
               for part, tree in (('params', state.params), ('batch_stats', state.stats))}
  data = stream.some(whole, rows)
  tuned = train(recipe.network, variables, data, recipe.size, K, key, epochs, *rates, B, mesh)
  scores = _scores(recipe.network, tuned, source.test, recipe.size, BATCH, mesh)
  if not np.isfinite(scores).all():
    raise UserError(f'Fine-tuning diverged at rates {rates[0]:g} (backbone) and {rates[1]:g} (head).',
                    'Fine-tune an earlier checkpoint: --step N', NOT_FINITE)
  name = f'finetune {100 * fraction:g} %' if images is None else f'finetune {len(rows):,} listed images'
  name += f' epochs={epochs}' + (f' batch={B}' if B != min(BATCH, len(rows)) else '')
  name += '' if rates == own else f' lr={rates[0]:g}/{rates[1]:g}'
  return result(name, scores, source.test.labels, {'images': len(rows), 'batch': B - B % devices, 'epochs': epochs,
                                                   'lr_backbone': rates[0], 'lr_head': rates[1]})


def evaluate(run: Run, state: TrainState, fraction: float, key: Key, epochs: int = 0, batch: int = 0, images: str = ''
             ) -> Result:
  """`finetune` of a run's `state` on its own data and devices; epochs, batch: 0: the protocol's own. images: a file that
  lists those to train on, in place of a `fraction`."""
  return finetune(run.recipe, state, run.source, key, fraction, read_list(images) if images else None, run.source.names,
                  epochs=epochs or EPOCHS, batch=batch or BATCH, mesh=run.mesh)

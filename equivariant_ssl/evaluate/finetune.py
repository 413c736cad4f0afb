"""Protocol 'finetune': the entire network trained on few labels, from the weights of a
checkpoint."""
import functools
import math
import os
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

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
from equivariant_ssl.evaluate.features import check_labels, labels_of
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
# {share of the labels: learning rates (backbone, head)}, VICReg's (Bardes et al. 2022).
RATES = {.01: (.03, .08), .1: (.01, .1)}

Images = Sequence[str] | Sequence[int] | np.ndarray  # file names, or indices


class Tuned(NamedTuple):
  """A fine-tuned network.

  variables: the variables of the encoder alone, as `network.apply` takes them. head: kernel [D K]
  and bias [K]. losses: the loss of each step [steps].
  """
  variables: dict
  head: Head
  losses: np.ndarray


def subset(labels: np.ndarray, classes: int, key: Key, fraction: float) -> np.ndarray:
  """Return the rising indices of a `fraction` of the images of every class, at least 1 of each.

  They are floor(fraction x the class's size) images, drawn without replacement. They depend on
  (key, labels) and `fraction`, and the images of a smaller fraction are among those of a larger
  one. Raises UserError where a class has no image, or `fraction` is not in (0, 1].
  """
  if not 0 < fraction <= 1:
    raise UserError(f'{fraction:g} is not a share of the labels.',
                    'Give a fraction above 0, of at most 1.')
  count = np.bincount(labels, minlength=classes)
  if not count.all():
    raise UserError(f'Class {count.argmin()} has no training image; fine-tuning needs at least 1 '
                    'of each class.', 'Add labeled images of it, or remove the class.')
  noise = np.asarray(jax.random.uniform(key_for(key, 'subset'), labels.shape))
  rank = rank_in_class(labels, noise)
  return np.flatnonzero(rank < np.maximum(np.floor(fraction * count + 1e-9), 1.)[labels])


def read_list(path: str | os.PathLike) -> list[str]:
  """Return the names in a list of images, one a line, such as SimCLR's
  imagenet_subsets/1percent.txt and 10percent.txt."""
  try:
    # utf-8-sig: a byte order mark is not a part of the first name.
    lines = pathlib.Path(path).expanduser().read_text('utf-8-sig').splitlines()
  except (OSError, UnicodeDecodeError) as e:
    raise UserError(f'the list of images {str(path)!r} cannot be read: {e}') from e
  return [line.strip() for line in lines if line.strip()]


def _indices(images: Images, names: Sequence[str]) -> list[int]:
  """Return the index of each image that is listed by its name; -1 where it has none, or several."""
  index_of: dict[str, int] = {}
  for i, name in enumerate(names):
    base = os.path.basename(name)
    index_of[base] = -1 if base in index_of else i
  index_of |= {name: i for i, name in enumerate(names)}
  return [index_of.get(str(image), -1) for image in images]


def listed(images: Images, names: Sequence[str] | None, N: int) -> np.ndarray:
  """Return the rising indices of the listed `images` among N training images.

  images: indices, or file names, which are matched to the `names` [N]: in full, or, where one file
  alone has this name, without its folders. Raises UserError where some images are not found, are
  listed twice, or the names are not known.
  """
  if not len(images):
    raise UserError('The list of images is empty.', 'List one image on each line.')
  rows: list[Any] = list(images)
  if isinstance(rows[0], str):
    if names is None:
      raise UserError('The images are listed by name, but the data set keeps no names.',
                      'List them by number, from 0.')
    rows = _indices(images, names)
  lost = [image for image, i in zip(images, rows, strict=True) if not 0 <= i < N]
  if lost:
    raise UserError(
        f'{len(rows) - len(lost):,} of the {len(rows):,} listed images are among the {N:,} '
        f'training images; {lost[0]} is not.', 'Give the list of this data set.')
  if len(set(rows)) < len(rows):
    raise UserError(f'{len(rows) - len(set(rows)):,} of the {len(rows):,} listed images are listed '
                    'twice.', 'List each image once.')
  return np.sort(np.array(rows, np.int64))


# {what the programs depend on: (network, programs)}. A network cannot be hashed, so its id stands
# for it; the network is stored too, so that no other one gets its id.
_programs: dict[Any, tuple] = {}


def _step(network: Network, size: int, batch: int, mesh: Mesh | None):
  """Return (the momentum, one jitted step).

  The step is (state, key, data, order, index, start, rates) -> (state, loss).
  """
  key = id(network), size, batch, mesh
  if key not in _programs:
    _programs[key] = network, *_build_step(network, size, batch, mesh)
  return _programs[key][1:]


def _build_step(network: Network, size: int, batch: int, mesh: Mesh | None):
  trace = optax.trace(.9)
  op = inputs.crop_and_flip(size)

  @functools.partial(jax.jit, donate_argnums=(0,))
  def step(state, key: Key, data: Any, order: Array, index: Array, start: Array, rates: dict):
    weights, stats, memory = state
    rows = jax.lax.dynamic_slice_in_dim(order, start, batch)
    if mesh is not None:
      rows = jax.lax.with_sharding_constraint(rows, sharding.batch_sharding(mesh))
    views = inputs.training_views(op, size, key_for(key, 'augment', index), 'tune',
                                  sharding.take_canvases(data.images, rows), data.sizes[rows])

    def loss(weights: dict) -> tuple[Array, Any]:
      """Return (the mean cross-entropy, the new BatchNorm statistics)."""
      h, updated = network.apply({'params': weights['backbone'], 'batch_stats': stats}, views,
                                 True, method='encode', mutable=['batch_stats'])
      head = weights['head']
      products = jnp.matmul(h.astype(jnp.float32), head.kernel, precision='highest')
      losses = optax.softmax_cross_entropy_with_integer_labels(products + head.bias[None],
                                                               data.labels[rows])
      return losses.mean(), updated.get('batch_stats', {})
    (value, stats), gradient = jax.value_and_grad(loss, has_aux=True)(weights)
    directions: Any
    directions, memory = trace.update(gradient, memory)

    def descend(part: str) -> Any:
      return jax.tree.map(lambda p, d: p - rates[part] * d, weights[part], directions[part])
    return ({part: descend(part) for part in weights}, stats, memory), value

  return trace, step


def train(network: Network, variables: dict, data: Split, size: int, classes: int, key: Key,
          epochs: int = EPOCHS, lr_backbone: float = .01, lr_head: float = .1, batch: int = BATCH,
          mesh: Mesh | None = None) -> Tuned:
  """Train the encoder and a new linear head on all of `data` by SGD.

  Momentum is .9, without weight decay; the rate falls to 0 along a cosine over steps. Images go
  through random resized crops (.08, 1) to `size`, and flips. BatchNorm uses the batch's own
  statistics. Images that do not fill a batch are left out of an epoch. The head starts at N(0, .01)
  and 0, as VICReg's does. `variables` are copied.
  """
  N = len(data.images)
  if mesh is not None:
    batch -= batch % mesh.size
  if not 0 < batch <= N:
    raise ValueError(f'a batch of {batch} is not between 1 and the {N} images')

  def place(tree: Any) -> Any:
    if mesh is None:
      return jax.device_put(tree)
    return sharding.place(tree, sharding.replicated_sharding(mesh))
  params, stats = jax.tree.map(lambda a: jnp.array(a, copy=True),
                               (variables['params'], variables['batch_stats']))
  image = jnp.zeros((1, size, size, 3))
  h: Any = jax.eval_shape(lambda v: network.apply(v, image, method='encode'), variables)
  kernel = .01 * jax.random.normal(key_for(key, 'init'), (h.shape[-1], classes))
  weights = {'backbone': params, 'head': Head(kernel, jnp.zeros(classes))}
  trace, step = _step(network, size, batch, mesh)
  state = place((weights, stats, trace.init(weights)))
  data = data._replace(labels=labels_of(data).astype(np.int32, copy=False))
  per_epoch, losses = N // batch, []
  steps = epochs * per_epoch

  def order(epoch: int) -> np.ndarray:
    return np.asarray(epoch_order(key, epoch, N))
  for index, rows in enumerate(stream.epoch_rows(data, order, batch, per_epoch, steps, place)):
    cosine = .5 * (1. + math.cos(math.pi * index / steps))
    rates = {'backbone': np.float32(lr_backbone * cosine), 'head': np.float32(lr_head * cosine)}
    state, value = step(state, key, Split(*rows[:3]), rows.order, index, rows.start, rates)
    losses.append(value)
  weights, stats, _ = state
  tuned = {'params': weights['backbone'], 'batch_stats': stats}
  return Tuned(tuned, weights['head'], np.array(jax.device_get(losses)))


def _scores(network: Network, tuned: Tuned, data: Split, size: int, batch: int, mesh: Mesh | None
            ) -> np.ndarray:
  """Return the scores [M K] of the central crops, in eval mode, in float64 so that no rounding
  decides."""
  def encode(variables: dict, images: Array) -> Any:
    return network.apply(variables, images, method='encode')
  _, encode = _programs.setdefault(id(network), (network, encode))
  test_inputs = inputs.with_center_crop(inputs.split_inputs(size, data))
  h = inputs.unchecked_features(Partial(encode, tuned.variables), data, test_inputs, batch, mesh)
  kernel, bias = (np.asarray(a, np.float64) for a in tuned.head)
  with np.errstate(all='ignore'):  # the caller reports features that are not finite
    return h.astype(np.float64) @ kernel + bias


def _check(state: TrainState, source: Source) -> None:
  for split, part in ((source.bank, 'training'), (source.test, 'test')):
    if split is None or split.labels is None:
      raise UserError(f'{source.name} has no labeled {part} images.', 'Fine-tuning needs labels.')
    check_labels(split.labels, len(split.images), len(source.classes or ()), part)
  bad = fingerprint.digest_leaves(fingerprint.flatten((state.params, state.stats)))[1]
  if bad:
    raise UserError(f'The weights of the network are not finite: {bad[0]}.',
                    'It has diverged: fine-tune an earlier checkpoint: --step N', NOT_FINITE)


def finetune(recipe: Recipe, state: TrainState, source: Source, key: Key, fraction: float = .1,
             images: Images | None = None, names: Sequence[str] | None = None, epochs: int = EPOCHS,
             lr_backbone: float | None = None, lr_head: float | None = None, batch: int = BATCH,
             mesh: Mesh | None = None) -> Result:
  """Return the test accuracy of the encoder of `state` and a linear head, both trained on a
  `fraction` of the labels.

  See `subset` for the images and `train` for the training. images: a published list of images in
  place of a fraction (see `listed`, `read_list`); names: the names of the training images.
  lr_backbone, lr_head: None means those of RATES whose share is the nearest. batch: the global
  batch; fewer images than that are one batch. The network after the last epoch is tested, on the
  central crop (`inputs.with_center_crop`). `state` is not changed. Raises UserError where labels or
  classes are missing, weights are not finite or training diverged.
  """
  _check(state, source)
  bank, labels = source.bank, labels_of(source.bank)
  N, K, key = len(bank.images), len(source.classes or ()), key_for(key, 'fine-tune')
  rows = subset(labels, K, key, fraction) if images is None else listed(images, names, N)
  share = fraction if images is None else len(rows) / N
  published = RATES[min(RATES, key=lambda f: abs(math.log(f / share)))]
  rates = (published[0] if lr_backbone is None else lr_backbone,
           published[1] if lr_head is None else lr_head)
  B, devices = min(batch, len(rows)), 1 if mesh is None else mesh.size
  if B < devices:
    raise UserError(f'{B} images do not fill {devices} devices.',
                    'Use more labels: --protocol finetune10 or finetune100.')
  variables = {part: {'encoder': tree['encoder']} if 'encoder' in tree else {}
               for part, tree in (('params', state.params), ('batch_stats', state.stats))}
  tuned = train(recipe.network, variables, stream.take_rows(bank, rows), recipe.size, K, key,
                epochs, *rates, B, mesh)
  assert source.test is not None  # `_check` has seen to it
  scores = _scores(recipe.network, tuned, source.test, recipe.size, BATCH, mesh)
  if not np.isfinite(scores).all():
    raise UserError(
        f'Fine-tuning diverged at rates {rates[0]:g} (backbone) and {rates[1]:g} (head).',
        'Fine-tune an earlier checkpoint: --step N', NOT_FINITE)
  name = f'finetune {100 * fraction:g} %'
  if images is not None:
    name = f'finetune {len(rows):,} listed images'
  name += f' epochs={epochs}' + (f' batch={B}' if B != min(BATCH, len(rows)) else '')
  name += '' if rates == published else f' lr={rates[0]:g}/{rates[1]:g}'
  return result(name, scores, source.test.labels,
                {'images': len(rows), 'batch': B - B % devices, 'epochs': epochs,
                 'lr_backbone': rates[0], 'lr_head': rates[1]})


def evaluate(run: Run, state: TrainState, fraction: float, key: Key, epochs: int = 0,
             batch: int = 0, images: str = '') -> Result:
  """Return the `finetune` result of a run's `state`, on its own data and devices.

  epochs, batch: 0 means the protocol's own. images: a file that lists the images to train on, in
  place of a `fraction`.
  """
  assert run.source is not None  # a run is evaluated with its data
  return finetune(run.recipe, state, run.source, key, fraction,
                  read_list(images) if images else None, run.source.names,
                  epochs=epochs or EPOCHS, batch=batch or BATCH, mesh=run.mesh)

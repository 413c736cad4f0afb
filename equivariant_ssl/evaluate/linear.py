"""Linear classification of a frozen encoder's features, under named protocols."""
import functools
import math
import warnings
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jax.tree_util import Partial
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from equivariant_ssl import augment, modules, shard
from equivariant_ssl.augment.pixels import resample
from equivariant_ssl.data.order import epoch_order
from equivariant_ssl.errors import NOT_FINITE, UserError
from equivariant_ssl.evaluate.features import as_partial, check_labelled, check_labels, features
from equivariant_ssl.evaluate.statistics import Result, accuracy, result
from equivariant_ssl.keys import key_for
from equivariant_ssl.types import Array, Group, Image, Key

PENALTIES = (1., .1, .01, 1e-3, 1e-4, 1e-5)  # of |w|^2 / 2, beside the mean cross-entropy
HELD_OUT = .2
ITERATIONS = 300


def one_thread():
  """A context in which BLAS uses one thread: the same bits on any number of cores, and no threads that wait for
  one another (`cached` of 1000 x 128 on 2 busy cores: 16.4 s with two threads, .5 with one)."""
  return threadpool_limits(1, user_api='blas')


class Head(NamedTuple):
  """kernel [D K], bias [K]."""
  kernel: Array
  bias: Array


def standardiser(train: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
  """features [N D] -> (features - mean) / std, float64, by the statistics of `train`; dead dimensions become 0."""
  mean, std = train.mean(0, dtype=np.float64), train.std(0, dtype=np.float64)
  alive = std > 1e-5 * max(std.max(), 1e-30)
  scale = np.where(alive, 1. / np.where(alive, std, 1.), 0.)
  return lambda values: (values - mean) * scale


def held_out(labels: np.ndarray, fraction: float = HELD_OUT) -> np.ndarray:
  """A mask [N]: floor(fraction x its size) of every class, by a fixed seed: the same for every network and run."""
  noise = np.random.RandomState(0).rand(len(labels))
  order = np.lexsort((noise, labels))
  rank = np.empty(len(labels), np.int64)
  count = np.bincount(labels)
  rank[order] = np.concatenate([np.arange(c) for c in count])
  return rank < np.floor(count * fraction)[labels]


def _fit(x: np.ndarray, y: np.ndarray, penalties: tuple[float, ...]):
  """Yield (penalty, model) of multinomial logistic regressions, each started at the one before."""
  model = LogisticRegression(max_iter=ITERATIONS, warm_start=True)
  for penalty in penalties:
    model.set_params(C=1. / (penalty * len(x)))
    with warnings.catch_warnings():
      warnings.simplefilter('ignore', ConvergenceWarning)  # `converged` says so beside the number
      yield penalty, model.fit(x, y)


def cached(train_features: np.ndarray, train_labels: np.ndarray, test_features: np.ndarray,
           test_labels: np.ndarray, classes: int, penalties: tuple[float, ...] = PENALTIES) -> Result:
  """Protocol 'cached': logistic regression on features [N D], [M D] of un-augmented images.

  Standardised with training statistics; the L2 penalty is chosen by accuracy on a fifth of the training set (of
  equal ones the largest), then fitted to all of it by L-BFGS and tested once. Convex, with one optimum: no
  learning rate, no key. Raises UserError where the training labels are of one class.
  """
  check_labelled(train_features, train_labels, classes, 'training')
  check_labelled(test_features, test_labels, classes, 'test')
  out = held_out(train_labels)
  if len(np.unique(train_labels[~out])) < 2:
    raise UserError('All training images are of one class.', 'A linear probe needs two classes or more.')
  standard = standardiser(train_features)
  train, test = standard(train_features), standard(test_features)
  penalties = tuple(sorted(penalties, reverse=True))
  best, held = penalties[0], None
  with one_thread():
    if out.any():
      tried = [(accuracy(model.predict(train[out]), train_labels[out]), penalty)
               for penalty, model in _fit(train[~out], train_labels[~out], penalties)]
      held, best = max(tried)
    (_, model), = _fit(train, train_labels, (best,))
    scores = np.full((len(test), classes), -np.inf)
    scores[:, model.classes_] = model.predict_log_proba(test)
  return result('cached', scores, test_labels, {'penalty': best, 'held_out_top1': held,
                                                'converged': bool(model.n_iter_[0] < ITERATIONS)})


def centre(images: Array) -> Array:
  """Resize to 36/32 of the side (bicubic), then the central crop of the side: [B S S 3] -> [B S S 3]."""
  side = images.shape[1]
  big = round(side * 36 / 32)
  start = round((big - side) / 2)
  zero, one = jnp.zeros(()), jnp.ones(())
  large = jax.vmap(lambda image: resample(image, zero, zero, one, one, big, 'bicubic'))(images)
  return large[:, start:start + side, start:start + side]


def _encode_centre(encode: Callable[[Array], Array], images: Array) -> Array:
  return encode(centre(images))


def torch_linear(key: Key, D: int, K: int) -> Head:
  """A Linear as torch draws it by default: kernel and bias uniform within 1 / sqrt(D)."""
  bound = 1 / math.sqrt(D)
  draw = lambda name, *shape: jax.random.uniform(key_for(key, name), shape, minval=-bound, maxval=bound)
  return Head(draw('kernel', D, K), draw('bias', K))


def logits(head: Head, features: Array) -> Array:
  """[B K]."""
  return jnp.matmul(features, head.kernel, precision='highest') + head.bias[None, :]


@functools.lru_cache
def _equimod_step(side: int, batch: int, steps_per_epoch: int, steps: int, mesh: Mesh | None):
  """(the optimiser, one jitted step of the protocol)."""
  cosine = lambda count: 1e-4 + (.2 - 1e-4) * .5 * (1. + jnp.cos(math.pi * count.astype(jnp.float32) / steps))
  tx = optax.sgd(cosine, momentum=.9, nesterov=True)
  op = augment.chain(modules.make(augment, 'crop', size=side, scale=(.08, 1.), method='bicubic'),
                     modules.make(augment, 'flip', p=.5))

  @functools.partial(jax.jit, donate_argnums=(1,))
  def step(encode, state, key, images, labels, order, index):
    head, memory = state
    rows = jax.lax.dynamic_slice_in_dim(order, index % steps_per_epoch * batch, batch)
    if mesh is not None:
      rows = jax.lax.with_sharding_constraint(rows, shard.split(mesh))
    shown = Image(images[rows].astype(jnp.float32) / 255., jnp.full((batch, 2), side, jnp.float32))
    views = augment.views({'probe': Group((op,), side)}, key_for(key, 'augment', index), shown)['probe'].images
    h = encode(views[:, 0]).astype(jnp.float32)
    loss = lambda head: optax.softmax_cross_entropy_with_integer_labels(logits(head, h), labels[rows]).mean()
    updates, memory = tx.update(jax.grad(loss)(head), memory, head)
    return optax.apply_updates(head, updates), memory

  return tx, step


def equimod_head(encode: Callable[[Array], Array], images: np.ndarray, labels: np.ndarray, classes: int, key: Key,
                 epochs: int, batch: int, mesh: Mesh | None = None) -> Head:
  """The head that protocol 'equimod' trains; see `equimod`."""
  N, side = len(images), images.shape[1]
  B = min(batch, N)
  if mesh is not None:
    shard.check_batch(B, mesh.size)
  per_epoch = N // B
  place = (lambda tree: shard.place(tree, shard.replicated(mesh))) if mesh is not None else jax.device_put
  encode, key = place(as_partial(encode)), key_for(key, 'probe')
  D = jax.eval_shape(encode, jax.ShapeDtypeStruct((B, side, side, images.shape[3]), jnp.float32)).shape[-1]
  head = torch_linear(key_for(key, 'init'), D, classes)
  tx, step = _equimod_step(side, B, per_epoch, epochs * per_epoch, mesh)
  state, resident = place((head, tx.init(head))), place((images, labels.astype(np.int32)))
  for epoch in range(epochs):
    order = place(epoch_order(key, epoch, N))
    for index in range(epoch * per_epoch, (epoch + 1) * per_epoch):
      state = step(encode, state, key, *resident, order, index)
  return state[0]


def equimod(encode: Callable[[Array], Array], train_images: np.ndarray, train_labels: np.ndarray,
            test_images: np.ndarray, test_labels: np.ndarray, classes: int, key: Key, epochs: int = 90,
            batch: int = 256, mesh: Mesh | None = None) -> Result:
  """Protocol 'equimod' (Devillers & Lefort 2022, the official code on CIFAR): the head on augmented images.

  encode: a frozen encoder in eval mode, [B S S 3] in [0, 1] -> [B D]; best a Partial (features.in_batches).
  images: uint8 [N S S 3]. Torch's default Linear; SGD, Nesterov .9, rate .2 whatever the batch, cosine a step to
  1e-4, no weight decay; random resized crop (.08, 1) and flip; tested on `centre`. The last epoch counts. Images
  that do not fill a batch are left out of an epoch, as there; fewer than `batch` are one batch. The protocol
  is named with the epochs and batch where they are not the published ones. `mesh` splits the batch over devices.
  """
  for images, labels, what in ((train_images, train_labels, 'training'), (test_images, test_labels, 'test')):
    check_labels(labels, len(images), classes, what)
  head = equimod_head(encode, train_images, train_labels, classes, key, epochs, batch, mesh)
  h = features(Partial(_encode_centre, as_partial(encode)), test_images, batch, mesh)
  kernel, bias = (np.asarray(a, np.float64) for a in head)
  scores = h @ kernel + bias
  if not np.isfinite(scores).all():
    raise UserError('The linear probe of protocol equimod diverged: its rate is fixed at .2.',
                    'Use the protocol cached, which has no rate.', NOT_FINITE)
  B = min(batch, len(train_images))
  name = 'equimod' if (epochs, B) == (90, 256) else f'equimod epochs={epochs} batch={B}'
  return result(name, scores, test_labels, {'lr': .2, 'epochs': epochs, 'batch': B})

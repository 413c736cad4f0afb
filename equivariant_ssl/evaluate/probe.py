"""Linear classification by SGD on the frozen features of augmented images, under the field's named
protocols."""
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from equivariant_ssl.data import stream
from equivariant_ssl.data.order import epoch_order
from equivariant_ssl.data.source import Split
from equivariant_ssl.errors import NOT_FINITE, UserError
from equivariant_ssl.evaluate import inputs
from equivariant_ssl.evaluate.features import as_partial, check_labels, labels_of
from equivariant_ssl.evaluate.linear import held_out_mask
from equivariant_ssl.evaluate.statistics import Result, accuracy, result
from equivariant_ssl.keys import key_for
from equivariant_ssl.parallel import sharding
from equivariant_ssl.types import Array, Key

HELD_OUT = .1  # the share of the training images on which a rate is chosen


class ProbeSettings(NamedTuple):
  """Settings of a probe: SGD with momentum .9 and no weight decay, on torch's default Linear.

  Training images go through a random resized crop (.08, 1) and a flip.

  rates: learning rates. Several are trained side by side on one pass of features; one is chosen on
  a tenth of the training images (of equal ones the lowest), then the head is trained anew on all of
  them. per: the batch that the rates are for, with which they scale (None: they do not scale). end:
  the rate at the end of a cosine over steps. center_crop: whether it is tested on a central crop
  (`inputs.with_center_crop`). partial_batch: whether an epoch's last batch is what is left of the
  images; else images that do not fill a batch are left out of an epoch.
  """
  rates: tuple[float, ...]
  epochs: int
  batch: int
  per: int | None = None
  nesterov: bool = True
  end: float = 0.
  center_crop: bool = True
  partial_batch: bool = False


PROTOCOLS = {
    # Devillers & Lefort 2022, official code.
    'equimod': ProbeSettings((.2,), 90, 256, end=1e-4),
    # Dangovski et al. 2022, official code, CIFAR-10: the mean of five heads, --seeds 0,1,2,3,4.
    # (There a test batch counts the same whatever its size; here an image does.)
    'essl': ProbeSettings((30.,), 100, 256, nesterov=False),
    # Chen et al. 2020, official code, CIFAR-10.
    'simclr': ProbeSettings((.1,), 100, 512, per=256, center_crop=False),
    # Grill et al. 2020, appendix: batch 1024.
    'byol': ProbeSettings((.05, .1, .2, .3, .4), 80, 1024, per=None),
    # Our own: the protocol of equimod, at any rate.
    'linear': ProbeSettings((.003, .01, .03, .1, .2, .3, 1., 3., 10., 30.), 90, 256,
                            partial_batch=True),
}


def definition(protocol: ProbeSettings) -> dict[str, Any]:
  """Return the settings of a protocol as result files name them.

  Files have older names for two of them: with other names, stored results would be computed again.
  """
  names = {'center_crop': 'centred', 'partial_batch': 'whole'}
  return {names.get(k, k): v for k, v in protocol._asdict().items()}


class Head(NamedTuple):
  """R linear heads: kernel [R D K], bias [R K]. A single head has no axis R."""
  kernel: Array
  bias: Array


def torch_linear(key: Key, D: int, K: int) -> Head:
  """Return a Linear as torch draws it by default: kernel [D K] and bias [K] uniform within
  1 / sqrt(D)."""
  bound = 1 / math.sqrt(D)

  def draw(name: str, *shape: int) -> Array:
    return jax.random.uniform(key_for(key, name), shape, minval=-bound, maxval=bound)
  return Head(draw('kernel', D, K), draw('bias', K))


def logits(head: Head, features: Array) -> Array:
  """Return the logits [R B K] of R heads on features [B D]."""
  products = jnp.einsum('bd,rdk->rbk', features, head.kernel, precision='highest')
  return products + head.bias[:, None, :]


@functools.lru_cache
def _step(size: int, batch: int, steps: int, nesterov: bool, mesh: Mesh | None):
  """Return (the momentum, one jitted step of all heads)."""
  trace = optax.trace(.9, nesterov)
  op = inputs.crop_and_flip(size)

  @functools.partial(jax.jit, donate_argnums=(1,))
  def step(encode, state, key, images, sizes, labels, order, start, left, index, rates, end):
    heads, memory = state
    rows = jax.lax.dynamic_slice_in_dim(order, start, batch)
    if mesh is not None:
      rows = jax.lax.with_sharding_constraint(rows, sharding.batch_sharding(mesh))
    # What fills up the last batch of an epoch does not count.
    real = (jnp.arange(batch) < left).astype(jnp.float32)
    views = inputs.training_views(op, size, key_for(key, 'augment', index), 'probe',
                                  sharding.take_canvases(images, rows), sizes[rows])
    h = encode(views).astype(jnp.float32)

    def loss(heads: Head) -> Array:
      """Return the sum of the heads' losses: each head has its own gradient."""
      losses = optax.softmax_cross_entropy_with_integer_labels(logits(heads, h),
                                                               labels[rows][None, :])
      return (losses * real[None, :]).sum() / real.sum()
    directions, memory = trace.update(jax.grad(loss)(heads), memory)
    rate = end + (rates - end) * .5 * (1. + jnp.cos(math.pi * index.astype(jnp.float32) / steps))

    def descend(parameter: Array, direction: Array) -> Array:
      return parameter - rate.reshape(-1, *[1] * (parameter.ndim - 1)) * direction
    return jax.tree.map(descend, heads, directions), memory

  return trace, step


def train(protocol: ProbeSettings, encode: Callable[[Array], Array], data: Split, size: int,
          classes: int, key: Key, mesh: Mesh | None = None) -> Head:
  """Return the heads [R ...] that `protocol` trains, one for each rate, on the labeled images of
  `data`, at `size` pixels."""
  N = len(data.images)
  B = min(protocol.batch, N)
  if mesh is not None:
    B = -(-B // mesh.size) * mesh.size if protocol.partial_batch else B
    sharding.check_batch(B, mesh.size, option='--batch=')
  per_epoch = -(-N // B) if protocol.partial_batch else N // B

  def place(tree: Any) -> Any:
    if mesh is None:
      return jax.device_put(tree)
    return sharding.place(tree, sharding.replicated_sharding(mesh))
  encode, key = place(as_partial(encode)), key_for(key, 'probe')
  image = jax.ShapeDtypeStruct((B, size, size, data.images.shape[3]), jnp.float32)
  D = jax.eval_shape(encode, image).shape[-1]
  rates = np.array(protocol.rates, np.float32) * (B / protocol.per if protocol.per else 1.)
  heads = jax.tree.map(lambda a: jnp.repeat(a[None], len(rates), 0),
                       torch_linear(key_for(key, 'init'), D, classes))
  trace, step = _step(size, B, protocol.epochs * per_epoch, protocol.nesterov, mesh)
  state = place((heads, trace.init(heads)))
  rates, end = place((rates.astype(np.float32), np.float32(protocol.end)))

  def order(epoch: int) -> np.ndarray:
    return np.resize(np.asarray(epoch_order(key, epoch, N)), max(N, per_epoch * B))
  data = data._replace(labels=labels_of(data).astype(np.int32, copy=False))
  steps = protocol.epochs * per_epoch
  for index, rows in enumerate(stream.epoch_rows(data, order, B, per_epoch, steps, place)):
    left = N - index % per_epoch * B
    state = step(encode, state, key, *rows[:3], rows.order, rows.start, left, index, rates, end)
  return state[0]


def _scores(protocol: ProbeSettings, encode: Callable[[Array], Array], heads: Head, data: Split,
            size: int, mesh: Mesh | None) -> np.ndarray:
  """Return the scores [R M K] of un-augmented images, in float64 so that no rounding decides."""
  test_inputs = inputs.split_inputs(size, data)
  if protocol.center_crop:
    test_inputs = inputs.with_center_crop(test_inputs)
  h = inputs.features(encode, data, test_inputs, protocol.batch, mesh)
  kernel, bias = (np.asarray(a, np.float64) for a in heads)
  return np.einsum('md,rdk->rmk', h, kernel) + bias[:, None, :]


def evaluate(name: str, encode: Callable[[Array], Array], data: Split, test: Split, size: int,
             classes: int, key: Key, epochs: int = 0, batch: int = 0, mesh: Mesh | None = None
             ) -> Result:
  """Return the accuracy on `test` of a head that is trained on `data` under protocol `name` of
  PROTOCOLS.

  encode: a frozen encoder in eval mode, [B size size 3] in [0, 1] -> [B D]; best a Partial (see
  `features.in_batches`). epochs, batch: where > 0, they replace the protocol's, and the result's
  name says so. The head after the last epoch is tested. Fewer images than a batch are one batch.
  `mesh` splits the batch over devices. Raises UserError where labels are missing or the head
  diverged.
  """
  for split, part in ((data, 'training'), (test, 'test')):
    check_labels(split.labels, len(split.images), classes, part)
  published, labels = PROTOCOLS[name], labels_of(data)
  protocol = published._replace(epochs=epochs or published.epochs,
                                batch=min(batch or published.batch, len(data.images)))
  chosen: dict[str, Any] = {'epochs': protocol.epochs, 'batch': protocol.batch}
  out = held_out_mask(labels, HELD_OUT)
  rate: float = protocol.rates[0]
  if len(protocol.rates) > 1 and out.any():
    heads = train(protocol, encode, stream.take_rows(data, ~out), size, classes, key, mesh)
    scores = _scores(protocol, encode, heads, stream.take_rows(data, out), size, mesh)
    accuracies = [accuracy(s.argmax(1), labels[out]) if np.isfinite(s).all() else -1.
                  for s in scores]
    best = int(np.argmax(accuracies))
    rate = protocol.rates[best]
    protocol = protocol._replace(rates=(rate,))
    chosen['held_out_top1'] = accuracies[best]
  heads = train(protocol, encode, data, size, classes, key, mesh)
  scores = _scores(protocol, encode, heads, test, size, mesh)[0]
  if not np.isfinite(scores).all():
    raise UserError(f'The linear probe of protocol {name} diverged at rate {rate:g}.',
                    'Use --protocol linear, which chooses a rate, or cached, which has none.',
                    NOT_FINITE)
  if (protocol.epochs, protocol.batch) != (published.epochs, published.batch):
    name += f' epochs={protocol.epochs} batch={protocol.batch}'
  return result(name, scores, test.labels, {'lr': rate, **chosen})

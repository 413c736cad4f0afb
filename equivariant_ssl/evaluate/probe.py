"""Linear classification by SGD on the frozen features of augmented images, under the field's named protocols."""
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

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
from equivariant_ssl.evaluate.features import as_partial, check_labels
from equivariant_ssl.evaluate.linear import held_out
from equivariant_ssl.evaluate.statistics import Result, accuracy, result
from equivariant_ssl.keys import key_for
from equivariant_ssl.parallel import sharding
from equivariant_ssl.types import Array, Key

HELD_OUT = .1  # of the training images, to choose a rate on


class Protocol(NamedTuple):
  """SGD, momentum .9, no weight decay, on torch's default Linear; random resized crop (.08, 1) and flip.

  rates: several are trained side by side on one pass of features, chosen on a tenth of the training images (of equal
  ones the lowest), then the head is trained anew on all of them. per: rates are for this batch and scale with it
  (None: they do not). end: the rate at the end of a cosine a step. centred: tested on a central crop (`inputs.centred`).
  whole: an epoch's last batch is what is left, else images that do not fill a batch are left out of an epoch.
  """
  rates: tuple[float, ...]
  epochs: int
  batch: int
  per: int | None = None
  nesterov: bool = True
  end: float = 0.
  centred: bool = True
  whole: bool = False


PROTOCOLS = {
    'equimod': Protocol((.2,), 90, 256, end=1e-4),                      # Devillers & Lefort 2022, official code
    # Dangovski et al. 2022, official code, CIFAR-10: the mean of five heads, --seeds 0,1,2,3,4. (There a test batch counts
    # the same whatever its size; here an image does.)
    'essl': Protocol((30.,), 100, 256, nesterov=False),
    'simclr': Protocol((.1,), 100, 512, per=256, centred=False),        # Chen et al. 2020, official code, CIFAR-10
    'byol': Protocol((.05, .1, .2, .3, .4), 80, 1024, per=None),        # Grill et al. 2020, appendix: batch 1024
    'linear': Protocol((.003, .01, .03, .1, .2, .3, 1., 3., 10., 30.), 90, 256, whole=True),  # ours: equimod's, any rate
}


class Head(NamedTuple):
  """kernel [R D K], bias [R K], of R heads; of one head without the R."""
  kernel: Array
  bias: Array


def torch_linear(key: Key, D: int, K: int) -> Head:
  """A Linear as torch draws it by default: kernel [D K] and bias [K] uniform within 1 / sqrt(D)."""
  bound = 1 / math.sqrt(D)
  draw = lambda name, *shape: jax.random.uniform(key_for(key, name), shape, minval=-bound, maxval=bound)
  return Head(draw('kernel', D, K), draw('bias', K))


def logits(head: Head, features: Array) -> Array:
  """[R B K] of R heads on features [B D]."""
  return jnp.einsum('bd,rdk->rbk', features, head.kernel, precision='highest') + head.bias[:, None, :]


@functools.lru_cache
def _step(size: int, batch: int, steps: int, nesterov: bool, mesh: Mesh | None):
  """(the momentum, one jitted step of every head)."""
  trace = optax.trace(.9, nesterov)
  op = inputs.crop_and_flip(size)

  @functools.partial(jax.jit, donate_argnums=(1,))
  def step(encode, state, key, images, sizes, labels, order, start, left, index, rates, end):
    heads, memory = state
    rows = jax.lax.dynamic_slice_in_dim(order, start, batch)
    if mesh is not None:
      rows = jax.lax.with_sharding_constraint(rows, sharding.batch_sharding(mesh))
    real = (jnp.arange(batch) < left).astype(jnp.float32)  # of an epoch: what fills up its last batch does not count
    shown = inputs.augmented(op, size, key_for(key, 'augment', index), 'probe', images[rows], sizes[rows])
    h = encode(shown).astype(jnp.float32)

    def loss(heads: Head) -> Array:
      each = optax.softmax_cross_entropy_with_integer_labels(logits(heads, h), labels[rows][None, :])
      return (each * real[None, :]).sum() / real.sum()  # a sum over heads: each has its own gradient
    directions, memory = trace.update(jax.grad(loss)(heads), memory)
    rate = end + (rates - end) * .5 * (1. + jnp.cos(math.pi * index.astype(jnp.float32) / steps))
    move = lambda p, d: p - rate.reshape(-1, *[1] * (p.ndim - 1)) * d
    return jax.tree.map(move, heads, directions), memory

  return trace, step


def train(protocol: Protocol, encode: Callable[[Array], Array], data: Split, size: int, classes: int, key: Key,
          mesh: Mesh | None = None) -> Head:
  """The heads [R ...] that `protocol` trains, one a rate, on the labelled images of `data`, at `size` pixels."""
  N = len(data.images)
  B = min(protocol.batch, N)
  if mesh is not None:
    B = -(-B // mesh.size) * mesh.size if protocol.whole else B
    sharding.check_batch(B, mesh.size)
  per_epoch = -(-N // B) if protocol.whole else N // B
  place = (lambda tree: sharding.place(tree, sharding.replicated_sharding(mesh))) if mesh is not None else jax.device_put
  encode, key = place(as_partial(encode)), key_for(key, 'probe')
  D = jax.eval_shape(encode, jax.ShapeDtypeStruct((B, size, size, data.images.shape[3]), jnp.float32)).shape[-1]
  rates = np.array(protocol.rates, np.float32) * (B / protocol.per if protocol.per else 1.)
  heads = jax.tree.map(lambda a: jnp.repeat(a[None], len(rates), 0), torch_linear(key_for(key, 'init'), D, classes))
  trace, step = _step(size, B, protocol.epochs * per_epoch, protocol.nesterov, mesh)
  state = place((heads, trace.init(heads)))
  rates, end = place((rates.astype(np.float32), np.float32(protocol.end)))
  order = lambda epoch: np.resize(np.asarray(epoch_order(key, epoch, N)), max(N, per_epoch * B))
  data = data._replace(labels=data.labels.astype(np.int32))
  for index, rows in enumerate(stream.epochs(data, order, B, per_epoch, protocol.epochs * per_epoch, place)):
    left = N - index % per_epoch * B
    state = step(encode, state, key, *rows[:3], rows.order, rows.start, left, index, rates, end)
  return state[0]


def _scores(protocol: Protocol, encode: Callable[[Array], Array], heads: Head, data: Split, size: int, mesh: Mesh | None
            ) -> np.ndarray:
  """[R M K] of un-augmented images, in float64 so that no rounding decides."""
  shows = inputs.of(size, data)
  h = inputs.features(encode, data, inputs.centred(shows) if protocol.centred else shows, protocol.batch, mesh)
  kernel, bias = (np.asarray(a, np.float64) for a in heads)
  return np.einsum('md,rdk->rmk', h, kernel) + bias[:, None, :]


def evaluate(name: str, encode: Callable[[Array], Array], data: Split, test: Split, size: int, classes: int, key: Key,
             epochs: int = 0, batch: int = 0, mesh: Mesh | None = None) -> Result:
  """The accuracy on `test` of a head under protocol `name` of PROTOCOLS, trained on `data`; epochs, batch: where > 0, other
  than the protocol's.

  encode: a frozen encoder in eval mode, [B size size 3] in [0, 1] -> [B D]; best a Partial (features.in_batches). The last
  epoch counts. Fewer images than a batch are one batch. The protocol is named with the epochs and batch where they are not
  its own. `mesh` splits the batch over devices. Raises UserError where labels are missing or the head diverged.
  """
  for part, what in ((data, 'training'), (test, 'test')):
    check_labels(part.labels, len(part.images), classes, what)
  published = PROTOCOLS[name]
  protocol = published._replace(epochs=epochs or published.epochs, batch=min(batch or published.batch, len(data.images)))
  chosen = {'epochs': protocol.epochs, 'batch': protocol.batch}
  out = held_out(data.labels, HELD_OUT)
  if len(protocol.rates) > 1 and out.any():
    heads = train(protocol, encode, stream.some(data, ~out), size, classes, key, mesh)
    scores = _scores(protocol, encode, heads, stream.some(data, out), size, mesh)
    held = [accuracy(s.argmax(1), data.labels[out]) if np.isfinite(s).all() else -1. for s in scores]
    best = int(np.argmax(held))
    protocol = protocol._replace(rates=protocol.rates[best:best + 1])
    chosen['held_out_top1'] = held[best]
  scores = _scores(protocol, encode, train(protocol, encode, data, size, classes, key, mesh), test, size, mesh)[0]
  if not np.isfinite(scores).all():
    raise UserError(f'The linear probe of protocol {name} diverged at rate {protocol.rates[0]:g}.',
                    'Use --protocol linear, which chooses a rate, or cached, which has none.', NOT_FINITE)
  changed = '' if protocol[1:3] == published[1:3] else f' epochs={protocol.epochs} batch={protocol.batch}'
  return result(name + changed, scores, test.labels, {'lr': protocol.rates[0], **chosen})

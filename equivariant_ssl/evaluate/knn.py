"""Weighted k-nearest-neighbor classification, on the device, in bounded memory."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jax.tree_util import Partial

from equivariant_ssl.evaluate.features import (
  check_finite,
  check_labeled,
  check_labels,
  in_batches,
)
from equivariant_ssl.evaluate.statistics import Result, result
from equivariant_ssl.losses import unit
from equivariant_ssl.parallel import sharding
from equivariant_ssl.types import Array

QUERIES, BANK = 1024, 8192  # the largest array of similarities is QUERIES x BANK, 32 MiB


@functools.lru_cache
def _voter(classes: int, k: int, mesh: Mesh):
  def nearest(best: tuple[Array, Array], chunk: tuple[Array, Array, Array], queries: Array):
    """Return the k best of `best` (similarity, label, each [Q k]) and of one chunk of the bank."""
    bank, labels, real = chunk
    s = jnp.einsum('qd,cd->qc', queries, bank, precision='highest')
    s = jnp.concatenate([best[0], jnp.where(real[None, :], s, -jnp.inf)], axis=1)
    # Of equal similarities top_k takes the first: earlier in the bank, as a stable sort has it.
    s, i = jax.lax.top_k(s, k)
    old = jnp.take_along_axis(best[1], jnp.minimum(i, k - 1), axis=1)
    return s, jnp.where(i < k, old, labels[jnp.maximum(i - k, 0)])

  def nearest_on_device(bank: Array, labels: Array, N: Array, queries: Array):
    """Return the k best (similarity, label, each [Q k]) of this device's part of the bank.

    bank: [n D]; labels: [n]; N: the rows of the entire bank, without what fills it up.
    """
    n = bank.shape[0]
    C, before = min(BANK, n), jax.lax.axis_index('data') * n

    def read(best: tuple[Array, Array], first: Array):
      start = jnp.minimum(first, n - C)  # the last chunk reads some rows again, which do not count
      rows = start + jnp.arange(C)
      chunk, chunk_labels = (jax.lax.dynamic_slice_in_dim(a, start, C) for a in (bank, labels))
      real = (rows >= first) & (before + rows < N)
      return nearest(best, (unit(chunk), chunk_labels, real), queries), None
    none = (jnp.full((queries.shape[0], k), -jnp.inf),
            jnp.zeros((queries.shape[0], k), jnp.int32))
    best, _ = jax.lax.scan(read, none, jnp.arange(-(-n // C)) * C)
    # Devices hold the bank in its order, so that the earlier of two equal neighbors comes first.
    s, labels = (jax.lax.all_gather(a, 'data', axis=1, tiled=True) for a in best)
    s, i = jax.lax.top_k(s, k)
    return s, jnp.take_along_axis(labels, i, axis=1)
  split, copied = PartitionSpec('data'), PartitionSpec()
  find = jax.shard_map(nearest_on_device, mesh=mesh, in_specs=(split, split, copied, copied),
                       out_specs=copied, check_vma=False)

  def votes(bank: Array, labels: Array, N: Array, temperature: Array, queries: Array) -> Array:
    """Return the votes [Q K] of queries [Q D]."""
    s, neighbors = find(bank, labels, N, unit(queries))
    weights = jnp.exp((s - s[:, :1]) / temperature)  # relative to the nearest: no overflow

    # A scan over the k neighbors, not a scatter: the same sum on every device, and no [Q k K].
    def add(total: Array, neighbor: tuple[Array, Array]):
      weight, label = neighbor
      votes_of_class = label[:, None] == jnp.arange(classes)[None, :]
      return total + jnp.where(votes_of_class, weight[:, None], 0.), None
    zero = jnp.zeros((queries.shape[0], classes))
    return jax.lax.scan(add, zero, (weights.T, neighbors.T))[0]

  return votes


def _votes(train_features, train_labels, test_features, classes: int, k: int, temperature: float,
           mesh: Mesh | None) -> np.ndarray:
  check_labeled(train_features, train_labels, classes, 'training')
  check_finite(test_features)
  N, mesh = len(train_features), mesh or sharding.mesh(jax.local_devices()[:1])
  bank, labels = (sharding.place_rows(a, mesh) for a in
                  (np.asarray(train_features, np.float32), train_labels.astype(np.int32)))
  f = Partial(_voter(classes, min(k, N), mesh), bank, labels, np.int32(N), np.float32(temperature))
  batch = -(-min(QUERIES, len(test_features)) // jax.process_count())
  return in_batches(f, np.asarray(test_features, np.float32), batch, mesh)


def knn(train_features: np.ndarray, train_labels: np.ndarray, test_features: np.ndarray,
        classes: int, k: int = 200, temperature: float = .1, mesh: Mesh | None = None
        ) -> np.ndarray:
  """Return predictions int [M] for test features [M D] from training features [N D] and labels [N]
  (Wu et al. 2018).

  The prediction is the class with the largest sum of exp(s / T) over those of the k nearest
  training images that have this class; s is the cosine. Among equally near neighbors the earlier
  one counts, and among equal sums the lower class. A k larger than N is N. The bank is split
  over the devices of `mesh`.
  """
  votes = _votes(train_features, train_labels, test_features, classes, k, temperature, mesh)
  return votes.argmax(1).astype(np.int32)


def usual_k(bank: int) -> int:
  """Return how many neighbors vote in a bank of that many images.

  They are 200, as published, from 500 images on: results on the digits, whose studies have banks of
  800, stay what they are. In a smaller bank 200 would be most of it, of all classes; a tenth of it
  votes, and one neighbor at least.
  """
  return 200 if bank >= 500 else max(bank // 10, 1)


def evaluate(train_features: np.ndarray, train_labels: np.ndarray, test_features: np.ndarray,
             test_labels: np.ndarray, classes: int, k: int = 200, temperature: float = .1,
             mesh: Mesh | None = None) -> Result:
  """Return the accuracy of `knn` against the test labels [M].

  The protocol's name has the k that was used, which is N where k > N.
  """
  check_labels(test_labels, len(test_features), classes, 'test')
  votes = _votes(train_features, train_labels, test_features, classes, k, temperature, mesh)
  k_used = min(k, len(train_features))
  return result(f'knn k={k_used} T={temperature:g}', votes, test_labels,
                {'k': k_used, 'temperature': temperature})

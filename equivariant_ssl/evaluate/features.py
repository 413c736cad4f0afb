"""Features of a frozen encoder, and the one loop over batches that all evaluations share."""
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.tree_util import Partial

from equivariant_ssl import errors
from equivariant_ssl.data.source import Split
from equivariant_ssl.data.stream import is_stream
from equivariant_ssl.parallel import sharding
from equivariant_ssl.types import Array


def as_partial(f: Callable) -> Partial:
  """Return `f` as a pytree, which can be an argument of a jitted function."""
  return f if isinstance(f, Partial) else Partial(f)


@functools.lru_cache
def _caller(mesh: Mesh | None):
  # The result is gathered on every device, so that each of several processes can read all of it.
  out = None if mesh is None else sharding.replicated_sharding(mesh)
  return jax.jit(lambda f, rows: f(rows), out_shardings=out)


def _next_batch(rows: Any, start: int, batch: int) -> Any:
  """Return `batch` rows from number `start` on; a batch that ends early repeats its last row."""
  part = jax.tree.map(lambda a: a[start:start + batch], rows)
  lacking = batch - jax.tree.leaves(part)[0].shape[0]
  if lacking <= 0:
    return part
  return jax.tree.map(lambda a: np.concatenate([a, np.repeat(a[-1:], lacking, axis=0)]), part)


def in_batches(f: Callable[[Any], Any], rows: Any, batch: int, mesh: Mesh | None = None) -> Any:
  """Apply `f` to a pytree of rows [N ...], `batch` rows at a time, and return its results [N ...]
  as NumPy arrays.

  `f` is jitted here, for one shape: the last batch is filled with its own last row, and the surplus
  results are cut off. The result for one row must not depend on the other rows. With a ('data',)
  `mesh`, `batch` is rounded up to a multiple of its devices and split over them. Where `f` is a
  `jax.tree_util.Partial(function, *arrays)`, the arrays (weights) are arguments of the compiled
  program, which then serves every checkpoint; a plain closure compiles them in. The rows of a
  streamed data set are decoded batch by batch. Raises UserError where there are no rows.
  """
  f, rows = as_partial(f), jax.tree.map(lambda a: a if is_stream(a) else np.asarray(a), rows)
  N = jax.tree.leaves(rows)[0].shape[0]
  if not N:
    raise errors.UserError('There is nothing to evaluate: 0 images.')
  if mesh is not None:
    batch = -(-batch // mesh.size) * mesh.size
    f = jax.device_put(f, sharding.replicated_sharding(mesh))
  results = []
  for start in range(0, N, batch):
    part = _next_batch(rows, start, batch)
    if mesh is not None:
      part = sharding.place(part, sharding.batch_sharding(mesh))
    results.append(_caller(mesh)(f, part))
    if len(results) > 1:
      # Results are fetched one batch late: the device never waits, and does not hold all of them.
      results[-2] = jax.tree.map(np.asarray, results[-2])
  return jax.tree.map(lambda *a: np.concatenate([np.asarray(x) for x in a])[:N], *results)


def _encode(encode: Callable[[Array], Array], images: Array) -> Array:
  return encode(images.astype(jnp.float32) / 255.).astype(jnp.float32)


def check_images(images: Any) -> None:
  """Raise ValueError where `images` are not uint8 [N S S C]."""
  if images.dtype != np.uint8 or images.ndim != 4:
    raise ValueError(f'expected uint8 images [N S S C], got {images.dtype} {images.shape}')


def features(encode: Callable[[Array], Array], images: np.ndarray, batch: int = 256,
             mesh: Mesh | None = None) -> np.ndarray:
  """Return the features [N D] float32 of uint8 `images` [N S S C], every image once, on any number
  of devices.

  encode: a frozen encoder in eval mode, images [B S S C] float32 in [0, 1] -> [B D]; best a Partial
  (see `in_batches`). Raises UserError (NOT_FINITE) where a feature is not finite, ValueError where
  images are not uint8.
  """
  check_images(images)
  h = in_batches(Partial(_encode, as_partial(encode)), images, batch, mesh)
  check_finite(h)
  return h


def check_finite(values: np.ndarray) -> None:
  """Raise UserError (NOT_FINITE) where a row of the features [N D] is not finite."""
  bad = int((~np.isfinite(values)).any(axis=1).sum())
  if bad:
    raise errors.UserError(
        f'The features of {bad} of {len(values)} images are not finite.',
        'The network has diverged: evaluate an earlier checkpoint: --step N', errors.NOT_FINITE)


def check_labels(labels: np.ndarray | None, N: int, classes: int, part: str) -> None:
  """Raise UserError where images have no labels in [0, classes).

  labels: int [N]. part: what the error calls the images: 'training', 'test'.
  """
  if labels is None or labels.shape != (N,):
    raise ValueError(f'expected {part} labels of shape {(N,)}, '
                     f'got {None if labels is None else labels.shape}')
  if not N:
    raise errors.UserError(f'There are no {part} images.')
  if labels.min() < 0:
    raise errors.UserError(
        f'{int((labels < 0).sum())} of the {N} {part} images have no label.',
        'kNN, linear and few-label evaluation need labels; --protocol equivariance needs none.')
  if labels.max() >= classes:
    raise errors.UserError(
        f'A {part} image has label {labels.max()}, but the data set has {classes} classes.',
        'Labels count from 0.')


def check_labeled(values: np.ndarray, labels: np.ndarray, classes: int, part: str) -> None:
  """Check features [N D] with `check_finite`, and their labels [N] with `check_labels`."""
  check_labels(labels, len(values), classes, part)
  check_finite(values)


def labels_of(split: Split | None) -> np.ndarray:
  """Return the labels of a split that is known to be there and to have them."""
  assert split is not None and split.labels is not None
  return split.labels

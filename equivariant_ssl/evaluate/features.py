"""Features of a frozen encoder, and the one loop over batches that all evaluations share."""
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.tree_util import Partial

from equivariant_ssl import errors
from equivariant_ssl.data.source import Split
from equivariant_ssl.data.stream import is_stream, process_rows
from equivariant_ssl.evaluate.statistics import row_blocks
from equivariant_ssl.parallel import processes, sharding
from equivariant_ssl.types import Array

ALIGNMENT = 64  # bytes


def as_partial(f: Callable) -> Partial:
  """Return `f` as a pytree, which can be an argument of a jitted function."""
  return f if isinstance(f, Partial) else Partial(f)


@functools.lru_cache
def _caller(mesh: Mesh | None):
  # The result is gathered on every device, so that each of several processes can read all of it.
  out = None if mesh is None else sharding.replicated_sharding(mesh)
  return jax.jit(lambda f, rows: f(rows), out_shardings=out)


@functools.lru_cache
def _flagged_caller(mesh: Mesh):
  """Return (f, rows, flags) -> (f(rows), whether a flag is set), on every device."""
  return jax.jit(lambda f, rows, flags: (f(rows), flags.any()),
                 out_shardings=sharding.replicated_sharding(mesh))


def _next_batch(rows: Any, start: int, batch: int) -> Any:
  """Return `batch` rows from number `start` on; a batch that ends early repeats its last row."""
  part = jax.tree.map(lambda a: a[start:start + batch], rows)
  lacking = batch - jax.tree.leaves(part)[0].shape[0]
  if lacking <= 0:
    return part
  return jax.tree.map(lambda a: np.concatenate([a, np.repeat(a[-1:], lacking, axis=0)]), part)


def _read_share(rows: Any, indices: np.ndarray, N: int) -> tuple[Any, Exception | None]:
  """Return the rows at `indices`, which are this process's part of a batch, the last row of all in
  the place of those from N on.

  Where they cannot be read, they are zeros, and the error stands beside them: the other processes
  are in the middle of the same batch, and learn of it with the result.
  """
  real = np.unique(np.minimum(indices, N - 1))  # what fills up the batch is decoded once

  def fill_up(part: np.ndarray) -> np.ndarray:
    return np.concatenate([part, np.repeat(part[-1:], len(indices) - len(part), axis=0)])
  try:
    return jax.tree.map(lambda a: fill_up(a[real]), rows), None
  except Exception as error:
    return jax.tree.map(lambda a: np.zeros((len(indices), *a.shape[1:]), a.dtype), rows), error


def aligned_empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
  """Return an array that is not filled yet and begins at a multiple of 64 bytes.

  jax reads such an array where it lies, if the device is a CPU; of any other it makes a copy.
  """
  size = math.prod(shape) * np.dtype(dtype).itemsize
  buffer = np.empty(size + ALIGNMENT, np.uint8)
  first = -buffer.ctypes.data % ALIGNMENT
  return buffer[first:first + size].view(dtype).reshape(shape)


class _BatchResult(NamedTuple):
  """What was computed of the rows from `start` on. error: why this process could not read its part
  of them; failed: whether any process could not."""
  start: int
  results: Any
  error: Exception | None = None
  failed: Any = False


def _store(arrays: Any, N: int, batch: _BatchResult) -> Any:
  """Fetch the results of a batch into `arrays` [N ...], which are made for the first; return them.

  Raises the UserError of a process that could not read its rows, in all processes.
  """
  if batch.failed:
    processes.raise_together(batch.error)
  if arrays is None:
    arrays = jax.tree.map(lambda a: aligned_empty((N, *a.shape[1:]), a.dtype), batch.results)

  def fetch(target: np.ndarray, a: Any) -> None:
    part = target[batch.start:batch.start + a.shape[0]]
    part[...] = np.asarray(a)[:len(part)]
  jax.tree.map(fetch, arrays, batch.results)
  return arrays


def _batches(f: Partial, rows: Any, N: int, size: int, mesh: Mesh | None) -> Iterator[_BatchResult]:
  """Yield the batches, computed on the first device or split over the devices of a mesh."""
  if mesh is not None:
    size = -(-size // mesh.size) * mesh.size
    f = jax.tree.map(lambda a: _on_mesh(a, mesh), f)
  for start in range(0, N, size):
    part = _next_batch(rows, start, size)
    if mesh is not None:
      part = sharding.place(part, sharding.batch_sharding(mesh))
    yield _BatchResult(start, _caller(mesh)(f, part))


def _shared_batches(f: Partial, rows: Any, N: int, size: int, mesh: Mesh) -> Iterator[_BatchResult]:
  """Yield the batches of several processes, `size` rows of each process at a time."""
  split = sharding.batch_sharding(mesh)
  size = -(-size * jax.process_count() // mesh.size) * mesh.size
  f = jax.tree.map(lambda a: _on_mesh(a, mesh), f)
  positions = process_rows(split, size)

  def place(a: np.ndarray) -> jax.Array:
    return jax.make_array_from_process_local_data(split, a, (size, *a.shape[1:]))
  for start in range(0, N, size):
    part, error = _read_share(rows, start + positions, N)
    flags = np.full(len(positions), error is not None)
    results, failed = _flagged_caller(mesh)(f, *jax.tree.map(place, (part, flags)))
    yield _BatchResult(start, results, error, failed)


def _on_mesh(a: Any, mesh: Mesh) -> jax.Array:
  """Return an argument of `f` as it is, where it lies on the mesh, else with a copy on each
  device."""
  if isinstance(a, jax.Array) and getattr(a.sharding, 'mesh', None) == mesh:
    return a
  return sharding.place(a, sharding.replicated_sharding(mesh))


def in_batches(f: Callable[[Any], Any], rows: Any, batch: int, mesh: Mesh | None = None) -> Any:
  """Apply `f` to a pytree of rows [N ...], `batch` rows at a time, and return its results [N ...]
  as NumPy arrays.

  `f` is jitted here, for one shape: the last batch is filled with its own last row, and the surplus
  results are cut off. The result for one row must not depend on the other rows. With a ('data',)
  `mesh`, `batch` is rounded up to a multiple of its devices and split over them; a mesh of several
  processes takes `batch` rows of each process, which decodes its own rows alone, and all processes
  get all results. Where `f` is a `jax.tree_util.Partial(function, *arrays)`, the arrays (weights)
  are arguments of the compiled program, which then serves every checkpoint; a plain closure
  compiles them in. Arrays that are split over the mesh stay as they are, others are copied to each
  device. The rows of a streamed data set are decoded batch by batch. Raises UserError where there
  are no rows; and, in all processes, an error with which one of them reads its rows.
  """
  f, rows = as_partial(f), jax.tree.map(lambda a: a if is_stream(a) else np.asarray(a), rows)
  N = jax.tree.leaves(rows)[0].shape[0]
  if not N:
    raise errors.UserError('There is nothing to evaluate: 0 images.')
  batches: Callable = _shared_batches if mesh is not None and mesh.is_multi_process else _batches
  arrays, before = None, None
  for computed in batches(f, rows, N, batch, mesh):
    if before is not None:
      # Results are fetched one batch late: the device never waits, and does not hold all of them.
      arrays = _store(arrays, N, before)
    before = computed
  assert before is not None  # there is a row
  return _store(arrays, N, before)


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
  bad = sum(int((~np.isfinite(values[rows])).any(axis=1).sum()) for rows in row_blocks(len(values)))
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

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
from equivariant_ssl.data.stream import lazy
from equivariant_ssl.parallel import sharding
from equivariant_ssl.types import Array


def as_partial(f: Callable) -> Partial:
  """`f` as a pytree that can be an argument of a jitted function."""
  return f if isinstance(f, Partial) else Partial(f)


@functools.lru_cache
def _caller(mesh: Mesh | None):
  # Gathered on every device, so that each process of several can read the whole answer.
  out = None if mesh is None else sharding.replicated_sharding(mesh)
  return jax.jit(lambda f, rows: f(rows), out_shardings=out)


def in_batches(f: Callable[[Any], Any], rows: Any, batch: int, mesh: Mesh | None = None) -> Any:
  """`f` of a pytree of rows [N ...], `batch` rows at a time: its answers [N ...] as NumPy arrays.

  f is jitted here, for one shape: the last batch is filled with its own last row and the answer cut. What f
  answers to a row must not depend on the others. With a ('data',) `mesh`, `batch` is rounded up to a multiple of
  its devices and split over them. Where f is a `jax.tree_util.Partial(function, *arrays)`, the arrays (weights)
  are arguments of the compiled program, which then serves every checkpoint; a plain closure compiles them in. Rows of
  a stream are decoded batch by batch.
  """
  f, rows = as_partial(f), jax.tree.map(lambda a: a if lazy(a) else np.asarray(a), rows)
  N = jax.tree.leaves(rows)[0].shape[0]
  if not N:
    raise errors.UserError('There is nothing to evaluate: 0 images.')
  if mesh is not None:
    batch = -(-batch // mesh.size) * mesh.size
    f = jax.device_put(f, sharding.replicated_sharding(mesh))
  parts = []
  for start in range(0, N, batch):
    part = jax.tree.map(lambda a: a[start:start + batch], rows)
    missing = start + batch - N
    if missing > 0:
      part = jax.tree.map(lambda a: np.concatenate([a, np.repeat(a[-1:], missing, axis=0)]), part)
    if mesh is not None:
      part = sharding.place(part, sharding.batch_sharding(mesh))
    parts.append(_caller(mesh)(f, part))
    if len(parts) > 1:  # one batch behind, so that the device never waits, nor holds them all
      parts[-2] = jax.tree.map(np.asarray, parts[-2])
  return jax.tree.map(lambda *a: np.concatenate([np.asarray(x) for x in a])[:N], *parts)


def _encode(encode: Callable[[Array], Array], images: Array) -> Array:
  return encode(images.astype(jnp.float32) / 255.).astype(jnp.float32)


def features(encode: Callable[[Array], Array], images: np.ndarray, batch: int = 256,
             mesh: Mesh | None = None) -> np.ndarray:
  """Features [N D] float32 of uint8 `images` [N S S C], every image once, on any number of devices.

  encode: a frozen encoder in eval mode, images [B S S C] float32 in [0, 1] -> [B D]; see `in_batches` for why it
  is best a Partial. Raises UserError (NOT_FINITE) where a feature is not finite, ValueError where images are not
  uint8.
  """
  if images.dtype != np.uint8 or images.ndim != 4:
    raise ValueError(f'expected uint8 images [N S S C], got {images.dtype} {images.shape}')
  found = in_batches(Partial(_encode, as_partial(encode)), images, batch, mesh)
  check_finite(found)
  return found


def check_finite(values: np.ndarray) -> None:
  """UserError where a row of the features [N D] is not finite."""
  bad = int((~np.isfinite(values)).any(axis=1).sum())
  if bad:
    raise errors.UserError(f'The features of {bad} of {len(values)} images are not finite.',
                           'The network has diverged: evaluate an earlier checkpoint: --step N', errors.NOT_FINITE)


def check_labels(labels: np.ndarray, N: int, classes: int, what: str) -> None:
  """UserError where the `what` ('training', 'test') images have no labels in [0, classes); labels int [N]."""
  if labels.shape != (N,):
    raise ValueError(f'expected {what} labels of shape {(N,)}, got {labels.shape}')
  if not N:
    raise errors.UserError(f'There are no {what} images.')
  if labels.min() < 0:
    raise errors.UserError(f'{int((labels < 0).sum())} of the {N} {what} images have no label.',
                           'kNN, linear and few-label evaluation need labels; --protocol equivariance does not.')
  if labels.max() >= classes:
    raise errors.UserError(f'A {what} image has label {labels.max()}, but the data set has {classes} classes.',
                           'Labels count from 0.')


def check_labelled(values: np.ndarray, labels: np.ndarray, classes: int, what: str) -> None:
  """`check_finite` of the `what` features [N D] and `check_labels` of their labels [N]."""
  check_labels(labels, len(values), classes, what)
  check_finite(values)

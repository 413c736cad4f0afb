"""Protocol 'transfer': logistic regression on the frozen features of other data sets, one row for
each."""
import functools
import os
import pathlib
import tempfile
import zipfile
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from equivariant_ssl.errors import UserError
from equivariant_ssl.evaluate import inputs
from equivariant_ssl.evaluate.features import as_partial
from equivariant_ssl.evaluate.inputs import central_features
from equivariant_ssl.evaluate.linear import held_out_mask
from equivariant_ssl.evaluate.logistic import Labeled, logistic
from equivariant_ssl.evaluate.target_data import (
  MissingTarget,
  OpenTarget,
  Part,
  check_targets,
  marks,
  open_target,
  text_digest,
)
from equivariant_ssl.evaluate.targets import DATASETS
from equivariant_ssl.storage import fingerprint
from equivariant_ssl.types import Array

__all__ = ['DATASETS', 'VERSION', 'MissingTarget', 'TransferRow', 'check_targets', 'open_target',
           'marks', 'transfer']

# Raise it when reading changes what the features are; the pixels that a network is given have a
# version of their own (inputs.VERSION).
VERSION = 4


class TransferRow(NamedTuple):
  """The accuracy on one data set.

  value: the value of `metric`, a fraction. top1: the top-1 accuracy. note: the number of images
  that were used, and of those that are published.
  """
  name: str
  metric: str
  value: float
  top1: float
  protocol: str
  note: str


def encoder_mark(encode: Callable[[Array], Array], size: int) -> str:
  """Return a digest of what `encode` does to images of `size`: of its program and its weights."""
  encode = as_partial(encode)
  abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), encode)
  image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
  # A lambda: its name is in the program's text, on which the names of stored features depend.
  program = jax.jit(lambda f, x: f(x)).lower(abstract, image).as_text()
  return text_digest(program, fingerprint.fingerprints(encode))


def _stored(path: pathlib.Path | None, compute: Callable[[], dict[str, np.ndarray]]
            ) -> dict[str, np.ndarray]:
  """Return the arrays in the file `path`, or compute them and put them there, all or nothing.

  A damaged file is computed again. None stores nothing.
  """
  if path is None:
    return compute()
  try:
    with open(path, 'rb') as file, np.load(file) as stored:  # a CRC of each array is checked
      return {k: stored[k] for k in ('features', 'labels')}
  except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
    arrays = compute()
  path.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
    new = os.path.join(scratch, 'new.npz')
    np.savez(new, features=arrays['features'], labels=arrays['labels'])
    os.replace(new, path)
  return arrays


def _features(encode: Callable, part: Part, size: int, mesh: Mesh | None) -> dict[str, np.ndarray]:
  """Return {'features': [N D], 'labels': [N]} of a split."""
  features, labels = [], []
  for split in part.read(size):
    features.append(central_features(encode, split, size, mesh=mesh))
    labels.append(split.labels)
  if not features or any(split_labels is None for split_labels in labels):
    raise UserError('some images have no label.' if features else 'a split has no images.',
                    'Transfer needs labels: leave it out of --targets.')
  return {'features': np.concatenate(features), 'labels': np.concatenate(labels)}


def _row(name: str, opened: OpenTarget, arrays: dict[str, Labeled], size: int) -> TransferRow:
  """Return the TransferRow of a data set; arrays: {split: (features, labels)}."""
  (x, y), (test_x, test_y) = arrays['train'], arrays['test']
  valid, target = arrays.get('valid'), opened.target
  if len(np.unique(y)) < 2:
    raise UserError('all of its training images are of one class.',
                    'A classifier needs two classes or more.')
  result = logistic(x, y, test_x, test_y, opened.classes, valid, metric=target.metric,
                    held=target.held)
  carved = int(held_out_mask(y, target.held).sum()) if valid is None else 0
  valid_count = carved if valid is None else len(valid[1])
  used = f'{len(y) - carved:,} + {valid_count:,} / {len(test_y):,}'
  note = used if target.note in ('', used) else f'{used}; published {target.note}'
  return TransferRow(name, result.chosen['metric'], result.chosen['value'], result.top1,
             f'{result.protocol}, center {size}', note)


def _with_held_out_test(arrays: dict[str, Labeled], share: float) -> dict[str, Labeled]:
  """Return `arrays` with `share` of each training class in the place of the test split."""
  x, y = arrays['train']
  out = held_out_mask(y, share)
  if not out.any():
    raise UserError(f'no class has the {np.ceil(1 / share):.0f} training images of which one could '
                    'be held out.', 'Read out on its test split: --readout test.')
  return arrays | {'train': (x[~out], y[~out]), 'test': (x[out], y[out])}


def transfer(encode: Callable[[Array], Array], names: tuple[str, ...], size: int,
             mesh: Mesh | None = None, root: str = '', cache: str = '', validation: float = 0.
             ) -> tuple[list[TransferRow], list[MissingTarget]]:
  """Return (rows, what is not on disk): the accuracy of `logistic.logistic` on the frozen features
  of each data set of `names`.

  encode: a frozen encoder in eval mode, [B S S 3] in [0, 1] -> [B D]; best a Partial (see
  `features.in_batches`). names: see `open_target`; () means all of DATASETS. size: pixels of the
  central square. root: the folder of TFDS. cache: a folder in which features are stored, named by
  the encoder's weights and program and by the images. validation: where > 0, the network is read
  out on this share of each training class, in place of the test split. Raises UserError, the data
  set's name first, where a data set is unknown, has no labels, one class or unreadable images, or a
  feature is not finite.
  """
  check_targets(names, root)
  rows, missing, encoder = [], [], encoder_mark(encode, size) if cache else ''
  for name in names or tuple(DATASETS):
    try:
      opened = open_target(name, root)
      if isinstance(opened, MissingTarget):
        missing.append(opened)
        continue
      arrays: dict[str, Labeled] = {}
      for split, part in opened.parts.items():
        if split == 'test' and validation:
          continue
        digest = text_digest(VERSION, inputs.VERSION, encoder, part.mark)[:32]
        stem = f'{pathlib.Path(name).name}-{split}-{size}-{digest}.npz'
        path = pathlib.Path(os.path.expanduser(cache)) / stem if cache else None
        stored = _stored(path, functools.partial(_features, encode, part, size, mesh))
        arrays[split] = stored['features'], stored['labels']
      if validation:
        arrays = _with_held_out_test(arrays, validation)
      rows.append(_row(name, opened, arrays, size))
    except UserError as e:
      raise UserError(f'{name}: {e}', code=e.code) from e
  return rows, missing

"""Embedding files: the paths and features of images, as .npz, .csv or .parquet."""
import csv
import importlib.util
import json
import os
import pathlib
import tempfile
import zipfile
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from equivariant_ssl.errors import UserError, passing

AGAIN = 'Make it again: eqssl embed DIR IMAGES --out FILE'
METADATA = 'equivariant_ssl'  # the key of a .parquet file's metadata that holds the Origin


class Origin(NamedTuple):
  """The checkpoint that made features.

  run: the folder of its run. digest: the digest of its weights, as in DIR/eval.
  mark: the mark of its data card, '' in a file that an older version wrote.
  """
  run: str
  step: int
  digest: str
  mark: str = ''

  @property
  def name(self) -> str:
    """The checkpoint in words: 'step 40 of runs/a'."""
    return f'step {self.step} of {self.run}'


class ImageFeatures(NamedTuple):
  """The features of N images.

  paths: the paths of the images. features: float32 [N D].
  origin: the checkpoint that made them; None where a file does not say it (a .csv cannot).
  """
  paths: list[str]
  features: np.ndarray
  origin: Origin | None = None


class Form(NamedTuple):
  """How embeddings are written to one kind of file, and read from it."""
  write: Callable[[pathlib.Path, ImageFeatures], None]
  read: Callable[[pathlib.Path], ImageFeatures]


def _write_npz(path: pathlib.Path, embeddings: ImageFeatures) -> None:
  origin = embeddings.origin._asdict() if embeddings.origin else {}
  np.savez(path, paths=np.array(embeddings.paths), features=embeddings.features, **origin)


def _read_npz(path: pathlib.Path) -> ImageFeatures:
  with open(path, 'rb') as file, np.load(file) as stored:
    origin = None
    if 'digest' in stored:
      origin = Origin(*(stored[field].item() for field in Origin._fields if field in stored))
    return ImageFeatures(stored['paths'].tolist(), stored['features'], origin)


def _write_csv(path: pathlib.Path, embeddings: ImageFeatures) -> None:
  with open(path, 'w', newline='', encoding='utf-8') as file:
    rows = csv.writer(file, lineterminator='\n')
    rows.writerow(['path', *(f'f{i}' for i in range(embeddings.features.shape[1]))])
    for name, row in zip(embeddings.paths, embeddings.features, strict=True):
      rows.writerow([name, *row.astype(str)])  # the shortest text that reads as the same float32


def _read_csv(path: pathlib.Path) -> ImageFeatures:
  with open(path, newline='', encoding='utf-8') as file:
    rows = csv.reader(file)
    next(rows, None)
    pairs = [(name, np.array(values, np.float32)) for name, *values in rows]
  return ImageFeatures([name for name, _ in pairs], np.array([values for _, values in pairs]))


def _write_parquet(path: pathlib.Path, embeddings: ImageFeatures) -> None:
  import pyarrow
  import pyarrow.parquet
  features = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(embeddings.features.ravel()),
                                                    embeddings.features.shape[1])
  metadata = {METADATA: json.dumps(embeddings.origin)} if embeddings.origin else None
  table = pyarrow.table({'path': embeddings.paths, 'features': features}, metadata=metadata)
  pyarrow.parquet.write_table(table, path)


def _read_parquet(path: pathlib.Path) -> ImageFeatures:
  import pyarrow.parquet
  table = pyarrow.parquet.read_table(path)
  flat = np.concatenate([chunk.flatten().to_numpy() for chunk in table['features'].chunks])
  stored = (table.schema.metadata or {}).get(METADATA.encode())
  return ImageFeatures(table['path'].to_pylist(), flat.reshape(table.num_rows, -1),
                    Origin(*json.loads(stored)) if stored else None)


FORMS = {'.npz': Form(_write_npz, _read_npz), '.csv': Form(_write_csv, _read_csv),
         '.parquet': Form(_write_parquet, _read_parquet)}


def form(path: pathlib.Path) -> Form:
  """Return the form of file that a path's ending means.

  Raises UserError where the ending is another one, or where it needs pyarrow, which is missing.
  """
  ending = path.suffix.lower()
  if ending not in FORMS:
    raise UserError(f'{path} ends in {ending!r}, which is no form of embeddings.',
                    f'Use one of these endings: {", ".join(FORMS)}.')
  if ending == '.parquet' and importlib.util.find_spec('pyarrow') is None:
    raise UserError('A .parquet file needs pyarrow, which is not installed.',
                    'Type: pip install pyarrow, or use .npz or .csv.')
  return FORMS[ending]


def save(path: pathlib.Path, embeddings: ImageFeatures) -> None:
  """Write an embedding file. A failure leaves the old file or no file, and never part of a file."""
  with tempfile.TemporaryDirectory(dir=path.parent, prefix='.new-') as scratch:
    new = pathlib.Path(scratch, f'new{path.suffix.lower()}')
    form(path).write(new, embeddings)
    os.replace(new, path)


def read(path: pathlib.Path) -> ImageFeatures:
  """Read an embedding file. Raises UserError where it is not one."""
  file_form = form(path)
  try:
    embeddings = file_form.read(path)
  except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as e:
    if passing(e):
      raise
    reason = e.strerror if isinstance(e, OSError) else None
    reason = reason or (str(e).splitlines() or ['damaged'])[0]
    raise UserError(f'{path} cannot be read: {reason}', AGAIN) from e
  features = embeddings.features
  if features.ndim != 2 or not len(embeddings.paths) == len(features) > 0:
    raise UserError(f'{path} holds {len(embeddings.paths)} paths and features of shape '
                    f'{features.shape}, which are no embeddings [N D].', AGAIN)
  return embeddings

"""Embedding files: the paths and features of images, as .npz, .csv or .parquet."""
import csv
import importlib.util
import json
import os
import pathlib
import re
import tempfile
import zipfile
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from equivariant_ssl.errors import UserError
from equivariant_ssl.storage import disk

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
  classes: the class of each image, which is its folder's name, '' without one; None where a file
  does not say it.
  """
  paths: list[str]
  features: np.ndarray
  origin: Origin | None = None
  classes: list[str] | None = None


class Form(NamedTuple):
  """How embeddings are written to one kind of file, and read from it."""
  write: Callable[[pathlib.Path, ImageFeatures], None]
  read: Callable[[pathlib.Path], ImageFeatures]


def _write_npz(path: pathlib.Path, embeddings: ImageFeatures) -> None:
  origin = embeddings.origin._asdict() if embeddings.origin else {}
  classes = {} if embeddings.classes is None else {'classes': np.array(embeddings.classes)}
  np.savez(path, paths=np.array(embeddings.paths), features=embeddings.features, **classes,
           **origin)


def _read_npz(path: pathlib.Path) -> ImageFeatures:
  with open(path, 'rb') as file, np.load(file) as stored:
    origin = None
    if 'digest' in stored:
      origin = Origin(*(stored[field].item() for field in Origin._fields if field in stored))
    classes = stored['classes'].tolist() if 'classes' in stored else None
    return ImageFeatures(stored['paths'].tolist(), stored['features'], origin, classes)


def _write_csv(path: pathlib.Path, embeddings: ImageFeatures) -> None:
  with open(path, 'w', newline='', encoding='utf-8') as file:
    rows = csv.writer(file, lineterminator='\n')
    texts = [embeddings.paths] + ([] if embeddings.classes is None else [embeddings.classes])
    rows.writerow([*('path', 'class')[:len(texts)],
                   *(f'f{i}' for i in range(embeddings.features.shape[1]))])
    for *words, row in zip(*texts, embeddings.features, strict=True):
      rows.writerow([*words, *row.astype(str)])  # the shortest text that reads as the same float32


def _read_csv(path: pathlib.Path) -> ImageFeatures:
  """Read the columns path (else the first one), class, and f0, f1 and so on.

  Where no column has such a number, the features are the columns whose first value is a number. Any
  other column is left out.
  """
  with open(path, newline='', encoding='utf-8') as file:
    rows = csv.reader(file)
    head = next(rows, [])
    lines = [row for row in rows if row]
  name = head.index('path') if 'path' in head else 0
  numbered = [i for i, column in enumerate(head) if re.fullmatch(r'f\d+', column)]
  columns = numbered or [i for i, value in enumerate(lines[0] if lines else ())
                         if i != name and head[i] != 'class' and _is_number(value)]
  features = np.array([[row[i] for i in columns] for row in lines], np.float32)
  at = head.index('class') if 'class' in head else None
  return ImageFeatures([row[name] for row in lines], features,
                       classes=None if at is None else [row[at] for row in lines])


def _is_number(value: str) -> bool:
  try:
    float(value)
  except ValueError:
    return False
  return True


def _write_parquet(path: pathlib.Path, embeddings: ImageFeatures) -> None:
  import pyarrow
  import pyarrow.parquet
  features = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(embeddings.features.ravel()),
                                                    embeddings.features.shape[1])
  metadata = {METADATA: json.dumps(embeddings.origin)} if embeddings.origin else None
  classes = {} if embeddings.classes is None else {'class': embeddings.classes}
  table = pyarrow.table({'path': embeddings.paths, **classes, 'features': features},
                        metadata=metadata)
  pyarrow.parquet.write_table(table, path)


def _read_parquet(path: pathlib.Path) -> ImageFeatures:
  import pyarrow.parquet
  table = pyarrow.parquet.read_table(path)
  flat = np.concatenate([chunk.flatten().to_numpy() for chunk in table['features'].chunks])
  stored = (table.schema.metadata or {}).get(METADATA.encode())
  return ImageFeatures(table['path'].to_pylist(), flat.reshape(table.num_rows, -1),
                       Origin(*json.loads(stored)) if stored else None,
                       table['class'].to_pylist() if 'class' in table.column_names else None)


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
    embeddings = disk.retry(lambda: file_form.read(path), path)
  except (OSError, ValueError, LookupError, TypeError, EOFError, zipfile.BadZipFile) as e:
    reason = e.strerror if isinstance(e, OSError) else None
    reason = reason or (str(e).splitlines() or ['damaged'])[0]
    raise UserError(f'{path} cannot be read: {reason}', AGAIN) from e
  features = embeddings.features
  if features.ndim != 2 or not len(embeddings.paths) == len(features) > 0 or not features.size:
    raise UserError(f'{path} holds {len(embeddings.paths)} paths and features of shape '
                    f'{features.shape}, which are no embeddings [N D].', AGAIN)
  return embeddings

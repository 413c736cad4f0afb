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

from equivariant_ssl.errors import UserError

AGAIN = 'Make it again: eqssl embed DIR IMAGES --out FILE'
MADE = 'equivariant_ssl'  # of a .parquet's metadata


class Made(NamedTuple):
  """The checkpoint that made features: its run's folder, its step, the digest of its weights as in DIR/eval, and the mark of
  its data card ('' of a file of an older version)."""
  run: str
  step: int
  digest: str
  mark: str = ''

  @property
  def name(self) -> str:
    return f'step {self.step} of {self.run}'


class Embeddings(NamedTuple):
  """paths: of N images. features: float32 [N D]. made: by what, None where a file does not say (a .csv cannot)."""
  paths: list[str]
  features: np.ndarray
  made: Made | None = None


class Form(NamedTuple):
  """How embeddings are put into a file, and read from one."""
  write: Callable[[pathlib.Path, Embeddings], None]
  read: Callable[[pathlib.Path], Embeddings]


def _write_npz(path: pathlib.Path, found: Embeddings) -> None:
  np.savez(path, paths=np.array(found.paths), features=found.features, **(found.made._asdict() if found.made else {}))


def _read_npz(path: pathlib.Path) -> Embeddings:
  with open(path, 'rb') as file, np.load(file) as stored:
    made = Made(*(stored[field].item() for field in Made._fields if field in stored)) if 'digest' in stored else None
    return Embeddings(stored['paths'].tolist(), stored['features'], made)


def _write_csv(path: pathlib.Path, found: Embeddings) -> None:
  with open(path, 'w', newline='', encoding='utf-8') as file:
    rows = csv.writer(file, lineterminator='\n')
    rows.writerow(['path', *(f'f{i}' for i in range(found.features.shape[1]))])
    for name, row in zip(found.paths, found.features, strict=True):
      rows.writerow([name, *row.astype(str)])  # the shortest text that reads as the same float32


def _read_csv(path: pathlib.Path) -> Embeddings:
  with open(path, newline='', encoding='utf-8') as file:
    rows = csv.reader(file)
    next(rows, None)
    pairs = [(name, np.array(values, np.float32)) for name, *values in rows]
  return Embeddings([name for name, _ in pairs], np.array([values for _, values in pairs]))


def _write_parquet(path: pathlib.Path, found: Embeddings) -> None:
  import pyarrow
  import pyarrow.parquet
  features = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(found.features.ravel()), found.features.shape[1])
  about = {MADE: json.dumps(found.made)} if found.made else None
  pyarrow.parquet.write_table(pyarrow.table({'path': found.paths, 'features': features}, metadata=about), path)


def _read_parquet(path: pathlib.Path) -> Embeddings:
  import pyarrow.parquet
  table = pyarrow.parquet.read_table(path)
  flat = np.concatenate([chunk.flatten().to_numpy() for chunk in table['features'].chunks])
  about = (table.schema.metadata or {}).get(MADE.encode())
  return Embeddings(table['path'].to_pylist(), flat.reshape(table.num_rows, -1), Made(*json.loads(about)) if about else None)


FORMS = {'.npz': Form(_write_npz, _read_npz), '.csv': Form(_write_csv, _read_csv),
         '.parquet': Form(_write_parquet, _read_parquet)}


def form(path: pathlib.Path) -> Form:
  """The form that a file's name means. Raises UserError for another one, or where pyarrow is needed and not there."""
  kind = path.suffix.lower()
  if kind not in FORMS:
    raise UserError(f'{path} ends in {kind!r}, which is no form of embeddings.', f'End it in {", ".join(FORMS)}.')
  if kind == '.parquet' and importlib.util.find_spec('pyarrow') is None:
    raise UserError('a .parquet file needs pyarrow, which is not there.', 'pip install pyarrow, or use .npz or .csv.')
  return FORMS[kind]


def save(path: pathlib.Path, found: Embeddings) -> None:
  """Write an embedding file, all of it or nothing."""
  with tempfile.TemporaryDirectory(dir=path.parent, prefix='.new-') as scratch:
    new = pathlib.Path(scratch, f'new{path.suffix.lower()}')
    form(path).write(new, found)
    os.replace(new, path)


def read(path: pathlib.Path) -> Embeddings:
  """The embeddings in a file. Raises UserError where it is none."""
  kind = form(path)
  try:
    found = kind.read(path)
  except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as e:
    why = (e.strerror if isinstance(e, OSError) else None) or (str(e).splitlines() or ['damaged'])[0]
    raise UserError(f'{path} cannot be read: {why}', AGAIN) from e
  if found.features.ndim != 2 or not len(found.paths) == len(found.features) > 0:
    raise UserError(f'{path} holds {len(found.paths)} paths and features {found.features.shape}: no embeddings [N D].',
                    AGAIN)
  return found

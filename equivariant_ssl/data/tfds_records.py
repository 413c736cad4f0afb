"""The records of a TFDS data set: encoded images, and the labels and file names beside them."""
import os
import pathlib
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from equivariant_ssl.data.cache import cached
from equivariant_ssl.data.image_header import BadImage
from equivariant_ssl.data.source import Records, map_chunks
from equivariant_ssl.errors import passing
from equivariant_ssl.parallel.shared_work import share_arrays
from equivariant_ssl.storage import disk

FILE_FEATURE = 'file_name'   # the feature that names a record


def record_name(split: str, i: int) -> str:
  """What a record is called in messages."""
  return f'{split} record {i}'


class RowReader(NamedTuple):
  """Reads records of a split, and notes their labels and file names. It can be pickled.

  rows: TFDS's source of a split. split: its name. image, label: the names of the features.
  labels, files: arrays [N] that are filled in as the records are read, or None.
  """
  rows: Any
  split: str
  image: str
  label: str | None
  labels: np.ndarray | None
  files: np.ndarray | None

  def read_one(self, i: int) -> dict[str, Any] | BadImage:
    """Record i; a BadImage where it is damaged."""
    try:
      return self.rows[i]
    except Exception as error:  # array_record checks a hash of each record
      if passing(error):
        raise disk.unreadable(record_name(self.split, i), passing(error)) from error
      return BadImage(f'cannot be read: {str(error).splitlines()[0]}')

  def __call__(self, indices: range) -> Iterator[bytes | BadImage]:
    """The encoded images of a range of records."""
    try:
      batch = self.rows.__getitems__(list(indices))
    except Exception as error:
      if passing(error):
        time.sleep(disk.PAUSES[-1])
      batch = [self.read_one(i) for i in indices]
    for i, row in zip(indices, batch, strict=True):
      if isinstance(row, BadImage):
        yield row
        continue
      if self.label and self.labels is not None:
        self.labels[i] = row[self.label]
      if self.files is not None:
        self.files[i] = os.fsdecode(row[FILE_FEATURE])
      yield row[self.image]


def read_labels(path: pathlib.Path, split: str, records: Records
                ) -> tuple[np.ndarray | None, np.ndarray | None]:
  """The labels [N] and the file names [N] of a split that is not decoded, each None without them.

  Every record is read once for this, by process 0 of a job, and the result is kept beside the data.
  """
  if records.labels is None and records.files is None:
    return None, None

  def unreadable(indices: range) -> list[int]:
    return [i for i, data in zip(indices, records.read(indices), strict=True)
            if isinstance(data, BadImage)]

  def read() -> tuple[dict[str, np.ndarray], bool]:
    print(f'{path.parent.name} {split}: reading {records.count:,} labels, once', file=sys.stderr)
    bad = map_chunks(unreadable, records.count)
    arrays = {}
    if records.labels is not None:
      arrays['labels'] = records.labels
    if records.files is not None:
      arrays['files'] = records.files.astype(str)
    return arrays, not bad

  files = (file for file in path.iterdir() if file.is_file() and file.name[0] != '.')
  arrays = share_arrays(
      lambda: cached(files, ('labels', split), read, stamped=True, beside=path))
  labels = arrays.get('labels')
  if labels is not None and (labels < 0).any():
    labels = None
  return labels, arrays.get('files')

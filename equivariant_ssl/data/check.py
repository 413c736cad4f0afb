"""`eqssl data check`: what a data set holds, and what is wrong with it."""
import hashlib
import os
import pathlib
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from equivariant_ssl.data import digits, folder, tfds
from equivariant_ssl.data.decode import BadImage, decode
from equivariant_ssl.data.source import CHUNK, Records

SMALL, WIDE = 32, 4.   # pixels of a short side, ratio of the sides, beyond which an image is worth a look


class Report(NamedTuple):
  """`lines` to print; `ok` is False where some image cannot be read."""
  lines: tuple[str, ...]
  ok: bool


class Look(NamedTuple):
  """One record: a digest of its bytes and its (height, width), or why it cannot be read."""
  digest: bytes = b''
  size: tuple[int, int] = (0, 0)
  error: str = ''


def check(what: str, root: str = '') -> Report:
  """Read all of a folder of images, of a TFDS data set (a name, or a prepared directory), or of `digits`.

  Raises UserError where there is nothing to check.
  """
  if what == 'digits':
    return check_digits()
  path = pathlib.Path(what).expanduser()
  if path.is_dir() and not (path / 'dataset_info.json').is_file():
    return check_folder(path)
  return check_tfds(what, root)


def check_digits() -> Report:
  """The bundled scans: nothing can be missing but scikit-learn itself."""
  source = digits.make()
  return Report((f'digits: {len(source.train.images):,} train, {len(source.test.images):,} test, 10 classes', 'ok'), True)


def check_folder(path: pathlib.Path) -> Report:
  """Every image of a folder, decoded."""
  train, test, problems = folder.splits(path, .1, everything=True)
  names, _ = folder.class_names(train[1], test[1])
  parts = {split: folder.records(*part, names) for split, part in (('train', train), ('test', test)) if part[1]}
  return _report(str(path), parts, names, problems)


def check_tfds(what: str, root: str) -> Report:
  """Every record of every split of a prepared TFDS data set, decoded."""
  builder = tfds.open_directory(tfds.find(what, root))
  image, label = tfds.keys(what, builder.info)
  parts = {split: tfds.records(builder, split, image, label) for split in builder.info.splits}
  names = tuple(builder.info.features[label].names) if label else None
  return _report(str(builder.data_dir), parts, names, ())


def scan(records: Records) -> list[Look]:
  """Look at every record, in threads."""
  def look(data: bytes | BadImage) -> Look:
    try:
      return Look(b'', decode(data, SMALL)[1])._replace(digest=hashlib.sha256(data).digest())
    except BadImage as e:
      return Look(error=str(e))

  def work(start: int) -> list[Look]:
    return [look(data) for data in records.read(range(start, min(start + CHUNK, records.count)))]

  with ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as pool:
    return [found for part in pool.map(work, range(0, records.count, CHUNK)) for found in part]

"""CIFAR-10 as TFDS itself would prepare it, without TensorFlow: from the official binary archive to array_record."""
import functools
import hashlib
import http.client
import os
import pathlib
import posixpath
import tarfile
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from equivariant_ssl.data.archives import FOUND_AT, UNPACKED, one
from equivariant_ssl.data.encode import png
from equivariant_ssl.data.tfds import default_root, open_directory
from equivariant_ssl.data.unpack import opened
from equivariant_ssl.data.writer import Dataset, Example, build, publish, scratch
from equivariant_ssl.errors import UserError

URL = FOUND_AT['cifar10']
SIZE = 170_052_171
SHA256 = 'c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd'
NAMES = ('airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck')
FOLDER = 'cifar-10-batches-bin/'
BATCHES = {'train': tuple(f'data_batch_{i}.bin' for i in range(1, 6)), 'test': ('test_batch.bin',)}
BATCH = 10_000                  # records a batch
RECORD = 1 + 32 * 32 * 3        # a label, then the red, green and blue planes
BY_HAND = f'Or get {URL} in another way, and: eqssl data prepare cifar10 --archive FILE'

Log = Callable[[str], Any]


def cifar10(archive: str | None = None, root: str = '', log: Log = print) -> pathlib.Path:
  """Write `root`/cifar10/3.0.2, which plain `tfds.data_source('cifar10', data_dir=root)` reads; returns its path.

  archive: the official binary archive, or its folder, if it is here already, else it is downloaded and its checksum
  verified. What is in it (record sizes, counts, labels) is verified in both cases. root: as `data.cifar10.make`. A valid
  data set that is there already is kept; nothing half-written ever has that name. Raises UserError.
  """
  return prepare(archive, default_root(root), BATCH, log)


def prepare(archive: str | None, root: pathlib.Path, batch: int, log: Log) -> pathlib.Path:
  """`cifar10`, of an archive with `batch` records in each of its six files."""
  target = root / 'cifar10' / '3.0.2'
  if target.exists():
    verify(target, batch)
    log(f'{target} is there already and is whole: kept.')
    return target
  try:
    root.mkdir(parents=True, exist_ok=True)
    with scratch(root, 'cifar10') as place:
      if not archive:
        log(f'Downloading {URL} ({SIZE / 1e6:.0f} MB)')
        archive = str(place / os.path.basename(URL))
        download(archive)
      archive = str(one(archive, 'cifar10'))
      log(f'Reading {archive}')
      splits = {split: np.concatenate(parts) for split, parts in read_archive(archive, batch).items()}
      log(f'Writing {sum(map(len, splits.values())):,} records as TFDS cifar10/3.0.2')
      made = write(splits, place / 'tfds')
      verify(made, batch)
      target.parent.mkdir(exist_ok=True)
      publish(made, target)
  except OSError as e:
    raise UserError(f'Cannot write CIFAR-10 under {root}: {e.strerror or e}', 'Say another place: --root DIR') from e
  log(f'Prepared {target}')
  return target


def download(path: str, url: str = URL, size: int = SIZE, sha256: str = SHA256,
             opener: Callable[..., Any] = urllib.request.urlopen) -> None:
  """Fetch `url` to `path`, refusing what has not that size and checksum. Raises UserError."""
  digest, count = hashlib.sha256(), 0
  try:
    with opener(url, timeout=60) as source, open(path, 'wb') as sink:
      while block := source.read(2**20):
        count += len(block)
        if count > size:
          break
        digest.update(block)
        sink.write(block)
  except (OSError, http.client.HTTPException) as e:   # URLError, timeouts and broken connections are OSErrors
    raise UserError(f'The download of {url} failed after {count:,} bytes: {e}', f'Try again. {BY_HAND}') from e
  if count != size:
    raise UserError(f'The download of {url} gave {"more than " * (count > size)}{min(count, size):,} bytes '
                    f'instead of {size:,}.', f'Try again. {BY_HAND}')
  if digest.hexdigest() != sha256:
    raise UserError(f'The download of {url} has the wrong SHA-256: {digest.hexdigest()}, not {sha256}.',
                    f'Do not use it. {BY_HAND}')


def read_archive(path: str, batch: int) -> dict[str, list[np.ndarray]]:
  """{split: its batches, uint8 [batch 3073]} of a tar (gzipped or not), read as a stream and never unpacked to disk.

  Only the six members by their names are looked at. Raises UserError for anything that is not the archive.
  """
  wanted, found = {FOLDER + name for names in BATCHES.values() for name in names}, {}
  try:
    with opened(pathlib.Path(path), UNPACKED['cifar10']) as (tar, capped):
      for member in tar:
        name = posixpath.normpath(member.name)
        if name in wanted and member.isreg():
          if member.size != batch * RECORD:
            raise ValueError(f'{name} has {member.size:,} bytes instead of {batch * RECORD:,}')
          found[name] = _records(name, tar.extractfile(member).read())
      while capped.read(2**20):   # to the end, where gzip's checksum of all of it is
        pass
  except (OSError, EOFError, ValueError, tarfile.TarError, zlib.error) as e:
    why = getattr(e, 'strerror', None) or e
    raise UserError(f'{path} is not the binary archive of CIFAR-10: {why}.', f'The right one: {URL}') from e
  if missing := sorted(wanted - found.keys()):
    raise UserError(f'{path} is not the binary archive of CIFAR-10: it has no {", ".join(missing)}.',
                    f'The right one (not the Python or Matlab version): {URL}')
  return {split: [found[FOLDER + name] for name in names] for split, names in BATCHES.items()}


def _records(name: str, data: bytes) -> np.ndarray:
  records = np.frombuffer(data, np.uint8).reshape(-1, RECORD)
  if records[:, 0].max() >= len(NAMES):
    raise ValueError(f'{name} has a label {records[:, 0].max()}; labels are 0 to 9')
  return records


def examples(split: str, records: np.ndarray) -> Iterator[Example]:
  """What TFDS's own builder makes of each record, with the image already a PNG."""
  for i, record in enumerate(records):
    image = png(record[1:].reshape(3, 32, 32).transpose(1, 2, 0))
    yield Example(i, image, int(record[0]), {'id': f'{split}_{i:05d}'})


def write(splits: dict[str, np.ndarray], root: pathlib.Path) -> pathlib.Path:
  """Write `root`/cifar10/3.0.2 in TFDS's own order, with its metadata."""
  parts = {split: functools.partial(examples, split, records) for split, records in splits.items()}
  info, _ = build(Dataset('cifar10', '3.0.2', NAMES, parts, official=True), root, 0, lambda line: None)
  info.download_size = SIZE
  info.write_dataset_info_json(info.data_dir)
  return pathlib.Path(info.data_dir)


def verify(path: pathlib.Path, batch: int) -> None:
  """Check that `path` is a whole CIFAR-10 by its metadata and by what its files hold. Raises UserError."""
  fix = 'Move it away, or say another place: --root DIR'
  builder = open_directory(path)
  for split, names in BATCHES.items():
    try:
      count = len(builder.as_data_source(split))
      stored = sum(_stored(file) for file in builder.info.splits[split].filepaths)
    except Exception as e:
      raise UserError(f'{path} is not a whole CIFAR-10: {split}: {str(e).splitlines()[0]}', fix) from e
    if not count == stored == batch * len(names):
      raise UserError(f'{path} is not a whole CIFAR-10: {split} says {count:,} records and has {stored:,} '
                      f'instead of {batch * len(names):,}.', fix)


def _stored(file: os.PathLike) -> int:
  """The number of records in an array_record file, by its own footer."""
  from array_record.python.array_record_module import ArrayRecordReader
  reader = ArrayRecordReader(os.fspath(file))
  try:
    return reader.num_records()
  finally:
    reader.close()

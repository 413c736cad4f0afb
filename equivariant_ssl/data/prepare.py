"""CIFAR-10 as TFDS itself would prepare it, without TensorFlow.

It is made from the official binary archive and written as array_record.
"""
import functools
import hashlib
import http.client
import os
import pathlib
import posixpath
import tarfile
import urllib.request
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from equivariant_ssl.data.archive_files import ADDRESSES, UNPACKED, archive_file
from equivariant_ssl.data.encode import png
from equivariant_ssl.data.tfds_folders import default_root, open_directory
from equivariant_ssl.data.unpack import open_member, open_tar
from equivariant_ssl.data.writer import Dataset, Example, build, publish, scratch_folder
from equivariant_ssl.errors import UserError

URL = ADDRESSES['cifar10']
SIZE = 170_052_171
SHA256 = 'c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd'
NAMES = ('airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck')
FOLDER = 'cifar-10-batches-bin/'
BATCHES = {'train': tuple(f'data_batch_{i}.bin' for i in range(1, 6)), 'test': ('test_batch.bin',)}
BATCH = 10_000                  # records in a batch
RECORD = 1 + 32 * 32 * 3        # bytes: a label, then the red, green and blue planes
BY_HAND = (f'Or download {URL} in another way, and run: eqssl data prepare cifar10 --archive FILE')
OTHER_ROOT = 'Give another folder: --root DIR'

Log = Callable[[str], Any]


def cifar10(archive: str | None = None, root: str = '', log: Log = print) -> pathlib.Path:
  """Write `root`/cifar10/3.0.2, and return its path.

  Plain `tfds.data_source('cifar10', data_dir=root)` reads it. A valid data set that is already
  there stays as it is. No data set that is written in part ever has that name. Raises UserError.

  archive: the official binary archive, or the folder that holds it. Without it the archive is
           downloaded, and its checksum is verified. In both cases the content is verified: the
           sizes of the records, their counts, and the labels.
  root:    as in `data.cifar10.make`.
  """
  return prepare(archive, default_root(root), BATCH, log)


def prepare(archive: str | None, root: pathlib.Path, batch: int, log: Log) -> pathlib.Path:
  """`cifar10`, for an archive with `batch` records in each of its six files."""
  target = root / 'cifar10' / '3.0.2'
  if target.exists():
    verify(target, batch)
    log(f'{target} is already there and complete: it stays as it is.')
    return target
  try:
    root.mkdir(parents=True, exist_ok=True)
    with scratch_folder(root, 'cifar10') as scratch:
      if not archive:
        log(f'Downloading {URL} ({SIZE / 1e6:.0f} MB)')
        archive = str(scratch / os.path.basename(URL))
        download(archive)
      archive = str(archive_file(archive, 'cifar10'))
      log(f'Reading {archive}')
      splits = {split: np.concatenate(parts)
                for split, parts in read_archive(archive, batch).items()}
      log(f'Writing {sum(map(len, splits.values())):,} records as TFDS cifar10/3.0.2')
      written = write(splits, scratch / 'tfds')
      verify(written, batch)
      target.parent.mkdir(exist_ok=True)
      publish(written, target)
  except OSError as error:
    raise UserError(f'CIFAR-10 cannot be written in {root}: {error.strerror or error}.',
                    OTHER_ROOT) from error
  log(f'Prepared {target}')
  return target


def download(path: str, url: str = URL, size: int = SIZE, sha256: str = SHA256,
             opener: Callable[..., Any] = urllib.request.urlopen) -> None:
  """Download `url` to `path`. Raises UserError where it has another size or another checksum."""
  digest, count = hashlib.sha256(), 0
  try:
    with opener(url, timeout=60) as source, open(path, 'wb') as sink:
      while block := source.read(2**20):
        count += len(block)
        if count > size:
          break
        digest.update(block)
        sink.write(block)
  except (OSError, http.client.HTTPException) as error:  # also broken connections and timeouts
    raise UserError(f'The download of {url} failed after {count:,} bytes: {error}',
                    f'Try again. {BY_HAND}') from error
  if count != size:
    received = f'more than {size:,}' if count > size else f'{count:,}'
    raise UserError(f'The download of {url} gave {received} bytes instead of {size:,}.',
                    f'Try again. {BY_HAND}')
  if digest.hexdigest() != sha256:
    raise UserError(f'The download of {url} has the wrong SHA-256: {digest.hexdigest()}, '
                    f'not {sha256}.', f'Do not use it. {BY_HAND}')


def read_archive(path: str, batch: int) -> dict[str, list[np.ndarray]]:
  """{split: its batches, uint8 [batch 3073]} of a tar, gzipped or not.

  The tar is read as a stream and never unpacked to disk. Only its six files of records are looked
  at. Raises UserError for anything that is not the archive.
  """
  names, batches = {FOLDER + name for names in BATCHES.values() for name in names}, {}
  try:
    with open_tar(pathlib.Path(path), UNPACKED['cifar10']) as (tar, capped):
      for member in tar:
        name = posixpath.normpath(member.name)
        if name in names and member.isreg():
          if member.size != batch * RECORD:
            raise ValueError(f'{name} has {member.size:,} bytes instead of {batch * RECORD:,}')
          batches[name] = _records(name, open_member(tar, member).read())
      while capped.read(2**20):   # to the end, where the checksum of the whole gzip file is
        pass
  except (OSError, EOFError, ValueError, tarfile.TarError, zlib.error) as error:
    reason = getattr(error, 'strerror', None) or error
    raise UserError(f'{path} is not the binary archive of CIFAR-10: {reason}.',
                    f'The archive is at {URL}') from error
  if missing := sorted(names - batches.keys()):
    raise UserError(
        f'{path} is not the binary archive of CIFAR-10, for it lacks {", ".join(missing)}.',
        f'The archive (not the Python or Matlab version) is at {URL}')
  return {split: [batches[FOLDER + name] for name in names] for split, names in BATCHES.items()}


def _records(name: str, data: bytes) -> np.ndarray:
  records = np.frombuffer(data, np.uint8).reshape(-1, RECORD)
  largest = records[:, 0].max()
  if largest >= len(NAMES):
    raise ValueError(f'{name} has a label {largest}, but labels are 0 to 9')
  return records


def examples(split: str, records: np.ndarray) -> Iterator[Example]:
  """What TFDS's own builder makes of each record, with the image already encoded as a PNG."""
  for i, record in enumerate(records):
    image = png(record[1:].reshape(3, 32, 32).transpose(1, 2, 0))
    yield Example(i, image, int(record[0]), {'id': f'{split}_{i:05d}'})


def write(splits: dict[str, np.ndarray], root: pathlib.Path) -> pathlib.Path:
  """Write `root`/cifar10/3.0.2 with its metadata, in the order of TFDS, and return its path."""
  parts: dict[str, Callable[[], Iterable[Example]]] = {
      split: functools.partial(examples, split, records) for split, records in splits.items()}
  data = Dataset('cifar10', '3.0.2', NAMES, parts, official=True)
  info, _ = build(data, root, 0, lambda line: None)
  info.download_size = SIZE
  info.write_dataset_info_json(info.data_dir)
  return pathlib.Path(info.data_dir)


def verify(path: pathlib.Path, batch: int) -> None:
  """Raise UserError where `path` is not a complete CIFAR-10, by its metadata and by its files."""
  fix = f'Move it away. {OTHER_ROOT}'
  builder = open_directory(path)
  for split, names in BATCHES.items():
    try:
      count = len(builder.as_data_source(split))
      stored = sum(_record_count(file) for file in builder.info.splits[split].filepaths)
    except Exception as error:
      raise UserError(f'{path} is not a complete CIFAR-10: {split}: {str(error).splitlines()[0]}',
                      fix) from error
    if not count == stored == batch * len(names):
      raise UserError(f'{path} is not a complete CIFAR-10: {split} declares {count:,} records and '
                      f'has {stored:,}, instead of {batch * len(names):,}.', fix)


def _record_count(file: os.PathLike) -> int:
  """The number of records in an array_record file, as its footer says."""
  from array_record.python.array_record_module import ArrayRecordReader
  reader = ArrayRecordReader(os.fspath(file))
  try:
    return reader.num_records()
  finally:
    reader.close()

"""The records of a split in the order of TFDS, which is by the hashes of their keys.

They are sorted on disk, in buckets, so that a split may be larger than the memory.
"""
import contextlib
import itertools
import pathlib
import struct
from collections.abc import Iterable, Iterator

from equivariant_ssl.errors import UserError

BUCKETS = 200   # files that are open while a split is read; each is later sorted in memory
HEAD = struct.Struct('>16sQ')   # before a record in a bucket: the hash of its key, its length


def spread(place: pathlib.Path, split: str, records: Iterable[tuple[int | str, bytes]]
            ) -> tuple[list[pathlib.Path], int, int]:
  """Write the (key, record)s of a split to buckets, which are files, by the hashes of their keys.

  Returns the buckets, the number of records, and their bytes.
  """
  from tensorflow_datasets.core import hashing
  hasher, count, size = hashing.Hasher(split), 0, 0
  paths = [place / f'{split}-{i}.bucket' for i in range(BUCKETS)]
  with contextlib.ExitStack() as stack:
    files = [stack.enter_context(open(path, 'wb')) for path in paths]
    for key, record in records:
      rank = hasher.hash_key(key)
      file = files[rank * BUCKETS >> 128]
      file.write(HEAD.pack(rank.to_bytes(16, 'big'), len(record)))
      file.write(record)
      count, size = count + 1, size + len(record)
  return paths, count, size


def in_key_order(buckets: list[pathlib.Path]) -> Iterator[bytes]:
  """The records by the hashes of their keys.

  One bucket is in memory at a time, and each is deleted after it was read.
  """
  for path in buckets:
    spans, position, content = [], 0, memoryview(path.read_bytes())
    while position < len(content):
      rank, size = HEAD.unpack_from(content, position)
      start = position + HEAD.size
      position = start + size
      spans.append((rank, start, position))
    spans.sort()
    if any(first[0] == second[0] for first, second in itertools.pairwise(spans)):
      raise UserError('Two images of a split have the same name.',
                      'Check whether the archive holds a file twice.')
    yield from (bytes(content[start:stop]) for _, start, stop in spans)
    path.unlink()

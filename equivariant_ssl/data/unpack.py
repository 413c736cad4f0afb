"""Archives that are read as streams, within limits that an honest archive never reaches."""
import contextlib
import gzip
import io
import pathlib
import posixpath
import tarfile
import zipfile
from collections.abc import Iterator
from typing import IO, Any, cast

from equivariant_ssl.data.decode import FILE_BYTES
from equivariant_ssl.data.image_header import TOO_LARGE, BadImage

READ_AT_ONCE = 2**28   # bytes of one file of an archive that is read at once
LIST = 2**24           # bytes of a list of names in a zip


def members(tar: tarfile.TarFile) -> Iterator[tuple[str, tarfile.TarInfo]]:
  """The (name, member) of each regular file in a tar.

  Links, devices, hidden files and names that lead out of the tar are passed over.
  """
  for member in tar:
    name = posixpath.normpath(member.name)
    hidden = posixpath.basename(name).startswith('.')
    if member.isreg() and not name.startswith(('/', '..')) and not hidden:
      yield name, member


def open_member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
  """The content of a regular file in a tar, as a stream."""
  stream = tar.extractfile(member)
  assert stream is not None  # it is None only for a member that is not a regular file
  return stream


def check_end(tar: tarfile.TarFile, path: pathlib.Path) -> None:
  """Refuse a plain tar that was cut short between two members; tarfile accepts it.

  All of the tar must have been read. Raises tarfile.ReadError.
  """
  last = next(reversed(tar.getmembers()), None)
  if last is None:
    raise tarfile.ReadError('it is empty')
  blocks = -(-last.size // tarfile.BLOCKSIZE) + 1   # with one block of the end of the archive
  if path.stat().st_size < last.offset_data + blocks * tarfile.BLOCKSIZE:
    raise tarfile.ReadError('it is cut short')


class Capped(io.RawIOBase):
  """A stream that fails after more than `most` bytes, because an archive may be a bomb."""

  def __init__(self, stream: Any, most: int):
    self.stream, self.most, self.left = stream, most, most

  def read(self, n: int = -1) -> bytes:
    data = self.stream.read(min(n, self.left + 1) if n >= 0 else self.left + 1)
    self.left -= len(data)
    if self.left < 0:
      raise ValueError(f'it unpacks to more than {self.most:,} bytes')
    return data


@contextlib.contextmanager
def open_tar(path: pathlib.Path, most: int) -> Iterator[tuple[tarfile.TarFile, Capped]]:
  """A tar, gzipped or not, as a stream that is never unpacked to disk.

  Also returns the stream of the tar's own bytes, which gives at most `most` of them.
  """
  with open(path, 'rb') as file:
    gzipped = file.read(2) == b'\x1f\x8b'
  with (gzip.open if gzipped else open)(path, 'rb') as stream:
    capped = Capped(stream, most)
    with tarfile.open(fileobj=cast(IO[bytes], capped), mode='r|') as tar:
      yield tar, capped


def read_image(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes | BadImage:
  """The bytes of an image in a tar, or a BadImage where it is larger than an image may be."""
  if member.size > FILE_BYTES:
    return BadImage('larger than 256 MiB', TOO_LARGE)
  return open_member(tar, member).read()


def read_members(path: pathlib.Path, names: tuple[str, ...], most: int) -> dict[str, bytes]:
  """The contents of the files with these names in a tar, whatever folder of it they are in.

  most: the bytes that the tar may unpack to. Raises ValueError for a larger tar or file.
  """
  contents = {}
  with open_tar(path, most) as (tar, _):
    for name, member in members(tar):
      base = posixpath.basename(name)
      if base in names:
        if member.size > READ_AT_ONCE:
          raise ValueError(f'{name} has {member.size:,} bytes, which is more than {READ_AT_ONCE:,}')
        contents[base] = open_member(tar, member).read()
  return contents


def split_names(data: bytes) -> list[str]:
  """The names in a list of names."""
  return data.decode('utf-8-sig').split()


def read_list(zipped: zipfile.ZipFile, name: str) -> bytes:
  """A list of names in a zip. A zip gives no more bytes of a member than it declares.

  Raises ValueError where the list is too large.
  """
  if zipped.getinfo(name).file_size > LIST:
    raise ValueError(f'{name} has more than {LIST:,} bytes')
  return zipped.read(name)

"""Archives read as streams, within limits: what lies in them, and no more bytes than an honest one has."""
import contextlib
import gzip
import io
import pathlib
import posixpath
import tarfile
import zipfile
from collections.abc import Iterator
from typing import Any

from equivariant_ssl.data.decode import FILE_BYTES, TOO_LARGE, BadImage

PICKED = 2**28   # bytes of one file of an archive that is read at once
LIST = 2**24     # bytes of a list of names in a zip


def members(tar: tarfile.TarFile) -> Iterator[tuple[str, tarfile.TarInfo]]:
  """(name, member) of the regular files of a tar that lie within it; links, devices and ways out are passed over."""
  for member in tar:
    name = posixpath.normpath(member.name)
    if member.isreg() and not name.startswith(('/', '..')) and not posixpath.basename(name).startswith('.'):
      yield name, member


def check_end(tar: tarfile.TarFile, path: pathlib.Path) -> None:
  """Refuse a plain tar, all read, that was cut between two members: tarfile takes it for a whole one."""
  last = next(reversed(tar.getmembers()), None)
  if last is None:
    raise tarfile.ReadError('it holds nothing')
  if path.stat().st_size < last.offset_data + (-last.size // tarfile.BLOCKSIZE) * -tarfile.BLOCKSIZE + tarfile.BLOCKSIZE:
    raise tarfile.ReadError('it is cut short')


class Capped(io.RawIOBase):
  """A stream that fails once it has given more than `most` bytes: an archive may be a bomb."""

  def __init__(self, stream: Any, most: int):
    self.stream, self.most, self.left = stream, most, most

  def read(self, n: int = -1) -> bytes:
    data = self.stream.read(min(n, self.left + 1) if n >= 0 else self.left + 1)
    self.left -= len(data)
    if self.left < 0:
      raise ValueError(f'it unpacks to more than {self.most:,} bytes')
    return data


@contextlib.contextmanager
def opened(path: pathlib.Path, most: int) -> Iterator[tuple[tarfile.TarFile, Capped]]:
  """A tar (gzipped or not) as a stream, never unpacked to disk, and what it is read from, `most` bytes of it at most."""
  with open(path, 'rb') as file:
    gzipped = file.read(2) == b'\x1f\x8b'
  with (gzip.open if gzipped else open)(path, 'rb') as stream:
    capped = Capped(stream, most)
    with tarfile.open(fileobj=capped, mode='r|') as tar:
      yield tar, capped


def content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes | BadImage:
  """The bytes of a member, none of whose size is believed to be more than an image's."""
  return tar.extractfile(member).read() if member.size <= FILE_BYTES else BadImage('larger than 256 MiB', TOO_LARGE)


def picked(path: pathlib.Path, names: tuple[str, ...], most: int) -> dict[str, bytes]:
  """The contents of the members of a tar with these names, whatever their folder; `most`: bytes that it unpacks to."""
  found = {}
  with opened(path, most) as (tar, _):
    for name, member in members(tar):
      if (base := posixpath.basename(name)) in names:
        if member.size > PICKED:
          raise ValueError(f'{name} has {member.size:,} bytes, more than {PICKED:,}')
        found[base] = tar.extractfile(member).read()
  return found


def words(data: bytes) -> list[str]:
  """The names in a list of them."""
  return data.decode('utf-8-sig').split()


def listed(zipped: zipfile.ZipFile, name: str) -> bytes:
  """A list in a zip, which gives no more bytes of a member than it says there are."""
  if zipped.getinfo(name).file_size > LIST:
    raise ValueError(f'{name} has more than {LIST:,} bytes')
  return zipped.read(name)

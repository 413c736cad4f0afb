"""Randomness by name: the draws of a consumer depend on its path alone, so a new one moves none."""
import zlib

import jax

from equivariant_ssl.types import Array, Key


def key_for(key: Key, *path: str | int | Array) -> Key:
  """The key at `path` below `key`: each name or number of the path is folded in.

  A name is folded by a hash (CRC-32) that is the same in every process and version of Python.
  """
  for part in path:
    key = jax.random.fold_in(key, zlib.crc32(part.encode()) if isinstance(part, str) else part)
  return key

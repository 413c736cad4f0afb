"""Randomness by name: a consumer's draws depend on its own path alone, so adding one moves no other."""
import zlib

import jax

from equivariant_ssl.types import Array, Key


def key_for(key: Key, *path: str | int | Array) -> Key:
  """Fold names (by a hash that is stable across processes and versions) and numbers into `key`."""
  for part in path:
    key = jax.random.fold_in(key, zlib.crc32(part.encode()) if isinstance(part, str) else part)
  return key

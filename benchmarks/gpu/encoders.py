"""Networks as files that come back from a lease, in pieces of 16 MiB, deflated. Matrices are float16; the rest is as it
was.

A restored network has the float16 rounding of its weights (at most 5e-4 each, relative); the vectors of BatchNorm are
exact.
"""
import hashlib
import pathlib
import zlib

import numpy as np
from safetensors.numpy import load, save

PIECE = 16 * 2**20  # bytes of a file that comes back, at most


def narrowed(leaves: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Floating-point arrays of two dimensions and more as float16. ValueError where a number is not finite there."""
  with np.errstate(over='ignore'):  # said below, by name
    small = {k: v.astype(np.float16) if v.ndim > 1 and np.issubdtype(v.dtype, np.floating) else v
             for k, v in leaves.items()}
  broken = [k for k, v in small.items() if not np.isfinite(v).all()]
  if broken:
    raise ValueError(f'{", ".join(broken[:3])}: not finite in float16')
  return small


def write(leaves: dict[str, np.ndarray], folder: pathlib.Path, stem: str, piece: int = PIECE) -> dict:
  """Write the arrays {key path: array} to `folder`/`stem`.0, .1, ...; return {files, bytes, sha256}, by which they are
  found and checked."""
  whole = zlib.compress(save({k: np.ascontiguousarray(v) for k, v in narrowed(leaves).items()}), 6)
  names = []
  for i, start in enumerate(range(0, len(whole), piece)):
    names.append(f'{stem}.{i}')
    part = folder / f'.{names[-1]}.tmp'
    part.write_bytes(whole[start:start + piece])
    part.replace(folder / names[-1])
  return {'files': names, 'bytes': len(whole), 'sha256': hashlib.sha256(whole).hexdigest()}


def read(files: list[pathlib.Path], sha256: str) -> dict[str, np.ndarray]:
  """{key path: array} of the pieces, in order; arrays that were narrowed are float32. ValueError where the bytes are other
  ones."""
  whole = b''.join(file.read_bytes() for file in files)
  if hashlib.sha256(whole).hexdigest() != sha256:
    raise ValueError(f'{", ".join(f.name for f in files)}: together not the bytes that were written')
  return {k: v.astype(np.float32) if v.dtype == np.float16 else v for k, v in load(zlib.decompress(whole)).items()}

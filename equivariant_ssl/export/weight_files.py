"""Files of weights.

They are read within stated limits, and only where they are complete. An exported file is sealed by
a fingerprint of its bytes.
"""
import hashlib
import json
import pathlib
import re
import shlex
import zipfile
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from equivariant_ssl.errors import UserError

State = dict[str, np.ndarray]  # {name: array in torch's layout}

SUFFIXES = ('.safetensors', '.pth', '.pt', '.tar')
# The keys under which training scripts keep the state dict.
INSIDE = ('state_dict', 'model', 'model_state_dict', 'net')
# Before this version, weights_only=True could run code (CVE-2025-32434, CVE-2026-24747).
SAFE_TORCH = (2, 10)
# The most bytes of a file, and of what a compressed file unpacks to: ten times a ViT-B.
BYTES = 4 * 2 ** 30
HEADER = 4 * 2 ** 20  # the most bytes of a safetensors header: a hundred times a ViT-B's
TENSORS = 20_000      # the most tensors in a header
# The key of the digest in a header's metadata, and its value while the digest is computed.
SEAL, EMPTY = 'sha256', '0' * 64
CONVERT = ('import sys, torch, safetensors.torch as st; '
           's = torch.load(sys.argv[1], map_location="cpu", weights_only=True); '
           f's = next((s[n] for n in {json.dumps(INSIDE)} if isinstance(s.get(n), dict)), s); '
           'st.save_file({k: v.clone().contiguous() for k, v in s.items() '
           'if isinstance(v, torch.Tensor)}, sys.argv[2])')


def read(path: pathlib.Path) -> State:
  """Read the tensors of a .safetensors file, or of a state dict that torch saved.

  Tensors of floating point are returned as float32.

  Raises UserError where there is no such file, where it is damaged, larger than the limits above,
  or of another kind, where its fingerprint says that it was changed, and where torch is needed but
  missing.
  """
  if not path.is_file():
    raise UserError(f'there is no file {path}.',
                    'Name a file of a torchvision ResNet, for example model.safetensors.')
  if path.suffix not in SUFFIXES:
    raise UserError(f'{path} is not a file of weights.',
                    f'Name a file with one of these endings: {", ".join(SUFFIXES)}.')
  if (size := path.stat().st_size) > BYTES:
    raise _too_large(path, f'{size:,} bytes', BYTES)
  state = _safetensors(path) if path.suffix == '.safetensors' else _pickled(path)
  # A number that float32 cannot hold becomes infinite, and is refused later because it is.
  with np.errstate(over='ignore'):
    return {k: v.astype(np.float32) if jnp.issubdtype(v.dtype, np.floating) else v
            for k, v in state.items()}


def _too_large(path: pathlib.Path, size: str, most: int) -> UserError:
  """Return the error for a file that is larger than a limit."""
  return UserError(f'{path} has {size}; at most {most:,} are read.',
                   'Give the weights of the encoder alone.')


def _header(content: bytes) -> dict:
  """Return the header of a safetensors file. Raises ValueError where it has none."""
  size = int.from_bytes(content[:8], 'little')
  if len(content) < 8 or size > len(content) - 8:
    raise ValueError('its header is cut short')
  header = json.loads(content[8:8 + min(size, HEADER)])
  if not isinstance(header, dict):
    raise ValueError('its header is no object')
  return header


def sealed(content: bytes) -> bytes:
  """Return a safetensors file with the SHA-256 of its bytes added to its metadata.

  The same content always gives the same bytes.
  """
  header = _header(content)
  size = int.from_bytes(content[:8], 'little')
  metadata = {**header.get('__metadata__', {}), SEAL: EMPTY}
  header['__metadata__'] = dict(sorted(metadata.items()))
  text = json.dumps(header, separators=(',', ':')).encode()
  text += b' ' * (-len(text) % 8)  # torch needs aligned tensors
  file = len(text).to_bytes(8, 'little') + text + content[8 + size:]
  return file.replace(EMPTY.encode(), hashlib.sha256(file).hexdigest().encode(), 1)


def _seal_holds(content: bytes, seal: str) -> bool:
  """Return whether `seal` is the digest of a file with EMPTY in the seal's place."""
  if not re.fullmatch('[0-9a-f]{64}', seal) or content.count(seal.encode()) != 1:
    return False
  return hashlib.sha256(content.replace(seal.encode(), EMPTY.encode())).hexdigest() == seal


def _broken(content: bytes, metadata: dict) -> bool:
  """Return whether a file has a fingerprint that is not the fingerprint of its bytes.

  An entry of the metadata is taken for a fingerprint by its key or by its length, because damage
  may have changed one of the two.
  """
  seals = [v for k, v in metadata.items() if k == SEAL or len(v) == len(EMPTY)]
  return any(not _seal_holds(content, seal) for seal in seals)


def _safetensors(path: pathlib.Path) -> State:
  """Read a .safetensors file."""
  with path.open('rb') as file:
    size = int.from_bytes(file.read(8), 'little')
    if size > HEADER and size <= path.stat().st_size - 8:
      raise _too_large(path, f'a header of {size:,} bytes', HEADER)
  content = path.read_bytes()
  try:
    header = _header(content)
    if len(header) > TENSORS:
      raise _too_large(path, f'{len(header):,} tensors', TENSORS)
    state, broken = load_file(path), _broken(content, header.get('__metadata__', {}))
  # Among these are the errors of kinds of numbers that NumPy lacks.
  except (SafetensorError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
    reason = str(e).splitlines()[0][:100] if str(e) else type(e).__name__
    raise UserError(f'{path} is damaged or no safetensors file: {reason}.',
                    'Copy or download it again.') from e
  if broken:
    raise UserError(f'{path} is damaged: it is not what the SHA-256 in its own header says.',
                    'Export or copy it again.')
  return state


def _conversion(path: pathlib.Path) -> str:
  """Return the command that makes a .safetensors file of `path` where torch is new enough."""
  target = path.with_name(path.name.split('.')[0] + '.safetensors')
  return shlex.join(['python', '-c', CONVERT, str(path), str(target)])


def _safe_torch(path: pathlib.Path) -> Any:
  """Return the module torch. Raises UserError where torch is missing, or too old to read `path`."""
  try:
    import torch  # pyright: ignore[reportMissingImports]  (torch is optional)
    version = torch.__version__
  except ImportError:
    torch, version = None, ''
  if not version or tuple(int(n) for n in version.split('.')[:2]) < SAFE_TORCH:
    reason = (f'torch {version} can be made to run code that such a file holds' if version
              else 'torch is not installed')
    least = '.'.join(map(str, SAFE_TORCH))
    raise UserError(f'{path} is a file of torch, and {reason}.',
                    f'Type: pip install "torch>={least}"; or convert the file where that torch '
                    f'is: {_conversion(path)}')
  return torch


def _state_dict(content: Any) -> dict:
  """Return the state dict in what a training script saved, {} where there is none."""
  while isinstance(content, dict):
    key = next((k for k in INSIDE if isinstance(content.get(k), dict)), None)
    if key is None:
      return content
    content = content[key]
  return {}


def _pickled(path: pathlib.Path) -> State:
  """Read the state dict in a file that torch saved."""
  torch = _safe_torch(path)
  if zipfile.is_zipfile(path):
    with zipfile.ZipFile(path) as file:
      if (size := sum(i.file_size for i in file.infolist())) > BYTES:
        raise _too_large(path, f'{size:,} bytes unpacked', BYTES)
  try:
    content = torch.load(path, map_location='cpu', weights_only=True)
    tensors = {k: v for k, v in _state_dict(content).items() if isinstance(v, torch.Tensor)}
    # A view can have more numbers than the file.
    if (size := sum(4 * v.numel() for v in tensors.values())) > BYTES:
      raise _too_large(path, f'tensors of {size:,} bytes', BYTES)
    return {k: (v.double() if v.is_floating_point() else v).detach().numpy()
            for k, v in tensors.items()}
  except UserError:
    raise
  except Exception as e:  # torch raises many kinds of errors
    reason = f'{type(e).__name__}: {str(e).splitlines()[0][:100]}'
    raise UserError(f'{path} is damaged, or more than a state dict: {reason}',
                    'Save it again: torch.save(net.state_dict(), FILE)') from e

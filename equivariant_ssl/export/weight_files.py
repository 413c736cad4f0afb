"""Files of weights: read within stated limits and only where they are whole, and sealed by a fingerprint of their own."""
import hashlib
import json
import pathlib
import re
import shlex
import zipfile

import jax
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from equivariant_ssl.errors import UserError

State = dict[str, np.ndarray]  # {name: array in torch's layout}

SUFFIXES = ('.safetensors', '.pth', '.pt', '.tar')
INSIDE = ('state_dict', 'model', 'model_state_dict', 'net')  # where training scripts keep the state dict
SAFE_TORCH = (2, 10)  # before it, weights_only=True could run code (CVE-2025-32434, CVE-2026-24747)
BYTES = 4 * 2 ** 30  # of a file, and of what a compressed one unpacks to: ten times a ViT-B
HEADER = 4 * 2 ** 20  # bytes of a safetensors header: a hundred times a ViT-B's
TENSORS = 20_000  # in a header
SEAL, EMPTY = 'sha256', '0' * 64  # the key in a header's metadata, and what stands there while the digest is taken
CONVERT = ('import sys, torch, safetensors.torch as st; s = torch.load(sys.argv[1], map_location="cpu", weights_only=True); '
           f's = next((s[n] for n in {json.dumps(INSIDE)} if isinstance(s.get(n), dict)), s); '
           'st.save_file({k: v.clone().contiguous() for k, v in s.items() if isinstance(v, torch.Tensor)}, sys.argv[2])')


def read(path: pathlib.Path) -> State:
  """The tensors of a .safetensors file, or of a state dict that torch saved; floating ones as float32.

  Raises UserError where there is no such file, it is damaged, beyond the limits above or of another kind, its own
  fingerprint says that it was changed, or torch is needed and missing.
  """
  if not path.is_file():
    raise UserError(f'there is no file {path}.', 'Give that of a torchvision ResNet, e.g. model.safetensors.')
  if path.suffix not in SUFFIXES:
    raise UserError(f'{path} is not a file of weights.', f'It ends in one of: {", ".join(SUFFIXES)}.')
  if (size := path.stat().st_size) > BYTES:
    raise _too_large(path, f'{size:,} bytes', BYTES)
  state = _safetensors(path) if path.suffix == '.safetensors' else _pickled(path)
  with np.errstate(over='ignore'):  # what float32 cannot hold becomes infinite, and is refused as that
    return {k: v.astype(np.float32) if jax.dtypes.issubdtype(v.dtype, np.floating) else v for k, v in state.items()}


def _too_large(path: pathlib.Path, what: str, most: int) -> UserError:
  return UserError(f'{path} has {what}; at most {most:,} are read.', 'Give the weights of the encoder alone.')


def _header(content: bytes) -> dict:
  """The header of a safetensors file; ValueError where it has none."""
  size = int.from_bytes(content[:8], 'little')
  if len(content) < 8 or size > len(content) - 8:
    raise ValueError('its header is cut short')
  found = json.loads(content[8:8 + min(size, HEADER)])
  if not isinstance(found, dict):
    raise ValueError('its header is no object')
  return found


def sealed(content: bytes) -> bytes:
  """A safetensors file with the SHA-256 of its bytes in its metadata, beside what is there. The same bytes each time."""
  header = _header(content)
  size = int.from_bytes(content[:8], 'little')
  header['__metadata__'] = dict(sorted({**header.get('__metadata__', {}), SEAL: EMPTY}.items()))
  text = json.dumps(header, separators=(',', ':')).encode()
  text += b' ' * (-len(text) % 8)  # torch wants tensors that are aligned
  whole = len(text).to_bytes(8, 'little') + text + content[8 + size:]
  return whole.replace(EMPTY.encode(), hashlib.sha256(whole).hexdigest().encode(), 1)


def _broken(content: bytes, metadata: dict) -> bool:
  """Whether the file has a fingerprint, and not that of its bytes. One that is itself damaged, in its name or its value, is
  one too."""
  marks = [v for k, v in metadata.items() if k == SEAL or len(v) == len(EMPTY)]
  return any(not re.fullmatch('[0-9a-f]{64}', v) or content.count(v.encode()) != 1
             or hashlib.sha256(content.replace(v.encode(), EMPTY.encode())).hexdigest() != v for v in marks)


def _safetensors(path: pathlib.Path) -> State:
  with path.open('rb') as file:
    size = int.from_bytes(file.read(8), 'little')
    if size > HEADER and size <= path.stat().st_size - 8:
      raise _too_large(path, f'a header of {size:,} bytes', HEADER)
  content = path.read_bytes()
  try:
    header = _header(content)
    if len(header) > TENSORS:
      raise _too_large(path, f'{len(header):,} tensors', TENSORS)
    state, whole = load_file(path), not _broken(content, header.get('__metadata__', {}))
  except (SafetensorError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:  # of what NumPy lacks, too
    why = str(e).splitlines()[0][:100] if str(e) else type(e).__name__
    raise UserError(f'{path} is damaged or no safetensors file: {why}.', 'Copy or download it again.') from e
  if not whole:
    raise UserError(f'{path} is damaged: it is not what the SHA-256 in its own header says.', 'Export or copy it again.')
  return state


def _conversion(path: pathlib.Path) -> str:
  """The command that makes a .safetensors file of `path`, where torch is new enough."""
  return shlex.join(['python', '-c', CONVERT, str(path), str(path.with_name(path.name.split('.')[0] + '.safetensors'))])


def _pickled(path: pathlib.Path) -> State:
  least = '.'.join(map(str, SAFE_TORCH))
  try:
    import torch
    version = torch.__version__
  except ImportError:
    version = ''
  if not version or tuple(int(n) for n in version.split('.')[:2]) < SAFE_TORCH:
    why = f'torch {version} can be made to run what such a file says' if version else 'torch is not installed'
    raise UserError(f'{path} is a file of torch, and {why}.',
                    f'pip install "torch>={least}"; or, where that is: {_conversion(path)}')
  if zipfile.is_zipfile(path):
    with zipfile.ZipFile(path) as file:
      if (size := sum(i.file_size for i in file.infolist())) > BYTES:
        raise _too_large(path, f'{size:,} bytes unpacked', BYTES)
  try:
    found = torch.load(path, map_location='cpu', weights_only=True)
    while isinstance(found, dict) and (inner := next((n for n in INSIDE if isinstance(found.get(n), dict)), None)):
      found = found[inner]
    tensors = found.items() if isinstance(found, dict) else ()
    tensors = {k: v for k, v in tensors if isinstance(v, torch.Tensor)}
    if (size := sum(4 * v.numel() for v in tensors.values())) > BYTES:  # a view can be of more than the file has
      raise _too_large(path, f'tensors of {size:,} bytes', BYTES)
    return {k: (v.double() if v.is_floating_point() else v).detach().numpy() for k, v in tensors.items()}
  except UserError:
    raise
  except Exception as e:  # it raises many kinds
    raise UserError(f'{path} is damaged, or more than a state dict: {type(e).__name__}: {str(e).splitlines()[0][:100]}',
                    'Save it again: torch.save(net.state_dict(), FILE)') from e

"""`eqssl doctor`: what is installed, which devices there are, and what is missing."""
import importlib.metadata
import importlib.util
import os
import pathlib
import shutil
import sys
import time

import jax
import jax.numpy as jnp

from equivariant_ssl import shipped
from equivariant_ssl.data import tfds
from equivariant_ssl.errors import OK, USAGE
from equivariant_ssl.storage import record

PACKAGES = ('jax', 'flax', 'optax', 'orbax-checkpoint', 'dm-pix', 'ml-collections',
            'tensorflow-datasets', 'safetensors')
Line = tuple[bool, str]  # whether all is well, and the text


def _line(good: bool, text: str, fix: str = '') -> Line:
  """Return a line of the report. Under what is wrong stands the fix."""
  return good, text if good or not fix else f'{text}\n         {fix}'


def _installed_lines() -> list[Line]:
  """Return the lines about Python and the packages."""
  lines = [_line(sys.version_info >= (3, 11), f'Python {sys.version.split()[0]}',
                 'Python 3.11 or newer is needed')]
  for name in PACKAGES:
    try:
      lines.append(_line(True, f'{name} {importlib.metadata.version(name)}'))
    except importlib.metadata.PackageNotFoundError:
      lines.append(_line(False, f'{name} is missing', 'pip install -e .'))
  return lines


def _no_device(error: Exception) -> str:
  """Return the text for a machine on which jax finds no device."""
  platforms = os.environ.get('JAX_PLATFORMS', '')
  where = f' of JAX_PLATFORMS={platforms}' if platforms else ''
  unset = 'unset JAX_PLATFORMS, or install for it: ' if platforms else ''
  return (f'WRONG  jax finds no device{where}: {str(error) or "no driver for it"}\n'
          f'         {unset}pip install -e ".[cuda]" or ".[tpu]"')


def _machine_lines() -> list[Line]:
  """Return the lines about the devices, the data sets, the configs and the disk."""
  lines = []
  if shutil.which('nvidia-smi') and jax.default_backend() == 'cpu':
    lines.append(_line(False, 'an NVIDIA driver is here, but jax sees no GPU',
                       'pip install -e ".[cuda]"; for a V100 or a driver before 580: ".[cuda12]"'))
  tensorflow = importlib.util.find_spec('tensorflow') is not None
  lines.append(_line(True, 'TensorFlow: ' + (
      'installed; this package does not import it' if tensorflow else 'none, and none needed')))
  start = time.perf_counter()
  jax.block_until_ready(jax.jit(lambda x: x @ x)(jnp.ones((512, 512))))
  seconds = time.perf_counter() - start
  lines.append(_line(True, f'a matrix product compiled and ran in {seconds:.2f} s'))
  root = tfds.default_root('')
  data_sets = sorted(p.name for p in root.iterdir() if p.is_dir()) if root.is_dir() else []
  names = ', '.join(data_sets) or 'none (digits needs none; eqssl data prepare cifar10)'
  lines.append(_line(True, f'data sets in {root}: {names}'))
  folders = shipped.folders()
  lines.append(_line(bool(folders), f'configs in {", ".join(map(str, folders)) or "no folder"}',
                     'run inside a clone of the project'))
  free = shutil.disk_usage(pathlib.Path.cwd()).free
  lines.append(_line(True, f'{free / 2 ** 30:.0f} GiB free here'))
  commit = record.environment().get('git')
  lines.append(_line(True, f'git: {commit or "not a checkout"}'))
  return lines


def run() -> int:
  """Print the report. Return 2 if something that training needs is wrong."""
  lines = _installed_lines()
  try:
    kinds = {d.device_kind for d in jax.devices()}
  except (RuntimeError, AssertionError) as error:
    print(_no_device(error))
    return USAGE
  lines.append(_line(True, f'{jax.device_count()} {jax.default_backend()} device(s): '
                           f'{", ".join(sorted(kinds))}'))
  lines += _machine_lines()
  for good, text in lines:
    print(f'{"ok  " if good else "WRONG"}  {text}')
  return OK if all(good for good, _ in lines) else USAGE

"""What is installed, what devices there are, what is missing: one line each, the fix beside what is wrong."""
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


def run() -> int:
  """Print the report; returns 2 where something that training needs is wrong."""
  lines = []
  say = lambda good, text, fix='': lines.append((good, text + ('' if good or not fix else f'\n         {fix}')))
  say(sys.version_info >= (3, 11), f'Python {sys.version.split()[0]}', 'Python 3.11 or newer is needed')
  for name in ('jax', 'flax', 'optax', 'orbax-checkpoint', 'dm-pix', 'ml-collections', 'tensorflow-datasets',
               'safetensors'):
    try:
      say(True, f'{name} {importlib.metadata.version(name)}')
    except importlib.metadata.PackageNotFoundError:
      say(False, f'{name} is missing', 'pip install -e .')
  try:
    kinds = {d.device_kind for d in jax.devices()}
  except (RuntimeError, AssertionError) as error:
    asked = os.environ.get('JAX_PLATFORMS', '')
    print(f'WRONG  jax finds no device{f" of JAX_PLATFORMS={asked}" if asked else ""}: {str(error) or "no driver for it"}\n'
          f'         {"unset JAX_PLATFORMS, or install for it: " if asked else ""}pip install -e ".[cuda]" or ".[tpu]"')
    return USAGE
  say(True, f'{jax.device_count()} {jax.default_backend()} device(s): {", ".join(sorted(kinds))}')
  if shutil.which('nvidia-smi') and jax.default_backend() == 'cpu':
    say(False, 'an NVIDIA driver is here, but jax sees no GPU',
        'pip install -e ".[cuda]"; for a V100 or a driver before 580: ".[cuda12]"')
  tensorflow = importlib.util.find_spec('tensorflow') is not None
  say(True, 'TensorFlow: ' + ('installed; this package does not import it' if tensorflow else 'none, and none needed'))
  start = time.perf_counter()
  jax.block_until_ready(jax.jit(lambda x: x @ x)(jnp.ones((512, 512))))
  say(True, f'a matrix product compiled and ran in {time.perf_counter() - start:.2f} s')
  root = tfds.default_root('')
  prepared = sorted(p.name for p in root.iterdir() if p.is_dir()) if root.is_dir() else []
  say(True, f'data sets in {root}: {", ".join(prepared) or "none (digits needs none; eqssl data prepare cifar10)"}')
  folders = shipped.folders()
  say(bool(folders), f'configs in {", ".join(map(str, folders)) or "no folder"}', 'run inside a clone of the project')
  say(True, f'{shutil.disk_usage(pathlib.Path.cwd()).free / 2 ** 30:.0f} GiB free here')
  commit = record.environment().get('git')
  say(True, f'git: {commit or "not a checkout"}')
  for good, text in lines:
    print(f'{"ok  " if good else "WRONG"}  {text}')
  return OK if all(good for good, _ in lines) else USAGE

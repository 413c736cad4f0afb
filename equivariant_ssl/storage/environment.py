"""The environment of a run: the versions, the machine and the commit that a number depends on."""
import contextlib
import importlib.metadata
import os
import pathlib
import platform
import socket
import subprocess
import time
from typing import Any

import jax

from equivariant_ssl.parallel import sharding

PACKAGES = ('equivariant-ssl', 'jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy')


def _git(file: pathlib.Path, *args: str) -> str:
  """Return what a git command prints, in the folder of `file`."""
  return subprocess.run(['git', '--no-optional-locks', *args], cwd=file.parent,
                        capture_output=True, encoding='utf-8', check=True, timeout=20
                        ).stdout.strip()


def _commit() -> str | None:
  """Return '<commit>' or '<commit>+modified' of the checkout that this package is in.

  The result is None if the package is in no checkout of its own.
  """
  file = pathlib.Path(__file__)
  try:
    # This fails if the package is installed inside the checkout of another project.
    _git(file, 'ls-files', '--error-unmatch', file.name)
    modified = '+modified' if _git(file, 'status', '--porcelain') else ''
    return _git(file, 'rev-parse', 'HEAD') + modified
  except (OSError, subprocess.SubprocessError):
    return None


def _processor() -> str:
  """Return the name of the processor."""
  with contextlib.suppress(OSError):
    for line in pathlib.Path('/proc/cpuinfo').read_text(encoding='utf-8').splitlines():
      if line.startswith('model name'):
        return line.partition(':')[2].strip()
  return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
  """Return the versions of this package and of the packages that its numbers depend on."""
  installed = {}
  for name in PACKAGES:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      installed[name] = importlib.metadata.version(name)
  return installed


def environment() -> dict[str, Any]:
  """Return what a number depends on beside the config.

  These are the versions, the machine, the devices, the flags, the commit of the package, and the
  time.
  """
  return {'python': platform.python_version(), **versions(), 'platform': platform.platform(),
          'host': socket.gethostname(), 'cpu': _processor(), 'cores': sharding.count_cores(),
          'backend': jax.default_backend(), 'devices': [d.device_kind for d in jax.devices()],
          'processes': jax.process_count(), 'xla_flags': os.environ.get('XLA_FLAGS', ''),
          'git': _commit(), 'time': time.strftime('%Y-%m-%dT%H:%M:%S%z')}

"""The compilers of accelerators, which run where no accelerator is.

A step is compiled in a process of its own, `parallel/compile_process.py`: its environment is
arranged for a machine without the device, and what the compilers print does not reach the user.
"""
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
from typing import Any, NamedTuple

from equivariant_ssl.errors import UserError
from equivariant_ssl.parallel.accelerators import ACCELERATORS, PlannedDevices, target_name

# jax looks for no device here, and the compilers for no service that describes one. libtpu is
# loaded beside another program that uses it, such as a training or a second plan.
ENVIRONMENT = {'JAX_PLATFORMS': 'cpu', 'TPU_SKIP_MDS_QUERY': '1', 'TF_CPP_MIN_LOG_LEVEL': '3',
               'JAX_SKIP_CUDA_CONSTRAINTS_CHECK': '1', 'TPU_LOG_DIR': 'disabled',
               'ALLOW_MULTIPLE_LIBTPU_LOAD': 'true'}
# Which wheels compile for GPUs, either of them.
GPU_WHEELS = {'jax_plugins.xla_cuda13': 'jax-cuda13-plugin',
              'jax_plugins.xla_cuda12': 'jax-cuda12-plugin'}


class CompiledStep(NamedTuple):
  """What a device's compiler says of one training step. Bytes and FLOPs are those of one device.

  target:     the devices, as --on takes them.
  compiler:   the versions of jax and of the compiler.
  fits:       whether the program fits the device.
  limit:      bytes that a program may have.
  peak:       bytes at the peak of the step. Where the compiler refused the program (a TPU's does if
              it does not fit), what it says the program needs.
  weights, optimizer, batch, data: bytes of what must lie there: the weights with their BatchNorm
              statistics, the optimizer's state with a target network, the canvases of a batch, the
              data set (0 where it is streamed). Arrays on a TPU may need more than that, in tiles.
  temporaries: bytes of all else that the compiler plans; 0 where it refused the program.
  flops:      {precision: FLOP of products and convolutions}.
  images, views: images of the global batch, and views of each.
  parameters: the number of parameters of the networks.
  steps, steps_per_epoch: of the run.
  program:    a digest of the program that the compiler was given.
  work:       the fields of a `program_report.Work`; None where the compiler refused the program.
  """
  target: str
  compiler: str
  fits: bool
  limit: int
  peak: int
  weights: int
  optimizer: int
  batch: int
  data: int
  temporaries: int
  flops: dict[str, float]
  images: int
  views: int
  parameters: int
  steps: int
  steps_per_epoch: int
  program: str
  work: dict[str, Any] | None


def is_installed(module: str) -> bool:
  """Whether a module of another package is there. It is not imported."""
  try:
    return importlib.util.find_spec(module) is not None
  except ModuleNotFoundError:
    return False


def compiler_version(target: PlannedDevices) -> str:
  """Return the versions of jax and of the compiler of a target, such as 'jax 0.10.2, libtpu 0.42'.

  Raises UserError if the compiler is not installed.
  """
  is_gpu = ACCELERATORS[target.kind].gpu
  wheels = GPU_WHEELS if is_gpu else {'libtpu': 'libtpu'}
  wheel = next((wheel for module, wheel in wheels.items() if is_installed(module)), None)
  if wheel is None:
    device, extra = ('GPUs', 'plan-gpu') if is_gpu else ('TPUs', 'plan-tpu')
    raise UserError(f'--on {target_name(target)}: the compiler for {device} is missing (the wheel '
                    f'{next(iter(wheels.values()))}). It needs no device.',
                    f'pip install -e ".[{extra}]"')
  jax, compiler = (importlib.metadata.version(name) for name in ('jax', wheel))
  if is_gpu and jax != compiler:  # jax then leaves the compiler aside
    raise UserError(f'--on {target_name(target)}: {wheel} {compiler} is not for jax {jax}.',
                    f'pip install --upgrade {wheel}=={jax}')
  return f'jax {jax}, {wheel} {compiler}'


def compile_step(config: Any, target: PlannedDevices, known: str = '') -> CompiledStep | None:
  """Compile the step of a resolved config for devices that need not be there.

  known: the digest of a program. If the step is that program, nothing is compiled and the result is
         None.

  It takes from seconds to minutes. Raises UserError if the compiler is missing, if the config does
  not fit the devices, and if the compiler fails for another reason than the device's memory.
  """
  version = compiler_version(target)
  with tempfile.TemporaryDirectory() as folder:
    answer = pathlib.Path(folder) / 'answer.json'
    request = {'config': config.to_json(), 'target': target, 'version': version,
               'known': known, 'answer': str(answer)}
    child = subprocess.run(
        [sys.executable, '-m', 'equivariant_ssl.parallel.compile_process'],
        env={**os.environ, **ENVIRONMENT}, input=json.dumps(request), encoding='utf-8',
        errors='replace', stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if not answer.is_file():
      if child.returncode == -signal.SIGKILL:
        raise UserError(f'the compiler for {target_name(target)} was killed: this machine may have '
                        'too little memory for it. A large step takes some GiB.',
                        'Run this on a larger machine, or with fewer programs beside it.')
      log = pathlib.Path(tempfile.gettempdir()) / f'eqssl-compiler-{os.getpid()}.txt'
      log.write_text(child.stdout, encoding='utf-8')
      raise UserError(f'the compiler for {target_name(target)} ended with {child.returncode}: '
                      f'{_last_line(child.stdout)}', f'All that it printed: {log}', code=1)
    values = json.loads(answer.read_text(encoding='utf-8'))
  if 'error' in values:
    raise UserError(*values['error'])
  return CompiledStep(**values) if values else None


def _last_line(text: str) -> str:
  """Return the last line of a text that is not empty, cut to 200 letters."""
  return next((line.strip()[:200] for line in reversed(text.splitlines()) if line.strip()), '')

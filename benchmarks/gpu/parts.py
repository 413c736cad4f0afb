"""The parts of a lease, each a process of its own.

Command: python benchmarks/gpu/parts.py NAME --size S --found FILE [--given JSON]

A part writes what it found to FILE as it comes, each time all of it. So nothing is lost however the part ends. lease.py
starts the parts, and says what each is for.
"""
import argparse
import contextlib
import ctypes
import fcntl
import functools
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent.parent)]

import sizes  # noqa: E402

TOP = 10  # kernels
BEGAN = float(os.environ.get('LEASE_BEGAN', time.time()))  # when this process was started


def device(size: sizes.Size, say) -> dict:
  """Measure versions, the device, and its two ceilings: bytes/s of a copy (read and written), FLOP/s of a bfloat16
  product."""
  import jax
  import jax.numpy as jnp

  from equivariant_ssl.storage import record
  first = jax.devices()[0]
  found = {'platform': first.platform, **record.environment(), 'start_s': time.time() - BEGAN}
  with contextlib.suppress(OSError):
    asked = 'name,driver_version,memory.total,clocks.sm,temperature.gpu'
    found['nvidia_smi'] = subprocess.run(['nvidia-smi', f'--query-gpu={asked}', '--format=csv,noheader'], timeout=20,
                                         capture_output=True, text=True).stdout.strip()
  say(found)
  side, count = (8192, 2**28) if size.accelerator else (256, 2**16)

  def best(f, *args) -> float:
    f(*args).block_until_ready()
    times = []
    for _ in range(10):
      start = time.perf_counter()
      f(*args).block_until_ready()
      times.append(time.perf_counter() - start)
    return sorted(times)[5]
  a = jax.random.normal(jax.random.key(0), (side, side), jnp.bfloat16)
  found['bf16_tflops'] = 2 * side ** 3 / best(jax.jit(jnp.matmul), a, a) / 1e12
  x = jax.random.normal(jax.random.key(1), (count,), jnp.float32)
  found['copy_tb_s'] = 8 * count / best(jax.jit(lambda x: -x), x) / 1e12
  return found


def agree(size: sizes.Size, say) -> dict:
  """Compare one float32 step with the CPU's."""
  import correctness
  return correctness.compare(size.agree, sizes.overrides(size, 'cifar10_simclr_equimod'))


def described(size: sizes.Size, config: str, more: dict[str, str] | None = None, images: bool = True):
  """The Run of a config on as many images of noise as CIFAR-10 has at this size. It has the training's own program, and no
  data. The images are noise and not zeros, which run faster than data do. images: False puts shapes in their place."""
  import jax
  import numpy as np

  from equivariant_ssl.config import load_config
  from equivariant_ssl.data.cifar10 import NORMAL
  from equivariant_ssl.data.source import Source, Split
  from equivariant_ssl.parallel import sharding
  from equivariant_ssl.training import recipe, runs
  resolved = load_config(config, sizes.overrides(size, config, more))
  side = resolved.data.get('size') or resolved.size
  num = 5 * size.records if config.startswith('cifar10') else 2 * resolved.batch
  made = recipe.make_recipe(resolved, num, side, *NORMAL, 10)
  mesh = sharding.mesh(jax.devices()[:1])
  pixels = np.random.default_rng(0).integers(0, 256, (num, side, side, 3), np.uint8) if images else None
  split = Split(pixels, np.full((num, 2), side, np.float32), None)
  return runs.Run(resolved, Source('noise', split, None, None, *NORMAL), made, mesh, jax.random.key(resolved.seed),
                  None)


def compiled(run):
  """The training step of a described run, compiled for shapes, and the shapes of its data."""
  import jax
  import numpy as np

  from equivariant_ssl.parallel import sharding
  from equivariant_ssl.training import runs
  from equivariant_ssl.training.step import Batch, resident_step
  num, whole, side = len(run.source.train.sizes), sharding.replicated_sharding(run.mesh), run.recipe.canvas
  of = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=whole)
  data = Batch(of((num, 3 * side * side), np.uint8), of((num, 2), np.float32), None)  # as feeds.compiled lays them out
  return resident_step(run.recipe, run.mesh).lower(run.key, runs.abstract_state(run), data, of((num,), np.int32)).compile()


def timed(run, program, seconds: float, say, found: dict):
  """Add to `found` the seconds until the first step, the loss after ten steps, and the images/s of three windows. Returns a
  function of ten steps more."""
  import jax
  import numpy as np

  from equivariant_ssl.data.order import epoch_order
  from equivariant_ssl.parallel import sharding
  from equivariant_ssl.training import feeds, runs
  _, data = feeds.compiled(run)
  order = sharding.place(np.asarray(epoch_order(run.key, 0, len(data.images))), sharding.replicated_sharding(run.mesh))
  state = runs.initial_state(run)

  def advance(count: int) -> float:
    nonlocal state
    start = time.perf_counter()
    for _ in range(count):
      state, metrics = program(run.key, state, data, order)
    found['loss'] = float(jax.block_until_ready(metrics)['loss']) if 'loss' not in found else found['loss']
    jax.block_until_ready(state.step)
    return time.perf_counter() - start
  advance_first = advance(1)
  found |= {'start_s': time.time() - BEGAN, 'first_step_s': advance_first}
  del found['loss']
  say(found)
  count = max(3, int(seconds / 3 / (advance(9) / 9)))  # the loss after ten steps is kept
  found['images_per_s'] = []
  for _ in range(3):
    found['images_per_s'].append(run.recipe.batch * count / advance(count))
    say(found)
  memory = run.mesh.devices.flat[0].memory_stats()
  if memory:
    found['memory_gib'] = memory['peak_bytes_in_use'] / 2 ** 30
  return functools.partial(advance, 10)


def speed(size: sizes.Size, say, config: str, profile: bool = True, share: float = 1., more: dict | None = None,
          lock: str = '') -> dict:
  """Measure images/s, memory, seconds to compile and to start, and the ten largest kernels of a config's training step.

  lock: a file by which parts that compile at the same time are timed one after the other, and none while another compiles.
  """
  from budget import middle

  from equivariant_ssl.training import runs
  runs.keep_compiled_programs()
  held = open(lock, 'a') if lock else None
  if held:
    fcntl.flock(held, fcntl.LOCK_SH)
  run = described(size, config, more)
  start = time.perf_counter()
  program = compiled(run)
  memory = program.memory_analysis()
  found = {'config': config, 'batch': run.recipe.batch, 'dtype': run.config.dtype,
           'steps_per_epoch': run.recipe.steps_per_epoch, 'flags': os.environ.get('XLA_FLAGS', ''),
           'compile_s': time.perf_counter() - start,
           'planned_gib': (memory.temp_size_in_bytes + memory.argument_size_in_bytes) / 2**30}
  say(found)
  if held:
    fcntl.flock(held, fcntl.LOCK_UN)
    fcntl.flock(held, fcntl.LOCK_EX)  # once none is compiling; until the process ends
  ten = timed(run, program, size.seconds * share, say, found)
  found['ms_per_step'] = 1e3 * run.recipe.batch / middle(found['images_per_s'])
  found['epoch_s'] = run.recipe.steps_per_epoch * found['ms_per_step'] / 1e3
  say(found)
  if profile:
    try:
      found['kernels'] = kernels(ten)
    except Exception as e:  # the profiler needs what not every machine lets it have
      found['kernels_missing'] = f'{type(e).__name__}: {str(e)[:300]}'
  return found


def kernels(ten_steps) -> list[dict]:
  """The TOP kernels of ten steps: {name, ms a step, share of all kernels' time}. On a CPU, the work of its threads."""
  import jax
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      ten_steps()
    file, = pathlib.Path(folder).rglob('*.xplane.pb')
    planes = list(jax.profiler.ProfileData.from_file(str(file)).planes)
    devices = [p for p in planes if p.name.startswith('/device:')]
    lines = [line for p in devices for line in p.lines if 'stream' in line.name.lower()]
    lines = lines or [line for p in planes for line in p.lines if 'XLA' in line.name]
    total = {}
    for line in lines:
      for event in line.events if devices else (e for e in line.events if 'Execute' not in e.name):
        total[event.name] = total.get(event.name, 0.) + event.duration_ns
  whole = sum(total.values()) or 1.
  top = sorted(total.items(), key=lambda kv: -kv[1])[:TOP]
  return [{'name': name[:160], 'ms': ns / 1e7, 'share': ns / whole} for name, ns in top]


def bitwise(size: sizes.Size, say, config: str) -> dict:
  """Whether 20 steps are bitwise the same twice, and also where the state was on the host after ten, as a checkpoint's
  is."""
  import jax
  import numpy as np

  from equivariant_ssl.parallel import sharding
  from equivariant_ssl.storage import fingerprint
  from equivariant_ssl.training import feeds, runs
  runs.keep_compiled_programs()
  run = described(size, config)
  program, (_, data), whole = compiled(run), feeds.compiled(run), sharding.replicated_sharding(run.mesh)
  given = data, sharding.place(np.arange(len(data.images), dtype=np.int32), whole)

  def twenty(stop: bool) -> dict:
    state = runs.initial_state(run)
    for n in range(20):
      if stop and n == 10:
        state = sharding.place(jax.device_get(state), whole)
      state, _ = program(run.key, state, *given)
    return fingerprint.fingerprints(state)
  first, again, stopped = twenty(False), twenty(False), twenty(True)
  return {'flags': os.environ.get('XLA_FLAGS', ''), 'twice': first == again, 'resumed': first == stopped}


def pytorch(size: sizes.Size, say) -> dict:
  """Time our SimCLR step beside PyTorch's."""
  import torch_parts

  from equivariant_ssl.training import runs
  runs.keep_compiled_programs()
  return torch_parts.compare(size, say, functools.partial(described, size, 'cifar10_simclr'), compiled)


def main() -> int:
  with contextlib.suppress(OSError, AttributeError):  # where lease.py is killed, its parts must not hold the device
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('name')
  parser.add_argument('--size', choices=sizes.SIZES, default='official')
  parser.add_argument('--found', required=True, type=pathlib.Path)
  parser.add_argument('--given', default='{}')
  args = parser.parse_args()
  import experiment
  known = {f.__name__: f for f in (device, agree, speed, bitwise, pytorch, *experiment.PARTS)}

  def say(found: dict) -> None:
    part = args.found.with_suffix('.tmp')
    part.write_text(json.dumps(found))
    part.replace(args.found)
  say(known[args.name](sizes.SIZES[args.size], say, **json.loads(args.given)))
  return 0


if __name__ == '__main__':
  sys.exit(main())

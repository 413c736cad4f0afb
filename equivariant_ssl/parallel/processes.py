"""The processes of a job: joining them, what they must agree on, and what happens when one is lost.

All processes run the same program. Process 0 writes the files.
"""
import contextlib
import ctypes
import glob
import itertools
import json
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from equivariant_ssl.errors import OTHER_CONFIG, WATCHDOG, UserError, describe
from equivariant_ssl.parallel import cluster, sharding
from equivariant_ssl.storage.environment import versions
from equivariant_ssl.training import stop

LOOKS = 15      # times, a second apart, that the processes look before they give up
LOST = ('another process of this job was lost, or one ended with an error, perhaps this one: '
        'the lines before say why.',
        'What was saved is safe. Type the same command for the whole job to go on from the newest '
        'checkpoint.')
# What jax says when another process is gone, and when this process itself has failed.
LOST_SIGNS = (r'gloo|nccl|peer|socket closed|heartbeat|coordination|UNAVAILABLE|DEADLINE_EXCEEDED'
              r'|barrier')
LOCAL_SIGNS = 'duplicate gpu|out of memory|RESOURCE_EXHAUSTED'
_callbacks = []  # the functions that C code calls; they must not be garbage-collected


def initialize() -> None:
  """Join the other processes of the job, and print once who they are.

  SLURM, Open MPI, Cloud TPU or Kubernetes describe the job, or EQSSL_COORDINATOR (host:port),
  EQSSL_PROCESSES and EQSSL_PROCESS do. Nothing happens in a process alone, or that has joined.
  Call this before anything else touches jax.

  Raises UserError if the job cannot work as it was started.
  """
  place = cluster.find(os.environ)
  if jax.distributed.is_initialized() or place is None and not cluster.tpu(os.environ):
    return
  options: dict[str, Any] = {}
  if place:
    local = cluster.loopback(place.coordinator)
    if place.process_index == 0:
      _raise_if_taken(place.coordinator)
    gpu_count = len(glob.glob('/dev/nvidia[0-9]*'))
    options = {'coordinator_address': place.coordinator, 'num_processes': place.process_count,
               'process_id': place.process_index,
               'local_device_ids': cluster.gpus(place, os.environ, gpu_count),
               'cluster_detection_method': 'deactivate', 'initialization_timeout': place.wait,
               # jax would listen on every interface, without authentication.
               'coordinator_bind_address':
                   place.coordinator if local and place.process_index == 0 else None}
  _explain_aborts(_not_joined(place))
  try:
    # After how long a silence a process counts as lost is left to jax (100 s): a file system that
    # stalls for half a minute must not end a job.
    jax.distributed.initialize(**options)
  except ValueError:
    if place:
      raise
    return  # the machine has TPU chips, but belongs to no slice that jax knows
  _explain_aborts(UserError(*LOST))
  stop.forward_to_jax()
  _meet()


def is_main() -> bool:
  """Return whether this process writes the files."""
  return jax.process_index() == 0


def stop_requested(step: int) -> bool:
  """Return whether any process was asked to stop. All processes get the same answer at a step."""
  from jax.experimental.multihost_utils import reached_preemption_sync_point
  return reached_preemption_sync_point(step)


def gather(value: Any) -> list:
  """Return the values of all processes, in their order. Each process gets the same list.

  value: a JSON value. No process goes on before all have called this.
  """
  if jax.process_count() == 1:
    return [value]
  from jax.experimental.multihost_utils import process_allgather
  text = np.frombuffer(json.dumps(value).encode(), np.uint8)
  sizes = np.asarray(process_allgather(np.int32(len(text))))
  texts = process_allgather(np.pad(text, (0, sizes.max() - len(text))))
  return [json.loads(bytes(t[:n])) for t, n in zip(texts, sizes, strict=True)]


def gather_rows(rows: np.ndarray) -> list[np.ndarray]:
  """Return the arrays [n D] of all processes, in their order; n may differ, and D where n is 0."""
  if jax.process_count() == 1:
    return [rows]
  from jax.experimental.multihost_utils import process_allgather
  shapes = gather(rows.shape)
  n, D = (max(shape[axis] for shape in shapes) for axis in (0, 1))
  padded = np.zeros((n, D), rows.dtype)
  padded[:len(rows), :rows.shape[1]] = rows
  return [array[:count] for array, (count, _) in
          zip(np.asarray(process_allgather(padded)), shapes, strict=True)]


def agree(subject: str, values: dict[str, Any]) -> None:
  """Raise UserError OTHER_CONFIG, in all processes, if their values differ from those of process 0.

  subject: what the values are, for the message. values: {name: JSON value}.
  """
  first, *others = gather(values)
  for index, other in enumerate(others, 1):
    names = sorted({*first, *other})
    name = next((k for k in names if first.get(k) != other.get(k)), None)
    if name is not None:
      raise UserError(f'processes 0 and {index} differ in {subject} {name}: '
                      f'{first.get(name)} and {other.get(name)}.',
                      'Start all of them by the same command, from the same files and environment.',
                      OTHER_CONFIG)


def raise_together(error: Exception | None) -> None:
  """Raise UserError, in all processes, where any of them has an `error`: the first of them."""
  described = None if error is None else describe(error)
  first = next((other for other in gather(described) if other), None)
  if first:
    text, code = first
    raise UserError(text, code=code) from error


def together(compute: Callable[[], Any]) -> Any:
  """Return `compute()` of this process, which does not wait for others, once all have computed.

  An error of any process is raised in all of them.
  """
  if jax.process_count() == 1:
    return compute()
  value, error = None, None
  try:
    value = compute()
  except Exception as e:
    error = e
  raise_together(error)
  return value


def from_main(compute: Callable[[], Any]) -> Any:
  """Return `compute()`, a JSON value, of process 0; the other processes wait for it.

  An error of process 0 is raised in all of them.
  """
  return gather(together(lambda: compute() if is_main() else None))[0]


def wait_until_same(subject: str, look: Callable[[], Any]) -> Any:
  """Return `look()`, a JSON value, when it is the same in every process.

  A network file system may take a while to show all processes what one of them wrote. subject:
  what `look` looks at, for the message. Raises UserError in all processes if it stays different.
  """
  views, other = [], None
  for _ in range(LOOKS):
    views = gather(look())
    other = next((i for i, view in enumerate(views) if view != views[0]), None)
    if other is None:
      return views[0]
    time.sleep(1.)
  assert other is not None  # the last look differed
  raise UserError(f'processes 0 and {other} do not see the same {subject}: '
                  f'{views[0]} and {views[other]}.',
                  'The --workdir must be on a file system that all machines share.')


def lost_process_error(error: BaseException | None) -> UserError | None:
  """Return UserError WATCHDOG if `error`, or an error behind it, means that a process is lost."""
  while error is not None and jax.process_count() > 1:
    text = str(error)
    # jax raises some errors of the runtime as ValueError, such as 'UNKNOWN: Gloo AllGather failed'.
    of_runtime = isinstance(error, jax.errors.JaxRuntimeError) or (
        isinstance(error, ValueError) and re.match('[A-Z_]+: ', text))
    if (of_runtime and not re.search(LOCAL_SIGNS, text, re.IGNORECASE)
        and re.search(LOST_SIGNS, text, re.IGNORECASE)):
      line = (text.splitlines() or [''])[0][:150]
      return UserError(f'{LOST[0]} What jax reports: {line}', LOST[1], WATCHDOG)
    error = error.__cause__ or error.__context__
  return None


@contextlib.contextmanager
def explain_lost_process() -> Iterator[None]:
  """Turn an error of jax that means that another process is lost into UserError WATCHDOG."""
  try:
    yield
  except Exception as error:
    if not isinstance(error, UserError) and (lost := lost_process_error(error)):
      raise lost from error
    raise


def _explain_aborts(why: UserError) -> None:
  """Let an abort of jax print `why` last, and end the process with the code WATCHDOG.

  jax notices a lost process in a thread that runs no Python, and aborts there. Its callback for
  this (missed_heartbeat_callback) ends in std::bad_cast with jax 0.10.2. Python's own signal
  handlers run in the main thread, which waits for the lost process.
  """
  @ctypes.CFUNCTYPE(None, ctypes.c_int)
  def report(number: int) -> None:
    os.write(2, f'eqssl: {why}\n'.encode())
    os._exit(WATCHDOG)
  _callbacks.append(report)
  ctypes.CDLL(None).signal(int(signal.SIGABRT), report)


def _not_joined(place: cluster.Place | None) -> UserError:
  """Return the error for a process that did not meet the others of its job."""
  cause = 'the machines of this TPU slice did not meet'
  if place:
    cause = (f'process {place.process_index} of {place.process_count} did not meet the others at '
             f'{place.coordinator} in {place.wait} s')
  return UserError(f'{cause}, or the job has one process too many.',
                   'Start all at once, each with its own number and the same number of processes; '
                   'each must reach that name and port, without a proxy: '
                   'unset http_proxy https_proxy.')


def _raise_if_taken(coordinator: str) -> None:
  """Raise UserError if the port of the coordinator is in use.

  gRPC would share the port, and two jobs would talk to each other.
  """
  host, _, port = coordinator.rpartition(':')
  try:
    with socket.socket() as s:
      s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
      s.bind((host if cluster.loopback(coordinator) else '', int(port)))
  except (OSError, ValueError) as error:
    raise UserError(f'process 0 cannot listen on {coordinator}: {error}.',
                    'Set another port: in EQSSL_COORDINATOR, or by export '
                    'JAX_COORDINATOR_PORT=PORT.') from error


def table(rows: list[tuple[str, int, str]]) -> list[str]:
  """Return the lines that say which processes a job has. Neighbors that are alike share a line.

  rows: (host, number of local devices, kind of device) of each process.
  """
  devices = sum(n for _, n, _ in rows)
  machines = len({h for h, _, _ in rows})
  lines = [f'{len(rows)} processes on {machines} machine{"s" * (machines > 1)}, {devices} devices']
  for row, group in itertools.groupby(enumerate(rows), lambda pair: tuple(pair[1])):
    numbers = [i for i, _ in group]
    span = f'processes {numbers[0]}-{numbers[-1]}' if numbers[1:] else f'process {numbers[0]}'
    lines.append(f'  {span}: {row[0]}, {row[1]} x {row[2]}{" each" if numbers[1:] else ""}')
  return lines


def _meet() -> None:
  """Print from process 0 which processes there are. Raise UserError if their software differs."""
  # Gloo gives the processes 30 s to find each other for their first collective. The first training
  # step is too late for that: compiling it takes a process that finds it in the cache a second,
  # and others a minute.
  everyone = sharding.place(np.ones(jax.device_count(), np.float32),
                            sharding.batch_sharding(sharding.mesh()))
  jax.block_until_ready(jax.jit(jnp.sum)(everyone))
  agree('the version of', versions())
  devices = jax.local_devices()
  on_cpu = devices[0].platform == 'cpu' and not os.environ.get('JAX_PLATFORMS')
  if on_cpu and glob.glob('/dev/nvidia[0-9]*'):
    raise UserError('this machine has GPUs, and jax sees none of them.',
                    'pip install -e ".[cuda]" (".[cuda12]" for a V100 or an older driver); '
                    'to train without them: JAX_PLATFORMS=cpu')
  rows = gather([socket.gethostname(), len(devices), devices[0].device_kind])
  if is_main() and len(rows) > 1:
    print('\n'.join(table(rows)), file=sys.stderr, flush=True)

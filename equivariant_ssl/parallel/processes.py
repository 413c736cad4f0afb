"""Many processes, one program: joining them, what they must agree on, and the end of all when one is lost."""
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

from equivariant_ssl.errors import OTHER_CONFIG, WATCHDOG, UserError
from equivariant_ssl.parallel import cluster, sharding
from equivariant_ssl.storage import record
from equivariant_ssl.training import stop

HEARTBEAT = 20  # seconds of silence after which a process is lost
LOOKS = 15      # times, a second apart, until all processes see the same files
LOST = ('another process of this job was lost, or one ended with an error, perhaps this one: the lines before say why.',
        'What was saved is safe. The same command for the whole job goes on from the newest checkpoint.')
_kept = []  # what C calls must not be collected


def initialize() -> None:
  """Join the other processes of the job that SLURM, Open MPI, Cloud TPU, Kubernetes or EQSSL_COORDINATOR (host:port),
  EQSSL_PROCESSES and EQSSL_PROCESS describe, and print who they are, once; nothing for a process alone. Call before
  anything else touches jax. UserError where the job cannot work as it was started."""
  place = cluster.find(os.environ)
  if place is None and not cluster.tpu(os.environ):
    return
  own = {}
  if place:
    local = cluster.loopback(place.coordinator)
    if place.index == 0:
      _raise_if_taken(place.coordinator)
    own = {'coordinator_address': place.coordinator, 'num_processes': place.count, 'process_id': place.index,
           'local_device_ids': cluster.gpus(place, os.environ, len(glob.glob('/dev/nvidia[0-9]*'))),
           'cluster_detection_method': 'deactivate', 'initialization_timeout': place.wait,
           # jax would listen on every interface, without authentication.
           'coordinator_bind_address': place.coordinator if local and place.index == 0 else None}
  _explain_aborts(_not_joined(place))
  try:
    jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT, shutdown_timeout_seconds=HEARTBEAT, **own)
  except ValueError:
    if place:
      raise
    return  # a machine with TPU chips that belongs to no slice that jax knows
  _explain_aborts(UserError(*LOST))
  stop.share()
  _meet()


def main() -> bool:
  """Whether this process writes the files."""
  return jax.process_index() == 0


def preempted(step: int) -> bool:
  """Whether any process was asked to stop: the same answer at the same `step` in all of them."""
  from jax.experimental.multihost_utils import reached_preemption_sync_point
  return reached_preemption_sync_point(step)


def gather(value: Any) -> list:
  """`value`, of JSON, of every process, in order: the same list in all; a barrier."""
  if jax.process_count() == 1:
    return [value]
  from jax.experimental.multihost_utils import process_allgather
  text = np.frombuffer(json.dumps(value).encode(), np.uint8)
  sizes = process_allgather(np.int32(len(text)))
  texts = process_allgather(np.pad(text, (0, sizes.max() - len(text))))
  return [json.loads(bytes(t[:n])) for t, n in zip(texts, sizes, strict=True)]


def agree(what: str, own: dict[str, Any]) -> None:
  """UserError OTHER_CONFIG, the same in all processes, where {name: JSON value} `own` of one is not that of process 0."""
  first, *others = gather(own)
  for index, theirs in enumerate(others, 1):
    name = next((k for k in sorted({*first, *theirs}) if first.get(k) != theirs.get(k)), None)
    if name is not None:
      raise UserError(f'processes 0 and {index} differ in {what} {name}: {first.get(name)} and {theirs.get(name)}.',
                      'Start all of them by the same command, from the same files and environment.', OTHER_CONFIG)


def seen(what: str, look: Callable[[], Any]) -> Any:
  """What `look` finds, of JSON, the same in every process: a network file system may take a while to show all of them what
  one wrote. UserError, in all of them, where it does not."""
  for _ in range(LOOKS):
    found = gather(look())
    other = next((i for i, v in enumerate(found) if v != found[0]), None)
    if other is None:
      return found[0]
    time.sleep(1.)
  raise UserError(f'processes 0 and {other} do not see the same {what}: {found[0]} and {found[other]}.',
                  'The --workdir must be on a file system that all machines share.')


def lost(error: BaseException | None) -> UserError | None:
  """The UserError WATCHDOG for an error that means, or came from one that means, that another process is gone."""
  signs = r'gloo|nccl|peer|socket closed|heartbeat|coordination|UNAVAILABLE|DEADLINE_EXCEEDED|barrier'
  own = 'duplicate gpu|out of memory|RESOURCE_EXHAUSTED'
  while error is not None and jax.process_count() > 1:
    text = str(error)
    if (isinstance(error, jax.errors.JaxRuntimeError) and not re.search(own, text, re.IGNORECASE)
        and re.search(signs, text, re.IGNORECASE)):
      return UserError(f'{LOST[0]} What jax saw of it: {(text.splitlines() or [""])[0][:150]}', LOST[1], WATCHDOG)
    error = error.__cause__ or error.__context__


@contextlib.contextmanager
def watched() -> Iterator[None]:
  """An error of jax that means that another process is gone, as a UserError WATCHDOG that says so."""
  try:
    yield
  except Exception as error:
    if not isinstance(error, UserError) and (gone := lost(error)):
      raise gone from error
    raise


def _explain_aborts(why: UserError) -> None:
  """jax notices a lost process in a thread that runs no Python, and aborts there: say `why` last, and end with WATCHDOG.

  Its callback for this (missed_heartbeat_callback) ends in std::bad_cast with jax 0.10.2, and Python's own signal
  handlers run in the main thread, which waits for the lost process.
  """
  @ctypes.CFUNCTYPE(None, ctypes.c_int)
  def say(number: int) -> None:
    os.write(2, f'eqssl: {why}\n'.encode())
    os._exit(WATCHDOG)
  _kept.append(say)
  ctypes.CDLL(None).signal(int(signal.SIGABRT), say)


def _not_joined(place: cluster.Place | None) -> UserError:
  who = place and f'process {place.index} of {place.count} did not meet the others at {place.coordinator} in {place.wait} s'
  return UserError((who or 'the machines of this TPU slice did not meet') + ', or was one too many.',
                   'Start all at once, each with its own number and the same number of processes; each must reach that name '
                   'and port, without a proxy: unset http_proxy https_proxy.')


def _raise_if_taken(coordinator: str) -> None:
  """UserError where the coordinator's port is in use: gRPC would share it, and two jobs would talk to each other."""
  host, _, port = coordinator.rpartition(':')
  try:
    with socket.socket() as s:
      s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
      s.bind((host if cluster.loopback(coordinator) else '', int(port)))
  except (OSError, ValueError) as error:
    raise UserError(f'process 0 cannot listen on {coordinator}: {error}.',
                    'Set another port: of EQSSL_COORDINATOR, or export JAX_COORDINATOR_PORT=PORT.') from error


def table(rows: list[tuple[str, int, str]]) -> list[str]:
  """Lines that say who is there, of (host, local devices, kind) a process; alike neighbours share a line."""
  devices = sum(n for _, n, _ in rows)
  machines = len({h for h, _, _ in rows})
  out = [f'{len(rows)} processes on {machines} machine{"s" * (machines > 1)}, {devices} devices']
  for row, group in itertools.groupby(enumerate(rows), lambda pair: tuple(pair[1])):
    numbers = [i for i, _ in group]
    span = f'process {numbers[0]}' if len(numbers) == 1 else f'processes {numbers[0]}-{numbers[-1]}'
    out.append(f'  {span}: {row[0]}, {row[1]} x {row[2]}' + (' each' if len(numbers) > 1 else ''))
  return out


def _meet() -> None:
  """Print who is there, from process 0; UserError where their software differs."""
  # Gloo gives the processes 30 s to find each other for their first collective: not after compiling a step, which
  # takes one that finds it in the cache a second and others a minute.
  everyone = sharding.place(np.ones(jax.device_count(), np.float32), sharding.batch_sharding(sharding.mesh()))
  jax.block_until_ready(jax.jit(jnp.sum)(everyone))
  agree('the version of', record.versions())
  devices = jax.local_devices()
  if devices[0].platform == 'cpu' and glob.glob('/dev/nvidia[0-9]*') and not os.environ.get('JAX_PLATFORMS'):
    raise UserError('this machine has GPUs, and jax sees none of them.',
                    'pip install -e ".[cuda]" (".[cuda12]" for a V100 or an older driver); without them: JAX_PLATFORMS=cpu')
  rows = gather([socket.gethostname(), len(devices), devices[0].device_kind])
  if main() and len(rows) > 1:
    print('\n'.join(table(rows)), file=sys.stderr, flush=True)

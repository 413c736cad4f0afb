"""Many processes, one program: who am I, and who else is there."""
import os
import signal

import jax

from equivariant_ssl.errors import UserError

VARIABLES = ('EQSSL_COORDINATOR', 'EQSSL_PROCESSES', 'EQSSL_PROCESS')


def initialize() -> None:
  """Join the processes that EQSSL_COORDINATOR (host:port), EQSSL_PROCESSES and EQSSL_PROCESS describe; nothing
  where none is set. Call before anything else touches jax. UserError where only some are set or a number is off."""
  values = [os.environ.get(v, '') for v in VARIABLES]
  if not any(values):
    return
  if not all(values) or not values[1].isdigit() or not values[2].isdigit() or int(values[2]) >= int(values[1]):
    raise UserError(f'{", ".join(f"{k}={v!r}" for k, v in zip(VARIABLES, values, strict=True))} do not describe a job.',
                    'Set all three: host:port, the number of processes, and 0 <= this process < that number.')
  coordinator, count, index = values[0], int(values[1]), int(values[2])
  loopback = coordinator.startswith(('127.', 'localhost'))
  jax.distributed.initialize(
      coordinator, count, index, cluster_detection_method='deactivate', heartbeat_timeout_seconds=20,
      shutdown_timeout_seconds=20, initialization_timeout=60,
      # jax would listen on every interface, without authentication.
      coordinator_bind_address=coordinator if loopback and index == 0 else None)
  # The preemption notice that jax shares between processes is SIGTERM alone.
  for s in (signal.SIGUSR1, signal.SIGINT):
    signal.signal(s, lambda *_: os.kill(os.getpid(), signal.SIGTERM))


def main() -> bool:
  """Whether this process writes the files."""
  return jax.process_index() == 0


def preempted(step: int) -> bool:
  """Whether any process was asked to stop: the same answer at the same `step` in all of them."""
  from jax.experimental.multihost_utils import reached_preemption_sync_point
  return reached_preemption_sync_point(step)

"""Where a process is in its job, as SLURM, Open MPI, Kubernetes or EQSSL_* variables tell it, and the usual mistakes.

Pure functions of the environment. jax detects some of these itself, but a mistake there ends in one GPU of eight, a
process alone in a job of many, or minutes of silence.
"""
import glob
import importlib.util
import re
from collections.abc import Mapping
from typing import NamedTuple

from equivariant_ssl.errors import UserError

Env = Mapping[str, str]
VARIABLES = ('EQSSL_COORDINATOR', 'EQSSL_PROCESSES', 'EQSSL_PROCESS')
PORTS = 61440, 4096  # the first and how many: above the range that Linux gives out


class Place(NamedTuple):
  """coordinator: host:port of process 0. index of `count`; `local` of the `here` processes on this machine.
  wait: seconds for the others to come."""
  coordinator: str
  count: int
  index: int
  local: int = 0
  here: int = 1
  wait: int = 300


def find(env: Env) -> Place | None:
  """The place that `env` describes, None for a process alone; EQSSL_* win. UserError where the job cannot work."""
  place = next(filter(None, (look(env) for look in (plain, ompi, slurm, kubernetes))), None)
  return place if place and place.count > 1 else None


def plain(env: Env) -> Place | None:
  """EQSSL_COORDINATOR, EQSSL_PROCESSES and EQSSL_PROCESS; the last of an indexed Kubernetes job is its pod's index."""
  values = [env.get(v, '') for v in VARIABLES]
  if not any(values):
    return None
  if values[1] == '1':
    return Place('', 1, 0)
  values[2] = values[2] or env.get('JOB_COMPLETION_INDEX', '')
  if not all(values) or not values[1].isdigit() or not values[2].isdigit() or int(values[2]) >= int(values[1]):
    raise UserError(f'{", ".join(f"{k}={v!r}" for k, v in zip(VARIABLES, values, strict=True))} do not describe a job.',
                    'Set all three: host:port, the number of processes, and 0 <= this process < that number.')
  return Place(values[0], int(values[1]), int(values[2]), wait=60 if loopback(values[0]) else 300)


def loopback(coordinator: str) -> bool:
  return coordinator.startswith(('127.', 'localhost'))


def _address(env: Env, host: str, job: int) -> str:
  first, many = PORTS
  return env.get('JAX_COORDINATOR_ADDRESS') or f'{host}:{env.get("JAX_COORDINATOR_PORT") or first + job % many}'


def ompi(env: Env) -> Place | None:
  """A process of mpirun."""
  if 'OMPI_COMM_WORLD_SIZE' not in env:
    return None
  count, index, here, local = (int(env[f'OMPI_COMM_WORLD_{k}']) for k in ('SIZE', 'RANK', 'LOCAL_SIZE', 'LOCAL_RANK'))
  uri = re.match(r'(\d+)\.\d+;tcp6?://\[?([^,\]]+?)(?:,|\]|:\d+)', env.get('OMPI_MCA_orte_hnp_uri', ''))  # of version 4
  if here == count:
    host, job = '127.0.0.1', int(uri[1]) >> 12 if uri else 0
  elif uri:
    host, job = uri[2], int(uri[1]) >> 12
  elif 'JAX_COORDINATOR_ADDRESS' in env:
    host, job = '', 0
  else:
    raise UserError('this mpirun does not tell its processes where process 0 is.',
                    'mpirun -x JAX_COORDINATOR_ADDRESS=HOST:61440 ..., HOST being the first of its machines.')
  return Place(_address(env, host, job), count, index, local, here)


def _first_host(nodes: str) -> str:
  """'gpu07' of 'gpu[07-09,11],big1'."""
  prefix, first = re.match(r'([^,\[]+)(?:\[([^,\]-]+))?', nodes).groups()
  return prefix + (first or '')


def _per_node(text: str) -> list[int]:
  """[4, 4, 3] of '4(x2),3'."""
  return [int(n) for n, times in re.findall(r'(\d+)(?:\(x(\d+)\))?', text) for _ in range(int(times or 1))]


def slurm(env: Env) -> Place | None:
  """A task of srun. UserError for a process beside srun in a job of several tasks."""
  if 'SLURM_JOB_ID' not in env:
    return None
  if 'SLURM_STEP_NODELIST' not in env:
    count = max(int(env.get('SLURM_NTASKS', 1)), int(env.get('SLURM_JOB_NUM_NODES', 1)))
    if count > 1:
      raise UserError(f'SLURM job {env["SLURM_JOB_ID"]} has {count} tasks, and this process is none of them: it was started '
                      'without srun.', 'srun eqssl train ...; for one process alone: env -u SLURM_JOB_ID eqssl train ...')
    return None
  count = int(env.get('SLURM_STEP_NUM_TASKS') or env['SLURM_NTASKS'])
  job = int(env['SLURM_JOB_ID']) + 64 * int(env.get('SLURM_STEP_ID', 0))  # steps side by side in a job: ports of their own
  here = _per_node(env.get('SLURM_STEP_TASKS_PER_NODE', str(count)))[int(env.get('SLURM_NODEID', 0))]
  return Place(_address(env, _first_host(env['SLURM_STEP_NODELIST']), job), count, int(env['SLURM_PROCID']),
               int(env['SLURM_LOCALID']), here)


def kubernetes(env: Env) -> Place | None:
  """UserError for a pod of an indexed Job or a JobSet that is not told of the others (`plain` takes one that is)."""
  if 'KUBERNETES_SERVICE_HOST' not in env or 'JOB_COMPLETION_INDEX' not in env or tpu(env):
    return None
  name, part = env.get('JOBSET_NAME'), env.get('REPLICATED_JOB_NAME', 'workers')
  host = f'{name}-{part}-0-0.{name}' if name else 'JOB-0.SERVICE'
  raise UserError(f'this is pod {env["JOB_COMPLETION_INDEX"]} of an indexed Job, and it is not told of the others.',
                  f'In its env: EQSSL_COORDINATOR={host}:{PORTS[0]} and EQSSL_PROCESSES=PODS (1: a run a pod); '
                  'eqssl launch gke writes them.')


def tpu(env: Env) -> bool:
  """Whether this machine has TPU chips that jax will use: there jax alone knows of the other machines of the slice."""
  return (env.get('JAX_PLATFORMS', 'tpu').startswith('tpu') and importlib.util.find_spec('libtpu') is not None
          and bool(glob.glob('/dev/accel[0-9]*') or glob.glob('/dev/vfio/[0-9]*')))


def gpus(place: Place, env: Env, present: int) -> list[int] | None:
  """Which of the GPUs that this process sees are its own; None: all of them. UserError where they do not share out.

  present: GPUs of the machine, where CUDA_VISIBLE_DEVICES does not say.
  """
  mask = env.get('CUDA_VISIBLE_DEVICES')
  seen = present if mask is None else len([d for d in mask.split(',') if d.strip() not in ('', '-1', 'NoDevFiles')])
  granted = int(env.get('SLURM_GPUS_ON_NODE') or 0)
  if place.here == 1 or not seen or granted == seen * place.here or seen == 1 and not granted:
    return None  # alone here, or each process was given its own
  if seen % place.here:
    best = granted or seen
    raise UserError(f'{place.here} processes of this machine see {seen} GPU{"s" * (seen > 1)} and cannot share them evenly.',
                    f'#SBATCH --ntasks-per-node={best} (a process a GPU)' + (', or =1 (one for all).' if best > 1 else '.') +
                    ' With mpirun: -N.')
  each = seen // place.here
  return list(range(place.local * each, (place.local + 1) * each))

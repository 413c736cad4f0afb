"""Where a process is in its job, as SLURM, Open MPI, Kubernetes or EQSSL_* variables tell it, and the usual mistakes.

Pure functions of the environment. jax detects some of these itself, but a mistake there ends in one GPU of eight, a
process alone in a job of many, or minutes of silence.
"""
import functools
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


def _number(env: Env, name: str, job: str, default: int | None = None) -> int:
  """The whole number under `name` in `env`, or `default`; UserError where there is none, though variable `job` is set."""
  text = env.get(name) or ('' if default is None else str(default))
  if not (text.isascii() and text.isdigit()):
    raise UserError(f'{job} is set, and {name} is {repr(text) if text else "missing"}: that is not the whole of a job.',
                    f'{"srun" if job.startswith("SLURM") else "mpirun"} sets all of it; for one process alone: '
                    f'env -u {job} eqssl ...')
  return int(text)


def _within(index: int, count: int, names: str, job: str) -> None:
  """UserError where there is no process `index` among `count`."""
  if index >= count:
    raise UserError(f'{names} are {index} of {count}, from 0: not those of one job.',
                    f'For one process alone: env -u {job} eqssl ...')


def ompi(env: Env) -> Place | None:
  """A process of mpirun."""
  job = 'OMPI_COMM_WORLD_SIZE'
  if job not in env:
    return None
  names = 'SIZE', 'RANK', 'LOCAL_SIZE', 'LOCAL_RANK'
  count, index, here, local = (_number(env, f'OMPI_COMM_WORLD_{k}', job) for k in names)
  _within(index, count, f'OMPI_COMM_WORLD_RANK and {job}', job)
  _within(local, here, 'OMPI_COMM_WORLD_LOCAL_RANK and OMPI_COMM_WORLD_LOCAL_SIZE', job)
  _within(here - 1, count, f'OMPI_COMM_WORLD_LOCAL_SIZE, less one, and {job}', job)
  host, number = _mpirun(env)
  if here == count:
    host = '127.0.0.1'
  elif not host and 'JAX_COORDINATOR_ADDRESS' not in env:
    raise UserError('this mpirun does not tell its processes where process 0 is.',
                    'mpirun -x JAX_COORDINATOR_ADDRESS=HOST:61440 ..., HOST being the first of its machines.')
  return Place(_address(env, host, number), count, index, local, here)


def _mpirun(env: Env) -> tuple[str, int]:
  """(the machine that mpirun runs on, which has process 0 as a rule, a number of the job), ('', 0) where it does not say."""
  uri = re.match(r'(\d+)\.\d+;tcp6?://\[?([^,\]]+?)(?:,|\]|:\d+)', env.get('OMPI_MCA_orte_hnp_uri', ''))  # of version 4
  if uri:
    return uri[2], int(uri[1]) >> 12
  name = re.match(r'prte(?:run)?-(.+)-(\d+)@(\d+)$', env.get('PMIX_NAMESPACE', ''))  # of version 5: host, its process, job
  return (name[1], int(name[2]) + 64 * int(name[3])) if name else ('', 0)


def _first_host(nodes: str) -> str:
  """'gpu07' of 'gpu[07-09,11],big1'; '' of nothing."""
  found = re.match(r'([^,\[]+)(?:\[([^,\]-]+))?', nodes)
  return found[1] + (found[2] or '') if found else ''


def _per_node(text: str) -> list[int]:
  """[4, 4, 3] of '4(x2),3'."""
  return [int(n) for n, times in re.findall(r'(\d+)(?:\(x(\d+)\))?', text) for _ in range(int(times or 1))]


def slurm(env: Env) -> Place | None:
  """A task of srun. UserError for a process beside srun in a job of several tasks."""
  if 'SLURM_JOB_ID' not in env:
    return None
  number = functools.partial(_number, env, job='SLURM_JOB_ID')
  if 'SLURM_STEP_NODELIST' not in env:
    count = max(number(f'SLURM_{k}', default=1) for k in ('NTASKS', 'JOB_NUM_NODES', 'STEP_NUM_TASKS'))
    if count > 1:
      raise UserError(f'SLURM job {env["SLURM_JOB_ID"]} has {count} tasks, and this process is none of them: it was started '
                      'without srun.', 'srun eqssl train ...; for one process alone: env -u SLURM_JOB_ID eqssl train ...')
    return None
  count = number('SLURM_STEP_NUM_TASKS' if env.get('SLURM_STEP_NUM_TASKS') else 'SLURM_NTASKS')
  if count < 2:
    return None
  index, local, node = number('SLURM_PROCID'), number('SLURM_LOCALID'), number('SLURM_NODEID', default=0)
  each = _per_node(env.get('SLURM_STEP_TASKS_PER_NODE', str(count)))
  _within(index, count, 'SLURM_PROCID and the number of tasks', 'SLURM_JOB_ID')
  _within(node, len(each), 'SLURM_NODEID and the machines of SLURM_STEP_TASKS_PER_NODE', 'SLURM_JOB_ID')
  _within(local, each[node], 'SLURM_LOCALID and the tasks of this machine', 'SLURM_JOB_ID')
  job = number('SLURM_JOB_ID') + 64 * number('SLURM_STEP_ID', default=0)  # steps side by side in a job: ports of their own
  host = _first_host(env['SLURM_STEP_NODELIST'])
  if not host and 'JAX_COORDINATOR_ADDRESS' not in env:
    raise UserError('SLURM_STEP_NODELIST is empty: this task is not told where the first is.', 'Start it by srun.')
  return Place(_address(env, host, job), count, index, local, each[node])


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
  granted = _number(env, 'SLURM_GPUS_ON_NODE', 'SLURM_JOB_ID', 0)
  if place.here == 1 or not seen or granted == seen * place.here or seen == 1 and not granted:
    return None  # alone here, or each process was given its own
  if seen % place.here:
    best = granted or seen
    raise UserError(f'{place.here} processes of this machine see {seen} GPU{"s" * (seen > 1)} and cannot share them evenly.',
                    f'#SBATCH --ntasks-per-node={best} (a process a GPU)' + (', or =1 (one for all).' if best > 1 else '.') +
                    ' With mpirun: -N.')
  each = seen // place.here
  return list(range(place.local * each, (place.local + 1) * each))

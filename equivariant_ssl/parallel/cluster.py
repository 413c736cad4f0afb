"""The place of a process in its job, and the usual mistakes in starting a job.

SLURM, Open MPI, Kubernetes or EQSSL_* variables describe the job. jax detects some of these itself,
but a mistake there ends in one GPU of eight, in a process alone in a job of many, or in minutes of
silence. All functions here are pure functions of the environment.
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
FIRST_PORT, PORT_COUNT = 61440, 4096  # these ports are above the range that Linux gives out


class Place(NamedTuple):
  """The place of a process in its job.

  coordinator:   host:port of process 0.
  process_count: the number of processes of the job.
  process_index: the number of this process, from 0.
  local_index:   its number among the processes of this machine, from 0.
  local_count:   the number of processes of this machine.
  wait:          seconds to wait for the other processes.
  """
  coordinator: str
  process_count: int
  process_index: int
  local_index: int = 0
  local_count: int = 1
  wait: int = 300


def find(env: Env) -> Place | None:
  """Return the place that an environment describes, or None for a process alone.

  EQSSL_* variables win over all others. Raises UserError if the job cannot work.
  """
  for read in (plain, ompi, slurm, kubernetes):
    if place := read(env):
      return place if place.process_count > 1 else None
  return None


def plain(env: Env) -> Place | None:
  """Return the place that the EQSSL_* variables describe.

  In an indexed Kubernetes job EQSSL_PROCESS may be missing: it is the index of the pod.
  """
  coordinator, count, index = (env.get(v, '') for v in VARIABLES)
  if not (coordinator or count or index):
    return None
  if count == '1':
    return Place('', 1, 0)
  index = index or env.get('JOB_COMPLETION_INDEX', '')
  complete = coordinator and count.isdigit() and index.isdigit()
  if not complete or int(index) >= int(count):
    values = zip(VARIABLES, (coordinator, count, index), strict=True)
    raise UserError(f'{", ".join(f"{k}={v!r}" for k, v in values)} do not describe a job.',
                    'Set all three: host:port, the number of processes, '
                    'and 0 <= this process < that number.')
  return Place(coordinator, int(count), int(index), wait=60 if loopback(coordinator) else 300)


def loopback(coordinator: str) -> bool:
  """Return whether a coordinator's address is of this machine alone."""
  return coordinator.startswith(('127.', 'localhost'))


def _address(env: Env, host: str, job: int) -> str:
  """Return host:port of process 0. job: a number of the job, from which the port is derived."""
  port = env.get('JAX_COORDINATOR_PORT') or FIRST_PORT + job % PORT_COUNT
  return env.get('JAX_COORDINATOR_ADDRESS') or f'{host}:{port}'


def _number(env: Env, name: str, job: str, default: int | None = None) -> int:
  """Return the whole number in variable `name`, or `default`.

  job: the variable that says that there is a job. Raises UserError if `name` is no number.
  """
  text = env.get(name) or ('' if default is None else str(default))
  if not (text.isascii() and text.isdigit()):
    raise UserError(f'{job} is set, and {name} is {repr(text) if text else "missing"}: '
                    'the description of the job is incomplete.',
                    f'{"srun" if job.startswith("SLURM") else "mpirun"} sets all of it; '
                    f'for one process alone: env -u {job} eqssl ...')
  return int(text)


def _raise_if_beyond(index: int, count: int, names: str, job: str) -> None:
  """Raise UserError if there is no process `index` among `count` processes."""
  if index >= count:
    raise UserError(f'{names} are {index} and {count}; numbers in a job go from 0 to {count - 1}.',
                    f'For one process alone: env -u {job} eqssl ...')


def ompi(env: Env) -> Place | None:
  """Return the place of a process of mpirun."""
  job = 'OMPI_COMM_WORLD_SIZE'
  if job not in env:
    return None
  names = 'SIZE', 'RANK', 'LOCAL_SIZE', 'LOCAL_RANK'
  count, index, local_count, local_index = (
      _number(env, f'OMPI_COMM_WORLD_{k}', job) for k in names)
  _raise_if_beyond(index, count, f'OMPI_COMM_WORLD_RANK and {job}', job)
  _raise_if_beyond(local_index, local_count,
                   'OMPI_COMM_WORLD_LOCAL_RANK and OMPI_COMM_WORLD_LOCAL_SIZE', job)
  _raise_if_beyond(local_count - 1, count, f'OMPI_COMM_WORLD_LOCAL_SIZE, less one, and {job}', job)
  host, number = _mpirun(env)
  if local_count == count:
    host = '127.0.0.1'
  elif not host and 'JAX_COORDINATOR_ADDRESS' not in env:
    raise UserError('this mpirun does not tell its processes where process 0 is.',
                    'mpirun -x JAX_COORDINATOR_ADDRESS=HOST:61440 ..., '
                    'where HOST is the first of its machines.')
  return Place(_address(env, host, number), count, index, local_index, local_count)


def _mpirun(env: Env) -> tuple[str, int]:
  """Return the machine that mpirun runs on, and a number of the job.

  As a rule process 0 is on that machine. Without the information the result is ('', 0).
  """
  # Open MPI 4 gives an address of mpirun.
  uri = re.match(r'(\d+)\.\d+;tcp6?://\[?([^,\]]+?)(?:,|\]|:\d+)',
                 env.get('OMPI_MCA_orte_hnp_uri', ''))
  if uri:
    return uri[2], int(uri[1]) >> 12
  # Open MPI 5 gives the host, the process number of mpirun, and the job.
  name = re.match(r'prte(?:run)?-(.+)-(\d+)@(\d+)$', env.get('PMIX_NAMESPACE', ''))
  return (name[1], int(name[2]) + 64 * int(name[3])) if name else ('', 0)


def _first_host(nodes: str) -> str:
  """Return the first host of a SLURM list, 'gpu07' for 'gpu[07-09,11],big1'; '' for ''."""
  match = re.match(r'([^,\[]+)(?:\[([^,\]-]+))?', nodes)
  return match[1] + (match[2] or '') if match else ''


def _tasks_per_node(text: str) -> list[int]:
  """Return the numbers of tasks in SLURM's short form, [4, 4, 3] for '4(x2),3'."""
  return [int(n) for n, times in re.findall(r'(\d+)(?:\(x(\d+)\))?', text)
          for _ in range(int(times or 1))]


def slurm(env: Env) -> Place | None:
  """Return the place of a task of srun.

  Raises UserError for a process that was started without srun in a job of several tasks.
  """
  if 'SLURM_JOB_ID' not in env:
    return None
  number = functools.partial(_number, env, job='SLURM_JOB_ID')
  if 'SLURM_STEP_NODELIST' not in env:
    count = max(number(f'SLURM_{k}', default=1)
                for k in ('NTASKS', 'JOB_NUM_NODES', 'STEP_NUM_TASKS'))
    if count > 1:
      raise UserError(f'SLURM job {env["SLURM_JOB_ID"]} has {count} tasks, and this process is '
                      'none of them: it was started without srun.',
                      'srun eqssl COMMAND ...; for one process alone: '
                      'env -u SLURM_JOB_ID eqssl COMMAND ...')
    return None
  count = number('SLURM_STEP_NUM_TASKS' if env.get('SLURM_STEP_NUM_TASKS') else 'SLURM_NTASKS')
  if count < 2:
    return None
  index, local_index = number('SLURM_PROCID'), number('SLURM_LOCALID')
  node = number('SLURM_NODEID', default=0)
  tasks = _tasks_per_node(env.get('SLURM_STEP_TASKS_PER_NODE', str(count)))
  _raise_if_beyond(index, count, 'SLURM_PROCID and the number of tasks', 'SLURM_JOB_ID')
  _raise_if_beyond(node, len(tasks),
                   'SLURM_NODEID and the machines of SLURM_STEP_TASKS_PER_NODE', 'SLURM_JOB_ID')
  _raise_if_beyond(local_index, tasks[node], 'SLURM_LOCALID and the tasks of this machine',
                   'SLURM_JOB_ID')
  # Steps that run at the same time in one job need different ports.
  job = number('SLURM_JOB_ID') + 64 * number('SLURM_STEP_ID', default=0)
  host = _first_host(env['SLURM_STEP_NODELIST'])
  if not host and 'JAX_COORDINATOR_ADDRESS' not in env:
    raise UserError('SLURM_STEP_NODELIST is empty, so this task does not know where the first is.',
                    'Start it by srun: srun eqssl ...')
  return Place(_address(env, host, job), count, index, local_index, tasks[node])


def kubernetes(env: Env) -> Place | None:
  """Raise UserError for a pod of an indexed Job or a JobSet that does not know the other pods.

  `plain` gives the place of a pod that knows them.
  """
  indexed = 'KUBERNETES_SERVICE_HOST' in env and 'JOB_COMPLETION_INDEX' in env
  if not indexed or tpu(env):
    return None
  name, part = env.get('JOBSET_NAME'), env.get('REPLICATED_JOB_NAME', 'workers')
  host = f'{name}-{part}-0-0.{name}' if name else 'JOB-0.SERVICE'
  raise UserError(f'this is pod {env["JOB_COMPLETION_INDEX"]} of an indexed Job, and it does '
                  'not know where the other pods are.',
                  f'In its env: EQSSL_COORDINATOR={host}:{FIRST_PORT} and EQSSL_PROCESSES=PODS '
                  '(1: each pod is a run by itself); eqssl launch gke writes them.')


def tpu(env: Env) -> bool:
  """Return whether this machine has TPU chips that jax will use.

  There, jax alone knows the other machines of the slice.
  """
  used_by_jax = env.get('JAX_PLATFORMS', 'tpu').startswith('tpu')
  return (used_by_jax and importlib.util.find_spec('libtpu') is not None
          and bool(glob.glob('/dev/accel[0-9]*') or glob.glob('/dev/vfio/[0-9]*')))


def gpus(place: Place, env: Env, present: int) -> list[int] | None:
  """Return which of the GPUs that this process sees it uses; None for all of them.

  present: the number of GPUs of the machine, for the case that CUDA_VISIBLE_DEVICES is not set.

  Raises UserError if the processes of the machine cannot share the GPUs evenly.
  """
  mask = env.get('CUDA_VISIBLE_DEVICES')
  visible = present if mask is None else len(
      [d for d in mask.split(',') if d.strip() not in ('', '-1', 'NoDevFiles')])
  granted = _number(env, 'SLURM_GPUS_ON_NODE', 'SLURM_JOB_ID', 0)
  count = place.local_count
  one_each = granted == visible * count or visible == 1 and not granted
  if count == 1 or not visible or one_each:
    return None
  if visible % count:
    best = granted or visible
    raise UserError(f'{count} processes of this machine see {visible} GPU{"s" * (visible > 1)} '
                    'and cannot share them evenly.',
                    f'#SBATCH --ntasks-per-node={best} (one process for each GPU)'
                    + (', or =1 (one for all GPUs).' if best > 1 else '.') + ' With mpirun: -N.')
  each = visible // count
  return list(range(place.local_index * each, (place.local_index + 1) * each))

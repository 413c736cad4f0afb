"""What a process makes of the environment that started it: its place, its GPUs, and the usual mistakes as lines to type."""
import os
import socket
import subprocess
import sys
import time

import jax
import one_process
import pytest

from equivariant_ssl.config import load_config
from equivariant_ssl.errors import OTHER_CONFIG, WATCHDOG, UserError
from equivariant_ssl.parallel import cluster, processes
from equivariant_ssl.training import loop

TASK = {'SLURM_JOB_ID': '70', 'SLURM_STEP_NODELIST': 'gpu[07-09,11],big1', 'SLURM_NTASKS': '16', 'SLURM_STEP_ID': '0',
        'SLURM_STEP_NUM_TASKS': '16', 'SLURM_PROCID': '9', 'SLURM_LOCALID': '1', 'SLURM_NODEID': '2',
        'SLURM_STEP_TASKS_PER_NODE': '4(x3),3,1'}
MPI = {'OMPI_COMM_WORLD_SIZE': '8', 'OMPI_COMM_WORLD_RANK': '5', 'OMPI_COMM_WORLD_LOCAL_SIZE': '4',
       'OMPI_COMM_WORLD_LOCAL_RANK': '1', 'OMPI_MCA_orte_hnp_uri': '1531576320.0;tcp://10.96.0.1,10.148.0.1:34911'}
PLAIN = {'EQSSL_COORDINATOR': 'a:1', 'EQSSL_PROCESSES': '2', 'EQSSL_PROCESS': '1'}
POD = {'KUBERNETES_SERVICE_HOST': '10.0.0.1', 'JOB_COMPLETION_INDEX': '1'}


@pytest.mark.parametrize('env,place', [
    ({}, None),
    (PLAIN, ('a:1', 2, 1, 0, 1, 300)),
    ({**TASK, **MPI, **PLAIN}, ('a:1', 2, 1, 0, 1, 300)),
    ({**PLAIN, 'EQSSL_PROCESSES': '1', 'EQSSL_PROCESS': '0'}, None),
    (TASK, ('gpu07:61510', 16, 9, 1, 4, 300)),
    ({**TASK, 'SLURM_STEP_NODELIST': 'n1,n2', 'SLURM_STEP_ID': '2', 'SLURM_JOB_ID': '4096'},
     ('n1:61568', 16, 9, 1, 4, 300)),
    ({**TASK, 'JAX_COORDINATOR_PORT': '9'}, ('gpu07:9', 16, 9, 1, 4, 300)),
    ({**TASK, 'SLURM_STEP_NUM_TASKS': '1'}, None),
    ({'SLURM_JOB_ID': '70', 'SLURM_NTASKS': '1', 'SLURM_PROCID': '0'}, None),
    ({**MPI, 'SLURM_JOB_ID': '70', 'SLURM_NTASKS': '8'}, (f'10.96.0.1:{61440 + 373920 % 4096}', 8, 5, 1, 4, 300)),
    ({**MPI, 'OMPI_COMM_WORLD_LOCAL_SIZE': '8', 'OMPI_MCA_orte_hnp_uri': ''}, ('127.0.0.1:61440', 8, 5, 1, 8, 300)),
    ({**POD, 'EQSSL_COORDINATOR': 'a:1', 'EQSSL_PROCESSES': '2'}, ('a:1', 2, 1, 0, 1, 300)),
])
def test_a_process_finds_its_place(env, place):
  found = cluster.find(env)
  assert found is None if place is None else tuple(found) == place


@pytest.mark.parametrize('env,says', [
    ({**PLAIN, 'EQSSL_PROCESS': '2'}, '0 <= this process'),
    ({'EQSSL_COORDINATOR': 'a:1'}, 'Set all three'),
    ({'SLURM_JOB_ID': '70', 'SLURM_NTASKS': '4', 'SLURM_PROCID': '0'}, 'started without srun'),
    ({'SLURM_JOB_ID': '70', 'SLURM_JOB_NUM_NODES': '2'}, 'srun eqssl COMMAND'),
    ({**MPI, 'OMPI_MCA_orte_hnp_uri': ''}, '-x JAX_COORDINATOR_ADDRESS='),
    ({**POD, 'JOBSET_NAME': 'run'}, 'EQSSL_COORDINATOR=run-workers-0-0.run:61440'),
])
def test_a_mistake_is_a_line_to_type(env, says):
  with pytest.raises(UserError, match=says):
    cluster.find(env)


@pytest.mark.parametrize('here,mask,granted,own', [
    (1, '0,1,2,3', '4', None), (4, '0,1,2,3', '4', [1]), (2, '0,1,2,3', '4', [2, 3]), (4, None, '8', [2, 3]),
    (4, '2', '4', None), (4, '2', '', None), (4, '', '', None), (4, 'NoDevFiles', '', None), (4, '0,1', '8', None)])
def test_the_gpus_of_a_machine_are_shared_out(here, mask, granted, own):
  env = {'SLURM_GPUS_ON_NODE': granted} | ({} if mask is None else {'CUDA_VISIBLE_DEVICES': mask})
  assert cluster.gpus(cluster.Place('a:1', 8, 1, 1, here), env, 8) == own


@pytest.mark.parametrize('here,mask,granted', [(3, '0,1,2,3', '4'), (4, '0', '1'), (8, '0,1,2,3', '4')])
def test_gpus_that_cannot_be_shared_out_are_a_line_to_type(here, mask, granted):
  with pytest.raises(UserError, match=f'#SBATCH --ntasks-per-node={granted} '):
    cluster.gpus(cluster.Place('a:1', 8, 1, 1, here), {'CUDA_VISIBLE_DEVICES': mask, 'SLURM_GPUS_ON_NODE': granted}, 0)


def test_the_first_difference_between_processes_is_named(monkeypatch):
  monkeypatch.setattr(processes, 'gather', lambda own: [own, own, {**own, 'optimizer.lr': .3}])
  with pytest.raises(UserError, match='processes 0 and 2 differ in config optimizer.lr: 0.1 and 0.3') as raised:
    processes.agree('config', {'batch': 2, 'optimizer.lr': .1})
  assert raised.value.code == OTHER_CONFIG


def test_other_data_on_another_machine_are_said_before_anything_is_written(monkeypatch, tmp_path):
  marks = 'training count'
  monkeypatch.setattr(processes, 'gather', lambda own: [own, {**own, marks: 7} if marks in own else own])
  with pytest.raises(UserError, match="processes 0 and 1 differ in the data's training count: 1000 and 7"):
    loop.train(load_config(one_process.__file__), tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


def test_what_a_file_system_shows_late_is_waited_for(monkeypatch):
  shown = [[[3], []], [[3], []], [[3], [3]]]
  monkeypatch.setattr(processes, 'gather', lambda value: shown.pop(0))
  monkeypatch.setattr(processes.time, 'sleep', lambda s: None)
  assert processes.wait_until_same('checkpoints', lambda: [3]) == [3] and not shown
  monkeypatch.setattr(processes, 'gather', lambda value: [[3], [3], [2]])
  with pytest.raises(UserError, match=r'(?s)processes 0 and 2 do not see the same checkpoints: \[3\] and \[2\].*share'):
    processes.wait_until_same('checkpoints', lambda: [3])


def test_who_is_there():
  rows = [['a', 4, 'H100'], ['a', 4, 'H100'], ['b', 4, 'H100']]
  assert processes.table(rows) == ['3 processes on 2 machines, 12 devices', '  processes 0-1: a, 4 x H100 each',
                                     '  process 2: b, 4 x H100']


@pytest.mark.parametrize('kind,text,lost', [
    (jax.errors.JaxRuntimeError, 'Gloo all-reduce failed: Connection closed by peer', True),
    (jax.errors.JaxRuntimeError, 'RESOURCE_EXHAUSTED: Out of memory', False),
    (ValueError, 'UNKNOWN: Gloo AllGather failed: Connection closed by peer', True),
    (ValueError, 'a peer of the realm is no number', False)])
def test_an_error_of_a_lost_peer_is_told_from_others(monkeypatch, kind, text, lost):
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  with pytest.raises(UserError if lost else kind, match=text), processes.explain_lost_process():
    raise kind(text)


def test_an_error_of_process_0_is_that_of_all(monkeypatch):
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  monkeypatch.setattr(processes, 'gather', lambda value: [value, None])
  assert processes.from_main(lambda: {'top1': .5}) == {'top1': .5}
  with pytest.raises(UserError, match='No such file'):
    processes.from_main(lambda: open('/nowhere'))
  monkeypatch.setattr(processes, 'gather', lambda value: [value, ('image 3 cannot be read', 7)])
  with pytest.raises(UserError, match='image 3 cannot be read') as raised:
    processes.raise_together(None)
  assert raised.value.code == 7


def test_a_taken_port_is_said(monkeypatch):
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    s.listen()
    for k, v in zip(cluster.VARIABLES, (f'127.0.0.1:{s.getsockname()[1]}', '2', '0'), strict=True):
      monkeypatch.setenv(k, v)
    with pytest.raises(UserError, match='cannot listen'):
      processes.initialize()


def test_an_abort_ends_with_a_line_and_a_code():
  code = ('import os\nfrom equivariant_ssl.parallel import processes\nfrom equivariant_ssl.errors import UserError\n'
          'processes._explain_aborts(UserError(*processes.LOST))\nos.abort()')
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
  assert done.returncode == WATCHDOG and done.stderr.startswith('eqssl: another process of this job was lost')


def _train(workdir, index, port, *more):
  env = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': '1', 'EQSSL_COORDINATOR': f'127.0.0.1:{port}',
         'EQSSL_PROCESSES': '2', 'EQSSL_PROCESS': str(index), 'EQSSL_CACHE': str(jax.config.jax_compilation_cache_dir)}
  program = one_process.__file__
  return subprocess.Popen([sys.executable, program, '-m', 'equivariant_ssl.cli', 'train', '--config', program, '--workdir',
                           str(workdir), '--quiet', *more], env=env, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
@pytest.mark.parametrize('victim', [0, 1])
def test_a_killed_process_ends_the_other_and_the_run_goes_on(tmp_path, victim):
  """Bar 3."""
  steps = ('--config.steps=100000', '--config.checkpoint_every=20')
  port = 24000 + os.getpid() % 1000 + 1000 * victim
  saved = lambda: [int(p.name) for p in (tmp_path / 'run').glob('checkpoints/*') if p.name.isdigit()]
  pair = [_train(tmp_path / 'run', i, port, *steps) for i in range(2)]
  started = list(pair)
  try:
    deadline = time.monotonic() + 400
    while not saved():
      assert time.monotonic() < deadline and all(p.poll() is None for p in pair)
      time.sleep(.2)
    pair[victim].kill()
    start = time.monotonic()
    said = pair[1 - victim].communicate(timeout=120)[1]
    assert time.monotonic() - start < 30
    assert pair[1 - victim].returncode == WATCHDOG, said
    assert 'eqssl: another process of this job was lost' in said
    kept = max(saved())
    pair = [_train(tmp_path / 'run', i, port, *steps) for i in range(2)]
    started += pair
    while max(saved()) == kept:
      assert time.monotonic() < deadline and all(p.poll() is None for p in pair)
      time.sleep(.2)
    pair[victim].terminate()  # both stop at one step
    assert [p.wait(60) for p in pair] == [75, 75]
  finally:
    for p in started:
      p.kill()
      p.wait()
      p.stderr.close()


SHARED = """
import numpy as np
from equivariant_ssl.errors import UserError
from equivariant_ssl.parallel import processes, shared_work
processes.initialize()
def compute():
  assert processes.is_main()
  return {'labels': np.arange(9, dtype=np.int32), 'files': np.array(['\u00e9.jpg', 'b.jpg'])}
def fail():
  raise UserError('no disk', 'mount it', 10)
arrays = shared_work.share_arrays(compute)
try:
  shared_work.share_arrays(fail)
except UserError as error:
  print(arrays['labels'].sum(), ascii(str(arrays['files'][0])), error.code, str(error).split())
"""


@pytest.mark.slow
def test_process_0_computes_for_all():
  env = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': '1', 'EQSSL_PROCESSES': '2',
         'EQSSL_COORDINATOR': f'127.0.0.1:{22000 + os.getpid() % 1000}'}
  pair = [subprocess.Popen([sys.executable, '-c', SHARED], env={**env, 'EQSSL_PROCESS': str(i)},
                           stdout=subprocess.PIPE, text=True) for i in range(2)]
  try:
    for process in pair:
      assert "36 '\\xe9.jpg' 10 ['no', 'disk', 'mount', 'it']" in process.communicate(timeout=120)[0]
  finally:
    for process in pair:
      process.kill()
      process.wait()
      process.stdout.close()

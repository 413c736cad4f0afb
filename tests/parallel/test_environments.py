"""The environments of srun and mpirun, whole and in part, through the command line: a place, or one line."""
import itertools

import pytest
import tiny

from equivariant_ssl import cli
from equivariant_ssl.errors import UserError
from equivariant_ssl.parallel import cluster, processes
from equivariant_ssl.training import loop

SLURM = {'SLURM_JOB_ID': '7', 'SLURM_STEP_ID': '0', 'SLURM_STEP_NODELIST': 'gpu[07-08]', 'SLURM_STEP_NUM_TASKS': '4',
         'SLURM_STEP_TASKS_PER_NODE': '2(x2)', 'SLURM_NODEID': '1', 'SLURM_PROCID': '3', 'SLURM_LOCALID': '1'}
OMPI = {f'OMPI_COMM_WORLD_{k}': v for k, v in {'SIZE': '4', 'RANK': '3', 'LOCAL_SIZE': '2', 'LOCAL_RANK': '1'}.items()}
OMPI_4 = {**OMPI, 'OMPI_MCA_orte_hnp_uri': '1720320.0;tcp://10.0.0.5,10.1.0.5:41234'}
OMPI_5 = {**OMPI, 'PMIX_NAMESPACE': 'prterun-node-a-11553@1', 'PMIX_RANK': '3', 'OMPI_VERSION': '5.0.11',  # as 5.0.11 has it
          'PMIX_SERVER_URI41': 'prterun-node-a-11553@0.1;tcp4://127.0.0.1:51629'}
WORDS = ('missing', '', 'x', '-1', '9999', '1.5', '²')
OMPI_SIZE = 'OMPI_COMM_WORLD_SIZE'  # without it, or SLURM_JOB_ID, a process is alone
INDICES = ('SLURM_PROCID', 'SLURM_LOCALID', 'OMPI_COMM_WORLD_RANK', 'OMPI_COMM_WORLD_LOCAL_RANK')
NEEDED = (*INDICES, 'OMPI_COMM_WORLD_LOCAL_SIZE')


@pytest.fixture
def command(monkeypatch, tmp_path, capsys):
  """command(env) -> (exit code, stderr) of a training in it, which joins nobody and does nothing."""
  for name in (*SLURM, *OMPI_4, *OMPI_5, 'SLURM_NTASKS', 'SLURM_JOB_NUM_NODES', 'JAX_COORDINATOR_ADDRESS'):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setattr(cli, '_cache', lambda: None)

  def reach(what):
    def stop(*args, **kw):
      raise UserError(what)
    return stop
  monkeypatch.setattr(processes.jax.distributed, 'initialize', reach('joined'))
  monkeypatch.setattr(loop, 'train', reach('alone'))
  monkeypatch.setattr(processes, '_explain_aborts', lambda error: None)
  monkeypatch.setattr(processes, '_raise_if_taken', lambda where: None)

  def of(env):
    with monkeypatch.context() as m:
      for name, value in env.items():
        m.setenv(name, value)
      code = cli.main(['train', '--config', tiny.NAME, '--workdir', str(tmp_path / 'run')])
    return code, capsys.readouterr().err
  return of


def test_whole_ones_are_places():
  assert cluster.find(SLURM) == cluster.Place('gpu07:61447', 4, 3, 1, 2)
  assert cluster.find(OMPI_4) == cluster.Place(f'10.0.0.5:{61440 + 420 % 4096}', 4, 3, 1, 2)
  assert cluster.find(OMPI_5) == cluster.Place(f'node-a:{61440 + (11553 + 64) % 4096}', 4, 3, 1, 2)
  alone = {**OMPI_5, 'OMPI_COMM_WORLD_SIZE': '2', 'OMPI_COMM_WORLD_RANK': '1'}
  assert cluster.find(alone).coordinator.startswith('127.0.0.1:')
  assert cluster.find({**OMPI, 'JAX_COORDINATOR_ADDRESS': 'a:1'}).coordinator == 'a:1'
  assert cluster.find({'SLURM_JOB_ID': '7', 'SLURM_NTASKS': '1'}) is None


@pytest.mark.parametrize(('whole', 'name'), [(e, n) for e in (SLURM, OMPI_4, OMPI_5) for n in e])
def test_a_part_of_one_is_a_line(whole, name, command):
  for word in WORDS:
    env = {k: v for k, v in whole.items() if k != name} if word == 'missing' else {**whole, name: word}
    code, err = command(env)
    assert code == 2 and 'Traceback' not in err and len(err.strip().splitlines()) <= 2, (name, word, err)
    if name in NEEDED and word != '9999' or name in INDICES:
      assert f'{name} ' in err and f'env -u {"SLURM_JOB_ID" if name in SLURM else OMPI_SIZE} ' in err, (name, word, err)


def test_any_subset_is_a_place_nothing_or_a_line():
  for whole in (SLURM, OMPI_4, OMPI_5):
    for kept in itertools.product((False, True), repeat=len(whole)):
      env = {k: v for (k, v), keep in zip(whole.items(), kept, strict=True) if keep}
      try:
        place = cluster.find(env)
      except UserError as e:
        assert len(str(e).splitlines()) == 2
      else:
        assert place is None or (
            0 <= place.process_index < place.process_count and 0 <= place.local_index < place.local_count)


def test_mpirun_without_its_machine_is_said(command):
  code, err = command(OMPI)
  assert code == 2 and 'mpirun -x JAX_COORDINATOR_ADDRESS=HOST:61440' in err

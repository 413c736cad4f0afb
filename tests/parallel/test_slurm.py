"""A real SLURM on one node: the batch file's stop, requeue and resume. Needs Debian's slurm-wlm and munge, and root."""
import contextlib
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import time

import one_process
import pytest

from equivariant_ssl.config import load_config
from equivariant_ssl.parallel import sharding
from equivariant_ssl.storage import checkpoint, fingerprint, record
from equivariant_ssl.training import runs

ROOT = pathlib.Path(__file__).parents[2]
TOOLS = {t: shutil.which(t, path=os.environ['PATH'] + ':/usr/sbin') for t in
         ('munged', 'slurmctld', 'slurmd', 'sbatch', 'srun', 'scancel', 'scontrol')}
pytestmark = [pytest.mark.slow, pytest.mark.skipif(
    not all(TOOLS.values()) or os.geteuid() != 0, reason='needs root and: apt-get install slurm-wlm munge')]
CONF = '''
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={d}/munge.socket
CredType=cred/munge
StateSaveLocation={d}/state
SlurmdSpoolDir={d}/spool
SlurmctldPidFile={d}/slurmctld.pid
SlurmdPidFile={d}/slurmd.pid
SlurmctldLogFile={d}/slurmctld.log
SlurmdLogFile={d}/slurmd.log
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
GresTypes=gpu
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 Gres=gpu:2 RealMemory=1000 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:2
'''


def _ports(n):
  with contextlib.ExitStack() as stack:
    sockets = [stack.enter_context(socket.socket()) for _ in range(n)]
    for s in sockets:
      s.bind(('127.0.0.1', 0))
    return [s.getsockname()[1] for s in sockets]


@pytest.fixture(scope='module')
def slurm(tmp_path_factory):
  """`call(tool, *argv)` with a SLURM of this machine alone, whose daemons end with the test."""
  d = tmp_path_factory.mktemp('slurm')
  (d / 'state').mkdir()
  (d / 'spool').mkdir()
  (d / 'key').write_bytes(os.urandom(1024))
  (d / 'key').chmod(0o400)
  d.chmod(0o755)
  for parent in d.parents:  # munged refuses a socket below a folder that it cannot reach
    if 'pytest' in parent.name:
      parent.chmod(0o755)
  (d / 'slurm.conf').write_text(CONF.format(d=d, host=socket.gethostname().split('.')[0], ports=_ports(2)))
  env = {**os.environ, 'SLURM_CONF': str(d / 'slurm.conf')}
  (d / 'gres.conf').write_text('Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n')  # which stand for two GPUs
  daemons = []

  def start(tool, *argv):
    daemons.append(subprocess.Popen([TOOLS[tool], *argv], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))

  def call(tool, *argv, check=True, **more):
    done = subprocess.run([TOOLS[tool], *argv], env={**env, **more}, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert not check or done.returncode == 0, done.stderr
    return done.stdout + done.stderr
  try:
    start('munged', '--foreground', '--force', f'--key-file={d}/key', f'--socket={d}/munge.socket',
          f'--pid-file={d}/munged.pid', f'--seed-file={d}/seed', f'--log-file={d}/munged.log')
    until(lambda: (d / 'munge.socket').exists(), 20)
    start('slurmctld', '-D', '-c')
    start('slurmd', '-D')
    until(lambda: 'State=IDLE' in call('scontrol', 'show', 'node', check=False), 60)
    yield call
    call('scontrol', 'shutdown', check=False)
  finally:
    for daemon in reversed(daemons):
      with contextlib.suppress(subprocess.TimeoutExpired):
        daemon.terminate()
        daemon.wait(10)
      daemon.kill()
      daemon.wait()


def until(true, seconds):
  deadline = time.monotonic() + seconds
  while not true():
    assert time.monotonic() < deadline, 'waited in vain'
    time.sleep(.3)


def submit(slurm, tmp_path, name, steps):
  """The job's number: two tasks train the tests' smallest config by launch/slurm/train.sbatch."""
  stand_in = tmp_path / 'python'
  stand_in.write_text(f'#!/usr/bin/env bash\nexec {sys.executable} {ROOT}/tests/one_process.py "$@"\n')
  stand_in.chmod(0o755)
  port, = _ports(1)
  text = slurm('sbatch', '--ntasks-per-node=2', '--cpus-per-task=1', f'--output={tmp_path}/%x.txt', f'--job-name={name}',
               str(ROOT / 'launch/slurm/train.sbatch'), one_process.__file__, '--workdir', str(tmp_path / name), '--quiet',
               f'--config.steps={steps}', '--config.checkpoint_every=100000', PYTHON=str(stand_in), JAX_PLATFORMS='cpu',
               JAX_NUM_CPU_DEVICES='1', JAX_COORDINATOR_ADDRESS=f'127.0.0.1:{port}')
  return text.split()[-1]


def ended(slurm, job):
  return any(f'JobState={s}' in slurm('scontrol', 'show', 'job', job, check=False) for s in ('COMPLETED', 'FAILED'))


def weights(workdir, steps):
  config = load_config(one_process.__file__, {'steps': str(steps), 'checkpoint_every': '100000'})
  run = runs.prepare_run(config, sharding.mesh())
  step, state, _ = checkpoint.load_checkpoint(workdir / 'checkpoints', runs.abstract_state(run), log=pytest.fail)
  assert step == steps
  return state


def test_two_tasks_stop_together_are_queued_again_and_finish_as_if_never_stopped(slurm, tmp_path):
  """Bar 2."""
  steps, said = 600, lambda name: (tmp_path / f'{name}.txt').read_text()
  job = submit(slurm, tmp_path, 'stopped', steps)
  until(lambda: len(record.read_metrics(tmp_path / 'stopped')) > 20, 400)
  slurm('scancel', '--signal=TERM', job)
  until(lambda: 'everything is saved' in said('stopped'), 60)
  until(lambda: {'Restarts=1', 'JobState=PENDING'} <= set(slurm('scontrol', 'show', 'job', job).split()), 120)
  assert said('stopped').count('everything is saved') == 2
  # SLURM holds what is queued again for two minutes. Started in the very second it was queued again, it failed at once,
  # twice, without a word of the script: slurmd revokes credentials by the second, it seems.
  slurm('scontrol', 'update', f'JobId={job}', 'StartTime=now+10')
  until(lambda: ended(slurm, job), 400)
  shown = slurm('scontrol', 'show', 'job', job)
  assert 'JobState=COMPLETED' in shown, shown + said('stopped')
  whole = submit(slurm, tmp_path, 'whole', steps)
  until(lambda: ended(slurm, whole), 400)
  assert fingerprint.fingerprints(weights(tmp_path / 'stopped', steps)) == fingerprint.fingerprints(weights(tmp_path / 'whole', steps))


def test_the_templates_are_what_sbatch_takes(slurm):
  said = slurm('sbatch', '--test-only', '--ntasks-per-node=2', str(ROOT / 'launch/slurm/train.sbatch'), 'smoke')
  assert 'to start at' in said


def batch(slurm, tmp_path, name, program, *options):
  """The number of a job of launch/slurm/h100.sbatch, whose tasks run `program`, a script, in place of python."""
  (tmp_path / name).write_text(f'#!/usr/bin/env bash\n{program}\n')
  (tmp_path / name).chmod(0o755)
  return slurm('sbatch', '--cpus-per-gpu=1', f'--output={tmp_path}/{name}.txt', *options, str(ROOT / 'launch/slurm/h100.sbatch'),
               'smoke', PYTHON=str(tmp_path / name)).split()[-1]


@pytest.mark.parametrize('options,shown', [
    (('--gres=gpu:2',), ['0 of 2, 1 core', '1 of 2, 1 core']), (('--gres=gpu:1',), ['0 of 1, 1 core']),
    (('--gres=gpu:2', '--ntasks-per-node=1'), ['0 of 1, 2 core'])])
def test_a_node_has_a_task_for_each_gpu_that_slurm_gives(slurm, tmp_path, options, shown):
  job = batch(slurm, tmp_path, 'shown', 'echo "$SLURM_PROCID of $SLURM_NTASKS, $SLURM_CPUS_PER_TASK core"', *options)
  until(lambda: ended(slurm, job), 60)
  said = (tmp_path / 'shown.txt').read_text()
  assert sorted(line for line in said.splitlines() if ' of ' in line) == shown, said


def test_a_lost_process_is_queued_again_until_it_was_queued_often_enough(slurm, tmp_path):
  """A task is killed, and the other ends with 8: srun ends with 137, and the batch file knows what that means."""
  program = 'echo start ${SLURM_RESTART_COUNT:-0}; if [ "$SLURM_PROCID" = 1 ]; then kill -KILL $$; fi; sleep 1; exit 8'
  job = batch(slurm, tmp_path, 'lost', program, '--gres=gpu:2', '--export=ALL,LOST_REQUEUES=1')
  until(lambda: {'Restarts=1', 'JobState=PENDING'} <= set(slurm('scontrol', 'show', 'job', job).split()), 60)
  slurm('scontrol', 'update', f'JobId={job}', 'StartTime=now+10')  # see above
  until(lambda: ended(slurm, job), 120)
  assert 'Restarts=1' in slurm('scontrol', 'show', 'job', job)
  said = (tmp_path / 'lost.txt').read_text().splitlines()
  assert said.count('start 0') == said.count('start 1') == 2 and 'start 2' not in said

"""What eqssl launch would submit, and that shells, gcloud and Kubernetes would take it."""
import pathlib
import re
import shlex
import shutil
import subprocess

import pytest

from equivariant_ssl import cli
from equivariant_ssl.parallel import launch

ROOT = pathlib.Path(__file__).parents[2]
BATCH = sorted((ROOT / 'launch/slurm').glob('*.sbatch'))


def dry(capfd, where, *argv):
  assert cli.main(['launch', where, '--config', 'smoke', '--config.batch=32', *argv, '--dry-run']) == 0
  return capfd.readouterr().out


def test_slurm(capfd):
  shown = dry(capfd, 'slurm', '--workdir', 'w', '--set', 'template=a100', 'nodes=4', 'account=me@a100')
  assert '#SBATCH --signal=TERM@120' in shown and '#SBATCH --requeue' in shown and '--gres=gpu:8' in shown
  _, tool, *argv = shlex.split(shown.splitlines()[-1].removeprefix('# '))
  assert tool == 'sbatch' and argv[:3] == ['--job-name=eqssl-smoke', '--nodes=4', '--account=me@a100']
  assert argv[3].endswith('a100.sbatch') and argv[4:] == ['smoke', '--workdir', 'w', '--config.batch=32']


def test_a_field_after_the_settings_is_none_of_them(capfd):
  """argparse takes an argument with a space in it for one more setting."""
  field = '--config.data.path=/data/my photos'
  shown = dry(capfd, 'slurm', '--config.data.name=folder', '--set', 'template=a100', field, 'nodes=4')
  _, _, *argv = shlex.split(shown.splitlines()[-1].removeprefix('# '))
  assert argv[:2] == ['--job-name=eqssl-smoke', '--nodes=4'] and argv[-1] == field


def test_batch_files_differ_in_their_options_alone():
  texts = [p.read_text() for p in BATCH]
  assert {p.stem for p in BATCH} == {'train', 'v100', 'a100', 'h100'}
  assert len({t.partition('set -uo pipefail')[2] for t in texts}) == 1
  for path, text in zip(BATCH, texts, strict=True):
    assert f'launch/slurm/{path.name} CONFIG' in text
    assert all('SITE' in line for line in text.splitlines() if re.search('--(partition|account|gres|time)=', line))


def run_batch_file(tmp_path, code, **env):
  """(exit code, the calls of srun and scontrol) of a batch file under stand-ins for both."""
  for name in ('srun', 'scontrol'):
    (tmp_path / name).write_text(f'#!/bin/sh\necho {name} "$@" >> {tmp_path}/said\nenv | grep CPUS_PER >> {tmp_path}/said\n'
                                 f'[ {name} = scontrol ] || exit {code}\n')
    (tmp_path / name).chmod(0o755)
  done = subprocess.run(['bash', BATCH[0], 'smoke', '--workdir', 'a b'], env={
      'PATH': f'{tmp_path}:/usr/bin:/bin', 'SLURM_JOB_ID': '7', 'PYTHON': 'py', **env})
  return done.returncode, (tmp_path / 'said').read_text()


@pytest.mark.parametrize('code,restarts,requeued', [
    (0, '0', False), (75, '40', True), (8, '', True), (8, '19', True), (8, '20', False), (137, '3', True), (137, '20', False),
    (2, '0', False), (5, '0', False), (10, '0', False)])
def test_a_batch_file_queues_again_what_stopped_or_lost_a_process_and_nothing_else(tmp_path, code, restarts, requeued):
  """A lost process, for a bounded number of times."""
  ended, said = run_batch_file(tmp_path, code, **({'SLURM_RESTART_COUNT': restarts} if restarts else {}))
  assert ended == code and ('scontrol requeue 7' in said) == requeued
  assert 'py -m equivariant_ssl.cli train --config smoke --workdir a b' in said


@pytest.mark.parametrize('env,options,cores', [
    ({'SLURM_GPUS_ON_NODE': '8', 'SLURM_NNODES': '2', 'SLURM_CPUS_PER_GPU': '12', 'SLURM_CPUS_ON_NODE': '96'},
     '--ntasks-per-node=8 --ntasks=16 ', 12),
    ({'SLURM_GPUS_ON_NODE': '4', 'SLURM_NNODES': '1', 'SLURM_CPUS_PER_GPU': '24', 'SLURM_CPUS_ON_NODE': '96'},
     '--ntasks-per-node=4 --ntasks=4 ', 24),
    ({'SLURM_GPUS_ON_NODE': '8', 'SLURM_NTASKS_PER_NODE': '1', 'SLURM_CPUS_PER_GPU': '12', 'SLURM_CPUS_ON_NODE': '96'}, '', 96),
    ({'SLURM_GPUS_ON_NODE': '8', 'SLURM_NTASKS_PER_NODE': '8', 'SLURM_CPUS_PER_TASK': '6'}, '', 6)])
def test_the_tasks_of_a_node_are_read_from_slurm(tmp_path, env, options, cores):
  """A task a GPU, and its cores, unless the options of sbatch say how many tasks a node has."""
  said = run_batch_file(tmp_path, 0, **env)[1].splitlines()
  assert said[0].startswith(f'srun {options}--kill-on-bad-exit=0')
  assert f'SRUN_CPUS_PER_TASK={cores}' in said and not any('CPUS_PER_GPU' in line for line in said)


def test_the_h100s_of_a_node_are_not_assumed():
  text = next(p for p in BATCH if p.stem == 'h100').read_text()
  assert '#SBATCH --gres=gpu:8 ' in text and '--ntasks' not in text.partition('set -uo')[0]


SETTINGS = ('zone=us-central2-b', 'bucket=mine', 'source=git+https://x/y', 'type=v5litepod-32', 'spot=1')
WHERE = ['--zone', 'us-central2-b']
SSH = ['gcloud', 'compute', 'tpus', 'tpu-vm', 'ssh', 'eqssl-smoke', *WHERE, '--worker', 'all', '--command']
CREATE = ['gcloud', 'compute', 'tpus', 'queued-resources', 'create', 'eqssl-smoke', '--node-id', 'eqssl-smoke', *WHERE,
          '--accelerator-type', 'v5litepod-32', '--runtime-version', 'tpu-ubuntu2204-base', '--spot']
SETUP = [
    'command -v gcsfuse >/dev/null || { echo deb https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -cs) main | '
    'sudo tee /etc/apt/sources.list.d/gcsfuse.list && curl -s https://packages.cloud.google.com/apt/doc/apt-key.gpg | '
    'sudo apt-key add - && sudo apt-get -qq update && sudo apt-get -qq install gcsfuse; }',
    'mkdir -p runs && { mountpoint -q runs || gcsfuse --implicit-dirs --rename-dir-limit 100000 --metadata-cache-ttl-secs 0 '
    'mine runs; }',
    '{ [ -x eqssl/bin/python ] || { curl -LsSf https://astral.sh/uv/install.sh | sh && '
    '.local/bin/uv venv -q --seed --python 3.12 eqssl; }; } && '
    r'eqssl/bin/pip install -q equivariant-ssl\[tpu\]\ @\ git+https://x/y']
TRAIN = ('TFDS_DATA_DIR=runs/tensorflow_datasets eqssl/bin/python -m equivariant_ssl.cli train --config smoke '
         '--workdir runs/eqssl-smoke --config.batch=32')
ON_ALL = [[*SSH, command] for command in (*SETUP, TRAIN)]


def test_tpu(capfd):
  shown = dry(capfd, 'tpu', '--set', *SETTINGS).splitlines()
  assert [shlex.split(line) for line in shown] == [CREATE, *ON_ALL]
  assert not any(line.endswith(' ') for line in shown)


def test_tpu_asks_again_for_what_was_taken_away(tmp_path, monkeypatch):
  """A stand-in for gcloud: suspended, then there."""
  (tmp_path / 'gcloud').write_text(f'''#!/bin/bash
printf '%q ' gcloud "$@" >> {tmp_path}/said; echo >> {tmp_path}/said
case "$*" in
  *describe*) if [ -e {tmp_path}/made ]; then echo ACTIVE; else echo SUSPENDED; fi ;;
  *create*) touch {tmp_path}/made ;;
  *train*) exit 75 ;;
esac
''')
  (tmp_path / 'gcloud').chmod(0o755)
  monkeypatch.setenv('PATH', f'{tmp_path}:/usr/bin:/bin')
  assert cli.main(['launch', 'tpu', '--config', 'smoke', '--config.batch=32', '--set', *SETTINGS]) == 75
  said = [shlex.split(line) for line in (tmp_path / 'said').read_text().splitlines()]
  said = [line for line in said if 'describe' not in line]
  assert said == [['gcloud', 'compute', 'tpus', 'queued-resources', 'delete', 'eqssl-smoke', *WHERE, '--force', '--quiet'],
                  CREATE, *ON_ALL]


def test_tpu_does_not_wait_for_what_was_refused(tmp_path, monkeypatch, capfd):
  """A stand-in for gcloud: a new request that fails, as without quota."""
  (tmp_path / 'gcloud').write_text(f'''#!/bin/bash
case "$*" in
  *describe*) if [ -e {tmp_path}/made ]; then echo FAILED; else exit 1; fi ;;
  *create*) touch {tmp_path}/made ;;
esac
''')
  (tmp_path / 'gcloud').chmod(0o755)
  monkeypatch.setenv('PATH', f'{tmp_path}:/usr/bin:/bin')
  assert cli.main(['launch', 'tpu', '--config', 'smoke', '--set', *SETTINGS]) == 1
  assert 'eqssl-smoke is FAILED' in capfd.readouterr().err


def test_gke(capfd):
  shown = dry(capfd, 'gke', '--set', 'image=me/eqssl:1', 'claim=disk', 'nodes=4')
  assert '$NAME' not in shown and shown.rstrip().endswith('# kubectl apply -f -')
  yaml = pytest.importorskip('yaml')
  made = yaml.safe_load(shown)
  job = made['spec']['replicatedJobs'][0]['template']
  container = job['spec']['template']['spec']['containers'][0]
  assert (made['kind'], made['metadata']['name']) == ('JobSet', 'eqssl-smoke')
  assert container['args'] == ['--config', 'smoke', '--workdir', 'runs/smoke', '--config.batch=32']
  assert {e['name']: e['value'] for e in container['env']} == {
      'EQSSL_COORDINATOR': 'eqssl-smoke-workers-0-0.eqssl-smoke:61440', 'EQSSL_PROCESSES': '4',
      'TFDS_DATA_DIR': '/shared/tensorflow_datasets'}
  schema = pytest.importorskip('kubernetes_validate', reason='pip install -e ".[kubernetes]"')
  job |= {'apiVersion': 'batch/v1', 'kind': 'Job', 'metadata': {'name': 'inner'}}
  schema.validate(job, '1.31', strict=True)
  job['spec']['completionMode'] = 7
  with pytest.raises(schema.ValidationError):
    schema.validate(job, '1.31', strict=True)


def test_what_is_set_stays_text(capfd):
  """A name that looks like a number is a string to Kubernetes and to sbatch too."""
  yaml = pytest.importorskip('yaml')
  made = yaml.safe_load(dry(capfd, 'gke', '--set', 'image=1e5', 'claim=2024_01_15', 'name=0x10', 'accelerator=yes'))
  pod = made['spec']['replicatedJobs'][0]['template']['spec']['template']['spec']
  assert made['metadata']['name'] == '0x10' and pod['containers'][0]['image'] == '1e5'
  assert '2024_01_15' in str(pod['volumes']) and "'yes'" in str(pod['nodeSelector'])
  assert '--account=1e5' in dry(capfd, 'slurm', '--set', 'account=1e5').splitlines()[-1]
  shown = dry(capfd, 'slurm', '--config.data.name=folder', '--config.data.path=2024_01_15')
  assert shlex.split(shown.splitlines()[-1])[-1] == '--config.data.path=2024_01_15'


BAD = ('nodes=abc', 'nodes=0', 'nodes=', 'nodes=-1', 'gpus=1.5', 'gpus=²')


@pytest.mark.parametrize('argv,says', [
    (('gke',), 'launch gke needs image and claim'), (('tpu', '--set', 'zon=1'), "Did you mean 'zone'"),
    (('slurm', '--set', 'template=b100'), 'It has: a100, h100, train, v100'), (('slurm', '--set', 'nodes'), 'nodes=4'),
    (('tpu', '--workdir', 'w'), 'bucket'), (('slurm', '--config.batchh=2'), "'batch'"),
    *((('gke', '--set', 'image=i', 'claim=c', n), f'--set {n}: ') for n in BAD)])
def test_a_mistake_is_said_before_the_queue(argv, says, capsys):
  assert cli.main(['launch', *argv[:1], '--config', 'smoke', *argv[1:], '--dry-run']) == 2
  assert says in capsys.readouterr().err


def test_machines_elsewhere_are_given_what_they_have(tmp_path, capfd):
  """A path of the clone becomes its name; a file of one's own is refused where it would not be."""
  argv = lambda config: ['launch', 'gke', '--config', str(config), '--set', 'image=i', 'claim=c', '--dry-run']
  assert cli.main(argv(ROOT / 'configs' / 'smoke.py')) == 0
  assert '["--config", "smoke", "--workdir", "runs/smoke"]' in capfd.readouterr().out
  (tmp_path / 'mine.py').write_text((ROOT / 'configs' / 'smoke.py').read_text())
  assert cli.main(argv(tmp_path / 'mine.py')) == 2
  assert 'the machines there will not have it' in capfd.readouterr().err


def test_no_tool_is_said(monkeypatch, capsys):
  monkeypatch.setenv('PATH', '')
  assert cli.main(['launch', 'slurm', '--config', 'smoke']) == 2
  assert 'there is no sbatch here' in capsys.readouterr().err


def test_every_file_is_installed():
  import configparser
  files = configparser.ConfigParser()
  files.read(ROOT / 'setup.cfg')
  shipped = {p for globs in files['options.data_files'].values() for g in globs.split() for p in ROOT.glob(g)}
  assert {p for p in (ROOT / 'launch').rglob('*') if p.is_file()} <= shipped
  assert launch.template('gke/jobset.yaml').is_file()


@pytest.mark.skipif(not shutil.which('shellcheck'), reason='needs: apt-get install shellcheck')
def test_shellcheck():
  files = [*BATCH, *(ROOT / 'launch').glob('*.sh'), *(ROOT / 'launch').glob('*/*.sh')]
  done = subprocess.run(['shellcheck', *map(str, files)], capture_output=True, text=True)
  assert done.returncode == 0, done.stdout

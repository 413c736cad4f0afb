"""`eqssl launch`: hand a training to SLURM, Cloud TPU or Kubernetes by the files in launch/, or show what it would hand."""
import json
import os
import pathlib
import shlex
import shutil
import string
import subprocess
import sys
from typing import NamedTuple

from equivariant_ssl import config as configs
from equivariant_ssl import shipped
from equivariant_ssl.errors import UserError
from equivariant_ssl.registry import unknown_name

# What can be set, with defaults ('' of train.sh's own); None: must be.
TPU = {'zone': None, 'bucket': None, 'source': None, 'name': '', 'type': '', 'runtime': '', 'project': '', 'spot': ''}
GKE = {'image': None, 'claim': None, 'name': '', 'nodes': '1', 'gpus': '8', 'accelerator': 'nvidia-tesla-a100'}
COUNTS = {'nodes', 'gpus'}


class Plan(NamedTuple):
  """A command to run, with `env` added to the environment, `text` to show or to read from its standard input."""
  argv: list[str]
  env: dict[str, str]
  text: str = ''
  reads: bool = False


def template(name: str) -> pathlib.Path:
  """The file `name` of launch/, in this folder, in a clone or where the package is installed."""
  found = next((f / name for f in shipped.folders('launch') if (f / name).is_file()), None)
  if found is None:
    there = sorted({p.stem for f in shipped.folders('launch') for p in (f / name).parent.glob('*')})
    raise unknown_name('launch/' + pathlib.Path(name).parent.name, pathlib.Path(name).stem, there)
  return found


def _filled(where: str, given: dict[str, str], known: dict) -> dict[str, str]:
  for k in given:
    if k not in known:
      raise unknown_name(f'launch {where} --set', k, known)
  lacking = [k for k, v in known.items() if v is None and not given.get(k)]
  if lacking:
    raise UserError(f'launch {where} needs {" and ".join(lacking)}.', '--set ' + ' '.join(f'{k}=...' for k in lacking))
  for k in COUNTS & known.keys() & given.keys():
    if not given[k].isascii() or not given[k].isdigit() or int(given[k]) < 1:
      raise UserError(f'launch {where} --set {k}={given[k]}: {k} is a whole number, 1 or more.', f'e.g. --set {k}=4')
  return {**known, **given}


def _shipped(config: str) -> str:
  """The name by which machines elsewhere know `config`. UserError for a file of one's own, which they do not have."""
  path = next(p for p in (pathlib.Path(config), *(f / f'{config}.py' for f in shipped.folders())) if p.is_file())
  there = [f / path.name for f in shipped.folders() if f.is_absolute()]  # of the package, not of this folder
  if not any(p.is_file() and p.read_bytes() == path.read_bytes() for p in there):
    raise UserError(f'{path} is not one of the package\'s configs: the machines there will not have it.',
                    'Add it to configs/ of what is installed there; or name the nearest, and say what differs: '
                    '--config NAME --config.a.b=value')
  return path.stem


def _name(config: str) -> str:
  return 'eqssl-' + pathlib.Path(config).stem.replace('_', '-').lower()


def slurm(config: str, train: list[str], given: dict[str, str]) -> Plan:
  """sbatch of launch/slurm/TEMPLATE.sbatch; what else is set are options of sbatch."""
  given = {'job-name': _name(config), **given}
  file = template(f'slurm/{given.pop("template", "train")}.sbatch')
  options = [f'--{k}={v}' for k, v in given.items()]
  return Plan(['sbatch', *options, str(file), config, *train], {'PYTHON': sys.executable}, file.read_text(encoding='utf-8'))


def tpu(config: str, train: list[str], given: dict[str, str]) -> Plan:
  """launch/tpu/train.sh, which takes its settings from the environment."""
  env = {k.upper(): v for k, v in _filled('tpu', given, TPU).items() if v}
  return Plan(['bash', str(template('tpu/train.sh')), _shipped(config), *train], env)


def gke(config: str, train: list[str], given: dict[str, str]) -> Plan:
  """kubectl apply of launch/gke/jobset.yaml, filled in."""
  values = {k.upper(): v for k, v in _filled('gke', {'name': _name(config), **given}, GKE).items()}
  text = string.Template(template('gke/jobset.yaml').read_text(encoding='utf-8')).safe_substitute(
      values, ARGS=json.dumps(['--config', _shipped(config), *train]))
  return Plan(['kubectl', 'apply', '-f', '-'], {}, text, True)


PLACES = {'slurm': slurm, 'tpu': tpu, 'gke': gke}


def run(where: str, config: str, workdir: str, overrides: dict[str, str], settings: list[str], dry: bool) -> int:
  """Submit the training of `config`, or print what would be submitted; the submitting command's exit code."""
  configs.load(config, overrides)  # a mistake in it is said here, not after hours in a queue
  pairs = dict(s.partition('=')[::2] for s in settings)
  if not all('=' in s and s[0] != '=' for s in settings):
    raise UserError(f'--set {" ".join(settings)}: not settings.', 'e.g. --set nodes=4 account=PROJECT')
  if where == 'tpu' and workdir:
    raise UserError('on a TPU the run is in the bucket.', 'Leave --workdir out; --set bucket=BUCKET name=NAME.')
  place = [] if where == 'tpu' else ['--workdir', workdir or f'runs/{pathlib.Path(config).stem}']
  plan = PLACES[where](config, [*place, *(f'--config.{k}={v}' for k, v in overrides.items())], pairs)
  if dry and where == 'tpu':
    plan = plan._replace(env={**plan.env, 'DRY_RUN': '1'})
  elif dry:
    print(plan.text + '# ' + shlex.join([*(f'{k}={v}' for k, v in plan.env.items()), *plan.argv]))
    return 0
  tool = 'gcloud' if where == 'tpu' else plan.argv[0]
  if not dry and not shutil.which(tool):
    raise UserError(f'there is no {tool} here.', f'Run this where {tool} is, or see what it would do: --dry-run')
  text = plan.text if plan.reads else None
  return subprocess.run(plan.argv, env={**os.environ, **plan.env}, input=text, encoding='utf-8').returncode

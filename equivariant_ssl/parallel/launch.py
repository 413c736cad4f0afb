"""`eqssl launch`: submit a training to SLURM, Cloud TPU or Kubernetes.

With --dry-run it shows what would be submitted.
The files in launch/ say how.
"""
import json
import os
import pathlib
import re
import shlex
import shutil
import string
import subprocess
import sys
from typing import NamedTuple

from equivariant_ssl import shipped
from equivariant_ssl.config import load_config
from equivariant_ssl.errors import UserError
from equivariant_ssl.parallel.accelerators import ACCELERATORS
from equivariant_ssl.parallel.device_plan import plan_on
from equivariant_ssl.registry import unknown_name
from equivariant_ssl.training import stop
from equivariant_ssl.training.run_config import check_roles

# What `--set` can set, with the defaults. None: the value must be set. '': train.sh has a default.
TPU = {'zone': None, 'bucket': None, 'source': None, 'name': '', 'type': '', 'runtime': '',
       'project': '', 'spot': ''}
GKE = {'image': None, 'claim': None, 'name': '', 'nodes': '1', 'gpus': '8',
       'accelerator': 'nvidia-tesla-a100'}
DEFAULT_SLICE = 'v4-32'  # of train.sh
COUNTS = {'nodes', 'gpus'}  # the settings that are whole numbers
Settings = dict[str, str]


class Submission(NamedTuple):
  """A command that submits a training.

  argv:        the command.
  env:         variables that are added to its environment.
  text:        the file that it submits.
  reads_stdin: whether it reads `text` from its standard input.
  """
  argv: list[str]
  env: dict[str, str]
  text: str = ''
  reads_stdin: bool = False


def template(name: str) -> pathlib.Path:
  """Return the file `name` of launch/.

  It is looked for in the current folder, in a clone, and where the package is installed.
  """
  folders = shipped.folders('launch')
  file = next((f / name for f in folders if (f / name).is_file()), None)
  if file is None:
    names = sorted({p.stem for f in folders for p in (f / name).parent.glob('*')})
    raise unknown_name('launch/' + pathlib.Path(name).parent.name, pathlib.Path(name).stem, names)
  return file


def _with_defaults(where: str, settings: Settings, defaults: dict) -> Settings:
  """Return settings with the defaults for the others. Raise UserError if one is wrong."""
  for k in settings:
    if k not in defaults:
      raise unknown_name(f'launch {where} --set', k, defaults)
  missing = [k for k, v in defaults.items() if v is None and not settings.get(k)]
  if missing:
    raise UserError(f'launch {where} needs {" and ".join(missing)}.',
                    '--set ' + ' '.join(f'{k}=...' for k in missing))
  for k in COUNTS & defaults.keys() & settings.keys():
    if not settings[k].isascii() or not settings[k].isdigit() or int(settings[k]) < 1:
      raise UserError(f'launch {where} --set {k}={settings[k]}: '
                      f'{k} is a whole number, 1 or more.', f'e.g. --set {k}=4')
  return {**defaults, **settings}


def _shipped_name(config: str) -> str:
  """Return the name by which other machines know a config.

  Raises UserError for a file of the user, which other machines do not have.
  """
  candidates = (pathlib.Path(config), *(f / f'{config}.py' for f in shipped.folders()))
  path = next(p for p in candidates if p.is_file())
  package_files = [f / path.name for f in shipped.folders() if f.is_absolute()]
  if not any(p.is_file() and p.read_bytes() == path.read_bytes() for p in package_files):
    raise UserError(f'{path} is not one of the package\'s configs: '
                    'the machines there will not have it.',
                    'Add it to configs/ of what is installed there; or name the nearest, and say '
                    'what differs: --config NAME --config.a.b=value')
  return path.stem


def _job_name(config: str) -> str:
  """Return the name of the job that trains a config."""
  return 'eqssl-' + pathlib.Path(config).stem.replace('_', '-').lower()


def slurm(config: str, train: list[str], settings: Settings) -> Submission:
  """Submit launch/slurm/TEMPLATE.sbatch. All settings but `template` are options of sbatch."""
  settings = {'job-name': _job_name(config), **settings}
  file = template(f'slurm/{settings.pop("template", "train")}.sbatch')
  options = [f'--{k}={v}' for k, v in settings.items()]
  return Submission(['sbatch', *options, str(file), config, *train], {'PYTHON': sys.executable},
                    file.read_text(encoding='utf-8'))


def tpu(config: str, train: list[str], settings: Settings) -> Submission:
  """Run launch/tpu/train.sh, which takes its settings from the environment."""
  env = {k.upper(): v for k, v in _with_defaults('tpu', settings, TPU).items() if v}
  return Submission(['bash', str(template('tpu/train.sh')), _shipped_name(config), *train], env)


def gke(config: str, train: list[str], settings: Settings) -> Submission:
  """Apply launch/gke/jobset.yaml by kubectl, with the settings filled in."""
  settings = _with_defaults('gke', {'name': _job_name(config), **settings}, GKE)
  values = {k.upper(): v for k, v in settings.items()}
  arguments = json.dumps(['--config', _shipped_name(config), *train])
  text = string.Template(template('gke/jobset.yaml').read_text(encoding='utf-8'))
  return Submission(['kubectl', 'apply', '-f', '-'], {},
                    text.safe_substitute(values, ARGS=arguments), True)


PLACES = {'slurm': slurm, 'tpu': tpu, 'gke': gke}


def devices_of(where: str, settings: Settings) -> str:
  """Return the devices that a submission asks for, as `train --plan --on` takes them.

  Raises UserError if their kind is not known: of a template without one, and of GPUs or TPUs that
  no plan can be made for.
  """
  if where == 'tpu':
    return settings.get('type') or DEFAULT_SLICE
  if where == 'gke':
    complete = {**GKE, **settings}
    return f'{complete["accelerator"]}:{complete["nodes"]}x{complete["gpus"]}'
  name = settings.get('template', 'train')
  if name not in ACCELERATORS:
    raise UserError(f'the template {name} does not say which GPUs it gets that a plan knows: '
                    f'{", ".join(k for k, a in ACCELERATORS.items() if a.gpu)}.',
                    'Name them: eqssl train --config NAME --plan --on h100:8')
  text = template(f'slurm/{name}.sbatch').read_text(encoding='utf-8')
  written = dict(re.findall(r'^#SBATCH --([\w-]+)=(\S+)', text, re.MULTILINE)) | settings
  gpus = written.get('gpus-per-node') or written.get('gres', '1')
  return f'{name}:{written.get("nodes", "1")}x{gpus.split(":")[-1]}'


def _parse_settings(settings: list[str]) -> Settings:
  """Return {key: value} of the arguments of --set, KEY=VALUE each."""
  pairs = [s.partition('=') for s in settings]
  if not all(key and sign for key, sign, _ in pairs):
    raise UserError(f'--set {" ".join(settings)}: a setting is KEY=VALUE.',
                    'e.g. --set nodes=4 account=PROJECT')
  return {key: value for key, _, value in pairs}


def launch(where: str, config: str, workdir: str, overrides: dict[str, str], settings: list[str],
           dry: bool, plan: bool = False) -> int:
  """Submit the training of a config, and return the exit code of the command that submits it.

  dry:  print what would be submitted, and submit nothing.
  plan: print what a step costs on the devices that it would be submitted to, and submit nothing.
  """
  resolved = load_config(config, overrides)  # its mistakes are reported now, not hours later
  check_roles(resolved)
  pairs = _parse_settings(settings)
  if plan:
    plan_on(resolved, devices_of(where, pairs), stop.say)
    return 0
  if where == 'tpu' and workdir:
    raise UserError('on a TPU the run is in the bucket.',
                    'Leave --workdir out; --set bucket=BUCKET name=NAME.')
  workdir_option = ['--workdir', workdir or f'runs/{pathlib.Path(config).stem}']
  train = [*([] if where == 'tpu' else workdir_option),
           *(f'--config.{k}={v}' for k, v in overrides.items())]
  submission = PLACES[where](config, train, pairs)
  if dry and where == 'tpu':
    submission = submission._replace(env={**submission.env, 'DRY_RUN': '1'})
  elif dry:
    variables = [f'{k}={v}' for k, v in submission.env.items()]
    print(submission.text + '# ' + shlex.join([*variables, *submission.argv]))
    return 0
  tool = 'gcloud' if where == 'tpu' else submission.argv[0]
  if not dry and not shutil.which(tool):
    raise UserError(f'there is no {tool} here.',
                    f'Run this where {tool} is, or see what it would do: --dry-run')
  text = submission.text if submission.reads_stdin else None
  return subprocess.run(submission.argv, env={**os.environ, **submission.env}, input=text,
                        encoding='utf-8').returncode

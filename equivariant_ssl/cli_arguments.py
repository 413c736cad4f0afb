"""The commands of `eqssl` and their arguments."""
import argparse
import difflib
import os
import re
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from equivariant_ssl import __version__, renamed, shipped
from equivariant_ssl.data import data_command
from equivariant_ssl.errors import USAGE, UserError
from equivariant_ssl.study import study_command

CONFIG_HELP = 'a config file, or the name of one of configs/'
STEP_HELP = 'the step of the checkpoint (default: the newest valid one)'
Add = Callable[..., argparse.ArgumentParser]  # (name of a command, function, help) -> its parser
Commands = Mapping[str, Callable]             # {name of a command: function of its arguments}


class Parser(argparse.ArgumentParser):
  """A parser whose errors are reported like all other mistakes of the user."""

  def error(self, message: str) -> NoReturn:
    if match := re.fullmatch(r"(.*invalid choice: '(.*)') \(choose from (.*)\)", message):
      known = match[3].replace("'", '').split(', ')
      near = difflib.get_close_matches(match[2], known, n=1)
      raise UserError(f'{match[1]}; it is one of {", ".join(known)}.',
                      (f'Did you mean {near[0]!r}? ' if near else '') + f'See {self.prog} --help.',
                      USAGE)
    raise UserError(f'{message}.', f'See {self.prog} --help.', USAGE)


def option_names(parser: argparse.ArgumentParser) -> list[str]:
  """Return the options of a command, such as '--workdir'."""
  return [name for action in parser._actions for name in action.option_strings]


def complete(parser: argparse.ArgumentParser) -> None:
  """Answer a shell that asks how the words that were typed may go on; it runs eqssl for that."""
  if '_ARGCOMPLETE' in os.environ:
    import argcomplete
    argcomplete.autocomplete(parser)


def _config_names(**_: object) -> list[str]:
  """Return the names of the configs, which a shell completes after --config."""
  return sorted({path.stem for folder in shipped.folders() for path in folder.glob('*.py')})


def build_parser(description: str, commands: Commands) -> argparse.ArgumentParser:
  """Return the parser of the command line. It stores the function of a command under `run`."""
  parser = Parser('eqssl', allow_abbrev=False, description=description)
  parser.add_argument('--version', action='version', version=f'eqssl {__version__}')
  subparsers = parser.add_subparsers(metavar='COMMAND', required=True)

  def add(name: str, run: Callable, help_: str, group=subparsers) -> argparse.ArgumentParser:
    old_names = [old for old, new in renamed.COMMANDS.items() if new == name]
    p = group.add_parser(name, aliases=old_names, help=help_, description=help_,
                         allow_abbrev=False)
    p.add_argument('--debug', action='store_true', help='show the traceback of an error, too')
    p.add_argument('--allow', default='', metavar='PACKAGES',
                   help='packages, joined by commas, whose modules may be imported because a '
                        'folder names them')
    p.set_defaults(run=run, parser=p)
    return p

  _add_demo(add, commands)
  _add_training(add, commands)
  _add_launch(add, commands)
  _add_evaluation(add, commands)
  p = add('study', study_command.run, 'which augmentations should features be sensitive to?')
  study_command.add_arguments(p)
  _add_encoder_use(add, commands)
  _add_export(add, commands)
  add('doctor', commands['doctor'], 'show what is installed, which devices there are, and what is '
                                    'missing')
  data_parser = subparsers.add_parser('data', help='prepare and check data sets')
  data_group = data_parser.add_subparsers(metavar='WHAT', required=True)

  subparsers.add_parser('help', help='show how a command is used: eqssl help COMMAND')

  def add_data(name: str, run: Callable, help_: str) -> argparse.ArgumentParser:
    return add(name, run, help_, data_group)
  data_command.add_data_commands(add_data)
  return parser


def _add_config(p: argparse.ArgumentParser, **options: Any) -> None:
  """Add the option --config, whose values a shell completes."""
  action: Any = p.add_argument('--config', help=CONFIG_HELP, **options)
  action.completer = _config_names


def _add_data_path(p: argparse.ArgumentParser) -> None:
  """Add the option of a command that may read the data of a run."""
  p.add_argument('--data-path', default='', metavar='DIR',
                 help='the folder that now holds the data of the run: its images, or its TFDS data '
                      'sets')


def _add_accept_data(p: argparse.ArgumentParser) -> None:
  """Add the option of a command that stops if the data are not those of the run."""
  p.add_argument('--accept-data', action='store_true',
                 help='take data that are not those of the run, on purpose')


def _add_demo(add: Add, commands: Commands) -> None:
  p = add('demo', commands['demo'],
          'show what explicit sensitivity does, on real scans, offline, in minutes')
  p.add_argument('--out', default='runs/demo', help='folder of the results (default: %(default)s)')
  kind = p.add_mutually_exclusive_group()
  kind.add_argument('--methods', action='store_true',
                    help='instead: every invariance objective alone, with EquiMod and with E-SSL')
  kind.add_argument('--study', action='store_true',
                    help='instead: the same question asked by a study, in miniature, which ends '
                         'on its report page')
  p.add_argument('--seeds', type=int,
                 help='number of seeds of each arm (default: 3; with --methods 1, --study 2)')
  p.add_argument('--steps', type=int, default=0,
                 help='train this many steps instead of the config\'s epochs')
  p.add_argument('--readout', default='test', choices=('test', 'validation'),
                 help='validation: read out on a fifth of the training digits, which then are not '
                      'trained on, with seeds from 100 on; settings are chosen there '
                      '(default: %(default)s; a study always chooses on validation digits)')


def _add_training(add: Add, commands: Commands) -> None:
  p = add('train', commands['train'],
          'train a config: eqssl train --config NAME --workdir DIR [--config.a.b=value ...]')
  _add_config(p, default='')
  p.add_argument('--from', dest='begin', default='', metavar='DIR',
                 help='instead: train the run in DIR longer, by its own config, in a new --workdir')
  p.add_argument('--workdir', default='',
                 help='folder of the run; a run that is in it already is resumed')
  _add_accept_data(p)
  p.add_argument('--quiet', action='store_true', help='show no progress')
  p.add_argument('--print-config', action='store_true', help='print the resolved config and stop')
  p.add_argument('--plan', action='store_true',
                 help='compile a step, print what it costs and which devices it fits, and stop')
  p.add_argument('--devices', type=int, default=0,
                 help='with --plan: plan for this many devices, which the CPU stands in for '
                      '(default: the devices of this machine)')
  p.add_argument('--on', default='', metavar='DEVICES',
                 help='with --plan: let the compiler of these devices say it, which need not be '
                      'there: h100:8, a100:4, h200, v5e:4x8, v5p:2x2x1')
  p = add('resume', commands['resume'],
          'continue the run in DIR from its newest valid checkpoint')
  p.add_argument('dir')
  _add_data_path(p)
  _add_accept_data(p)
  p.add_argument('--quiet', action='store_true', help='show no progress')


def _add_launch(add: Add, commands: Commands) -> None:
  p = add('launch', commands['launch'],
          'train a config on a cluster: eqssl launch slurm|tpu|gke --config NAME [--dry-run]')
  p.add_argument('where', choices=('slurm', 'tpu', 'gke'))
  _add_config(p, required=True)
  p.add_argument('--workdir', default='',
                 help='folder of the run, as the cluster sees it (default: runs/NAME)')
  p.add_argument('--set', dest='settings', nargs='+', default=[], metavar='KEY=VALUE',
                 help='settings of the file in launch/; slurm: template=a100 and any option of '
                      'sbatch, e.g. nodes=4 account=X')
  p.add_argument('--dry-run', action='store_true', help='print what would be submitted')
  p.add_argument('--plan', action='store_true',
                 help='submit nothing: print what a step costs on the devices that it would be '
                      'submitted to')


def _add_evaluation(add: Add, commands: Commands) -> None:
  p = add('eval', commands['eval'],
          'evaluate the newest checkpoint of each DIR under named protocols')
  p.add_argument('dirs', nargs='*', metavar='DIR')
  p.add_argument('--protocol', action='append', default=[], metavar='NAME',
                 help='one or several, joined by commas; "list" prints all of them (default: the '
                      'quick ones)')
  p.add_argument('--plan', action='store_true',
                 help='time a part of the work, print what the evaluation costs, and stop')
  p.add_argument('--seeds', default='0',
                 help='seeds of the protocols\' own draws, joined by commas (default: %(default)s)')
  p.add_argument('--step', type=int, help=STEP_HELP)
  p.add_argument('--epochs', type=int, default=0,
                 help='epochs of SGD probes and fine-tuning (default: the protocol\'s own)')
  p.add_argument('--batch', type=int, default=0,
                 help='batch size of SGD probes and fine-tuning (default: the protocol\'s own)')
  p.add_argument('--images', default='', metavar='FILE',
                 help='fine-tune on the training images that a file lists, one name on a line, '
                      'instead of a share')
  p.add_argument('--targets', default='',
                 help='data sets of --protocol transfer, joined by commas (default: the usual '
                      'twelve)')
  p.add_argument('--root', default='',
                 help='TFDS folder of the targets (default: $TFDS_DATA_DIR or '
                      '~/tensorflow_datasets)')
  p.add_argument('--readout', default='',
                 help='"test": read out on the test split, although the run holds images out '
                      '(config.validation)')
  _add_data_path(p)
  _add_accept_data(p)
  p = add('compare', commands['compare'],
          'put the results of evaluated runs beside each other, paired by seed')
  p.add_argument('dirs', nargs='+', metavar='DIR')
  p.add_argument('--group-by', default='method',
                 help='or a field of the config, e.g. augment.rotate.role (default: method)')
  p.add_argument('--protocol', default='',
                 help='only these protocols, joined by commas (default: all that the runs share)')
  p.add_argument('--csv', default='compare.csv',
                 help='write the same table to this file (default: %(default)s)')
  p = add('report', commands['report'],
          'write one HTML page of a run, of several runs compared, or of a study')
  p.add_argument('dirs', nargs='+', metavar='DIR')
  p.add_argument('--out', default='', metavar='FILE',
                 help='default: report.html in DIR; for several runs, in the current folder')
  p.add_argument('--group-by', default='method',
                 help='for several runs: as in compare (default: method)')
  p.add_argument('--no-images', action='store_true',
                 help='leave out the parts that read the data and the checkpoint')
  _add_data_path(p)
  _add_accept_data(p)


def _add_encoder_use(add: Add, commands: Commands) -> None:
  p = add('show-augs', commands['show-augs'],
          'write a page of the views of a config, with what was done to each')
  _add_config(p, required=True)
  p.add_argument('--image', default='', metavar='FILE',
                 help='show views of this image (default: of test images of the config\'s data)')
  p.add_argument('--out', default='augs.html', help='file of the page (default: %(default)s)')
  p.add_argument('--count', type=int, default=4, help='number of rows (default: %(default)s)')
  p = add('embed', commands['embed'],
          'compute features of images by the encoder of a run: '
          'eqssl embed DIR IMAGES --out FILE')
  p.add_argument('dir')
  p.add_argument('images', help='an image, or a folder of images with any subfolders')
  p.add_argument('--out', required=True, metavar='FILE', help='.npz, .parquet or .csv')
  p.add_argument('--links', action='store_true',
                 help='follow links to folders, and to files elsewhere')
  p.add_argument('--step', type=int, help=STEP_HELP)
  _add_data_path(p)
  p = add('neighbors', commands['neighbors'],
          'find the images of an embedding file that are nearest to one: '
          'eqssl neighbors FILE QUERY')
  p.add_argument('file', help='a file that eqssl embed wrote')
  p.add_argument('query', help='a path in the file; with --run any image')
  p.add_argument('--run', dest='workdir', metavar='DIR', help='the run that embedded the images')
  p.add_argument('--k', type=int, help='number of neighbors (default: 10, or all if fewer)')
  p.add_argument('--html', metavar='FILE', help='write a page with the pictures too')
  _add_data_path(p)


def _add_export(add: Add, commands: Commands) -> None:
  p = add('export', commands['export'],
          'write the encoder of a run for torch and timm: safetensors under torchvision\'s names')
  p.add_argument('dir')
  p.add_argument('--out', default='', metavar='FOLDER',
                 help='folder of model.safetensors and config.json (default: DIR/export)')
  p.add_argument('--step', type=int, help=STEP_HELP)
  _add_data_path(p)
  p = add('import', commands['import'],
          'make a run from the weights of a torchvision ResNet: eqssl import FILE --workdir DIR')
  p.add_argument('file', help='.safetensors; .pth or .pt if torch is installed')
  p.add_argument('--workdir', required=True, help='folder of the run, new or empty')
  p.add_argument('--config', default='cifar10_quick',
                 help='the config that gives the run its data, views and objective '
                      '(default: %(default)s)')

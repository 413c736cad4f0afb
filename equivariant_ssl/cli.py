"""The command line: `eqssl COMMAND`. A mistake of the user ends in one line, one hint and an exit code."""
import argparse
import os
import pathlib
import shlex
import signal
import sys
import traceback
from typing import NoReturn

from equivariant_ssl.data import command as datas
from equivariant_ssl.errors import OK, PREEMPTED, USAGE, UserError, told
from equivariant_ssl.study import command as studies
from equivariant_ssl.study.command import split


def main(argv: list[str] | None = None) -> int:
  """Run one command; returns its exit code (0 done, 2 usage, 75 stopped and resumable; errors.py has them all)."""
  argv = sys.argv[1:] if argv is None else argv
  os.environ.setdefault('XLA_PYTHON_CLIENT_MEM_FRACTION', '.9')  # of a GPU: jax's own .75 is less than --plan counts on
  for stream in (sys.stdout, sys.stderr):  # a name that the terminal's encoding lacks is no reason to end
    if hasattr(stream, 'reconfigure'):
      stream.reconfigure(errors='backslashreplace')
  debug = '--debug' in argv
  try:
    args, rest = build_parser().parse_known_args(argv)
    args.overrides = _overrides(rest, takes=hasattr(args, 'config'))
    args.command_line = shlex.join(['eqssl', *argv])
    code = args.run(args) or OK
    sys.stdout.flush()
    return code
  except BrokenPipeError:  # `| head`: whoever read has enough
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 128 + signal.SIGPIPE
  except KeyboardInterrupt:
    print('eqssl: interrupted.', file=sys.stderr)
    return 130
  except Exception as e:
    if debug:
      traceback.print_exc()
    text, code = told(e)
    print(f'eqssl: {text}', file=sys.stderr)
    return code


def entry() -> None:
  """The console script. A worker of a job that failed must not wait for the others to agree to its exit."""
  code = main()
  sys.stdout.flush()
  sys.stderr.flush()
  jax = sys.modules.get('jax')
  if code not in (OK, PREEMPTED) and jax and jax.distributed.is_initialized():
    os._exit(code)
  sys.exit(code)


class Parser(argparse.ArgumentParser):
  """Whose mistakes are told like all others."""

  def error(self, message: str) -> NoReturn:
    raise UserError(f'{message}.', f'See {self.prog} --help.', USAGE)


def build_parser() -> argparse.ArgumentParser:
  parser = Parser('eqssl', allow_abbrev=False, description=__doc__.split('.')[0] + '.')
  commands = parser.add_subparsers(metavar='COMMAND', required=True)

  def add(name: str, run, help_: str, within=commands) -> argparse.ArgumentParser:
    p = within.add_parser(name, help=help_, description=help_, allow_abbrev=False)
    p.add_argument('--debug', action='store_true', help='show the traceback of an error, too')
    p.set_defaults(run=run)
    return p

  p = add('demo', demo, 'what explicit sensitivity does, on real scans, offline, in minutes')
  p.add_argument('--out', default='runs/demo', help='folder of the results (default: %(default)s)')
  p.add_argument('--methods', action='store_true',
                 help='instead: every invariance objective alone, with EquiMod and with E-SSL')
  p.add_argument('--seeds', type=int, help='seeds of each arm (default: 3; with --methods 1)')
  p.add_argument('--steps', type=int, default=0, help='train this many steps instead of the config\'s epochs')
  p = add('train', train, 'train a config: eqssl train --config NAME --workdir DIR [--config.a.b=value ...]')
  p.add_argument('--config', required=True, help='a config file, or the name of one of configs/')
  p.add_argument('--workdir', default='', help='folder of the run; a run already in it is resumed')
  p.add_argument('--quiet', action='store_true', help='no progress')
  p.add_argument('--print-config', action='store_true', help='print the resolved config and stop')
  p.add_argument('--plan', action='store_true', help='compile a step, print what it costs and what fits, and stop')
  p.add_argument('--devices', type=int, default=0, help='of --plan: so many, the CPU in their place (default: what is here)')
  p = add('resume', resume, 'continue the run in DIR from its newest valid checkpoint')
  p.add_argument('dir')
  p.add_argument('--quiet', action='store_true', help='no progress')
  _elsewhere(add)
  p = add('eval', evaluate, 'evaluate the newest checkpoint of each DIR under named protocols')
  p.add_argument('dirs', nargs='*', metavar='DIR')
  p.add_argument('--protocol', action='append', default=[], metavar='NAME',
                 help='one or several, joined by commas; "list" says what there is (default: those that are quick)')
  p.add_argument('--seeds', default='0', help='of the protocols\' own draws, joined by commas (default: %(default)s)')
  p.add_argument('--step', type=int, help='of the checkpoint (default: the newest valid)')
  p.add_argument('--epochs', type=int, default=0, help='of SGD probes and fine-tuning (default: the protocol\'s own)')
  p.add_argument('--batch', type=int, default=0, help='the same')
  p.add_argument('--images', default='', metavar='FILE',
                 help='fine-tune on the training images that a file lists, a name a line, instead of a share')
  p.add_argument('--targets', default='', help='data sets of --protocol transfer, with commas (default: the usual twelve)')
  p.add_argument('--root', default='', help='TFDS folder of the targets (default: $TFDS_DATA_DIR or ~/tensorflow_datasets)')
  p = add('compare', compare, 'put the results of evaluated runs beside each other, paired by seed')
  p.add_argument('dirs', nargs='+', metavar='DIR')
  p.add_argument('--group-by', default='method', help='or a field of the config, e.g. augment.rotate.role (default: method)')
  p.add_argument('--protocol', default='', help='only these, joined by commas (default: all that the runs share)')
  p.add_argument('--csv', default='compare.csv', help='the same as a file (default: %(default)s)')
  p = add('study', studies.run, 'which augmentations should features be sensitive to?')
  studies.arguments(p)
  _first_uses(add)
  p = add('doctor', doctor, 'what is installed, what devices there are, what is missing')
  data = commands.add_parser('data', help='prepare and check data sets').add_subparsers(metavar='WHAT', required=True)
  datas.arguments(lambda *about: add(*about, data))
  return parser


def _elsewhere(add) -> None:
  """Training on other machines."""
  p = add('launch', launch, 'train a config on a cluster: eqssl launch slurm|tpu|gke --config NAME [--dry-run]')
  p.add_argument('where', choices=('slurm', 'tpu', 'gke'))
  p.add_argument('--config', required=True, help='a config file, or the name of one of configs/')
  p.add_argument('--workdir', default='', help='as the cluster sees it (default: runs/NAME)')
  p.add_argument('--set', dest='settings', nargs='+', default=[], metavar='KEY=VALUE',
                 help='of the file in launch/; slurm: template=a100 and any option of sbatch, e.g. nodes=4 account=X')
  p.add_argument('--dry-run', action='store_true', help='print what would be submitted')


def _first_uses(add) -> None:
  """What people do with a trained encoder."""
  p = add('report', report, 'one HTML page of a run, of several compared, or of a study')
  p.add_argument('dirs', nargs='+', metavar='DIR')
  p.add_argument('--out', default='', metavar='FILE', help='default: report.html in DIR; of several, in this folder')
  p.add_argument('--group-by', default='method', help='of several: as in compare (default: method)')
  p.add_argument('--no-images', action='store_true', help='leave out what reads the data and the checkpoint')
  p = add('show-augs', show_augs, 'a page of the views of a config, under each what was done to it')
  p.add_argument('--config', required=True, help='a config file, or the name of one of configs/')
  p.add_argument('--image', default='', metavar='FILE', help='of this image (default: of test images of the config\'s data)')
  p.add_argument('--out', default='augs.html', help='(default: %(default)s)')
  p.add_argument('--count', type=int, default=4, help='rows (default: %(default)s)')
  p = add('embed', embed, 'the features of images by the encoder of a run: eqssl embed DIR IMAGES --out FILE')
  p.add_argument('dir')
  p.add_argument('images', help='an image, or a folder of them, whatever its folders')
  p.add_argument('--out', required=True, metavar='FILE', help='.npz, .parquet or .csv')
  p.add_argument('--links', action='store_true', help='follow links to folders, and to files elsewhere')
  p.add_argument('--step', type=int, help='of the checkpoint (default: the newest valid)')
  p = add('neighbours', neighbours, 'the images of an embedding file nearest to one: eqssl neighbours FILE QUERY')
  p.add_argument('file', help='what eqssl embed wrote')
  p.add_argument('query', help='a path in it; with --run any image')
  p.add_argument('--run', dest='workdir', metavar='DIR', help='the run that embedded them')
  p.add_argument('--k', type=int, help='how many (default: 10, or all of fewer)')
  p.add_argument('--html', metavar='FILE', help='a page with the pictures too')
  p = add('export', export, 'write the encoder of a run for torch and timm: safetensors under torchvision\'s names')
  p.add_argument('dir')
  p.add_argument('--out', default='', metavar='FOLDER', help='of model.safetensors and config.json (default: DIR/export)')
  p.add_argument('--step', type=int, help='of the checkpoint (default: the newest valid)')
  p = add('import', import_, 'make a run of the weights of a torchvision ResNet: eqssl import FILE --workdir DIR')
  p.add_argument('file', help='.safetensors; .pth or .pt where torch is installed')
  p.add_argument('--workdir', required=True, help='folder of the run; new, or empty')
  p.add_argument('--config', default='cifar10_quick', help='data, views and objective of the run (default: %(default)s)')


def _overrides(rest: list[str], takes: bool) -> dict[str, str]:
  """{'a.b': 'text'} of the arguments --config.a.b=text (or with a space)."""
  found, rest = {}, list(rest)
  while rest:
    arg = rest.pop(0)
    if not takes or not arg.startswith('--config.'):
      raise UserError(f'unknown argument {arg!r}.',
                      'See eqssl COMMAND --help; a field of the config is set by --config.FIELD=VALUE.', USAGE)
    name, eq, value = arg.removeprefix('--config.').partition('=')
    if not eq:
      if not rest or rest[0].startswith('--'):
        raise UserError(f'{arg} needs a value.', f'e.g. {arg}=VALUE')
      value = rest.pop(0)
    found[name] = value
  return found


def _cache() -> None:
  from equivariant_ssl.runs import keep_programs
  keep_programs()


def demo(args) -> None:
  from equivariant_ssl import demo as roles
  from equivariant_ssl import demo_methods as methods
  seeds = args.seeds if args.seeds is not None else 1 if args.methods else 3
  if seeds < 1 or args.steps < 0:
    raise UserError(f'--seeds {seeds} --steps {args.steps}: nothing to train.', 'Give at least 1 seed and 0 or more steps.')
  _cache()
  (methods if args.methods else roles).run_demo(pathlib.Path(args.out), seeds, args.steps)


def train(args) -> None:
  from equivariant_ssl import config as configs
  config = configs.load(args.config, args.overrides)
  if args.print_config:
    print(config.to_json(indent=2))
  elif args.plan:
    from equivariant_ssl import plan
    plan.run(config, args.devices, lambda line: print(line, file=sys.stderr))
  elif args.devices:
    raise UserError('--devices is of --plan.', 'A training takes all that it sees: CUDA_VISIBLE_DEVICES=0,1 hides the rest.')
  elif not args.workdir:
    raise UserError('--workdir is missing.', f'e.g. --workdir runs/{pathlib.Path(args.config).stem}', USAGE)
  else:
    _train(config, args.workdir, args)


def launch(args) -> int:
  from equivariant_ssl import launch as launches
  return launches.run(args.where, args.config, args.workdir, args.overrides, args.settings, args.dry_run)


def resume(args) -> None:
  from equivariant_ssl import config as configs
  _train(configs.read(pathlib.Path(args.dir) / 'config.json'), args.dir, args)


def _train(config, workdir: str, args) -> None:
  from equivariant_ssl import distributed
  distributed.initialize()  # before anything else touches jax
  _cache()
  from equivariant_ssl.train import train as run
  with distributed.watched():
    run(config, workdir, args.command_line, quiet=args.quiet)
  if distributed.main():
    print(f'Next: eqssl eval {workdir}')


def evaluate(args) -> None:
  _cache()
  from equivariant_ssl.evaluate import protocols, run, transfer
  names = [n for text in args.protocol for n in split(text)]
  if 'list' in names:
    print('\n'.join(f'{name:15} {p.about}' for name, p in protocols.PROTOCOLS.items()))
    print('\n'.join(f'{name:15} {", ".join(of)}' for name, of in {**protocols.GROUPS, 'default': protocols.DEFAULT}.items()))
    return
  if not args.dirs:
    raise UserError('no run to evaluate.', 'eqssl eval DIR [DIR ...] [--protocol NAME]', USAGE)
  seeds = split(args.seeds)
  if not seeds or not all(s.isdigit() for s in seeds) or min(args.epochs, args.batch) < 0:
    raise UserError(f'--seeds {args.seeds} --epochs {args.epochs} --batch {args.batch}: not what they can be.',
                    'e.g. --seeds 0,1,2 --epochs 90')
  transfer.check_targets(split(args.targets), args.root)
  options = protocols.Options(args.epochs, args.batch, args.images, tuple(split(args.targets)), args.root)
  for folder in args.dirs:
    run.evaluate(pathlib.Path(folder), names, args.step, tuple(map(int, seeds)), options)


def compare(args) -> None:
  from equivariant_ssl import compare as compares
  compares.compare([pathlib.Path(d) for d in args.dirs], args.group_by, tuple(split(args.protocol)), pathlib.Path(args.csv))


def report(args) -> None:
  _cache()
  from equivariant_ssl import report as reports
  print(f'Report: {reports.report(args.dirs, args.out or None, args.group_by, not args.no_images)}')


def show_augs(args) -> None:
  from equivariant_ssl import config as configs
  from equivariant_ssl.report import gallery
  shown = gallery.show(configs.load(args.config, args.overrides), args.image, pathlib.Path(args.out), args.count)
  print(f'Views: {shown}')


def embed(args) -> None:
  _cache()
  from equivariant_ssl.report import embed as embeds
  embeds.embed(args.dir, args.images, args.out, args.step, args.links)


def neighbours(args) -> None:
  _cache()
  from equivariant_ssl.report import embed as embeds
  embeds.neighbours(args.file, args.query, args.k, args.workdir, args.html)


def export(args) -> None:
  _cache()
  from equivariant_ssl.export import run
  run.export(pathlib.Path(args.dir), pathlib.Path(args.out) if args.out else None, args.step)


def import_(args) -> None:
  _cache()
  from equivariant_ssl.export import run
  run.import_(pathlib.Path(args.file), pathlib.Path(args.workdir), args.config, args.overrides, args.command_line)


def doctor(args) -> int:
  from equivariant_ssl import doctor as doctors
  return doctors.run()


if __name__ == '__main__':
  entry()

"""The command line: `eqssl COMMAND`. A mistake of the user ends in one line, one hint and an exit code."""
import argparse
import contextlib
import os
import pathlib
import shlex
import signal
import sys
import traceback
from typing import NoReturn

from equivariant_ssl import cli_arguments
from equivariant_ssl.data import data_command as datas
from equivariant_ssl.errors import OK, PREEMPTED, USAGE, UserError, describe
from equivariant_ssl.study import study_command as studies
from equivariant_ssl.study.study_command import split
from equivariant_ssl.training import stop


def main(argv: list[str] | None = None) -> int:
  """Run one command; returns its exit code (0 done, 2 usage, 75 stopped and resumable; errors.py has them all)."""
  argv = sys.argv[1:] if argv is None else argv
  os.environ.setdefault('XLA_PYTHON_CLIENT_MEM_FRACTION', '.9')  # of a GPU: jax's own .75 is less than --plan counts on
  for stream in (sys.stdout, sys.stderr):  # a name that the terminal's encoding lacks is no reason to end
    if hasattr(stream, 'reconfigure'):
      stream.reconfigure(errors='backslashreplace')
  debug = '--debug' in argv
  try:
    with stop.heard() if argv and argv[0] in GO_ON else contextlib.nullcontext():
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
    stop.say('eqssl: interrupted.')
    return 130
  except Exception as e:
    if debug:
      stop.say(traceback.format_exc().rstrip())
    text, code = describe(e)
    stop.say(f'eqssl: {text}')
    return code


def entry() -> None:
  """The console script. A worker of a job that failed must not wait for the others to agree to its exit."""
  if sys.getfilesystemencoding() != 'utf-8' and os.environ.get('PYTHONUTF8') != '1':  # names are UTF-8 in any locale
    os.environ['PYTHONUTF8'] = '1'
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
  to_the_last_line = contextlib.ExitStack()  # which is never left
  if sys.argv[1:] and sys.argv[1] in GO_ON:
    to_the_last_line.enter_context(stop.heard())
  code = main()
  if code in (OK, PREEMPTED):
    stop.deafen()
  stop.flush()
  jax = sys.modules.get('jax')
  if code not in (OK, PREEMPTED) and jax and jax.distributed.is_initialized():
    os._exit(code)
  sys.exit(code)


GO_ON = ('train', 'resume', 'study')  # what can be stopped at any moment, and goes on


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
  p.add_argument('--config', default='', help='a config file, or the name of one of configs/')
  p.add_argument('--from', dest='begin', default='', metavar='DIR',
                 help='instead: train the run in DIR longer, by its own config, in a new --workdir')
  p.add_argument('--workdir', default='', help='folder of the run; a run already in it is resumed')
  cli_arguments.accepting(p)
  p.add_argument('--quiet', action='store_true', help='no progress')
  p.add_argument('--print-config', action='store_true', help='print the resolved config and stop')
  p.add_argument('--plan', action='store_true', help='compile a step, print what it costs and what fits, and stop')
  p.add_argument('--devices', type=int, default=0, help='of --plan: so many, the CPU in their place (default: what is here)')
  p = add('resume', resume, 'continue the run in DIR from its newest valid checkpoint')
  p.add_argument('dir')
  cli_arguments.placing(p)
  cli_arguments.accepting(p)
  p.add_argument('--quiet', action='store_true', help='no progress')
  cli_arguments.elsewhere(add, launch)
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
  p.add_argument('--readout', default='', help='test: on the test split, of a run that holds images out (config.validation)')
  cli_arguments.placing(p)
  cli_arguments.accepting(p)
  p = add('compare', compare, 'put the results of evaluated runs beside each other, paired by seed')
  p.add_argument('dirs', nargs='+', metavar='DIR')
  p.add_argument('--group-by', default='method', help='or a field of the config, e.g. augment.rotate.role (default: method)')
  p.add_argument('--protocol', default='', help='only these, joined by commas (default: all that the runs share)')
  p.add_argument('--csv', default='compare.csv', help='the same as a file (default: %(default)s)')
  p = add('study', studies.run, 'which augmentations should features be sensitive to?')
  studies.arguments(p)
  cli_arguments.first(add, globals())
  p = add('doctor', doctor, 'what is installed, what devices there are, what is missing')
  data = commands.add_parser('data', help='prepare and check data sets').add_subparsers(metavar='WHAT', required=True)
  datas.arguments(lambda *about: add(*about, data))
  return parser


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
  from equivariant_ssl.training.runs import keep_programs
  keep_programs()


def demo(args) -> None:
  from equivariant_ssl.demo import digits_demo as roles
  from equivariant_ssl.demo import methods_demo as methods
  seeds = args.seeds if args.seeds is not None else 1 if args.methods else 3
  if seeds < 1 or args.steps < 0:
    raise UserError(f'--seeds {seeds} --steps {args.steps}: nothing to train.', 'Give at least 1 seed and 0 or more steps.')
  _cache()
  (methods if args.methods else roles).run_demo(pathlib.Path(args.out), seeds, args.steps)


def train(args) -> None:
  from equivariant_ssl import config as configs
  if bool(args.config) == bool(args.begin):
    raise UserError('train needs one of --config NAME and --from DIR.', 'See eqssl train --help.', USAGE)
  config = configs.load(args.config, args.overrides) if args.config else configs.changed(
      configs.read(pathlib.Path(args.begin) / 'config.json').unlock(), args.overrides)
  if args.print_config:
    print(config.to_json(indent=2))
  elif args.plan:
    from equivariant_ssl.parallel import step_plan
    step_plan.run(config, args.devices, lambda line: print(line, file=sys.stderr))
  elif args.devices:
    raise UserError('--devices is of --plan.', 'A training takes all that it sees: CUDA_VISIBLE_DEVICES=0,1 hides the rest.')
  elif not args.workdir:
    raise UserError('--workdir is missing.', f'e.g. --workdir runs/{pathlib.Path(args.config or "longer").stem}', USAGE)
  else:
    _train(config, args.workdir, args, args.begin or None)


def launch(args) -> int:
  from equivariant_ssl.parallel import launch as launches
  return launches.run(args.where, args.config, args.workdir, args.overrides, args.settings, args.dry_run)


def resume(args) -> None:
  from equivariant_ssl import config as configs
  from equivariant_ssl.training.runs import moved
  _train(moved(configs.read(pathlib.Path(args.dir) / 'config.json'), args.data_path), args.dir, args)


def _train(config, workdir: str, args, begin: str | None = None) -> None:
  from equivariant_ssl.parallel import processes
  processes.initialize()  # before anything else touches jax
  _cache()
  from equivariant_ssl.training.loop import train as run
  with processes.watched():
    run(config, workdir, args.command_line, quiet=args.quiet, accept=args.accept_data, begin=begin)
  if processes.main():
    stop.say(f'Next: eqssl eval {shlex.quote(str(workdir))}', sys.stdout)


def evaluate(args) -> None:
  _cache()
  from equivariant_ssl.evaluate import evaluation, protocols, transfer
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
  options = protocols.Options(args.epochs, args.batch, args.images, tuple(split(args.targets)), args.root, '', args.readout)
  for folder in args.dirs:
    evaluation.evaluate(pathlib.Path(folder), names, args.step, tuple(map(int, seeds)), options, asked=_asked(args))


def _asked(args):
  """What a command says of the data of a run that is there."""
  from equivariant_ssl.training.runs import Asked
  return Asked(args.data_path, args.accept_data)


def compare(args) -> None:
  from equivariant_ssl.evaluate import comparison as compares
  compares.compare([pathlib.Path(d) for d in args.dirs], args.group_by, tuple(split(args.protocol)), pathlib.Path(args.csv))


def report(args) -> None:
  _cache()
  from equivariant_ssl import report as reports
  print(f'Report: {reports.report(args.dirs, args.out or None, args.group_by, not args.no_images, asked=_asked(args))}')


def show_augs(args) -> None:
  from equivariant_ssl import config as configs
  from equivariant_ssl.report import gallery
  shown = gallery.show(configs.load(args.config, args.overrides), args.image, pathlib.Path(args.out), args.count)
  print(f'Views: {shown}')


def embed(args) -> None:
  _cache()
  from equivariant_ssl.report import embed as embeds
  embeds.embed(args.dir, args.images, args.out, args.step, args.data_path, args.links)


def neighbours(args) -> None:
  _cache()
  from equivariant_ssl.report import embed as embeds
  embeds.neighbours(args.file, args.query, args.k, args.workdir, args.html, args.data_path)


def export(args) -> None:
  _cache()
  from equivariant_ssl.export import exporting
  exporting.export(pathlib.Path(args.dir), pathlib.Path(args.out) if args.out else None, args.step,
             place=args.data_path)


def import_(args) -> None:
  _cache()
  from equivariant_ssl.export import importing
  importing.import_(pathlib.Path(args.file), pathlib.Path(args.workdir), args.config, args.overrides, args.command_line)


def doctor(args) -> int:
  from equivariant_ssl import doctor as doctors
  return doctors.run()


if __name__ == '__main__':
  entry()

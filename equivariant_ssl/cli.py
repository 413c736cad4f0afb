"""The command line: `eqssl COMMAND`.

A mistake of the user ends in one line, one hint and an exit code.
"""
import argparse
import contextlib
import os
import pathlib
import shlex
import signal
import sys
import traceback
from typing import Any

from equivariant_ssl.cli_arguments import build_parser, complete, option_names
from equivariant_ssl.cli_overrides import parse_overrides
from equivariant_ssl.dotted import allow_imports
from equivariant_ssl.errors import OK, PREEMPTED, USAGE, UserError, describe
from equivariant_ssl.study.study_command import split
from equivariant_ssl.training import stop

Args = argparse.Namespace
RESUMABLE = ('train', 'resume', 'study')  # commands that can be stopped at any time


def main(argv: list[str] | None = None) -> int:
  """Run one command and return its exit code.

  0: done, 2: a mistake of the user, 75: stopped, can be resumed. errors.py has all codes.
  """
  argv = sys.argv[1:] if argv is None else argv
  # jax takes .75 of a GPU's memory by default, which is less than --plan counts on.
  os.environ.setdefault('XLA_PYTHON_CLIENT_MEM_FRACTION', '.9')
  for stream in (sys.stdout, sys.stderr):  # a name may have letters that the terminal cannot show
    reconfigure: Any = getattr(stream, 'reconfigure', None)
    if reconfigure:
      reconfigure(errors='backslashreplace')
  debug = '--debug' in argv
  try:
    with stop.listen() if argv and argv[0] in RESUMABLE else stop.interruptible():
      parser = build_parser('The command line: `eqssl COMMAND`.', COMMANDS)
      complete(parser)
      # `eqssl help train` is `eqssl train --help`.
      typed = [*argv[1:], '--help'] if argv[:1] == ['help'] else argv
      # argparse takes --config.a=b for a name where a space is in it.
      fields = [word for word in typed if word.startswith('--config.') and '=' in word]
      args, rest = parser.parse_known_args([word for word in typed if word not in fields])
      options = option_names(getattr(args, 'parser', parser))
      args.overrides = parse_overrides([*fields, *rest], hasattr(args, 'config'), options)
      args.command_line = shlex.join(['eqssl', *argv])
      with allow_imports(*split(args.allow)):
        code = args.run(args) or OK
      sys.stdout.flush()
      return code
  except BrokenPipeError:  # the reader, such as `head`, has enough
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 128 + signal.SIGPIPE
  except KeyboardInterrupt as interrupt:
    stop.say(f'eqssl: {interrupt}' if str(interrupt) else 'eqssl: interrupted.')
    return 130
  except Exception as error:
    if debug:
      stop.say(traceback.format_exc().rstrip())
    text, code = describe(error)
    stop.say(f'eqssl: {text}')
    return code


def entry() -> None:
  """Run the console script.

  A process of a job that failed must not wait until the others agree to its exit.
  """
  # File names are UTF-8 in any locale.
  if sys.getfilesystemencoding() != 'utf-8' and os.environ.get('PYTHONUTF8') != '1':
    os.environ['PYTHONUTF8'] = '1'
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
  until_exit = contextlib.ExitStack()  # it is never closed: signals are heard to the last line
  if sys.argv[1:] and sys.argv[1] in RESUMABLE:
    until_exit.enter_context(stop.listen())
  code = main()
  if code in (OK, PREEMPTED):
    stop.ignore_signals()
  stop.flush_output()
  jax = sys.modules.get('jax')
  if code not in (OK, PREEMPTED) and jax and jax.distributed.is_initialized():
    os._exit(code)
  sys.exit(code)


def _cache() -> None:
  """Keep compiled programs on disk."""
  from equivariant_ssl.training.runs import keep_compiled_programs
  keep_compiled_programs()


def demo(args: Args) -> None:
  """Run `eqssl demo`."""
  from equivariant_ssl.demo import digits_demo, methods_demo, study_demo
  from equivariant_ssl.demo.arms import Budget
  kind = 'study' if args.study else 'methods' if args.methods else 'digits'
  seeds = args.seeds if args.seeds is not None else {'digits': 3, 'methods': 1, 'study': 2}[kind]
  if seeds < 1 or args.steps < 0:
    raise UserError(f'--seeds {seeds} --steps {args.steps}: nothing to train.',
                    'Give at least 1 seed and 0 or more steps.')
  _cache()
  budget, out = Budget(seeds, args.steps, args.readout), pathlib.Path(args.out)
  if args.study:
    study_demo.run_demo(out / 'study', budget, args.command_line)
  else:
    (methods_demo if args.methods else digits_demo).run_demo(out, budget)


def train(args: Args) -> None:
  """Run `eqssl train`."""
  from equivariant_ssl.config import load_config, override_config, read_config
  if bool(args.config) == bool(args.begin):
    raise UserError('train needs one of --config NAME and --from DIR.', 'See eqssl train --help.',
                    USAGE)
  if args.config:
    config = load_config(args.config, args.overrides)
  else:
    first_config = read_config(pathlib.Path(args.begin) / 'config.json')
    config = override_config(first_config.unlock(), args.overrides)
  if args.print_config:
    print(config.to_json(indent=2))
  elif args.plan:
    _plan(config, args)
  elif args.devices or args.on:
    raise UserError(f'--{"on" if args.on else "devices"} is only for --plan.',
                    'A training uses all devices that it sees: CUDA_VISIBLE_DEVICES=0,1 hides the '
                    'rest.')
  elif not args.workdir:
    stem = pathlib.Path(args.config or 'longer').stem
    raise UserError('--workdir is missing.', f'e.g. --workdir runs/{stem}', USAGE)
  else:
    _train(config, args.workdir, args, args.begin or None)


def _plan(config: Any, args: Args) -> None:
  """Print what a step of a config costs, on the devices that --on or --devices names."""
  from equivariant_ssl.parallel import device_plan, step_plan
  from equivariant_ssl.training.run_config import check_roles
  check_roles(config)
  if args.on and args.devices:
    raise UserError('--on and --devices name the devices twice.',
                    f'e.g. --plan --on h100:{max(args.devices, 1)}')
  if args.on:
    device_plan.plan_on(config, args.on, stop.say)
  else:
    step_plan.run(config, args.devices, stop.say)


def submit(args: Args) -> int:
  """Run `eqssl launch`."""
  from equivariant_ssl.parallel import launch
  return launch.launch(args.where, args.config, args.workdir, args.overrides, args.settings,
                       args.dry_run, args.plan)


def resume(args: Args) -> None:
  """Run `eqssl resume`."""
  from equivariant_ssl.config import read_config
  from equivariant_ssl.training.run_config import relocate_data
  config = read_config(pathlib.Path(args.dir) / 'config.json')
  _train(relocate_data(config, args.data_path), args.dir, args)


def _train(config: Any, workdir: str, args: Args, start_from: str | None = None) -> None:
  """Train a config in `workdir`, as one of the processes of a job."""
  _cache()
  from equivariant_ssl import api
  from equivariant_ssl.parallel import processes
  api.pretrain(config, None, workdir, start_from=start_from, accept_data=args.accept_data,
               quiet=args.quiet, command=args.command_line)
  if processes.is_main():
    from equivariant_ssl.data import card
    from equivariant_ssl.training.run_config import next_command
    known = card.read_card(pathlib.Path(workdir))
    stop.say(f'Next: {next_command(workdir, bool(known and card.has_labels(known)))}', sys.stdout)


def evaluate(args: Args) -> None:
  """Run `eqssl eval`, as one of the processes of a job."""
  from equivariant_ssl import api
  from equivariant_ssl.evaluate import protocols, transfer
  from equivariant_ssl.parallel import processes
  names = [name for text in args.protocol for name in split(text)]
  if 'list' in names:
    print('\n'.join(f'{name:15} {p.about}' for name, p in protocols.PROTOCOLS.items()))
    print('\n'.join(f'{name:15} {", ".join(group)}' for name, group in protocols.GROUPS.items()))
    return
  if not args.dirs:
    raise UserError('no run to evaluate.', 'eqssl eval DIR [DIR ...] [--protocol NAME]', USAGE)
  processes.initialize()  # before anything else touches jax
  _cache()
  seeds = split(args.seeds)
  if not seeds or not all(s.isdigit() for s in seeds) or min(args.epochs, args.batch) < 0:
    raise UserError(f'--seeds {args.seeds} --epochs {args.epochs} --batch {args.batch}: '
                    'seeds are whole numbers joined by commas; epochs and batch are 0 or more.',
                    'e.g. --seeds 0,1,2 --epochs 90')
  targets = split(args.targets)
  transfer.check_targets(targets, args.root)
  with processes.explain_lost_process():
    for folder in args.dirs:
      api.evaluate(folder, names, step=args.step, seeds=tuple(map(int, seeds)), plan=args.plan,
                   data_path=args.data_path, accept_data=args.accept_data, epochs=args.epochs,
                   batch=args.batch, images=args.images, targets=tuple(targets), root=args.root,
                   readout=args.readout)


def _data_options(args: Args) -> Any:
  """Return what a command says of the data of an existing run."""
  from equivariant_ssl.training.runs import DataRequest
  return DataRequest(args.data_path, args.accept_data)


def compare(args: Args) -> None:
  """Run `eqssl compare`."""
  from equivariant_ssl.evaluate import comparison
  comparison.compare([pathlib.Path(d) for d in args.dirs], args.group_by,
                     tuple(split(args.protocol)), pathlib.Path(args.csv))


def write_report(args: Args) -> None:
  """Run `eqssl report`."""
  _cache()
  from equivariant_ssl import report
  path = report.report(args.dirs, args.out or None, args.group_by, not args.no_images,
                       data_request=_data_options(args))
  print(f'Report: {path}')


def show_augs(args: Args) -> None:
  """Run `eqssl show-augs`."""
  from equivariant_ssl.config import load_config
  from equivariant_ssl.report import gallery
  path = gallery.write_gallery(load_config(args.config, args.overrides), args.image,
                               pathlib.Path(args.out), args.count)
  print(f'Views: {path}')


def embed_images(args: Args) -> None:
  """Run `eqssl embed`, as one of the processes of a job."""
  from equivariant_ssl.parallel import processes
  processes.initialize()  # before anything else touches jax
  _cache()
  from equivariant_ssl.report import embed
  with processes.explain_lost_process():
    embed.embed(args.dir, args.images, args.out, args.step, args.data_path, args.links)


def find_neighbors(args: Args) -> None:
  """Run `eqssl neighbors`."""
  _cache()
  from equivariant_ssl.report import embed
  embed.find_neighbors(args.file, args.query, args.k, args.workdir, args.html, args.data_path)


def export(args: Args) -> None:
  """Run `eqssl export`."""
  _cache()
  from equivariant_ssl.export import exporting
  exporting.export(pathlib.Path(args.dir), pathlib.Path(args.out) if args.out else None, args.step,
                   place=args.data_path)


def import_weights(args: Args) -> None:
  """Run `eqssl import`."""
  _cache()
  from equivariant_ssl.export import importing
  importing.import_weights(pathlib.Path(args.file), pathlib.Path(args.workdir), args.config,
                           args.overrides, args.command_line)


def show_doctor(args: Args) -> int:
  """Run `eqssl doctor`."""
  from equivariant_ssl import doctor
  return doctor.run()


COMMANDS = {'demo': demo, 'train': train, 'resume': resume, 'launch': submit, 'eval': evaluate,
            'compare': compare, 'report': write_report, 'show-augs': show_augs,
            'embed': embed_images, 'neighbors': find_neighbors, 'export': export,
            'import': import_weights, 'doctor': show_doctor}


if __name__ == '__main__':  # `python -m equivariant_ssl` hears Ctrl-C earlier
  entry()

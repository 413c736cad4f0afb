"""`eqssl study`: its arguments, and the study that they ask for."""
import argparse
import fractions
import shlex
from typing import Any

from equivariant_ssl.errors import USAGE, UserError

EXAMPLE = 'eqssl study --config digits_study --augs rotate,blur --out DIR'
# What says how a study is gone on with; all other arguments say what the study is.
WAYS = ('resume', 'launcher', 'workers', 'collect')


def split(text: str) -> list[str]:
  """Return the parts of 'a, b'."""
  return [part.strip() for part in text.split(',') if part.strip()]


def add_arguments(p: argparse.ArgumentParser) -> None:
  """Add the arguments of `eqssl study` to a parser."""
  add = p.add_argument
  add('--config', default='', help='the base config: a file, or the name of one of configs/')
  add('--augs', default='', help='the augmentations to study, joined by commas')
  add('--arms', default='off,invariant,sensitive,both',
      help='the roles that each augmentation is given (default: %(default)s)')
  add('--objective', default='',
      help='the equivariance objective of the arms with sensitive augmentations; several make an '
           'arm for each (default: the config\'s, else equimod)')
  add('--seeds', default='0,1,2', help='the seeds of every arm (default: %(default)s)')
  add('--design', default='one-at-a-time',
      help='one-at-a-time, or factorial: all augmentations vary together, in far fewer runs '
           '(default: %(default)s)')
  add('--interactions', default='',
      help='interactions to measure in a factorial design, such as rotate.seen*rotate.told; '
           'rotate.seen is rotate as an invariance, rotate.told is rotate in the equivariance')
  add('--budget', type=float, default=0., metavar='EPOCHS',
      help='epochs of each run (default: the config\'s)')
  add('--equal', default='images',
      help='images: every arm trains on as many images; compute: on as many pixels of views '
           '(default: %(default)s)')
  add('--proxies', default='',
      help='also train at these shares of the budget, such as 1/8,1/4, to measure how well they '
           'predict the full budget')
  add('--protocol', default='', metavar='NAMES',
      help='evaluate every run under these protocols too, such as retrieval,linear')
  add('--transfer', default='', metavar='NAMES', help='read out on these data sets too')
  add('--root', default='', help='the TFDS folder of the --transfer data sets')
  add('--readout', default='validation',
      help='the images that arms are compared on. validation: a fifth of each class, which no run '
           'trains on (config.validation sets another share), and then the test split for the '
           'recommended arm alone. test: the test split (default: %(default)s)')
  add('--out', default='', metavar='DIR',
      help='the folder of the study; a study that is already in it goes on')
  add('--resume', default='', metavar='DIR',
      help='go on with the study in DIR, with the settings that it was begun with')
  add('--launcher', default='local',
      help='local, or slurm: an array of jobs (default: %(default)s)')
  add('--collect', action='store_true',
      help='with --resume: write the table and the report of what is done, and start no run')
  add('--workers', type=int, default=0,
      help='runs side by side (default: one for each device, or for each core of a CPU)')


def _share(text: str) -> float:
  """Return the number that '1/8' or '.125' says."""
  try:
    return float(fractions.Fraction(text))
  except (ValueError, ZeroDivisionError):
    raise UserError(f'--proxies {text}: it is not a share of the budget.',
                    'e.g. --proxies 1/8,1/4,1/2') from None


def _interactions(text: str) -> tuple[tuple[str, str], ...]:
  """Return the pairs of factors that 'rotate.seen*rotate.told,crop.seen*flip.seen' says."""
  pairs = []
  for pair in split(text):
    names = split(pair.replace('*', ','))
    if len(names) != 2:
      raise UserError(f'--interactions {text}: each interaction has two factors.',
                      'e.g. rotate.seen*rotate.told')
    pairs.append((names[0], names[1]))
  return tuple(pairs)


def _check_resume(args: argparse.Namespace) -> None:
  """Raise UserError where --resume comes with arguments that would change the study."""
  parser = argparse.ArgumentParser()
  add_arguments(parser)
  defaults = {name: value for name, value in vars(parser.parse_args([])).items()
              if name not in WAYS}
  changes = [f'--{name}' for name, value in defaults.items() if getattr(args, name) != value]
  changes += [f'--config.{name}' for name in args.overrides]
  if changes:
    raise UserError(f'--resume goes on with a study as it was begun; {", ".join(changes)} would '
                    'change it.',
                    'Give the full command, with '
                    f'--out {shlex.quote(str(args.resume))} in place of --resume.', USAGE)


def run(args: argparse.Namespace) -> None:
  """Do the study that the arguments ask for."""
  from equivariant_ssl import api
  way: dict[str, Any] = {'command': args.command_line, 'launcher': args.launcher,
                         'workers': args.workers, 'collect': args.collect}
  if args.resume:
    _check_resume(args)
    api.study(folder=args.resume, **way)
    return
  if not (args.config and args.out):
    raise UserError('a study needs a config and a folder.', EXAMPLE, USAGE)
  seeds = split(args.seeds)
  if not all(seed.isdigit() for seed in seeds):
    raise UserError(f'--seeds {args.seeds}: seeds are whole numbers.', 'e.g. --seeds 0,1,2')
  api.study(
      args.config, split(args.augs), args.out, overrides=args.overrides, **way,
      arms=tuple(split(args.arms)), objective=tuple(split(args.objective)),
      seeds=tuple(map(int, seeds)), design=args.design,
      interactions=_interactions(args.interactions), budget=args.budget, equal=args.equal,
      proxies=tuple(_share(text) for text in split(args.proxies)),
      protocols=tuple(split(args.protocol)), transfer=tuple(split(args.transfer)), root=args.root,
      readout=args.readout)

"""`eqssl study`: its arguments, and what they ask for."""
import argparse
import fractions
import pathlib
import shlex

from equivariant_ssl.errors import USAGE, UserError

EXAMPLE = 'eqssl study --config digits_study --augs rotate,blur --out DIR'


def split(text: str) -> list[str]:
  """The parts of 'a, b'."""
  return [part.strip() for part in text.split(',') if part.strip()]


def arguments(p: argparse.ArgumentParser) -> None:
  """Those of `eqssl study`."""
  add = p.add_argument
  add('--config', default='', help='the base recipe: a config file, or the name of one of configs/')
  add('--augs', default='', help='the augmentations under study, joined by commas')
  add('--arms', default='off,invariant,sensitive,both', help='the roles that each is given (default: %(default)s)')
  add('--objective', default='', help='of the arms that are told something; several: an arm for each (default: the '
                                      'config\'s, else equimod)')
  add('--seeds', default='0,1,2', help='(default: %(default)s)')
  add('--design', default='one-at-a-time', help='or factorial: every augmentation at once, far fewer runs')
  add('--interactions', default='', help='of a factorial, e.g. rotate.seen*rotate.told,crop.seen*flip.seen')
  add('--budget', type=float, default=0., metavar='EPOCHS', help='of each run (default: the config\'s)')
  add('--equal', default='images', help='images (default): every arm sees as many; compute: as many pixels of views')
  add('--proxies', default='', help='also run at these shares of the budget, to say what they would have told: 1/8,1/4')
  add('--protocol', default='', metavar='NAMES', help='evaluate every run under these too, e.g. retrieval,linear')
  add('--transfer', default='', metavar='NAMES', help='read out on these data sets too')
  add('--root', default='', help='TFDS folder of these')
  add('--readout', default='validation', help='the images that arms are compared on: validation, a fifth of each class that '
      'no run trains on (config.validation: another share), the test split then for the recommended arm alone; or test')
  add('--out', default='', metavar='DIR', help='the study\'s folder; one already in it goes on')
  add('--resume', default='', metavar='DIR', help='go on with the study in DIR as it was asked')
  add('--launcher', default='local', help='or slurm: an array of jobs (default: %(default)s)')
  add('--collect', action='store_true', help='with --resume: the table and the report of what is done; start nothing')
  add('--workers', type=int, default=0, help='runs side by side (default: one a device, or a core)')


def _share(text: str) -> float:
  """'1/8' or '.125'."""
  try:
    return float(fractions.Fraction(text))
  except (ValueError, ZeroDivisionError):
    raise UserError(f'--proxies {text}: not a share of the budget.', 'e.g. --proxies 1/8,1/4,1/2') from None


def run(args: argparse.Namespace) -> None:
  """Do what the arguments ask for."""
  from equivariant_ssl.study.runner import study
  from equivariant_ssl.study.study_plan import Settings
  how = args.command_line, args.launcher, args.workers, args.collect
  if args.resume:
    parser = argparse.ArgumentParser()
    arguments(parser)
    more = {k: v for k, v in vars(parser.parse_args([])).items() if k not in ('resume', 'launcher', 'workers', 'collect')}
    if asked := [f'--{k}' for k, v in more.items() if getattr(args, k) != v] + [f'--config.{k}' for k in args.overrides]:
      raise UserError(f'--resume goes on with a study as it was asked; {", ".join(asked)} would ask for more.',
                      f'Ask for it whole, with --out {shlex.quote(str(args.resume))} in place of --resume.', USAGE)
    study(pathlib.Path(args.resume), None, *how)
    return
  if not (args.config and args.out):
    raise UserError('a study needs a config and a folder.', EXAMPLE, USAGE)
  seeds, names = split(args.seeds), lambda text: tuple(split(text))
  if not all(s.isdigit() for s in seeds):
    raise UserError(f'--seeds {args.seeds}: not numbers.', 'e.g. --seeds 0,1,2')
  pairs = tuple(tuple(split(pair.replace('*', ','))) for pair in split(args.interactions))
  if any(len(pair) != 2 for pair in pairs):
    raise UserError(f'--interactions {args.interactions}: each is of two.', 'e.g. rotate.seen*rotate.told')
  shares = tuple(_share(text) for text in split(args.proxies))
  study(pathlib.Path(args.out), Settings(
      args.config, names(args.augs), args.overrides, names(args.arms), names(args.objective), tuple(map(int, seeds)),
      args.design, pairs, args.budget, args.equal, shares, names(args.protocol), names(args.transfer), args.root,
      args.readout), *how)

"""`eqssl data prepare` and `eqssl data check`: their arguments, and what they ask for."""
import argparse
from collections.abc import Callable

from equivariant_ssl.errors import BAD_DATA, OK, UserError

ROOT = 'TFDS folder (default: $TFDS_DATA_DIR or ~/tensorflow_datasets)'


def arguments(add: Callable[..., argparse.ArgumentParser]) -> None:
  """Those of both. add: (name, run, help) -> a parser."""
  p = add('prepare', prepare, 'make a data set readable by TFDS, without TensorFlow')
  p.add_argument('name', help='cifar10 cifar100 stl10 tiny-imagenet imagenet, or a name for the folder --src')
  p.add_argument('--src', '--archive', default='', metavar='PATHS',
                 help='the official archives, a folder that holds them, or class folders (cifar10 is downloaded without it)')
  p.add_argument('--shrink', type=int, default=0, metavar='PIXELS', help='encode all anew, the short side this at most')
  p.add_argument('--root', default='', help=ROOT)
  p = add('check', check, 'read every record of a data set or folder of images and list what is wrong')
  p.add_argument('name', help='a folder of images, or the name of a prepared data set')
  p.add_argument('--root', default='', help=ROOT)


def prepare(args: argparse.Namespace) -> None:
  from equivariant_ssl.data import archives, tfds, writer
  from equivariant_ssl.data import prepare as prepares
  if args.shrink < 0:
    raise UserError(f'--shrink {args.shrink}: not a side in pixels.', 'e.g. --shrink 256')
  if args.name == 'cifar10':
    prepares.cifar10(args.src or None, args.root)
    return
  if not args.src:
    raise UserError(f'{args.name} is made from files that are here already: --src says where.',
                    archives.FOUND_AT.get(args.name, 'e.g. --src FOLDER, with a folder a class'))
  data = archives.KNOWN[args.name](args.src) if args.name in archives.KNOWN else archives.named(args.name, args.src)
  writer.write(data, tfds.default_root(args.root), args.shrink)


def check(args: argparse.Namespace) -> int:
  from equivariant_ssl.data import check as checks
  report = checks.check(args.name, args.root)
  print('\n'.join(report.lines))
  return OK if report.ok else BAD_DATA

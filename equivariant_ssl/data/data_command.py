"""`eqssl data prepare` and `eqssl data check`: their arguments, and what they ask for."""
import argparse
import pathlib
import shlex
from collections.abc import Callable, Iterable

from equivariant_ssl.errors import BAD_DATA, OK, UserError

CONFIGS = {'cifar10': 'cifar10_quick', 'imagenet2012': 'imagenet_simclr_equimod', 'stl10': 'stl10_simclr_augself'}
BATCH = 256   # of the small config
DEFAULTS = {'background': 'black', 'bits': 16}
ROOT = 'TFDS folder (default: $TFDS_DATA_DIR or ~/tensorflow_datasets)'


def arguments(add: Callable[..., argparse.ArgumentParser]) -> None:
  """Those of both. add: (name, run, help) -> a parser."""
  p = add('prepare', prepare, 'make a data set readable by TFDS, without TensorFlow')
  p.add_argument('name', help='cifar10 cifar100 stl10 tiny-imagenet imagenet, or a name for the folder --src')
  p.add_argument('--src', '--archive', default='', metavar='PATHS',
                 help='the official archives, a folder that holds them, or class folders (cifar10 is downloaded without it)')
  p.add_argument('--shrink', type=int, default=0, metavar='PIXELS', help='encode all anew, the short side this at most')
  p.add_argument('--root', default='', help=ROOT)
  _folders(p)
  p = add('check', check, 'read every record of a data set or folder of images and list what is wrong')
  p.add_argument('name', help='a folder of images, or the name of a prepared data set')
  p.add_argument('--root', default='', help=ROOT)
  _folders(p)


def _folders(p: argparse.ArgumentParser) -> None:
  """How images and folders of them are read, as `--config.data.` has it."""
  p.add_argument('--links', action='store_true', help='follow links to folders, and to files elsewhere')
  p.add_argument('--no-splits', dest='splits', action='store_false', help='all folders are classes, also train/ and test/')
  p.add_argument('--background', default='black', metavar='COLOUR', help='under what is transparent (default: %(default)s)')
  p.add_argument('--bits', type=int, default=16, help='that grey images of 16 bits use (default: %(default)s)')


def prepare(args: argparse.Namespace) -> None:
  from equivariant_ssl.data import archives, tfds, writer
  from equivariant_ssl.data import prepare as prepares
  from equivariant_ssl.data.decode import reading
  if args.shrink < 0:
    raise UserError(f'--shrink {args.shrink}: not a side in pixels.', 'e.g. --shrink 256')
  if str(tfds.default_root(args.root)).startswith('~'):
    raise UserError('there is no home folder to prepare data sets in: HOME is not set.', 'Say where: --root DIR')
  if args.name == 'cifar10':
    _next(prepares.cifar10(args.src or None, args.root), args.root)
    return
  if not args.src:
    raise UserError(f'{args.name} is made from files that are here already: --src says where.',
                    archives.FOUND_AT.get(args.name, 'e.g. --src FOLDER, with a folder a class'))
  how = reading(args.background, args.bits)
  data = archives.KNOWN[args.name](args.src) if args.name in archives.KNOWN else (
      archives.named(args.name, args.src, args.links, args.splits))
  path = writer.write(data, tfds.default_root(args.root), args.shrink, how=how)
  tfds.remember(path)
  odd = {'background': args.background, 'bits': args.bits}
  _next(path, args.root, [f'--config.data.{k}={v}' for k, v in odd.items() if v != DEFAULTS[k] and not args.shrink])


def _next(path: pathlib.Path, root: str, more: Iterable[str] = ()) -> None:
  """Say how to train on the prepared data set in `path`: with its own config, else with the small one."""
  from equivariant_ssl.data import tfds
  name = path.parent.name
  where = [f'--config.data.root={tfds.default_root(root).absolute()}'] if root else []
  if name not in CONFIGS:
    info = tfds.open_directory(path).info
    where = ['--config.data.name=tfds', f'--config.data.dataset={name}', *where, *tfds.splitting(info.splits), *more]
    where += [] if info.features['image'].shape[0] else ['--config.data.size=64', '--config.size=64']
    count = info.splits['train' if 'test' in info.splits or 'validation' in info.splits else 'train[:80%]'].num_examples
    where += [] if count >= BATCH else [f'--config.batch={2 ** (count.bit_length() - 1)}']
  config = CONFIGS.get(name, 'cifar10_quick')
  print(f'Next: {shlex.join(["eqssl", "train", "--config", config, "--workdir", f"runs/{name}", *where])}')


def check(args: argparse.Namespace) -> int:
  from equivariant_ssl.data import check as checks
  report = checks.check(args.name, args.root, checks.Options(args.links, args.splits, args.background, args.bits))
  print('\n'.join(report.lines))
  return OK if report.ok else BAD_DATA

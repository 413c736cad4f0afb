"""The commands `eqssl data prepare` and `eqssl data check`: their arguments, and what they run."""
import argparse
import difflib
import pathlib
import shlex
from collections.abc import Callable, Iterable

from equivariant_ssl.errors import BAD_DATA, OK, UserError

# The config for a prepared data set, by its name.
CONFIGS = {'cifar10': 'cifar10_quick', 'imagenet2012': 'imagenet_simclr_equimod',
           'stl10': 'stl10_simclr_augself'}
DEFAULTS = {'background': 'black', 'bits': 16}
ROOT = 'folder of TFDS data sets (default: $TFDS_DATA_DIR or ~/tensorflow_datasets)'


def add_data_commands(add: Callable[..., argparse.ArgumentParser]) -> None:
  """Add both commands. add: the function from (name, run, help) to the parser of a command."""
  parser = add('prepare', prepare, 'make a data set readable by TFDS, without TensorFlow')
  parser.add_argument('name', help='cifar10 cifar100 stl10 tiny-imagenet imagenet, or a name of '
                      'your own for the folder --src')
  parser.add_argument('--src', '--archive', default='', metavar='PATHS',
                      help='the official archives, a folder that holds them, or a folder of class '
                      'folders (cifar10 is downloaded without it)')
  parser.add_argument('--shrink', type=int, default=0, metavar='PIXELS',
                      help='encode all images anew, with a short side of at most PIXELS')
  parser.add_argument('--root', default='', help=ROOT)
  _folder_arguments(parser)
  parser = add('check', check, 'read every record of a data set or folder of images, and list what '
               'is wrong')
  parser.add_argument('name', help='a folder of images, or the name of a prepared data set')
  parser.add_argument('--root', default='', help=ROOT)
  _folder_arguments(parser)


def _folder_arguments(parser: argparse.ArgumentParser) -> None:
  """How a folder and its images are read: the options that training has as `--config.data.`"""
  parser.add_argument('--links', action='store_true',
                      help='follow links to folders, and to files elsewhere')
  parser.add_argument('--no-splits', dest='splits', action='store_false',
                      help='every folder is a class, also train/ and test/')
  parser.add_argument('--background', default='black', metavar='COLOR',
                      help='the color under what is transparent (default: %(default)s)')
  parser.add_argument('--bits', type=int, default=16,
                      help='the bits that gray images of 16 bits use (default: %(default)s)')


def prepare(args: argparse.Namespace) -> None:
  """Run `eqssl data prepare`."""
  from equivariant_ssl.data import archives, tfds, writer
  from equivariant_ssl.data.decode import pixel_rules
  from equivariant_ssl.data.prepare import cifar10
  if args.shrink < 0:
    raise UserError(f'--shrink {args.shrink} is not a side in pixels.', 'e.g. --shrink 256')
  root = tfds.default_root(args.root)
  if str(root).startswith('~'):
    raise UserError('There is no home folder to prepare data sets in, because HOME is not set.',
                    'Say where to prepare them: --root DIR')
  if args.name == 'cifar10':
    _print_next(cifar10(args.src or None, args.root), args.root)
    return
  near = difflib.get_close_matches(args.name, ['cifar10', *archives.KNOWN], n=1, cutoff=.8)
  if not args.src and args.name not in archives.KNOWN and near:
    raise UserError(f'{args.name!r} is no data set that is known here.',
                    f'Did you mean {near[0]}? Or a name of your own: --src FOLDER')
  if not args.src:
    raise UserError(f'{args.name} is made from files that you have: --src says where they are.',
                    archives.ADDRESSES.get(args.name, 'e.g. --src FOLDER, with a folder for each '
                                           'class'))
  rules = pixel_rules(args.background, args.bits)
  if args.name in archives.KNOWN:
    data = archives.KNOWN[args.name](args.src)
  else:
    data = archives.named_dataset(args.name, args.src, args.links, args.splits)
  path = writer.write(data, root, args.shrink, rules=rules)
  tfds.keep_labels(path)
  options = {'background': args.background, 'bits': args.bits}
  unusual = [f'--config.data.{name}={value}' for name, value in options.items()
             if value != DEFAULTS[name] and not args.shrink]  # shrunk images have them applied
  _print_next(path, args.root, unusual)


def _print_next(path: pathlib.Path, root: str, more: Iterable[str] = ()) -> None:
  """Print how to train on the prepared data set in `path`.

  It is trained with its config; else with that for photographs, or a small one where all images are
  of one size.
  """
  from equivariant_ssl.data.tfds_folders import (
    default_root,
    find_version,
    open_directory,
    split_arguments,
  )
  name = path.parent.name
  newest = find_version(name, str(path.parent.parent)) == path  # training takes the newest version
  dataset = f'--config.data.dataset={name}' + ('' if newest else f':{path.name}')
  options = [f'--config.data.root={default_root(root).absolute()}'] if root else []
  config = CONFIGS.get(name, 'photos')
  if name not in CONFIGS:
    info = open_directory(path).info
    options = ['--config.data.name=tfds', dataset, *options, *split_arguments(info.splits), *more]
    if info.features['image'].shape[0]:
      config, options = 'cifar10_quick', [*options, '--config.fit_batch=True']
  elif not newest and name != 'cifar10':  # the data set cifar10 is always of one version
    options = [dataset, *options]
  words = ['eqssl', 'train', '--config', config, '--workdir', f'runs/{name}', *options]
  print(f'Next: {shlex.join(words)}')


def check(args: argparse.Namespace) -> int:
  """Run `eqssl data check`; returns the exit code."""
  from equivariant_ssl.data.check import FolderOptions
  from equivariant_ssl.data.check import check as check_dataset
  options = FolderOptions(args.links, args.splits, args.background, args.bits)
  report = check_dataset(args.name, args.root, options)
  print('\n'.join(report.lines))
  folder = pathlib.Path(args.name)
  if report.ok and folder.is_dir() and not (folder / 'dataset_info.json').is_file():
    options = [f'--config.data.{name}={value}' for name, value in options._asdict().items()
               if value != FolderOptions()._asdict()[name]]
    print('Next:', shlex.join(['eqssl', 'train', '--config', 'photos', '--config.data.path='
                               f'{args.name}', '--workdir', 'runs/photos', *options]))
  return OK if report.ok else BAD_DATA

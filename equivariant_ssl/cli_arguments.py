"""The arguments of the commands that use a run, and of those that train elsewhere; `cli` has the rest."""
import argparse
from collections.abc import Callable, Mapping


def placing(p: argparse.ArgumentParser) -> None:
  """Of a command that may read the data of a run."""
  p.add_argument('--data-path', default='', metavar='DIR',
                 help='the folder that the data of the run are in now: of its images, or of its TFDS data sets')


def accepting(p: argparse.ArgumentParser) -> None:
  """Of a command that stops where the data are not those of the run."""
  p.add_argument('--accept-data', action='store_true', help='take data that are not those of the run, on purpose')


def elsewhere(add: Callable, launch: Callable) -> None:
  """Training on other machines."""
  p = add('launch', launch, 'train a config on a cluster: eqssl launch slurm|tpu|gke --config NAME [--dry-run]')
  p.add_argument('where', choices=('slurm', 'tpu', 'gke'))
  p.add_argument('--config', required=True, help='a config file, or the name of one of configs/')
  p.add_argument('--workdir', default='', help='as the cluster sees it (default: runs/NAME)')
  p.add_argument('--set', dest='settings', nargs='+', default=[], metavar='KEY=VALUE',
                 help='of the file in launch/; slurm: template=a100 and any option of sbatch, e.g. nodes=4 account=X')
  p.add_argument('--dry-run', action='store_true', help='print what would be submitted')


def first(add: Callable, run: Mapping[str, Callable]) -> None:
  """What people do with a trained encoder. run: the commands, by name."""
  p = add('report', run['report'], 'one HTML page of a run, of several compared, or of a study')
  p.add_argument('dirs', nargs='+', metavar='DIR')
  p.add_argument('--out', default='', metavar='FILE', help='default: report.html in DIR; of several, in this folder')
  p.add_argument('--group-by', default='method', help='of several: as in compare (default: method)')
  p.add_argument('--no-images', action='store_true', help='leave out what reads the data and the checkpoint')
  placing(p)
  accepting(p)
  p = add('show-augs', run['show_augs'], 'a page of the views of a config, under each what was done to it')
  p.add_argument('--config', required=True, help='a config file, or the name of one of configs/')
  p.add_argument('--image', default='', metavar='FILE', help='of this image (default: of test images of the config\'s data)')
  p.add_argument('--out', default='augs.html', help='(default: %(default)s)')
  p.add_argument('--count', type=int, default=4, help='rows (default: %(default)s)')
  p = add('embed', run['embed'], 'the features of images by the encoder of a run: eqssl embed DIR IMAGES --out FILE')
  p.add_argument('dir')
  p.add_argument('images', help='an image, or a folder of them, whatever its folders')
  p.add_argument('--out', required=True, metavar='FILE', help='.npz, .parquet or .csv')
  p.add_argument('--links', action='store_true', help='follow links to folders, and to files elsewhere')
  p.add_argument('--step', type=int, help='of the checkpoint (default: the newest valid)')
  placing(p)
  p = add('neighbours', run['neighbours'], 'the images of an embedding file nearest to one: eqssl neighbours FILE QUERY')
  p.add_argument('file', help='what eqssl embed wrote')
  p.add_argument('query', help='a path in it; with --run any image')
  p.add_argument('--run', dest='workdir', metavar='DIR', help='the run that embedded them')
  p.add_argument('--k', type=int, help='how many (default: 10, or all of fewer)')
  p.add_argument('--html', metavar='FILE', help='a page with the pictures too')
  placing(p)
  p = add('export', run['export'], 'write the encoder of a run for torch and timm: safetensors under torchvision\'s names')
  p.add_argument('dir')
  p.add_argument('--out', default='', metavar='FOLDER', help='of model.safetensors and config.json (default: DIR/export)')
  p.add_argument('--step', type=int, help='of the checkpoint (default: the newest valid)')
  placing(p)
  p = add('import', run['import_'], 'make a run of the weights of a torchvision ResNet: eqssl import FILE --workdir DIR')
  p.add_argument('file', help='.safetensors; .pth or .pt where torch is installed')
  p.add_argument('--workdir', required=True, help='folder of the run; new, or empty')
  p.add_argument('--config', default='cifar10_quick', help='data, views and objective of the run (default: %(default)s)')

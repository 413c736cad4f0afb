"""What `eqssl data prepare` reads: the official archives of data sets, and folders, as streams of examples."""
import contextlib
import io
import os
import pathlib
import posixpath
import re
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image

from equivariant_ssl.data import folder
from equivariant_ssl.data.decode import FILE_BYTES, BadImage, read_file
from equivariant_ssl.data.writer import Dataset, Example
from equivariant_ssl.errors import UserError

BROKEN = (OSError, EOFError, ValueError, KeyError, tarfile.TarError, zipfile.BadZipFile, zlib.error)
IMAGENET = {'train': 'ILSVRC2012_img_train.tar', 'validation': 'ILSVRC2012_img_val.tar',
            'devkit': 'ILSVRC2012_devkit_t12.tar.gz'}
FOUND_AT = {'imagenet': 'https://image-net.org (an account is needed): ' + ', '.join(IMAGENET.values()),
            'cifar100': 'https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz',
            'stl10': 'http://ai.stanford.edu/~acoates/stl10/stl10_binary.tar.gz',
            'tiny-imagenet': 'http://cs231n.stanford.edu/tiny-imagenet-200.zip'}


def places(src: str) -> list[pathlib.Path]:
  """The paths of `src`, joined by commas, that must be there."""
  found = [pathlib.Path(p.strip()).expanduser() for p in src.split(',') if p.strip()]
  for path in found:
    if not path.exists():
      raise UserError(f'{str(path)!r} is not there.', '--src takes folders and archives, joined by commas.')
  return found


def png(pixels: np.ndarray) -> bytes:
  """[H W 3] uint8 as a PNG."""
  out = io.BytesIO()
  Image.fromarray(pixels).save(out, 'PNG')
  return out.getvalue()


@contextlib.contextmanager
def archive(path: pathlib.Path, what: str) -> Iterator[None]:
  """Turn whatever a broken archive raises into a line."""
  try:
    yield
  except BROKEN as e:
    why = ' '.join(str(getattr(e, 'strerror', None) or e).split()) or type(e).__name__
    raise UserError(f'{path} cannot be read as {what}: {why}.', f'The right one: {FOUND_AT[what]}') from e


def members(tar: tarfile.TarFile) -> Iterator[tuple[str, tarfile.TarInfo]]:
  """(name, member) of the regular files of a tar that lie within it; links, devices and ways out are passed over."""
  for member in tar:
    name = posixpath.normpath(member.name)
    if member.isreg() and not name.startswith(('/', '..')) and not posixpath.basename(name).startswith('.'):
      yield name, member


def content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes | BadImage:
  """The bytes of a member, none of whose size is believed to be more than an image's."""
  return tar.extractfile(member).read() if member.size <= FILE_BYTES else BadImage('larger than 256 MiB')


# -- folders

def of_folder(name: str, base: pathlib.Path, version: str = '1.0.0') -> Dataset:
  """Class folders, or images without classes; train/ with val/ or test/, else all of it is `train`."""
  parts = {'train': base}
  if (base / 'train').is_dir():
    held = next((base / n for n in ('val', 'validation', 'test') if (base / n).is_dir()), None)
    parts = {'train': base / 'train'} | ({'test' if held.name == 'test' else 'validation': held} if held else {})
  found = {split: folder.index(str(place)) for split, place in parts.items()}
  classes, _ = folder.class_names(*(folder.Part(i.root, i.paths) for i in found.values()))
  number = {c: k for k, c in enumerate(classes or ())}

  def examples(index: folder.Index) -> Iterator[Example]:
    why = dict(index.bad)
    for path in sorted((*index.paths, *why)):
      try:
        data = BadImage(why[path]) if path in why else read_file(os.path.join(index.root, path), index.root)
      except BadImage as e:
        data = e
      yield Example(path, data, number.get(path.split(os.sep)[0], -1))
  size = sum(os.path.getsize(os.path.join(i.root, p)) for i in found.values() for p in i.paths)
  return Dataset(name, version, classes, {s: (lambda i=i: examples(i)) for s, i in found.items()}, size)


def named(name: str, src: str) -> Dataset:
  """The folder `src` as a data set of the user's own `name`."""
  if not re.fullmatch(r'[a-z][a-z0-9_]*', name):
    raise UserError(f'{name!r} cannot name a data set.', 'Use small letters, digits and _, e.g. my_photographs.')
  path = places(src)[0]
  if not path.is_dir():
    raise UserError(f'{src!r} is not a folder of images.', f'Archives are read of: {", ".join(KNOWN)}.')
  return of_folder(name, path)


# -- ImageNet

def imagenet(src: str) -> Dataset:
  """ILSVRC 2012 as TFDS's imagenet2012/5.1.0: from the official tars, or class folders under train/ and val/. Labels are the
  sorted WordNet numbers."""
  found = {}
  for path in places(src):
    if (path / 'train').is_dir():
      return of_folder('imagenet2012', path, '5.1.0')
    for what, name in IMAGENET.items():
      for file in (path, path / name):
        if file.is_file() and file.name == name:
          found[what] = file
  if 'train' not in found:
    raise UserError(f'{src} has neither {IMAGENET["train"]} nor train/ with class folders.', FOUND_AT['imagenet'])
  with archive(found['train'], 'imagenet'), tarfile.open(found['train']) as tar:
    wnids = tuple(sorted(name.removesuffix('.tar') for name, _ in members(tar) if name.endswith('.tar')))
  if not wnids:
    raise UserError(f'{found["train"]} holds no class tars.', FOUND_AT['imagenet'])
  number = {w: k for k, w in enumerate(wnids)}
  splits = {'train': lambda: _imagenet_train(found['train'], number)}
  if 'validation' in found:
    if 'devkit' not in found:
      raise UserError(f'the labels of {IMAGENET["validation"]} are in {IMAGENET["devkit"]}, which is not beside it.',
                      FOUND_AT['imagenet'])
    labels = _ground_truth(found['devkit'], number)
    splits['validation'] = lambda: _imagenet_val(found['validation'], labels)
  size = sum(found[what].stat().st_size for what in splits)
  return Dataset('imagenet2012', '5.1.0', wnids, splits, size)


def _imagenet_train(path: pathlib.Path, number: dict[str, int]) -> Iterator[Example]:
  with archive(path, 'imagenet'), tarfile.open(path) as outer:
    for name, member in members(outer):
      if name.endswith('.tar'):
        with tarfile.open(fileobj=outer.extractfile(member)) as inner:
          for file, one in members(inner):
            yield Example(file, content(inner, one), number[name.removesuffix('.tar')])


def _ground_truth(path: pathlib.Path, number: dict[str, int]) -> list[int]:
  """The label of each validation image in turn: the devkit numbers the synsets in another order."""
  import scipy.io
  with archive(path, 'imagenet'), tarfile.open(path) as tar:
    files = {posixpath.basename(n): tar.extractfile(m).read() for n, m in members(tar)
             if posixpath.basename(n) in ('meta.mat', 'ILSVRC2012_validation_ground_truth.txt')}
    synsets = scipy.io.loadmat(io.BytesIO(files['meta.mat']), squeeze_me=True)['synsets']
    wnid = {int(s['ILSVRC2012_ID']): str(s['WNID']) for s in synsets}
    return [number[wnid[int(line)]] for line in files['ILSVRC2012_validation_ground_truth.txt'].split()]


def _imagenet_val(path: pathlib.Path, labels: list[int]) -> Iterator[Example]:
  with archive(path, 'imagenet'), tarfile.open(path) as tar:
    for name, member in members(tar):
      index = int(pathlib.PurePath(name).stem.rsplit('_', 1)[1]) - 1  # ILSVRC2012_val_00000001.JPEG
      yield Example(posixpath.basename(name), content(tar, member), labels[index])


# -- others

def _one(src: str, name: str) -> pathlib.Path:
  """The file of `src`, or that of the archive's usual name in the folder `src`."""
  path = places(src)[0]
  file = path / posixpath.basename(FOUND_AT[name]) if path.is_dir() else path
  if not file.is_file():
    raise UserError(f'{str(file)!r} is not there.', FOUND_AT[name])
  return file


def cifar100(src: str) -> Dataset:
  """CIFAR-100 as TFDS's cifar100/3.0.2, from the official binary archive."""
  path, files = _one(src, 'cifar100'), {}
  with archive(path, 'cifar100'), tarfile.open(path) as tar:
    for name, member in members(tar):
      if (base := posixpath.basename(name)) in ('train.bin', 'test.bin', 'fine_label_names.txt', 'coarse_label_names.txt'):
        files[base] = tar.extractfile(member).read()
    fine, coarse = (tuple(files[f'{k}_label_names.txt'].decode().split()) for k in ('fine', 'coarse'))
    records = {s: np.frombuffer(files[f'{s}.bin'], np.uint8).reshape(-1, 2 + 3072) for s in ('train', 'test')}

  def examples(split: str) -> Iterator[Example]:
    for i, r in enumerate(records[split]):
      image = png(r[2:].reshape(3, 32, 32).transpose(1, 2, 0))
      yield Example(f'{split}_{i:05d}.png', image, int(r[1]), {'coarse_label': int(r[0])})
  return Dataset('cifar100', '3.0.2', fine, {s: (lambda s=s: examples(s)) for s in records}, more={'coarse_label': coarse})


def stl10(src: str) -> Dataset:
  """STL-10 as TFDS's stl10/1.0.0, from the official binary archive; unlabelled images have the label -1."""
  path, files, size = _one(src, 'stl10'), {}, 3 * 96 * 96
  with archive(path, 'stl10'), tarfile.open(path) as tar:
    for name, member in members(tar):
      if (base := posixpath.basename(name)) in ('train_y.bin', 'test_y.bin', 'class_names.txt'):
        files[base] = tar.extractfile(member).read()
    classes = tuple(files['class_names.txt'].decode().split())
    labels = {s: np.frombuffer(files[f'{s}_y.bin'], np.uint8).astype(int) - 1 for s in ('train', 'test')}

  def examples(split: str, member_name: str) -> Iterator[Example]:
    with archive(path, 'stl10'), tarfile.open(path) as tar:
      member = next(m for n, m in members(tar) if posixpath.basename(n) == member_name)
      stream = tar.extractfile(member)
      for i in range(member.size // size):
        pixels = np.frombuffer(stream.read(size), np.uint8).reshape(3, 96, 96).transpose(2, 1, 0)  # by columns
        yield Example(f'{split}_{i:06d}.png', png(pixels), int(labels[split][i]) if split in labels else -1)
  return Dataset('stl10', '1.0.0', classes, {
      split: (lambda split=split, name=name: examples(split, name))
      for split, name in (('train', 'train_X.bin'), ('test', 'test_X.bin'), ('unlabelled', 'unlabeled_X.bin'))})


def tiny_imagenet(src: str) -> Dataset:
  """Tiny ImageNet (200 classes of 64 x 64 pixels), from its zip; the splits train and validation."""
  path = _one(src, 'tiny-imagenet')
  with archive(path, 'tiny-imagenet'), zipfile.ZipFile(path) as zipped:
    names = [n for n in zipped.namelist() if n.endswith('.JPEG')]
    top = names[0].split('/')[0] if names else ''
    classes = tuple(sorted(zipped.read(f'{top}/wnids.txt').decode().split()))
    number = {c: k for k, c in enumerate(classes)}
    rows = (line.split('\t') for line in zipped.read(f'{top}/val/val_annotations.txt').decode().splitlines())
    held = {row[0]: number[row[1]] for row in rows if len(row) > 1}
  label = {'train': lambda n: number[n.split('/')[2]], 'validation': lambda n: held[posixpath.basename(n)]}
  part = {'train': f'{top}/train/', 'validation': f'{top}/val/'}

  def examples(split: str) -> Iterator[Example]:
    with archive(path, 'tiny-imagenet'), zipfile.ZipFile(path) as zipped:
      for name in names:
        if name.startswith(part[split]):
          large = zipped.getinfo(name).file_size > FILE_BYTES
          data = BadImage('larger than 256 MiB') if large else zipped.read(name)
          yield Example(posixpath.basename(name), data, label[split](name))
  return Dataset('tiny_imagenet', '1.0.0', classes, {s: (lambda s=s: examples(s)) for s in part}, path.stat().st_size)


KNOWN: dict[str, Callable[[str], Dataset]] = {
    'imagenet': imagenet, 'cifar100': cifar100, 'stl10': stl10, 'tiny-imagenet': tiny_imagenet}

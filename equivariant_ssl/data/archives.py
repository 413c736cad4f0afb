"""What `eqssl data prepare` reads: the official archives of data sets, and folders, as streams of examples."""
import contextlib
import functools
import os
import pathlib
import posixpath
import re
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from equivariant_ssl.data import folder, layout
from equivariant_ssl.data.decode import FILE_BYTES, BadImage, read_file
from equivariant_ssl.data.encode import png
from equivariant_ssl.data.source import to_check
from equivariant_ssl.data.unpack import check_end, content, listed, members, opened, picked, words
from equivariant_ssl.data.writer import Dataset, Example
from equivariant_ssl.errors import UserError

BROKEN = (OSError, EOFError, ValueError, KeyError, tarfile.TarError, zipfile.BadZipFile, zlib.error)
UNPACKED = {'cifar10': 2**29, 'cifar100': 2**29, 'stl10': 2**32}   # bytes at most; the official ones have a third or more
IMAGENET = {'train': 'ILSVRC2012_img_train.tar', 'validation': 'ILSVRC2012_img_val.tar'}
FOLDERS = {'train': ('train',), 'validation': ('val', 'validation')}
FOUND_AT = {'imagenet': 'https://image-net.org (an account is needed): ' + ', '.join(IMAGENET.values()),
            'cifar10': 'https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz',
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


@contextlib.contextmanager
def archive(path: pathlib.Path, what: str) -> Iterator[None]:
  """Turn whatever a broken archive raises into a line."""
  try:
    yield
  except BROKEN as e:
    why = ' '.join(str(getattr(e, 'strerror', None) or e).split()) or type(e).__name__
    raise UserError(f'{path} cannot be read as {what}: {why}.', f'The right one: {FOUND_AT[what]}') from e


# -- folders

def of_folder(name: str, base: pathlib.Path, links: bool = False, splits: bool = True) -> Dataset:
  """What `data.folder` reads of a folder: class folders, or images without classes, in all the splits that are there."""
  read = folder.read(base, links=links, splits=splits)
  number = {c: k for k, c in enumerate(read.classes or ())}
  label = lambda path: number.get(layout.class_of(path), -1)
  parts = {split: functools.partial(_files, part, _bad(read.index, part), label) for split, part in read.parts.items()}
  notes = (*read.lines('--links'), *(() if read.classes else (f'{name} is prepared without labels',)))
  return Dataset(name, '1.0.0', read.classes, parts, _bytes(read.index.root, read.index.paths), notes=notes,
                 places={split: os.path.relpath(part.root, base).removeprefix('.') for split, part in read.parts.items()},
                 fix=to_check(str(base)))


def _bad(index: folder.Index, part: folder.Part) -> dict[str, BadImage]:
  """The images of a split that are not read, by their path within it."""
  where = os.path.relpath(part.root, index.root)
  prefix = '' if where == '.' else where + os.sep
  return {path[len(prefix):]: why for path, why in index.bad if path.startswith(prefix)}


def _files(part: folder.Part, bad: dict[str, BadImage], label: Callable[[str], int],
           key: Callable[[str], str] = folder.as_text) -> Iterator[Example]:
  """The images of a folder, also those that cannot be read."""
  for path in sorted((*part.paths, *bad)):
    try:
      data = bad[path] if path in bad else read_file(os.path.join(part.root, path), part.within or part.root)
    except BadImage as e:
      data = e
    yield Example(key(path), data, label(path) if path not in bad else -1)


def _bytes(root: str, paths: Iterable[str]) -> int:
  return sum(os.path.getsize(os.path.join(root, p)) for p in paths)


def named(name: str, src: str, links: bool = False, splits: bool = True) -> Dataset:
  """The folder `src` as a data set of the user's own `name`."""
  if not re.fullmatch(r'[a-z][a-z0-9_]*', name):
    raise UserError(f'{name!r} cannot name a data set.', 'Use small letters, digits and _, e.g. my_photographs.')
  path = places(src)[0]
  if not path.is_dir():
    raise UserError(f'{src!r} is not a folder of images.', f'Archives are read of: {", ".join(KNOWN)}.')
  return of_folder(name, path, links, splits)


# -- ImageNet

def imagenet(src: str) -> Dataset:
  """ILSVRC 2012 as TFDS's imagenet2012/5.1.0: each split from its official tar, else from a folder train/ or val/.

  A training image is labelled by the class tar or folder that it is in; so is one of the validation, else by its number.
  Labels are always those of all 1,000 synsets: TFDS names them, whatever is there of them.
  """
  splits, size, notes = {}, 0, ()
  for path in places(src):
    for split, name in IMAGENET.items():
      tar = next((file for file in (path, path / name) if file.name == name and file.is_file()), None)
      place = next((path / n for n in FOLDERS[split] if (path / n).is_dir()), None)
      if tar:
        splits[split], size = functools.partial(_tar, tar), size + tar.stat().st_size
      elif place:
        index = folder.index(str(place))
        part = folder.Part(index.root, index.paths)
        splits[split] = functools.partial(_files, part, dict(index.bad), synset(), os.path.basename)
        size, notes = size + _bytes(index.root, index.paths), (*notes, *folder.said(index, ''))
  if 'train' not in splits:
    raise UserError(f'{src} has neither {IMAGENET["train"]} nor train/ with class folders.', FOUND_AT['imagenet'])
  return Dataset('imagenet2012', '5.1.0', None, splits, size, official=True, notes=notes,
                 published={'train': 1_281_167, 'validation': 50_000})


def synset() -> Callable[[str], int]:
  """path -> its label: TFDS has the 1,000 WordNet numbers in their order, and the label of every validation image."""
  import tensorflow_datasets as tfds
  read = lambda name: tfds.core.tfds_path(f'datasets/imagenet2012/{name}.txt').read_text(encoding='utf-8').split()
  number, held = {w: k for k, w in enumerate(read('labels'))}, read('validation_labels')

  def label(path: str) -> int:
    *folders, name = path.split('/')
    held_out = re.fullmatch(r'ILSVRC2012_val_(\d{8})\.JPEG', name)
    if folders and folders[0] in number:
      return number[folders[0]]
    if folders or not held_out or not 0 < int(held_out[1]) <= len(held):
      raise UserError(f'{path}: not in one of the 1,000 classes of ImageNet, such as n01440764.',
                      'Of other images: eqssl data prepare NAME --src FOLDER')
    return number[held[int(held_out[1]) - 1]]
  return label


def _tar(path: pathlib.Path) -> Iterator[Example]:
  """The images of a tar, and of the class tars in it."""
  label = synset()
  with archive(path, 'imagenet'), tarfile.open(path, 'r:') as outer:
    for name, member in members(outer):
      if name.endswith('.tar'):
        with tarfile.open(fileobj=outer.extractfile(member), mode='r:') as inner:
          for file, one in members(inner):
            yield Example(file, content(inner, one), label(f'{name.removesuffix(".tar")}/{file}'))
      else:
        yield Example(posixpath.basename(name), content(outer, member), label(name))
    check_end(outer, path)


# -- others

def one(src: str, name: str) -> pathlib.Path:
  """The file of `src`, or that of the archive's usual name in the folder `src`."""
  path = places(src)[0]
  file = path / posixpath.basename(FOUND_AT[name]) if path.is_dir() else path
  if not file.is_file():
    raise UserError(f'{str(file)!r} is not there.', FOUND_AT[name])
  return file


def cifar100(src: str) -> Dataset:
  """CIFAR-100 as TFDS's cifar100/3.0.2, from the official binary archive."""
  path = one(src, 'cifar100')
  with archive(path, 'cifar100'):
    files = picked(path, ('train.bin', 'test.bin', 'fine_label_names.txt', 'coarse_label_names.txt'),
                   UNPACKED['cifar100'])
    fine, coarse = (tuple(words(files[f'{k}_label_names.txt'])) for k in ('fine', 'coarse'))
    records = {s: np.frombuffer(files[f'{s}.bin'], np.uint8).reshape(-1, 2 + 3072) for s in ('train', 'test')}

  def examples(split: str) -> Iterator[Example]:
    for i, r in enumerate(records[split]):
      image = png(r[2:].reshape(3, 32, 32).transpose(1, 2, 0))
      yield Example(i, image, int(r[1]), {'coarse_label': int(r[0]), 'id': f'{split}_{i:05d}'})
  return Dataset('cifar100', '3.0.2', fine, {s: functools.partial(examples, s) for s in records},
                 more={'coarse_label': coarse}, official=True, published={'train': 50_000, 'test': 10_000})


def stl10(src: str) -> Dataset:
  """STL-10 as TFDS's stl10/1.0.0, from the official binary archive; unlabelled images have the label -1."""
  path, size = one(src, 'stl10'), 3 * 96 * 96
  with archive(path, 'stl10'):
    files = picked(path, ('train_y.bin', 'test_y.bin', 'class_names.txt'), UNPACKED['stl10'])
    classes = tuple(words(files['class_names.txt']))
    labels = {s: np.frombuffer(files[f'{s}_y.bin'], np.uint8).astype(int) - 1 for s in ('train', 'test')}

  def examples(split: str, member_name: str) -> Iterator[Example]:
    with archive(path, 'stl10'), opened(path, UNPACKED['stl10']) as (tar, _):
      member = next((m for n, m in members(tar) if posixpath.basename(n) == member_name), None)
      if member is None:
        raise ValueError(f'it has no {member_name}')
      stream = tar.extractfile(member)
      for i in range(member.size // size):
        pixels = np.frombuffer(stream.read(size), np.uint8).reshape(3, 96, 96).transpose(2, 1, 0)  # by columns
        yield Example(i, png(pixels), int(labels[split][i]) if split in labels else -1)
  named = {'train': 'train_X.bin', 'test': 'test_X.bin', 'unlabelled': 'unlabeled_X.bin'}
  return Dataset('stl10', '1.0.0', classes, {split: functools.partial(examples, split, n) for split, n in named.items()},
                 official=True, published={'train': 5_000, 'test': 8_000, 'unlabelled': 100_000})


def tiny_imagenet(src: str) -> Dataset:
  """Tiny ImageNet (200 classes of 64 x 64 pixels), from its zip; the splits train and validation."""
  path = one(src, 'tiny-imagenet')
  with archive(path, 'tiny-imagenet'), zipfile.ZipFile(path) as zipped:
    names = [n for n in zipped.namelist() if n.endswith('.JPEG')]
    top = names[0].split('/')[0] if names else ''
    classes = tuple(sorted(words(listed(zipped, f'{top}/wnids.txt'))))
    number = {c: k for k, c in enumerate(classes)}
    lines = listed(zipped, f'{top}/val/val_annotations.txt').decode('utf-8-sig').splitlines()
    rows = (line.split('\t') for line in lines)
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
  return Dataset('tiny_imagenet', '1.0.0', classes, {s: functools.partial(examples, s) for s in part},
                 path.stat().st_size, side=64, published={'train': 100_000, 'validation': 10_000})


KNOWN: dict[str, Callable[[str], Dataset]] = {
    'imagenet': imagenet, 'cifar100': cifar100, 'stl10': stl10, 'tiny-imagenet': tiny_imagenet}

"""What `eqssl data prepare` reads, as streams of examples: folders, and official archives."""
import functools
import os
import pathlib
import posixpath
import re
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from equivariant_ssl.data import folder, folder_index, layout
from equivariant_ssl.data.archive_files import (
  ADDRESSES,
  IMAGENET,
  UNPACKED,
  archive_errors,
  archive_file,
  source_path,
  source_paths,
)
from equivariant_ssl.data.decode import FILE_BYTES, BadImage, read_file
from equivariant_ssl.data.encode import png
from equivariant_ssl.data.source import check_advice
from equivariant_ssl.data.unpack import (
  check_end,
  members,
  open_member,
  open_tar,
  read_image,
  read_list,
  read_members,
  split_names,
)
from equivariant_ssl.data.writer import Dataset, Example
from equivariant_ssl.errors import UserError

FOLDERS = {'train': ('train',), 'validation': ('val', 'validation')}
Splits = dict[str, Callable[[], Iterable[Example]]]


# -- folders

def folder_dataset(name: str, base: pathlib.Path, links: bool = False,
                   splits: bool = True) -> Dataset:
  """What `data.folder` reads of a folder, in all the splits that it has.

  The folder has class folders, or images without classes.
  """
  content = folder.read_folder(base, links=links, splits=splits)
  numbers: dict[str | None, int] = {c: number for number, c in enumerate(content.classes or ())}

  def label(path: str) -> int:
    return numbers.get(layout.class_of(path), -1)

  examples: Splits = {
      split: functools.partial(_folder_examples, part, _unreadable(content.index, part), label)
      for split, part in content.parts.items()}
  places = {split: os.path.relpath(part.root, base).removeprefix('.')
            for split, part in content.parts.items()}
  notes = content.lines('--links')
  if not content.classes:
    notes = (*notes, f'{name} is prepared without labels')
  return Dataset(name, '1.0.0', content.classes, examples,
                 _total_bytes(content.index.root, content.index.paths), notes=notes, places=places,
                 fix=check_advice(str(base)))


def _unreadable(index: folder_index.Index, part: folder.SplitFiles) -> dict[str, BadImage]:
  """{path within the split: why it cannot be read} of the images of a split."""
  place = os.path.relpath(part.root, index.root)
  prefix = '' if place == '.' else place + os.sep
  return {path[len(prefix):]: error for path, error in index.bad if path.startswith(prefix)}


def _folder_examples(part: folder.SplitFiles, bad: dict[str, BadImage], label: Callable[[str], int],
                     key: Callable[[str], str] = folder_index.as_text) -> Iterator[Example]:
  """The images of a folder, with those that cannot be read. bad: {path: why it cannot be read}."""
  for path in sorted((*part.paths, *bad)):
    if path in bad:
      yield Example(key(path), bad[path], -1)
      continue
    try:
      data = read_file(os.path.join(part.root, path), part.within or part.root)
    except BadImage as error:
      data = error
    yield Example(key(path), data, label(path))


def _total_bytes(root: str, paths: Iterable[str]) -> int:
  return sum(os.path.getsize(os.path.join(root, path)) for path in paths)


def named_dataset(name: str, src: str, links: bool = False, splits: bool = True) -> Dataset:
  """The folder `src` as a data set with a name of the user's own."""
  if not re.fullmatch(r'[a-z][a-z0-9_]*', name):
    raise UserError(f'{name!r} cannot be the name of a data set.',
                    'Use small letters, digits and _, e.g. my_photographs.')
  path = source_path(src, name, 'Put links to them into one folder: --src FOLDER --links')
  if not path.is_dir():
    raise UserError(f'{src!r} is not a folder of images.',
                    f'Archives are read only for {", ".join(KNOWN)}.')
  return folder_dataset(name, path, links, splits)


# -- ImageNet

def imagenet(src: str) -> Dataset:
  """ILSVRC 2012 as TFDS's imagenet2012/5.1.0.

  Each split comes from its official tar, else from a folder train/ or val/. The label of an image
  is the class tar or class folder that it is in; a validation image without one is labeled by its
  number. The labels are always those of all 1,000 synsets, as TFDS names them, even where only some
  of the classes are there.
  """
  splits: Splits = {}
  size, notes = 0, ()
  for path in source_paths(src):
    for split, name in IMAGENET.items():
      tar = next((file for file in (path, path / name) if file.name == name and file.is_file()),
                 None)
      place = next((path / n for n in FOLDERS[split] if (path / n).is_dir()), None)
      if tar:
        splits[split] = functools.partial(_tar_examples, tar)
        size += tar.stat().st_size
      elif place:
        index = folder_index.index_folder(str(place))
        part = folder.SplitFiles(index.root, index.paths)
        splits[split] = functools.partial(_folder_examples, part, dict(index.bad),
                                          imagenet_labels(), os.path.basename)
        size += _total_bytes(index.root, index.paths)
        notes = (*notes, *folder_index.left_out_lines(index, ''))
  if 'train' not in splits:
    raise UserError(f'{src} has neither {IMAGENET["train"]} nor train/ with class folders.',
                    f'The archives are at {ADDRESSES["imagenet"]}')
  return Dataset('imagenet2012', '5.1.0', None, splits, size, official=True, notes=notes,
                 published={'train': 1_281_167, 'validation': 50_000})


def imagenet_labels() -> Callable[[str], int]:
  """The function from the path of an image of ImageNet to its label.

  TFDS has the 1,000 WordNet numbers in their order, and the label of every validation image.
  """
  import tensorflow_datasets as tfds

  def read_words(name: str) -> list[str]:
    path = tfds.core.tfds_path(f'datasets/imagenet2012/{name}.txt')
    return path.read_text(encoding='utf-8').split()

  numbers = {synset: number for number, synset in enumerate(read_words('labels'))}
  validation = read_words('validation_labels')

  def label(path: str) -> int:
    *folders, name = path.split('/')
    match = re.fullmatch(r'ILSVRC2012_val_(\d{8})\.JPEG', name)
    if folders and folders[0] in numbers:
      return numbers[folders[0]]
    if folders or not match or not 0 < int(match[1]) <= len(validation):
      raise UserError(f'{path} is not in one of the 1,000 classes of ImageNet, such as n01440764.',
                      'Prepare other images with: eqssl data prepare NAME --src FOLDER')
    return numbers[validation[int(match[1]) - 1]]
  return label


def _tar_examples(path: pathlib.Path) -> Iterator[Example]:
  """The images of a tar of ImageNet, and of the class tars in it."""
  label = imagenet_labels()
  with archive_errors(path, 'imagenet'), tarfile.open(path, 'r:') as outer:
    for name, member in members(outer):
      if name.endswith('.tar'):
        class_name = name.removesuffix('.tar')
        with tarfile.open(fileobj=open_member(outer, member), mode='r:') as inner:
          for file, image in members(inner):
            yield Example(file, read_image(inner, image), label(f'{class_name}/{file}'))
      else:
        yield Example(posixpath.basename(name), read_image(outer, member), label(name))
    check_end(outer, path)


# -- other archives

def cifar100(src: str) -> Dataset:
  """CIFAR-100 as TFDS's cifar100/3.0.2, from the official binary archive."""
  path = archive_file(src, 'cifar100')
  parts = 'train', 'test'
  with archive_errors(path, 'cifar100'):
    files = read_members(path, ('train.bin', 'test.bin', 'fine_label_names.txt',
                                'coarse_label_names.txt'), UNPACKED['cifar100'])
    fine = tuple(split_names(files['fine_label_names.txt']))
    coarse = tuple(split_names(files['coarse_label_names.txt']))
    records = {part: np.frombuffer(files[f'{part}.bin'], np.uint8).reshape(-1, 2 + 3072)
               for part in parts}

  def examples(split: str) -> Iterator[Example]:
    for i, record in enumerate(records[split]):
      image = png(record[2:].reshape(3, 32, 32).transpose(1, 2, 0))
      more = {'coarse_label': int(record[0]), 'id': f'{split}_{i:05d}'}
      yield Example(i, image, int(record[1]), more)

  return Dataset('cifar100', '3.0.2', fine,
                 {part: functools.partial(examples, part) for part in parts},
                 more={'coarse_label': coarse}, official=True,
                 published={'train': 50_000, 'test': 10_000})


def stl10(src: str) -> Dataset:
  """STL-10 as TFDS's stl10/1.0.0, from the official binary archive.

  Images without a label have the label -1.
  """
  path, size = archive_file(src, 'stl10'), 3 * 96 * 96
  with archive_errors(path, 'stl10'):
    files = read_members(path, ('train_y.bin', 'test_y.bin', 'class_names.txt'), UNPACKED['stl10'])
    classes = tuple(split_names(files['class_names.txt']))
    labels = {part: np.frombuffer(files[f'{part}_y.bin'], np.uint8).astype(int) - 1
              for part in ('train', 'test')}

  def examples(split: str, file: str) -> Iterator[Example]:
    with archive_errors(path, 'stl10'), open_tar(path, UNPACKED['stl10']) as (tar, _):
      member = next((m for name, m in members(tar) if posixpath.basename(name) == file), None)
      if member is None:
        raise ValueError(f'it has no {file}')
      stream = open_member(tar, member)
      for i in range(member.size // size):
        pixels = np.frombuffer(stream.read(size), np.uint8)
        image = pixels.reshape(3, 96, 96).transpose(2, 1, 0)  # the archive stores columns
        yield Example(i, png(image), int(labels[split][i]) if split in labels else -1)

  images = {'train': 'train_X.bin', 'test': 'test_X.bin', 'unlabelled': 'unlabeled_X.bin'}
  return Dataset('stl10', '1.0.0', classes,
                 {split: functools.partial(examples, split, file)
                  for split, file in images.items()}, official=True,
                 published={'train': 5_000, 'test': 8_000, 'unlabelled': 100_000})


def tiny_imagenet(src: str) -> Dataset:
  """Tiny ImageNet from its zip: 200 classes of 64 x 64 pixels, in train and validation splits."""
  path = archive_file(src, 'tiny-imagenet')
  with archive_errors(path, 'tiny-imagenet'), zipfile.ZipFile(path) as zipped:
    names = [name for name in zipped.namelist() if name.endswith('.JPEG')]
    top = names[0].split('/')[0] if names else ''
    classes = tuple(sorted(split_names(read_list(zipped, f'{top}/wnids.txt'))))
    numbers = {name: number for number, name in enumerate(classes)}
    annotations = read_list(zipped, f'{top}/val/val_annotations.txt').decode('utf-8-sig')
    rows = (line.split('\t') for line in annotations.splitlines())
    validation = {row[0]: numbers[row[1]] for row in rows if len(row) > 1}
  prefixes = {'train': f'{top}/train/', 'validation': f'{top}/val/'}

  def label(split: str, name: str) -> int:
    if split == 'train':
      return numbers[name.split('/')[2]]
    return validation[posixpath.basename(name)]

  def examples(split: str) -> Iterator[Example]:
    with archive_errors(path, 'tiny-imagenet'), zipfile.ZipFile(path) as zipped:
      for name in names:
        if name.startswith(prefixes[split]):
          large = zipped.getinfo(name).file_size > FILE_BYTES
          data = BadImage('larger than 256 MiB') if large else zipped.read(name)
          yield Example(posixpath.basename(name), data, label(split, name))

  return Dataset('tiny_imagenet', '1.0.0', classes,
                 {split: functools.partial(examples, split) for split in prefixes},
                 path.stat().st_size, side=64, published={'train': 100_000, 'validation': 10_000})


KNOWN: dict[str, Callable[[str], Dataset]] = {
    'imagenet': imagenet, 'cifar100': cifar100, 'stl10': stl10, 'tiny-imagenet': tiny_imagenet}

"""A folder of images, with class folders or without, with folders for the splits or without.

This is the one reader of such folders.
"""
import collections
import functools
import hashlib
import math
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from equivariant_ssl.data import layout
from equivariant_ssl.data.channel_moments import measure_moments
from equivariant_ssl.data.decode import PixelRules, pixel_rules, read_file
from equivariant_ssl.data.folder_index import (
  EXTENSIONS,
  Index,
  index_folder,
  left_out_lines,
  printable,
)
from equivariant_ssl.data.image_header import DAMAGED, BadImage
from equivariant_ssl.data.source import (
  REPLACED,
  Records,
  Source,
  check_advice,
  counted_list,
  decode_splits,
  files_digest,
  fits_in_memory,
  too_many_unreadable,
  unreadable_error,
)
from equivariant_ssl.data.stream import lazy_split, sample
from equivariant_ssl.errors import BAD_DATA, USAGE, UserError

FIX_PATH = 'Say where the images are: --config.data.path=DIR'
TEST_OF = 'class', 'all'  # what the share of held-out images is a share of


class SplitFiles(NamedTuple):
  """The images of one split.

  paths:  relative to the folder `root`, sorted.
  within: the folder that no link may lead out of; '' for `root`.
  """
  root: str
  paths: tuple[str, ...]
  within: str = ''


class Folder(NamedTuple):
  """What a folder holds.

  parts:   {split: its images}, for 'train', and for 'validation' and 'test' where they are there.
  classes: the class names, or None where there are no labels.
  notes:   what is odd about the folders and the names, in one line each.
  """
  # The field hides a method of tuple that nobody calls.
  index: Index  # pyright: ignore[reportIncompatibleMethodOverride]
  parts: dict[str, SplitFiles]
  classes: tuple[str, ...] | None
  notes: tuple[str, ...]

  def lines(self, follow: str = '--config.data.links=True') -> tuple[str, ...]:
    """What was left out, in one line, and the notes. follow: what to type to follow links."""
    return left_out_lines(self.index, follow) + self.notes


def make(path: str = '', size: int = 64, test: float = .1, stream: bool = False,
         links: bool = False, splits: bool = True, background: str = 'black',
         bits: int = 16, test_of: str = 'class') -> Source:
  """Every image in the folder `path`, squashed to size x size and upright, with its true size.

  The label of an image is the first folder on the way to it; the classes are sorted by name. There
  are no labels where some image is in no such folder, or where all are in one.

  The splits are the folders train and validation (else test), by these names or by others of
  `layout.SPLITS`. Where they are not there, or `splits` is False, the share `test` of the images is
  held out (see `hold_out`).

  An image with an unreadable header is left out. An image whose pixels turn out to be unreadable is
  replaced by another one of its split (see `source.decode_splits`).

  stream:     decode images as they are needed. Data that do not fit in memory are always streamed.
  links:      follow links to folders and out of `path` (see `folder_index.index_folder`).
  background: a color under what is transparent.
  bits:       the number of bits that gray images of 16 bits use.
  test_of:    'class' holds the share out of each class; 'all' holds it out of all images at
              once, as did the runs that were made before this argument.
  """
  rules = pixel_rules(background, bits)
  if not path:
    raise UserError('The data set `folder` needs a path.', FIX_PATH)
  if not (size > 0 and 0 <= test < 1):
    raise UserError(f'folder: size={size} must be positive, and test={test} must be in [0, 1).')
  if test_of not in TEST_OF:
    raise UserError(f'config.data.test_of is {test_of!r}, neither {" nor ".join(TEST_OF)}.',
                    f'e.g. --config.data.test_of={TEST_OF[0]}')
  base = pathlib.Path(path).expanduser()
  if not base.is_dir():
    raise UserError(f'{path!r} is not a folder.', FIX_PATH)
  content = read_folder(base, test, links, splits, test_of)
  train, held_out = content.parts['train'], _held_out(content)
  if not train.paths:
    raise UserError(f'{path!r}: no image is left to train on.', 'Use a smaller --config.data.test.')
  check_headers(base, content.index)
  damaged, count = content.index.damaged, len(train.paths)
  train_records, test_records = folder_records(train, content.classes, rules), None
  if held_out and held_out.paths:
    test_records = folder_records(held_out, content.classes, rules)
    count += test_records.count
  problems, left_out = counted_list('damaged, left out:', damaged), content.index.left_out
  if stream or not fits_in_memory(count, size):
    train_split = lazy_split(str(base), train_records, size, train_records.labels, len(damaged))
    test_split = test_records and lazy_split(str(base), test_records, size, test_records.labels,
                                             len(damaged))
    moments, remarks = measure_moments(None, lambda: sample(train_split.images))
  else:
    train_split, test_split, replaced = decode_splits(str(base), train_records, test_records, size,
                                                      damaged)
    if replaced:
      problems += counted_list(REPLACED, replaced)
      left_out |= {'damaged, replaced': len(replaced)}
    moments, remarks = measure_moments(None, lambda: train_split.images)
  lines = content.lines() + _unused_test(content) + remarks + problems
  return Source(base.resolve().name, train_split, test_split, content.classes, *moments, lines,
                names=train.paths, files=(part_digest(train), part_digest(held_out)),
                place=(('path', os.path.abspath(base)),), left_out=left_out)


def _held_out(content: Folder) -> SplitFiles | None:
  return content.parts.get('validation') or content.parts.get('test')


def part_digest(part: SplitFiles | None) -> str:
  """A digest of the names and the sizes in bytes of a split's files; '' where it has none."""
  if not part or not part.paths:
    return ''

  def size(path: str) -> int:
    try:
      return os.stat(os.path.join(part.root, path)).st_size
    except OSError:
      return -1
  return files_digest((path.replace(os.sep, '/'), size(path)) for path in part.paths)


def _unused_test(content: Folder) -> tuple[str, ...]:
  """A note that the test images are not used, where there are validation images."""
  if not ('validation' in content.parts and 'test' in content.parts):
    return ()
  count = len(content.parts['test'].paths)
  return (f'test: its {count:,} images are not used here, because validation is held out',)


def check_headers(base: pathlib.Path, index: Index) -> None:
  """Raise UserError (BAD_DATA) where more than 1 % of the images have no readable header."""
  damaged = index.damaged
  total = len(index.paths) + len(damaged)
  if too_many_unreadable(len(damaged), total):
    raise unreadable_error(str(base), len(damaged), total, damaged[0], check_advice(str(base)))


def read_folder(base: pathlib.Path, share: float = 0., links: bool = False, splits: bool = True,
                test_of: str = 'class') -> Folder:
  """What a folder holds, read alike for training, `data check`, `data prepare` and `transfer`.

  share, test_of: which images to hold out as 'test' where no folder is a split (see `hold_out`).
  Raises UserError where there is no image, or where the folders can be read in two ways.
  """
  images = index_folder(str(base), links)
  if not images.paths:
    _refuse_empty(base, images)
  paths = sorted((*images.paths,
                  *(path for path, error in images.bad if error.reason == DAMAGED)))
  prefixes, notes = layout.arrange(paths, str(base), splits)
  parts = {split: SplitFiles(os.path.join(str(base), prefix).rstrip(os.sep),
                             _paths_within(images, prefix), images.within)
           for split, prefix in prefixes.items()}
  has_splits = len(parts) > 1
  if share and not has_splits:
    root, paths, within = parts['train']
    held = hold_out(paths, share, test_of)
    parts = {'train': SplitFiles(root, tuple(p for p in paths if p not in held), within),
             'test': SplitFiles(root, tuple(p for p in paths if p in held), within)}
  names = {split: part.paths for split, part in parts.items()}
  classes, odd = layout.class_names(names, str(base), splits, has_splits)
  unmatched = layout.unmatched_classes(names) if classes else ()
  return Folder(images, parts, classes, (*notes, *odd, *unmatched))


def _paths_within(images: Index, prefix: str) -> tuple[str, ...]:
  return tuple(path[len(prefix):] for path in images.paths if path.startswith(prefix))


def hold_out(paths: Sequence[str], share: float, test_of: str = 'class') -> set[str]:
  """The images at `paths` that are held out: a share, chosen by a hash of the relative path.

  With `test_of` 'class' these are the images of each class that have the smallest hashes: as many
  as the share comes to, rounded, at least one, and never all. So a class of two images or more is
  in both splits, and a file that is added moves at most one other. Images without labels are one
  class. With 'all' these are the images whose hash, a number in [0, 1), is below the share.
  """
  hashes = {path: _hash_share(path) for path in paths}
  if test_of == 'all':
    return {path for path in paths if hashes[path] < share}
  groups: dict[str | None, list[str]] = collections.defaultdict(list)
  labeled = None not in map(layout.class_of, paths)
  for path in paths:
    groups[layout.class_of(path) if labeled else None].append(path)
  held = set()
  for group in groups.values():
    count = min(max(math.floor(len(group) * share + .5), 1), len(group) - 1)
    held.update(sorted(group, key=lambda path: (hashes[path], path))[:count])
  return held


def _hash_share(path: str) -> float:
  """A number in [0, 1) that depends on the relative path alone."""
  name = os.fsencode(path.replace(os.sep, '/'))
  return int.from_bytes(hashlib.sha256(name).digest()[:6], 'big') / 2**48


def _refuse_empty(place: pathlib.Path, images: Index) -> None:
  """Raise the error for a folder without a readable image. It says what is there instead."""
  contents = [f'{n:,} {extension}' for extension, n in
              sorted(images.others.items(), key=lambda item: -item[1])]
  if images.bad:
    path, error = images.bad[0]
    contents.append(f'{len(images.bad):,} unreadable images '
                    f'(the first: {printable(path)}: {error})')
  if images.links:
    contents.append(f'{len(images.links):,} links to folders, which are not followed')
  links = ''
  if images.links or any('link' in error.reason for _, error in images.bad):
    links = ('Links are followed with --config.data.links=True (in `eqssl data`: --links). ')
  raise UserError(f'{str(place)!r} has no images; it has: {", ".join(contents) or "no files"}.',
                  f'{links}Images end in {" ".join(EXTENSIONS)}.',
                  BAD_DATA if images.damaged else USAGE)


def _record_name(paths: Sequence[str], i: int) -> str:
  return printable(paths[i])


def _read_records(part: SplitFiles, indices: range) -> Iterator[bytes | BadImage]:
  """The files of a split at `indices`; a BadImage for each that cannot be read."""
  for i in indices:
    try:
      yield read_file(os.path.join(part.root, part.paths[i]), part.within or part.root)
    except BadImage as error:
      yield error


def folder_records(part: SplitFiles, classes: tuple[str, ...] | None,
                   rules: PixelRules = PixelRules()) -> Records:
  """The images of one split, not yet decoded. rules: how their pixels become 8-bit RGB."""
  labels = None
  if classes:
    numbers: dict[str | None, int] = {name: number for number, name in enumerate(classes)}
    labels = np.array([numbers[layout.class_of(path)] for path in part.paths], np.int32)
  return Records(functools.partial(_record_name, part.paths),
                 functools.partial(_read_records, part), labels, len(part.paths), rules=rules)

"""What the folders of images mean: splits, classes, or folders that only wrap others.

Only the paths of the images are looked at, never the disk.
"""
import collections
import functools
import os
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from equivariant_ssl.errors import UserError

SPLITS = {'train': 'train', 'training': 'train', 'val': 'validation', 'valid': 'validation',
          'validation': 'validation', 'test': 'test', 'testing': 'test'}   # by the name of a folder
WORDS = '|'.join(sorted(SPLITS, key=len, reverse=True))
# Names such as train2017 and test_set.
SPLIT_LIKE = re.compile(
    rf'({WORDS})[ _.-]?(sets?|data|images?|imgs?|split|folder)?[ _-]?\d*')
NAMES_LISTED = 5   # how many classes or folders a message names
NO_LABELS = ('no class folders, so no labels: training, embed, neighbors and report work; '
             'protocols with accuracies do not')
AS_CLASSES = ('If every folder is a class, whatever its name: --config.data.splits=False '
              '(in `eqssl data`: --no-splits).')
RENAME = ('Name the folders of splits train/, val/ and test/, with the class folders in them. '
          f'{AS_CLASSES}')


class Layout(NamedTuple):
  """How the folders of a data set are read.

  prefixes: {split: its folder}, for 'train', and for 'validation' and 'test' where they are there.
            A folder is '' or ends in a slash.
  notes:    what a user would want to know of how the folders were read, in one line each.
  """
  prefixes: dict[str, str]
  notes: tuple[str, ...]


@functools.lru_cache(2**14)
def clean_name(name: str) -> str:
  """A file's name as text that UTF-8 can hold, in Unicode's composed form.

  Bytes that are not text are escaped, as in bad\\xff.
  """
  text = os.fsencode(name).decode('utf-8', 'backslashreplace')
  return unicodedata.normalize('NFC', text)


def split_of(folder: str) -> str | None:
  """The split that a folder has the name of, or None."""
  return SPLITS.get(folder.strip().casefold())


def few_names(names: Iterable[str]) -> str:
  """A few of the names, and how many more there are."""
  names = list(names)
  rest = len(names) - NAMES_LISTED
  return ', '.join(map(repr, names[:NAMES_LISTED])) + (f' and {rest:,} more' if rest > 0 else '')


def top_folders(paths: Sequence[str], prefix: str) -> tuple[dict[str, bool], int]:
  """The folders directly in `prefix`, and the number of images directly in it.

  The folders are {name: whether all images of the folder lie directly in it}.
  """
  flat, loose = {}, 0
  for path in paths:
    if path.startswith(prefix):
      first, *rest = path[len(prefix):].split(os.sep)
      if rest:
        flat[first] = flat.get(first, True) and len(rest) == 1
      else:
        loose += 1
  return flat, loose


def unwrap(paths: Sequence[str], prefix: str, by_name: bool) -> str:
  """The first folder, from `prefix` inward, that holds more than a single folder of folders.

  by_name: a folder that has the name of a split is not entered.
  """
  while True:
    folders, loose = top_folders(paths, prefix)
    if loose or len(folders) != 1:
      return prefix
    (name, flat), = folders.items()
    if flat or (by_name and split_of(name)):
      return prefix
    prefix += name + os.sep


def arrange(paths: Sequence[str], base: str, by_name: bool = True) -> Layout:
  """The splits among images at `paths`.

  paths: relative to `base`, which is the folder that a message names. by_name: folders with names
  such as train, val and test are splits. Raises UserError where the folders can be read in two
  ways.
  """
  outer = unwrap(paths, '', by_name)
  notes = [f'{outer} is the only folder, so the folders in it are read'] if outer else []
  folders, loose = top_folders(paths, outer)
  splits = {name: split for name in folders if (split := split_of(name))} if by_name else {}
  if not splits:
    return Layout({'train': outer}, tuple(notes))
  others = sorted(set(folders) - set(splits))
  _check_splits(splits, others, loose, os.path.join(base, outer))
  if others or loose:
    counts = collections.Counter(
        path[len(outer):].split(os.sep)[0] for path in paths if path.startswith(outer))
    count = loose + sum(counts[name] for name in others)
    where = f': in {few_names(others)}' if others else ''
    notes.append(f'{count:,} images are beside the splits and not used' + where)
  prefixes = {split: outer + name + os.sep for name, split in splits.items()}
  in_order = {split: prefixes[split] for split in ('train', 'validation', 'test')
              if split in prefixes}
  prefixes, more_notes = _unwrap_splits(paths, in_order)
  return Layout(prefixes, (*notes, *more_notes))


def _check_splits(splits: Mapping[str, str], others: list[str], loose: int, place: str) -> None:
  """Raise UserError where folders with split names may be classes, or have no training split.

  splits: {folder: split}. others: the folders beside them. loose: the images beside them.
  """
  twice = [split for split, n in collections.Counter(splits.values()).items() if n > 1]
  if twice:
    both = sorted(name for name in splits if splits[name] == twice[0])
    raise UserError(f'{place!r} has more than one folder for the {twice[0]} split: '
                    f'{few_names(both)}.', RENAME)
  if 'train' not in splits.values():
    beside = f' beside {few_names(others)}' if others else ''
    raise UserError(f'{place!r} has {few_names(sorted(splits))}{beside}, and no train/ to train '
                    'on.', RENAME)
  if len(splits) == 1 and (others or loose):
    beside = few_names(others) if others else f'{loose:,} images'
    raise UserError(f'{place!r} has {few_names(splits)} beside {beside}. This may be a split, or a '
                    'class with the name of a split.', RENAME)


def _unwrap_splits(paths: Sequence[str], prefixes: dict[str, str]
                   ) -> tuple[dict[str, str], list[str]]:
  """The folders of the splits without the folders that only wrap their classes, and notes on them.

  A folder that is a class of another split wraps nothing.
  """
  folders = {split: set(top_folders(paths, prefix)[0]) for split, prefix in prefixes.items()}
  unwrapped, notes = {}, []
  for split, prefix in prefixes.items():
    inside = unwrap(paths, prefix, False)
    wrapper = inside[len(prefix):].split(os.sep)[0]
    classes = set().union(*(names for other, names in folders.items()
                            if other != split and len(names) > 1))
    unwrapped[split] = prefix if wrapper in classes else inside
    if unwrapped[split] != prefix:
      notes.append(f'{inside} is the only folder of its split, so the folders in it are read')
  return unwrapped, notes


def class_of(path: str) -> str | None:
  """The class of an image: the first folder of its path within the split, or None without one."""
  return clean_name(path.split(os.sep)[0]) if os.sep in path else None


def classes_of(paths: Sequence[str], base: str) -> list[str]:
  """The folder of each image at `paths` within its split of the folder `base`; '' in no folder.

  Folders with names such as train, val and test are splits, whatever a run's `data.splits` says.
  Where the folders can be read in two ways, every folder is a class.
  """
  try:
    prefixes = sorted(arrange(paths, base).prefixes.values(), key=len, reverse=True)
  except UserError:
    prefixes = []
  starts = [next((p for p in prefixes if path.startswith(p)), '') for path in paths]
  return [class_of(path[len(start):]) or '' for path, start in zip(paths, starts, strict=True)]


def class_names(parts: Mapping[str, Sequence[str]], base: str, by_name: bool = True,
                has_splits: bool = False) -> tuple[tuple[str, ...] | None, tuple[str, ...]]:
  """The class names, or None where there are no labels, and what is odd about them, in lines.

  parts: {split: the paths within it}. by_name: folders with the names of splits are splits.
  has_splits: the splits are folders, so that a class may have a name like theirs. Raises UserError
  where the classes are named like splits.
  """
  counts = collections.Counter(class_of(path) for paths in parts.values() for path in paths)
  loose = counts.pop(None, 0)
  names = tuple(sorted(name for name in counts if name is not None))
  if loose:
    return None, (f'{loose:,} images lie in no class folder, so there are no labels' if names else
                  NO_LABELS,)
  if len(names) == 1:
    return None, (f'all images are of one class, the folder {names[0]!r}, so there are no labels; '
                  'labels need two class folders or more',)
  like = [name for name in names if SPLIT_LIKE.fullmatch(name.strip().casefold())]
  if by_name and like and not (has_splits and len(like) < len(names)):
    raise UserError(f'{base!r}: the classes would be {few_names(names)}, and {few_names(like)} '
                    f'{"has a name" if len(like) == 1 else "have names"} like a split.', RENAME)
  notes = (f'classes that are named like splits: {few_names(like)}',) if like else ()
  return names, notes + _similar_names(names, (p for paths in parts.values() for p in paths))


def _similar_names(names: Sequence[str], paths: Iterable[str]) -> tuple[str, ...]:
  """Notes on class names that a reader takes for one, and on folders that are one class."""
  similar, folders = collections.defaultdict(list), collections.defaultdict(set)
  for name in names:
    similar[name.strip().casefold()].append(name)
  for folder in {path.split(os.sep)[0] for path in paths}:
    folders[clean_name(folder)].add(folder)
  lines = [f'classes that differ only by case or spaces, and are kept apart: '
           f'{" and ".join(map(repr, group))}' for group in similar.values() if len(group) > 1]
  joined = [name for name in names if len(folders[name]) > 1]
  if joined:
    lines.append('folders whose names differ only in the form of their Unicode are one class: '
                 f'{few_names(joined)}')
  return tuple(lines)


def unmatched_classes(parts: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
  """Notes on the classes that only the training split has, or only another split.

  parts: {split: the paths within it}.
  """
  return unmatched_counts({split: collections.Counter(filter(None, map(class_of, paths)))
                           for split, paths in parts.items() if paths})


def unmatched_counts(counts: Mapping[str, Mapping[str, int]]) -> tuple[str, ...]:
  """The notes of `unmatched_classes`. counts: {split: {class: how many images, at least 1}}."""
  lines, train = [], counts.get('train', {})
  for split, others in counts.items():
    if split != 'train':
      lines += _missing_classes(others, train, f'in {split} without training images')
      lines += _missing_classes(train, others, f'without images in {split}')
  return tuple(lines)


def _missing_classes(counts: Mapping[str, int], others: Mapping[str, int], where: str) -> list[str]:
  """A note on the classes that have images in `counts` and none in `others`, or nothing."""
  names = sorted(name for name in counts if name not in others)
  if not names:
    return []
  images = sum(counts[name] for name in names)
  return [f'{len(names):,} {"class" if len(names) == 1 else "classes"} {where} ({images:,} '
          f'{"image" if images == 1 else "images"}): {few_names(names)}']

"""What the folders of images mean, from their paths alone: splits, classes, folders that only wrap others."""
import collections
import functools
import os
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from equivariant_ssl.errors import UserError

ROLES = {'train': 'train', 'training': 'train', 'val': 'validation', 'valid': 'validation', 'validation': 'validation',
         'test': 'test', 'testing': 'test'}
WORDS = '|'.join(sorted(ROLES, key=len, reverse=True))
LIKE = re.compile(rf'({WORDS})[ _.-]?(sets?|data|images?|imgs?|split|folder)?[ _-]?\d*')   # train2017, test_set
NAMED = 5   # of many classes or folders


class Layout(NamedTuple):
  """prefixes: {'train', and of 'validation' and 'test' those that are there: the folder of the split, '' or ending in a
  slash}. notes: what a user would want to know of how the folders were read, a line each."""
  prefixes: dict[str, str]
  notes: tuple[str, ...]


@functools.lru_cache(2**14)
def clean(name: str) -> str:
  """A file's name as text that UTF-8 can hold, in Unicode's composed form: bytes that are no text are escaped (bad\\xff)."""
  return unicodedata.normalize('NFC', os.fsencode(name).decode('utf-8', 'backslashreplace'))


def role(folder: str) -> str | None:
  """The split that a folder's name says it is."""
  return ROLES.get(folder.strip().casefold())


def some(names: Iterable[str]) -> str:
  """A few names, and how many more."""
  names = list(names)
  return ', '.join(map(repr, names[:NAMED])) + (f' and {len(names) - NAMED:,} more' if len(names) > NAMED else '')


def tops(paths: Sequence[str], prefix: str) -> tuple[dict[str, bool], int]:
  """({each folder right below `prefix`: whether all its images lie right in it}, the number of images in none)."""
  flat, loose = {}, 0
  for path in paths:
    if path.startswith(prefix):
      first, *rest = path[len(prefix):].split(os.sep)
      if rest:
        flat[first] = flat.get(first, True) and len(rest) == 1
      else:
        loose += 1
  return flat, loose


def unwrapped(paths: Sequence[str], prefix: str, named: bool) -> str:
  """The folder, from `prefix` inwards, in which more lies than one folder of folders. named: one whose name is a split's is
  left alone."""
  while True:
    found, loose = tops(paths, prefix)
    if loose or len(found) != 1:
      return prefix
    (name, flat), = found.items()
    if flat or (named and role(name)):
      return prefix
    prefix += name + os.sep


def arrange(paths: Sequence[str], base: str, named: bool = True) -> Layout:
  """The splits among images at `paths`, relative to `base`, the folder that a message names. named: folders called train,
  val, test and so on are splits. Raises UserError where that cannot be told."""
  outer = unwrapped(paths, '', named)
  notes = [f'{outer} is the only folder: its folders are read'] if outer else []
  found, loose = tops(paths, outer)
  roles = {name: role(name) for name in found if role(name)} if named else {}
  if not roles:
    return Layout({'train': outer}, tuple(notes))
  others = sorted(set(found) - set(roles))
  _check(roles, others, loose, os.path.join(base, outer))
  if others or loose:
    beside = collections.Counter(p[len(outer):].split(os.sep)[0] for p in paths if p.startswith(outer))
    count = loose + sum(beside[name] for name in others)
    notes.append(f'{count:,} images are beside the splits and not used' + (f': in {some(others)}' if others else ''))
  prefixes = {roles[name]: outer + name + os.sep for name in roles}
  return Layout(*_inner(paths, {k: prefixes[k] for k in ('train', 'validation', 'test') if k in prefixes}, notes))


def _check(roles: Mapping[str, str], others: list[str], loose: int, place: str) -> None:
  """Raise UserError where folders with the names of splits may be classes, or are not what one can train on."""
  fix = f'Name the folders of splits train/, val/ and test/, with the classes in them. {AS_CLASSES}'
  twice = [k for k, n in collections.Counter(roles.values()).items() if n > 1]
  if twice:
    both = sorted(name for name in roles if roles[name] == twice[0])
    raise UserError(f'{place!r} has more than one folder for the {twice[0]} split: {some(both)}.', fix)
  if 'train' not in roles.values():
    beside = f' beside {some(others)}' if others else ''
    raise UserError(f'{place!r} has {some(sorted(roles))}{beside}, and no train/ to train on.', fix)
  if len(roles) == 1 and (others or loose):
    beside = some(others) if others else f'{loose:,} images'
    raise UserError(f'{place!r} has {some(roles)} beside {beside}: a split, or a class that is named like one?', fix)


AS_CLASSES = ('If all folders are classes, whatever they are called: --config.data.splits=False '
              '(of `eqssl data`: --no-splits).')


def _inner(paths: Sequence[str], prefixes: dict[str, str], notes: list[str]) -> tuple[dict[str, str], tuple[str, ...]]:
  """The splits without the folders that wrap their classes; one that is a class of another split is none."""
  every = {k: set(tops(paths, prefix)[0]) for k, prefix in prefixes.items()}
  found = {}
  for k, prefix in prefixes.items():
    inside = unwrapped(paths, prefix, False)
    wrap = inside[len(prefix):].split(os.sep)[0]
    classes = set().union(*(names for other, names in every.items() if other != k and len(names) > 1))
    found[k] = prefix if wrap in classes else inside
    if found[k] != prefix:
      notes.append(f'{inside} is the only folder of its split: its folders are read')
  return found, tuple(notes)


def class_of(path: str) -> str | None:
  """The class that the first folder of a path within its split names; None where it is in none."""
  return clean(path.split(os.sep)[0]) if os.sep in path else None


def class_names(parts: Mapping[str, Sequence[str]], base: str, named: bool = True, settled: bool = False
                ) -> tuple[tuple[str, ...] | None, tuple[str, ...]]:
  """(the class names, None where there are no labels; what is odd about them, a line each) of {split: paths within it}.
  settled: the splits are folders, so that some class may have a name like theirs. Raises UserError where they are named
  like splits."""
  firsts = collections.Counter(class_of(p) for paths in parts.values() for p in paths)
  loose = firsts.pop(None, 0)
  names = tuple(sorted(firsts))
  if loose:
    return None, (f'{loose:,} images lie in no class folder, so there are no labels',) if names else ()
  if len(names) == 1:
    return None, (f'all images are of one class, the folder {names[0]!r}, so there are no labels (they are the names of two '
                  'folders or more)',)
  like = [name for name in names if LIKE.fullmatch(name.strip().casefold())]
  if named and like and not (settled and len(like) < len(names)):
    raise UserError(f'{base!r}: the classes would be {some(names)}, of which {some(like)} '
                    f'{"is" if len(like) == 1 else "are"} named like splits.',
                    f'Name the folders of splits train/, val/ and test/, with the classes in them. {AS_CLASSES}')
  odd = (f'classes that are named like splits: {some(like)}',) if like else ()
  return names, odd + _alike(names, (p for paths in parts.values() for p in paths))


def _alike(names: Sequence[str], paths: Iterable[str]) -> tuple[str, ...]:
  """Class names that are one for a reader, and folders that are one class."""
  near, folders = collections.defaultdict(list), collections.defaultdict(set)
  for name in names:
    near[name.strip().casefold()].append(name)
  for first in {p.split(os.sep)[0] for p in paths}:
    folders[clean(first)].add(first)
  merged = [name for name in names if len(folders[name]) > 1]
  lines = [f'classes that differ by case or spaces alone, and are kept apart: {" and ".join(map(repr, group))}'
           for group in near.values() if len(group) > 1]
  return tuple(lines + ([f'folders whose names differ in the form of their Unicode alone are one class: {some(merged)}']
                        if merged else []))


def unmatched(parts: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
  """Classes that the training split has no image of and another split has, and the other way round, a line each."""
  counts = {k: collections.Counter(map(class_of, paths)) for k, paths in parts.items() if paths}
  lines, train = [], counts.get('train', {})
  for split, found in counts.items():
    if split != 'train':
      for have, lack, where in ((found, train, f'in {split} without training images'),
                                (train, found, f'without images in {split}')):
        names = sorted(name for name in have if name not in lack)
        if names:
          images = sum(have[name] for name in names)
          lines.append(f'{len(names):,} {"class" if len(names) == 1 else "classes"} {where} ({images:,} '
                       f'{"image" if images == 1 else "images"}): {some(names)}')
  return tuple(lines)

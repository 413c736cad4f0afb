"""A folder of images: with class folders or without, with train/ and val/ or test/ or without. The one reader of it."""
import collections
import hashlib
import os
import pathlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from equivariant_ssl.data import layout
from equivariant_ssl.data.decode import DAMAGED, BadImage, Reading, header, read_file, reading
from equivariant_ssl.data.source import (
  REPLACED,
  Records,
  Source,
  fits,
  hopeless_data,
  listed,
  listing,
  load,
  measured,
  to_check,
  too_many,
)
from equivariant_ssl.data.stream import lazy_split, sample
from equivariant_ssl.errors import BAD_DATA, USAGE, UserError
from equivariant_ssl.parallel import sharding

EXTENSIONS = ('.jpg', '.jpeg', '.jpe', '.jfif', '.png', '.apng', '.webp', '.gif', '.bmp', '.tif', '.tiff', '.ppm', '.pgm',
              '.pbm', '.pnm')
# Folders that file systems and their servers keep for themselves: thumbnails, wastebaskets, snapshots.
SYSTEM = {'@eadir', '@tmp', '@recycle', '@recently-snapshot', '#recycle', '#snapshot', '$recycle.bin',
          'system volume information', 'lost+found', '__macosx'}
KERNEL = ('/proc/', '/sys/')
LINKS, HIDDEN, OWN = 'links to folders', 'hidden', 'folders of the file system'


class Part(NamedTuple):
  """The images of one split: `paths` relative to `root`, sorted. within: the folder that no link may lead out of, by
  default `root`."""
  root: str
  paths: tuple[str, ...]
  within: str = ''


class Index(NamedTuple):
  """The images under `root`: `paths` relative to it, sorted; `bad` (path, why) of those that are not read; `others` counts
  what else was left out, by extension or kind; `links` are (folder, why it was not followed); `within`: see Part."""
  root: str
  paths: tuple[str, ...]
  bad: tuple[tuple[str, BadImage], ...]
  others: dict[str, int]
  links: tuple[tuple[str, str], ...]
  within: str

  @property
  def damaged(self) -> list[str]:
    """A line for each image that cannot be read, be it cut short, empty or something else."""
    return [f'{printable(path)}: {why}' for path, why in self.bad if why.reason == DAMAGED]

  @property
  def left_out(self) -> dict[str, int]:
    """How many files and folders are not read, by reason: an extension, or a few words."""
    kinds = collections.Counter(why.reason for _, why in self.bad)
    return self.others | dict(kinds) | ({LINKS: len(self.links)} if self.links else {})


class Folder(NamedTuple):
  """What a folder holds. parts: {'train', and 'validation' and 'test' where they are: their images}. classes: None where
  there are no labels. notes: what is odd about the folders and names, a line each."""
  index: Index
  parts: dict[str, Part]
  classes: tuple[str, ...] | None
  notes: tuple[str, ...]

  def lines(self, follow: str = '--config.data.links=True') -> tuple[str, ...]:
    """What was left out, counted by reason in one line, and what is odd. follow: what to type to follow links."""
    return said(self.index, follow) + self.notes


def said(index: Index, follow: str) -> tuple[str, ...]:
  """What was left out of a folder, counted by reason, most first; what to type about links."""
  if not index.left_out:
    return ()
  counts = ', '.join(f'{why} {n:,}' for why, n in sorted(index.left_out.items(), key=lambda kv: -kv[1]))
  links = any('link' in why.reason for _, why in index.bad) or any(why == NOT_FOLLOWED for _, why in index.links)
  return (f'left out: {counts}; {len(index.paths):,} images are read',
          *((f'links are followed with {follow}',) if links and follow else ()))


def make(path: str = '', size: int = 64, test: float = .1, stream: bool = False, links: bool = False, splits: bool = True,
         background: str = 'black', bits: int = 16) -> Source:
  """Every image under `path`, as the whole image squashed to size x size, upright; its true size kept.

  Labels: the name of the first folder on the way to the image, sorted; None where some image is in none, or all in one.
  Splits: the folders train and validation (else test) where they are there, by these or like names (`layout.ROLES`) unless
  `splits` is off; else the share `test` of the images, chosen by a hash of the relative path, so adding images moves no
  other. Unreadable headers are left out; an image whose pixels turn out unreadable is replaced by another of its split
  (see `source.load`). links: follow those to folders and out of `path` (`index`). background: a colour under what is
  transparent. bits: that grey images of 16 bits use. What does not fit in memory decoded is streamed; with `stream` all is.
  """
  how = reading(background, bits)
  if not path:
    raise UserError('The data set `folder` needs a path.', 'Say where: --config.data.path=DIR')
  if not (size > 0 and 0 <= test < 1):
    raise UserError(f'folder: size={size} must be positive and test={test} in [0, 1).')
  base = pathlib.Path(path).expanduser()
  if not base.is_dir():
    raise UserError(f'{path!r} is not a folder.', 'Say where the images are: --config.data.path=DIR')
  found = read(base, test, links, splits)
  train, held = found.parts['train'], found.parts.get('validation') or found.parts.get('test')
  if not train.paths:
    raise UserError(f'{path!r}: no image is left to train on.', 'Use a smaller --config.data.test.')
  lost, total = found.index.damaged, sum(len(part.paths) for part in (train, held) if part)
  judge(base, found.index)
  parts = [records(part, found.classes, how) if part and part.paths else None for part in (train, held)]
  first, rows = found.lines() + _unused(found), listed('damaged, left out:', lost)
  about = {'names': train.paths, 'files': tuple(contents(part) if part else '' for part in (train, held)),
           'place': (('path', os.path.abspath(base)),), 'left_out': found.index.left_out}
  if stream or not fits(total, size):
    train_split, test_split = (p and lazy_split(str(base), p, size, p.labels, len(lost)) for p in parts)
    normal, odd = measured(None, lambda: sample(train_split.images))
  else:
    train_split, test_split, replaced = load(str(base), *parts, size, lost)
    rows += listed(REPLACED, replaced)
    about['left_out'] |= {'damaged, replaced': len(replaced)} if replaced else {}
    normal, odd = measured(None, lambda: train_split.images)
  return Source(base.resolve().name, train_split, test_split, found.classes, *normal, first + odd + rows, **about)


def contents(part: Part) -> str:
  """A digest of the names and sizes in bytes of a split's files, '' where it has none."""
  def size(path: str) -> int:
    try:
      return os.stat(os.path.join(part.root, path)).st_size
    except OSError:
      return -1
  return listing((p.replace(os.sep, '/'), size(p)) for p in part.paths) if part.paths else ''


def _unused(found: Folder) -> tuple[str, ...]:
  both = 'validation' in found.parts and 'test' in found.parts
  return (f'test: its {len(found.parts["test"].paths):,} images are not used here: validation is held out',) if both else ()


def judge(base: pathlib.Path, index: Index) -> None:
  """Raise UserError (BAD_DATA) where more than 1 % of the images have no readable header."""
  lost, total = index.damaged, len(index.paths) + len(index.damaged)
  if too_many(len(lost), total):
    raise hopeless_data(str(base), len(lost), total, lost[0], to_check(str(base)))


def read(base: pathlib.Path, share: float = 0., links: bool = False, splits: bool = True) -> Folder:
  """The layout of a folder: for training, `data check`, `data prepare` and `transfer` alike. share: of the images, to hold
  out as 'test' where no folder is. Raises UserError where there is no image or the folders can be read in two ways."""
  found = index(str(base), links)
  if not found.paths:
    _refuse(base, found)
  every = sorted((*found.paths, *(p for p, why in found.bad if why.reason == DAMAGED)))
  prefixes, notes = layout.arrange(every, str(base), splits)
  inside = lambda prefix: tuple(p[len(prefix):] for p in found.paths if p.startswith(prefix))
  parts = {k: Part(os.path.join(str(base), prefix).rstrip(os.sep), inside(prefix), found.within)
           for k, prefix in prefixes.items()}
  settled = len(parts) > 1
  if share and not settled:
    root, paths, within = parts['train']
    parts |= {split: Part(root, tuple(p for p in paths if (_share(p) < share) == (split == 'test')), within)
              for split in ('train', 'test')}
  names = {k: part.paths for k, part in parts.items()}
  classes, odd = layout.class_names(names, str(base), splits, settled)
  return Folder(found, parts, classes, (*notes, *odd, *(layout.unmatched(names) if classes else ())))


NOT_FOLLOWED = 'a link to a folder, not followed'


def _folders(root: str, links: bool, lost: list, links_out: list, own: list) -> Iterator[tuple[str, list[str]]]:
  """(folder, its files), each real folder once; then those that links lead to, if they are followed."""
  real = os.path.realpath(root)
  queue, seen = collections.deque([root]), set()
  while queue:
    top = queue.popleft()
    if os.path.islink(top) and top != root:
      target = os.path.realpath(top)
      about = os.stat(target)
      if os.path.commonpath([real, target]) == target:
        links_out.append((top, 'a link to a folder that holds this one, not followed'))
        continue
      if (target + os.sep).startswith(KERNEL) or (about.st_dev, about.st_ino) in seen:
        links_out.append((top, 'a link to a folder that is read already, or of the system: not followed'))
        continue
    for place, folders, files in os.walk(top, onerror=lost.append):
      about = os.stat(place)
      if (about.st_dev, about.st_ino) in seen:
        folders[:] = []
        continue
      seen.add((about.st_dev, about.st_ino))
      linked = sorted(f for f in folders if os.path.islink(os.path.join(place, f)))
      for name in linked:
        queue.append(os.path.join(place, name)) if links else links_out.append((os.path.join(place, name), NOT_FOLLOWED))
      own += [f for f in folders if f.casefold() in SYSTEM]
      folders[:] = sorted(f for f in folders if f not in linked and not f.startswith('.') and f.casefold() not in SYSTEM)
      yield place, files


def index(root: str, links: bool = False) -> Index:
  """Walk `root`, and read the header of every file with an image's extension. Hidden names are skipped. links: follow those
  to files anywhere, and to folders but the system's own and those that hold `root`; no folder is read twice."""
  paths, others, passed, lost, own = [], collections.Counter(), [], [], []
  for place, files in _folders(root, links, lost, passed, own):
    for name in files:
      extension = os.path.splitext(name)[1].lower()
      if name.startswith('.'):
        others[HIDDEN] += extension in EXTENSIONS and not name.startswith('._')  # a Mac's notes on another file
      elif extension in EXTENSIONS:
        paths.append(os.path.relpath(os.path.join(place, name), root))
      else:
        others[extension or 'without extension'] += 1
  paths.sort()
  others[OWN] += len(own)
  within = '/' if links else root

  def trouble(relative: str) -> BadImage | None:
    try:
      header(os.path.join(root, relative), within)
      return None
    except BadImage as e:
      return e

  with ThreadPoolExecutor(min(32, 2 * sharding.count_cores())) as pool:
    why = dict(zip(paths, pool.map(trouble, paths), strict=True))
  bad = [(os.path.relpath(e.filename, root), BadImage(f'folder cannot be read: {e.strerror}')) for e in lost]
  bad += [(p, why[p]) for p in paths if why[p]]
  return Index(root, tuple(p for p in paths if not why[p]), tuple(bad), {k: n for k, n in others.items() if n},
               tuple((os.path.relpath(link, root), reason) for link, reason in sorted(passed)), within)


def printable(path: str) -> str:
  """A file's name on one line, whatever it holds."""
  return ''.join(c if c.isprintable() else c.encode('unicode_escape').decode() for c in as_text(path))


def as_text(path: str) -> str:
  """A file's name as text that UTF-8 can hold: bytes that are none are escaped, as in bad\\xff.jpg."""
  return os.fsencode(path).decode('utf-8', 'backslashreplace')


def _share(path: str) -> float:
  """A number in [0, 1) that depends on the relative path alone."""
  name = os.fsencode(path.replace(os.sep, '/'))
  return int.from_bytes(hashlib.sha256(name).digest()[:6], 'big') / 2**48


def _refuse(place: pathlib.Path, found: Index) -> None:
  """The error for a folder without a readable image: what is there instead."""
  counts = [f'{n:,} {extension}' for extension, n in sorted(found.others.items(), key=lambda kv: -kv[1])]
  counts += [f'{len(found.bad):,} unreadable images (the first: {printable(found.bad[0][0])}: {found.bad[0][1]})'
             ] if found.bad else []
  counts += [f'{len(found.links):,} links to folders, which are not followed'] if found.links else []
  links = 'Links are followed with --config.data.links=True (of `eqssl data`: --links). ' * bool(
      found.links or any('link' in why.reason for _, why in found.bad))
  raise UserError(f'{str(place)!r} has no images; it has: {", ".join(counts) or "no files"}.',
                  f'{links}Images end in {" ".join(EXTENSIONS)}.', BAD_DATA if found.damaged else USAGE)


def records(part: Part, classes: tuple[str, ...] | None, how: Reading = Reading()) -> Records:
  """The images of one split, not yet decoded."""
  root, paths, within = part
  def read_one(path: str) -> bytes | BadImage:
    try:
      return read_file(os.path.join(root, path), within or root)
    except BadImage as e:
      return e

  labels = None
  if classes:
    number = {name: k for k, name in enumerate(classes)}
    labels = np.array([number[layout.class_of(p)] for p in paths], np.int32)
  return Records(lambda i: printable(paths[i]), lambda indices: (read_one(paths[i]) for i in indices), labels,
                 len(paths), how=how)

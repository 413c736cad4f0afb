"""A folder of images: with class folders or without, with train/ and val/ (or test/) or without."""
import collections
import hashlib
import os
import pathlib
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from equivariant_ssl import shard
from equivariant_ssl.data.decode import BadImage, header, read_file
from equivariant_ssl.data.source import Records, Source, fits, listed, listing, load, moments
from equivariant_ssl.data.stream import lazy_split, measured
from equivariant_ssl.errors import UserError

EXTENSIONS = ('.jpg', '.jpeg', '.jpe', '.png', '.webp', '.gif', '.bmp')
UNREADABLE, LINKS = 'unreadable, left out:', 'links to folders, not followed:'


class Part(NamedTuple):
  """The images of one split: `paths` relative to `root`, sorted."""
  root: str
  paths: tuple[str, ...]


class Index(NamedTuple):
  """The images under `root`: `paths` relative to it, sorted; `bad` (path, reason) of those with an unreadable header;
  `others` counts the files that are not images by extension; `links` are folders not followed."""
  root: str
  paths: tuple[str, ...]
  bad: tuple[tuple[str, str], ...]
  others: dict[str, int]
  links: tuple[str, ...]


def make(path: str = '', size: int = 64, test: float = .1, stream: bool = False) -> Source:
  """Every image under `path`, as the whole image squashed to size x size, upright; its true size kept.

  Labels: the name of the first folder on the way to the image, sorted; None where some image is in none. Splits:
  path/train and path/val (or path/test) where they are there; else the share `test` of the images, chosen by a hash
  of the relative path, so adding images moves no other. Unreadable headers are left out; an image whose pixels turn
  out unreadable is replaced by another of its split (see `source.load`). Links to folders are not followed. What does
  not fit in memory decoded is streamed; with `stream` all is.
  """
  if not path:
    raise UserError('The data set `folder` needs a path.', 'Say where: --config.data.path=DIR')
  if not (size > 0 and 0 <= test < 1):
    raise UserError(f'folder: size={size} must be positive and test={test} in [0, 1).')
  base = pathlib.Path(path).expanduser()
  if not base.is_dir():
    raise UserError(f'{path!r} is not a folder.', 'Say where the images are: --config.data.path=DIR')
  train, held, bad, links = splits(base, test)
  if not train.paths:
    raise UserError(f'{path!r}: no image is left to train on.', 'Use a smaller --config.data.test.')
  classes, loose = class_names(train, held)
  parts = [records(part, classes) if part.paths else None for part in (train, held)]
  about = {'files': tuple(contents(part) for part in (train, held)), 'place': (('path', os.path.abspath(base)),)}
  problems = listed(UNREADABLE, bad) + listed(LINKS, links) + loose
  if stream or not fits(len(train.paths) + len(held.paths), size):
    train_split, test_split = (p and lazy_split(str(base), p, size, p.labels) for p in parts)
    return Source(base.resolve().name, train_split, test_split, classes, *measured(train_split.images), problems,
                  train.paths, **about)
  train_split, test_split, replaced = load(str(base), *parts, size)
  problems += replaced
  return Source(base.resolve().name, train_split, test_split, classes, *moments(train_split.images), problems, train.paths,
                **about)


def contents(part: Part) -> str:
  """A digest of the names and sizes in bytes of a split's files, '' where it has none."""
  def size(path: str) -> int:
    try:
      return os.stat(os.path.join(part.root, path)).st_size
    except OSError:
      return -1
  return listing((p.replace(os.sep, '/'), size(p)) for p in part.paths) if part.paths else ''


def index(root: str) -> Index:
  """Walk `root`, and read the header of every file with an image's extension. Hidden names are skipped."""
  paths, others, links, lost = [], collections.Counter(), [], []
  for place, folders, files in os.walk(root, onerror=lost.append):
    links += [os.path.join(place, f) for f in folders if os.path.islink(os.path.join(place, f))]
    folders[:] = [f for f in folders if not f.startswith(('.', '__MACOSX'))]
    for name in files:
      if name.startswith('.'):
        continue
      extension = os.path.splitext(name)[1].lower()
      if extension in EXTENSIONS:
        paths.append(os.path.relpath(os.path.join(place, name), root))
      else:
        others[extension or 'no extension'] += 1
  paths.sort()

  def trouble(relative: str) -> str:
    try:
      header(os.path.join(root, relative), root)
      return ''
    except BadImage as e:
      return str(e)

  with ThreadPoolExecutor(min(32, 2 * shard.cores())) as pool:
    why = dict(zip(paths, pool.map(trouble, paths), strict=True))
  bad = [(os.path.relpath(e.filename, root), f'folder cannot be read: {e.strerror}') for e in lost]
  bad += [(p, why[p]) for p in paths if why[p]]
  return Index(root, tuple(p for p in paths if not why[p]), tuple(bad), dict(others),
               tuple(os.path.relpath(link, root) for link in sorted(links)))


def layout(base: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path | None]:
  """The folder to train on and the one to test on, if the names say so: train/ with val/, else with test/."""
  held = [base / name for name in ('val', 'test') if (base / name).is_dir()]
  return (base / 'train', held[0]) if (base / 'train').is_dir() and held else (base, None)


def printable(path: str) -> str:
  """A file's name on one line, whatever it holds."""
  return ''.join(c if c.isprintable() else c.encode('unicode_escape').decode() for c in as_text(path))


def as_text(path: str) -> str:
  """A file's name as text that UTF-8 can hold: bytes that are none are escaped, as in bad\\xff.jpg."""
  return os.fsencode(path).decode('utf-8', 'backslashreplace')


def splits(base: pathlib.Path, share: float) -> tuple[Part, Part, list[str], list[str]]:
  """The images to train on, those to test on, and in a line each: the unreadable ones, the links not followed."""
  places = [p for p in layout(base) if p]
  indices = [index(str(p)) for p in places]
  if not indices[0].paths:
    _refuse(places[0], indices[0])
  bad = [f'{printable(str(place.relative_to(base) / path))}: {why}'
         for place, found in zip(places, indices, strict=True) for path, why in found.bad]
  links = [printable(link) for found in indices for link in found.links]
  if len(places) == 2:
    return *(Part(found.root, found.paths) for found in indices), bad, links
  parts = [tuple(p for p in indices[0].paths if (_share(p) < share) == held) for held in (False, True)]
  return *(Part(indices[0].root, part) for part in parts), bad, links


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
  raise UserError(f'{str(place)!r} has no images; it has: {", ".join(counts) or "no files"}.',
                  f'Images end in {" ".join(EXTENSIONS)}.')


def class_names(*parts: Part) -> tuple[tuple[str, ...] | None, tuple[str, ...]]:
  """The class names, or None where an image lies in no class folder (and a problem, if others do)."""
  firsts = [p.split(os.sep)[0] if os.sep in p else None for part in parts for p in part.paths]
  names = sorted({f for f in firsts if f is not None})
  loose = firsts.count(None)
  if not loose:
    return tuple(names), ()
  return None, (f'{loose:,} images lie in no class folder, so there are no labels',) if names else ()


def records(part: Part, classes: tuple[str, ...] | None) -> Records:
  """The images of one split, not yet decoded."""
  root, paths = part
  def read_one(path: str) -> bytes | BadImage:
    try:
      return read_file(os.path.join(root, path), root)
    except BadImage as e:
      return e

  labels = None
  if classes:
    number = {name: k for k, name in enumerate(classes)}
    labels = np.array([number[p.split(os.sep)[0]] for p in paths], np.int32)
  return Records(lambda i: printable(paths[i]), lambda indices: (read_one(paths[i]) for i in indices), labels,
                 len(paths))

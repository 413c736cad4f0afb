"""A folder of images: with class folders or without, with train/ and val/ (or test/) or without."""
import collections
import hashlib
import os
import pathlib
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from equivariant_ssl.data.decode import BadImage, header, read_file
from equivariant_ssl.data.source import Records, Source, listed, load, moments
from equivariant_ssl.errors import UserError

EXTENSIONS = ('.jpg', '.jpeg', '.jpe', '.png', '.webp', '.gif', '.bmp')


class Index(NamedTuple):
  """The images under `root`: paths relative to it (sorted) with the (height, width) of their headers; `bad` (path,
  reason) of those left out; `others` counts the files that are not images by extension; `links` not followed."""
  root: str
  paths: tuple[str, ...]
  sizes: tuple[tuple[int, int], ...]
  bad: tuple[tuple[str, str], ...]
  others: dict[str, int]
  links: tuple[str, ...]


def make(path: str = '', size: int = 64, test: float = .1) -> Source:
  """Every image under `path`, as the whole image squashed to size x size, upright; its true size kept.

  Labels: the name of the first folder on the way to the image, sorted; None where some image is in none. Splits:
  path/train and path/val (or path/test) where they are there; else the share `test` of the images, chosen by a hash
  of the relative path, so adding images moves no other. Unreadable headers are left out; an image whose pixels turn
  out unreadable is replaced by another of its split (see `source.load`). Links to folders are not followed.
  """
  if not path:
    raise UserError('The data set `folder` needs a path.', 'Say where: --config.data.path=DIR')
  if not (size > 0 and 0 <= test < 1):
    raise UserError(f'folder: size={size} must be positive and test={test} in [0, 1).')
  base = pathlib.Path(path).expanduser()
  if not base.is_dir():
    raise UserError(f'{path!r} is not a folder.', 'Say where the images are: --config.data.path=DIR')
  train, held, problems = splits(base, test)
  if not train[1]:
    raise UserError(f'{path!r}: no image is left to train on.', 'Use a smaller --config.data.test.')
  classes, problem = class_names(train[1], held[1])
  parts = [records(*part, classes) if part[1] else None for part in (train, held)]
  *splits, replaced = load(str(base), *parts, size)
  return Source(base.resolve().name, *splits, classes, *moments(splits[0].images), problems + problem + replaced)


def index(root: str) -> Index:
  """Walk `root`, and read the header of every file with an image's extension. Hidden names are skipped."""
  paths, others, links = [], collections.Counter(), []
  for place, folders, files in os.walk(root):
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

  def look(relative: str) -> tuple[int, int] | str:
    try:
      return header(os.path.join(root, relative), root)
    except BadImage as e:
      return str(e)

  with ThreadPoolExecutor(min(32, 2 * (os.cpu_count() or 1))) as pool:
    looks = list(pool.map(look, paths))
  good = [(p, s) for p, s in zip(paths, looks, strict=True) if not isinstance(s, str)]
  return Index(root, tuple(p for p, _ in good), tuple(s for _, s in good),
               tuple((p, s) for p, s in zip(paths, looks, strict=True) if isinstance(s, str)),
               dict(others), tuple(os.path.relpath(link, root) for link in sorted(links)))


def layout(base: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path | None]:
  """The folder to train on and the one to test on, if the names say so: train/ with val/, else with test/."""
  held = [base / name for name in ('val', 'test') if (base / name).is_dir()]
  return (base / 'train', held[0]) if (base / 'train').is_dir() and held else (base, None)


def printable(path: str) -> str:
  """A file's name on one line, whatever it holds."""
  return repr(path)[1:-1]


def splits(base: pathlib.Path, share: float) -> tuple[tuple[str, list[str]], tuple[str, list[str]], tuple[str, ...]]:
  """((root, paths) to train, (root, paths) to test, problems)."""
  places = [p for p in layout(base) if p]
  indices = [index(str(p)) for p in places]
  if not indices[0].paths:
    _refuse(places[0], indices[0])
  bad = [f'{printable(str(place.relative_to(base) / path))}: {why}'
         for place, found in zip(places, indices, strict=True) for path, why in found.bad]
  links = [printable(link) for found in indices for link in found.links]
  problems = listed('unreadable, left out:', bad) + listed('links to folders, not followed:', links)
  if len(places) == 2:
    return *((found.root, list(found.paths)) for found in indices), problems
  parts = [[p for p in indices[0].paths if (_share(p) < share) == held] for held in (False, True)]
  return *((indices[0].root, part) for part in parts), problems


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


def class_names(*splits: list[str]) -> tuple[tuple[str, ...] | None, tuple[str, ...]]:
  """The class names, or None where an image lies in no class folder (and a problem, if others do)."""
  firsts = [p.split(os.sep)[0] if os.sep in p else None for split in splits for p in split]
  names = sorted({f for f in firsts if f is not None})
  loose = firsts.count(None)
  if not loose:
    return tuple(names), ()
  return None, (f'{loose:,} images lie in no class folder, so there are no labels',) if names else ()


def records(root: str, paths: list[str], classes: tuple[str, ...] | None) -> Records:
  """The images of one split, not yet decoded."""
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

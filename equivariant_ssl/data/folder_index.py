"""The images in a folder: their paths, and what was left out and why."""
import collections
import os
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from equivariant_ssl.data.decode import read_header
from equivariant_ssl.data.image_header import DAMAGED, BadImage
from equivariant_ssl.errors import passing
from equivariant_ssl.parallel import sharding
from equivariant_ssl.storage import disk

EXTENSIONS = ('.jpg', '.jpeg', '.jpe', '.jfif', '.png', '.apng', '.webp', '.gif', '.bmp', '.tif',
              '.tiff', '.ppm', '.pgm', '.pbm', '.pnm')
# Folders that file systems and their servers keep for themselves: thumbnails, trash, snapshots.
SYSTEM = {'@eadir', '@tmp', '@recycle', '@recently-snapshot', '#recycle', '#snapshot',
          '$recycle.bin', 'system volume information', 'lost+found', '__macosx'}
KERNEL = ('/proc/', '/sys/')
LINKS, HIDDEN, SYSTEM_FOLDERS = 'links to folders', 'hidden', 'folders of the file system'
NOT_FOLLOWED = 'a link to a folder, not followed'


class Index(NamedTuple):
  """The images in the folder `root`.

  paths:  the images that can be read, relative to `root`, sorted.
  bad:    the (path, reason) of each image or folder that cannot be read.
  others: {reason: how many files and folders were left out for it}. A reason is a file extension,
          or a few words.
  links:  the (folder, reason) of each link to a folder that was not followed.
  within: the folder that no link may lead out of.
  """
  root: str
  paths: tuple[str, ...]
  bad: tuple[tuple[str, BadImage], ...]
  others: dict[str, int]
  links: tuple[tuple[str, str], ...]
  within: str

  @property
  def damaged(self) -> list[str]:
    """One line for each image that is damaged, for instance cut short or empty."""
    return [f'{printable(path)}: {error}' for path, error in self.bad if error.reason == DAMAGED]

  @property
  def left_out(self) -> dict[str, int]:
    """{reason: how many files and folders are not read for it}."""
    bad = collections.Counter(error.reason for _, error in self.bad)
    return self.others | dict(bad) | ({LINKS: len(self.links)} if self.links else {})


class _Skipped(NamedTuple):
  """What a walk through folders did not enter. Each list grows during the walk."""
  errors: list[OSError]
  links: list[tuple[str, str]]
  system: list[str]


def left_out_lines(index: Index, follow: str) -> tuple[str, ...]:
  """What was left out of a folder, in one line with the number for each reason, largest first.

  follow: what to type to follow links; a second line says it where there are such links.
  """
  if not index.left_out:
    return ()
  counts = ', '.join(f'{reason} {n:,}' for reason, n in
                     sorted(index.left_out.items(), key=lambda item: -item[1]))
  links = (any('link' in error.reason for _, error in index.bad)
           or any(reason == NOT_FOLLOWED for _, reason in index.links))
  return (f'left out: {counts}; {len(index.paths):,} images are read',
          *((f'links are followed with {follow}',) if links and follow else ()))


def index_folder(root: str, links: bool = False) -> Index:
  """The Index of a folder: every folder in it is walked, and the header of every image is read.

  An image is a file with an extension of EXTENSIONS; hidden files are left out. links: follow links
  to files anywhere, and links to folders, except to the system's own and to those that hold `root`.
  No folder is read twice. Raises UserError INPUT_OUTPUT where the disk fails to list a folder.
  """
  paths, others = [], collections.Counter()
  folders, skipped = disk.retry(lambda: _walk(root, links), root)
  for place, files in folders:
    for name in files:
      extension = os.path.splitext(name)[1].lower()
      if name.startswith('.'):
        # A name that begins with ._ is a Mac's notes on another file.
        others[HIDDEN] += extension in EXTENSIONS and not name.startswith('._')
      elif extension in EXTENSIONS:
        paths.append(os.path.relpath(os.path.join(place, name), root))
      else:
        others[extension or 'without extension'] += 1
  paths.sort()
  others[SYSTEM_FOLDERS] += len(skipped.system)
  within = '/' if links else root

  def problem(relative: str) -> BadImage | None:
    try:
      read_header(os.path.join(root, relative), within)
      return None
    except BadImage as error:
      return error

  with ThreadPoolExecutor(min(32, 2 * sharding.count_cores())) as pool:
    problems = list(zip(paths, pool.map(problem, paths), strict=True))
  bad = [(os.path.relpath(error.filename, root),
          BadImage(f'folder cannot be read: {error.strerror}')) for error in skipped.errors]
  bad += [(path, error) for path, error in problems if error]
  return Index(root, tuple(path for path, error in problems if not error), tuple(bad),
               {reason: n for reason, n in others.items() if n},
               tuple((os.path.relpath(link, root), reason)
                     for link, reason in sorted(skipped.links)), within)


def _walk(root: str, links: bool) -> tuple[list[tuple[str, list[str]]], _Skipped]:
  """Each folder in `root` with the names of its files, and what was not entered.

  Each real folder is visited once. With `links` the folders follow that links lead to. Raises
  OSError for an error that may pass, which says nothing about a folder.
  """
  def note(error: OSError) -> None:
    if passing(error):
      raise error
    skipped.errors.append(error)

  walked, skipped = [], _Skipped([], [], [])
  real = os.path.realpath(root)
  queue, visited = collections.deque([root]), set()
  while queue:
    top = queue.popleft()
    if os.path.islink(top) and top != root:
      target = os.path.realpath(top)
      status = os.stat(target)
      if os.path.commonpath([real, target]) == target:
        skipped.links.append((top, 'a link to a folder that holds this one, not followed'))
        continue
      if (target + os.sep).startswith(KERNEL) or (status.st_dev, status.st_ino) in visited:
        skipped.links.append((top, 'a link to a folder that is already read or belongs to the '
                                   'system, not followed'))
        continue
    for place, folders, files in os.walk(top, onerror=note):
      status = os.stat(place)
      if (status.st_dev, status.st_ino) in visited:
        folders[:] = []
        continue
      visited.add((status.st_dev, status.st_ino))
      linked = sorted(name for name in folders if os.path.islink(os.path.join(place, name)))
      for path in (os.path.join(place, name) for name in linked):
        if links:
          queue.append(path)
        else:
          skipped.links.append((path, NOT_FOLLOWED))
      skipped.system.extend(name for name in folders if name.casefold() in SYSTEM)
      folders[:] = sorted(name for name in folders if name not in linked
                          and not name.startswith('.') and name.casefold() not in SYSTEM)
      walked.append((place, files))
  return walked, skipped


def printable(path: str) -> str:
  """A file's name on one line, whatever characters it has."""
  return ''.join(char if char.isprintable() else char.encode('unicode_escape').decode()
                 for char in as_text(path))


def as_text(path: str) -> str:
  """A file's name as text that UTF-8 can hold.

  Bytes that are not text are escaped, as in bad\\xff.jpg.
  """
  return os.fsencode(path).decode('utf-8', 'backslashreplace')

"""The data sets that transfer evaluates on, from wherever they are: what is on disk and what is
missing."""
import functools
import hashlib
import os
import pathlib
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from equivariant_ssl import data, registry
from equivariant_ssl.data import archives, folder, tfds, tfds_folders
from equivariant_ssl.data.source import (
  Records,
  Source,
  Split,
  check_advice,
  decode_records,
  too_many_unreadable,
)
from equivariant_ssl.errors import BAD_DATA, UserError
from equivariant_ssl.evaluate.targets import BUILD, DATASETS, Target
from equivariant_ssl.storage import fingerprint

CHUNK = 4096  # images decoded at a time: 100,000 of 224 pixels are more than a machine's memory


class MissingTarget(NamedTuple):
  """A data set that is not on disk, and the command that makes it."""
  name: str
  command: str


class Part(NamedTuple):
  """A split that is not read yet.

  mark: text that changes where the images do. read: size -> the split in pieces.
  """
  mark: str
  read: Callable[[int], Iterable[Split]]


class OpenTarget(NamedTuple):
  """A data set that is not read yet.

  parts: {'train', 'test', and 'valid' where it has validation images of its own}.
  """
  target: Target
  classes: int
  parts: dict[str, Part]


def text_digest(*lines: object) -> str:
  """Return the SHA-256 of lines of text."""
  return hashlib.sha256('\n'.join(map(str, lines)).encode()).hexdigest()


def _stamps(files: Iterable[pathlib.Path]) -> list[tuple]:
  """Return (name, size, time of modification) of each file, by name."""
  return [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(files)]


def _piece(records: Records, start: int, count: int) -> Records:
  """Return `count` of the records, from number `start` on."""
  def read(rows: range) -> Iterable:
    return records.read(range(start + rows.start, start + rows.stop))
  labels = None if records.labels is None else records.labels[start:start + count]
  return Records(records.names, read, labels, count, rules=records.rules)


def _decoded(records: Records, size: int, place: pathlib.Path) -> Iterator[Split]:
  """Yield the canvases of `records`, CHUNK at a time.

  place: where the data are. Raises UserError (BAD_DATA) where more than 1 % cannot be read.
  """
  bad = 0
  for start in range(0, records.count, CHUNK):
    count = min(CHUNK, records.count - start)
    split, unreadable = decode_records(_piece(records, start, count), size)
    bad += len(unreadable)
    if too_many_unreadable(bad, records.count) or len(unreadable) == count:
      number, reason = unreadable[0]
      raise UserError(
          f'more than 1 % cannot be decoded: {records.names(start + number)}: {reason}.',
          check_advice(str(place)), BAD_DATA)
    yield split


def _in_memory(target: Target, source: Source) -> OpenTarget:
  """Return a data set that a module of `data` has read."""
  def part(split: Split | None) -> Part:
    if split is None or split.labels is None:
      raise UserError('it has no labeled test images.',
                      'Transfer needs labels: leave it out of --targets.')
    return Part(text_digest(fingerprint.fingerprints(split._asdict())), lambda size: (split,))
  parts = {'train': part(source.train), 'test': part(source.test)}
  return OpenTarget(target, len(source.classes or ()), parts)


def _of_folder(target: Target, base: pathlib.Path) -> OpenTarget:
  """Return a folder as `data.folder` reads it.

  Where it has validation and test images, the penalty is chosen on the former.
  """
  read = folder.read_folder(base, .1)
  folder.check_headers(base, read.index)
  for line in read.lines(''):
    print(f'{target.dataset or base}: {line}', file=sys.stderr)
  classes = read.classes
  if classes is None:
    raise UserError(f'{read.notes[-1] if read.notes else "its images lie in no class folders"}.',
                    'Make train/CLASS/ and test/CLASS/.')
  splits = read.parts
  empty = folder.SplitFiles(str(base), ())
  parts = {'train': splits['train'],
           'test': splits.get('test') or splits.get('validation') or empty}
  if {'validation', 'test'} <= set(splits):
    parts['valid'] = splits['validation']

  def part(p: folder.SplitFiles) -> Part:
    stamps = _stamps(pathlib.Path(p.root, path) for path in p.paths)
    return Part(text_digest(stamps, classes),
                lambda size: _decoded(folder.folder_records(p, classes), size, base))
  return OpenTarget(target, len(classes), {k: part(p) for k, p in parts.items()})


def _of_tfds(target: Target, path: pathlib.Path) -> OpenTarget:
  """Return a data set that TFDS has prepared in the folder `path`."""
  builder = tfds.open_directory(path)
  image, label = tfds.image_and_label(target.dataset, builder.info)
  if label is None:
    raise UserError('it has no class label among its features.',
                    'Transfer needs labels: leave it out of --targets.')
  test = target.test if target.test in builder.info.splits else 'validation'
  splits = {'train': target.train, 'test': test}
  if target.valid:
    splits['valid'] = target.valid
  stamps = _stamps(f for f in path.iterdir() if f.is_file())

  def read(size: int, split: str) -> Iterable[Split]:
    return _decoded(tfds.split_records(builder, split, image, label), size, path)
  return OpenTarget(target, len(builder.info.features[label].names), {
      k: Part(text_digest(stamps, s, image, label), functools.partial(read, split=s))
      for k, s in splits.items()})


def open_target(name: str, root: str = '') -> OpenTarget | MissingTarget:
  """Return the data set `name`, not read yet, or what makes it.

  name: one of DATASETS (read from TFDS, or from root/NAME/train/CLASS/ and so on), a module of
  `data`, a folder of class folders, or a name of TFDS. Raises UserError where it has no labels.
  """
  base, target = tfds.default_root(root), DATASETS.get(name, Target(name))
  place = base / name if name in DATASETS else pathlib.Path(os.path.expanduser(name))
  is_folder = (name not in DATASETS and place.is_dir()
               and not (place / 'dataset_info.json').is_file())
  if is_folder or (place / 'train').is_dir():
    return _of_folder(target, place)
  if name not in DATASETS and name in registry.names(data):
    return _in_memory(target, registry.make(data, name))
  try:
    path = tfds.find_version(target.dataset or name, root, '--root DIR')
  except tfds_folders.NotPrepared:
    return MissingTarget(name, command_for(target, base))
  return _of_tfds(target, path)


def command_for(target: Target, base: pathlib.Path) -> str:
  """Return the command that makes a data set that is not on disk; it does without TensorFlow where
  that is possible."""
  if target.prepare == BUILD and target.dataset in tfds_folders.PREPARED_HERE:
    url = archives.ADDRESSES.get(target.dataset)
    command = f'{tfds_folders.PREPARED_HERE[target.dataset]} --root {shlex.quote(str(base))}'
    return command + (f'   (ARCHIVE: {url})' if url else '')
  prepare = ' '.join(target.prepare.split())
  return prepare.format(dataset=target.dataset, root=shlex.quote(str(base)))


def check_targets(names: Iterable[str], root: str = '') -> None:
  """Raise UserError for a name that is no target of transfer: neither a data set on disk or known
  to TFDS, nor a folder."""
  known = {*DATASETS, *registry.names(data)} - {'arrays', 'folder', 'tfds'}
  for name in names:
    if name in known or pathlib.Path(os.path.expanduser(name)).is_dir():
      continue
    try:
      tfds.find_version(name, root, '--root DIR')
    except tfds_folders.NotPrepared as e:
      if name.partition(':')[0].split('/')[0] not in tfds_folders.preparable_names():
        raise UserError(f'{name!r} is no folder here, and no data set that is known.',
                        registry.nearest_name(name, known)) from e


def marks(names: tuple[str, ...], root: str = '') -> dict[str, dict[str, str] | None]:
  """Return {data set: {split: its mark}} of what transfer would read; None for a data set that is
  not on disk."""
  marks_by_name = {}
  for name in names or tuple(DATASETS):
    opened = open_target(name, root)
    marks_by_name[name] = None if isinstance(opened, MissingTarget) else {
        k: part.mark for k, part in opened.parts.items()}
  return marks_by_name

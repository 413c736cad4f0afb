"""`eqssl data check`: what a data set holds, and what is wrong with it."""
import hashlib
import pathlib
from collections import defaultdict
from typing import NamedTuple

import numpy as np

from equivariant_ssl.data import digits, folder, layout, tfds
from equivariant_ssl.data.channel_moments import (
  Content,
  measure_content,
  merge_contents,
  moments,
  remarks,
)
from equivariant_ssl.data.decode import decode, pixel_rules
from equivariant_ssl.data.encode import CANVAS
from equivariant_ssl.data.folder_index import printable
from equivariant_ssl.data.image_header import DAMAGED, BadImage
from equivariant_ssl.data.source import Records, counted_list, map_chunks

WIDE = 4.      # a long side that is more than so many times the short side is unusual
SMALL = .25    # a short side that is less than this part of the median short side is unusual
LISTED = 100   # images that are only worth a look are listed, at most
CLASSES_LISTED = 20   # classes whose counts are listed, at most


class Report(NamedTuple):
  """The `lines` to print; `ok` is False where some image cannot be read."""
  lines: tuple[str, ...]
  ok: bool


class Look(NamedTuple):
  """What is known of one record.

  split, name: which record it is.
  digest:  a digest of its bytes.
  size:    its (height, width).
  error:   why it cannot be read, or ''.
  content: what there is to see in it, or None where it cannot be read.
  """
  split: str
  name: str
  digest: bytes = b''
  size: tuple[int, int] = (0, 0)
  error: str = ''
  content: Content | None = None


class FolderOptions(NamedTuple):
  """How a folder and its images are read: the arguments of `data.folder.make`."""
  links: bool = False
  splits: bool = True
  background: str = 'black'
  bits: int = 16


def check(dataset: str, root: str = '', options: FolderOptions = FolderOptions()) -> Report:
  """Read every image of a data set, and report what is wrong.

  dataset: a folder of images, a TFDS data set (its name or its prepared directory), or 'digits'.
  Raises UserError where there is nothing to check.
  """
  if dataset == 'digits':
    return check_digits()
  path = pathlib.Path(dataset).expanduser()
  if path.is_dir() and not (path / 'dataset_info.json').is_file():
    return check_folder(path, options)
  return check_tfds(dataset, root, options)


def check_digits() -> Report:
  """Report on the bundled scans. Only scikit-learn itself can be missing."""
  source = digits.make()
  assert source.test and source.classes  # the digits have both
  counts = (f'{len(source.train.images):,} train, {len(source.test.images):,} test, '
            f'{len(source.classes)} classes')
  return Report((f'digits: {counts}', 'ok'), True)


def check_folder(path: pathlib.Path, options: FolderOptions = FolderOptions()) -> Report:
  """Decode every image of a folder."""
  content = folder.read_folder(path, .1, options.links, options.splits)
  rules = pixel_rules(options.background, options.bits)
  parts = {split: folder.folder_records(part, content.classes, rules)
           for split, part in content.parts.items() if part.paths}
  not_read = [f'{printable(place)}: {error}' for place, error in content.index.bad
              if error.reason != DAMAGED]
  not_read += [f'{printable(place)}: {reason}' for place, reason in content.index.links]
  damaged = content.index.damaged
  return make_report(
      printable(str(path)), parts, content.classes, content.lines('--links'),
      counted_list('damaged:', damaged, len(damaged)),
      counted_list('not read, because they are links, too large, or not files:', not_read,
                   len(not_read)))


def check_tfds(dataset: str, root: str, options: FolderOptions = FolderOptions()) -> Report:
  """Decode every record of every split of a prepared TFDS data set."""
  builder = tfds.open_directory(tfds.find_version(dataset, root, '--root DIR'))
  image, label = tfds.image_and_label(dataset, builder.info)
  rules = pixel_rules(options.background, options.bits)
  parts = {split: tfds.split_records(builder, split, image, label, rules=rules)
           for split in builder.info.splits}
  names = tuple(builder.info.features[label].names) if label else None
  return make_report(str(builder.data_dir), parts, names)


def scan(split: str, records: Records) -> list[Look]:
  """Look at every record, in threads."""
  def look(i: int, data: bytes | BadImage) -> Look:
    name = records.names(i)
    if isinstance(data, BadImage):
      return Look(split, name, error=str(data))
    try:
      canvas, size = decode(data, CANVAS, records.rules)
    except BadImage as error:
      return Look(split, name, error=str(error))
    content = measure_content(canvas[None], moments(canvas[None]))
    return Look(split, name, hashlib.sha256(data).digest(), size, content=content)

  def look_at_chunk(indices: range) -> list[Look]:
    return [look(i, data) for i, data in zip(indices, records.read(indices), strict=True)]

  return map_chunks(look_at_chunk, records.count)


def make_report(name: str, parts: dict[str, Records], classes: tuple[str, ...] | None,
                first: tuple[str, ...] = (), unreadable: tuple[str, ...] = (),
                notes: tuple[str, ...] = ()) -> Report:
  """The report on the records of a data set.

  It has the counts, the lines `first`, what cannot be read (which is not ok), and what is worth a
  look, beginning with the `notes`.
  """
  looks = {split: scan(split, records) for split, records in parts.items()}
  lines = [f'{name}: ' + ', '.join(f'{len(some):,} {split}' for split, some in looks.items()),
           *first]
  labeled = {}
  for split, records in parts.items():
    if classes and records.labels is not None:
      unlabeled = (records.labels < 0).sum()
      counts = np.bincount(records.labels[records.labels >= 0], minlength=len(classes))
      none = f', none {unlabeled:,}' if unlabeled else ''
      lines.append(f'{split} classes: {_class_counts(classes, counts)}{none}')
      if counts.any():
        labeled[split] = {name: int(n) for name, n in zip(classes, counts, strict=True)
                          if n}
  if 'train' in labeled:
    lines += [line for line in layout.unmatched_counts(labeled) if line not in first]
  every = [look for split_looks in looks.values() for look in split_looks]
  broken = [f'{look.name}: {look.error}' for look in every if look.error]
  good = [look for look in every if not look.error]
  contents = [look.content for look in good if look.content]
  lines += [*(remarks(merge_contents(contents), '--') if contents else ()), *unreadable,
            *counted_list('cannot be decoded:', broken, len(broken)), *notes, *_sizes(good),
            *_copies(good)]
  ok = not broken and not unreadable
  lines.append('ok' if ok else 'not ok: training leaves out or replaces the broken images that are '
               'named above')
  return Report(tuple(lines), ok)


def _class_counts(classes: tuple[str, ...], counts: np.ndarray) -> str:
  """The number of images of each class, or, where there are many classes, their range."""
  if len(classes) <= CLASSES_LISTED:
    return ', '.join(f'{printable(name)} {n:,}' for name, n in zip(classes, counts, strict=True))
  return f'{len(classes):,}, with {counts.min():,} to {counts.max():,} images each'


def _sizes(looks: list[Look]) -> tuple[str, ...]:
  """The range of the sizes, and the images whose size is far from the others."""
  if not looks:
    return ()
  sizes = np.array([look.size for look in looks])
  short, long = sizes.min(axis=1), sizes.max(axis=1)
  unusual = np.flatnonzero((long > WIDE * short) | (short < SMALL * np.median(short)))
  lines = [f'{looks[i].name}: {sizes[i, 0]}x{sizes[i, 1]}' for i in unusual]
  return (f'sizes (height x width): {_range(sizes[:, 0])} x {_range(sizes[:, 1])}',
          *counted_list('of an unusual size or shape:', lines, LISTED))


def _range(values: np.ndarray) -> str:
  return f'{values.min()}' if values.min() == values.max() else f'{values.min()} to {values.max()}'


def _copies(looks: list[Look]) -> tuple[str, ...]:
  """The images that are equal, byte for byte, and how many of them are in more than one split."""
  by_digest = defaultdict(list)
  for look in looks:
    by_digest[look.digest].append(look)
  groups = [group for group in by_digest.values() if len(group) > 1]
  lines = [' = '.join(look.name for look in group) for group in groups]
  crossing = [splits for group in groups if len(splits := {look.split for look in group}) > 1]
  if not crossing:
    return counted_list('images are there more than once:', lines, LISTED)
  in_order = [split for split in dict.fromkeys(look.split for look in looks)
              if any(split in splits for splits in crossing)]
  warning = (f'{len(crossing):,} of these are in {" and in ".join(in_order)}: a score on images '
             'that were trained on is too good')
  return (*counted_list('images are there more than once:', lines, LISTED), warning)

"""`eqssl data check`: what a data set holds, and what is wrong with it."""
import hashlib
import pathlib
from collections import defaultdict
from typing import NamedTuple

import numpy as np

from equivariant_ssl.data import digits, folder, tfds
from equivariant_ssl.data.decode import DAMAGED, BadImage, decode, reading
from equivariant_ssl.data.encode import CANVAS
from equivariant_ssl.data.folder import printable
from equivariant_ssl.data.source import Content, Records, content, in_chunks, listed, moments, remarks, together

WIDE, SMALL = 4., .25   # a long side so many times the short one, a short side such a part of the usual, are odd
LISTED = 100            # of what is only worth a look


class Report(NamedTuple):
  """`lines` to print; `ok` is False where some image cannot be read."""
  lines: tuple[str, ...]
  ok: bool


class Look(NamedTuple):
  """One record: a digest of its bytes, its (height, width) and what there is to see, or why it cannot be read."""
  digest: bytes = b''
  size: tuple[int, int] = (0, 0)
  error: str = ''
  content: Content | None = None


class Options(NamedTuple):
  """As `data.folder.make` has them."""
  links: bool = False
  splits: bool = True
  background: str = 'black'
  bits: int = 16


def check(what: str, root: str = '', options: Options = Options()) -> Report:
  """Read all of a folder of images, of a TFDS data set (a name, or a prepared directory), or of `digits`.

  Raises UserError where there is nothing to check.
  """
  if what == 'digits':
    return check_digits()
  path = pathlib.Path(what).expanduser()
  if path.is_dir() and not (path / 'dataset_info.json').is_file():
    return check_folder(path, options)
  return check_tfds(what, root, options)


def check_digits() -> Report:
  """The bundled scans: nothing can be missing but scikit-learn itself."""
  source = digits.make()
  counts = f'{len(source.train.images):,} train, {len(source.test.images):,} test, {len(source.classes)} classes'
  return Report((f'digits: {counts}', 'ok'), True)


def check_folder(path: pathlib.Path, options: Options = Options()) -> Report:
  """Every image of a folder, decoded."""
  found, how = folder.read(path, .1, options.links, options.splits), reading(options.background, options.bits)
  parts = {split: folder.records(part, found.classes, how) for split, part in found.parts.items() if part.paths}
  not_read = [f'{printable(p)}: {why}' for p, why in found.index.bad if why.reason != DAMAGED]
  not_read += [f'{printable(p)}: {why}' for p, why in found.index.links]
  lost = found.index.damaged
  return report(printable(str(path)), parts, found.classes, found.lines('--links'), listed('damaged:', lost, len(lost)),
                listed('links, too large or no files, not read:', not_read, len(not_read)))


def check_tfds(what: str, root: str, options: Options = Options()) -> Report:
  """Every record of every split of a prepared TFDS data set, decoded."""
  builder = tfds.open_directory(tfds.find(what, root, '--root DIR'))
  image, label = tfds.keys(what, builder.info)
  how = reading(options.background, options.bits)
  parts = {split: tfds.records(builder, split, image, label, how=how) for split in builder.info.splits}
  names = tuple(builder.info.features[label].names) if label else None
  return report(str(builder.data_dir), parts, names)


def scan(records: Records) -> list[Look]:
  """Look at every record, in threads."""
  def look(data: bytes | BadImage) -> Look:
    try:
      canvas, size = decode(data, CANVAS, records.how)
      return Look(hashlib.sha256(data).digest(), size, content=content(canvas[None], moments(canvas[None])))
    except BadImage as e:
      return Look(error=str(e))

  return in_chunks(lambda indices: [look(data) for data in records.read(indices)], records.count)


def report(name: str, parts: dict[str, Records], classes: tuple[str, ...] | None, first: tuple[str, ...] = (),
           unreadable: tuple[str, ...] = (), notes: tuple[str, ...] = ()) -> Report:
  """Counts, what comes `first`, then what cannot be read (not ok), then what is worth a look."""
  looks = {split: scan(records) for split, records in parts.items()}
  lines = [f'{name}: ' + ', '.join(f'{len(found):,} {split}' for split, found in looks.items()), *first]
  for split, records in parts.items():
    if classes:
      unlabelled = (records.labels < 0).sum()
      counts = np.bincount(records.labels[records.labels >= 0], minlength=len(classes))
      lines.append(f'{split} classes: {_histogram(classes, counts)}' + f', none {unlabelled:,}' * bool(unlabelled))
  every = [(split, parts[split].names(i), look) for split, found in looks.items() for i, look in enumerate(found)]
  broken = [f'{record}: {look.error}' for _, record, look in every if look.error]
  whole = [one for one in every if not one[2].error]
  odd = remarks(together([look.content for _, _, look in whole]), '--') if whole else ()
  lines += [*odd, *unreadable, *listed('cannot be decoded:', broken, len(broken)), *notes, *_sizes(whole), *_copies(whole)]
  ok = not broken and not unreadable
  return Report((*lines, 'ok' if ok else 'not ok: the images named above are left out or replaced in training'), ok)


def _histogram(classes: tuple[str, ...], counts: np.ndarray) -> str:
  if len(classes) <= 20:
    return ', '.join(f'{printable(name)} {n:,}' for name, n in zip(classes, counts, strict=True))
  return f'{len(classes):,}, of {counts.min():,} to {counts.max():,} images'


def _sizes(whole: list[tuple[str, str, Look]]) -> tuple[str, ...]:
  """The range of the sizes, and the images far from the others."""
  if not whole:
    return ()
  sizes = np.array([look.size for _, _, look in whole])
  short, long = sizes.min(axis=1), sizes.max(axis=1)
  odd = np.flatnonzero((long > WIDE * short) | (short < SMALL * np.median(short)))
  named = [f'{whole[i][1]}: {sizes[i, 0]}x{sizes[i, 1]}' for i in odd]
  return (f'sizes (height x width): {_range(sizes[:, 0])} x {_range(sizes[:, 1])}',
          *listed('of an unusual size or shape:', named, LISTED))


def _range(values: np.ndarray) -> str:
  return f'{values.min()}' if values.min() == values.max() else f'{values.min()} to {values.max()}'


def _copies(whole: list[tuple[str, str, Look]]) -> tuple[str, ...]:
  """The images that are, byte for byte, another one; most of all those of both splits."""
  groups = defaultdict(list)
  for one in whole:
    groups[one[2].digest].append(one)
  groups = [group for group in groups.values() if len(group) > 1]
  across = [{split for split, _, _ in group} for group in groups if len({split for split, _, _ in group}) > 1]
  named = [' = '.join(record for _, record, _ in group) for group in groups]
  splits = [split for split in dict.fromkeys(split for split, _, _ in whole) if any(split in one for one in across)]
  crossing = (f'{len(across):,} of these are in {" and in ".join(splits)}: a score on '
              'images that were trained on is too good',) if across else ()
  return listed('images are there more than once:', named, LISTED) + crossing

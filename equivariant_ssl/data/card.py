"""The data card of a run: what the run knows of its data from its first step on.

It is kept in the run's data.json and in each of its checkpoints.
"""
import hashlib
import json
import pathlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from equivariant_ssl import renamed
from equivariant_ssl.data.cache import MOST
from equivariant_ssl.data.source import Source, Split, thread_count
from equivariant_ssl.data.stream import is_stream
from equivariant_ssl.errors import UserError
from equivariant_ssl.storage import record
from equivariant_ssl.types import Config

CARD_FILE = 'data.json'   # in the folder of a run
DECIMALS = 6         # the digits of a mean that are compared: its last bits depend on the CPU
CLASSES_LISTED = 3   # classes that a difference names
BLOCK_BYTES = 2**22  # canvases that are hashed at a time, in bytes


class SplitFacts(NamedTuple):
  """What a data card says of one split.

  A digest is 16 hexadecimal digits, or '' where it is unknown.

  count:  the number of images.
  files:  a digest of the names and the sizes in bytes of the files.
  labels: a digest of the labels; '' also where there are no labels.
  pixels: a digest of the decoded canvases; '' for a stream.
  """
  # The field is a key of data.json, and hides a method of tuple that nobody calls.
  count: int  # pyright: ignore[reportIncompatibleMethodOverride]
  files: str = ''
  labels: str = ''
  pixels: str = ''


class Card(NamedTuple):
  """The data card of a run.

  settings: the config's section `data`, which also holds the rule of the splits.
  classes:  the class names, or None where there are no labels.
  canvas:   the side of the stored images, in pixels.
  mean, std: the run normalizes its inputs by these for ever.
  images:   the number of training images from which the steps of an epoch are counted for ever.
  left_out: what was left out or replaced, in one line each.
  since:    the step at which the card was made. Nothing is known of the data before it.
  changes:  one line for each time that the user accepted other data.
  start:    {run, step, data} of the checkpoint from which a longer training started.
  labeled:  the split whose labels an evaluation reads, where that is not the training split. Its
            `files` is a digest of its classes.
  """
  name: str
  settings: dict[str, Any]
  train: SplitFacts
  test: SplitFacts | None
  classes: tuple[str, ...] | None
  canvas: int
  mean: tuple[float, ...]
  std: tuple[float, ...]
  images: int
  left_out: tuple[str, ...] = ()
  since: int = 0
  changes: tuple[str, ...] = ()
  start: dict[str, Any] | None = None
  labeled: SplitFacts | None = None


def digest(content: bytes) -> str:
  """A digest of bytes: 16 hexadecimal digits."""
  return hashlib.sha256(content).hexdigest()[:16]


def pixel_digest(images: np.ndarray) -> str:
  """A digest of uint8 canvases [N S S 3].

  Where the canvases are more than cache.MOST bytes, only every n-th canvas is read.
  """
  images = images[::-(-images.nbytes // MOST) or 1]
  rows = max(1, BLOCK_BYTES // max(images[:1].nbytes, 1))

  def block_hash(start: int) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(images[start:start + rows]).data).digest()

  with ThreadPoolExecutor(thread_count()) as pool:
    blocks = b''.join(pool.map(block_hash, range(0, len(images), rows)))
  return digest(repr(images.shape).encode() + blocks)


def describe_split(split: Split, files: str = '') -> SplitFacts:
  """What a card says of a split. files: the digest of the split's files, which its source made."""
  labels = ''
  if split.labels is not None:
    labels = digest(np.ascontiguousarray(split.labels, np.int32).tobytes())
  pixels = '' if is_stream(split.images) else pixel_digest(split.images)
  return SplitFacts(len(split.images), files, labels, pixels)


def make_card(source: Source, config: Config) -> Card:
  """The card of the data as they are now. config: the resolved config by which they were read."""
  train = describe_split(source.train, source.files[0])
  test = source.test and describe_split(source.test, source.files[1])
  classes = digest(repr(source.classes).encode())
  labeled = source.labeled and describe_split(source.labeled, classes)
  return Card(
      name=source.name, settings=json.loads(config.data.to_json()), train=train, test=test,
      classes=tuple(source.classes) if train.labels and source.classes else None,
      canvas=source.train.images.shape[1], mean=tuple(config.mean or source.mean),
      std=tuple(config.std or source.std), images=train.count, left_out=tuple(source.problems),
      labeled=labeled)


def has_labels(card: Card) -> bool:
  """Whether the data have labels that an evaluation can read."""
  return bool(card.classes or card.labeled and card.labeled.labels)


def card_facts(card: Card) -> dict[str, Any]:
  """All facts on which a number depends, by the names that a user knows them by."""
  def rounded(values: tuple[float, ...]) -> list[float]:
    return [round(float(value), DECIMALS) for value in values]

  named = {'classes': card.classes and list(card.classes), 'canvas': card.canvas,
           'mean': rounded(card.mean), 'std': rounded(card.std)}
  splits = {'training': card.train, 'test': card.test or SplitFacts(0)}
  splits |= {'labeled': card.labeled} if card.labeled else {}
  for name, part in splits.items():
    named |= {f'{name} {field}': value for field, value in part._asdict().items()}
  return named


def data_mark(card: Card) -> str:
  """A short digest of all on which a number depends.

  These are the fingerprints of the splits, the counts, the classes, the mean and the standard
  deviation. The place of the data is not among them.
  """
  # Results on disk have marks in which the split was spelled so; with others they would not count.
  facts = {name.replace('labeled ', 'labelled '): v for name, v in card_facts(card).items()}
  return digest(json.dumps(facts, sort_keys=True).encode())


def card_to_json(card: Card) -> dict[str, Any]:
  """The card as a JSON object."""
  parts = {'train': card.train, 'test': card.test, 'labeled': card.labeled}
  fields = card._asdict() | {name: part and part._asdict() for name, part in parts.items()}
  return json.loads(json.dumps(fields))


def card_from_json(content: dict[str, Any]) -> Card:
  """The card that `card_to_json` made `content` from. It leaves out the fields of a later version.

  Raises ValueError where `content` is not a card.
  """
  try:
    fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value
                              for key, value in renamed.card(content).items()
                              if key in Card._fields}
    for name in ('train', 'test', 'labeled'):
      if name in fields or name != 'labeled':  # cards of an older version have no `labeled`
        fields[name] = fields[name] and SplitFacts(**fields[name])
    return Card(**fields)
  except (AttributeError, KeyError, TypeError) as error:
    raise ValueError(f'this is not a data card: {error}') from None


def read_card(workdir: pathlib.Path) -> Card | None:
  """The card in a run's data.json, or None where there is none. UserError where it is damaged."""
  path = workdir / CARD_FILE
  fix = 'Restore it from a backup, or delete it: the next start makes a new one.'
  try:
    return card_from_json(record.read_json_object(path, fix))
  except FileNotFoundError:
    return None
  except ValueError as error:
    raise UserError(f'{path} is damaged: {error}.', fix) from None


def write_card(workdir: pathlib.Path, card: Card) -> None:
  """Write a run's data.json. A write that fails leaves the old file as it was."""
  text = json.dumps(card_to_json(card), indent=1, ensure_ascii=False) + '\n'
  record.write_atomically(workdir / CARD_FILE, text)


def _class_list(names: list[str]) -> str:
  listed = ', '.join(map(repr, names[:CLASSES_LISTED]))
  rest = len(names) - CLASSES_LISTED
  return f'{listed} and {rest} more' if rest > 0 else listed


def _class_differences(known: tuple[str, ...], now: tuple[str, ...]) -> list[str]:
  """How the classes differ from those that the run knows, in one line each."""
  lines = []
  for change, names, others in (('new', now, known), ('gone', known, now)):
    names = [name for name in names if name not in others]
    if names:
      subject, verb = ('classes', 'are') if len(names) > 1 else ('class', 'is')
      lines.append(f'{subject} {_class_list(names)} {verb} {change}')
  return lines or ['the classes are in another order']


def _split_differences(name: str, known: SplitFacts, now: SplitFacts) -> list[str]:
  """How the split `name` differs from the split that the run knows: one line, or none."""
  def differs(field: str) -> bool:
    old, new = getattr(known, field), getattr(now, field)
    return bool(old and new and old != new)

  if known.count != now.count:
    return [f'{now.count:,} {name} images in place of {known.count:,}']
  files_known = bool(known.files and now.files)
  if differs('files'):
    return [f'the {name} images have other names or sizes in bytes']
  # A stream replaces labels as it meets broken records. So where one of the two is a stream, and
  # the digests of the files say that they are the same, the labels are not compared.
  one_is_stream = bool(known.pixels) != bool(now.pixels)
  if differs('labels') and not (files_known and one_is_stream):
    return [f'the {name} images have other labels']
  if differs('pixels'):
    reason = ('; their files have the same names and sizes, so these were overwritten, or another '
              'version decoded them')
    return [f'the {name} images have other pixels' + (reason if files_known else '')]
  return []


def card_differences(known: Card, now: Card) -> list[str]:
  """How data as they are `now` differ from those that a run knows, in one line each.

  What is unknown of one of the two is not compared. [] where nothing differs.
  """
  lines = []
  if known.canvas != now.canvas:
    lines.append(f'canvases of side {now.canvas} in place of {known.canvas}')
  if known.classes and now.classes and known.classes != now.classes:
    lines += _class_differences(known.classes, now.classes)
  elif bool(known.classes) != bool(now.classes):
    lines.append('there are labels, and the run knows none' if now.classes else
                 'there are no labels, and the run knows some')
  for name, old, new in (('training', known.train, now.train), ('test', known.test, now.test),
                         ('labeled', known.labeled, now.labeled)):
    lines += _split_differences(name, old or SplitFacts(0), new or SplitFacts(0))
  return lines


def accept_data(known: Card, now: Card) -> Card:
  """The card of a run that accepts other data: `now`, with what a run keeps for ever from `known`.

  A run keeps its mean, its standard deviation, the number of images from which it counts epochs,
  and its history.
  """
  return now._replace(mean=known.mean, std=known.std, images=known.images or now.images,
                      since=known.since, changes=known.changes, start=known.start)

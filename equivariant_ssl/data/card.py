"""A run's data card: what it knows of its data from its first step on, in data.json and in each of its checkpoints."""
import hashlib
import json
import pathlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from equivariant_ssl.data.cache import MOST
from equivariant_ssl.data.source import Source, Split, threads
from equivariant_ssl.data.stream import lazy
from equivariant_ssl.errors import UserError
from equivariant_ssl.storage import record

FILE = 'data.json'  # in a run's folder
ROUND = 6  # digits of a mean that are compared: its last bits are a CPU's own
NAMED = 3  # classes that a difference names


class Part(NamedTuple):
  """A split: how many images, and short digests, '' where not known, of the `files` (names and sizes in bytes), of the
  `labels` (also '' where there are none) and of the `pixels` of the decoded canvases (not of a stream)."""
  count: int
  files: str = ''
  labels: str = ''
  pixels: str = ''


class Card(NamedTuple):
  """settings: the config's `data`, with the rule of the splits. classes: None where there are no labels. canvas: side of
  the stored images, pixels. mean, std: by which the run normalises its inputs, for ever. images: the number of training
  images from which its steps an epoch are counted, for ever. left_out: what was left out or replaced, a line each. since:
  the step at which the card was made: of the data before it nothing is known. changes: a line each time that other data
  were taken on purpose. start: {run, step, data} of the checkpoint that a longer training started from. labelled: the split
  whose labels an evaluation reads, where it is another than the training split; its `files` are its classes."""
  name: str
  settings: dict[str, Any]
  train: Part
  test: Part | None
  classes: tuple[str, ...] | None
  canvas: int
  mean: tuple[float, ...]
  std: tuple[float, ...]
  images: int
  left_out: tuple[str, ...] = ()
  since: int = 0
  changes: tuple[str, ...] = ()
  start: dict[str, Any] | None = None
  labelled: Part | None = None


def digest(content: bytes) -> str:
  """16 hexadecimal digits."""
  return hashlib.sha256(content).hexdigest()[:16]


def pixels(images: np.ndarray) -> str:
  """A digest of uint8 canvases [N S S 3], of every so many of them where they are more than cache.MOST bytes."""
  images = images[::-(-images.nbytes // MOST) or 1]
  rows = max(1, (1 << 22) // max(images[:1].nbytes, 1))
  of = lambda start: hashlib.sha256(np.ascontiguousarray(images[start:start + rows])).digest()
  with ThreadPoolExecutor(threads()) as pool:
    return digest(repr(images.shape).encode() + b''.join(pool.map(of, range(0, len(images), rows))))


def part(split: Split | None, files: str = '') -> Part | None:
  """What is known of a split; files: the digest of its files, which its source made."""
  if split is None:
    return None
  labels = '' if split.labels is None else digest(np.ascontiguousarray(split.labels, np.int32).tobytes())
  return Part(len(split.images), files, labels, '' if lazy(split.images) else pixels(split.images))


def of(source: Source, config: ConfigDict) -> Card:
  """The card of data as they are now, read by a resolved config."""
  settings = json.loads(config.data.to_json())
  train = part(source.train, source.files[0])
  return Card(source.name, settings, train, part(source.test, source.files[1]),
              tuple(source.classes) if train.labels and source.classes else None, source.train.images.shape[1],
              tuple(config.mean or source.mean), tuple(config.std or source.std), train.count, tuple(source.problems),
              labelled=part(source.labelled, digest(repr(source.classes).encode())))


def facts(card: Card) -> dict[str, Any]:
  """All that a number depends on, by what a user calls it."""
  near = lambda values: [round(float(v), ROUND) for v in values]
  found = {'classes': card.classes and list(card.classes), 'canvas': card.canvas, 'mean': near(card.mean),
           'std': near(card.std)}
  for name, one in (('training', card.train), ('test', card.test)):
    found |= {f'{name} {k}': v for k, v in (one or Part(0))._asdict().items()}
  found |= {f'labelled {k}': v for k, v in card.labelled._asdict().items()} if card.labelled else {}
  return found


def mark(card: Card) -> str:
  """A short digest of all that a number depends on: the fingerprints of the splits, counts, classes, mean and std. Where
  the data lie is not in it."""
  return digest(json.dumps(facts(card), sort_keys=True).encode())


def as_json(card: Card) -> dict[str, Any]:
  """The card as JSON holds it."""
  whole = card._asdict() | {k: one and one._asdict() for k, one in (
      ('train', card.train), ('test', card.test), ('labelled', card.labelled))}
  return json.loads(json.dumps(whole))


def from_json(found: dict[str, Any]) -> Card:
  """The card that `as_json` was given; ValueError where it is none. Fields of a later version are left out."""
  try:
    kept = {k: tuple(v) if isinstance(v, list) else v for k, v in found.items() if k in Card._fields}
    parts = {k: kept[k] and Part(**kept[k]) for k in ('train', 'test', 'labelled') if k in kept or k != 'labelled'}
    return Card(**kept | parts)
  except (AttributeError, KeyError, TypeError) as error:
    raise ValueError(f'no data card: {error}') from None


def read(workdir: pathlib.Path) -> Card | None:
  """The card in a run's data.json, None where there is none; UserError where it is damaged."""
  path, fix = workdir / FILE, 'Restore it from a backup, or delete it: the next start makes a new one.'
  try:
    return from_json(record.read_object(path, fix))
  except FileNotFoundError:
    return None
  except ValueError as error:
    raise UserError(f'{path} is damaged: {error}.', fix) from None


def write(workdir: pathlib.Path, card: Card) -> None:
  """Write a run's data.json, whole or not at all."""
  record.write_whole(workdir / FILE, json.dumps(as_json(card), indent=1, ensure_ascii=False) + '\n')


def _classes(known: tuple[str, ...], now: tuple[str, ...]) -> list[str]:
  more = lambda names: f' and {len(names) - NAMED} more' if len(names) > NAMED else ''
  named = lambda names: ', '.join(map(repr, names[:NAMED])) + more(names)
  found = [(verb, [c for c in ours if c not in others]) for verb, ours, others in (
      ('new', now, known), ('gone', known, now))]
  return [f'{"classes" if len(names) > 1 else "class"} {named(names)} {"are" if len(names) > 1 else "is"} {verb}'
          for verb, names in found if names] or ['the classes are in another order']


def differences(known: Card, now: Card) -> list[str]:
  """What data as they are `now` have other than those that a run knows; [] where all that is known of both is the same."""
  found = [] if known.canvas == now.canvas else [f'canvases of side {now.canvas} in place of {known.canvas}']
  if known.classes != now.classes and bool(known.classes) != bool(now.classes):
    found.append('labels, where there were none' if now.classes else 'no labels')
  elif known.classes != now.classes:
    found += _classes(known.classes, now.classes)
  for name, old, new in (('training', known.train, now.train), ('test', known.test, now.test),
                         ('labelled', known.labelled, now.labelled)):
    old, new = old or Part(0), new or Part(0)
    same = lambda field, old=old, new=new: not (getattr(old, field) and getattr(new, field)) or (
        getattr(old, field) == getattr(new, field))
    # A stream's labels are replaced as its broken records are met, so they are compared where nothing else says more.
    by_files = old.files and new.files and bool(old.pixels) != bool(new.pixels)
    if old.count != new.count:
      found.append(f'{new.count:,} {name} images in place of {old.count:,}')
    elif not same('files'):
      found.append(f'the {name} images have other names or sizes in bytes')
    elif not by_files and not same('labels'):
      found.append(f'the {name} images have other labels')
    elif not same('pixels'):
      why = ' in files of the same names and sizes, written over in place or decoded by another version'
      found.append(f'the {name} images have other pixels' + (why if old.files and new.files else ''))
  return found


def taken(known: Card, now: Card) -> Card:
  """The card of data as they are now of the run that `known` is of: what it normalises by and counts from is for ever."""
  return now._replace(mean=known.mean, std=known.std, images=known.images or now.images, since=known.since,
                      changes=known.changes, start=known.start)

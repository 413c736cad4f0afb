"""Protocol 'transfer': logistic regression on the frozen features of other data sets, one row each."""
import functools
import hashlib
import os
import pathlib
import shlex
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from equivariant_ssl import data, registry
from equivariant_ssl.data import archives, folder, source, tfds
from equivariant_ssl.data.source import Records, Split
from equivariant_ssl.errors import BAD_DATA, UserError
from equivariant_ssl.evaluate import inputs
from equivariant_ssl.evaluate.features import as_partial
from equivariant_ssl.evaluate.inputs import central
from equivariant_ssl.evaluate.linear import held_out
from equivariant_ssl.evaluate.logistic import logistic
from equivariant_ssl.evaluate.targets import BUILD, DATASETS, Target
from equivariant_ssl.storage import fingerprint
from equivariant_ssl.types import Array

VERSION = 4   # raise it when reading changes what the features are; what is shown has its own (inputs.VERSION)
CHUNK = 4096  # images decoded at a time: 100,000 of 224 pixels are more than a machine's memory


class Row(NamedTuple):
  """value: of `metric`, a fraction; top1: the same of top-1. note: images used, and those published."""
  name: str
  metric: str
  value: float
  top1: float
  protocol: str
  note: str


class Missing(NamedTuple):
  """A data set that is not on disk, and what to type."""
  name: str
  command: str


class Part(NamedTuple):
  """A split not yet read: `read(size)` gives it in pieces. mark: changes where its images do."""
  mark: str
  read: Callable[[int], Iterable[Split]]


class Opened(NamedTuple):
  """parts: {'train', 'test', and 'valid' where it has one of its own}."""
  target: Target
  classes: int
  parts: dict[str, Part]


def _digest(*lines: object) -> str:
  return hashlib.sha256('\n'.join(map(str, lines)).encode()).hexdigest()


def _stamps(files: Iterable[pathlib.Path]) -> list[tuple]:
  return [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(files)]


def _decoded(records: Records, size: int, place: pathlib.Path) -> Iterator[Split]:
  """The canvases of `records`, CHUNK at a time. Raises UserError (BAD_DATA) where more than 1 % cannot be read. place: of
  the data."""
  bad = 0
  for start in range(0, records.count, CHUNK):
    count = min(CHUNK, records.count - start)
    labels = None if records.labels is None else records.labels[start:start + count]
    read = lambda rows, start=start: records.read(range(start + rows.start, start + rows.stop))
    split, wrong = source.fill(Records(records.names, read, labels, count, how=records.how), size)
    bad += len(wrong)
    if source.too_many(bad, records.count) or len(wrong) == count:
      raise UserError(f'more than 1 % cannot be decoded: {records.names(start + wrong[0][0])}: {wrong[0][1]}.',
                      source.to_check(str(place)), BAD_DATA)
    yield split


def _in_memory(target: Target, found: source.Source) -> Opened:
  splits = {'train': found.train, 'test': found.test}
  if any(s is None or s.labels is None for s in splits.values()):
    raise UserError('it has no labelled test images.', 'Transfer needs labels.')
  return Opened(target, len(found.classes), {k: Part(_digest(fingerprint.of(s._asdict())), lambda size, s=s: (s,))
                                             for k, s in splits.items()})


def _of_folder(target: Target, base: pathlib.Path) -> Opened:
  """A folder as `data.folder` reads it; where it has validation and test images, the first to choose on."""
  read = folder.read(base, .1)
  folder.judge(base, read.index)
  for line in read.lines(''):
    print(f'{target.dataset or base}: {line}', file=sys.stderr)
  if read.classes is None:
    raise UserError(f'{read.notes[-1] if read.notes else "its images lie in no class folders"}.',
                    'Make train/CLASS/ and test/CLASS/.')
  found = read.parts
  parts = {'train': found['train'], 'test': found.get('test') or found.get('validation') or folder.Part(str(base), ())}
  parts |= {'valid': found['validation']} if {'validation', 'test'} <= set(found) else {}
  mark = lambda p: _digest(_stamps(pathlib.Path(p.root, path) for path in p.paths), read.classes)
  return Opened(target, len(read.classes), {
      k: Part(mark(p), lambda size, p=p: _decoded(folder.records(p, read.classes), size, base)) for k, p in parts.items()})


def _of_tfds(target: Target, path: pathlib.Path) -> Opened:
  builder = tfds.open_directory(path)
  image, label = tfds.keys(target.dataset, builder.info)
  if label is None:
    raise UserError('it has no class label among its features.', 'Transfer needs labels.')
  test = target.test if target.test in builder.info.splits else 'validation'
  splits = {'train': target.train, 'test': test, **({'valid': target.valid} if target.valid else {})}
  stamps = _stamps(f for f in path.iterdir() if f.is_file())
  read = lambda size, split: _decoded(tfds.records(builder, split, image, label), size, path)
  return Opened(target, len(builder.info.features[label].names), {
      k: Part(_digest(stamps, s, image, label), functools.partial(read, split=s)) for k, s in splits.items()})


def find(name: str, root: str = '') -> Opened | Missing:
  """Data set `name`, not read yet: of DATASETS (from TFDS, or root/NAME/train/CLASS/ and so on), a module of `data`, a
  folder of class folders, or TFDS's. Raises UserError where it has no labels."""
  base, target = tfds.default_root(root), DATASETS.get(name, Target(name))
  place = base / name if name in DATASETS else pathlib.Path(os.path.expanduser(name))
  given = name not in DATASETS and place.is_dir() and not (place / 'dataset_info.json').is_file()
  if given or (place / 'train').is_dir():
    return _of_folder(target, place)
  if name not in DATASETS and name in registry.names(data):
    return _in_memory(target, registry.make(data, name))
  try:
    path = tfds.find(target.dataset or name, root, '--root DIR')
  except tfds.NotPrepared:
    return Missing(name, _to_make(target, base))
  return _of_tfds(target, path)


def _to_make(target: Target, base: pathlib.Path) -> str:
  """What to type for a data set that is not on disk: without TensorFlow where that can be."""
  if target.prepare == BUILD and target.dataset in tfds.OWN:
    url = archives.FOUND_AT.get(target.dataset)
    return f'{tfds.OWN[target.dataset]} --root {shlex.quote(str(base))}' + (f'   (ARCHIVE: {url})' if url else '')
  return ' '.join(target.prepare.split()).format(dataset=target.dataset, root=shlex.quote(str(base)))


def check_targets(names: Iterable[str], root: str = '') -> None:
  """Raise UserError for a name that is of no target of `transfer`: no data set on disk or known to TFDS, no folder."""
  own = {*DATASETS, *registry.names(data)} - {'folder', 'tfds'}
  for name in names:
    if name in own or pathlib.Path(os.path.expanduser(name)).is_dir():
      continue
    try:
      tfds.find(name, root, '--root DIR')
    except tfds.NotPrepared as e:
      if name.partition(':')[0].split('/')[0] not in tfds.known():
        raise registry.unknown_name('protocol transfer', name, own) from e


def marks(names: tuple[str, ...], root: str = '') -> dict[str, dict[str, str] | None]:
  """{data set: {split: its mark}} of what `transfer` would read, None of what is not on disk."""
  found = {name: find(name, root) for name in names or tuple(DATASETS)}
  return {n: None if isinstance(f, Missing) else {k: part.mark for k, part in f.parts.items()} for n, f in found.items()}


def mark(encode: Callable[[Array], Array], size: int) -> str:
  """A digest of what `encode` does to images of `size`: of its program and its weights."""
  encode = as_partial(encode)
  abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), encode)
  program = jax.jit(lambda f, x: f(x)).lower(abstract, jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)).as_text()
  return _digest(program, fingerprint.of(encode))


def _kept(path: pathlib.Path | None, compute: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
  """The arrays in `path`, or computed and put there, all or nothing; a damaged file is computed again."""
  if path is None:
    return compute()
  try:
    with open(path, 'rb') as file, np.load(file) as stored:  # a CRC of each array is checked
      return {k: stored[k] for k in ('features', 'labels')}
  except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
    arrays = compute()
  path.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
    np.savez(os.path.join(scratch, 'new.npz'), **arrays)
    os.replace(os.path.join(scratch, 'new.npz'), path)
  return arrays


def _features(encode: Callable, part: Part, size: int, mesh: Mesh | None) -> dict[str, np.ndarray]:
  found = [(central(encode, split, size, mesh=mesh), split.labels) for split in part.read(size)]
  if not found or any(labels is None for _, labels in found):
    raise UserError('some images have no label.' if found else 'a split has no images.', 'Transfer needs labels.')
  return {k: np.concatenate(arrays) for k, arrays in zip(('features', 'labels'), zip(*found, strict=True), strict=True)}


def _row(name: str, opened: Opened, arrays: dict[str, tuple[np.ndarray, np.ndarray]], size: int) -> Row:
  (x, y), valid, target = arrays['train'], arrays.get('valid'), opened.target
  if len(np.unique(y)) < 2:
    raise UserError('all of its training images are of one class.', 'A classifier needs two classes or more.')
  found = logistic(x, y, *arrays['test'], opened.classes, valid, metric=target.metric, held=target.held)
  carved = int(held_out(y, target.held).sum()) if valid is None else 0
  used = f'{len(y) - carved:,} + {carved if valid is None else len(valid[1]):,} / {len(arrays["test"][1]):,}'
  note = used if target.note in ('', used) else f'{used}; published {target.note}'
  return Row(name, found.chosen['metric'], found.chosen['value'], found.top1, f'{found.protocol}, centre {size}', note)


def _held_out(arrays: dict[str, tuple[np.ndarray, np.ndarray]], share: float) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """`arrays` with `share` of each training class in the place of the test split."""
  x, y = arrays['train']
  out = held_out(y, share)
  if not out.any():
    raise UserError(f'no class has the {np.ceil(1 / share):.0f} training images of which one could be held out.',
                    'Read out on its test split: --readout test.')
  return arrays | {'train': (x[~out], y[~out]), 'test': (x[out], y[out])}


def transfer(encode: Callable[[Array], Array], names: tuple[str, ...], size: int, mesh: Mesh | None = None,
             root: str = '', cache: str = '', validation: float = 0.) -> tuple[list[Row], list[Missing]]:
  """The accuracy of `logistic.logistic` on the frozen features of each of `names` (see `find`; (): all of DATASETS).

  encode: a frozen encoder in eval mode, [B S S 3] in [0, 1] -> [B D]; best a Partial (features.in_batches). size:
  pixels of the central square. root: TFDS's folder. cache: a folder for features, kept by the encoder's weights and
  program and by the images. validation: > 0: read out on this share of each training class, in place of the
  test split. What is not on disk is returned beside the rows. Raises UserError, the data set's name first, where one is
  unknown, has no labels, one class or unreadable images, or a feature is not finite.
  """
  check_targets(names, root)
  rows, missing, by = [], [], mark(encode, size) if cache else ''
  for name in names or tuple(DATASETS):
    try:
      opened = find(name, root)
      if isinstance(opened, Missing):
        missing.append(opened)
        continue
      arrays = {}
      for split, part in opened.parts.items():
        if split == 'test' and validation:
          continue
        stem = f'{pathlib.Path(name).name}-{split}-{size}-{_digest(VERSION, inputs.VERSION, by, part.mark)[:32]}.npz'
        kept = _kept(pathlib.Path(os.path.expanduser(cache)) / stem if cache else None,
                     functools.partial(_features, encode, part, size, mesh))
        arrays[split] = kept['features'], kept['labels']
      rows.append(_row(name, opened, _held_out(arrays, validation) if validation else arrays, size))
    except UserError as e:
      raise UserError(f'{name}: {e}', code=e.code) from e
  return rows, missing

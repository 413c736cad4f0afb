"""Images that are arrays: those of a .npz file, and those that a program has in memory.

A program's images become a Source, which is written to a .npz file in the folder of the run that is
trained on it. So every command finds them again.
"""
import hashlib
import os
import pathlib
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from equivariant_ssl.data.channel_moments import measure_moments
from equivariant_ssl.data.decode import squash
from equivariant_ssl.data.holdout import held_out_mask
from equivariant_ssl.data.source import MEMORY, Source, Split
from equivariant_ssl.data.stream import is_stream, take_rows
from equivariant_ssl.errors import BAD_DATA, UserError

# The splits, and how the names of their arrays begin in a file.
SPLITS = {'train': '', 'test': 'test_', 'labeled': 'labeled_'}
OVERSHOOT = 1e-3  # by which floats may leave [0, 1], as those of a resized image do
FORMS = ('Give uint8 [N H W 3], or floats in [0, 1]; with labels (images, labels); with a test '
         "split {'train': (images, labels), 'test': (images, labels)}.")
KEYS = ('It holds the arrays images [N S S 3] uint8 and labels [N], and test_images and '
        'test_labels: np.savez(FILE, images=..., labels=...)')


def make(path: str = '', test: float = .1) -> Source:
  """The images of the .npz file at `path`, or of the one .npz file in the folder `path`.

  The file has the arrays `images`, uint8 [N H W 3], and, where there are labels, `labels` [N],
  numbers or names. `test_images` and `test_labels` are the test split. Without them, the share
  `test` of the images of each class is held out, always the same ones.

  Raises UserError where there is no such file, and where it is damaged or too large.
  """
  if not path:
    raise UserError('The data set arrays needs a .npz file.', '--config.data.path=FILE.npz')
  file = pathlib.Path(path).expanduser()
  files = sorted(file.glob('*.npz')) if file.is_dir() else [file]
  if len(files) != 1 or not files[0].is_file():
    raise UserError(f'{str(file)!r} is no .npz file, and no folder with one .npz file in it.',
                    'Say where the file is: --config.data.path=FILE.npz')
  arrays = _read(files[0])
  try:
    splits = {name: _stored_split(arrays, prefix) for name, prefix in SPLITS.items()
              if f'{prefix}images' in arrays}
    classes = arrays.get('classes')
    data = _source(pathlib.Path(files[0]).stem, splits,
                   None if classes is None else tuple(map(str, classes)),
                   tuple(tuple(map(float, arrays[k])) for k in ('mean', 'std') if k in arrays))
  except (KeyError, ValueError, UserError) as error:
    raise UserError(f'{files[0]} is not a file of images: {str(error).splitlines()[0]}', KEYS,
                    BAD_DATA) from error
  place = (('path', os.path.abspath(file)),)
  return _hold_out(data, test)._replace(place=place)


def _read(file: pathlib.Path) -> dict[str, np.ndarray]:
  """The arrays of a .npz file. No object in it is unpickled."""
  try:
    with zipfile.ZipFile(file) as archive:
      size = sum(info.file_size for info in archive.infolist())
    if size > MEMORY:
      raise UserError(f'{file} has {size:,} bytes of arrays, and at most {MEMORY:,} are kept in '
                      'memory.', 'A folder of images streams: --config.data.name=folder', BAD_DATA)
    with np.load(file, allow_pickle=False) as arrays:
      return dict(arrays)
  except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
    raise UserError(f'{file} is damaged or no .npz file: {str(error).splitlines()[0]}', KEYS,
                    BAD_DATA) from error


def _stored_split(arrays: dict[str, np.ndarray], prefix: str) -> Split:
  split = to_split((arrays[f'{prefix}images'], arrays.get(f'{prefix}labels')), 0)
  sizes = arrays.get(f'{prefix}sizes')
  if sizes is None:
    return split
  if sizes.shape != split.sizes.shape or not (sizes > 0).all():
    raise ValueError(f'{prefix}sizes has the shape {sizes.shape}')
  return split._replace(sizes=sizes.astype(np.float32))


def to_rgb_array(images: Any) -> np.ndarray:
  """Images as uint8 [N H W 3], or as float32 [N H W 3] in [0, 1], as they are given.

  images: an array [N H W 3], or [N H W] and [N H W 1] of gray. Raises UserError for other shapes,
  other kinds of numbers, and floats that are not in [0, 1].
  """
  images = np.asarray(images)
  if images.ndim == 3 and images.shape[2] != 3:
    images = images[..., None]
  if images.ndim != 4 or images.shape[3] not in (1, 3) or 0 in images.shape:
    one = ' A single image is images[None].' if images.ndim == 3 else ''
    raise UserError(f'images have the shape {images.shape}, not [N H W 3].{one}', FORMS)
  if np.issubdtype(images.dtype, np.floating):
    low, high = float(images.min()), float(images.max())
    if not (low >= -OVERSHOOT and high <= 1 + OVERSHOOT):  # also where one is not a number
      raise UserError(f'images are floats from {low:g} to {high:g}, and not in [0, 1].',
                      'Divide floats from 0 to 255 by 255, or give uint8.')
    images = np.clip(images.astype(np.float32), 0., 1.)
  elif images.dtype != np.uint8:
    raise UserError(f'images are {images.dtype}, neither uint8 nor floats in [0, 1].',
                    "Whole numbers from 0 to 255: images.astype('uint8')")
  return np.broadcast_to(images, (*images.shape[:3], 3))


def _to_uint8(images: np.ndarray) -> np.ndarray:
  return images if images.dtype == np.uint8 else np.rint(images * 255.).astype(np.uint8)


def to_split(data: Any, size: int) -> Split:
  """A split of images, (images, labels), or a sequence of examples.

  An example of a sequence is an image [H W 3], (image, label), or a dict with 'image' and 'label'.
  Square images of one size stay as they are. Others become canvases of side `size`; 0 stands for
  the shorter side of the first image. Raises UserError.
  """
  images, labels = data if isinstance(data, tuple) and len(data) == 2 else (data, None)
  if not hasattr(images, 'shape') and not isinstance(images, list):
    images, labels = _read_examples(images)
  canvases, sizes = _to_canvases(images, size)
  labels = None if labels is None else np.asarray(labels)
  if labels is not None and labels.shape != (len(canvases),):
    raise UserError(f'there are {len(canvases)} images, and labels of shape {labels.shape}.', FORMS)
  return Split(canvases, sizes, labels)


def _to_canvases(images: Any, size: int) -> tuple[np.ndarray, np.ndarray]:
  """The canvases uint8 [N S S 3] and true sizes [N 2] of an array, or of a list of images."""
  if hasattr(images, 'shape') and len(images):
    rows: Any = to_rgb_array(images)
  else:
    rows = [to_rgb_array(np.asarray(image)[None])[0] for image in images]
  if not len(rows):
    raise UserError('There are no images.', FORMS)
  sizes = np.array([row.shape[:2] for row in rows], np.float32)
  if (sizes == sizes[0, 0]).all():
    return _to_uint8(np.asarray(rows)), sizes
  side = size or int(sizes[0].min())
  canvases = [squash(Image.fromarray(_to_uint8(row)), side) for row in rows]
  return np.stack([np.asarray(canvas) for canvas in canvases]), sizes


def _read_examples(sequence: Any) -> tuple[list, list | None]:
  """(images, labels or None) of a sequence with a length, as grain, TFDS and torch have it."""
  if not (hasattr(sequence, '__len__') and hasattr(sequence, '__getitem__')):
    raise UserError(f'{type(sequence).__name__} is no array of images, and no sequence with a '
                    'length.', FORMS)
  images, labels = [], []
  for i in range(len(sequence)):
    example = sequence[i]
    if isinstance(example, Mapping):
      example = (example['image'], example['label']) if 'label' in example else example['image']
    image, label = example if isinstance(example, tuple) else (example, None)
    images.append(np.asarray(image))
    labels.append(label)
    if sum(image.nbytes for image in images[:1]) * len(images) > MEMORY:
      raise UserError(f'the first {len(images):,} images take {MEMORY / 2**30:.0f} GiB of memory.',
                      'Write a module of your own that streams: --config.data.name=my_pkg.data')
  return images, None if any(label is None for label in labels) else labels


def to_source(data: Any, size: int) -> Source:
  """A Source of images in memory. `data` is a Source, what `to_split` takes, or {split: that}.

  The splits are 'train', and 'test' where there is one. size: as in `to_split`. Raises UserError.
  """
  if isinstance(data, Source):
    if is_stream(data.train.images):
      raise UserError(f'{data.name} streams: its images are not in memory.',
                      'Name the module that makes it: --config.data.name=my_pkg.data')
    return data
  data = data if isinstance(data, Mapping) else {'train': data}
  if 'train' not in data or set(data) - set(SPLITS):
    raise UserError(f'the splits are {sorted(data)}, and not train and test.', FORMS)
  splits = {name: to_split(part, size) for name, part in data.items()}
  sides = {split.images.shape[1] for split in splits.values()}
  if len(sides) > 1:
    raise UserError(f'the splits have images of {sorted(sides)} pixels.', FORMS)
  return _source('arrays', splits, None, ())


def _source(name: str, splits: dict[str, Split], classes: tuple[str, ...] | None, moments: tuple
            ) -> Source:
  """The Source of splits whose labels are numbers from 0, or names. classes, moments: if known."""
  present = [split.labels for split in splits.values() if split.labels is not None]
  if present and classes is None:
    values = np.unique(np.concatenate(present))
    if np.issubdtype(values.dtype, np.integer):
      if values[0] < 0:
        raise UserError(f'a label is {values[0]}.', 'Labels count from 0, or are names.')
      classes = tuple(map(str, range(values[-1] + 1)))
    else:
      classes = tuple(map(str, values))
  numbers = {name: number for number, name in enumerate(classes or ())}

  def numbered(split: Split) -> Split:
    labels = split.labels
    if labels is not None and not np.issubdtype(labels.dtype, np.integer):
      labels = np.array([numbers[str(label)] for label in labels])
    return split._replace(labels=None if labels is None else labels.astype(np.int32))
  parts = {name: numbered(split) for name, split in splits.items()}
  known = moments if len(moments) == 2 else None
  measured, remarks = measure_moments(known, lambda: parts['train'].images)
  return Source(name, parts['train'], parts.get('test'), classes, *measured, remarks,
                labeled=parts.get('labeled'))


def _hold_out(source: Source, share: float) -> Source:
  """`source` with a share of the images of each class as its test split, where it has none."""
  if source.test or not share:
    return source
  count, labels = len(source.train.images), source.train.labels
  mask = held_out_mask(np.zeros(count, np.int32) if labels is None else labels, share)
  train, test = (take_rows(source.train, np.flatnonzero(rows)) for rows in (~mask, mask))
  return source._replace(train=train, test=test if mask.any() else None)


def save(source: Source, folder: pathlib.Path) -> pathlib.Path:
  """Write a Source in memory to a .npz file in `folder`, and return the file's path.

  The file is named by a digest of what is in it: where it is there already, nothing is written.
  """
  arrays: dict[str, Any] = {'mean': np.array(source.mean), 'std': np.array(source.std)}
  for name, prefix in SPLITS.items():
    split: Split | None = getattr(source, name)
    if split is not None:
      fields = {field: value for field, value in split._asdict().items() if value is not None}
      arrays |= {f'{prefix}{field}': np.asarray(value) for field, value in fields.items()}
  if source.classes:
    arrays['classes'] = np.array(source.classes)
  digest = hashlib.sha256()
  for name, array in sorted(arrays.items()):
    digest.update(f'{name} {array.dtype} {array.shape}'.encode())
    digest.update(array.tobytes())
  path = folder / f'arrays-{digest.hexdigest()[:12]}.npz'
  if not path.is_file():
    folder.mkdir(parents=True, exist_ok=True)
    scratch = folder / f'.{path.name}.part'
    with open(scratch, 'wb') as file:
      np.savez(file, **arrays)
    os.replace(scratch, path)
  return path

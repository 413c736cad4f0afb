"""`eqssl embed` writes the features of images to a file.

`eqssl neighbors` finds the images of such a file that are nearest to an image.
"""
import functools
import os
import pathlib
import shlex
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jax.tree_util import Partial

from equivariant_ssl.data import card, folder, layout, source
from equivariant_ssl.data.decode import PixelRules, pixel_rules
from equivariant_ssl.data.folder_index import as_text
from equivariant_ssl.data.image_header import FORMATS, BadImage
from equivariant_ssl.encoder import open_run
from equivariant_ssl.errors import BAD_DATA, USAGE, UserError
from equivariant_ssl.evaluate.frozen import frozen, variables
from equivariant_ssl.evaluate.inputs import central_features
from equivariant_ssl.evaluate.result_files import weights_digest
from equivariant_ssl.evaluate.statistics import quantity
from equivariant_ssl.evaluate.subject import process_state
from equivariant_ssl.parallel import processes, sharding
from equivariant_ssl.report import embeddings, page
from equivariant_ssl.report.embeddings import ImageFeatures, Origin
from equivariant_ssl.report.gallery import picture_block, read_image
from equivariant_ssl.report.pictures import Tile, nearest, upright
from equivariant_ssl.storage import checkpoint

CHUNK = 1024     # images that are decoded at a time: 150 MB of 224 x 224 pixels
BATCH = 256
THUMBNAIL = 192  # pixels of a picture's longer side
K = 10           # neighbors where the user gives no number


class ImageEncoder(NamedTuple):
  """The encoder of a checkpoint.

  encode: images [B S S 3] in [0, 1] -> features [B D]. size: S, in pixels.
  origin: the checkpoint. rules: how the pixels of the run's data are read.
  """
  encode: Partial
  size: int
  mesh: Mesh
  origin: Origin
  rules: PixelRules = PixelRules()


def _encoder(workdir: pathlib.Path, step: int | None = None, place: str = '') -> ImageEncoder:
  """Return the encoder of a run's newest valid checkpoint, or of the checkpoint of `step`.

  The mean and the standard deviation of its inputs are those of its data card.
  place: where the data of a run without a data card are now.
  """
  run, number, state = open_run(workdir, step, place)
  origin = Origin(str(workdir), number, weights_digest(state), card.data_mark(run.card))
  mesh = run.mesh if jax.process_count() == 1 else sharding.mesh(jax.local_devices())
  encode = Partial(frozen(run.recipe).encode, variables(process_state(state)))
  return ImageEncoder(encode, run.recipe.size, mesh, origin, _reading(run.config))


def _reading(config: Any) -> PixelRules:
  """Return how the pixels of a run's data are read. config: a resolved config."""
  return pixel_rules(**{k: config.data[k] for k in PixelRules._fields if k in config.data})


def _list_images(images: str, links: bool = False) -> tuple[folder.SplitFiles, str, list[str]]:
  """Return the images to read, the folder that their names begin with, and a line for each image
  that cannot be read.

  links: whether links are followed. The first line on stderr counts, by reason, what is left out of
  a folder.
  """
  path = os.path.expanduser(images)
  if os.path.isfile(path):
    real = os.path.realpath(path)  # the user named the file, so a link may lead anywhere
    return folder.SplitFiles(os.path.dirname(real), (os.path.basename(real),)), '', []
  if not os.path.isdir(path):
    raise UserError(f'{images!r} is no file and no folder.',
                    'Name an image, or a folder of images.')
  index = folder.index_folder(path, links)
  for line in folder.left_out_lines(index, '--links'):
    print(line, file=sys.stderr)
  if not index.paths:
    raise UserError(f'{images!r} has no image that can be read, and {len(index.bad):,} that '
                    'cannot.', f'Images end in {" ".join(folder.EXTENSIONS)}.',
                    BAD_DATA if index.damaged else USAGE)
  lines = [f'{folder.printable(os.path.join(images, p))}: {reason}'
           for p, reason in (*index.bad, *index.links)]
  return folder.SplitFiles(path, index.paths, index.within), images, lines


def _encode_part(encoder: ImageEncoder, part: folder.SplitFiles, batch: int
                 ) -> tuple[np.ndarray, np.ndarray, list[tuple[int, str]]]:
  """Return the readable rows of `part`, their features [N D], and (row, reason) of the others."""
  split, bad = source.decode_records(folder.folder_records(part, None, encoder.rules), encoder.size)
  good = np.delete(np.arange(len(part.paths)), [i for i, _ in bad])
  if not len(good):
    return good, np.zeros((0, 0), np.float32), bad
  split = source.Split(split.images[good], split.sizes[good], None)
  return good, central_features(encoder.encode, split, encoder.size, batch, encoder.mesh), bad


def _encode_shares(encoder: ImageEncoder, part: folder.SplitFiles, batch: int
                   ) -> Iterator[tuple[list[int], np.ndarray, list[tuple[int, str]]]]:
  """Yield what `_encode_part` returns of the rows of `part`, CHUNK by CHUNK.

  The processes of a job each encode their own share of the chunks, and all of them get all results.
  """
  count, number = jax.process_count(), jax.process_index()
  for first in range(0, len(part.paths), CHUNK * count):
    paths = part.paths[first + number * CHUNK:first + (number + 1) * CHUNK]
    good, features, bad = processes.together(
        functools.partial(_encode_part, encoder, part._replace(paths=paths), batch))
    start = first + number * CHUNK
    rows = processes.gather(([start + int(i) for i in good], [(start + i, why) for i, why in bad]))
    for (good_rows, bad_rows), array in zip(rows, processes.gather_rows(features), strict=True):
      yield good_rows, array, bad_rows


def _check_out(target: pathlib.Path) -> None:
  """Raise UserError where an embedding file cannot be written to `target`."""
  embeddings.form(target)
  page.check_target(target, f'features{target.suffix}')
  if not target.parent.is_dir():
    raise UserError(f'{target.parent} is no folder.',
                    f'Type: mkdir -p {shlex.quote(str(target.parent))}')


def embed(workdir: str | pathlib.Path, images: str, out: str, step: int | None = None,
          place: str = '', links: bool = False) -> int:
  """Write the paths and features of one image, or of all images in a folder, to the file `out`.

  A .npz has the arrays paths, classes and features, a .csv the columns path, class, f0, f1 and so
  on, a .parquet the columns path, class and features. The class is the image's folder within its
  split, '' for an image in none; training has labels only where every image has one. The features
  are those of the central square at the run's size, as `eqssl eval --protocol transfer` computes
  them. CHUNK canvases are in memory at a time.

  place: see `_encoder`. links: whether links to folders, and to files elsewhere, are followed. In a
  job of several processes each encodes its share of the images, and process 0 writes.
  Returns how many images were left out; stderr has a line for each.
  Raises UserError for another ending, before it computes, and where no image can be read.
  """
  workdir, target = pathlib.Path(workdir), pathlib.Path(out)
  _check_out(target)
  (root, paths, within), base, lines = _list_images(images, links)
  encoder, names, features = _encoder(workdir, step, place), [], []
  classes, class_names = [], layout.classes_of(paths, base)

  def name(path: str) -> str:
    return os.path.join(base, path) if base else images

  processes.agree('the images', {'number': len(paths), 'first': paths[0], 'last': paths[-1]})
  part, read = folder.SplitFiles(root, paths, within), 0
  for good, part_features, bad in _encode_shares(encoder, part, min(BATCH, len(paths))):
    names += [as_text(name(paths[i])) for i in good]
    classes += [class_names[i] for i in good]
    features += [part_features] if len(good) else []
    lines += [f'{folder.printable(name(paths[i]))}: {reason}' for i, reason in bad]
    read += len(good) + len(bad)
    if len(paths) > CHUNK and processes.is_main():
      print(f'{read:,} of {len(paths):,} images')
  for line in lines if processes.is_main() else ():
    print(line, file=sys.stderr)
  if not names:
    raise UserError(f'{images!r} has no image that can be read.', 'The lines above say why.',
                    BAD_DATA)
  result = ImageFeatures(names, np.concatenate(features), encoder.origin, classes)
  processes.from_main(lambda: embeddings.save(target, result))
  left_out = f'; {len(lines):,} left out, listed above' if lines else ''
  if processes.is_main():
    print(f'{quantity(len(names), "image")}, {quantity(result.features.shape[1], "feature")} each, '
          f'of {encoder.origin.name}, written to {out}{left_out}.')
    if len(names) > 1:
      print('Next:', shlex.join(['eqssl', 'neighbors', out, names[0], '--html', 'nearest.html']))
  return len(lines)


def _query(stored: ImageFeatures, file: str, query: str, workdir: str | None, place: str
           ) -> tuple[np.ndarray, int | None]:
  """Return the features [D] of the image `query`, and its row where the file has the image.

  stored: the embeddings in `file`. workdir: the run that computes the features of another image.
  """
  path = os.path.abspath(query)
  row = next((i for i, p in enumerate(stored.paths) if os.path.abspath(p) == path), None)
  if row is not None:
    return stored.features[row], row
  if not workdir:
    raise UserError(f'{query!r} is not among the {quantity(len(stored.paths), "image")} of {file}.',
                    f'Name one of its paths, for example {stored.paths[0]}. For any other image, '
                    'add the run that made the file: --run DIR')
  if not os.path.isfile(os.path.expanduser(query)):
    raise UserError(f'{query!r} is no file.',
                    f'Name an image, or a path of {file}, for example {stored.paths[0]}')
  part, _, _ = _list_images(query)
  encoder = _file_encoder(stored, file, pathlib.Path(workdir), place)
  _, features, bad = _encode_part(encoder, part, 1)
  if bad:
    raise UserError(f'{query}: {bad[0][1]}.', f'Name a {FORMATS} file.')
  D = stored.features.shape[1]
  if features.shape[1] != D:
    raise UserError(f'{file} has {quantity(D, "feature")} per image, and {encoder.origin.name} '
                    f'computes {features.shape[1]}.', 'Name the run that made the file: --run DIR')
  return features[0], None


def _file_encoder(stored: ImageFeatures, file: str, workdir: pathlib.Path, place: str
                  ) -> ImageEncoder:
  """Return the encoder of a run, at the step that made `file` if the run still has that step.

  Raises UserError where the file says that another network, or another data card, made it.
  """
  origin = stored.origin
  step = None
  if origin and origin.step in checkpoint.saved_steps(workdir / 'checkpoints'):
    step = origin.step
  encoder = _encoder(workdir, step, place)
  again = f'eqssl embed {shlex.quote(str(workdir))} IMAGES --out {shlex.quote(file)}'
  if origin and origin.digest != encoder.origin.digest:
    raise UserError(f'{file} was made by {origin.name}, and {encoder.origin.name} has other '
                    'weights.', 'Name the run that made the file: --run '
                    f'{shlex.quote(origin.run)}; or make the file again: {again}')
  if origin and origin.mark and origin.mark != encoder.origin.mark:
    raise UserError(f'{file} was made with another data card than that of {encoder.origin.name}, '
                    'so its images were normalized with other statistics.',
                    f'Make the file again: {again}')
  return encoder


def _tile(path: str, *lines: str) -> Tile:
  """Return the picture of a file, or a gray square where the picture cannot be shown."""
  try:
    canvas, size = read_image(os.path.expanduser(path), THUMBNAIL)
    return Tile(upright(canvas, size), (*lines, path))
  except BadImage as e:
    gray = np.full((THUMBNAIL, THUMBNAIL, 3), 128, np.uint8)
    return Tile(gray, (*lines, path, f'not shown: {e}'))


def _write_page(out: pathlib.Path, file: str, count: int, query: str,
                near: list[tuple[str, float]]) -> None:
  """Write a page with the pictures of a query and of its neighbors.

  count: how many images `file` has. near: (path, cosine) of the neighbors, nearest first.
  """
  tiles = [_tile(query, 'query')]
  tiles += [_tile(path, f'{rank}. cosine {cosine:.3f}')
            for rank, (path, cosine) in enumerate(near, 1)]
  about = (f'The neighbors are those of the {quantity(count, "image")} of {file} whose features '
           'have the largest cosine.')
  pictures = picture_block('Nearest first', 'The query, then its neighbors.', [tiles])
  title = f'The {quantity(len(near), "image")} nearest to {os.path.basename(query)}'
  html = page.render(title, about, [page.Section('Neighbors', 'neighbors', [pictures])],
                     {'query': query, 'neighbors': near})
  page.save(out, html)


def find_neighbors(file: str, query: str, k: int | None = None, workdir: str | None = None,
               out: str | None = None, place: str = '') -> list[tuple[str, float]]:
  """Print the rank, cosine and path of the `k` images of an embedding file that are nearest to an
  image, and return (path, cosine) of each.

  query: a path of the file, which is no neighbor of itself; or, with `workdir`, any image.
  k: None means K, or all images where there are fewer. workdir: the run that made the file.
  out: also write a page with the pictures to this file. place: see `_encoder`.
  Raises UserError for a query that is missing, for another run than the file's, and for a k that is
  larger than the number of images.
  """
  if out:
    page.check_target(pathlib.Path(out))
  stored = embeddings.read(pathlib.Path(file))
  vector, row = _query(stored, file, query, workdir, place)
  count, other = len(stored.paths) - (row is not None), 'other ' if row is not None else ''
  if not count:
    raise UserError(f'{file} has no other image than {query!r}.',
                    'Embed a folder: eqssl embed DIR IMAGES --out FILE')
  k = min(K, count) if k is None else k
  if not 1 <= k <= count:
    raise UserError(f'--k is {k}, and {file} has {quantity(count, f"{other}image")}.',
                    f'Give a number from 1 to {count}.')
  order, cosines = nearest(vector[None], stored.features, k + 1)
  near = [(stored.paths[i], float(c)) for i, c in zip(order[0], cosines[0], strict=True)
          if i != row][:k]
  print('rank  cosine of the features (1 is the same direction), and image')
  for rank, (path, cosine) in enumerate(near, 1):
    print(f'{rank:4d}  {cosine:6.3f}  {folder.printable(path)}')
  if out:
    _write_page(pathlib.Path(out), file, len(stored.paths), query, near)
    print(f'Written to {out}')
  return near

"""`eqssl embed`: the features of any images as a file; `eqssl neighbours`: the images nearest to one of them."""
import os
import pathlib
import shlex
import sys
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh
from jax.tree_util import Partial
from ml_collections import ConfigDict

from equivariant_ssl.data import card as cards
from equivariant_ssl.data import folder, source
from equivariant_ssl.data.decode import FORMATS, BadImage, Reading, reading
from equivariant_ssl.errors import BAD_DATA, UserError
from equivariant_ssl.evaluate.frozen import frozen, variables
from equivariant_ssl.evaluate.inputs import central
from equivariant_ssl.evaluate.result_files import digest
from equivariant_ssl.evaluate.statistics import counted
from equivariant_ssl.report import embeddings, page
from equivariant_ssl.report.embeddings import Embeddings, Made
from equivariant_ssl.report.gallery import block, opened
from equivariant_ssl.report.pictures import Tile, nearest, upright
from equivariant_ssl.storage import checkpoint
from equivariant_ssl.training import runs

CHUNK = 1024     # images decoded at a time: 150 MB of 224 x 224 pixels
BATCH = 256
THUMBNAIL = 192  # longer side, pixels
K = 10           # neighbours where none are asked for


class Encoder(NamedTuple):
  """encode: images [B S S 3] in [0, 1] -> features [B D]. size: S. made: the checkpoint that it is of. how: the pixels of
  its data are read."""
  encode: Partial
  size: int
  mesh: Mesh
  made: Made
  how: Reading = Reading()


def _encoder(workdir: pathlib.Path, step: int | None = None, place: str = '') -> Encoder:
  """The encoder of a run's newest valid checkpoint, or that of `step`; the mean and std of its inputs are of its data card.
  place: where the data of a run without one are now."""
  say = lambda line: print(line, file=sys.stderr)
  run = runs.reopen(workdir, None, say, runs.Asked(place), needs_data=False)
  number, state, meta = checkpoint.load(workdir / 'checkpoints', runs.abstract(run), step)
  card = cards.from_json(meta['data']) if 'data' in meta else run.card
  return Encoder(Partial(frozen(run.recipe).encode, variables(state)), run.recipe.size, run.mesh,
                 Made(str(workdir), number, digest(state), cards.mark(card)), _reading(run.config))


def _reading(config: ConfigDict) -> Reading:
  """How the pixels of a run's data are read."""
  return reading(**{k: config.data[k] for k in Reading._fields if k in config.data})


def _listed(images: str, links: bool = False) -> tuple[folder.Part, str, list[str]]:
  """(the images to read, the folder that their names begin with, a line for each that cannot be read). links: follow
  them. What is left out of a folder is counted by reason in a first line on stderr."""
  path = os.path.expanduser(images)
  if os.path.isfile(path):
    real = os.path.realpath(path)  # named by the user: a link may lead anywhere
    return folder.Part(os.path.dirname(real), (os.path.basename(real),)), '', []
  if not os.path.isdir(path):
    raise UserError(f'{images!r} is no file and no folder.', 'Give an image, or a folder of images.')
  found = folder.index(path, links)
  for line in folder.said(found, '--links'):
    print(line, file=sys.stderr)
  if not found.paths:
    raise UserError(f'{images!r} has no image that can be read, and {len(found.bad):,} that cannot.',
                    f'Images end in {" ".join(folder.EXTENSIONS)}.')
  lines = [f'{folder.printable(os.path.join(images, p))}: {why}' for p, why in found.bad]
  return folder.Part(path, found.paths, found.within), images, lines + [
      f'{folder.printable(os.path.join(images, link))}: {why}' for link, why in found.links]


def _encoded(encoder: Encoder, part: folder.Part, batch: int) -> tuple[np.ndarray, np.ndarray, list[tuple[int, str]]]:
  """(the rows of `part` that can be read, their features [N D], (row, why) of the others)."""
  split, bad = source.fill(folder.records(part, None, encoder.how), encoder.size)
  good = np.delete(np.arange(len(part.paths)), [i for i, _ in bad])
  if not len(good):
    return good, np.zeros((0, 0), np.float32), bad
  split = source.Split(split.images[good], split.sizes[good], None)
  return good, central(encoder.encode, split, encoder.size, batch, encoder.mesh), bad


def _text(path: str) -> str:
  """A file's name as every form can hold it."""
  return os.fsencode(path).decode('utf-8', 'backslashreplace')


def embed(workdir: str | pathlib.Path, images: str, out: str, step: int | None = None, place: str = '', links: bool = False
          ) -> int:
  """Write the paths and features of one image, or of all in a folder, to `out` (.npz: paths, features; .csv: path, f0,
  f1 and so on; .parquet: path, features); how many were left out, each with a line on stderr.

  Features are those of the central square, at the run's size, as `eqssl eval --protocol transfer` has them; CHUNK
  canvases are in memory at a time. place: see `_encoder`. links: follow those to folders, and to files elsewhere. Raises
  UserError for another ending, before anything is computed, and where no image can be read.
  """
  workdir, target = pathlib.Path(workdir), pathlib.Path(out)
  embeddings.form(target)
  page.check(target, f'features{target.suffix}')
  if not target.parent.is_dir():
    raise UserError(f'{target.parent} is no folder.', f'mkdir -p {shlex.quote(str(target.parent))}')
  (root, paths, within), base, lines = _listed(images, links)
  encoder, names, parts = _encoder(workdir, step, place), [], []
  name = lambda path: os.path.join(base, path) if base else images
  for start in range(0, len(paths), CHUNK):
    part = folder.Part(root, paths[start:start + CHUNK], within)
    good, features, bad = _encoded(encoder, part, min(BATCH, len(paths)))
    names += [_text(name(part.paths[i])) for i in good]
    parts += [features] if len(good) else []
    lines += [f'{folder.printable(name(part.paths[i]))}: {why}' for i, why in bad]
    if len(paths) > CHUNK:
      print(f'{min(start + CHUNK, len(paths)):,} of {len(paths):,} images')
  for line in lines:
    print(line, file=sys.stderr)
  if not names:
    raise UserError(f'{images!r} has no image that can be read.', 'The lines above say why.', BAD_DATA)
  found = Embeddings(names, np.concatenate(parts), encoder.made)
  embeddings.save(target, found)
  left = f'; {len(lines):,} left out, listed above' if lines else ''
  print(f'{counted(len(names), "image")}, {counted(found.features.shape[1], "feature")} each, of {encoder.made.name}, '
        f'written to {out}{left}.')
  return len(lines)


def _query(found: Embeddings, file: str, query: str, workdir: str | None, place: str) -> tuple[np.ndarray, int | None]:
  """The features [D] of `query`, and its row where it is one of the file."""
  here = os.path.abspath(query)
  row = next((i for i, path in enumerate(found.paths) if os.path.abspath(path) == here), None)
  if row is not None:
    return found.features[row], row
  if not workdir:
    raise UserError(f'{query!r} is not among the {counted(len(found.paths), "image")} of {file}.',
                    f'Give one of its paths, e.g. {found.paths[0]}; or, for any image, the run that made it: --run DIR')
  if not os.path.isfile(os.path.expanduser(query)):
    raise UserError(f'{query!r} is no file.', f'Give an image, or a path of {file}, e.g. {found.paths[0]}')
  part, _, _ = _listed(query)
  encoder = _maker(found, file, pathlib.Path(workdir), place)
  _, features, bad = _encoded(encoder, part, 1)
  if bad:
    raise UserError(f'{query}: {bad[0][1]}.', f'Give a {FORMATS} file.')
  D, made = found.features.shape[1], features.shape[1]
  if made != D:
    raise UserError(f'{file} has {counted(D, "feature")} an image, and {encoder.made.name} makes {made}.',
                    'Give the run that made it: --run DIR')
  return features[0], None


def _maker(found: Embeddings, file: str, workdir: pathlib.Path, place: str) -> Encoder:
  """The encoder of a run at the step that made the file, if it is still there; UserError where the file says another."""
  made = found.made
  there = made and made.step in checkpoint.steps(workdir / 'checkpoints')
  encoder, again = _encoder(workdir, made.step if there else None, place), (
      f'embed again: eqssl embed {shlex.quote(str(workdir))} IMAGES --out {shlex.quote(file)}')
  if made and made.digest != encoder.made.digest:
    raise UserError(f'{file} was made by {made.name}, and {encoder.made.name} has other weights.',
                    f'Give the run that made it: --run {shlex.quote(made.run)}; or {again}')
  if made and made.mark and made.mark != encoder.made.mark:
    raise UserError(f'{file} was made with another data card than that of {encoder.made.name}: its images were not '
                    'normalised by what the run knows now.', f'{again[0].upper()}{again[1:]}')
  return encoder


def _tile(path: str, *lines: str) -> Tile:
  """A picture of a file, or a grey square where it cannot be shown."""
  try:
    return Tile(upright(*opened(os.path.expanduser(path), THUMBNAIL)), (*lines, path))
  except BadImage as e:
    return Tile(np.full((THUMBNAIL, THUMBNAIL, 3), 128, np.uint8), (*lines, path, f'not shown: {e}'))


def neighbours(file: str, query: str, k: int | None = None, workdir: str | None = None, out: str | None = None,
               place: str = '') -> list[tuple[str, float]]:
  """Print the rank, cosine and path of the k images of an embedding file nearest to `query`, and return (path, cosine).

  query: a path of the file, which is left out of its own neighbours; or with `workdir`, the run that made the file, any
  image. place: see `_encoder`. k: None is K, or all of fewer. out: also write a page with the pictures. Raises
  UserError for a query that is not there, another run than the file's, or a k of more images than there are.
  """
  if out:
    page.check(pathlib.Path(out))
  found = embeddings.read(pathlib.Path(file))
  vector, row = _query(found, file, query, workdir, place)
  there, other = len(found.paths) - (row is not None), 'other ' if row is not None else ''
  if not there:
    raise UserError(f'{file} has no other image than {query!r}.', 'Embed a folder: eqssl embed DIR IMAGES --out FILE')
  k = min(K, there) if k is None else k
  if not 1 <= k <= there:
    raise UserError(f'--k {k}: {file} has {counted(there, f"{other}image")}.', f'Give 1 to {there}.')
  order, cosines = nearest(vector[None], found.features, k + 1)
  near = [(found.paths[i], float(c)) for i, c in zip(order[0], cosines[0], strict=True) if i != row][:k]
  for rank, (path, cosine) in enumerate(near, 1):
    print(f'{rank:4d}  {cosine:6.3f}  {folder.printable(path)}')
  if out:
    tiles = [_tile(query, 'query'), *(_tile(path, f'{r}. cosine {c:.3f}') for r, (path, c) in enumerate(near, 1))]
    about = f'Of the {counted(len(found.paths), "image")} of {file}, by the cosine of their features.'
    shown = block('Nearest first', 'The query, then its neighbours.', [tiles])
    html = page.render(f'The {counted(len(near), "image")} nearest to {os.path.basename(query)}', about,
                       [page.Section('Neighbours', 'neighbours', [shown])], {'query': query, 'neighbours': near})
    page.save(pathlib.Path(out), html)
    print(f'Written to {out}')
  return near

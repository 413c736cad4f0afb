"""Pictures of test images beside the training images whose features are nearest."""
from typing import Any

import numpy as np
from jax.tree_util import Partial

from equivariant_ssl.data.folder_index import printable
from equivariant_ssl.data.source import Source, Split
from equivariant_ssl.evaluate import frozen, inputs
from equivariant_ssl.report.pictures import (
  TRAINING,
  Tile,
  nearest,
  page_split,
  sample,
  source_of,
  upright,
)
from equivariant_ssl.training import runs
from equivariant_ssl.training.state import TrainState


def _tile(source: Source, part: Split, i: Any, first: str, *words: str) -> Tile:
  """Return the picture of an image of a split, with its class and file where the source has them.

  Only the training images have the names of their files.
  """
  label = (source.classes[part.labels[i]],) if source.classes and part.labels is not None else ()
  file = (printable(source.names[i]),) if source.names and part is source.train else ()
  return Tile(upright(part.images[i], part.sizes[i]), (first, *words, *label, *file))


def neighbors(run: runs.Run, fixed: frozen.Frozen, state: TrainState, count: int = 6, k: int = 8
              ) -> list[list[Tile]]:
  """Return a row of tiles per test image: the image, and its k nearest training images.

  They are nearest by the cosine of features, the nearest first, among at most TRAINING training
  images. The images of both splits are a `sample`.
  """
  source, tests = source_of(run), page_split(run)
  train = source.train
  queries, bank = sample(len(tests.images), count), sample(len(train.images), TRAINING)
  images = np.concatenate([tests.images[queries], train.images[bank]])
  sizes = np.concatenate([tests.sizes[queries], train.sizes[bank]])
  both = Split(images, sizes, None)
  h = inputs.features(Partial(fixed.encode, frozen.variables(state)), both,
                      inputs.split_inputs(run.recipe.size, both), mesh=run.mesh)
  order, cosines = nearest(h[:len(queries)], h[len(queries):], k + 1)
  among = ((f'among {len(bank):,} of {len(train.images):,} training images',)
           if len(bank) < len(train.images) else ())
  tiles = []
  for q, near, near_cosines in zip(queries, order, cosines, strict=True):
    # Where the queries are training images, an image is no neighbor of itself.
    others = [(bank[j], c) for j, c in zip(near, near_cosines, strict=True)
              if tests is not train or bank[j] != q]
    same = np.zeros(len(train.images), bool)
    if source.classes and tests.labels is not None and train.labels is not None:
      same = train.labels == tests.labels[q]
    tiles.append([_tile(source, tests, q, 'query', *among),
                  *(_tile(source, train, j, f'cosine {c:.3f}' + ' ✓ same class' * bool(same[j]))
                    for j, c in others[:k])])
  return tiles

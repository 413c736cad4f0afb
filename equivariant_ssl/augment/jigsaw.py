"""Jigsaw: the tiles of the picture in another order."""
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from equivariant_ssl.augment.algebra import sometimes
from equivariant_ssl.augment.pixels import total
from equivariant_ssl.errors import UserError
from equivariant_ssl.types import Array, Image, Key, Op, Size


class Jigsaw(NamedTuple):
  """The order of the tiles.

  applied: bool, whether the picture is cut into tiles.
  order:   int32, the class: the index of the tiles' permutation; 0 keeps their order.
  """
  applied: Array
  order: Array


def permutations(grid: int) -> np.ndarray:
  """[K grid^2]: the tile that each place shows, for each of K permutations, the identity first.

  A grid of 2 has all 24 permutations. A grid of 4 has the 16 permutations i -> i xor k, of which no
  two agree anywhere. Both sets are groups, so the way from one permutation to another is in the
  set.
  """
  if grid == 2:
    return np.array(list(itertools.permutations(range(4))), np.int32)
  return np.arange(16, dtype=np.int32)[:, None] ^ np.arange(16, dtype=np.int32)[None]


def class_between(orders: np.ndarray) -> np.ndarray:
  """[K K]: the class of the permutation that leads from one permutation to another."""
  index = {tuple(order): k for k, order in enumerate(orders)}
  return np.array([[index[tuple(np.argsort(a)[b])] for b in orders] for a in orders], np.int32)


def interior_line(side: int, gap: float) -> np.ndarray:
  """[side] bool: the pixels of a tile's side that are in no band of `gap` x the side."""
  half, at = round(gap * side / 2), np.arange(side)
  return (at >= half) & (at < side - half)


def level_tiles(tiles: Array, interior: np.ndarray, mean: float) -> Array:
  """`tiles` [T h w C], each shifted to the mean `mean` over its `interior` pixels, and clipped.

  `mean` is a constant. The picture's own mean would give tiles away: the corner of a central tile
  is nearest to it.
  """
  values = jnp.where(interior, tiles, 0.).reshape(len(tiles), -1, tiles.shape[-1])
  means = total(values.swapaxes(0, 1)) * (1. / interior.sum())
  return jnp.clip(tiles + (mean - means)[:, None, None], 0., 1.)


def make(p: float = 1., grid: int = 2, gap: float = .25, level: bool = True, fill: float = .5
         ) -> Op:
  """With probability `p`, cut the picture into tiles and lay them in a random order.

  grid:  2 or 4, for 2 x 2 or 4 x 4 tiles.
  gap:   the width of the band between tiles, as a fraction of a tile's side.
  level: make the mean of each tile `fill`.
  fill:  the value of the bands, as a fraction of white.

  The op is discrete; the class is the order (24 for grid 2, 16 for grid 4), each as likely. The
  borders of tiles must not say which tiles were neighbors (Noroozi & Favaro 2016). Therefore a band
  between tiles is filled, and with `level` the remaining pixels of each tile have the mean `fill`.
  The picture's own order is treated alike; only the identity action, which is not applied, leaves
  the picture as it is.

  Raises UserError for another grid, or a gap that leaves no tile. Raises ValueError at trace time
  where the sides are no multiples of the grid, or where no pixel of a tile is left.
  """
  if grid not in (2, 4):
    raise UserError(f'jigsaw.grid = {grid} does not exist.', 'Give 2 or 4.')
  if not 0 <= gap < 1:
    raise UserError(f'jigsaw.gap = {gap} leaves no tile.',
                    "Give a fraction of the tile's side below 1, as in .25.")
  orders = permutations(grid)
  table, K = class_between(orders), len(orders)

  def apply(action: Jigsaw, image: Image) -> Image:
    H, W, C = image.pixels.shape
    h, w = H // grid, W // grid
    interior = np.logical_and.outer(interior_line(h, gap), interior_line(w, gap))[None, ..., None]
    if H % grid or W % grid or not interior.any():
      raise ValueError(f'jigsaw.grid = {grid} with gap = {gap} does not fit an image of {H} x {W} '
                       'pixels; crop or resize it.')
    tiles = image.pixels.reshape(grid, h, grid, w, C).swapaxes(1, 2).reshape(-1, h, w, C)
    leveled = level_tiles(tiles, interior, fill) if level else tiles
    tiles = jnp.where(interior, leveled, jnp.float32(fill))
    ordered = tiles[jnp.asarray(orders)[action.order]].reshape(grid, grid, h, w, C)
    pixels = ordered.swapaxes(1, 2).reshape(H, W, C)
    return image._replace(pixels=jnp.where(action.applied, pixels, image.pixels))

  def code(applied: Array, order: Array) -> Array:
    one_hot = jax.nn.one_hot(order - 1, K - 1, dtype=jnp.float32)  # order 0 is all zeros
    return jnp.concatenate([applied.astype(jnp.float32)[None], one_hot])

  def relative(before: Jigsaw, after: Jigsaw) -> Array:
    applied = after.applied.astype(jnp.float32) - before.applied.astype(jnp.float32)
    return code(applied, jnp.asarray(table)[before.order, after.order])

  def sample(key: Key, size: Size) -> Jigsaw:
    return Jigsaw(jnp.ones((), bool), jax.random.randint(key, (), 0, K))

  return sometimes(p, Op(
      name='jigsaw',
      identity=lambda size: Jigsaw(jnp.zeros((), bool), jnp.zeros((), jnp.int32)),
      sample=sample,
      apply=apply,
      encode=lambda action: code(action.applied, action.order),
      choices=Jigsaw(np.ones(K, bool), np.arange(K, dtype=np.int32)),
      relative=relative))

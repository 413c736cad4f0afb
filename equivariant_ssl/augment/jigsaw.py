"""Jigsaw: the picture's tiles in another order."""
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
  """applied: bool, whether the picture is cut into tiles. order: class, the index of the tiles' permutation; 0 keeps it."""
  applied: Array
  order: Array


def permutations(grid: int) -> np.ndarray:
  """[K grid^2], the identity first: which tile each place shows. 2: all 24. 4: the 16 of i -> i xor k, no two of which
  agree anywhere. Both are groups: what leads from one to another is one of them."""
  if grid == 2:
    return np.array(list(itertools.permutations(range(4))), np.int32)
  return np.arange(16, dtype=np.int32)[:, None] ^ np.arange(16, dtype=np.int32)[None]


def between(orders: np.ndarray) -> np.ndarray:
  """[K K]: the class that leads from the first to the second."""
  index = {tuple(order): k for k, order in enumerate(orders)}
  return np.array([[index[tuple(np.argsort(a)[b])] for b in orders] for a in orders], np.int32)


def make(p: float = 1., grid: int = 2, gap: float = .25, level: bool = True, fill: float = .5) -> Op:
  """With probability `p`, cut the picture into `grid` x `grid` tiles and lay them in another order, each as likely.

  Discrete; the class is the order (24 for grid 2, 16 for 4). The borders of tiles must not say which were neighbours
  (Noroozi & Favaro 2016). So a band of `gap` x the tile's side between tiles is filled with `fill` (a fraction of white)
  and, with `level`, that is made the mean of what is left of each tile; also where the order is the picture's own:
  only the identity action, not applied, leaves the picture as it is. Raises UserError for another grid or a gap that
  leaves no tile, ValueError at trace time where the sides are no multiples of the grid, or no pixel of a tile is left.
  """
  if grid not in (2, 4):
    raise UserError(f'jigsaw.grid = {grid} is not there.', 'Give 2 or 4.')
  if not 0 <= gap < 1:
    raise UserError(f'jigsaw.gap = {gap} leaves no tile.', "Give a fraction of the tile's side below 1, as in .25.")
  orders = permutations(grid)
  table, K = between(orders), len(orders)

  def left(tile: int) -> np.ndarray:
    """[tile] bool: the pixels of a tile's side that are no part of a band."""
    half, at = round(gap * tile / 2), np.arange(tile)
    return (at >= half) & (at < tile - half)

  def levelled(tiles: Array, kept: np.ndarray) -> Array:
    means = total(jnp.where(kept, tiles, 0.).reshape(grid * grid, -1, tiles.shape[-1]).swapaxes(0, 1)) * (1. / kept.sum())
    # Not the picture's mean: the corner of a tile that was at the middle is the likest to it, and would tell the tile.
    return jnp.clip(tiles + (fill - means)[:, None, None], 0., 1.)

  def apply(action: Jigsaw, image: Image) -> Image:
    H, W, C = image.pixels.shape
    h, w = H // grid, W // grid
    kept = np.logical_and.outer(left(h), left(w))[None, ..., None]
    if H % grid or W % grid or not kept.any():
      raise ValueError(f'jigsaw.grid = {grid} with gap = {gap} does not fit an image of {H} x {W} pixels; crop or resize it')
    tiles = image.pixels.reshape(grid, h, grid, w, C).swapaxes(1, 2).reshape(-1, h, w, C)
    tiles = jnp.where(kept, levelled(tiles, kept) if level else tiles, jnp.float32(fill))
    laid = tiles[jnp.asarray(orders)[action.order]].reshape(grid, grid, h, w, C).swapaxes(1, 2).reshape(H, W, C)
    return image._replace(pixels=jnp.where(action.applied, laid, image.pixels))

  def code(applied: Array, order: Array) -> Array:
    return jnp.concatenate([applied.astype(jnp.float32)[None], jax.nn.one_hot(order - 1, K - 1, dtype=jnp.float32)])

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

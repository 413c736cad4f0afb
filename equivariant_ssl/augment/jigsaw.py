"""Jigsaw: the picture's tiles in another order."""
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from equivariant_ssl.augment.algebra import sometimes
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


def make(p: float = 1., grid: int = 2, gap: float = .25, fill: float = .5) -> Op:
  """With probability `p`, cut the picture into `grid` x `grid` tiles and lay them in another order, each as likely.

  Discrete; the class is the order (24 for grid 2, 16 for 4). So that the seams do not say which tiles were neighbours,
  a band of `gap` x the tile's side between tiles is filled with `fill` (a fraction of white), also where the order is the
  picture's own: only the identity action, not applied, leaves the picture as it is. Raises UserError for another grid,
  ValueError at trace time where the sides are no multiples of it.
  """
  if grid not in (2, 4):
    raise UserError(f'jigsaw.grid = {grid} is not there.', 'Give 2 or 4.')
  if not 0 <= gap < 1:
    raise UserError(f'jigsaw.gap = {gap} leaves no tile.', 'Give a fraction of the tile\'s side below 1, as in .25.')
  orders = permutations(grid)
  table, K = between(orders), len(orders)

  def band(side: int) -> np.ndarray:
    tile = side // grid
    half = round(gap * tile / 2)
    return (np.arange(side) % tile < half) | (np.arange(side) % tile >= tile - half)

  def apply(action: Jigsaw, image: Image) -> Image:
    h, w, C = image.pixels.shape
    if h % grid or w % grid:
      raise ValueError(f'jigsaw.grid = {grid} does not divide an image of {h} x {w} pixels; crop or resize it first')
    tiles = image.pixels.reshape(grid, h // grid, grid, w // grid, C).swapaxes(1, 2).reshape(-1, h // grid, w // grid, C)
    laid = tiles[jnp.asarray(orders)[action.order]]
    laid = laid.reshape(grid, grid, h // grid, w // grid, C).swapaxes(1, 2).reshape(h, w, C)
    seam = (band(h)[:, None] | band(w)[None])[..., None]
    return image._replace(pixels=jnp.where(action.applied, jnp.where(seam, jnp.float32(fill), laid), image.pixels))

  def code(applied: Array, order: Array) -> Array:
    return jnp.concatenate([applied.astype(jnp.float32)[None], jax.nn.one_hot(order - 1, K - 1, dtype=jnp.float32)])

  def relative(before: Jigsaw, after: Jigsaw) -> Array:
    return code(after.applied.astype(jnp.float32) - before.applied, jnp.asarray(table)[before.order, after.order])

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

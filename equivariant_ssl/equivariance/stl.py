"""STL (Yu et al. 2024): what was done to one image, applied to another image's embedding.

It is read off the views of the image. No action is read.
"""
from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp

from equivariant_ssl.equivariance.pairing import between_views
from equivariant_ssl.errors import UserError
from equivariant_ssl.losses import nt_xent
from equivariant_ssl.nets import mlp, predictors
from equivariant_ssl.registry import unknown_name
from equivariant_ssl.types import Array, Equivariance, Group, Pair, Wiring


def by_column(f: Callable[[Array], Array], rows: Array) -> Array:
  """f of rows [M 2 ...]: one pass, with BatchNorm statistics of its own, for each column."""
  return jnp.stack([f(rows[:, i]) for i in range(2)], axis=1)


def swap_neighbors(rows: Array) -> Array:
  """Rows [2M ...] with each two neighbors exchanged: 1 0 3 2 ..."""
  return jnp.flip(rows.reshape(-1, 2, *rows.shape[1:]), axis=1).reshape(rows.shape)


def split_pairs(rows: Array) -> Array:
  """Rows [2M ...] as [M 2 ...]."""
  return rows.reshape(-1, 2, *rows.shape[1:])


def merge_pairs(rows: Array) -> Array:
  """Rows [M 2 E] as [2M E]."""
  return rows.reshape(-1, rows.shape[-1])


class StlHead(nn.Module):
  """The head of STL. An image has two pairs, one for each direction between its views.

  Neighboring images had the same actions. `read` and `project` make a pass for each direction, and
  `project_read` one for each of two neighbors, as in the official code, whatever the BatchNorm of
  the rest of the network.

  The answer is the projected predictions and targets, [N E] each, and the projected representations
  of what was done to images 0, 2, .. and to images 1, 3, .., [N/2 T] each.

  read: [h1, h2] -> the representation of what was done.
  move: (h, representation) -> the predicted features.
  """
  read: nn.Module
  move: nn.Module
  project: nn.Module
  project_read: nn.Module

  def embed(self, features: Array, train: bool) -> Array:
    return features

  def __call__(self, pair: Pair, train: bool) -> tuple[Array, Array, Array, Array]:
    def project(rows: Array) -> Array:
      return merge_pairs(by_column(lambda x: self.project(x, train), split_pairs(rows)))

    views = split_pairs(jnp.concatenate([pair.source, pair.target], axis=-1))  # [B, direction, ..]
    done = by_column(lambda x: self.read(x, train), views)
    predictions = project(self.move(pair.source, merge_pairs(swap_neighbors(done)), train))
    targets = project(pair.target)
    T = done.shape[-1]
    images = split_pairs(done).reshape(-1, 2, 2 * T)  # [B/2, image, both directions]
    projected = by_column(lambda x: self.project_read(x.reshape(-1, T), train), images)
    first, second = jnp.moveaxis(projected, 1, 0)
    return predictions, targets, first, second


def make(weight: float = 1., temperature: float = .2, equivariant: float = 1.,
         transformation: float = .1, read_hidden: tuple[int, ...] = (128,), read_dim: int = 128,
         hidden: tuple[int, ...] = (512,), dim: int = 128, aligned: str = 'own'
         ) -> Callable[[Wiring], Equivariance]:
  """STL: what was done to one image, applied to another, predicts that image's other view.

    equivariant x NT-Xent( g(h(x2)), g(W(y') h(x1)) ) + transformation x NT-Xent( k(y), k(y') )

  y = f([h(x1), h(x2)]) represents what was done. y' is that of another image, which had the same
  two actions. W(y') is a matrix, given by a hypernetwork; its bias makes W(0) the identity (the
  code's has none). Both directions are used, as in the official code (2M - 2 negatives). No action
  is read. All draws are shared by the neighboring images 2i and 2i + 1; in the code the flip's and
  the blur's are not.

  aligned: the views in which the images share draws. 'own': views of its own. 'views': the
           invariance's views, which serve both objectives, as published. A sensitive op needs views
           of its own in any case.
  read_hidden, read_dim: the widths of f and of k, as in the README of the code (the paper has
           3 layers of 512, and transformation .2).
  hidden, dim: the widths of g.

  Raises UserError for an odd batch, or for another `aligned`.
  """
  if aligned not in ('own', 'views'):
    raise unknown_name('stl.aligned', aligned, ('own', 'views'))

  def wire(wiring: Wiring) -> Equivariance:
    if wiring.batch % 2:
      raise UserError(f'stl pairs the images of a batch, but the batch of {wiring.batch} is odd.',
                      f'e.g. --config.batch={wiring.batch + 1}')
    has_own_views = aligned == 'own' or wiring.has_own_views
    uses, _, pairs = between_views(wiring._replace(has_own_views=has_own_views), both=True)
    groups = {uses[0]: Group(wiring.own_chains, wiring.size, share=2)}

    def loss(answer: tuple[Array, Array, Array, Array], pair: Pair, embeddings=None) -> Array:
      predictions, targets, first, second = answer
      return (equivariant * nt_xent(targets, predictions, temperature)
              + transformation * nt_xent(first, second, temperature))

    def make_mlp(hidden: tuple[int, ...], dim: int) -> nn.Module:
      return mlp.make(hidden, dim, dtype=wiring.dtype)
    head = StlHead(read=make_mlp(read_hidden, read_dim), move=predictors.Hyper(),
                   project=make_mlp(hidden, dim), project_read=make_mlp(read_hidden, read_dim))
    return Equivariance(head, loss, groups, uses, pairs, weight=weight)

  return wire

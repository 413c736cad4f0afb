"""STL (Yu et al. 2024): what was done is read off one image and applied to the embedding of another; nothing is told."""
from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp

from equivariant_ssl.equivariance.pairing import between_views
from equivariant_ssl.errors import UserError
from equivariant_ssl.losses import nt_xent
from equivariant_ssl.nets import mlp, predictors
from equivariant_ssl.registry import unknown
from equivariant_ssl.types import Array, Equivariance, Group, Pair, Wiring


def apart(f: Callable[[Array], Array], rows: Array) -> Array:
  """f of rows [M 2 ...], a pass (and so BatchNorm statistics) for each of the second axis."""
  return jnp.stack([f(rows[:, i]) for i in range(2)], axis=1)


def exchanged(rows: Array) -> Array:
  """Rows [2M ...] with each pair of neighbours exchanged: 1 0 3 2 ..."""
  return jnp.flip(rows.reshape(-1, 2, *rows.shape[1:]), axis=1).reshape(rows.shape)


class Head(nn.Module):
  """Pairs are there and back of each image, and neighbouring images had the same actions.

  A pass for each direction through `read` and `project`, and for each of two neighbours through `project_read`, as in the
  official code, whatever the rest of the network's BatchNorm. The answer: the projected moved features and targets [N E]
  each, and the projected representations of what was done, of images 0, 2, .. and 1, 3, .. [N/2 T] each.
  """
  read: nn.Module      # [h1, h2] -> the representation of what was done
  move: nn.Module
  project: nn.Module
  project_read: nn.Module

  def embed(self, features: Array, train: bool) -> Array:
    return features

  def __call__(self, pair: Pair, train: bool) -> tuple[Array, Array, Array, Array]:
    split = lambda rows: rows.reshape(-1, 2, *rows.shape[1:])
    flat = lambda rows: rows.reshape(-1, rows.shape[-1])
    shown = split(jnp.concatenate([pair.source, pair.target], axis=-1))  # [B 2 ..]: there and back
    done = apart(lambda x: self.read(x, train), shown)
    project = lambda rows: flat(apart(lambda x: self.project(x, train), split(rows)))
    moved = project(self.move(pair.source, flat(exchanged(done)), train))
    targets = project(pair.target)
    images = split(done).reshape(-1, 2, 2 * done.shape[-1])  # [B/2, image, both directions]
    first, second = jnp.moveaxis(apart(lambda x: self.project_read(x.reshape(-1, done.shape[-1]), train), images), 1, 0)
    return moved, targets, first, second


def make(weight: float = 1., temperature: float = .2, equivariant: float = 1., transformation: float = .1,
         read_hidden: tuple[int, ...] = (128,), read_dim: int = 128, hidden: tuple[int, ...] = (512,), dim: int = 128,
         aligned: str = 'own') -> Callable[[Wiring], Equivariance]:
  """equivariant x NT-Xent( g(h(x2)), g(W(y') h(x1)) ) + transformation x NT-Xent( k(y), k(y') ),  y = f([h(x1), h(x2)]),

  y' the same of another image that had the same two actions, W a matrix that it gives (a hypernetwork), both directions, as
  the official code has it (2M - 2 negatives). No action is read; all its draws are shared by neighbouring images 2i and
  2i + 1 (in the code not those of the flip and the blur). aligned: 'own', which do so in views of its own, or 'views': the
  invariance's share them too and serve both, as published (a sensitive op still needs views of its own). read_hidden,
  read_dim: of f and of k, the README's (the paper: 3 layers of 512, and transformation .2); hidden, dim: of g. W has a bias,
  so that W(0) is the identity (the code's has none). Raises UserError for an odd batch, or another `aligned`.
  """
  if aligned not in ('own', 'views'):
    raise unknown('stl.aligned', aligned, ('own', 'views'))

  def wire(wiring: Wiring) -> Equivariance:
    if wiring.batch % 2:
      raise UserError(f'stl pairs the images of a batch, and {wiring.batch} is odd.',
                      f'e.g. --config.batch={wiring.batch + 1}')
    apart = aligned == 'own' or wiring.sensitive
    uses, _, pairs = between_views(wiring._replace(sensitive=apart), both=True)
    groups = {uses[0]: Group(wiring.own, wiring.size, share=2)}

    def loss(answer: tuple[Array, Array, Array, Array], pair: Pair, embeddings=None) -> Array:
      moved, targets, first, second = answer
      return (equivariant * nt_xent(targets, moved, temperature)
              + transformation * nt_xent(first, second, temperature))

    of = lambda hidden, dim: mlp.make(hidden, dim, dtype=wiring.dtype)
    head = Head(read=of(read_hidden, read_dim), move=predictors.Hyper(), project=of(hidden, dim),
                project_read=of(read_hidden, read_dim))
    return Equivariance(head, loss, groups, uses, pairs, weight=weight)

  return wire

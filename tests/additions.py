"""What the tests of adding a module share: files written into a folder that a package looks into, and one such network."""
import sys
from collections.abc import Iterator
from types import ModuleType

TINY = 'tiny_for_tests'
ENCODER = '''
"""The smallest encoder with what can go wrong: a convolution and a BatchNorm."""
import flax.linen as nn
from equivariant_ssl.nets.conv import Conv
from equivariant_ssl.nets.norm import BatchNorm


class Tiny(nn.Module):
  @nn.compact
  def __call__(self, x, train):
    return nn.relu(BatchNorm()(Conv(8, 3, 2, 1)(x), train)).mean((1, 2))


def make(dtype='float32'):
  return Tiny()
'''
OP = '''
from typing import NamedTuple
import jax
import jax.numpy as jnp
from equivariant_ssl.types import Array, Op


class Tint(NamedTuple):
  """amount: float, what is added to red, a fraction of white."""
  amount: Array


def make(most: float = .5) -> Op:
  def apply(action, image):
    shift = jnp.array([1., 0., 0.])[None, None] * action.amount
    return image._replace(pixels=jnp.clip(image.pixels + shift, 0., 1.))
  return Op('mytint', lambda size: Tint(jnp.zeros(())), lambda key, size: Tint(jax.random.uniform(key, maxval=most)),
            apply, lambda action: action.amount[None])
'''
INVARIANCE = '''
import jax.numpy as jnp
from equivariant_ssl.types import Embeddings, Invariance


def make(margin: float = 1.) -> Invariance:
  """Views agree, and do not vanish."""
  def loss(embeddings: Embeddings):
    z = embeddings.projected
    return jnp.square(z[:, 0] - z[:, 1]).mean() + jnp.square(margin - z.std(axis=(0, 1))).mean()
  return Invariance(loss, projector={'hidden': (8,), 'out': 4})
'''
EQUIVARIANCE = '''
import flax.linen as nn
import jax
import jax.numpy as jnp
from equivariant_ssl.nets import mlp
from equivariant_ssl.types import Equivariance, Pair


class Head(nn.Module):
  guess: nn.Module

  def embed(self, features, train):
    return features

  def __call__(self, pair, train):
    return self.guess(jnp.concatenate([pair.source, pair.target], axis=-1), train)


def make(width: int = 8):
  """Regress what was told from the two views."""
  def wire(wiring):
    def pairs(embedded, actions):
      h, a = embedded['views'], actions['views']
      view = lambda v: jax.tree.map(lambda x: x[:, v], a)
      return Pair(h[:, 0], h[:, 1], view(0), view(1))

    def loss(answer, pair: Pair, embeddings=None):
      told = jax.vmap(wiring.conditioning.relative)(pair.before, pair.after)
      return jnp.square(answer - told).mean()
    size = wiring.conditioning.encode(wiring.conditioning.identity(jnp.ones(2))).shape[0]
    return Equivariance(Head(mlp.make(hidden=(width,), out=size)), loss, {}, ('views',), pairs, predicts='action')
  return wire
'''


def added(tmp_path_factory, files: dict[str, tuple[ModuleType, str]]) -> Iterator[None]:
  """A fixture's body: {name: (package, text)} are modules of their packages while it runs."""
  folders = []
  for name, (package, text) in files.items():
    folder = tmp_path_factory.mktemp(name)
    (folder / f'{name}.py').write_text(text)
    package.__path__.append(str(folder))
    folders.append((package, str(folder)))
  yield
  for package, folder in folders:
    package.__path__.remove(folder)
  for name, (package, _) in files.items():
    sys.modules.pop(f'{package.__name__}.{name}', None)

"""A new op, invariance and equivariance objective are each one new file, and one config line (bar 4)."""
import jax
import numpy as np
import pytest
from additions import ENCODER, TINY, added

from equivariant_ssl import augment, config, equivariance, invariance, nets
from equivariant_ssl.parallel import sharding
from equivariant_ssl.training import loop

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
FILES = {'mytint': (augment, OP), 'myinvariance': (invariance, INVARIANCE), 'myequivariance': (equivariance, EQUIVARIANCE)}


@pytest.fixture(scope='module', autouse=True)
def written(tmp_path_factory):
  yield from added(tmp_path_factory, FILES | {TINY: (nets, ENCODER)})


@pytest.mark.parametrize('overrides', [
    {'augment.order': 'crop,flip,rotate,mytint', 'augment.mytint': "{'role': 'both', 'most': .3}"},
    pytest.param({'invariance': "{'name': 'myinvariance', 'margin': 2.}"}, marks=pytest.mark.slow),
    {'equivariance': "{'name': 'myequivariance', 'width': 4}"},
], ids=list(FILES))
def test_one_new_file_trains(overrides, tmp_path):
  made = config.load_config('smoke', {**overrides, 'steps': '2', 'encoder': f"{{'name': '{TINY}'}}"})
  run = loop.prepare_run(made, sharding.mesh(jax.devices()[:1]))
  seen = []
  loop.fit(run, loop.initial_state(run), lambda state, n, metrics, clock: seen.append(jax.device_get(metrics)))
  assert len(seen) == 2 and all(np.isfinite(v) for m in seen for v in m.values())

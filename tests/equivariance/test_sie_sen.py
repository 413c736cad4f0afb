"""SIE and SEN: pairs of views, their conditioning, and their losses against float64 NumPy."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_equivariances import (
    TURNS,
    B,
    E,
    V,
    check,
    covariance,
    filled,
    info_nce,
    make_objective,
    pairs_of,
    turned,
    turns,
    variance,
)

from equivariant_ssl.errors import UserError
from equivariant_ssl.types import Embeddings


@pytest.mark.parametrize('name, kw, source, target', [
    ('equimod', {'reference': 'view'}, [0, 1, 2, 3], [1, 0, 3, 2]),
    ('sie', {}, [0, 2], [1, 3]), ('sen', {}, [0, 2], [1, 3])])
def test_views_are_paired_with_each_other(name, kw, source, target):
  """EquiMod both ways round, SIE and SEN from the first view to the second; the conditioning is the relative action."""
  wired = make_objective(name, **kw)
  z, flipped = jnp.arange(4.).reshape(2, 2, 1), jnp.array([[False, True], [True, True]])
  pair = wired.pairs({'views': z}, {'views': {'flip': flipped}})
  np.testing.assert_array_equal(pair.source[:, 0], source)
  np.testing.assert_array_equal(pair.target[:, 0], target)
  np.testing.assert_array_equal(pair.before['flip'], flipped.reshape(-1)[np.array(source)])
  np.testing.assert_array_equal(pair.after['flip'], flipped.reshape(-1)[np.array(target)])


def test_sen_loss_equals_float64():
  wired = make_objective('sen', temperature=.3)
  check(lambda z, answer: wired.loss(answer, pairs_of(z, z)), lambda z, answer: info_nce(answer, z, .3),
        *np.random.default_rng(2).normal(size=(2, B, E)))


@pytest.mark.parametrize('name', ['sen', 'sie'])
def test_the_conditioning_is_the_relative_action(name, key):
  """Where the two views had the same action an embedding is predicted to stay, elsewhere to move."""
  wired = make_objective(name, turns())
  pair = wired.pairs({'views': jax.random.normal(key, (B, V, E))}, turned())
  values = filled(wired.head, pair)
  assert set(values['params']) == {'predict'}
  values['params']['predict']['bias'] = jnp.eye(E)
  distance = np.abs(jax.jit(lambda: wired.head.apply(values, pair, True))() - pair.source).max(1)
  still = TURNS[:, 0] == TURNS[:, 1]
  assert distance[still].max() < 1e-6 and distance[~still].min() > .1


def sie(z1, z2, answer, seen=None):
  """Prediction, hinge on it, and VICReg's two terms of both views: of z, or of [invariance's embedding, z]."""
  views = [np.concatenate([s, z], axis=1) for s, z in zip(seen, (z1, z2), strict=True)] if seen else [z1, z2]
  return (.45 * 10 * np.mean((answer - z2) ** 2) + 10 * variance(answer) / 2
          + 10 * sum(map(variance, views)) / 2 + sum(map(covariance, views)))


def test_sie_loss_equals_float64():
  wired = make_objective('sie')
  check(lambda a, b, c: wired.loss(c, pairs_of(a, b)), sie, *np.random.default_rng(3).normal(size=(3, B, E)) * .8)


def test_sie_joint_loss_equals_float64():
  """As published: V and C of both embeddings side by side, which the invariance's embeddings get a gradient from."""
  wired = make_objective('sie', joint=True)

  def loss(a, b, c, s1, s2):
    seen = jnp.stack([s1, s2], axis=1)
    return wired.loss(c, pairs_of(a, b), Embeddings(seen, seen, seen))

  check(loss, lambda a, b, c, s1, s2: sie(a, b, c, (s1, s2)), *np.random.default_rng(4).normal(size=(5, B, E)) * .8)


@pytest.mark.parametrize('embeddings', [None, (B, 1, E)])
def test_sie_joint_needs_the_views_of_an_invariance(embeddings):
  seen = embeddings and Embeddings(*(jnp.zeros(embeddings),) * 3)
  z = jnp.zeros((B, E))
  with pytest.raises(UserError, match='vicreg'):
    make_objective('sie', joint=True).loss(z, pairs_of(z, z), seen)


@pytest.mark.parametrize('share, at', [(.5, 4), (.25, 2)])
def test_sie_splits_the_features(share, at, key):
  """The first part feeds the invariance, the second the head: neither sees the other."""
  wired = make_objective('sie', invariant=share)
  assert wired.feeds and wired.uses == ('views',) and not wired.groups
  h = jax.random.normal(key, (B, V, 8))
  np.testing.assert_array_equal(wired.head.feed(h, {}, True), h[..., :at])
  values = filled(wired.head, h, method='embed')
  run = jax.jit(lambda h: wired.head.apply(values, h, False, method='embed'))
  assert run(h).shape == (B, V, E)
  np.testing.assert_array_equal(run(h.at[..., :at].set(0.)), run(h))
  project = values['params']['project']  # as published: hidden layers with a bias, the last without and without norm
  assert project['linear_0']['kernel'].shape == (8 - at, 8) and set(project['linear_1']) == {'kernel'}
  assert set(project) == {'linear_0', 'norm_0', 'linear_1'} and 'bias' in project['linear_0']


@pytest.mark.parametrize('share', [0., 1.])
def test_sie_needs_both_parts(share):
  with pytest.raises(UserError, match='sie.invariant'):
    make_objective('sie', invariant=share)


def test_sen_knows_its_negatives():
  """'all' is NT-Xent of predictions and targets, 'cross' the InfoNCE of its old default; another word is refused."""
  y, y_hat = (jnp.float32(x) for x in np.random.default_rng(2).normal(size=(2, 6, E)))
  one, other = (make_objective('sen', negatives=n).loss(y_hat, pairs_of(y, y)) for n in ('cross', 'all'))
  assert one == make_objective('sen').loss(y_hat, pairs_of(y, y)) and one != other
  with pytest.raises(UserError, match="sen.negatives has no 'crss'"):
    make_objective('sen', negatives='crss')

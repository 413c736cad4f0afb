"""CARE and STL: neighboring images receive the same actions; their losses against float64 NumPy."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_equivariances import B, E, check, filled, make_objective, pairs_of, turns
from test_losses import reference as nt_xent
from wirings import make_wiring

from equivariant_ssl.augment import views
from equivariant_ssl.equivariance.stl import swap_neighbors
from equivariant_ssl.errors import UserError
from equivariant_ssl.types import Image


def care(z1, z2, chunks=4):
  """Twice the mean over rows of the squared differences of their cosines with the others of their chunk, over chunks."""
  total, share = 0., len(z1) // chunks
  for c in range(chunks):
    grams = []
    for z in (z1, z2):
      u = z[c * share:(c + 1) * share]
      u = u / np.linalg.norm(u, axis=1, keepdims=True)
      grams.append(u @ u.T)
    off = ~np.eye(share, dtype=bool)
    total += 2 * np.mean([np.sum((grams[0] - grams[1])[i][off[i]] ** 2) for i in range(share)])
  return total / chunks


@pytest.mark.parametrize('chunks', [1, 2])
def test_care_loss_equals_float64(chunks):
  wired = make_objective('care', splits=chunks)
  check(lambda a, b: wired.loss(a, pairs_of(a, b)), lambda a, b: care(a, b, chunks),
        *np.random.default_rng(0).normal(size=(2, B, E)))


def test_care_is_zero_where_angles_are_kept():
  loss = jax.jit(lambda a, b: make_objective('care', splits=2).loss(a, pairs_of(a, b)))
  rng = np.random.default_rng(1)
  z = rng.normal(size=(B, E))
  maps = [np.linalg.qr(rng.normal(size=(E, E)))[0] for _ in range(2)]
  halves = z.reshape(2, B // 2, E)
  moved = np.concatenate([half @ q for half, q in zip(halves, maps, strict=True)])
  z, moved = jnp.float32(z), jnp.float32(moved)
  assert loss(z, moved) < 1e-10  # an orthogonal map each chunk, lengths free
  assert loss(z, 3. * moved) < 1e-10
  assert loss(z, moved * jnp.array([1., 1., 1., 2.])[None]) > 1e-2
  assert loss(z, jnp.roll(moved, 1, axis=0)) > 1e-1


@pytest.mark.parametrize('batch, splits, share', [(8, 4, 2), (8, 2, 4), (8, 16, 2), (256, 16, 16)])
def test_care_shares_draws_in_chunks(batch, splits, share):
  """As many chunks as asked for, or fewer where a chunk would have less than two images."""
  wired = make_objective('care', make_wiring(batch=batch), splits=splits)
  assert wired.groups['own'].share == share and wired.shares and wired.predicts is None


@pytest.mark.parametrize('batch, splits, fits', [(8, 3, 2), (15, 16, 5), (7, 16, 1), (8, 0, 1)])
def test_care_says_what_cuts_the_batch(batch, splits, fits):
  with pytest.raises(UserError, match='care.splits') as error:
    make_objective('care', make_wiring(batch=batch), splits=splits)
  assert f'splits={fits}' in str(error.value)
  make_objective('care', make_wiring(batch=batch), splits=fits)


@pytest.mark.parametrize('name, share', [('care', 4), ('stl', 2)])
def test_neighbors_receive_the_same_actions(name, share, key):
  wired = make_objective(name, turns(size=4), **({'splits': B // share} if name == 'care' else {}))
  images = Image(jnp.ones((B, 4, 4, 3)), jnp.full((B, 2), 4.))
  draw = jax.jit(lambda key: views(wired.groups, key, images)[wired.uses[0]].actions['rotate'].turns)
  chunks = np.stack([draw(jax.random.key(i)) for i in range(4)]).reshape(4, B // share, share, 2)
  assert (chunks == chunks[:, :, :1]).all()
  assert (chunks[:, :1] != chunks[:, 1:]).any() and (chunks[..., 0] != chunks[..., 1]).any()


def test_stl_pairs_are_there_and_back():
  wired = make_objective('stl')
  z = jnp.arange(8.).reshape(4, 2, 1)
  pair = wired.pairs({'own': z}, {'own': {}})
  np.testing.assert_array_equal(pair.source[:, 0], np.arange(8))
  np.testing.assert_array_equal(pair.target[:, 0], [1, 0, 3, 2, 5, 4, 7, 6])
  np.testing.assert_array_equal(swap_neighbors(jnp.arange(6)), [1, 0, 3, 2, 5, 4])


def test_stl_loss_equals_float64():
  wired = make_objective('stl', transformation=.3)
  rng = np.random.default_rng(2)
  wanted = lambda moved, targets, a, b: nt_xent(targets, moved, .2) + .3 * nt_xent(a, b, .2)
  check(lambda *answer: wired.loss(answer, None), wanted,
        *rng.normal(size=(2, B, E)), *rng.normal(size=(2, B // 2, 3)))


def mlp(values, part, x):
  """One hidden layer and BatchNorm by running statistics, in float64."""
  params, stats = (jax.tree.map(np.float64, values[k][part]) for k in ('params', 'batch_stats'))
  norm, running = params['norm_0'], stats['norm_0']
  x = (x @ params['linear_0']['kernel'] - running['mean']) / np.sqrt(running['var'] + 1e-5)
  return np.maximum(x * norm['scale'] + norm['bias'], 0.) @ params['linear_1']['kernel']


def test_stl_applies_what_another_image_shows(key):
  """The matrix comes from the neighbor's two views, and from nothing else; all equals the formula, row by row."""
  wired = make_objective('stl')
  pair = wired.pairs({'own': jax.random.normal(key, (4, 2, 5))}, {'own': {}})
  values = filled(wired.head, pair)
  run = jax.jit(lambda pair: wired.head.apply(values, pair, False))
  moved, targets, first, second = answer = jax.tree.map(np.asarray, run(pair))
  assert [a.shape for a in answer] == [(8, E), (8, E), (4, 3), (4, 3)]

  def changed(row):
    """The images whose predictions change with the target of `row` alone."""
    other = run(pair._replace(target=pair.target.at[row].add(1.)))[0]
    return [n for n in range(4) if np.abs(other - moved).reshape(4, 2, E)[n].max() > 1e-4]

  assert [changed(2 * image) for image in range(4)] == [[1], [0], [3], [2]]
  source, target = np.float64(pair.source), np.float64(pair.target)
  done = mlp(values, 'read', np.concatenate([source, target], axis=1))
  move = jax.tree.map(np.float64, values['params']['move'])
  neighbor = [2, 3, 0, 1, 6, 7, 4, 5]  # rows are (image, direction)
  matrices = [move['bias'] + np.einsum('a,ade->de', done[n], move['kernel']) for n in neighbor]
  sources = np.stack([source[n] @ matrices[n] for n in range(8)])
  codes = mlp(values, 'project_read', done).reshape(2, 2, 2, 3)
  wanted = mlp(values, 'project', sources), mlp(values, 'project', target), *codes.transpose(1, 0, 2, 3).reshape(2, 4, 3)
  for got, want in zip(answer, wanted, strict=True):
    assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()


@pytest.mark.parametrize('sensitive, aligned, group', [
    (False, 'views', 'views'), (True, 'views', 'own'), (False, 'own', 'own'), (True, 'own', 'own')])
def test_which_views_stl_aligns(sensitive, aligned, group):
  """Views of its own, or if asked for the invariance's, as published; a sensitive op always needs its own."""
  wired = make_objective('stl', make_wiring(sensitive=sensitive), aligned=aligned)
  assert set(wired.groups) == {group} and wired.uses == (group,) and wired.groups[group].share == 2
  assert wired.predicts is None


def test_what_stl_refuses():
  with pytest.raises(UserError, match='odd'):
    make_objective('stl', make_wiring(batch=7))
  with pytest.raises(UserError, match='aligned'):
    make_objective('stl', aligned='view')

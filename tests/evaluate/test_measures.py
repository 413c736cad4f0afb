"""Measures of equivariance and health: each against a float64 reference, a closed form, and what ignores the action."""
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from scipy.optimize import minimize
from scipy.spatial.transform import Rotation
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score
from sklearn.preprocessing import StandardScaler

from equivariant_ssl import errors
from equivariant_ssl.evaluate import (
  care_measure,
  health,
  profile,
  regression,
  retrieval,
  statistics,
)

N, M, E = 12, 50, 8


def unit(a):
  a = np.asarray(a, np.float64)
  return a / np.linalg.norm(a, axis=-1, keepdims=True)


def randn(*shape, seed=0):
  return np.random.RandomState(seed).randn(*shape).astype(np.float32)


def orthogonal(d, seed=0, det=1):
  q = np.linalg.qr(np.random.RandomState(seed).randn(d, d))[0]
  q[:, 0] *= det * np.sign(np.linalg.det(q))
  return q


# -- retrieval

def reference_ranks(predicted, bank, target):
  s = np.einsum('nve,nme->nvm', unit(predicted), unit(bank))
  order = np.argsort(-s, axis=2, kind='stable')
  return 1 + np.argmax(order == target[..., None], axis=2)


@pytest.mark.parametrize('n', [7, 32, 33])
def test_ranks_are_the_float64_reference(n, monkeypatch):
  monkeypatch.setattr(retrieval, 'IMAGES', 16)  # the last chunk is not full
  predicted, bank = randn(n, 3, E), randn(n, 9, E, seed=1)
  target = np.random.RandomState(2).randint(0, 9, (n, 3))
  np.testing.assert_array_equal(retrieval.ranks(predicted, bank, target), reference_ranks(predicted, bank, target))
  np.testing.assert_array_equal(retrieval.ranks(predicted, bank, target[0]),
                                reference_ranks(predicted, bank, np.broadcast_to(target[0], (n, 3))))
  np.testing.assert_array_equal(retrieval.top(predicted, bank),
                                np.einsum('nve,nme->nvm', unit(predicted), unit(bank)).argmax(2))


def test_of_equal_entries_the_lower_index_comes_first():
  bank = np.eye(3, dtype=np.float32)[[1, 0, 0, 2, 0]][None]  # cosines 0 or 1
  predicted = np.eye(3, dtype=np.float32)[None, [0] * 5]
  np.testing.assert_array_equal(retrieval.ranks(predicted, bank, np.arange(5)), [[4, 1, 2, 5, 3]])
  np.testing.assert_array_equal(retrieval.top(predicted, bank), [[1] * 5])
  collapsed = np.ones((2, M, 4), np.float32)
  assert retrieval.retrieval(retrieval.ranks(collapsed, collapsed, np.arange(M))).mrr.mean == pytest.approx(
      retrieval.chance(M)[0], abs=1e-12)


def test_an_embedding_that_is_not_finite_is_no_rank():
  bank = randn(2, 3, E)
  predicted = np.where(np.arange(2)[:, None, None] == 1, np.float32(np.nan), bank)
  with pytest.raises(errors.UserError, match='1 of 2 images') as found:
    retrieval.ranks(predicted, bank, np.arange(3))
  assert found.value.code == errors.NOT_FINITE
  with pytest.raises(ValueError, match='targets are 0 to 2'):
    retrieval.ranks(bank, bank, np.arange(1, 4))
  with pytest.raises(ValueError, match='for a bank'):
    retrieval.top(bank[:1], bank)


def test_retrieval_is_over_images():
  found = retrieval.retrieval(np.array([[1, 2], [5, 10]]))
  np.testing.assert_allclose(found.mrr[:3], statistics.interval([.75, .15])[:3])
  assert (found.h1.mean, found.h5.mean, found.mrr.n) == (.25, .75, 2)
  assert retrieval.chance(M) == pytest.approx((.0899841, .02, .1), abs=1e-7)
  assert retrieval.chance(2) == (.75, .5, 1.)


def rotated(scale, pair):
  """Turns each of E / 2 planes by its own multiple of the action's angle."""
  angle = (pair.after['turn'] - pair.before['turn'])[:, None] * scale[None, :]
  x, y = pair.source[:, ::2], pair.source[:, 1::2]
  turned = jnp.cos(angle) * x - jnp.sin(angle) * y, jnp.sin(angle) * x + jnp.cos(angle) * y
  return jnp.stack(turned, axis=2).reshape(pair.source.shape)


def ignored(scale, pair):
  return pair.source + scale.sum()


@pytest.fixture(scope='module')
def world():
  """A world in which a turn acts linearly: (source, bank, actions, the head's weight)."""
  scale = np.arange(1, E // 2 + 1, dtype=np.float64)
  source, random = randn(N, E), np.random.RandomState(1)
  turns = np.stack([np.concatenate([[0], 1 + random.permutation(M - 1)]) for _ in range(N)])  # a 50th: no two alike
  angle = turns * 2 * np.pi / M
  plane = source[:, None, ::2] + 1j * source[:, None, 1::2]
  plane = plane * np.exp(1j * angle[:, :, None] * scale)
  bank = np.stack([plane.real, plane.imag], axis=3).reshape(N, M, E).astype(np.float32)
  bank[:, 0] = source
  return source, bank, {'turn': angle.astype(np.float32)}, jnp.asarray(scale, jnp.float32)


def test_an_exact_predictor_finds_its_view_and_a_shuffled_one_does_not(world, key):
  source, bank, actions, scale = world
  found = retrieval.measure(Partial(rotated, scale), source, bank, actions, {'turn': jnp.zeros(())}, key, batch=256)
  assert found.true.mrr[:3] == found.true.h1[:3] == (1., 1., 1.)
  assert found.shuffled.mrr.mean == pytest.approx(found.chance[0], abs=.04) and found.shuffled.h1.mean < .06
  assert found.over_shuffled.low > .8 and found.over_shuffled.n == N
  assert found.over_shuffled.mean == pytest.approx(1. - found.shuffled.mrr.mean)
  for control in (found.zeroed, found.identity):  # H_50 / 50, 1 / 50, 5 / 50, whatever the embeddings
    np.testing.assert_allclose([i.mean for i in control], found.chance, rtol=1e-12)
    assert control.h1.high - control.h1.low < 1e-12


def test_a_head_that_ignores_its_actions_scores_chance(world, key):
  source, bank, actions, scale = world
  still = {'turn': jnp.zeros(())}
  found = retrieval.measure(Partial(ignored, scale), source, bank, actions, still, key, batch=256)
  assert found.over_shuffled[:3] == (0., 0., 0.)
  np.testing.assert_allclose([i.mean for i in found.true], found.chance, rtol=1e-12)
  with pytest.raises(errors.UserError, match='one image has 50 of 50 pairs'):
    retrieval.measure(Partial(ignored, scale), source[:1], bank[:1], {'turn': actions['turn'][:1]}, still, key)
  with pytest.raises(ValueError, match='estimate of the target'):
    retrieval.measure(Partial(lambda p: p.source[:, :2]), source, bank, actions, still, key)


def test_before_is_the_action_of_the_source(world, key):
  source, bank, actions, scale = world
  moved = {'turn': actions['turn'] + np.float32(.5)}  # the source is itself turned, as ImageNet's is a crop
  found = retrieval.measure(Partial(rotated, scale), source, bank, moved, {'turn': jnp.zeros(())}, key)
  assert found.true.mrr.mean == 1. and found.over_shuffled.low > .8


def test_prediction_errors():
  of = lambda degrees: Rotation.from_rotvec(degrees[:, None] * [0., 0., 1.], degrees=True).as_quat()
  q, other = of(np.array([10., 200., 90.])), of(np.array([100., 200., -90.]))
  # 1 - cos^2 of half the angle between: 90, 0 and 180 degrees
  assert retrieval.sie_error(q, other) == pytest.approx((.5 + 0. + 1.) / 3)
  assert retrieval.sie_error(q, -q) == pytest.approx(0., abs=1e-12)
  assert retrieval.stl_error([[1., 2.], [0., 0.]], [[1., 4.], [3., 0.]]) == pytest.approx(13 / 4)
  with pytest.raises(ValueError, match='unit quaternions'):
    retrieval.sie_error(2 * q, other)
  with pytest.raises(ValueError, match='as many'):
    retrieval.stl_error(q, other[:2])


def test_prediction_errors_against_chance():
  told = np.random.RandomState(0).randn(3, 7, 2)
  right, other = np.tile(np.arange(7), (3, 1)), np.tile(np.roll(np.arange(7), 1), (3, 1))
  found = retrieval.errors(retrieval.stl_error, told, {'true': right, 'shuffled': other})
  each = ((told[:, :, None] - told[:, None]) ** 2).mean(-1)
  assert found['true'] == 0 and found['chance'] == pytest.approx(each.mean())
  assert found['shuffled'] == pytest.approx(np.take_along_axis(each, other[..., None], 2).mean())
  q = retrieval.quaternion(np.array([[0., 90., 180., 270.]]))
  found = retrieval.errors(retrieval.sie_error, q, {'true': np.array([[1, 1, 1, 1]])})
  assert found == {'true': pytest.approx((.5 + 0. + .5 + 1.) / 4), 'chance': pytest.approx(.5)}


# -- regression

@pytest.fixture(scope='module')
def panel():
  """Features [300 12], [200 12] that know the first two of four components in part, the third not at all; the last is
  constant. Components of different means and scales, one feature is dead."""
  random = np.random.RandomState(0)
  y = random.randn(500, 4) * [1., .01, 3., 0.] + [5., 0., -2., .7]
  hidden = np.concatenate([(y[:, :2] - [5., 0.]) * [1., 100.], random.randn(500, 9)], axis=1)
  x = np.concatenate([hidden @ random.randn(11, 11) + .3 * random.randn(500, 11), np.ones((500, 1))], axis=1)
  x, y = x.astype(np.float32), y.astype(np.float32)
  return x[:300], y[:300], x[300:], y[300:]


NAMES = ('known', 'small', 'unknown', 'constant')


def test_linear_r2_is_scikit_learns(panel):
  x, y, xt, yt = panel
  found = regression.r2(*panel, names=NAMES)
  assert found.protocol == 'r2 linear' and found.chosen['constant'] == ['constant']
  scale, z = StandardScaler().fit(x.astype(np.float64)), y[:, :3].astype(np.float64)
  model = Ridge(found.chosen['penalty'] * len(x)).fit(scale.transform(x), (z - z.mean(0)) / z.std(0))
  want = model.predict(scale.transform(xt)) * z.std(0) + z.mean(0)
  each = r2_score(yt[:, :3], want, multioutput='raw_values')
  np.testing.assert_allclose(list(found.components.values()), each, atol=1e-4)
  assert list(found.components) == list(NAMES[:3])
  assert found.averaged == pytest.approx(r2_score(yt[:, :3], want), abs=1e-4)
  assert found.pooled == pytest.approx(r2_score(yt[:, :3].ravel(), want.ravel()), abs=1e-4)
  assert min(found.components['known'], found.components['small']) > .5 > .1 > found.components['unknown']
  means = np.broadcast_to(z.mean(0), (200, 3))
  assert found.pooled_chance == pytest.approx(r2_score(yt[:, :3].ravel(), means.ravel()), abs=1e-4)
  assert found.pooled_chance > .5  # for the means alone


def test_the_penalty_is_chosen_without_the_test_set(panel):
  x, y, xt, yt = panel
  found, again = regression.r2(*panel), regression.r2(x, y, xt, yt[::-1])
  assert found.chosen == again.chosen and again.averaged < .05
  weak = regression.r2(*panel, penalties=(1e6,))
  assert abs(weak.averaged) < .05 and weak.chosen['penalty'] == 1e6
  out = regression.held_out_mask(np.zeros(300, np.int64))
  assert out.sum() == 60
  tried = {c: regression.r2(x[~out], y[~out], x[out], y[out], penalties=(c,)).averaged for c in regression.PENALTIES}
  assert found.chosen['penalty'] == max(tried, key=tried.get)


@pytest.mark.parametrize('kind', ['linear', 'mlp'])
def test_shuffled_actions_cannot_be_read(panel, key, kind, monkeypatch):
  monkeypatch.setattr(regression, 'WIDTH', 32)
  settings = {'epochs': 15, 'rate': 3e-3, 'batch': 64} if kind == 'mlp' else {}
  found = regression.with_controls(*panel, kind, key, NAMES, **settings)
  assert min(found['true'].components['known'], found['true'].components['small']) > .35
  assert max(found['shuffled'].components.values()) < .1 and found['shuffled'].averaged < .05
  assert found['shuffled'].pooled == pytest.approx(found['true'].pooled_chance, abs=.1)
  if kind == 'mlp':
    assert found['true'].protocol == 'r2 mlp, 15 epochs'


def test_mlp_reads_what_is_not_linear(key, monkeypatch):
  monkeypatch.setattr(regression, 'WIDTH', 32)
  x = np.random.RandomState(0).uniform(-1, 1, (800, 3)).astype(np.float32)
  y = np.abs(x[:, :1]) * 7 + 100
  data = x[:600], y[:600], x[600:], y[600:]
  assert regression.r2(*data).averaged < .1
  found, again = (regression.r2(*data, kind='mlp', key=key, epochs=100, rate=1e-2) for _ in range(2))
  assert found.averaged > .9 and found == again
  assert found.pooled == pytest.approx(found.averaged)  # of one component


def test_regression_refuses_what_it_cannot_read(panel):
  x, y, xt, yt = panel
  with pytest.raises(errors.UserError, match='is constant'):
    regression.r2(x, y[:, 3:], xt, yt[:, 3:])
  with pytest.raises(errors.UserError, match="no regression 'forest'"):
    regression.r2(*panel, kind='forest')
  with pytest.raises(errors.UserError, match='too few'):
    regression.r2(x[:5], y[:5], xt, yt)
  with pytest.raises(errors.UserError, match='300 of 300 images are not finite'):
    regression.r2(x * np.float32(np.nan), y, xt, yt)
  with pytest.raises(ValueError, match='have 2 names'):
    regression.r2(*panel, names=('a', 'b'))


# -- CARE

@pytest.mark.parametrize(('n', 'd'), [(40, 6), (6, 40), (9, 9)])
def test_a_rotation_has_no_error(n, d):
  before = randn(n, d)
  found = care_measure.wahba(before, before @ orthogonal(d))
  assert found.error < 1e-5 * np.linalg.norm(before) and found.relative < 1e-5
  assert care_measure.gamma(before, before @ orthogonal(d)) < 1e-9
  assert care_measure.gamma(before, before @ orthogonal(d, det=-1)) < 1e-9


@pytest.mark.parametrize('det', [1, -1])
def test_wahba_is_the_least_over_rotations(det):
  before = randn(8, 3)
  after = (before @ orthogonal(3, det=det) + .1 * randn(8, 3, seed=1)).astype(np.float64)
  error = lambda v: np.linalg.norm(before @ Rotation.from_rotvec(v).as_matrix() - after)
  want = min(minimize(error, start, method='Nelder-Mead', options={'xatol': 1e-9, 'fatol': 1e-12, 'maxiter': 4000}).fun
             for start in 2 * np.random.RandomState(0).randn(5, 3))
  found = care_measure.wahba(before, after)
  assert found.error == pytest.approx(want, rel=1e-6)
  assert found.relative == pytest.approx(want / np.linalg.norm(after), rel=1e-6)
  if det < 0:  # a reflection is no rotation: an orthogonal map would do better
    assert found.error > 2 * np.linalg.norm(before @ orthogonal(3, det=det) - after)


def test_wahba_of_fewer_images_than_dimensions():
  before, after = randn(4, 9), randn(4, 9, seed=1)
  s = np.linalg.svd(after.T.astype(np.float64) @ before, compute_uv=False)
  want = np.sqrt(np.sum(before.astype(np.float64) ** 2) + np.sum(after.astype(np.float64) ** 2) - 2 * s.sum())
  assert care_measure.wahba(before, after).error == pytest.approx(want, rel=1e-6)


def test_gamma_is_the_mean_of_ratios():
  before, after = randn(6, 4), randn(6, 4, seed=1)
  square = lambda a, b: np.sum((a.astype(np.float64) - b) ** 2)
  ratios = [(square(after[j], after[i]) - square(before[j], before[i])) ** 2
            / (square(after[j], before[j]) + square(after[i], before[i])) ** 2
            for i, j in itertools.permutations(range(6), 2)]
  assert care_measure.gamma(before, after, cap=np.inf) == pytest.approx(np.mean(ratios), rel=1e-9)
  assert care_measure.gamma(before, after) == pytest.approx(np.mean(np.minimum(ratios, 1.)), rel=1e-9)


def test_ignoring_the_action_is_gammas_worst():
  before = randn(20, 6)
  assert care_measure.gamma(before, before) == care_measure.gamma(before, before, cap=np.inf) == 1.
  nearly = before + 1e-4 * randn(20, 6, seed=1)
  assert care_measure.gamma(before, nearly) > .9 and care_measure.gamma(before, nearly, cap=np.inf) > 100.
  found = care_measure.over_actions(before, np.stack([before] * 3))
  assert found.gamma[:3] == (1., 1., 1.) and found.relative.mean < 1e-6
  collapsed = np.zeros((20, 6), np.float32)
  assert care_measure.wahba(collapsed, collapsed) == (0., 0.) and care_measure.gamma(collapsed, collapsed) == 1.


def test_care_is_over_actions():
  before = randn(30, 6)
  after = np.stack([before @ orthogonal(6, s) + .1 * s * randn(30, 6, seed=s) for s in (1, 2, 3)])
  found = care_measure.over_actions(before, after)
  each = [care_measure.wahba(unit(before), unit(a)) for a in after]
  np.testing.assert_allclose(found.relative[:3], statistics.interval([w.relative for w in each])[:3])
  gammas = [care_measure.gamma(unit(before), unit(a)) for a in after]
  np.testing.assert_allclose(found.gamma[:3], statistics.interval(gammas)[:3])
  assert found.error.n == found.relative.n == found.gamma.n == 3
  assert care_measure.over_actions(before, after, sphere=False).error.mean > 1.5 * found.error.mean
  with pytest.raises(errors.UserError, match='no pair'):
    care_measure.gamma(before[:1], before[:1])
  with pytest.raises(errors.UserError, match='30 of 30'):
    care_measure.over_actions(before, after * np.nan)
  with pytest.raises(ValueError, match='before and after'):
    care_measure.wahba(before, before[:2])


# -- profile

@pytest.mark.parametrize('centered', [True, False])
def test_drift_is_the_float64_cosines(key, centered):
  h, views = randn(20, 6) + 3, randn(20, 4, 6, seed=1) + 3
  a, b = (unit(x - h.mean(0, dtype=np.float64) * centered) for x in (h, views))
  per_image = 1 - np.einsum('nd,nvd->nv', a, b).mean(1)
  found = profile.drift(h, views, key, centered)
  np.testing.assert_allclose(found.view[:3], statistics.interval(per_image)[:3], atol=1e-9)
  assert found.ratio.mean == pytest.approx(found.view.mean / found.other.mean)
  assert (found.other.mean > .8) == centered  # features that share a large mean look alike
  assert found.view.n == found.other.n == found.ratio.n == 20


@pytest.mark.parametrize('centered', [True, False])
def test_features_that_ignore_the_augmentation_do_not_drift(key, centered):
  h = np.abs(randn(50, 7))
  found = profile.drift(h, np.repeat(h[:, None], 3, axis=1), key, centered)
  assert found.view[:3] == found.ratio[:3] == (0., 0., 0.) and found.other.mean > .1
  collapsed = np.full((50, 7), .3, np.float32)
  rounded = np.nextafter(collapsed, np.float32(1.))[:, None]  # float32's noise is no direction
  assert profile.drift(collapsed, rounded, key, centered).view.mean == pytest.approx(0., abs=1e-12)


def test_a_view_of_a_stranger_has_drifted_away(key):
  h = randn(400, 6)
  found = profile.drift(h, np.roll(h, 1, axis=0)[:, None], key)
  assert found.ratio.low < 1. < found.ratio.high
  with pytest.raises(errors.UserError, match='no other image'):
    profile.drift(h[:1], h[:1, None], key)
  with pytest.raises(ValueError, match=r'\[N V D\]'):
    profile.drift(h, h, key)


# -- health

def test_rankme_counts_dimensions():
  assert health.rankme(7 * np.eye(32)[:, :8]) == pytest.approx(8, rel=1e-4)
  assert health.rankme(np.outer(randn(50), randn(8))) == pytest.approx(1, abs=1e-4)
  assert health.rankme(np.zeros((5, 3))) == 0.
  x = randn(40, 8) * np.arange(1, 9, dtype=np.float32)
  p = np.linalg.svd(x.astype(np.float64), compute_uv=False)
  np.testing.assert_allclose(health.spectrum(x), p, rtol=1e-9)
  p = p / p.sum()
  assert health.rankme(x) == pytest.approx(np.exp(-np.sum(p * np.log(p))), rel=1e-5)
  wide = health.spectrum(x[:3])
  np.testing.assert_allclose(wide[:3], np.linalg.svd(x[:3].astype(np.float64), compute_uv=False), rtol=1e-9)
  assert wide.shape == (8,) and not wide[3:].any()


def test_lidar_counts_the_dimensions_that_tell_objects_apart():
  means = np.concatenate([np.eye(8), -np.eye(8)])[:, None, :]
  noise = .01 * randn(16, 30, 8)
  assert health.lidar(means + noise) == pytest.approx(8, rel=.05)
  half = means * (np.arange(8) < 4)
  assert health.lidar(half + noise) == pytest.approx(4, rel=.1)
  x = randn(6, 3, 4).astype(np.float64)  # the published form, with the root
  center = x.mean(1)
  between = sum(np.outer(m - center.mean(0), m - center.mean(0)) for m in center) / 6
  within = sum(np.outer(e, e) for e in (x - center[:, None]).reshape(-1, 4)) / 18 + 1e-4 * np.eye(4)
  values, axes = np.linalg.eigh(within)
  root = axes @ np.diag(values ** -.5) @ axes.T
  p = np.linalg.eigvalsh(root @ between @ root)
  p = p / p.sum()
  assert health.lidar(x) == pytest.approx(np.exp(-np.sum(p * np.log(p))), rel=1e-5)
  with pytest.raises(errors.UserError, match='1 views of 6 images'):
    health.lidar(x[:, :1])


def test_alignment():
  z = randn(10, 3, 5)
  assert health.alignment(np.repeat(z[:, :1], 2, axis=1)) == 0.
  assert health.alignment(np.stack([z[:, 0], -2 * z[:, 0]], axis=1)) == pytest.approx(4.)
  u = unit(z)
  pairs = [np.sum((u[:, v] - u[:, w]) ** 2, axis=1) for v, w in ((0, 1), (0, 2), (1, 2))]
  assert health.alignment(z) == pytest.approx(np.mean(pairs))
  with pytest.raises(errors.UserError, match='one view'):
    health.alignment(z[:, :1])


@pytest.mark.parametrize('n', [2, 37])
def test_uniformity(n, monkeypatch):
  monkeypatch.setattr(health, 'PAIRS', 37 * 8)  # chunks of 8, the last not full
  z = randn(n, 5)
  u = unit(z)
  square = np.sum((u[:, None] - u[None]) ** 2, axis=2)[~np.eye(n, dtype=bool)]
  assert health.uniformity(z) == pytest.approx(np.log(np.mean(np.exp(-2 * square))), abs=1e-5)
  assert health.uniformity(np.ones((n, 5), np.float32)) == pytest.approx(0., abs=1e-5)
  with pytest.raises(errors.UserError, match='one image'):
    health.uniformity(z[:1])


def test_health_reports_collapse_and_dead_dimensions():
  random = randn(200, 8)
  random[:, 6:] = .3
  views = random[:, None] + .1 * randn(200, 2, 8, seed=1)
  found = health.health(random, views)
  assert found.dead == .25 and found.spectrum.shape == (8,) and found.rankme == health.rankme(random)
  assert found.lidar == health.lidar(views) and found.alignment == health.alignment(views)
  assert found.uniformity == health.uniformity(views[:, 0])
  np.testing.assert_allclose(found.std, unit(random).std(0).mean() * np.sqrt(8), rtol=1e-5)
  alone = health.health(random)
  assert alone.lidar is None and alone.alignment is None and alone.uniformity == health.uniformity(random)
  collapsed = health.health(np.full((50, 8), .5, np.float32))
  assert collapsed.std == pytest.approx(0., abs=1e-5) and collapsed.dead == 1. and collapsed.rankme < 1.001
  with pytest.raises(errors.UserError, match='not finite'):
    health.health(random, views * np.float32(np.nan))


def test_measures_of_a_key_are_repeatable(world, key):
  source, bank, actions, scale = world
  once, again, other = (retrieval.measure(Partial(rotated, scale), source, bank, actions, {'turn': jnp.zeros(())}, k)
                        for k in (key, key, jax.random.key(1)))
  same = lambda a, b: jax.tree.map(np.array_equal, a, b) == jax.tree.map(lambda _: True, a)
  assert same(once, again) and once.shuffled != other.shuffled and once.true == other.true

"""Evaluation: every number against a float64 reference or a closed form, every control against what it controls."""
import io
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from rich.console import Console
from scipy import stats
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from equivariant_ssl import errors
from equivariant_ssl.config import load_config
from equivariant_ssl.data.source import Source, Split
from equivariant_ssl.evaluate import evaluation, fewshot, gains, knn, linear, statistics
from equivariant_ssl.evaluate.features import features, in_batches
from equivariant_ssl.parallel import sharding
from equivariant_ssl.types import Pair

K = 10


@pytest.fixture(scope='module')
def blobs():
  """Features and labels of 10 overlapping classes: training [600 16], test [1000 16]."""
  random = np.random.RandomState(0)
  centers = random.randn(K, 16)
  labels = random.randint(0, K, 1600)
  x = (centers[labels] * .7 + random.randn(1600, 16) + 1.).astype(np.float32)
  return x[:600], labels[:600], x[600:], labels[600:]


@pytest.fixture(scope='module')
def noise():
  """Features that know nothing of their labels."""
  random = np.random.RandomState(1)
  return (random.randn(600, 16).astype(np.float32), random.randint(0, K, 600),
          random.randn(1000, 16).astype(np.float32), random.randint(0, K, 1000))


# -- statistics

def test_interval_is_the_t_test():
  random = np.random.RandomState(0)
  a, b = random.randn(2, 7)
  found, want = statistics.paired(a, b), stats.ttest_rel(a, b).confidence_interval(.95)
  np.testing.assert_allclose([found.mean, found.low, found.high], [np.mean(a - b), want.low, want.high], rtol=1e-10)
  assert found.n == 7
  assert statistics.mean_std(a) == pytest.approx((a.mean(), a.std(ddof=1)))
  assert statistics.interval([1., 1.1, .9]).excludes_zero and not statistics.interval([1., -1.1, .1]).excludes_zero
  with pytest.raises(ValueError):
    statistics.paired(a, b[:1])


def test_one_value_has_no_interval():
  one = statistics.interval([.5])
  assert one == (.5, None, None, 1) and not one.excludes_zero
  assert statistics.mean_std([.5]) == (.5, None)
  assert statistics.interval_text(one) == '+0.50 (n=1)'
  assert statistics.ratio_of_means([1.], [4.]) == (.25, None, None, 1)
  with pytest.raises(ValueError):
    statistics.interval([])


def test_show():
  of = statistics.Interval(.0123, .008, .0166, 3)
  assert statistics.interval_text(of, scale=100) == '+1.23 [0.80, 1.66]'
  assert statistics.interval_text(of._replace(low=-.008), digits=3, sign=False) == '0.012 [-0.008, 0.017]'


def test_few_test_images_are_said_once():
  def result(images):
    return {'trained': [{'detail': {'predictions': [0] * images}}]}
  few = 'Warning: there are only 99 test images. On fewer than 100 an accuracy says little; the brackets show how little.\n'
  for counts, says in (((99, 99, 0), few), ((100, 0), ''), ((), '')):
    console = Console(file=io.StringIO(), width=500)
    evaluation._print_warnings({str(i): result(n) for i, n in enumerate(counts)}, console)
    assert console.file.getvalue() == says


def test_data_without_labels_are_called_by_their_place():
  split = Split(np.zeros((2, 4, 4, 3), np.uint8), np.full((2, 2), 4, np.float32), None)
  source = Source('photos', split, split, None, (.5,) * 3, (.2,) * 3)
  run = types.SimpleNamespace(source=source, config=load_config('smoke', {'data.name': 'folder', 'data.path': '/my/photos'}))
  assert evaluation.unmet_need(run, 'labels')[0] == 'the data (/my/photos) have no labels'
  labels = np.zeros(2, np.int32)
  run.source = source._replace(train=split._replace(labels=labels), test=None)
  assert evaluation.unmet_need(run, 'labels')[0] == 'the data (/my/photos) have no test split'
  run.config = load_config('smoke')
  assert evaluation.unmet_need(run, 'labels')[0] == 'the data (digits) have no test split'


def test_ratio_of_means():
  a = np.array([1., 2., 4.])
  whole, half = statistics.interval(a), statistics.ratio_of_means(a, np.full(3, 2.))
  np.testing.assert_allclose(half[:3], np.array(whole[:3]) / 2)
  exact = statistics.ratio_of_means(3 * a, a)  # the same ratio everywhere: nothing to be unsure of
  np.testing.assert_allclose(exact[:3], 3., rtol=1e-12)


def test_over_images():
  np.testing.assert_allclose(statistics.over_images([1., 2., 3., 4., 9.], [7, 3, 7, 3, 5]), [3., 9., 2.])
  np.testing.assert_allclose(statistics.over_images([1., 2.]), [1., 2.])


def test_top5_is_given_above_five_classes():
  scores = np.array([[6., 5, 4, 3, 2, 1], [1, 1, 1, 1, 1, 1]])
  found = statistics.result('p', scores, np.array([5, 4]), {})
  assert (found.top1, found.top5) == (0., .5)
  np.testing.assert_array_equal(found.predictions, [0, 0])
  assert statistics.result('p', scores[:, :5], np.array([0, 4]), {}).top5 is None


# -- features

def pool(weight, images):
  return images.reshape(images.shape[0], -1) @ weight


@pytest.mark.parametrize('devices', [None, 1, 2, 4, 8])
@pytest.mark.parametrize('N', [3, 13])
def test_every_image_once_on_any_number_of_devices(devices, N):
  random = np.random.RandomState(0)
  images, weight = random.randint(0, 256, (N, 4, 4, 3)).astype(np.uint8), random.randn(48, 5).astype(np.float32)
  mesh = None if devices is None else sharding.mesh(jax.devices()[:devices])
  found = features(Partial(pool, jnp.asarray(weight)), images, batch=6, mesh=mesh)
  want = images.reshape(N, -1).astype(np.float64) / 255 @ weight
  assert found.dtype == np.float32 and found.shape == (N, 5)
  np.testing.assert_allclose(found, want, atol=1e-5)


def test_one_compilation_serves_every_checkpoint():
  traced = []

  def f(weight, rows):
    traced.append(1)
    return {'sum': rows['a'] * weight, 'same': rows['b']}

  for weight in (2., 3.):
    rows = {'a': np.arange(5, dtype=np.float32), 'b': np.arange(10).reshape(5, 2) % 3 == 0}
    found = in_batches(Partial(f, jnp.float32(weight)), rows, 2)
    np.testing.assert_array_equal(found['sum'], rows['a'] * weight)
    np.testing.assert_array_equal(found['same'], rows['b'])
  assert len(traced) == 1


def test_features_refuse_what_they_cannot_read():
  images = np.zeros((3, 4, 4, 3), np.uint8)
  with pytest.raises(errors.UserError, match='3 of 3 images are not finite') as found:
    features(lambda x: jnp.log(x.mean((1, 2)) - 1.), images, batch=2)
  assert found.value.code == errors.NOT_FINITE
  with pytest.raises(ValueError, match='uint8'):
    features(lambda x: x, images.astype(np.float32))
  with pytest.raises(errors.UserError, match='0 images'):
    features(lambda x: x, images[:0])


@pytest.mark.parametrize('protocol', [knn.evaluate, linear.cached])
def test_labeled_protocols_refuse_bad_labels(protocol, blobs):
  x, y, xt, yt = blobs
  with pytest.raises(errors.UserError, match='600 of the 600 training images have no label'):
    protocol(x, np.full(600, -1), xt, yt, K)
  with pytest.raises(errors.UserError, match='label 9, but the data set has 9 classes'):
    protocol(x, y, xt, yt, 9)
  with pytest.raises(errors.UserError, match='1 of 1000 images are not finite'):
    protocol(x, y, np.where(np.arange(1000)[:, None] == 3, np.float32(np.nan), xt), yt, K)
  with pytest.raises(errors.UserError, match='1 of the 1000 test images have no label'):
    protocol(x, y, xt, np.where(np.arange(1000) == 3, -1, yt), K)
  with pytest.raises(ValueError, match='labels of shape'):
    protocol(x, y[:5], xt, yt, K)


# -- kNN

def reference_knn(x, y, xt, k, T):
  u = lambda a: a.astype(np.float64) / np.linalg.norm(a.astype(np.float64), axis=1, keepdims=True)
  s = u(xt) @ u(x).T
  near = np.argsort(-s, axis=1, kind='stable')[:, :k]
  votes = np.zeros((len(xt), K))
  for m in range(len(xt)):
    np.add.at(votes[m], y[near[m]], np.exp(s[m, near[m]] / T))
  return votes.argmax(1)


@pytest.mark.parametrize('k', [1, 30])
def test_knn_is_the_float64_reference(blobs, k, monkeypatch):
  x, y, xt, yt = blobs
  monkeypatch.setattr(knn, 'QUERIES', 300)  # several chunks of either, the last not full
  monkeypatch.setattr(knn, 'BANK', 128)
  found = knn.knn(x, y, xt, K, k=k)
  assert found.dtype == np.int32
  assert np.mean(found == reference_knn(x, y, xt, k, .1)) >= .999
  assert statistics.accuracy(found, yt) > .5


def test_knn_takes_the_earlier_of_equal_neighbors(monkeypatch):
  random = np.random.RandomState(0)
  monkeypatch.setattr(knn, 'BANK', 16)
  x, xt = (np.eye(8, dtype=np.float32)[random.randint(0, 8, n)] for n in (90, 50))  # cosines are 0 or 1
  y = random.randint(0, K, 90)
  np.testing.assert_array_equal(knn.knn(x, y, xt, K, k=5), reference_knn(x, y, xt, 5, .1))


def test_knn_never_counts_what_fills_a_chunk(monkeypatch):
  monkeypatch.setattr(knn, 'BANK', 16)
  x = np.eye(8, dtype=np.float32)[:1]
  np.testing.assert_array_equal(knn.knn(np.repeat(-x, 17, axis=0), np.full(17, 4), x, K, k=5), [4])


def test_knn_says_which_k_and_bears_a_small_temperature(blobs):
  x, y, xt, yt = blobs
  all_of_them = knn.evaluate(x[:40], y[:40], xt, yt, K, k=200, temperature=.005)
  assert all_of_them.protocol == 'knn k=40 T=0.005' and all_of_them.chosen['k'] == 40
  assert np.mean(all_of_them.predictions == reference_knn(x[:40], y[:40], xt, 40, .005)) >= .999
  assert all_of_them.top1 <= all_of_them.top5


# -- linear, on features

def test_cached_is_scikit_learns_logistic_regression(blobs):
  x, y, xt, yt = blobs
  found = linear.cached(x, y, xt, yt, K)
  assert found.protocol == 'cached' and found.chosen['converged'] and found.top1 < found.top5
  model = make_pipeline(StandardScaler(), LogisticRegression(C=1 / (found.chosen['penalty'] * 600), max_iter=1000))
  want = model.fit(x.astype(np.float64), y).predict(xt.astype(np.float64))
  assert np.mean(found.predictions == want) >= .999
  assert found.top1 == pytest.approx(np.mean(found.predictions == yt))


def test_cached_is_chosen_without_the_test_set(blobs):
  x, y, xt, yt = blobs
  found, again = linear.cached(x, y, xt, yt, K), linear.cached(x, y, xt, (yt + 1) % K, K)
  np.testing.assert_array_equal(found.predictions, again.predictions)
  assert found.chosen == again.chosen and again.top1 < .3


def test_cached_ignores_scale_and_dead_dimensions(blobs):
  x, y, xt, yt = blobs
  dead = lambda a: np.concatenate([a * np.float32(1e-3), np.full((len(a), 2), .3, np.float32)], axis=1)
  found, again = linear.cached(x, y, xt, yt, K), linear.cached(dead(x), y, dead(xt), yt, K)
  assert np.mean(found.predictions == again.predictions) >= .999


def test_cached_on_few_classes(blobs):
  x, y, xt, yt = blobs
  two = y < 2
  found = linear.cached(x[two], y[two], xt, yt, K)  # eight classes that training never saw
  assert set(found.predictions) == {0, 1} and found.top1 < .3
  some = np.isin(y, (3, 7))
  assert set(linear.cached(x[some], y[some], xt, yt, K).predictions) == {3, 7}
  found = linear.cached(x[two], y[two], xt[yt < 2], yt[yt < 2], 2)
  assert found.top5 is None and found.top1 > .8
  with pytest.raises(errors.UserError, match='one class'):
    linear.cached(x[y == 3], y[y == 3], xt, yt, K)


def test_held_out_is_a_part_of_every_class():
  labels = np.array([0] * 50 + [2] * 13 + [3])
  out = linear.held_out_mask(labels, .2)
  np.testing.assert_array_equal(np.bincount(labels[out], minlength=4), [10, 0, 2, 0])
  np.testing.assert_array_equal(out, linear.held_out_mask(labels, .2))


def test_real_scans():
  pixels, labels = load_digits(return_X_y=True)
  order = np.random.RandomState(0).permutation(len(labels))
  x, y = pixels[order].astype(np.float32), labels[order]
  data = x[:1000], y[:1000], x[1000:], y[1000:], K
  assert linear.cached(*data).top1 > .94 and knn.evaluate(*data).top1 > .85
  assert fewshot.few_labels(*data, jax.random.key(0)).mean > .7


# -- few labels

def reference_ridge(x, y, xt):
  """Ridge on one-hot targets with an intercept; the penalty of the least leave-one-out squared error, by leaving
  one out."""
  def fit(x, y, penalty):
    center, Y = x.mean(0), np.eye(K)[y]
    c = x - center
    w = np.linalg.solve(c.T @ c + penalty * np.eye(x.shape[1]), c.T @ (Y - Y.mean(0)))
    return lambda z: (z - center) @ w + Y.mean(0)
  losses = []
  for penalty in np.array(fewshot.RIDGES) * x.shape[1]:
    others = [np.arange(len(x)) != i for i in range(len(x))]
    losses.append(sum(((fit(x[o], y[o], penalty)(x[~o]) - np.eye(K)[y[~o]]) ** 2).sum() for o in others))
  return fit(x, y, fewshot.RIDGES[int(np.argmin(losses))] * x.shape[1])(xt).argmax(1)


def test_few_labels_is_ridge_with_one_left_out(blobs, key):
  x, y, xt, yt = blobs
  found = fewshot.few_labels(x, y, xt, yt, K, key, per_class=3, trials=2)
  z, zt = (a.astype(np.float64) - x.mean(0, dtype=np.float64) for a in (x, xt))
  z, zt = z / x.std(0, dtype=np.float64), zt / x.std(0, dtype=np.float64)
  for accuracy, rows in zip(found.trials, fewshot.subsets(y, K, key, 3, 2), strict=True):
    assert accuracy == pytest.approx(np.mean(reference_ridge(z[rows], y[rows], zt) == yt), abs=.0011)
  assert (found.mean, found.std) == pytest.approx((found.trials.mean(), found.trials.std(ddof=1)))
  assert found.protocol == 'few_labels 3 a class, ridge, 2 trials'


def test_few_labels_are_balanced_and_drawn_by_key(blobs, key):
  _, y, _, _ = blobs
  rows = fewshot.subsets(y, K, key, 5, 4)
  for one in rows:
    np.testing.assert_array_equal(np.bincount(y[one]), np.full(K, 5))
    assert len(set(one)) == 50
  assert len({tuple(r) for r in rows}) == 4
  np.testing.assert_array_equal(rows[:2], fewshot.subsets(y, K, key, 5, 2))
  assert not np.array_equal(rows, fewshot.subsets(y, K, jax.random.key(1), 5, 4))
  with pytest.raises(errors.UserError, match='Class 3 has 2 training images'):
    fewshot.subsets(np.array([0] * 5 + [1] * 5 + [2] * 5 + [3] * 2), 4, key, 5, 1)


def test_random_labels_give_chance(noise, key):
  sigma = np.sqrt(.1 * .9 / 1000)
  for top1 in (knn.evaluate(*noise, K).top1, linear.cached(*noise, K).top1,
               fewshot.few_labels(*noise, K, key).mean):
    assert abs(top1 - .1) < 4 * sigma


# -- equivariance

def embeddings(N=30, E=8, seed=0):
  random = np.random.RandomState(seed)
  return (random.randn(N, E).astype(np.float32) for _ in range(3))


def test_gains_are_the_float64_formulas():
  source, target, predicted = embeddings()
  predicted = (target + predicted * np.linspace(.01, 1, 30)[:, None]).astype(np.float32)
  image = np.arange(30) // 3
  pairs = gains.per_pair(source, target, predicted, batch=8)
  u = lambda a: a.astype(np.float64) / np.linalg.norm(a.astype(np.float64), axis=1, keepdims=True)
  to_source, to_predicted = (u(target) * u(source)).sum(1), (u(target) * u(predicted)).sum(1)
  np.testing.assert_allclose(pairs.absolute, to_predicted - to_source, atol=1e-6)
  np.testing.assert_allclose(pairs.relative, (1 - to_source) / np.maximum(1 - to_predicted, 1e-4), rtol=2e-3)
  found = gains.gains(pairs, image)
  per_image = (to_predicted - to_source).reshape(10, 3).mean(1)
  np.testing.assert_allclose(found.absolute[:3], statistics.interval(per_image)[:3], atol=1e-6)
  assert found.ratio.mean == pytest.approx(
      np.maximum(1 - to_source, 1e-4).mean() / np.maximum(1 - to_predicted, 1e-4).mean(), rel=1e-5)
  assert found.absolute.n == found.relative.n == found.ratio.n == 10
  assert found.absolute.excludes_zero and found.ratio.low > 1


@pytest.mark.parametrize('same', [False, True])
def test_an_identity_predictor_gains_exactly_nothing(same):
  source, target, _ = embeddings(N=1001)
  found = gains.gains(gains.per_pair(source, source if same else target, source, batch=256))
  assert found.absolute[:3] == (0., 0., 0.) and found.relative[:3] == (1., 1., 1.) and found.ratio.mean == 1.


def test_views_of_one_image_do_not_narrow_the_interval():
  arrays = list(embeddings())
  once = gains.gains(gains.per_pair(*arrays))
  many = gains.per_pair(*(np.repeat(a, 4, axis=0) for a in arrays))
  np.testing.assert_allclose(gains.gains(many, np.repeat(np.arange(30), 4)).absolute, once.absolute)
  assert gains.gains(many).absolute.low > once.absolute.low


@pytest.mark.parametrize('image', [np.arange(9), np.arange(40) // 4, np.array([5, 5, 5, 2, 2, 9, 9, 1, 5, 1])])
def test_shuffled_actions_are_of_another_image(key, image):
  found = gains.shuffle(key, image)
  np.testing.assert_array_equal(np.sort(found), np.arange(len(image)))
  assert (image[found] != image).all()
  assert not np.array_equal(found, gains.shuffle(jax.random.key(1), image))


def test_shuffled_actions_are_of_any_view(key):
  found = gains.shuffle(key, np.arange(4000) // 4)  # four turns of each of 1000 images, in turn
  assert abs(np.mean(found % 4 == np.arange(4000) % 4) - .25) < .03
  with pytest.raises(errors.UserError, match='one image has 3 of 5 pairs'):
    gains.shuffle(key, np.array([0, 0, 0, 1, 1]))


def shift_estimate(weight, pair):
  return pair.source + (pair.after['shift'] - pair.before['shift']) @ weight


def ignored(weight, pair):
  return pair.source + weight[:1]


@pytest.fixture(scope='module')
def world():
  """A world in which an action moves an embedding by a linear map, 40 images of 3 views."""
  random = np.random.RandomState(0)
  weight, actions = random.randn(4, 8).astype(np.float32), random.randn(120, 4).astype(np.float32)
  source = np.repeat(random.randn(40, 8), 3, axis=0).astype(np.float32)
  pair = Pair(source, source + actions @ weight, {'shift': np.zeros_like(actions)}, {'shift': actions})
  return pair, jnp.asarray(weight), np.arange(120) // 3


def test_controls_tell_knowing_from_guessing(world, key):
  pair, weight, image = world
  found = gains.measure(Partial(shift_estimate, weight), pair, {'shift': jnp.zeros(4)}, key, image, batch=50)
  drift = gains.per_pair(pair.source, pair.target, pair.source).drift
  assert found.true.absolute.mean == pytest.approx(drift.mean(), abs=1e-6)  # the error is 0
  assert found.over_shuffled.low > 0 and found.over_shuffled.n == 40
  assert found.over_shuffled.mean == pytest.approx(found.true.absolute.mean - found.shuffled.absolute.mean)
  assert found.shuffled.absolute.mean < .2 * found.true.absolute.mean
  assert found.zeroed.absolute[:3] == found.identity.absolute[:3] == (0., 0., 0.)
  assert found.over_zeroed.mean == pytest.approx(found.true.absolute.mean)
  assert np.isfinite(found.true.relative).all() and np.isfinite(found.true.ratio).all()


def test_a_head_that_ignores_its_actions_gains_nothing_from_them(world, key):
  pair, weight, image = world
  found = gains.measure(Partial(ignored, weight), pair, {'shift': jnp.zeros(4)}, key, image, batch=50)
  assert found.over_shuffled[:3] == found.over_zeroed[:3] == (0., 0., 0.)
  assert not found.over_shuffled.excludes_zero
  with pytest.raises(ValueError, match='estimate of the target'):
    gains.measure(Partial(lambda p: p.source[:, :2]), pair, {'shift': jnp.zeros(4)}, key, image, batch=50)

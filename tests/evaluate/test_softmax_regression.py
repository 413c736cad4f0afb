"""`cached` on the devices: the optimum of float64, on any number of devices and in any chunks, and what it says of itself."""
import jax
import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import logsumexp

from equivariant_ssl.evaluate import (
  features,
  health,
  knn,
  linear,
  logistic,
  row_sums,
  softmax_regression,
  statistics,
)
from equivariant_ssl.parallel import sharding

N, M, D, K = 210, 90, 6, 4
PENALTIES = (1e-1, 1e-3)


def data(seed, count):
  """Features of very different scales, mixed, with a large mean and one dead dimension."""
  random, basis = np.random.default_rng(seed), np.random.default_rng(9)
  y = random.integers(0, K, count)
  x = basis.standard_normal((K, D))[y] + .8 * random.standard_normal((count, D))
  x = (x * np.logspace(0, -3, D)) @ basis.standard_normal((D, D)) + 5.
  x[:, -1] = 2.
  return x.astype(np.float32), y


@pytest.fixture(scope='module', params=[1, 8])
def mesh(request):
  return sharding.mesh(jax.devices()[:request.param])


def exact(x, y, penalty):
  """(weights, bias, objective) of the optimum in float64, on standardized features."""
  z = linear.standardizer(x)(x)

  def objective(flat):
    theta = flat.reshape(D + 1, K)
    scores = z @ theta[:-1] + theta[-1]
    log_p = scores - logsumexp(scores, axis=1, keepdims=True)
    error = (np.exp(log_p) - np.eye(K)[y]) / len(y)
    value = -log_p[np.arange(len(y)), y].mean() + .5 * penalty * np.sum(theta[:-1] ** 2)
    return value, np.concatenate([z.T @ error + penalty * theta[:-1], error.sum(0)[None]]).ravel()
  best = minimize(objective, np.zeros((D + 1) * K), jac=True, method='L-BFGS-B',
                  options={'gtol': 1e-9, 'ftol': 0., 'maxiter': 10000, 'maxfun': 20000})
  theta = best.x.reshape(D + 1, K)
  return theta[:-1], theta[-1], best.fun


def test_the_fit_is_the_optimum_of_float64(mesh):
  x, y = data(0, N)
  out = linear.held_out_mask(y, .2)
  chosen = softmax_regression.choose(x, y, out, K, PENALTIES, mesh)
  weights, bias, objective = exact(x, y, chosen.penalty)
  assert chosen.fit.converged and chosen.difference < 1e-4
  assert 0 <= chosen.fit.objective - objective < 2e-6 * objective + 1e-6
  here = linear.standardizer(x)(x) @ np.asarray(chosen.fit.weights) + np.asarray(chosen.fit.bias)
  there = linear.standardizer(x)(x) @ weights + bias
  assert (here.argmax(1) == there.argmax(1)).mean() > .99
  # The penalty is that of the more accurate fit to the rows that are not held out.
  top1 = []
  for penalty in PENALTIES:
    w, b, _ = exact(x[~out], y[~out], penalty)
    top1.append((((x[out] - x[~out].mean(0)) / np.maximum(x[~out].std(0), 1e-9) @ w + b).argmax(1) == y[out]).mean())
  assert abs(top1[0] - top1[1]) < .02 or chosen.penalty == PENALTIES[int(np.argmax(top1))]


def test_cached_says_which_solver_it_took_and_they_agree(mesh, monkeypatch):
  (x, y), (test_x, test_y) = data(0, N), data(1, M)
  by_sklearn = linear.cached(x, y, test_x, test_y, K + 1, PENALTIES)
  monkeypatch.setattr(linear, 'LARGE', 0)
  on_devices = linear.cached(x, y, test_x, test_y, K + 1, PENALTIES, mesh)
  assert by_sklearn.protocol == 'cached' and set(by_sklearn.chosen) == {'penalty', 'held_out_top1', 'converged'}
  assert on_devices.protocol == 'cached in float32' and on_devices.chosen['converged']
  assert on_devices.chosen['passes'] > 4 and on_devices.chosen['float64_difference'] < 1e-4
  assert on_devices.chosen['penalty'] == by_sklearn.chosen['penalty']
  assert (on_devices.predictions == by_sklearn.predictions).mean() > .97
  assert on_devices.predictions.max() < K  # a class without training images is never predicted
  monkeypatch.setattr(linear, 'ROUNDING', 0.)
  assert not linear.cached(x, y, test_x, test_y, K + 1, PENALTIES, mesh).chosen['converged']


def test_digits_sized_data_stay_with_scikit_learn():
  assert not linear.is_large(1797, 512, 10) and not linear.is_large(50_000, 512, 10)
  assert linear.is_large(20_000, 512, 100) and linear.is_large(1_281_167, 2048, 1000)


@pytest.mark.parametrize('chunk', [7, 64])
def test_chunks_change_nothing(chunk, monkeypatch):
  mesh, (x, y) = sharding.mesh(jax.devices()[:2]), data(0, N)
  rows = row_sums.make_rows(x, y, mesh)
  weights = np.random.default_rng(3).standard_normal((D, K)).astype(np.float32), np.zeros(K, np.float32)

  def total():
    return jax.jit(row_sums.sum_over_rows(mesh, row_sums.loss_and_gradient, row_sums.no_gradient))(weights, rows)
  whole = total()
  monkeypatch.setattr(row_sums, 'CHUNK', chunk)
  for a, b in zip(total(), whole, strict=True):
    np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-3)


def test_smaller_penalties_are_not_tried_for_ever(monkeypatch):
  mesh, (x, y) = sharding.mesh(jax.devices()[:1]), data(0, N)
  tried = []
  fits = {p: softmax_regression.SoftmaxFit(np.full((D, K), p, np.float32), np.zeros(K, np.float32), 1., 1, True)
          for p in (1., .1, .01, 1e-3, 1e-4)}
  monkeypatch.setattr(softmax_regression, 'minimize', lambda m, r, s, start, p, d: tried.append(p) or fits[p])
  accuracy = {1.: .5, .1: .7, .01: .6, 1e-3: .65, 1e-4: .9}
  judge = lambda shared, rows: (accuracy[round(float(shared[0][0, 0]), 6)], .5)
  programs = softmax_regression.programs(mesh)._replace(judge=judge)
  monkeypatch.setattr(softmax_regression, 'programs', lambda mesh: programs)
  chosen = softmax_regression.choose(x, y, linear.held_out_mask(y, .2), K, tuple(fits), mesh)
  assert tried == [1., .1, .01, 1e-3, .1] and chosen.penalty == .1 and chosen.held_out_top1 == .7


def test_neighbors_are_the_same_over_a_bank_that_is_split(monkeypatch):
  monkeypatch.setattr(knn, 'BANK', 16)
  (x, y), (test_x, test_y) = data(0, N), data(1, M)
  x[100:110] = x[:10]  # equal neighbors, on different devices
  alone = knn.evaluate(x, y, test_x, test_y, K, k=9)
  split = knn.evaluate(x, y, test_x, test_y, K, k=9, mesh=sharding.mesh())
  np.testing.assert_array_equal(split.predictions, alone.predictions)
  assert split.chosen == alone.chosen
  few = knn.evaluate(x[:5], y[:5], test_x, test_y, K, mesh=sharding.mesh())  # fewer rows than devices
  np.testing.assert_array_equal(few.predictions, knn.evaluate(x[:5], y[:5], test_x, test_y, K).predictions)


def test_float64_is_taken_in_blocks_and_says_the_same(monkeypatch):
  (x, y), (test_x, test_y) = data(0, N), data(1, M)
  views = np.stack([x, x + .1 * data(2, N)[0]], axis=1)

  def numbers():
    h = health.health(x, views)
    fit, = logistic.path(x, y, K, (1.,))
    return [h.rankme, h.lidar, h.alignment, h.uniformity, h.std, h.dead, *h.spectrum, *fit.theta.ravel(),
            *statistics.std_of_columns(x), logistic.logistic(x, y, test_x, test_y, K, penalties=(1., .1)).top1]
  at_once = numbers()
  monkeypatch.setattr(statistics, 'BLOCK', 32)
  monkeypatch.setattr(statistics, 'BLOCK_NUMBERS', 2 * N)
  np.testing.assert_allclose(numbers(), at_once, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize('dtype', [np.float32, np.int8, bool])
def test_results_lie_where_jax_reads_them_in_place(dtype):
  array = features.aligned_empty((3, 5), dtype)
  assert array.ctypes.data % 64 == 0 and array.shape == (3, 5) and array.dtype == dtype

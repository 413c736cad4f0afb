"""Protocol 'logistic': its optimum against Newton's method in float64, its choices against the same made by hand."""
import numpy as np
import pytest
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score

from equivariant_ssl import errors
from equivariant_ssl.evaluate import logistic
from equivariant_ssl.evaluate.linear import held_out_mask

K = 4


def with_one(x):
  return np.concatenate([x, np.ones((len(x), 1))], 1).astype(np.float64)


def newton(x, y, classes, penalty):
  """The least  sum of cross-entropies + penalty |theta|^2  [D + 1, K], by damped Newton steps on the whole Hessian."""
  rows, one_hot = with_one(x), np.eye(classes)[y]
  D = rows.shape[1]

  def loss(theta):
    s = rows @ theta
    return np.logaddexp.reduce(s, 1).sum() - (s * one_hot).sum() + penalty * (theta ** 2).sum()

  theta = np.zeros((D, classes))
  for _ in range(100):
    p = softmax(rows @ theta, axis=1)
    gradient = rows.T @ (p - one_hot) + 2 * penalty * theta
    curve = np.einsum('nk,kl->nkl', p, np.eye(classes)) - p[:, :, None] * p[:, None, :]
    hessian = np.einsum('nd,nkl,ne->dkel', rows, curve, rows, optimize=True).reshape(D * classes, -1)
    step = np.linalg.solve(hessian + 2 * penalty * np.eye(D * classes), gradient.ravel()).reshape(theta.shape)
    size = 1.
    while loss(theta - size * step) > loss(theta) and size > 1e-6:
      size /= 2
    theta = theta - size * step
    if np.abs(step).max() < 1e-10 * max(1., np.abs(theta).max()):
      break
  return theta


def blobs(N, seed=0, classes=K, D=6, spread=1.):
  """Features of very different scales, far from 0, and labels that are not balanced."""
  random = np.random.RandomState(seed)
  y = random.choice(classes, N, p=np.arange(1, classes + 1) / np.arange(1, classes + 1).sum())
  x = np.random.RandomState(99).randn(classes, D)[y] + spread * random.randn(N, D)
  return ((x + 3) * np.logspace(-2, 1, D)).astype(np.float32), y


def split():
  return *blobs(240), *blobs(1500, 1), blobs(60, 2)


@pytest.mark.parametrize('penalty', [1e-4, .1, 30.])
@pytest.mark.parametrize('classes', [2, K])
def test_it_is_the_optimum(penalty, classes):
  (x, y), (xt, yt), (xv, yv) = (blobs(n, s, classes) for n, s in ((240, 0), (1500, 1), (60, 2)))
  found = logistic.logistic(x, y, xt, yt, classes, (xv, yv), penalties=(penalty,))
  want = newton(np.concatenate([x, xv]), np.concatenate([y, yv]), classes, penalty)
  predictions = (with_one(xt) @ want).argmax(1)
  assert np.mean(found.predictions == predictions) >= .999
  assert found.top1 == np.mean(found.predictions == yt) > 1.5 / classes
  assert found.chosen['converged'] and found.chosen['penalty'] == penalty and found.protocol == 'logistic'
  fit, = logistic.path(x, y, classes, (penalty,))
  np.testing.assert_allclose(fit.theta, newton(x, y, classes, penalty), atol=2e-3 * np.abs(want).max())


def test_it_is_scikit_learns_with_the_bias_in_the_penalty():
  x, y = blobs(300)
  x = (x - x.mean(0)) / x.std(0) + 1  # scikit-learn needs this, ours does not
  model = LogisticRegression(C=1 / (2 * .5), fit_intercept=False, tol=1e-8, max_iter=10000).fit(with_one(x), y)
  fit, = logistic.path(x, y, K, (.5,))
  np.testing.assert_allclose(fit.theta, model.coef_.T, atol=2e-3)


def test_the_bias_is_penalized():
  y = np.repeat([0, 1, 2], [60, 30, 10])
  for penalty in (1., 50.):
    fit, = logistic.path(np.zeros((100, 2), np.float32), y, 3, (penalty,))
    bias = fit.theta[2]
    np.testing.assert_allclose(100 * softmax(bias) - np.bincount(y) + 2 * penalty * bias, 0, atol=.02)
    np.testing.assert_allclose(fit.theta[:2], 0, atol=1e-12)


def test_a_penalty_is_chosen_on_validation_and_of_equal_ones_the_smallest():
  x, y, xt, yt, valid = split()
  noise = np.random.RandomState(3).randn(1800, 40).astype(np.float32)  # what a small penalty is misled by
  x, xt, xv = (np.concatenate([a, noise[s:s + len(a)]], 1) for a, s in ((x[:80], 0), (xt, 300), (valid[0], 80)))
  penalties = (100., 1e-3, 1., 10., 1e4)
  found = logistic.logistic(x, y[:80], xt, yt, K, (xv, valid[1]), penalties=penalties)
  fits = logistic.path(x, y[:80], K, sorted(penalties))
  by_hand = {f.penalty: np.mean((with_one(xv) @ f.theta).argmax(1) == valid[1]) for f in fits}
  assert found.chosen['validation'] == max(by_hand.values()) > min(by_hand[1e-3], by_hand[1e4])
  assert found.chosen['penalty'] == min(p for p, a in by_hand.items() if a == max(by_hand.values()))
  assert found.chosen['metric'] == 'top1' and found.chosen['value'] == found.top1
  same = logistic.logistic(x, y[:80], xt, yt, K, (xv, np.zeros(60, int)), penalties=(.1001, .1))
  assert same.chosen['penalty'] == .1


def test_without_validation_images_a_tenth_of_each_class_is_held_out():
  x, y, xt, yt, _ = split()
  out = held_out_mask(y, .1)
  found = logistic.logistic(x, y, xt, yt, K, penalties=(.1, 10.), metric='per_class')
  want = logistic.logistic(x[~out], y[~out], xt, yt, K, (x[out], y[out]), penalties=(.1, 10.), metric='per_class')
  assert found.chosen['penalty'] == want.chosen['penalty']
  assert found.chosen['validation'] == want.chosen['validation']
  assert np.mean(found.predictions == want.predictions) >= .999  # the same images in another order
  assert found.chosen['value'] == pytest.approx(balanced_accuracy_score(yt, found.predictions))
  assert found.chosen['value'] != found.top1 == np.mean(found.predictions == yt)


def test_mean_per_class():
  random = np.random.RandomState(0)
  labels, guesses = random.choice([0, 2, 5], 200, p=[.8, .15, .05]), random.choice([0, 2, 5], 200)
  assert logistic.mean_per_class(guesses, labels) == pytest.approx(balanced_accuracy_score(labels, guesses))
  assert logistic.mean_per_class([1, 0, 3], [1, 1, 0]) == .25  # of the two classes that there are
  with pytest.raises(ValueError):
    logistic.mean_per_class([], [])


def test_it_refuses_what_it_cannot_fit():
  x, y, xt, yt, (xv, yv) = split()
  once = {'penalties': (1.,)}
  with pytest.raises(errors.UserError, match=r'^1 of 4 classes have no training image, class 2 for one\.\n') as found:
    logistic.logistic(x[y != 2], y[y != 2], xt, yt, K, **once)
  assert str(found.value).count('\n') == 1
  with pytest.raises(errors.UserError, match='no validation image'):
    logistic.logistic(x, y, xt, yt, K, (xv[yv != 1], yv[yv != 1]), 'per_class', **once)
  with pytest.raises(errors.UserError, match='no test image'):
    logistic.logistic(x, y, xt[yt != 1], yt[yt != 1], K, (xv, yv), 'per_class', **once)
  bad = np.where(np.arange(60)[:, None] == 3, np.float32(np.nan), xv)
  with pytest.raises(errors.UserError, match='1 of 60 images are not finite') as found:
    logistic.logistic(x, y, xt, yt, K, (bad, yv), **once)
  assert found.value.code == errors.NOT_FINITE
  with pytest.raises(errors.UserError, match='240 of the 240 training images have no label'):
    logistic.logistic(x, np.full(240, -1), xt, yt, K)
  with pytest.raises(errors.UserError, match='no metric'):
    logistic.logistic(x, y, xt, yt, K, metric='top5')
  with pytest.raises(errors.UserError, match='No class has 200 training images'):
    logistic.logistic(x, y, xt, yt, K, held=.005)
  with pytest.raises(errors.UserError, match='cannot be held out'):
    logistic.logistic(x, y, xt, yt, K, held=1.)
  with pytest.raises(ValueError, match='> 0'):
    logistic.logistic(x, y, xt, yt, K, penalties=(0.,))

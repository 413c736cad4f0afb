"""Few-shot episodes: their draws by the rules, their classifiers against scikit-learn's on the same episodes."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.multiclass import OneVsRestClassifier

from equivariant_ssl import errors
from equivariant_ssl.evaluate import episodes
from equivariant_ssl.keys import key_for

K, D, WAYS, QUERIES = 8, 24, 5, 16


def images(seed=0, apart=.4, N=600, scale=1., classes=K):
  """Features [N D] around a center for each class, all far from 0, and labels [N]."""
  random = np.random.RandomState(seed)
  y = random.randint(0, classes, N)
  return (scale * (apart * random.randn(classes, D)[y] + random.randn(N, D) + 1.)).astype(np.float32), y


def draws(x, y, key, shots, numbers, queries=QUERIES, ways=WAYS, classes=K):
  """The images [episodes, ways, shots] and [episodes, ways, queries] of episodes, as rows of x."""
  index = np.arange(len(x), dtype=np.float32)[:, None]
  pool, _ = episodes._pool(index, y, classes, ways, shots)
  most = int(pool.size.max())
  one = lambda number: episodes.draw(pool, key_for(key, 'episode', number), ways, shots, queries, most)
  rows = jax.jit(jax.vmap(one))(jnp.asarray(numbers, jnp.int32))
  return [np.asarray(pool.features)[np.asarray(r), 0].astype(int) for r in rows]


@pytest.mark.parametrize('shots, scale', [(1, 1.), (5, 6.)])
def test_logistic_is_liblinears(key, shots, scale):
  x, y = images(scale=scale)
  support, asked = draws(x, y, key, shots, range(40))
  own, want = np.repeat(np.arange(WAYS), shots), np.repeat(np.arange(WAYS), QUERIES)
  scores = jax.jit(jax.vmap(lambda s, q: episodes.logistic(s, q, own, WAYS)))(x[support.reshape(40, -1)],
                                                                         x[asked.reshape(40, -1)])
  found = np.asarray(scores).argmax(2)
  model = OneVsRestClassifier(LogisticRegression(solver='liblinear', tol=1e-8, max_iter=10000))
  theirs = [model.fit(x[s.ravel()], own).predict(x[q.ravel()]) for s, q in zip(support, asked, strict=True)]
  assert np.mean(found == np.array(theirs)) >= .999 and found.shape == (40, WAYS * QUERIES)
  if shots == 1:
    played = episodes.episodes(x, y, K, key, count=40).accuracies
    np.testing.assert_allclose(played, np.mean(found == want[None], axis=1), atol=1e-6)


def test_ridge_and_centroid_are_float64s():
  x, _ = images()
  s, q, own = x[:25], x[25:105], np.repeat(np.arange(WAYS), 5)
  model = Ridge(1., fit_intercept=False).fit(np.c_[s, np.ones(25)], 2. * np.eye(WAYS)[own] - 1.)
  scores = {f: jax.jit(f, static_argnums=3)(s, q, own, WAYS) for f in (episodes.ridge, episodes.centroid)}
  np.testing.assert_allclose(scores[episodes.ridge], model.predict(np.c_[q, np.ones(80)]), atol=1e-4)
  means = s.reshape(WAYS, 5, D).mean(1).astype(np.float64)
  cosine = q @ means.T / np.linalg.norm(q, axis=1)[:, None] / np.linalg.norm(means, axis=1)
  np.testing.assert_allclose(scores[episodes.centroid], cosine, atol=1e-5)


@pytest.fixture(scope='module')
def drawn():
  """Labels, and the images of 300 episodes of 2 shots and 16 queries: the first four classes are short of images."""
  y = np.repeat(np.arange(K), [3, 4, 6, 17, 18, 30, 40, 50])
  return y, *draws(y[:, None], y, jax.random.key(0), 2, range(300))


def test_an_episode_is_of_distinct_classes_and_images(drawn):
  y, support, asked = drawn
  classes = y[support][:, :, 0]
  assert (y[support] == classes[:, :, None]).all() and (y[asked] == classes[:, :, None]).all()
  assert all(len(set(c)) == WAYS for c in classes)
  np.testing.assert_allclose(np.bincount(classes.ravel()) / 300, WAYS / K, atol=5 * .0279)  # 5 standard errors
  rows = np.concatenate([support, asked], 2)[classes >= 4]
  assert all(len(set(r)) == 2 + QUERIES for r in rows)
  for label in range(K):  # no image is left out of either
    assert all(len(set(a[classes == label].ravel())) == np.sum(y == label) for a in (support, asked))


def test_a_short_class_repeats_queries_but_never_its_support(drawn):
  y, support, asked = drawn
  assert not any(set(s) & set(q) for s, q in zip(support.reshape(-1, 2), asked.reshape(-1, QUERIES), strict=True))
  found = asked[y[support[:, :, 0]] == 2] - 7  # of the six images of class 2
  np.testing.assert_allclose(np.bincount(found.ravel()) / found.size, 1 / 6, atol=.05)
  assert abs(np.mean([len(set(q)) for q in found]) - 4 * (1 - .75 ** 16)) < .1  # four are left by the support


def test_small_classes_are_left_out_and_said(key):
  x, y = images(apart=40.)
  y = np.where(np.arange(len(y)) < 4, K, np.where(np.arange(len(y)) < 6, K + 1, y))  # classes of 4 and of 2 images
  found = episodes.episodes(x, y, K + 3, key, shots=2, count=20, classifier='centroid')
  assert found.protocol == '5-way 2-shot centroid, 20 episodes, 2 small classes left out'
  pool, _ = episodes._pool(y[:, None], y, K + 3, WAYS, 2)
  np.testing.assert_array_equal(pool.features[pool.first, 0], np.arange(K + 1))
  np.testing.assert_array_equal(pool.size, np.bincount(y)[:K + 1])
  with pytest.raises(errors.UserError, match='8 of 11 classes have more than 4 images, too few for 9 ways'):
    episodes.episodes(x, y, K + 3, key, ways=9, shots=4)


@pytest.mark.parametrize('classifier', ['logistic', 'ridge', 'centroid'])
def test_noise_is_at_chance_and_far_classes_are_told(key, classifier):
  of = lambda apart: episodes.episodes(*images(1, apart, 4000), K, key, count=1000, classifier=classifier)
  told, noise = of(40.), of(0.)
  assert told.mean == told.low == told.high == 1.
  assert noise.low < 1 / WAYS < noise.high and noise.high - noise.low < .03
  half = 1.96 * noise.accuracies.std() / np.sqrt(1000)
  np.testing.assert_allclose(noise[1:4], np.mean(noise.accuracies) + np.array([0, -half, half]))
  assert noise.protocol == f'5-way 1-shot {classifier}, 1000 episodes'


def test_draws_depend_on_the_key_and_the_number_alone(key):
  x, y = images()
  more, fewer = (episodes.episodes(x, y, K, key, count=n).accuracies for n in (130, 40))
  np.testing.assert_allclose(more[:40], fewer, atol=1e-6)
  assert not np.array_equal(fewer, episodes.episodes(x, y, K, jax.random.key(1), count=40).accuracies)
  turned = x @ np.linalg.qr(np.random.RandomState(0).randn(D, D))[0].astype(np.float32)  # another network, as good
  assert np.mean(np.abs(episodes.episodes(turned, y, K, key, count=40).accuracies - fewer) < 1e-6) > .9


def test_it_refuses_what_it_cannot_play(key):
  x, y = images()
  with pytest.raises(errors.UserError, match='no classifier'):
    episodes.episodes(x, y, K, key, classifier='svm')
  with pytest.raises(errors.UserError, match='cannot be played'):
    episodes.episodes(x, y, K, key, shots=0)
  with pytest.raises(errors.UserError, match='not finite'):
    episodes.episodes(np.where(np.arange(600)[:, None] == 7, np.float32(np.inf), x), y, K, key)
  with pytest.raises(errors.UserError, match='no label'):
    episodes.episodes(x, np.full(600, -1), K, key)
  with pytest.raises(errors.UserError, match='too long for the logistic classifier'):
    episodes.episodes(x * 1000, y, K, key)

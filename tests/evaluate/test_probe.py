"""SGD probes on augmented images: against torch's SGD written out in float64, and many rates against one by one."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from PIL import Image as Pillow

from equivariant_ssl import errors
from equivariant_ssl.data.order import epoch_order
from equivariant_ssl.data.source import Split
from equivariant_ssl.evaluate import inputs, probe
from equivariant_ssl.keys import key_for
from equivariant_ssl.parallel import sharding

PLAIN = probe.ProbeSettings((.2,), 4, 16)


def plain(N, seed):
  """uint8 images of one color each, which crops and flips leave alone, and three classes of them."""
  random = np.random.RandomState(seed)
  labels = random.randint(0, 3, N)
  colors = random.randint(0, 120, (N, 3)) + 120 * np.eye(3, dtype=int)[labels]
  return np.broadcast_to(colors[:, None, None, :], (N, 8, 8, 3)).astype(np.uint8), labels


def split(images, labels):
  return Split(images, np.full((len(images), 2), 8, np.float32), labels)


def color(scale, images):
  return images.mean((1, 2)) * scale


ENCODE = Partial(color, jnp.float32(2.))


def reference(protocol, features, labels, key):
  """Torch's SGD with momentum and CosineAnnealingLR in float64, on features that no augmentation moves; [R D+1 K]."""
  key, N, B = key_for(key, 'probe'), len(labels), protocol.batch
  per_epoch = -(-N // B) if protocol.partial_batch else N // B
  head = probe.torch_linear(key_for(key, 'init'), features.shape[1], 3)
  found = []
  for rate in protocol.rates:
    w = np.concatenate([head.kernel, head.bias[None]]).astype(np.float64)
    memory, step, peak = np.zeros_like(w), 0, rate * (B / protocol.per if protocol.per else 1)
    for epoch in range(protocol.epochs):
      order = np.asarray(epoch_order(key, epoch, N))
      for i in range(per_epoch):
        rows = order[i * B:(i + 1) * B]
        h = np.concatenate([features[rows], np.ones((len(rows), 1))], axis=1)
        p = np.exp(h @ w)
        gradient = h.T @ (p / p.sum(1, keepdims=True) - np.eye(3)[labels[rows]]) / len(rows)
        memory = .9 * memory + gradient
        lr = protocol.end + (peak - protocol.end) * (1 + np.cos(np.pi * step / (protocol.epochs * per_epoch))) / 2
        w, step = w - lr * (gradient + .9 * memory if protocol.nesterov else memory), step + 1
    found.append(w)
  return np.stack(found)


def joined(heads):
  return np.concatenate([heads.kernel, heads.bias[:, None]], axis=1)


@pytest.mark.parametrize('devices,protocol', [
    (None, PLAIN._replace(end=1e-4)), (4, PLAIN._replace(end=1e-4)),
    (None, PLAIN._replace(nesterov=False, per=4)),
    (None, PLAIN._replace(rates=(.05, .2, 1.), partial_batch=True)),
    (4, PLAIN._replace(rates=(.05, .2, 1.), partial_batch=True))])
def test_a_probe_is_torchs_sgd_on_augmented_images(key, devices, protocol):
  mesh = None if devices is None else sharding.mesh(jax.devices()[:devices])
  images, labels = plain(45, 0)  # 45 = 2 batches and 13 images: left out, or a masked batch
  train = lambda images: joined(probe.train(protocol, ENCODE, split(images, labels), 8, 3, key, mesh))
  want = lambda images: reference(protocol, images.mean((1, 2)) / 255 * 2, labels, key)
  np.testing.assert_allclose(train(images), want(images), atol=1e-4)
  if protocol == PLAIN._replace(end=1e-4):
    half = images.copy()
    half[:, :, :4] = 255  # now a crop changes the mean color
    assert np.abs(train(half) - want(half)).max() > .01


def test_torch_linear(key):
  head = probe.torch_linear(key, 400, 50)
  assert head.kernel.shape == (400, 50) and head.bias.shape == (50,)
  for part in head:
    assert .9 / 20 < np.abs(part).max() <= 1 / 20 and abs(np.mean(part)) < .01


def test_equimod_learns_is_named_and_is_the_same_twice(key):
  train, test = split(*plain(45, 0)), split(*plain(30, 1))
  found, again = (probe.evaluate('equimod', ENCODE, train, test, 8, 3, key, epochs=20, batch=16) for _ in range(2))
  assert found.protocol == 'equimod epochs=20 batch=16' and found.top1 >= .9 and found.top5 is None
  np.testing.assert_array_equal(found.predictions, again.predictions)
  with pytest.raises(errors.UserError, match='30 of the 30 test images have no label'):
    probe.evaluate('equimod', ENCODE, train, test._replace(labels=np.full(30, -1)), 8, 3, key)


def test_the_rate_is_chosen_on_held_out_images(key, monkeypatch):
  train, test = split(*plain(60, 0)), plain(30, 1)
  rates = (1e-6, .5, np.inf)  # too slow, right, diverges
  monkeypatch.setitem(probe.PROTOCOLS, 'linear', probe.PROTOCOLS['linear']._replace(rates=rates))
  of = lambda labels: probe.evaluate('linear', ENCODE, train, split(test[0], labels), 8, 3, key, epochs=6, batch=16)
  found, other = of(test[1]), of((test[1] + 1) % 3)
  assert found.chosen['lr'] == other.chosen['lr'] == .5 and found.top1 > .8  # the test labels choose nothing
  assert 0 < found.chosen['held_out_top1'] <= 1


def test_a_probe_that_diverges_says_so(key, monkeypatch):
  monkeypatch.setitem(probe.PROTOCOLS, 'essl', probe.PROTOCOLS['essl']._replace(rates=(np.inf,)))
  few = split(*plain(20, 0))
  with pytest.raises(errors.UserError, match='essl diverged at rate inf'):
    probe.evaluate('essl', ENCODE, few, few, 8, 3, key, epochs=4, batch=16)


def test_center_is_pillows():
  image = np.random.RandomState(0).randint(0, 256, (32, 32, 3)).astype(np.uint8)
  want = np.asarray(Pillow.fromarray(image).resize((36, 36), Pillow.Resampling.BICUBIC))[2:34, 2:34]
  found = np.asarray(jax.jit(lambda pixels: inputs.resized_center(pixels, 36))(jnp.asarray(image, jnp.float32) / 255))
  assert np.abs(np.round(found * 255) - want).max() <= 1

"""The loss and the gradients of a whole step of BYOL's official code, on arrays.py's images and weights.

  python tests/golden/make_haiku.py REPOSITORY     (jax, dm-haiku, optax; see README.md)

REPOSITORY: a checkout of what README.md names; it is imported, and nothing of it is here.
"""
import pathlib
import sys
import types

import arrays
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

WIDTH, HIDDEN, OUT = 8, 12, 6
LAYERS = {'linear': 'linear_0', 'batch_norm': 'norm_0', 'linear_1': 'linear_1'}


class Stub(types.ModuleType):
  __path__ = []

  def __getattr__(self, name: str):
    if name.startswith('__'):
      raise AttributeError(name)
    return Stub(name)

  def __call__(self, *a, **kw):
    return self


class Small(hk.Module):
  """A ResNet of one basic block; the small encoder of ours, padded by zeros on every side."""

  def __init__(self, num_classes=None, bn_config=None, name='encoder'):
    super().__init__(name=name)
    self.norm = bn_config

  def __call__(self, x, is_training: bool):
    conv = lambda name: hk.Conv2D(WIDTH, 3, with_bias=False, padding=[(1, 1), (1, 1)], name=name)
    norm = lambda name, x: hk.BatchNorm(**self.norm, name=name)(x, is_training)
    x = jax.nn.relu(norm('bn1', conv('conv1')(x)))
    h = jax.nn.relu(norm('layer1_0_bn1', conv('layer1_0_conv1')(x)))
    return jax.nn.relu(x + norm('layer1_0_bn2', conv('layer1_0_conv2')(h))).mean((1, 2))


def path(module: str, word: str) -> str:
  """A parameter's path in our network."""
  part, layer = module.split('/')[0], module.split('/~/')[-1].split('/')[-1]
  layer = LAYERS[layer] if part in ('projector', 'predictor') else layer.replace('layer1_0_', 'layer1_0/')
  return f'{part}/{layer}/{dict(w="kernel", b="bias", scale="scale", offset="bias")[word]}'


def shaped(module: str, a: np.ndarray) -> np.ndarray:
  """As ours: haiku's layouts are the same, but that a BatchNorm's arrays have axes of 1."""
  return a.reshape(-1) if 'norm' in module or 'bn' in module else a


def filled(params, at: str = ''):
  """Weights by name; those of the classifier that is trained beside are 0."""
  def of(module, word, a):
    if module.startswith('classifier'):
      return jnp.zeros(a.shape)
    return jnp.asarray(arrays.weight(at + path(module, word), shaped(module, a).shape)).reshape(a.shape)
  return {m: {w: of(m, w, a) for w, a in p.items()} for m, p in params.items()}


if __name__ == '__main__':
  jax.config.update('jax_enable_x64', True)
  for name in ('acme', 'acme.jax', 'tensorflow', 'tensorflow.compat', 'tensorflow.compat.v2', 'tensorflow_datasets', 'dill',
               'tree'):
    sys.modules[name] = Stub(name)
  sys.path.insert(0, sys.argv[1])
  jnp.DeviceArray = jnp.ndarray
  from byol import byol_experiment as official
  official.networks.Small = Small
  official.augmentations.postprocess = lambda inputs, rng: inputs
  official.dataset.normalize_images = lambda images: images
  norm = {'decay_rate': .9, 'eps': 1e-5, 'create_scale': True, 'create_offset': True}
  step = official.ByolExperiment(
      0, 10, arrays.B, 100, False, .996,
      {'projector_hidden_size': HIDDEN, 'projector_output_size': OUT, 'predictor_hidden_size': HIDDEN,
       'encoder_class': 'Small', 'encoder_config': {}, 'bn_config': norm}, {}, {}, {},
      {'use_checkpointing': False, 'checkpoint_dir': '', 'save_checkpoint_interval': 1, 'filename': ''})
  views = np.moveaxis(arrays.images('views', 2), 1, 0)
  inputs = {'view1': jnp.asarray(views[0]), 'view2': jnp.asarray(views[1]), 'labels': jnp.zeros(arrays.B, int)}
  params, state = step.forward.init(jax.random.PRNGKey(0), inputs, is_training=True)
  of = lambda p: step.loss_fn(p, filled(params, 'target/'), state, state, None, inputs)
  grads, (_, logs) = jax.grad(of, has_aux=True)(filled(params))
  found = {path(m, w): shaped(m, np.asarray(a)) for m, p in grads.items() if not m.startswith('classifier')
           for w, a in p.items()}
  assert all(a.dtype == np.float64 for a in found.values())
  np.savez_compressed(pathlib.Path(__file__).parent / 'byol.npz', loss=float(logs['repr_loss']), **found)
  print('byol', float(logs['repr_loss']), len(found), 'arrays')

"""One step on the GPU against the same step on the CPU, float32 at the highest precision: loss and gradient.

Command: python benchmarks/gpu/correctness.py [--batch 64]      (a GPU and jax's CPU backend in one process)
Passes where the loss differs by at most 1e-5 relative and the gradient by at most 1e-3 of its largest value.
"""
import argparse
import sys
from functools import partial

import jax
import numpy as np

from equivariant_ssl import config as configs
from equivariant_ssl import shard, state, step, train


def on(device: jax.Device, batch: int):
  """(loss, gradient leaves, views) of the first step of cifar10_simclr_equimod on noise images, on one device."""
  config = configs.load('cifar10_simclr_equimod', {'dtype': 'float32', 'batch': str(batch), 'data.name': 'digits',
                                                   'size': '32'})
  run = train.prepare(config, shard.mesh([device]))
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (batch, 32, 32, 3), np.uint8)
  cpu = jax.devices('cpu')[0]
  with jax.default_matmul_precision('highest'):
    with jax.default_device(cpu):  # the same weights on both, whatever the backend's initialisation rounds
      first = state.initialiser(run.recipe)(run.key)
    params, stats, data = jax.device_put((first.params, first.stats, step.Batch(
        images, np.full((batch, 2), 32, np.float32))), device)
    key = jax.device_put(run.key, device)
    shown = jax.jit(partial(step.views, run.recipe))(key, 0, data)
    (loss, _), grads = jax.jit(jax.value_and_grad(partial(step.loss, run.recipe), has_aux=True))(params, stats, shown)
  return float(loss), [np.asarray(g) for g in jax.tree.leaves(grads)], [
      np.asarray(v.images) for v in shown.values()]


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--batch', type=int, default=64)
  batch = parser.parse_args().batch
  device = jax.devices()[0]
  (loss, grads, views), (loss_, grads_, views_) = on(device, batch), on(jax.devices('cpu')[0], batch)
  largest = max(np.abs(g).max() for g in grads_)
  loss_error = abs(loss / loss_ - 1)
  gradient_error = max(np.abs(a - b).max() for a, b in zip(grads, grads_, strict=True)) / largest
  view_error = max(np.abs(a - b).max() for a, b in zip(views, views_, strict=True))
  good = loss_error <= 1e-5 and gradient_error <= 1e-3
  print(f'{device.device_kind} against CPU, jax {jax.__version__}, batch {batch}: loss {loss:.6f}, relative difference '
        f'{loss_error:.1e} (at most 1e-5); gradient {gradient_error:.1e} (at most 1e-3); views {view_error:.1e}: '
        f'{"passed" if good else "FAILED"}')
  return 0 if good else 1


if __name__ == '__main__':
  sys.exit(main())

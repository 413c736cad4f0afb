"""One step on the GPU against the same step on the CPU: loss and gradient, in float32 at the highest precision.

Command: python benchmarks/gpu/correctness.py [--batch 64]      (a GPU and jax's CPU backend in one process)
It passes where the loss differs by at most 1e-5, relative, and the gradient by at most 1e-3 of its largest value.
"""
import argparse
import sys
from functools import partial

import jax
import numpy as np

from equivariant_ssl.config import load_config
from equivariant_ssl.parallel import sharding
from equivariant_ssl.training import loop, state, step


def on(device: jax.Device, batch: int, changed: dict[str, str]):
  """(loss, gradient leaves, views) of the first step of cifar10_simclr_equimod on noise images, on one device."""
  config = load_config('cifar10_simclr_equimod', {**changed, 'dtype': 'float32', 'batch': str(batch),
                                                  'data.name': 'digits', 'size': '32'})
  run = loop.prepare_run(config, sharding.mesh([device]))
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (batch, 32, 32, 3), np.uint8)
  cpu = jax.devices('cpu')[0]
  with jax.default_matmul_precision('highest'):
    with jax.default_device(cpu):  # the same weights on both, whatever the backend's initialization rounds
      first = state.initializer(run.recipe)(run.key)
    params, stats, data = jax.device_put((first.params, first.stats, step.Batch(
        images, np.full((batch, 2), 32, np.float32))), device)
    key = jax.device_put(run.key, device)
    shown = jax.jit(partial(step.draw_views, run.recipe))(key, 0, data)
    (loss, _), grads = jax.jit(jax.value_and_grad(partial(step.loss, run.recipe), has_aux=True))(params, stats, shown)
  return float(loss), [np.asarray(g) for g in jax.tree.leaves(grads)], [
      np.asarray(v.images) for v in shown.values()]


def compare(batch: int, changed: dict[str, str]) -> dict:
  """The relative differences between the step of the first device and that of the CPU, for the config `changed` so; and
  whether they are allowed."""
  device = jax.devices()[0]
  (loss, grads, views), (loss_, grads_, views_) = (on(d, batch, changed) for d in (device, jax.devices('cpu')[0]))
  largest = max(np.abs(g).max() for g in grads_)
  apart = lambda xs, ys: max(float(np.abs(a - b).max()) for a, b in zip(xs, ys, strict=True))
  found = {'device': device.device_kind, 'batch': batch, 'loss': loss, 'loss_error': abs(loss / loss_ - 1),
           'gradient_error': apart(grads, grads_) / float(largest), 'views_error': apart(views, views_)}
  return found | {'passed': found['loss_error'] <= 1e-5 and found['gradient_error'] <= 1e-3}


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--batch', type=int, default=64)
  found = compare(parser.parse_args().batch, {})
  print(f'{found["device"]} against CPU, jax {jax.__version__}, batch {found["batch"]}: loss {found["loss"]:.6f}, relative '
        f'difference {found["loss_error"]:.1e} (at most 1e-5); gradient {found["gradient_error"]:.1e} (at most 1e-3); views '
        f'{found["views_error"]:.1e}: {"passed" if found["passed"] else "FAILED"}')
  return 0 if found['passed'] else 1


if __name__ == '__main__':
  sys.exit(main())

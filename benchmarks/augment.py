"""Views/s of whole chains of augmentations on CPU, beside kornia's.

Command: python benchmarks/augment.py [--batch 256,32] [--rounds 3] [--seconds 5]      (extra: kornia)
Two chains: 32 pixels (crop, flip, jitter, gray: cifar10_simclr), and 224 pixels from canvases of 256 (crop, flip, jitter,
gray, blur: imagenet_simclr). kornia has the same ranges and probabilities, each drawn for every image alone, and float32
images; its crop is bicubic as ours is (without the antialiasing that ours has), and its blur has the same window. Each
round has the turns A B A B: the two libraries one after the other, twice. A rate is views over wall seconds; beside it
stands views over CPU seconds of the process, which other programs on the machine disturb less. On a busy machine both are of
use on one core only (taskset -c 0 python ...): torch's threads spin while they wait for a thread that has no core, and their
CPU seconds then say nothing. The bars: 7 times kornia's views/s at 32 pixels, and 2 times at 224.
"""
import argparse
import os
import statistics
import time
from collections.abc import Callable

import jax
import kornia
import kornia.augmentation as K
import numpy as np
import torch

from equivariant_ssl import augment
from equivariant_ssl.config import load_config
from equivariant_ssl.storage import record
from equivariant_ssl.training.recipe import view_chains
from equivariant_ssl.types import Group, Image

# side of the views: (config, side of the canvases, the bar, kornia's chain).
CHAINS = {32: ('cifar10_simclr', 32, 7.), 224: ('imagenet_simclr', 256, 2.)}


def ours(config, canvas: int, batch: int) -> Callable[[int], object]:
  """A function step -> one view of each of `batch` images of noise, computed to the end."""
  groups = {'views': Group(view_chains(config)[:1], config.size)}
  images = np.random.default_rng(0).integers(0, 256, (batch, canvas, canvas, 3), np.uint8)
  sizes = np.full((batch, 2), canvas, np.float32)

  @jax.jit
  def draw(step, images, sizes):
    pixels = Image(images.astype(np.float32) / 255., sizes)
    return augment.views(groups, jax.random.fold_in(jax.random.key(0), step), pixels)['views'].images
  data = jax.device_put((images, sizes))
  return lambda step: jax.block_until_ready(draw(step, *data))


def theirs(config, canvas: int, batch: int) -> Callable[[int], object]:
  """The same of kornia."""
  a, side = config.augment, (config.size, config.size)
  jitter = K.ColorJitter(a.jitter.brightness, a.jitter.contrast, a.jitter.saturation, a.jitter.hue, p=a.jitter.p)
  ops = [K.RandomResizedCrop(side, scale=tuple(a.crop.scale), resample=a.crop.method.upper(), cropping_mode='resample'),
         K.RandomHorizontalFlip(p=a.flip.p), jitter, K.RandomGrayscale(p=a.gray.p)]
  if 'blur' in a.order:
    ops.append(K.RandomGaussianBlur((a.blur.kernel,) * 2, tuple(a.blur.sigma), p=a.blur.p))
  chain = K.AugmentationSequential(*ops, data_keys=['input'], same_on_batch=False)
  images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (batch, 3, canvas, canvas), np.uint8))

  def draw(step: int) -> torch.Tensor:
    with torch.inference_mode():
      return chain(images.float() / 255.)
  return draw


def rates(draw: Callable[[int], object], batch: int, seconds: float) -> tuple[float, float]:
  """Views per wall second, and per CPU second of the process."""
  wall, cpu, steps = time.perf_counter(), time.process_time(), 0
  while not steps or time.perf_counter() - wall < seconds:
    draw(steps)
    steps += 1
  return steps * batch / (time.perf_counter() - wall), steps * batch / (time.process_time() - cpu)


def measure(side: int, batch: int, rounds: int, seconds: float) -> None:
  """Print the rates of one chain."""
  name, canvas, bar = CHAINS[side]
  config = load_config(name)
  libraries = {'equivariant_ssl': ours(config, canvas, batch), 'kornia': theirs(config, canvas, batch)}
  for draw in libraries.values():   # compiled, and warm
    draw(0)
    draw(1)
  measured = {library: [] for library in libraries}
  for _ in range(2 * rounds):
    for library, draw in libraries.items():
      measured[library].append(rates(draw, batch, seconds))
  print(f'{side} pixels, batch {batch}, load {os.getloadavg()[0]:.1f}: {", ".join(config.augment.order)}')
  for library, values in measured.items():
    wall, cpu = ([rate[i] for rate in values] for i in (0, 1))
    print(f'  {library:16s} {statistics.median(wall):9.1f} views/s   {statistics.median(cpu):9.1f} views/CPU s   '
          f'(views/s {", ".join(f"{rate:.0f}" for rate in wall)})')
  wall, cpu = (statistics.median(a[i] for a in measured['equivariant_ssl'])
               / statistics.median(b[i] for b in measured['kornia']) for i in (0, 1))
  print(f'  ours / kornia {wall:.2f} by wall seconds, {cpu:.2f} by CPU seconds; the bar is {bar:g}', flush=True)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--batch', default='256,32', help='images of a batch at 32 and at 224 pixels')
  parser.add_argument('--rounds', type=int, default=3)
  parser.add_argument('--seconds', type=float, default=5., help='seconds of each turn')
  args = parser.parse_args()
  print(f'{record.environment()["cpu"]}, {os.cpu_count()} cores, jax {jax.__version__}, torch {torch.__version__}, kornia '
        f'{kornia.__version__}, torch threads {torch.get_num_threads()}')
  for side, batch in zip(CHAINS, args.batch.split(','), strict=True):
    measure(side, int(batch), args.rounds, args.seconds)


if __name__ == '__main__':
  main()

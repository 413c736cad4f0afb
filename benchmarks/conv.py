"""Speed of a ResNet-18's convolutions on 32x32 images: forward, input gradient, and the weight gradient in two ways.

  python benchmarks/conv.py [--width 32 64] [--batch 128 512] [--repeats 5] [--dtype float32]

Prints GFLOP/s, as the best of the repeats. The functions run in turns (A B A B). "fast" is the weight gradient of
`nets.conv.conv2d` on this backend, and "xla" is XLA's own. The memory is that of the activations.
"""
import argparse
import os
import platform
import time

import jax

from equivariant_ssl.nets import conv


def layers(width: int) -> list[tuple[str, int, int, int, int, int, int]]:
  """(name, side, C, K, kernel, stride, how often the network has the layer)."""
  found = [('stem', 32, 3, width, 3, 1, 1), ('stage 1', 32, width, width, 3, 1, 4)]
  for stage in (2, 3, 4):
    side, C, K = 2 ** (7 - stage), width * 2 ** (stage - 2), width * 2 ** (stage - 1)
    found += [(f'stage {stage} in', side, C, K, 3, 2, 1), (f'stage {stage} skip', side, C, K, 1, 2, 1),
              (f'stage {stage}', side // 2, K, K, 3, 1, 3)]
  return found


def seconds(functions: dict, args: tuple, repeats: int) -> dict[str, float]:
  """The best time of each function. The functions run in turns."""
  compiled = {name: jax.jit(f).lower(*args).compile() for name, f in functions.items()}
  times = {name: [] for name in functions}
  for _ in range(repeats + 1):   # the first round warms up
    for name, f in compiled.items():
      start = time.perf_counter()
      jax.block_until_ready(f(*args))
      times[name].append(time.perf_counter() - start)
  return {name: min(t[1:]) for name, t in times.items()}


def functions(stride: int, padding: int) -> dict:
  """The four functions of (x, kernel, cotangent)."""
  def weight_gradient(convolution):
    return lambda x, k, g: jax.vjp(lambda k: convolution(x, k, stride, padding), k)[1](g)[0]
  return {
      'forward': lambda x, k, g: conv.conv2d(x, k, stride, padding),
      'input gradient': lambda x, k, g: jax.vjp(lambda x: conv.conv2d(x, k, stride, padding), x)[1](g)[0],
      'weight, fast': weight_gradient(conv.conv2d),
      'weight, xla': weight_gradient(conv.plain)}


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--width', type=int, nargs='+', default=[32, 64])
  parser.add_argument('--batch', type=int, nargs='+', default=[128, 512])
  parser.add_argument('--repeats', type=int, default=5)
  parser.add_argument('--dtype', choices=conv.DTYPES, default='float32')
  options = parser.parse_args()
  print(f'jax {jax.__version__}, Python {platform.python_version()}, {jax.devices()[0].device_kind} '
        f'({platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}), {options.dtype}')
  for width in options.width:
    for B in options.batch:
      table(width, B, options)


def table(width: int, B: int, options: argparse.Namespace) -> None:
  """Print one table, and the sum of the times of the network's convolutions."""
  print(f'\nwidth {width}, batch {B}: GFLOP/s')
  columns = list(functions(1, 1))
  print(f'{"":14}{"shape":24}' + ''.join(f'{c:>16}' for c in columns))
  total = dict.fromkeys(columns, 0.)
  keys = jax.random.split(jax.random.key(0), 3)
  for name, side, C, K, size, stride, times in layers(width):
    padding = size // 2
    x = jax.random.normal(keys[0], (B, side, side, C), options.dtype)
    kernel = jax.random.normal(keys[1], (size, size, C, K))
    g = jax.random.normal(keys[2], (B, side // stride, side // stride, K), options.dtype)
    took = seconds(functions(stride, padding), (x, kernel, g), options.repeats)
    work = 2 * g.size * size * size * C
    print(f'{name:14}{f"{side}x{side} {C}->{K} {size}x{size}/{stride}":24}'
          + ''.join(f'{work / took[c] / 1e9:16.1f}' for c in columns), flush=True)
    for c in columns:
      total[c] += times * took[c]
  print(f'{"all, seconds":38}' + ''.join(f'{total[c]:16.3f}' for c in columns))


if __name__ == '__main__':
  main()

"""Efficiency at 8, 64 and 512 devices from one device's time and the plan's collective bytes, for two interconnects.

  python benchmarks/scaling.py --config imagenet_simclr_equimod --images 128 (--seconds S | --tflops T) [--apart]

--images is the number of images of one device, whatever the number of devices (weak scaling). --seconds was measured for
a step of so many images on one device. --tflops is the rate that is assumed for one device where nothing was measured. With
--apart, BatchNorm takes statistics over the images of each device (batchnorm_groups is the number of devices), and not over
the batch. docs/scaling.md has the model and its assumptions.
"""
import argparse

import jax

NODE = 8                   # devices of a machine
LINKS = {                  # bytes/s of a device within its machine; of a machine to the others; seconds a message and hop
    'NVLink + 8 x 400 Gb/s InfiniBand': (450e9, 8 * 50e9, 5e-6),
    'PCIe 4 + 100 Gb/s Ethernet': (25e9, 12.5e9, 25e-6),
}
SIZES = 8, 64, 512


def seconds(kind: str, count: int, size: float, devices: int, link: tuple[float, float, float]) -> float:
  """Seconds of `count` collectives with `size` bytes in all: first within the machines, then between them, one by one."""
  inside, outside, hop = link
  machines = -(-devices // NODE)
  both = 2. if kind == 'all-reduce' else 1.  # a reduce-scatter and an all-gather
  within = both * size * (NODE - 1) / NODE / inside
  between = both * size * (machines - 1) / machines / outside
  return within + between + count * hop * both * max(devices - 1, 1).bit_length()


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--config', required=True)
  parser.add_argument('--images', type=int, default=128)
  parser.add_argument('--apart', action='store_true')
  given = parser.add_mutually_exclusive_group(required=True)
  given.add_argument('--seconds', type=float)
  given.add_argument('--tflops', type=float)
  args = parser.parse_args()
  jax.config.update('jax_platforms', 'cpu')
  jax.config.update('jax_num_cpu_devices', NODE)
  from equivariant_ssl.config import load_config
  from equivariant_ssl.parallel import sharding, step_plan
  of = lambda devices: load_config(args.config, {'batch': str(devices * args.images),
                                                 'batchnorm_groups': str(devices if args.apart else 1)})
  at = step_plan.plan_step(of(NODE), sharding.mesh())
  flops = {n: step_plan.step_flops(of(n)) / n for n in (1, *SIZES)}  # of a device: the loss grows with the batch
  alone = args.seconds or flops[1] / args.tflops / 1e12
  print(f'{args.config}: {args.images} images a device, one device {alone:.3f} s a step, '
        f'{flops[1] / alone / 1e12:.0f} TFLOP/s' + ('' if args.seconds else ' (assumed)'))
  print('| interconnect | ' + ' | '.join(f'{n} devices' for n in SIZES) + ' |\n|---|' + '---|' * len(SIZES))
  for name, link in LINKS.items():
    cells = []
    for n in SIZES:
      compute = alone * flops[n] / flops[1]
      crossing = sum(seconds(kind, count, size * (n / NODE if kind == 'all-gather' else 1.), n, link)
                     for kind, (count, size) in at.collectives.items())  # embeddings grow with the batch, gradients do not
      cells.append(f'{100 * alone / (compute + crossing):.1f} % ({n * args.images / (compute + crossing):,.0f} images/s)')
    print(f'| {name} | ' + ' | '.join(cells) + ' |')


if __name__ == '__main__':
  main()

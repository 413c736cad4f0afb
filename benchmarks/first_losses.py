"""The first losses of small runs, digit for digit. A change that only renames or moves code must leave every line as it is.

    python benchmarks/first_losses.py [--root TFDS_FOLDER] > before.txt      # then the same on the other commit, and diff

Each line is a config, its overrides, and the loss of each of its first steps as a hexadecimal float32. The lines of CIFAR-10
need the data set under --root (`eqssl data prepare cifar10`); without it they are left out, and a line says so. Machines
round differently, so compare on one machine. It takes about four minutes on two cores.
"""
import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

import numpy as np

STEPS = 6
DIGITS = ('digits_simclr', 'digits_simclr_equimod', 'digits_byol', 'digits_simsiam', 'digits_barlow', 'digits_vicreg',
          'smoke')
CIFAR = (('equivariance.name=none',), ('equivariance.name=equimod',), ('equivariance.name=essl', 'augment.gray.role=both'))


def losses(config: str, overrides: tuple[str, ...]) -> list[str]:
  """The losses of the first STEPS steps of a run."""
  with tempfile.TemporaryDirectory() as folder:
    flags = [f'--config.{o}' for o in (*overrides, f'steps={STEPS}', 'log_every=1', 'optimizer.warmup_epochs=0.')]
    command = [sys.executable, '-m', 'equivariant_ssl.cli', 'train', '--config', config, '--workdir', f'{folder}/run',
               *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
      return [f'exit {done.returncode}: {done.stderr.strip().splitlines()[-2:]}']
    rows = [json.loads(line) for line in pathlib.Path(folder, 'run/metrics.jsonl').read_text().splitlines()]
  return [float(np.float32(row['loss'])).hex() for row in rows]


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--root', default='', help='where TFDS data sets are kept')
  root = parser.parse_args().root
  for config in DIGITS:
    print(config, *losses(config, ()), flush=True)
  if not pathlib.Path(root, 'cifar10').is_dir():
    print('cifar10_quick left out: no cifar10 under --root')
    return
  for overrides in CIFAR:
    small = (*overrides, f'data.root={root}', 'batch=64')
    print('cifar10_quick', *overrides, *losses('cifar10_quick', small), flush=True)


if __name__ == '__main__':
  main()

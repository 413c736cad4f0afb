"""From JPEG files to batches: images a second and a core of this package's streaming, of TFDS with Pillow, of PyTorch.

  python benchmarks/data.py [--photographs FILE.tar] [--epochs 3] [--memory-epochs 10] [--torch-python PYTHON]

Every loader reads the same photographs, each in a process of its own, one after the other: `eqssl` streams canvases of
256 to the device (crops are drawn there, in the step); `tfds` reads them from array_record with tensorflow_datasets and
Pillow's decoder and squashes them to 256; `torch` (where torch and torchvision are installed) makes two random resized
crops of 224 with flips, as torchvision does, in a DataLoader with a worker a core. A core's share is images / CPU
seconds of the process and its workers: what else runs on the machine changes it less than it does images / s.
"""
import argparse
import json
import os
import pathlib
import resource
import subprocess
import sys
import tarfile
import tempfile
import time

SIDE, CROP, BATCH = 256, 224, 64
SHARED = pathlib.Path(__file__).parent.parent.parent / 'shared' / 'data' / 'imagewoof320.tar'


def rss() -> float:
  """MiB of this process."""
  return int(pathlib.Path('/proc/self/statm').read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE') / 2**20


def eqssl(folder: str, epochs: int):
  """Batches on the device, decoded in grain's threads."""
  import jax
  import numpy as np

  from equivariant_ssl import data, registry
  from equivariant_ssl.data import stream
  from equivariant_ssl.parallel import sharding
  split = registry.make(data, 'folder', path=folder, size=SIDE, test=0., stream=True).train
  n, split_over = len(split.images) // BATCH, sharding.batch_sharding(sharding.mesh(jax.devices()[:1]))
  order = lambda e: np.random.default_rng(e).permutation(len(split.images))
  rows = lambda step: order(step // n)[step % n * BATCH:(step % n + 1) * BATCH]
  for step, batch in enumerate(stream.place_batches(stream.batches(split, rows, 0, epochs * n), split_over, BATCH)):
    jax.block_until_ready(batch)
    yield BATCH, step % n == n - 1


def pillow(folder: str, epochs: int):
  """One record after the other through tensorflow_datasets and Pillow."""
  import numpy as np
  import tensorflow_datasets as tfds
  from PIL import Image
  source = tfds.builder_from_directory(folder).as_data_source('train')
  for e in range(epochs):
    order = np.random.default_rng(e).permutation(len(source))
    for start in range(0, len(order) - BATCH + 1, BATCH):
      images = [Image.fromarray(source[int(i)]['image']).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
                for i in order[start:start + BATCH]]
      np.stack([np.asarray(i) for i in images])
      yield BATCH, start + 2 * BATCH > len(order)


def torch(folder: str, epochs: int):
  """Two crops of each image in a DataLoader."""
  from torch.utils.data import DataLoader
  from torchvision import datasets, transforms
  crop = transforms.Compose([transforms.RandomResizedCrop(CROP), transforms.RandomHorizontalFlip(), transforms.ToTensor()])
  data = datasets.ImageFolder(folder, lambda image: (crop(image), crop(image)))
  loader = DataLoader(data, BATCH, shuffle=True, drop_last=True, num_workers=os.cpu_count(), persistent_workers=True)
  for _ in range(epochs):
    for i, _ in enumerate(loader):
      yield BATCH, i == len(loader) - 1


LOADERS = {'eqssl': eqssl, 'tfds': pillow, 'torch': torch}


def measure(name: str, folder: str, epochs: int) -> dict:
  """Run a loader: the first epoch warms up, the others count; and its memory after each."""
  done, seen, memory = 0, 0, []
  used = lambda: sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
  workers = lambda: sum(cpu(p) for p in pathlib.Path(f'/proc/{os.getpid()}/task/{os.getpid()}/children').read_text().split())
  start = spent = None
  for count, last in LOADERS[name](folder, epochs + 1):
    seen += count if start else 0
    if last:
      done += 1
      memory.append(rss())
      if done == 1:
        start, spent = time.perf_counter(), used() + workers()
  seconds, cores = time.perf_counter() - start, used() + workers() - spent
  return {'loader': name, 'images_per_s': seen / seconds, 'images_per_core_s': seen / cores, 'cores': cores / seconds,
          'rss_mib': [round(m) for m in memory]}


def cpu(pid: str) -> float:
  """CPU seconds of a process that lives."""
  fields = pathlib.Path(f'/proc/{pid}/stat').read_text().rsplit(')', 1)[1].split()
  return (int(fields[11]) + int(fields[12])) / os.sysconf('SC_CLK_TCK')


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--photographs', default=str(SHARED), help='a tar of class folders of JPEG files')
  parser.add_argument('--epochs', type=int, default=3)
  parser.add_argument('--memory-epochs', type=int, default=10)
  parser.add_argument('--torch-python', default=sys.executable, help='an interpreter with torch and torchvision')
  parser.add_argument('--only', nargs=3, metavar=('LOADER', 'FOLDER', 'EPOCHS'), help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.only:
    print(json.dumps(measure(args.only[0], args.only[1], int(args.only[2]))))
    return
  with tempfile.TemporaryDirectory() as scratch:
    folder = pathlib.Path(scratch, 'photographs')
    with tarfile.open(args.photographs) as tar:
      tar.extractall(folder, filter='data')
    folder = next(folder.rglob('train'))
    subprocess.run([sys.executable, '-m', 'equivariant_ssl.cli', 'data', 'prepare', 'photographs', '--src', str(folder),
                    '--root', f'{scratch}/tfds'], check=True, stdout=subprocess.DEVNULL)
    prepared = next(pathlib.Path(scratch, 'tfds').rglob('dataset_info.json')).parent
    runs = [('eqssl', sys.executable, folder, args.epochs), ('tfds', sys.executable, prepared, args.epochs),
            ('torch', args.torch_python, folder, args.epochs), ('eqssl', sys.executable, folder, args.memory_epochs)]
    for name, python, where, epochs in runs:
      found = subprocess.run([python, __file__, '--only', name, str(where), str(epochs)], capture_output=True, text=True)
      if found.returncode:
        print(f'{name}: {found.stderr.strip().splitlines()[-1]}')
        continue
      r = json.loads(found.stdout.splitlines()[-1])
      print(f'{name:6} {r["images_per_s"]:7.1f} images/s  {r["images_per_core_s"]:7.1f} images/s a core  '
            f'{r["cores"]:.2f} cores  {epochs} epochs, MiB after each: {r["rss_mib"]}', flush=True)


if __name__ == '__main__':
  main()

"""From JPEG files to batches: images a second, also for each core, by this package's stream, TFDS with Pillow, and PyTorch.

  python benchmarks/data.py [--photographs FILE.tar] [--epochs 40] [--memory-epochs 10] [--torch-python PYTHON] [--batches 64 512]
  python benchmarks/data.py --free [--batches 64 512 4096]     what the stream itself costs: nothing is decoded
  python benchmarks/data.py --slow [--batches 64 512]          storage that is slow, and that stalls

Every loader reads the same photographs, each in a process of its own, one after the other: `eqssl` streams canvases of
256 to the device (crops are drawn there, in the step); `tfds` reads them from array_record with tensorflow_datasets and
Pillow's decoder and squashes them to 256; `torch` (where torch and torchvision are installed) makes two random resized
crops of 224 with flips, as torchvision does, in a DataLoader with a worker for each core. Images a second and core are
the images over the CPU seconds of the process and its workers: other work on the machine changes them less than images/s.

`--free` streams canvases of 256 on one core from records that cost nothing, before and after three pauses of 5 s of the
consumer. `--slow` reads each record in a log-normal time (median 20 ms, mean 33 ms); one of 50,000 takes 5 s more.
"""
import argparse
import functools
import json
import os
import pathlib
import resource
import subprocess
import sys
import tarfile
import tempfile
import threading
import time

SIDE, CROP, BATCH = 256, 224, 64
RECORDS = 1_281_167  # of a stream that is not on a disk: as many as ImageNet has
MEDIAN, SIGMA, STALL, STALLS = .02, 1., 5., 1 / 50_000  # of a slow read: seconds, of its logarithm, seconds, a share
SHARED = pathlib.Path(__file__).parent.parent.parent / 'shared' / 'data' / 'imagewoof320.tar'


def rss() -> float:
  """The memory of this process in MiB."""
  return int(pathlib.Path('/proc/self/statm').read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE') / 2**20


def eqssl(folder: str, epochs: int, n_batch: int = BATCH):
  """Batches on the device, which are decoded in threads."""
  import jax
  import numpy as np

  from equivariant_ssl import data, registry
  from equivariant_ssl.data import stream
  from equivariant_ssl.parallel import sharding
  split = registry.make(data, 'folder', path=folder, size=SIDE, test=0., stream=True).train
  n, split_over = len(split.images) // n_batch, sharding.batch_sharding(sharding.mesh(jax.devices()[:1]))
  order = functools.lru_cache(2)(lambda e: np.random.default_rng(e).permutation(len(split.images)))
  rows = lambda step: order(step // n)[step % n * n_batch:(step % n + 1) * n_batch]
  batches = stream.place_batches(stream.batches(split, rows, 0, epochs * n), split_over, n_batch)
  for step, batch in enumerate(batches):
    jax.block_until_ready(batch)
    yield n_batch, step % n == n - 1


def endless(n: int, read):
  """Batches of n canvases from records that cost nothing to decode. read: is called for each record."""
  import numpy as np

  from equivariant_ssl.data import source, stream
  canvas = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
  source.decode = lambda data, size, rules: (canvas, (SIDE, SIDE))
  records = source.Records(str, lambda indices: [read(i) for i in indices], None, RECORDS)
  order = np.random.default_rng(0).permutation(RECORDS)
  rows = lambda step: order[np.arange(step * n, (step + 1) * n) % RECORDS]
  return stream.batches(stream.lazy_split('free', records, SIDE, None), rows, 0, 10**9)


def speed(batches, n: int, seconds: float) -> tuple[float, float]:
  """The images a second, and a CPU second, that are streamed in so many seconds."""
  start, spent, count = time.perf_counter(), time.process_time(), 0
  while time.perf_counter() - start < seconds:
    next(batches)
    count += n
  return count / (time.perf_counter() - start), count / (time.process_time() - spent)


def free(n: int) -> None:
  """What the stream itself costs on one core, before and after three pauses of 5 s."""
  os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
  batches = endless(n, lambda index: b'')
  speed(batches, n, 3.)
  before, memory = speed(batches, n, 10.), rss()
  for _ in range(3):
    time.sleep(5.)
    speed(batches, n, 1.)
  after = speed(batches, n, 10.)
  print(f'n = {n:5,}: {before[0]:7,.0f} images/s ({before[1]:,.0f} a CPU second); after three pauses {after[0]:7,.0f} '
        f'({after[1]:,.0f}); MiB {memory:.0f}, then {rss():.0f}', flush=True)


def slow(n: int) -> None:
  """The images a second from slow storage, every 10 s."""
  import numpy as np
  draws, stalls = threading.local(), []

  def read(index: int) -> bytes:
    if not hasattr(draws, 'rng'):
      draws.rng = np.random.default_rng(threading.get_ident())
    seconds = draws.rng.lognormal(np.log(MEDIAN), SIGMA)
    if draws.rng.random() < STALLS:
      stalls.append(index)
      seconds += STALL
    time.sleep(seconds)
    return b''
  batches = endless(n, read)
  threads = lambda: sum(t.name.startswith('decoder ') for t in threading.enumerate())
  for period in range(9):
    rate, before = speed(batches, n, 10.)[0], len(stalls)
    print(f'n = {n:4}, {10 * period:2} to {10 * period + 10:2} s: {rate:7,.0f} images/s, {threads():3} threads, '
          f'{before} stalls so far, {rss():.0f} MiB', flush=True)
  batches.close()
  print(f'n = {n:4}: closed, {threads()} threads are left', flush=True)


def pillow(folder: str, epochs: int):
  """Read one record after the other through tensorflow_datasets and Pillow."""
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
  """Make two crops of each image in a DataLoader."""
  from torch.utils.data import DataLoader
  from torchvision import datasets, transforms
  crop = transforms.Compose([transforms.RandomResizedCrop(CROP), transforms.RandomHorizontalFlip(), transforms.ToTensor()])
  data = datasets.ImageFolder(folder, lambda image: (crop(image), crop(image)))
  loader = DataLoader(data, BATCH, shuffle=True, drop_last=True, num_workers=os.cpu_count(), persistent_workers=True)
  for _ in range(epochs):
    for i, _ in enumerate(loader):
      yield BATCH, i == len(loader) - 1


LOADERS = {'eqssl': eqssl, 'tfds': pillow, 'torch': torch}


def measure(name: str, folder: str, epochs: int, *batch: int) -> dict:
  """Run a loader: the first epoch warms up, and the others are timed. Also measure the memory after each epoch."""
  done, seen, memory = 0, 0, []
  used = lambda: sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
  workers = lambda: sum(cpu(p) for p in pathlib.Path(f'/proc/{os.getpid()}/task/{os.getpid()}/children').read_text().split())
  start = spent = None
  for count, last in LOADERS[name](folder, epochs + 1, *batch):
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
  """The CPU seconds of a process that lives."""
  fields = pathlib.Path(f'/proc/{pid}/stat').read_text().rsplit(')', 1)[1].split()
  return (int(fields[11]) + int(fields[12])) / os.sysconf('SC_CLK_TCK')


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--photographs', default=str(SHARED), help='a tar of class folders of JPEG files')
  parser.add_argument('--epochs', type=int, default=40, help='so many that the batches decoded ahead at the start are few')
  parser.add_argument('--memory-epochs', type=int, default=10)
  parser.add_argument('--torch-python', default=sys.executable, help='an interpreter with torch and torchvision')
  parser.add_argument('--batches', type=int, nargs='+', help='images a step; by default 64, 512, and 4096 with --free')
  parser.add_argument('--free', action='store_true', help='only what the stream itself costs')
  parser.add_argument('--slow', action='store_true', help='only storage that is slow')
  parser.add_argument('--only', nargs='+', help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.only and args.only[0] in ('free', 'slow'):
    {'free': free, 'slow': slow}[args.only[0]](int(args.only[1]))
    return
  if args.only:
    print(json.dumps(measure(args.only[0], args.only[1], *map(int, args.only[2:]))))
    return
  sizes = args.batches or ([BATCH, 512, 4096] if args.free else [BATCH, 512])
  if args.free or args.slow:
    print(f'load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores', flush=True)
    for n in sizes:  # each in a process of its own
      subprocess.run([sys.executable, __file__, '--only', 'free' if args.free else 'slow', str(n)], check=True)
    return
  with tempfile.TemporaryDirectory() as scratch:
    folder = pathlib.Path(scratch, 'photographs')
    with tarfile.open(args.photographs) as tar:
      tar.extractall(folder, filter='data')
    folder = next(folder.rglob('train'))
    subprocess.run([sys.executable, '-m', 'equivariant_ssl.cli', 'data', 'prepare', 'photographs', '--src', str(folder),
                    '--root', f'{scratch}/tfds'], check=True, stdout=subprocess.DEVNULL)
    prepared = next(pathlib.Path(scratch, 'tfds').rglob('dataset_info.json')).parent
    runs = [*(('eqssl', sys.executable, folder, args.epochs, n) for n in sizes),
            ('tfds', sys.executable, prepared, args.epochs), ('torch', args.torch_python, folder, args.epochs),
            ('eqssl', sys.executable, folder, args.memory_epochs)]
    for name, python, where, epochs, *n in runs:
      found = subprocess.run([python, __file__, '--only', name, str(where), str(epochs), *map(str, n)],
                             capture_output=True, text=True)
      if found.returncode:
        print(f'{name}: {found.stderr.strip().splitlines()[-1]}')
        continue
      r = json.loads(found.stdout.splitlines()[-1])
      print(f'{name:6} n = {(n or [BATCH])[0]:4} {r["images_per_s"]:7.1f} images/s  {r["images_per_core_s"]:7.1f} images/s a core  '
            f'{r["cores"]:.2f} cores  {epochs} epochs, MiB after each: {r["rss_mib"]}', flush=True)


if __name__ == '__main__':
  main()

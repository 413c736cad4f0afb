"""The device machine played on this one: what travels is copied, the network is cut, the limits of $OUT are checked.

Command: python benchmarks/gpu/rehearse.py --python BARE/bin/python --machine /tmp/machine call1 --minutes 3
BARE is an environment with that machine's versions, without what the calls carry (benchmarks/gpu/README.md says how to make
one). --machine is the machine's disk: remove it to play a machine that is bare again. Run `lease.py pack` first.
"""
import argparse
import os
import pathlib
import shutil
import subprocess
import sys
import time

import pack

FILES, PIECE, TOGETHER = 8, 16 * 2**20, 64 * 2**20  # what comes back from $OUT


def send(root: pathlib.Path, repo: pathlib.Path, carry: str) -> int:
  """Copy the working tree that travels, and its folder `carry`. Returns the bytes."""
  for file in repo.rglob('*') if repo.exists() else ():
    if file.is_file() and '.gpu' not in file.parts:
      file.unlink()
  names = pack.traveling(root)
  names += [str(f.relative_to(root)) for f in (root / carry).rglob('*') if f.is_file()] if carry else []
  for name in names:
    (repo / name).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(root / name, repo / name)
  return sum((repo / n).stat().st_size for n in names)


def returned(out: pathlib.Path) -> list[str]:
  """What would not come back from $OUT, and why."""
  files = [f for f in out.rglob('*') if f.is_file()]
  wrong = [f'{f.name}: {f.stat().st_size} bytes are over 16 MiB' for f in files if f.stat().st_size > PIECE]
  wrong += [f'{len(files)} files are more than {FILES}'] * (len(files) > FILES)
  return wrong + ['together over 64 MiB'] * (sum(f.stat().st_size for f in files) > TOGETHER)


def run(machine: pathlib.Path, root: pathlib.Path, python: str, argv: list[str], carry: str, kill: float = 0.) -> int:
  """Play one call on the machine in the folder `machine`; returns its exit code. kill: the seconds after which all of it is
  killed."""
  repo, out = machine / 'repo', machine / f'out-{argv[0]}-{time.strftime("%H%M%S")}'
  size = send(root, repo, carry)
  print(f'sent {size / 2**20:.2f} MiB{"" if size <= pack.LIMIT else ": TOO LARGE"}', flush=True)
  out.mkdir(parents=True)
  keep = ('PATH', 'LANG', 'JAX_PLATFORMS', 'OMP_NUM_THREADS', 'EQSSL_CACHE', 'XLA_FLAGS')
  env = {k: os.environ[k] for k in keep if k in os.environ} | {'HOME': str(machine / 'home'), 'OUT': str(out),
                                                                'PIP_CONFIG_FILE': '/dev/null'}
  (machine / 'home').mkdir(exist_ok=True)
  alone = ['unshare', '-rn'] if shutil.which('unshare') and subprocess.run(['unshare', '-rn', 'true'], capture_output=True
                                                                           ).returncode == 0 else []
  began = time.monotonic()
  command = [*alone, python, 'benchmarks/gpu/lease.py', *argv, '--store', str(machine / 'store')]
  process = subprocess.Popen(command, cwd=repo, env=env, start_new_session=True)
  try:
    code = process.wait(kill or None)
  except subprocess.TimeoutExpired:
    os.killpg(process.pid, 9)  # its parts follow it: each asked the kernel for that
    code = process.wait()
  wrong = returned(out)
  open_ = '' if alone else ' (the network was NOT cut: no unshare)'
  back = ', '.join(f'{f.name} {f.stat().st_size / 2**20:.2f} MiB' for f in sorted(out.iterdir()))
  print(f'ended with {code} after {time.monotonic() - began:.1f} s{open_}; in {out}: {back}'
        + ''.join(f'. WOULD NOT COME BACK: {w}' for w in wrong), flush=True)
  return code if not wrong and size <= pack.LIMIT else 5


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--python', default=sys.executable)
  parser.add_argument('--machine', type=pathlib.Path, required=True)
  parser.add_argument('--size', default='rehearsal')
  parser.add_argument('--kill', type=float, default=0., help='seconds after which the call is killed')
  args, call = parser.parse_known_args()
  carry = f'.gpu/{call[0]}'
  return run(args.machine.absolute(), pack.ROOT, args.python, [*call, '--size', args.size],
             carry if (pack.ROOT / carry).is_dir() else '', args.kill)


if __name__ == '__main__':
  sys.exit(main())

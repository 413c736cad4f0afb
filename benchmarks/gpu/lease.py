"""Fifteen minutes of one GPU: one command for each call, at most three calls. What is found is written as it comes.

  python benchmarks/gpu/lease.py pack                    here: make what the calls carry, print their sizes and the calls
  python3 benchmarks/gpu/lease.py call1 --minutes 6      there: correctness, speed, PyTorch beside it, XLA flags
  python3 benchmarks/gpu/lease.py call2 --minutes 7      there: SimCLR and SimCLR + EquiMod, what they learned, both
  encoders python3 benchmarks/gpu/lease.py call3 --minutes 4      there: what call 2 was cut from; else the arms at the next
  seed

A part of a call is a process of its own (parts.py). A part that fails, hangs or runs out of memory is reported, and the
next begins. What is done is not done again, so a call that was cut is typed again. With --only load, a call takes what it
carries, and ends. $OUT has results.json, log.txt and the encoders; restore.py makes runs of these. Exit codes: 0; 3
something is missing here (the last line says which call to repeat); 4 a part failed. It needs the standard library alone,
because it starts on a bare machine.
"""
import argparse
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import budget  # noqa: E402
import calls  # noqa: E402
import carried  # noqa: E402
import sizes  # noqa: E402

LOG = 4 * 2**20  # the bytes of the log that are kept
ENCODERS, BACK = 6, 60 * 2**20  # files beside results.json and log.txt, and their bytes: 8 and 64 MiB come back
PARTS = HERE / 'parts.py'
GRACE = 20.      # seconds in which a part that was asked to stop saves what it has


class Lease:
  """One call: its clock, its results, and the processes of its parts. No other object here has a state."""

  def __init__(self, args: argparse.Namespace, out: pathlib.Path):
    self.began, self.seconds = time.monotonic(), 60. * args.minutes
    self.size, self.store, self.out, self.again = args.size, args.store, out, args.again
    self.arms, self.seed = [sizes.arm(text) for text in args.arms], args.seed
    self.epochs = args.epochs
    self.running: dict[str, tuple] = {}  # {key: (process, when it began, seconds that it may take)}
    self.asked: set[str] = set()         # to stop
    for folder in (self.store / 'found', out):
      folder.mkdir(parents=True, exist_ok=True)
    try:
      self.results = json.loads((self.store / 'results.json').read_text())
    except (OSError, ValueError):
      self.results = {'calls': [], 'parts': {}}
    for file in (self.store / 'found').glob('*.json'):  # of a call that was killed before it could take it
      self.take(file.stem, 'cut', 0., 'the call ended before it')
    self.results['calls'].append({'call': args.call, 'minutes': args.minutes, 'size': args.size, 'only': args.only,
                                  'arms': args.arms, 'time': time.strftime('%FT%T')})
    self.write()

  def left(self) -> float:
    return self.seconds - (time.monotonic() - self.began)

  def say(self, line: str) -> None:
    text = f'[{time.monotonic() - self.began:6.1f} s] {line}'
    print(text, flush=True)
    with (self.out / 'log.txt').open('a') as log:
      log.write(text + '\n')

  def write(self) -> None:
    self.results['calls'][-1:] = [{**c, 'seconds': time.monotonic() - self.began} for c in self.results['calls'][-1:]]
    for place in (self.store, self.out):
      part = place / 'results.tmp'
      part.write_text(json.dumps(self.results, indent=1) + '\n')
      part.replace(place / 'results.json')

  def result_of(self, key: str) -> dict:
    """What a part found that is done, else {}."""
    part = self.results['parts'].get(key, {})
    return part.get('found', {}) if part.get('state') == 'done' else {}

  def known(self, key: str) -> dict:
    """What a part found, whether or not it is done. A speed is known even where the profile after it failed."""
    return self.results['parts'].get(key, {}).get('found', {})

  def take(self, key: str, state: str, seconds: float, why: str = '') -> None:
    """Move what a part wrote into the results. A part that is not done does not replace one that is."""
    file, old = self.store / 'found' / f'{key}.json', self.results['parts'].get(key, {})
    try:
      found = json.loads(file.read_text())
    except (OSError, ValueError):
      found = {}
    file.unlink(missing_ok=True)
    if state == 'done' or old.get('state') != 'done':
      self.results['parts'][key] = {'state': state, 'seconds': seconds, **({'why': why} if why else {}),
                                    'found': found or old.get('found', {})}

  def start(self, key: str, name: str, given: dict, least: float, most: float, flags: str | None = None) -> bool:
    """Begin part `name` as `key`, where it is not done and `least` seconds are left. It is stopped after `most` seconds."""
    if self.results['parts'].get(key, {}).get('state') == 'done' and not self.again:
      self.say(f'{key}: done before')
      return False
    if self.left() < least:
      self.take(key, 'not begun', 0., f'{self.left():.0f} s were left, it needs {least:.0f}')
      self.say(f'{key}: not begun, {self.left():.0f} s left')
      self.write()
      return False
    flags = self.results.get('flags', '') if flags is None else flags
    env = {**os.environ, **carried.environment(self.store), 'LEASE_BEGAN': str(time.time()), 'LEASE_STORE': str(self.store),
           'XLA_FLAGS': f'{os.environ.get("XLA_FLAGS", "")} {flags}'.strip()}
    found = self.store / 'found' / f'{key}.json'
    argv = [sys.executable, str(PARTS), name, '--size', self.size, '--found', str(found)]
    with (self.out / 'log.txt').open('a') as log:
      log.write(f'--- {key}: {name} {json.dumps(given)}\n')
      log.flush()
      # A group, not a session: what starts a session of its own outlives the call.
      process = subprocess.Popen([*argv, '--given', json.dumps(given)], cwd=HERE.parent.parent, env=env, stdout=log,
                                 stderr=subprocess.STDOUT, process_group=0)
    self.asked.discard(key)
    self.running[key] = process, time.monotonic(), min(sizes.SIZES[self.size].patience * most, self.left() - budget.SPARE)
    return True

  def finish(self, key: str) -> str:
    """Wait for a part, which is stopped at its limit, and take its results. Returns its state: done, failed, cut or ''."""
    if key not in self.running:
      return ''
    process, began, _ = self.running[key]
    while process.poll() is None:
      self.check()
      time.sleep(.05)
    del self.running[key]
    seconds, code = time.monotonic() - began, process.returncode
    state = 'done' if code == 0 else 'cut' if code in (75, -signal.SIGTERM, -signal.SIGKILL) else 'failed'
    why = '' if code == 0 else f'ended with {code} after {seconds:.0f} s: {self.last_line()}'
    self.take(key, state, seconds, why)
    self.trim()
    self.say(f'{key}: {state}, {seconds:.1f} s{"; " + why if why else ""}')
    self.write()
    return state

  def check(self) -> None:
    """Ask every part that is over its limit to stop, and kill a part that was asked before. All parts are checked,
    whichever is waited for, because a process takes time to end."""
    now = time.monotonic()
    for key, (process, began, most) in self.running.items():
      if process.poll() is None and now > began + most:
        os.killpg(process.pid, signal.SIGKILL if key in self.asked else signal.SIGTERM)
        self.asked.add(key)
        self.running[key] = process, began, now - began + max(1., min(GRACE, self.left() - 1.))

  def part(self, key: str, name: str, given: dict, least: float, most: float, flags: str | None = None) -> dict:
    """Do `start` and `finish`. Returns what the part found, whether or not it is done."""
    if self.start(key, name, given, least, most, flags):
      self.finish(key)
    return self.known(key)

  def plans(self) -> dict[str, dict]:
    """{seed: what was decided} for these arms."""
    return self.results.setdefault('plans', {}).setdefault(' '.join(arm.label for arm in self.arms), {})

  def saved(self, label: str, seed: int) -> bool:
    """Whether a training has a checkpoint, however it ended."""
    folder = self.store / 'runs' / f'{label}-s{seed}' / 'checkpoints'
    return folder.is_dir() and any(p.name.isdecimal() for p in folder.iterdir())

  def deliver(self) -> None:
    """Copy the encoders that were written to $OUT, the newest seed's first, as far as may come back."""
    files = sorted((self.store / 'brought').glob('*.encoder.*'), key=lambda f: (-f.stat().st_mtime, f.name))
    room = BACK
    for file in files[:ENCODERS]:
      room -= file.stat().st_size
      there = self.out / file.name
      if room >= 0 and not (there.exists() and there.stat().st_mtime >= file.stat().st_mtime):
        shutil.copyfile(file, self.out / f'{file.name}.tmp')
        (self.out / f'{file.name}.tmp').rename(self.out / file.name)

  def last_line(self) -> str:
    """The last line that a part printed; for parts that run together, the last line of any of them."""
    with (self.out / 'log.txt').open('rb') as log:
      log.seek(max(0, log.seek(0, 2) - 4000))
      lines = [line for line in log.read().decode(errors='replace').splitlines() if line.strip() and line[0] not in '[-']
    return lines[-1][:300] if lines else ''

  def trim(self) -> None:
    log = self.out / 'log.txt'
    if log.stat().st_size > LOG and not self.running:  # what runs goes on writing into the old file
      log.write_bytes(b'(the beginning is cut)\n' + log.read_bytes()[-LOG // 2:])

  def stop(self) -> None:
    """End what still runs, and keep its results so far."""
    self.running = {key: (process, began, 0.) for key, (process, began, _) in self.running.items()}
    for key in list(self.running):
      self.finish(key)


def parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('call', choices=('pack', 'call1', 'call2', 'call3'))
  parser.add_argument('--minutes', type=float, default=6., help='minutes of the call (default: %(default)s)')
  parser.add_argument('--only', choices=('load', 'imagenet', 'resume'),
                      help='take what the call carries, and end; or measure this alone')
  parser.add_argument('--size', choices=sizes.SIZES, default='official')
  parser.add_argument('--load', type=pathlib.Path, help='folder that the call carries (default: .gpu/CALL)')
  parser.add_argument('--store', type=pathlib.Path, default=pathlib.Path('/tmp/eqssl-gpu'),
                      help='folder on the machine\'s disk')
  parser.add_argument('--again', action='store_true', help='do what was done before once more')
  parser.add_argument('--arms', nargs='+', default=list(sizes.FOUNDING), metavar='"CONFIG;field=value"')
  parser.add_argument('--seed', type=int, default=0, help='the first seed of these arms')
  parser.add_argument('--epochs', type=int, default=0,
                      help='epochs of each arm, over several calls (default: what fits into one)')
  parser.add_argument('--data', type=pathlib.Path, default=pathlib.Path('../shared/data'),
                      help='pack: the folder of CIFAR-10\'s parts')
  return parser


def main(argv: list[str] | None = None) -> int:
  args = parser().parse_args(argv)
  if args.call == 'pack':
    import pack
    return pack.main(args.data)
  if args.minutes <= 0:
    print('lease.py: --minutes must be over 0, e.g. --minutes 6', file=sys.stderr)
    return 2
  out = pathlib.Path(os.environ.get('OUT') or args.store / 'out')
  lease = Lease(args, out)
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
  try:
    carried.take(args.load or HERE.parent.parent / '.gpu' / args.call, args.store, lease.say)
    lease.results['commit'] = carried.commit(args.store)
    work = {'load': lambda lease: 0, 'imagenet': calls.imagenet, 'resume': calls.resume}.get(
        args.only, calls.measure if args.call == 'call1' else calls.experiment)
    code = work(lease)
  finally:
    lease.stop()
    lease.write()
  missing = carried.missing(args.store)
  states = [f'{key}: {p["state"]}' for key, p in lease.results['parts'].items() if p['state'] != 'done']
  lease.say(f'{args.call}: {lease.seconds - lease.left():.0f} s of {lease.seconds:.0f}; to come back: ' + ', '.join(
      f'{f.name} {f.stat().st_size / 2**20:.2f} MiB' for f in sorted(out.iterdir()) if f.is_file())
      + (f'. Not done: {"; ".join(states)}' if states else ''))
  if missing and (args.call != 'call1' or args.only == 'load'):
    lease.say(f'On this machine is no {", ".join(missing)}. Repeat: {carried.repeat(missing)}')
    return 3
  return code


if __name__ == '__main__':
  sys.exit(main())

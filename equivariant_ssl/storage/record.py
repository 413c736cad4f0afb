"""What a run leaves behind: config, command, environment, metrics; and who may write it.

Only the main process of a job calls these.
"""
import contextlib
import errno
import fcntl
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import shlex
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from equivariant_ssl import renamed
from equivariant_ssl.errors import IN_USE, INPUT_OUTPUT, NO_CHECKPOINT, OTHER_CONFIG, USAGE, UserError
from equivariant_ssl.parallel import sharding
from equivariant_ssl.storage import disk
from equivariant_ssl.training import stop

Path = str | pathlib.Path
# Lustre without -o flock, some NFS; NFS of a folder, which cannot be open for writing.
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EBADF, errno.EINVAL)
LARGEST = 1e300  # of a metric: what is larger was not written here
PACKAGES = ('equivariant-ssl', 'jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy')


def write_whole(path: pathlib.Path, text: str) -> None:
  """Write a file whole: a kill or a power loss leaves the old one or the new one."""
  part = path.with_name(path.name + '.tmp')
  part.write_text(text, encoding='utf-8', errors='surrogateescape')  # a name may be of other bytes
  disk.flush(part)
  part.replace(path)
  disk.flush(path.parent)


def read_object(path: pathlib.Path, fix: str, code: int = USAGE) -> dict[str, Any]:
  """The JSON object in a file; UserError with `fix` where it is damaged."""
  try:
    found = json.loads(disk.again(lambda: path.read_text(encoding='utf-8'), path))
  except (ValueError, RecursionError) as error:  # of JSON or of its letters
    raise UserError(f'{path} is damaged, it is not JSON: {error}.', fix, code) from None
  if not isinstance(found, dict):
    raise UserError(f'{path} is damaged, it holds no JSON object.', fix, code)
  return found


def _git() -> str | None:
  """'<commit>' or '<commit>+modified' of the checkout that this package is in, None where it is in none."""
  here = pathlib.Path(__file__)

  def git(*args: str) -> str:
    return subprocess.run(['git', '--no-optional-locks', *args], cwd=here.parent, capture_output=True, encoding='utf-8',
                          check=True, timeout=20).stdout.strip()
  try:
    git('ls-files', '--error-unmatch', here.name)  # installed inside another project's checkout is not ours
    return git('rev-parse', 'HEAD') + ('+modified' if git('status', '--porcelain') else '')
  except (OSError, subprocess.SubprocessError):
    return None


def _processor() -> str:
  with contextlib.suppress(OSError):
    for line in pathlib.Path('/proc/cpuinfo').read_text(encoding='utf-8').splitlines():
      if line.startswith('model name'):
        return line.partition(':')[2].strip()
  return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
  """Of this package and of those that its numbers depend on."""
  found = {}
  for name in PACKAGES:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      found[name] = importlib.metadata.version(name)
  return found


def environment() -> dict[str, Any]:
  """What a number depends on beside the config: versions, machine, devices, flags, the package's commit, the time."""
  return {'python': platform.python_version(), **versions(), 'platform': platform.platform(),
          'host': socket.gethostname(), 'cpu': _processor(), 'cores': sharding.count_cores(),
          'backend': jax.default_backend(), 'devices': [d.device_kind for d in jax.devices()],
          'processes': jax.process_count(), 'xla_flags': os.environ.get('XLA_FLAGS', ''), 'git': _git(),
          'time': time.strftime('%Y-%m-%dT%H:%M:%S%z')}


def _folder(workdir: Path) -> pathlib.Path:
  """`workdir`, made; UserError where it cannot be."""
  workdir = pathlib.Path(workdir)
  try:
    workdir.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(f'{workdir} cannot be a workdir: {error.strerror}.', 'Use another --workdir.') from error
  return workdir


def _locked(descriptor: int) -> bool:
  """Lock an open file; False where its file system has no such locks. BlockingIOError where another process holds it."""
  try:
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    raise
  except OSError as error:
    if error.errno not in NO_LOCKS:
      raise
    return False
  return True


def _still(path: Path, descriptor: int, linked: bool = False) -> bool:
  """Whether the open file is still the one at `path`. linked: if it has a name anywhere, the one that is there will do: some
  file systems of the user's space number their files anew."""
  try:
    there, own = disk.again(lambda: os.stat(path), path), os.fstat(descriptor)
  except (FileNotFoundError, NotADirectoryError):
    return False
  return os.path.samestat(there, own) or linked and own.st_nlink > 0


@contextlib.contextmanager
def lock(workdir: Path) -> Iterator[Callable[[], None]]:
  """Hold `workdir` for this process; UserError IN_USE where another has it. The kernel lets go of a dead one's.

  Both the folder and run.lock in it are locked: the one cannot be deleted, the other works on NFS. `check()` is a UserError
  where the folder, or what keeps it, was removed or replaced meanwhile.
  """
  workdir = _folder(workdir)
  path, folder = workdir / 'run.lock', os.open(workdir, os.O_RDONLY)
  try:
    with path.open('a+', encoding='utf-8') as file:
      try:
        held = _locked(folder), _locked(file.fileno())
      except BlockingIOError:
        file.seek(0)
        raise UserError(f'{workdir} is in use by {file.read().strip() or "another process"}.',
                        'Wait for it or stop it, or use another folder.', IN_USE) from None
      if not any(held):
        stop.say(f'{workdir}: this file system has no locks: take care that one process at a time works there')
      line = f'process {os.getpid()} on {socket.gethostname()} since {time.strftime("%Y-%m-%d %H:%M:%S")}\n'
      file.truncate(0)
      file.write(line)
      file.flush()

      def check() -> None:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
          if disk.again(lambda: path.read_text(encoding='utf-8', errors='replace'), path) == line:
            return
        if not (held[0] and _still(workdir, folder)):
          raise UserError(f'{workdir} was removed or replaced while this process worked in it.',
                          'Train again in a new --workdir, or resume a copy of what was there.')
      yield check
  finally:
    os.close(folder)


def leaves(value: Any, path: str = '') -> dict[str, Any]:
  """{dotted key: value} of a config as JSON."""
  if isinstance(value, dict) and value:
    parts = (leaves(part, f'{path}.{name}' if path else name) for name, part in value.items())
    return {k: v for part in parts for k, v in part.items()}
  return {path: value}


def compare(workdir: pathlib.Path, config: dict, free: tuple[str, ...]) -> None:
  """UserError OTHER_CONFIG where the config of the run in `workdir`, if one is there, differs from `config` in a key that is
  not free."""
  if not (workdir / 'config.json').exists():
    return
  text = lambda config: {k: json.dumps(v, sort_keys=True) for k, v in leaves(config).items()}
  old = text(renamed.config(read_object(workdir / 'config.json', 'Use a new --workdir.', OTHER_CONFIG)))
  new = text(json.loads(json.dumps(config)))
  changed = [f'{k}: {old.get(k, "absent")} -> {new.get(k, "absent")}' for k in sorted({**old, **new})
             if old.get(k) != new.get(k) and not any(k == f or k.startswith(f + '.') for f in free)]
  if changed:
    raise UserError(f'{workdir} holds a run of another config: {"; ".join(changed[:5])}'
                    + (f'; and {len(changed) - 5} more.' if len(changed) > 5 else '.'),
                    f'Use a new --workdir, or go on with that run as it was: eqssl resume {shlex.quote(str(workdir))}',
                    OTHER_CONFIG)


def start(workdir: Path, config: dict, command: str, resume: bool = False, free: tuple[str, ...] = ()) -> None:
  """Write config.json, env.json, and one more line of command.txt, each whole or not at all.

  config: resolved, of JSON values. free: dotted keys (with all below them) that may differ from those of the run
  that is there. env.json is this start's, with those before it that differed under 'earlier'. UserError OTHER_CONFIG
  where another key differs; NO_CHECKPOINT where `resume` is asked and no run is there.
  """
  workdir = _folder(workdir)
  compare(workdir, config, free)
  if resume and not (workdir / 'config.json').exists():
    raise UserError(f'{workdir} holds no run.',
                    f'Start one: eqssl train --config FILE --workdir {shlex.quote(str(workdir))}', NO_CHECKPOINT)
  env, before, commands = environment(), {}, ''
  try:
    before = read_object(workdir / 'env.json', '')
  except (FileNotFoundError, UserError) as error:
    if getattr(error, 'code', 0) == INPUT_OUTPUT:  # a damaged one is written anew
      raise
  with contextlib.suppress(FileNotFoundError):
    commands = (workdir / 'command.txt').read_text(encoding='utf-8', errors='surrogateescape')
  earlier = before.pop('earlier', [])
  earlier = earlier if isinstance(earlier, list) else []
  if before and {**before, 'time': None} != {**env, 'time': None}:
    earlier = [*earlier, before]
  write_whole(workdir / 'config.json', json.dumps(config, indent=1, sort_keys=True) + '\n')
  write_whole(workdir / 'env.json', json.dumps({**env, **({'earlier': earlier} if earlier else {})}, indent=1) + '\n')
  write_whole(workdir / 'command.txt', commands + command.strip() + '\n')


def _sane(row: Any) -> dict[str, Any] | None:
  """The numbers of a row of metrics, one that is not finite as None; None where it is no row."""
  number = lambda v: isinstance(v, int | float) and not isinstance(v, bool) and abs(v) < LARGEST
  if not isinstance(row, dict) or not isinstance(row.get('step'), int) or not number(row['step']) or row['step'] < 0:
    return None
  return {k: v if number(v) else None for k, v in row.items() if v is None or number(v) or isinstance(v, float)}


def read_metrics(workdir: Path, say: Callable[[str], None] = lambda line: None) -> list[dict[str, Any]]:
  """The rows of a run's metrics.jsonl in the order of their steps, several of a step as one, without a torn line; none where
  there is no such file. What is no row of numbers is left out, with a line to `say`."""
  path, rows, odd = pathlib.Path(workdir) / 'metrics.jsonl', {}, 0
  text = disk.again(lambda: path.read_text(encoding='utf-8', errors='replace'), path) if path.exists() else ''
  for line in text.split('\n')[:-1]:
    row = None
    with contextlib.suppress(ValueError, RecursionError):
      row = json.loads(line)
    kept = _sane(row)
    odd += kept is None or kept.keys() != row.keys()
    if kept:
      rows[kept['step']] = rows.get(kept['step'], {}) | kept
  if odd:
    say(f'{path}: {odd} lines are not, or not only, the numbers of a step; what is not was left out.')
  return [rows[step] for step in sorted(rows)]


def _row(row: dict[str, Any]) -> str:
  finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
  return json.dumps(finite, allow_nan=False) + '\n'


def _board(workdir: pathlib.Path, step: int):
  """tensorboardX's writer, hiding what an interrupted run wrote after `step`."""
  try:
    from tensorboardX import SummaryWriter
  except ImportError as error:
    raise UserError('TensorBoard files need tensorboardX: not installed.', 'pip install -e ".[log]"') from error
  return SummaryWriter(str(workdir), purge_step=step + 1 if step else None)


@contextlib.contextmanager
def open_metrics(workdir: Path, resume_step: int = 0, tensorboard: bool = False
                 ) -> Iterator[Callable[[int, dict[str, Any]], None]]:
  """`write(step, values)`: a JSON object a line in metrics.jsonl, flushed; a value that is not finite is null.

  Rows after `resume_step`, which a run from there will write again, a torn line and what is no row are dropped first.
  `write` is a UserError where the file was removed or replaced meanwhile.
  """
  workdir = _folder(workdir)
  path = workdir / 'metrics.jsonl'
  board = _board(workdir, resume_step) if tensorboard else None
  kept = ''.join(_row(row) for row in read_metrics(workdir, stop.say) if row['step'] <= resume_step)
  if path.exists() and kept != path.read_text(encoding='utf-8', errors='replace'):
    write_whole(path, kept)
  with path.open('a', encoding='utf-8') as file:
    def write(step: int, values: dict[str, Any]) -> None:
      if not _still(path, file.fileno(), linked=True):
        raise UserError(f'{path} was removed or replaced while the run was going.',
                        f'Go on from the newest checkpoint, if it is there: eqssl resume {shlex.quote(str(workdir))}')
      numbers = {k: float(v) for k, v in values.items()}
      file.write(_row({'step': int(step), **numbers}))
      file.flush()
      if board is not None:
        for k, v in numbers.items():
          board.add_scalar(k, v, int(step))
    try:
      yield write
    finally:
      if board is not None:
        board.close()

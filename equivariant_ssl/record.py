"""What a run leaves behind and says while it runs: config, command, environment, metrics, progress, and when to stop.

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
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from equivariant_ssl import renamed, shard
from equivariant_ssl.errors import IN_USE, NO_CHECKPOINT, OTHER_CONFIG, USAGE, UserError

Path = str | pathlib.Path
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)  # Lustre without -o flock, some NFS
PACKAGES = ('equivariant-ssl', 'jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy')


def write_whole(path: pathlib.Path, text: str) -> None:
  """Write a file whole: a kill leaves the old one or the new one."""
  part = path.with_name(path.name + '.tmp')
  part.write_text(text, encoding='utf-8', errors='surrogateescape')  # a name may be of other bytes
  part.replace(path)


def read_object(path: pathlib.Path, fix: str, code: int = USAGE) -> dict[str, Any]:
  """The JSON object in a file; UserError with `fix` where it is damaged."""
  try:
    found = json.loads(path.read_text(encoding='utf-8'))
  except ValueError as error:  # of JSON or of its letters
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
          'host': socket.gethostname(), 'cpu': _processor(), 'cores': shard.count_cores(),
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


@contextlib.contextmanager
def lock(workdir: Path) -> Iterator[None]:
  """Hold `workdir` for this process; UserError IN_USE where another has it. The kernel lets go of a dead one's."""
  path = _folder(workdir) / 'run.lock'
  with path.open('a+', encoding='utf-8') as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      file.seek(0)
      raise UserError(f'{workdir} is in use by {file.read().strip() or "another process"}.',
                      'Wait for it or stop it, or use another folder.', IN_USE) from None
    except OSError as e:
      if e.errno not in NO_LOCKS:
        raise
      print(f'{workdir}: this file system has no locks: take care that one process at a time works there', file=sys.stderr)
    file.truncate(0)
    file.write(f'process {os.getpid()} on {socket.gethostname()} since {time.strftime("%Y-%m-%d %H:%M:%S")}\n')
    file.flush()
    yield


def leaves(value: Any, path: str = '') -> dict[str, Any]:
  """{dotted key: value} of a config as JSON."""
  if isinstance(value, dict) and value:
    parts = (leaves(part, f'{path}.{name}' if path else name) for name, part in value.items())
    return {k: v for part in parts for k, v in part.items()}
  return {path: value}


def compare(workdir: pathlib.Path, config: dict, free: tuple[str, ...], defaults: dict | None = None) -> None:
  """UserError OTHER_CONFIG where the config of the run in `workdir`, if one is there, and `defaults` of what it does not say
  differ from `config` in a key that is not free."""
  if not (workdir / 'config.json').exists():
    return
  text = lambda config: {k: json.dumps(v, sort_keys=True) for k, v in leaves(config).items()}
  there = renamed.config(read_object(workdir / 'config.json', 'Use a new --workdir.', OTHER_CONFIG))
  old = text(json.loads(json.dumps(defaults or {})) | there)
  new = text(json.loads(json.dumps(config)))
  changed = [f'{k}: {old.get(k, "absent")} -> {new.get(k, "absent")}' for k in sorted({**old, **new})
             if old.get(k) != new.get(k) and not any(k == f or k.startswith(f + '.') for f in free)]
  if changed:
    raise UserError(f'{workdir} holds a run of another config: {"; ".join(changed[:5])}'
                    + (f'; and {len(changed) - 5} more.' if len(changed) > 5 else '.'),
                    f'Use a new --workdir, or go on with that run as it was: eqssl resume {shlex.quote(str(workdir))}',
                    OTHER_CONFIG)


def start(workdir: Path, config: dict, command: str, resume: bool = False, free: tuple[str, ...] = (),
          defaults: dict | None = None) -> None:
  """Write config.json, env.json, and one more line of command.txt, each whole or not at all.

  config: resolved, of JSON values. free: dotted keys (with all below them) that may differ from those of the run
  that is there. defaults: of the keys that a run of an older version does not have. env.json is this start's, with those
  before it that differed under 'earlier'. UserError OTHER_CONFIG where another key differs; NO_CHECKPOINT where `resume` is
  asked and no run is there.
  """
  workdir = _folder(workdir)
  compare(workdir, config, free, defaults)
  if resume and not (workdir / 'config.json').exists():
    raise UserError(f'{workdir} holds no run.',
                    f'Start one: eqssl train --config FILE --workdir {shlex.quote(str(workdir))}', NO_CHECKPOINT)
  env, before, commands = environment(), {}, ''
  with contextlib.suppress(FileNotFoundError, UserError):  # a damaged one is written anew
    before = read_object(workdir / 'env.json', '')
  with contextlib.suppress(FileNotFoundError):
    commands = (workdir / 'command.txt').read_text(encoding='utf-8', errors='surrogateescape')
  earlier = before.pop('earlier', [])
  if before and {**before, 'time': None} != {**env, 'time': None}:
    earlier = [*earlier, before]
  write_whole(workdir / 'config.json', json.dumps(config, indent=1, sort_keys=True) + '\n')
  write_whole(workdir / 'env.json', json.dumps({**env, **({'earlier': earlier} if earlier else {})}, indent=1) + '\n')
  write_whole(workdir / 'command.txt', commands + command.strip() + '\n')


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
  """The rows of a run's metrics.jsonl, without a torn line; none where there is no such file."""
  path, rows = pathlib.Path(workdir) / 'metrics.jsonl', []
  for line in path.read_text(encoding='utf-8', errors='replace').splitlines(keepends=True) if path.exists() else ():
    with contextlib.suppress(ValueError):
      row = json.loads(line)
      if line.endswith('\n') and isinstance(row, dict) and isinstance(row.get('step'), int):
        rows.append(row)
  return rows


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

  Rows after `resume_step`, which a run from there will write again, and a torn line are dropped first.
  """
  workdir = _folder(workdir)
  path = workdir / 'metrics.jsonl'
  board = _board(workdir, resume_step) if tensorboard else None
  kept = ''.join(_row(row) for row in read_metrics(workdir) if row['step'] <= resume_step)
  if path.exists() and kept != path.read_text(encoding='utf-8', errors='replace'):
    write_whole(path, kept)
  with path.open('a', encoding='utf-8') as file:
    def write(step: int, values: dict[str, Any]) -> None:
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


def _clock(seconds: float) -> str:
  minutes, seconds = divmod(int(seconds), 60)
  return f'{minutes // 60}:{minutes % 60:02d}:{seconds:02d}'


@contextlib.contextmanager
def progress(total: int, start: int = 0, describe: str = '', quiet: bool = False) -> Iterator[Callable[..., None]]:
  """`update(step, terms, images_per_s, data_wait)` on stderr: one live line on a terminal, else a line each 5 s.

  terms: {name: loss}. data_wait: share of the time spent waiting for data. The first and the last step are always
  said; numbers are fetched only when shown.
  """
  from rich.console import Console
  from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
  from rich.table import Column

  console = Console(stderr=True)
  live = console.is_terminal and not console.is_dumb_terminal and not quiet
  began, shown = time.monotonic(), None  # when the last line was shown
  line = Column(ratio=1, no_wrap=True, overflow='ellipsis')  # cut, never wrapped: a wrapped live line flickers
  bar = Progress(TextColumn('{task.description}', markup=False), BarColumn(20), MofNCompleteColumn(),
                 TextColumn('{task.fields[note]}', markup=False, table_column=line),
                 console=console, refresh_per_second=4, expand=True, disable=not live)
  task = bar.add_task(describe, total=total, completed=start, note='compiling')

  def update(step: int, terms: dict[str, Any], images_per_s: float, data_wait: float) -> None:
    nonlocal shown
    now = time.monotonic()
    if quiet or shown is not None and step < total and now - shown < (.2 if live else 5.):
      return
    shown = now
    left = _clock((now - began) / max(step - start, 1) * (total - step))
    note = '  '.join([f'{left} left', f'{images_per_s:.0f} images/s', f'{100 * data_wait:.0f} % data wait',
                      *(f'{k} {float(v):.4g}' for k, v in terms.items())])
    if live:
      bar.update(task, completed=step, note=note)
    else:
      print(f'{describe}  {step}/{total}  {note}'.strip(), file=sys.stderr, flush=True)

  with bar:
    yield update


@contextlib.contextmanager
def stop_on_signal() -> Iterator[Callable[[], bool]]:
  """`asked()`: whether SIGTERM, SIGUSR1 or SIGINT (Ctrl-C) has come; a second SIGINT raises KeyboardInterrupt.

  The handlers there were before come back on leaving. Outside the main thread nothing is ever asked.
  """
  came: list[int] = []

  def handle(number: int, frame: Any) -> None:
    if number == signal.SIGINT and signal.SIGINT in came:
      raise KeyboardInterrupt
    came.append(number)

  if threading.current_thread() is not threading.main_thread():
    yield lambda: False
    return
  before = {s: signal.signal(s, handle) for s in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
  try:
    yield lambda: bool(came)
  finally:
    for number, handler in before.items():
      signal.signal(number, signal.SIG_DFL if handler is None else handler)

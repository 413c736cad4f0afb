"""The record that a run leaves in its folder: config, command, environment and metrics.

A lock says which process may write there. Only the main process of a job calls these functions.
"""
import contextlib
import errno
import fcntl
import json
import os
import pathlib
import shlex
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

from equivariant_ssl import renamed
from equivariant_ssl.errors import (
    IN_USE,
    INPUT_OUTPUT,
    NO_CHECKPOINT,
    OTHER_CONFIG,
    USAGE,
    UserError,
)
from equivariant_ssl.storage import disk
from equivariant_ssl.storage.environment import environment
from equivariant_ssl.storage.metrics_row import row_text, valid_row
from equivariant_ssl.training import stop

Path = str | pathlib.Path
Say = Callable[[str], None]  # prints a line for the user
# The errors of a file system without locks: Lustre without -o flock, and some NFS. NFS also cannot
# lock a folder, which cannot be opened for writing.
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EBADF,
            errno.EINVAL)


def write_atomically(path: pathlib.Path, text: str) -> None:
  """Write a file so that a kill or a loss of power leaves the old content or the new one."""
  part = path.with_name(path.name + '.tmp')
  # A file name in the text may have bytes that are not UTF-8.
  part.write_text(text, encoding='utf-8', errors='surrogateescape')
  disk.flush(part)
  part.replace(path)
  disk.flush(path.parent)


def _read_text(path: pathlib.Path, errors: str = 'strict') -> str:
  """Return the text of a file. An error of the disk that may pass is tried again."""
  return disk.retry(lambda: path.read_text(encoding='utf-8', errors=errors), path)


def read_json_object(path: pathlib.Path, fix: str, code: int = USAGE) -> dict[str, Any]:
  """Return the JSON object in a file. Raise UserError with `fix` if the file is damaged.

  Raises UserError INPUT_OUTPUT if the file cannot be read.
  """
  try:
    value = json.loads(_read_text(path))
  except (ValueError, RecursionError) as error:  # the text is no JSON, or its bytes are no UTF-8
    raise UserError(f'{path} is damaged, it is not JSON: {error}.', fix, code) from None
  if not isinstance(value, dict):
    raise UserError(f'{path} is damaged, it holds no JSON object.', fix, code)
  return value


def check_workdir(workdir: Path, option: str = '--workdir') -> None:
  """Raise UserError if a file is where the folder of a run, or of a study, is to be."""
  path = pathlib.Path(workdir)
  if path.exists() and not path.is_dir():
    raise UserError(f'{option} {workdir} is a file, not a folder.',
                    f'e.g. {option} {shlex.quote(str(path.with_suffix("")))}_run')


def _folder(workdir: Path) -> pathlib.Path:
  """Make the folder `workdir` and return it. Raise UserError if it cannot be made."""
  workdir = pathlib.Path(workdir)
  try:
    disk.retry(lambda: workdir.mkdir(parents=True, exist_ok=True), workdir)
  except OSError as error:
    raise UserError(f'{workdir} cannot be a workdir: {error.strerror}.',
                    'Use another --workdir.') from error
  return workdir


def _locked(descriptor: int) -> bool:
  """Lock an open file. Return False if its file system has no such locks.

  Raises BlockingIOError if another process holds the lock.
  """
  try:
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    raise
  except OSError as error:
    if error.errno not in NO_LOCKS:
      raise
    return False
  return True


def _is_open_file(path: Path, descriptor: int, linked: bool = False) -> bool:
  """Return whether the file at `path` is the one that is open.

  linked: whether it is enough that the open file still has a name and that `path` exists. Some
          file systems in user space give their files new numbers.
  """
  try:
    at_path, opened = disk.retry(lambda: os.stat(path), path), os.fstat(descriptor)
  except (FileNotFoundError, NotADirectoryError):
    return False
  return os.path.samestat(at_path, opened) or (linked and opened.st_nlink > 0)


@contextlib.contextmanager
def lock_folder(workdir: Path) -> Iterator[Callable[[], None]]:
  """Hold the folder `workdir` for this process. The kernel frees the lock of a dead process.

  Both the folder and run.lock in it are locked: the folder's lock cannot be deleted, and the
  file's lock works on NFS. The context gives a function that raises UserError if the folder, or the
  lock in it, was removed or replaced meanwhile.

  Raises UserError IN_USE if another process holds the folder.
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
        stop.say(f'{workdir}: this file system has no locks: take care that one process at a time '
                 'works there')
      holder = (f'process {os.getpid()} on {socket.gethostname()} '
                f'since {time.strftime("%Y-%m-%d %H:%M:%S")}\n')
      file.truncate(0)
      file.write(holder)
      file.flush()

      def check() -> None:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
          if _read_text(path, 'replace') == holder:
            return
        if not (held[0] and _is_open_file(workdir, folder)):
          raise UserError(f'{workdir} was removed or replaced while this process worked in it.',
                          'Train again in a new --workdir, or resume a copy of what was there.')
      yield check
  finally:
    os.close(folder)


def config_leaves(value: Any, path: str = '') -> dict[str, Any]:
  """Return the values of a config of JSON values as {dotted key: value}.

  The sections in a list are numbered, as in 'equivariance.0.name'.
  """
  if isinstance(value, (list, tuple)) and value and all(isinstance(part, dict) for part in value):
    value = {str(i): part for i, part in enumerate(value)}
  if isinstance(value, dict) and value:
    parts = (config_leaves(part, f'{path}.{name}' if path else name)
             for name, part in value.items())
    return {k: v for part in parts for k, v in part.items()}
  return {path: value}


def _leaf_texts(config: dict) -> dict[str, str]:
  """Return the values of a config as {dotted key: JSON text}."""
  return {k: json.dumps(v, sort_keys=True) for k, v in config_leaves(config).items()}


def compare(workdir: pathlib.Path, config: dict, free: tuple[str, ...]) -> None:
  """Compare `config` with the config of the run in `workdir`, if there is one.

  free: the keys in which they may differ, with all keys below them.

  Raises UserError OTHER_CONFIG if they differ in another key.
  """
  if not (workdir / 'config.json').exists():
    return
  values = read_json_object(workdir / 'config.json', 'Use a new --workdir.', OTHER_CONFIG)
  old = _leaf_texts(renamed.stored(values))
  new = _leaf_texts(json.loads(json.dumps(config)))
  changed = [f'{k}: {old.get(k, "absent")} -> {new.get(k, "absent")}'
             for k in sorted({**old, **new}) if old.get(k) != new.get(k)
             and not any(k == f or k.startswith(f + '.') for f in free)]
  if changed:
    more = f'; and {len(changed) - 5} more.' if len(changed) > 5 else '.'
    raise UserError(f'{workdir} holds a run of another config: {"; ".join(changed[:5])}{more}',
                    'Use a new --workdir, or go on with that run as it was: '
                    f'eqssl resume {shlex.quote(str(workdir))}', OTHER_CONFIG)


def start_record(workdir: Path, config: dict, command: str, resume: bool = False,
                 free: tuple[str, ...] = ()) -> None:
  """Write config.json, env.json, and one more line of command.txt.

  config: the resolved config, as JSON values.
  resume: whether a run must be in `workdir`.
  free:   dotted keys, with all keys below them, that may differ from those of the run in `workdir`.

  A kill leaves each file as it was or as it is to be. env.json has the environment of this start,
  and under 'earlier' those of earlier starts that differed. Raises UserError OTHER_CONFIG if a key
  differs that is not free, and NO_CHECKPOINT if a run must be there and is not.
  """
  workdir = _folder(workdir)
  compare(workdir, config, free)
  if resume and not (workdir / 'config.json').exists():
    raise UserError(f'{workdir} holds no run.', 'Start one: eqssl train --config FILE '
                    f'--workdir {shlex.quote(str(workdir))}', NO_CHECKPOINT)
  env, before, commands = environment(), {}, ''
  try:
    before = read_json_object(workdir / 'env.json', '')
  except (FileNotFoundError, UserError) as error:
    if getattr(error, 'code', 0) == INPUT_OUTPUT:  # but a damaged file is written anew
      raise
  with contextlib.suppress(FileNotFoundError):
    commands = (workdir / 'command.txt').read_text(encoding='utf-8', errors='surrogateescape')
  earlier = before.pop('earlier', [])
  earlier = earlier if isinstance(earlier, list) else []
  if before and {**before, 'time': None} != {**env, 'time': None}:
    earlier = [*earlier, before]
  env |= {'earlier': earlier} if earlier else {}
  write_atomically(workdir / 'config.json', json.dumps(config, indent=1, sort_keys=True) + '\n')
  write_atomically(workdir / 'env.json', json.dumps(env, indent=1) + '\n')
  write_atomically(workdir / 'command.txt', commands + command.strip() + '\n')


def read_metrics(workdir: Path, say: Say = lambda line: None) -> list[dict[str, Any]]:
  """Return the rows of a run's metrics.jsonl in the order of their steps.

  Several rows of one step are merged. A line that was cut off is left out, and so is everything
  that is no row of numbers; `say` prints a line about it. Without the file there are no rows.
  """
  path, rows, odd = pathlib.Path(workdir) / 'metrics.jsonl', {}, 0
  text = _read_text(path, 'replace') if path.exists() else ''
  for line in text.split('\n')[:-1]:
    row = None
    with contextlib.suppress(ValueError, RecursionError):
      row = json.loads(line)
    valid = valid_row(row)
    odd += valid is None or row is None or valid.keys() != row.keys()
    if valid:
      rows[valid['step']] = rows.get(valid['step'], {}) | valid
  if odd:
    say(f'{path}: {odd} lines have something else than the numbers of a step; it was left out.')
  return [rows[step] for step in sorted(rows)]


def _tensorboard(workdir: pathlib.Path, step: int) -> Any:
  """Return tensorboardX's writer. It hides what an interrupted run wrote after `step`."""
  try:
    from tensorboardX import SummaryWriter
  except ImportError as error:
    raise UserError('TensorBoard files need tensorboardX: not installed.',
                    'pip install -e ".[log]"') from error
  return SummaryWriter(str(workdir), purge_step=step + 1 if step else None)


@contextlib.contextmanager
def open_metrics(workdir: Path, resume_step: int = 0, tensorboard: bool = False
                 ) -> Iterator[Callable[[int, dict[str, Any]], None]]:
  """Give a function `write(step, values)` that writes a row of metrics.jsonl.

  A row is a line with a JSON object, flushed at once; a value that is not finite is null. Rows
  after `resume_step` are dropped first, since a run that resumes there writes them again. So are a
  line that was cut off, and what is no row.

  `write` raises UserError if the file was removed or replaced meanwhile.
  """
  workdir = _folder(workdir)
  path = workdir / 'metrics.jsonl'
  board = _tensorboard(workdir, resume_step) if tensorboard else None
  rows = ''.join(row_text(row) for row in read_metrics(workdir, stop.say)
                 if row['step'] <= resume_step)
  if path.exists() and rows != path.read_text(encoding='utf-8', errors='replace'):
    write_atomically(path, rows)
  with path.open('a', encoding='utf-8') as file:
    def write(step: int, values: dict[str, Any]) -> None:
      if not _is_open_file(path, file.fileno(), linked=True):
        raise UserError(f'{path} was removed or replaced while the run was going.',
                        'Go on from the newest checkpoint, if it is there: '
                        f'eqssl resume {shlex.quote(str(workdir))}')
      numbers = {k: float(v) for k, v in values.items()}
      file.write(row_text({'step': int(step), **numbers}))
      file.flush()
      if board is not None:
        for k, v in numbers.items():
          board.add_scalar(k, v, int(step))
    try:
      yield write
    finally:
      if board is not None:
        board.close()

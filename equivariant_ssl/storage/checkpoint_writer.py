"""The writer of a run's checkpoints: saves in the background, and the errors of a save."""
import contextlib
import errno
import importlib.metadata
import os
import pathlib
import re
import shutil
from collections.abc import Iterator
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from equivariant_ssl.errors import INPUT_OUTPUT, USAGE, UserError, passing
from equivariant_ssl.parallel import processes
from equivariant_ssl.storage import disk, fingerprint
from equivariant_ssl.storage.run_identity import Keeper

ORBAX = importlib.metadata.version('orbax-checkpoint')
# The errors of a failed save that the message to the user names.
NAMED_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG)
# How orbax and Python say that a directory is missing.
_MISSING = re.compile('not a directory|does not exist|no such file', re.IGNORECASE)


def saved_steps(directory: str | pathlib.Path) -> list[int]:
  """Return the committed steps in `directory`, the newest first.

  Orbax commits a checkpoint by a rename, so an incomplete one has another kind of name.
  """
  def look() -> list[int]:
    folder = pathlib.Path(directory)
    paths = folder.iterdir() if folder.is_dir() else ()
    return sorted((int(p.name) for p in paths if p.name.isdecimal() and p.is_dir()), reverse=True)
  return disk.retry(look, directory)


def first_line(error: BaseException) -> str:
  """Return the type of an error and the first line of its message."""
  return f'{type(error).__name__}: {(str(error).splitlines() or [""])[0][:100]}'


def _manager(directory: Any, keep: int) -> ocp.training.Checkpointer:
  """Return orbax's writer, which keeps the newest `keep` checkpoints in the path `directory`."""
  context = ocp.Context()
  # If its thread cannot make a directory, the interpreter waits for the thread for minutes at exit.
  context.asynchronous.create_directories_asynchronously = False
  newest: Any = ocp.training.preservation_policies.LatestN(keep)
  return ocp.training.Checkpointer(directory, context=context, cleanup_tmp_directories=True,
                                   preservation_policy=newest)


def _not_written(directory: pathlib.Path, step: int, error: Exception, newest: int | None
                 ) -> UserError:
  """Return the error for a checkpoint that was not written."""
  # The system's words stand last in a long line of orbax.
  named = next((os.strerror(n) for n in NAMED_ERRORS if os.strerror(n) in str(error)), '')
  may_pass = passing(error) or _overlooked(directory, error)
  why = may_pass or named or first_line(error)
  return UserError(f'checkpoint {step} was not written to {directory}: {why}.',
                   'Check the disk space and permissions there, then resume. '
                   f'The newest checkpoint is of step {newest}.',
                   INPUT_OUTPUT if may_pass else USAGE)


def _overlooked(directory: pathlib.Path, error: BaseException | None) -> str:
  """The text of an error about a directory that is said to be missing and is there; else ''.

  `os.path.isdir` answers False when the disk fails, so that orbax reports a missing directory.
  """
  while error is not None:
    if _MISSING.search(str(error)) and directory.is_dir():
      return f'{first_line(error)} (it is there now, so the disk failed for a moment)'
    error = error.__cause__ or error.__context__
  return ''


def _raise_if_full(directory: pathlib.Path, leaves: dict[str, Any]) -> None:
  """Raise OSError if the disk has no room for one more checkpoint.

  The oldest checkpoint is deleted only after the newest one is written.
  """
  need = 1.2 * sum(v.nbytes for v in leaves.values())
  free = shutil.disk_usage(directory).free
  if free < need:
    raise OSError(f'{free / 2 ** 20:.1f} MiB are free, {need / 2 ** 20:.1f} MiB are needed')


class Writer:
  """The writer of the checkpoints in `directory`.

  keep:   the number of checkpoints that are kept.
  saved:  the steps that need not be saved again. The writer adds those that it saves.
  keeper: the identity of the run.

  An error of a save in the background is raised once, by `finish` or by the next `save`.
  """

  def __init__(self, directory: pathlib.Path, keep: int, saved: set[int], keeper: Keeper):
    self.directory, self.keep, self.saved, self.keeper = directory, keep, saved, keeper
    self.manager: Any = None  # orbax's Checkpointer
    self.pending: Any = None  # (step, orbax's response) of the save in flight

  def latest(self) -> int | None:
    """Return the newest committed step, after the save in flight is over; or None."""
    if self.pending is not None:
      with contextlib.suppress(Exception):  # `finish` will raise it
        self.pending[1].result()
    return next(iter(saved_steps(self.directory)), None)

  def close(self) -> None:
    """Close orbax's writer. The next save opens a new one."""
    manager, self.manager = self.manager, None
    with contextlib.suppress(Exception):  # orbax raises here the error of a save once more
      if manager:
        manager.close()

  @contextlib.contextmanager
  def _explained(self, step: int) -> Iterator[None]:
    """Turn an error of a save into a UserError that says what is wrong."""
    try:
      yield
    except Exception as error:
      self.saved.discard(step)
      if lost := processes.lost_process_error(error):
        self.manager = None  # closing it would wait for the lost process
        raise lost from error
      # This manager would raise the same error again. A new one also clears away what was left.
      self.close()
      raise _not_written(self.directory, step, error, self.latest()) from error

  def finish(self, durable: bool = False) -> None:
    """Wait for the save in flight. durable: the checkpoint must survive a loss of power."""
    if self.pending is not None:
      (step, response), self.pending = self.pending, None
      with self._explained(step):
        response.result()
        if durable and jax.process_index() == 0:  # orbax itself flushes its array files only
          disk.flush_all(self.directory / str(step))
      self.keeper.note_saved(step)

  def save(self, step: int, state: Any, meta: dict, wait: bool = False) -> None:
    """Save a state in the background; `wait`: return when it is on the disk."""
    self.finish(wait)
    if step in self.saved:
      return
    leaves, prints = fingerprint.sound_leaves(step, state, self.latest())
    with self._explained(step):
      self.manager = self.manager or _manager(self.directory, self.keep)
      _raise_if_full(self.directory, leaves)
      sealed = fingerprint.seal(step, prints, meta, run=self.keeper.name_run(), orbax=ORBAX)
      arrays = {k: v for k, v in leaves.items() if v.size}  # orbax knows no array of size 0
      self.pending = step, self.manager.save_async(step, arrays, force=True,
                                                   custom_metadata=sealed)
    self.saved.add(step)
    if wait:
      self.finish(True)

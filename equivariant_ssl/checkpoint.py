"""Checkpoints that are checked: orbax writes them, a fingerprint says whether what is read is what was written.

Orbax's commit survives kill -9, but it does not notice a flipped bit in the weights and falls back to nothing. So
each checkpoint carries a fingerprint of every leaf, and reading takes the newest that proves right. A state is saved
flat, {key path: leaf}: optax's empty and masked nodes need no support, the abstract tree gives the form. All
processes call `save` and `restore`; process 0 alone renames.
"""
import contextlib
import gc
import logging
import os
import pathlib
import shlex
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from equivariant_ssl import distributed, fingerprint
from equivariant_ssl.errors import NO_CHECKPOINT, NOT_FINITE, OTHER_CONFIG, UserError

Found = tuple[int, Any, dict]  # step, state, meta

# Orbax prints each failure of its threads as a page of traceback; every one of them is raised here as one line.
logging.getLogger('absl').addFilter(lambda record: f'{os.sep}orbax{os.sep}' not in record.pathname)


class Checkpoints(NamedTuple):
  """save:    (step, state, meta, wait=False). Asynchronous; returns at once for a step that is already saved.
  restore: abstract -> (step, state, meta) of the newest valid checkpoint, None where there never was one.
  latest:  () -> the newest committed step, after waiting for the one in flight; or None.
  """
  save: Callable[..., None]
  restore: Callable[[Any], Found | None]
  latest: Callable[[], int | None]


class _DamagedError(Exception):
  """A checkpoint that cannot be believed, and why."""


def steps(directory: str | pathlib.Path) -> list[int]:
  """The committed steps in `directory`, newest first; a commit is a rename, so a torn one has another name."""
  found = pathlib.Path(directory).iterdir() if pathlib.Path(directory).is_dir() else ()
  return sorted((int(p.name) for p in found if p.name.isdecimal() and p.is_dir()), reverse=True)


def _line(error: BaseException) -> str:
  return f'{type(error).__name__}: {(str(error).splitlines() or [""])[0][:100]}'


def _raise_if_unreadable(path: pathlib.Path) -> None:
  """OSError where a file of `path` cannot be read (EACCES, EIO, ESTALE): that says nothing about what is in it."""
  for part in (path, *path.rglob('*')):
    with contextlib.suppress(FileNotFoundError, IsADirectoryError), part.open('rb') as file:
      while file.read(1 << 24):
        pass


@contextlib.contextmanager
def _unheard() -> Iterator[None]:
  """Where one of its reads fails, orbax abandons the others; what these then raise to no one is not for the user."""
  before, tasks, deaf = sys.unraisablehook, logging.getLogger('asyncio'), lambda record: False
  sys.unraisablehook = lambda unraisable: None
  tasks.addFilter(deaf)  # 'Task exception was never retrieved'
  try:
    with warnings.catch_warnings():
      warnings.simplefilter('ignore', RuntimeWarning)  # 'coroutine ... was never awaited'
      yield
  finally:
    tasks.removeFilter(deaf)
    sys.unraisablehook = before


def _read(path: pathlib.Path, wanted: dict[str, Any], part: bool) -> tuple[dict[str, jax.Array], dict]:
  """The wanted leaves and the meta of one checkpoint. Raises _DamagedError, UserError OTHER_CONFIG, OSError."""
  own, why = jax.sharding.SingleDeviceSharding(jax.local_devices()[0]), None
  placed = {k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=getattr(v, 'sharding', None) or own)
            for k, v in wanted.items()}
  with _unheard():
    try:
      record = fingerprint.unseal(ocp.metadata(path).custom_metadata)
      wrong = fingerprint.differences(record['leaves'], wanted, part)
      if wrong:
        raise UserError(f'{path} is of another config: {wrong}.', 'Use a new --workdir, or go on with that run as it '
                        f'was: eqssl resume {shlex.quote(str(path.parent.parent))}', OTHER_CONFIG)
      context = ocp.Context()
      context.pytree.loading.partial_load = True  # which leaves may be left out is decided
      with context:
        leaves = ocp.load(path, {k: v for k, v in placed.items() if v.size})  # orbax knows no array of size 0
      jax.block_until_ready(leaves)
      why = next((f'it has no {k}' for k, v in leaves.items() if not isinstance(v, jax.Array)), None)
    except Exception as error:
      if isinstance(error, UserError | MemoryError) or 'RESOURCE_EXHAUSTED' in str(error):
        raise
      why = _line(error)
    if why:
      time.sleep(.05)  # the reads that were abandoned end here
      gc.collect()
  if why:
    _raise_if_unreadable(path)
    raise _DamagedError(why)
  leaves |= {k: jnp.zeros(v.shape, v.dtype, device=v.sharding) for k, v in placed.items() if not v.size}
  prints, _ = fingerprint.survey(leaves)
  wrong = [k for k in leaves if prints[k] != record['leaves'][k]]
  if wrong:
    raise _DamagedError(f'{wrong[0]} is not what was saved; {len(wrong)} of {len(leaves)} leaves differ')
  if {record['step'], int(leaves.get('step', record['step']))} != {int(path.name)}:
    raise _DamagedError(f'it holds step {record["step"]}')
  return leaves, record['meta']


def _newest(directory: pathlib.Path, abstract: Any, among: list[int], part: bool,
            reject: Callable[[pathlib.Path, str], None]) -> Found | None:
  """The first valid checkpoint of `among`, `reject` called (in every process) with each damaged one before it."""
  wanted = fingerprint.flat(abstract)
  for step in among:
    path, failed = directory / str(step), None
    try:
      leaves, meta = _read(path, wanted, part)
    except Exception as error:
      failed = error
    verdict = max(distributed.gather(0 if failed is None else 1 if isinstance(failed, _DamagedError) else 2))
    if verdict == 0:
      return step, jax.tree.unflatten(jax.tree.structure(abstract), [leaves[k] for k in wanted]), meta
    if verdict == 2:
      raise failed or UserError(f'{path} could not be read in another process.', 'Its message says why.')
    reject(path, str(failed or 'in another process'))
  return None


def load(directory: str | pathlib.Path, abstract: Any, step: int | None = None,
         log: Callable[[str], None] = print) -> Found:
  """(step, state, meta) of the newest valid checkpoint in `directory`, or of `step`; writes and moves nothing.

  abstract: a tree of jax.ShapeDtypeStruct with shardings (none: the first device), of all or some of the saved
  leaves. UserError NO_CHECKPOINT where there is none, OTHER_CONFIG where it does not fit.
  """
  directory = pathlib.Path(directory).absolute()
  there = distributed.seen(f'checkpoints in {directory}', lambda: steps(directory))
  if not there or step is not None and step not in there:
    if there:
      raise UserError(f'{directory} has no checkpoint of step {step}.',
                      f'It has those of {", ".join(map(str, there))}.', NO_CHECKPOINT)
    raise UserError(f'{directory} has no checkpoint.',
                    f'Train first: eqssl train --config FILE --workdir {shlex.quote(str(directory.parent))}', NO_CHECKPOINT)
  found = _newest(directory, abstract, there if step is None else [step], True,
                  lambda path, why: log(f'checkpoint {path.name} is damaged ({why}): left out'))
  if found is None:
    raise UserError(f'no checkpoint in {directory} is valid; tried {there if step is None else step}.',
                    'Restore a copy of it, or train again in a new --workdir.', NO_CHECKPOINT)
  return found


def _sound(step: int, state: Any, newest: int | None) -> tuple[dict[str, Any], dict[str, str]]:
  """The leaves of a state to save and their fingerprints; UserError NOT_FINITE."""
  leaves = fingerprint.flat(state)
  if jax.process_count() > 1:  # orbax wants global arrays there; what is whole here is the same everywhere
    leaves = {k: np.asarray(v) if getattr(v, 'is_fully_addressable', True) else v for k, v in leaves.items()}
  prints, broken = fingerprint.survey(leaves)
  if broken:
    raise UserError(f'the state of step {step} is not finite ({", ".join(broken[:3])}): it is not saved.',
                    f'The newest checkpoint is of step {newest}.', NOT_FINITE)
  return leaves, prints


def _manager(directory: pathlib.Path, keep: int) -> ocp.training.Checkpointer:
  context = ocp.Context()
  # A directory that cannot be made by the thread leaves the interpreter waiting for it for minutes at exit.
  context.asynchronous.create_directories_asynchronously = False
  return ocp.training.Checkpointer(
      directory, context=context, cleanup_tmp_directories=True,
      preservation_policy=ocp.training.preservation_policies.LatestN(keep))


def _writer(directory: pathlib.Path, keep: int, saved: set[int]) -> tuple[Callable, ...]:
  """`save` and `latest` of Checkpoints; `finish(durable=False)`, which waits for the save in flight; `close`.

  saved: the steps that need no saving. An error of a save is raised once, by `finish` or the next `save`.
  """
  manager, pending = None, None  # orbax's Checkpointer; (step, response) in flight

  def latest() -> int | None:
    if pending is not None:
      with contextlib.suppress(Exception):  # `finish` will raise it
        pending[1].result()
    return next(iter(steps(directory)), None)

  def close() -> None:
    nonlocal manager
    last, manager = manager, None
    if last is not None:
      with contextlib.suppress(Exception):  # all it can raise is the error of a save that was raised already
        last.close()

  @contextlib.contextmanager
  def explained(step: int) -> Iterator[None]:
    try:
      yield
    except Exception as error:
      saved.discard(step)
      close()  # it would raise the same error again; a new one also clears away what was left behind
      raise UserError(f'checkpoint {step} was not written to {directory}: {_line(error)}',
                      'Check the disk space and permissions there, then resume. '
                      f'The newest checkpoint is of step {latest()}.') from error

  def finish(durable: bool = False) -> None:
    nonlocal pending
    if pending is not None:
      (step, response), pending = pending, None
      with explained(step):
        response.result()
      if durable and jax.process_index() == 0:
        _flush(directory / str(step))

  def save(step: int, state: Any, meta: dict, wait: bool = False) -> None:
    nonlocal manager, pending
    finish(wait)
    if step in saved:
      return
    leaves, prints = _sound(step, state, latest())
    with explained(step):
      manager = manager or _manager(directory, keep)
      need, free = 1.2 * sum(v.nbytes for v in leaves.values()), shutil.disk_usage(directory).free
      if free < need:  # the oldest goes only after the newest is there
        raise OSError(f'{free / 2 ** 20:.1f} MiB are free, {need / 2 ** 20:.1f} MiB are needed')
      pending = step, manager.save_async(step, {k: v for k, v in leaves.items() if v.size}, force=True,
                                         custom_metadata=fingerprint.seal(step, prints, meta))
    saved.add(step)
    if wait:
      finish(True)

  return save, latest, finish, close


@contextlib.contextmanager
def open(directory: str | pathlib.Path, keep: int = 3, log: Callable[[str], None] = print) -> Iterator[Checkpoints]:
  """The checkpoints of a run in `directory`, for its one writer; leaving waits for the save in flight.

  The newest `keep` are kept. A damaged one found on restoring is moved to `directory`/../quarantine/<step>-<ns>, with
  a line to `log`. UserError: NOT_FINITE a state to save is not, OTHER_CONFIG the state does not fit (none is moved),
  NO_CHECKPOINT there were some but none is valid, 2 a save failed. OSError where files cannot be read.
  """
  directory = pathlib.Path(directory).absolute()
  quarantine, saved = directory.parent / 'quarantine', set()
  save, latest, finish, close = _writer(directory, keep, saved)

  def reject(path: pathlib.Path, why: str) -> None:
    if jax.process_index() == 0:
      target = quarantine / f'{path.name}-{time.time_ns()}'
      quarantine.mkdir(exist_ok=True)
      path.rename(target)
      log(f'checkpoint {path.name} is damaged ({why}): moved to {target}')
    distributed.gather(0)

  def restore(abstract: Any) -> Found | None:
    finish()
    there = bool(steps(directory)) or quarantine.is_dir() and any(quarantine.iterdir())
    among = distributed.seen(f'checkpoints in {directory}', lambda: steps(directory))  # all have looked before one renames
    found = _newest(directory, abstract, among, False, reject)
    if found is None and there:
      raise UserError(f'{directory} had checkpoints, and none is valid; they are in {quarantine}.',
                      f'To start this run again from step 0: rm -r {quarantine}', NO_CHECKPOINT)
    if found is not None:
      saved.add(found[0])
    return found

  try:
    yield Checkpoints(save, restore, latest)
  except BaseException:
    try:  # the first error is the one to show; the save in flight is still waited for
      finish(True)
    except UserError as error:
      log(str(error))
    raise
  else:
    finish(True)
  finally:
    close()


def _flush(path: pathlib.Path) -> None:
  """Ask the disk to hold a committed checkpoint through a power loss; orbax does so for its array files only."""
  for name in (path.parent, path, *path.rglob('*')):
    with contextlib.suppress(OSError):  # some file systems refuse; the fingerprint would tell
      descriptor = os.open(name, os.O_RDONLY)
      os.fsync(descriptor)
      os.close(descriptor)

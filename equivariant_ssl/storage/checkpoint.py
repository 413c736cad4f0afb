"""Checkpoints that are checked: orbax writes them, a fingerprint says whether what is read is what was written.

Orbax's commit survives kill -9, but it does not notice a flipped bit in the weights and falls back to nothing. So
each checkpoint carries a fingerprint of every leaf, and reading takes the newest that proves right. A state is saved flat,
{key path: leaf}: the abstract tree gives the form. All processes call `save` and `restore`; process 0 alone renames.
"""
import contextlib
import errno
import gc
import importlib.metadata
import os
import pathlib
import shlex
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

from equivariant_ssl.errors import INPUT_OUTPUT, NO_CHECKPOINT, OTHER_CONFIG, USAGE, UserError, describe, passing
from equivariant_ssl.parallel import processes
from equivariant_ssl.storage import disk, fingerprint, orbax_log, run_identity
from equivariant_ssl.storage.run_identity import Identity

Found = tuple[int, Any, dict]  # step, state, meta
Read = tuple[dict[str, jax.Array], dict, str]  # leaves, meta, run
ORBAX = importlib.metadata.version('orbax-checkpoint')
DAMAGED, PASSES, FAILED = 1, 2, 3  # what came of a try to read one
SAID = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG)  # of a save that fails


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
  def look() -> list[int]:
    found = pathlib.Path(directory).iterdir() if pathlib.Path(directory).is_dir() else ()
    return sorted((int(p.name) for p in found if p.name.isdecimal() and p.is_dir()), reverse=True)
  return disk.again(look, directory)


def _line(error: BaseException) -> str:
  return f'{type(error).__name__}: {(str(error).splitlines() or [""])[0][:100]}'


def _attempt(path: pathlib.Path, wanted: dict[str, Any], part: bool, own: Identity) -> Read:
  """`_read`, once. _DamagedError where it cannot be believed; also what orbax makes of an error that may pass."""
  device, why, record = jax.sharding.SingleDeviceSharding(jax.local_devices()[0]), None, {}
  placed = {k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=getattr(v, 'sharding', None) or device)
            for k, v in wanted.items()}
  with orbax_log.unheard():
    try:
      record = fingerprint.unseal(ocp.metadata(path).custom_metadata)
      run_identity.check(own, record.get('run', ''), path)
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
      if isinstance(error, UserError | MemoryError) or 'RESOURCE_EXHAUSTED' in str(error) or passing(error):
        raise
      why = _line(error)
    if why:
      time.sleep(.05)  # the reads that were abandoned end here
      gc.collect()
  if why:
    run_identity.raise_if_newer(record.get('orbax', ''), ORBAX, path)
    raise _DamagedError(why)
  leaves |= {k: jnp.zeros(v.shape, v.dtype, device=v.sharding) for k, v in placed.items() if not v.size}
  prints, _ = fingerprint.survey(leaves)
  wrong = [k for k in leaves if prints[k] != record['leaves'][k]]
  if wrong:
    raise _DamagedError(f'{wrong[0]} is not what was saved; {len(wrong)} of {len(leaves)} leaves differ')
  if {record['step'], int(leaves.get('step', record['step']))} != {int(path.name)}:
    raise _DamagedError(f'it holds step {record["step"]}')
  return leaves, record['meta'], record.get('run', '')


def _read(path: pathlib.Path, wanted: dict[str, Any], part: bool, own: Identity) -> Read | _DamagedError:
  """The wanted leaves, the meta and the run of one checkpoint; or why it is damaged: all of it can be read, and is wrong
  twice. All processes together: what one of them cannot read all try again. UserError INPUT_OUTPUT or OSError where it
  cannot be read, UserError OTHER_CONFIG where it is of another config, run or version."""
  doubtful, pauses = False, list(disk.PAUSES)
  while True:
    found, failed = None, None
    try:
      found = _attempt(path, wanted, part, own)
    except Exception as error:
      failed = error
    if isinstance(failed, _DamagedError):
      try:
        disk.read_through(path)
      except OSError as error:
        failed = error
    kind = 0 if failed is None else DAMAGED if isinstance(failed, _DamagedError) else PASSES if passing(failed) else FAILED
    verdict, code = max(processes.gather([kind, describe(failed)[1] if failed else 0]))
    if verdict == PASSES and pauses:
      time.sleep(pauses.pop(0))
    elif verdict == PASSES:
      raise disk.unread(path, passing(failed) or 'in another process')
    elif verdict == FAILED:
      raise failed or UserError(f'{path} could not be read in another process.', 'Its message says why.', code)
    elif verdict == DAMAGED and not doubtful:
      doubtful = True
    else:
      return found if verdict == 0 else _DamagedError(str(failed or 'in another process'))


def _newest(directory: pathlib.Path, abstract: Any, among: list[int], part: bool, own: Identity,
            reject: Callable[[pathlib.Path, str], None]) -> tuple[Found, str] | None:
  """The first valid checkpoint of `among` and its run, `reject` called (in every process) with each damaged one before."""
  wanted = fingerprint.flat(abstract)
  for step in among:
    found = _read(directory / str(step), wanted, part, own)
    if not isinstance(found, _DamagedError):
      leaves, meta, run = found
      return (step, jax.tree.unflatten(jax.tree.structure(abstract), [leaves[k] for k in wanted]), meta), run
    reject(directory / str(step), str(found))
  return None


def load(directory: str | pathlib.Path, abstract: Any, step: int | None = None,
         log: Callable[[str], None] = print) -> Found:
  """(step, state, meta) of the newest valid checkpoint in `directory`, or of `step`; writes and moves nothing.

  abstract: a tree of jax.ShapeDtypeStruct with shardings (none: the first device), of all or some of the saved
  leaves. UserError NO_CHECKPOINT where there is none, OTHER_CONFIG where it does not fit.
  """
  directory = pathlib.Path(directory).absolute()
  there = processes.seen(f'checkpoints in {directory}', lambda: steps(directory))
  if not there or step is not None and step not in there:
    if there:
      raise UserError(f'{directory} has no checkpoint of step {step}.',
                      f'It has those of {", ".join(map(str, there))}.', NO_CHECKPOINT)
    raise UserError(f'{directory} has no checkpoint.',
                    f'Train first: eqssl train --config FILE --workdir {shlex.quote(str(directory.parent))}', NO_CHECKPOINT)
  found = _newest(directory, abstract, there if step is None else [step], True, run_identity.read(directory.parent),
                  lambda path, why: log(f'checkpoint {path.name} is damaged ({why}): left out'))
  if found is None:
    raise UserError(f'no checkpoint in {directory} is valid; tried {there if step is None else step}.',
                    'Restore a copy of it, or train again in a new --workdir.', NO_CHECKPOINT)
  return found[0]


def _manager(directory: pathlib.Path, keep: int) -> ocp.training.Checkpointer:
  context = ocp.Context()
  # A directory that cannot be made by the thread leaves the interpreter waiting for it for minutes at exit.
  context.asynchronous.create_directories_asynchronously = False
  return ocp.training.Checkpointer(
      directory, context=context, cleanup_tmp_directories=True,
      preservation_policy=ocp.training.preservation_policies.LatestN(keep))


def _not_written(directory: pathlib.Path, step: int, error: Exception, newest: int | None) -> UserError:
  named = next((os.strerror(n) for n in SAID if os.strerror(n) in str(error)), '')  # it stands last in a long line
  return UserError(f'checkpoint {step} was not written to {directory}: {passing(error) or named or _line(error)}.',
                   'Check the disk space and permissions there, then resume. '
                   f'The newest checkpoint is of step {newest}.', INPUT_OUTPUT if passing(error) else USAGE)


def _raise_if_full(directory: pathlib.Path, leaves: dict[str, Any]) -> None:
  need, free = 1.2 * sum(v.nbytes for v in leaves.values()), shutil.disk_usage(directory).free
  if free < need:  # the oldest goes only after the newest is there
    raise OSError(f'{free / 2 ** 20:.1f} MiB are free, {need / 2 ** 20:.1f} MiB are needed')


def _writer(directory: pathlib.Path, keep: int, saved: set[int], named: Callable[[], str], seen: Callable[[int], None]
            ) -> tuple[Callable, ...]:
  """`save` and `latest` of Checkpoints; `finish(durable=False)`, which waits for the save in flight; `close`.

  saved: the steps that need no saving. named, seen: of identity.keep. An error of a save is raised once, by `finish` or the
  next `save`.
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
    with contextlib.suppress(Exception):  # all it can raise is the error of a save that was raised already
      last and last.close()

  @contextlib.contextmanager
  def explained(step: int) -> Iterator[None]:
    nonlocal manager
    try:
      yield
    except Exception as error:
      saved.discard(step)
      if gone := processes.lost(error):
        manager = None  # to close it would wait for the lost process
        raise gone from error
      close()  # it would raise the same error again; a new one also clears away what was left behind
      raise _not_written(directory, step, error, latest()) from error

  def finish(durable: bool = False) -> None:
    nonlocal pending
    if pending is not None:
      (step, response), pending = pending, None
      with explained(step):
        response.result()
        if durable and jax.process_index() == 0:  # through a power loss; orbax does so for its array files only
          disk.flush_all(directory / str(step))
      seen(step)

  def save(step: int, state: Any, meta: dict, wait: bool = False) -> None:
    nonlocal manager, pending
    finish(wait)
    if step in saved:
      return
    leaves, prints = fingerprint.sound(step, state, latest())
    with explained(step):
      manager = manager or _manager(directory, keep)
      _raise_if_full(directory, leaves)
      pending = step, manager.save_async(step, {k: v for k, v in leaves.items() if v.size}, force=True,
                                         custom_metadata=fingerprint.seal(step, prints, meta, run=named(), orbax=ORBAX))
    saved.add(step)
    if wait:
      finish(True)

  return save, latest, finish, close


@contextlib.contextmanager
def open(directory: str | pathlib.Path, keep: int = 3, log: Callable[[str], None] = print) -> Iterator[Checkpoints]:
  """The checkpoints of a run in `directory`, for its one writer; leaving waits for the save in flight.

  The newest `keep` are kept. A damaged one found on restoring is moved to `directory`/../quarantine/<step>-<ns>, with
  a line to `log`. UserError: NOT_FINITE a state to save is not, OTHER_CONFIG a checkpoint is of another config, run or
  version (none is moved), NO_CHECKPOINT there were some but none is valid, INPUT_OUTPUT or OSError where files cannot be
  read, WATCHDOG another process is gone, 2 a save failed. The run's id is in `directory`/../run.json.
  """
  directory = pathlib.Path(directory).absolute()
  workdir, quarantine, saved = directory.parent, directory.parent / 'quarantine', set()
  own, known, seen = run_identity.keep(workdir)
  save, latest, finish, close = _writer(directory, keep, saved, known, seen)

  def reject(path: pathlib.Path, why: str) -> None:
    if jax.process_index() == 0:
      target = quarantine / f'{path.name}-{time.time_ns()}'
      quarantine.mkdir(exist_ok=True)
      path.rename(target)
      log(f'checkpoint {path.name} is damaged ({why}): moved to {target}')
    processes.gather(0)

  def restore(abstract: Any) -> Found | None:
    finish()
    there = bool(steps(directory)) or quarantine.is_dir() and any(quarantine.iterdir())
    among = processes.seen(f'checkpoints in {directory}', lambda: steps(directory))  # all have looked before one renames
    found = _newest(directory, abstract, among, False, own(), reject)
    if found is None and there:
      raise UserError(f'{directory} had checkpoints, and none is valid; they are in {quarantine}.',
                      f'Put a good copy of one back into {directory}, or start again in a new --workdir.', NO_CHECKPOINT)
    if found is None:
      run_identity.raise_if_gone(workdir, own())
      known()
      return None
    (step, *_), run = found
    saved.add(step)
    known((step, run))
    return found[0]

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

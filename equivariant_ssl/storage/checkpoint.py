"""Checkpoints whose content is checked.

Orbax writes the checkpoints, and its commit survives kill -9. But it does not notice a flipped bit
in the weights, and it does not fall back to an older checkpoint. Therefore each checkpoint carries
a fingerprint of every leaf, and reading takes the newest checkpoint whose fingerprints are right.

A state is saved flat, as {key path: leaf}; an abstract tree of shapes gives the form to read into.
All processes of a job call `save` and `restore`; process 0 alone renames.
"""
import contextlib
import gc
import pathlib
import shlex
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

from equivariant_ssl.errors import NO_CHECKPOINT, OTHER_CONFIG, UserError, describe, passing
from equivariant_ssl.parallel import processes
from equivariant_ssl.storage import disk, fingerprint, orbax_log, run_identity
from equivariant_ssl.storage.checkpoint_writer import ORBAX, Writer, first_line, saved_steps
from equivariant_ssl.storage.run_identity import RunIdentity

Restored = tuple[int, Any, dict]  # step, state, meta
Content = tuple[dict[str, jax.Array], dict, str]  # leaves, meta, id of the run
READ, DAMAGED, MAY_PASS, FAILED = range(4)  # the outcomes of one try to read a checkpoint


class Checkpoints(NamedTuple):
  """The checkpoints of a run, for the one process (or job) that writes them.

  save:    (step, state, meta, wait=False) saves in the background. A step that is saved already
           is not saved again.
  restore: abstract -> (step, state, meta) of the newest valid checkpoint; None for a new run.
  latest:  () -> the newest committed step, after the save in flight is over; or None.
  """
  save: Callable[..., None]
  restore: Callable[[Any], Restored | None]
  latest: Callable[[], int | None]


class _DamagedError(Exception):
  """A checkpoint is damaged. The message says why."""


def _load_leaves(path: pathlib.Path, shapes: dict[str, Any], part: bool, identity: RunIdentity,
                 record: dict) -> tuple[dict[str, Any], str]:
  """Load the record of a checkpoint into `record`, and return its leaves, and why they are damaged.

  Raises what the caller should not take for damage: a UserError, a lack of memory, and an error
  that may pass.
  """
  orbax_path: Any = path  # orbax takes pathlib's paths, but its annotations have only its own
  try:
    sealed: Any = ocp.metadata(orbax_path).custom_metadata
    record.update(fingerprint.unseal(sealed))
    run_identity.check(identity, record.get('run', ''), path)
    wrong = fingerprint.differences(record['leaves'], shapes, part)
    if wrong:
      raise UserError(f'{path} is of another config: {wrong}.',
                      'Use a new --workdir, or go on with that run as it was: '
                      f'eqssl resume {shlex.quote(str(path.parent.parent))}', OTHER_CONFIG)
    context = ocp.Context()
    context.pytree.loading.partial_load = True  # `differences` has checked which leaves may be left
    with context:
      # Orbax knows no array of size 0.
      leaves = ocp.load(orbax_path, {k: v for k, v in shapes.items() if v.size})
    jax.block_until_ready(leaves)
    missing = [k for k, v in leaves.items() if not isinstance(v, jax.Array)]
    return leaves, f'it has no {missing[0]}' if missing else ''
  except Exception as error:
    no_memory = isinstance(error, MemoryError) or 'RESOURCE_EXHAUSTED' in str(error)
    if isinstance(error, UserError) or no_memory or passing(error):
      raise
    return {}, first_line(error)


def _attempt(path: pathlib.Path, expected: dict[str, Any], part: bool, identity: RunIdentity
             ) -> Content:
  """Read a checkpoint once.

  Raises _DamagedError if its content is wrong, and what orbax makes of an error that may pass.
  """
  device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  shapes = {k: jax.ShapeDtypeStruct(v.shape, v.dtype,
                                    sharding=getattr(v, 'sharding', None) or device)
            for k, v in expected.items()}
  record: dict[str, Any] = {}
  with orbax_log.silenced():
    leaves, why = _load_leaves(path, shapes, part, identity, record)
    if why:
      time.sleep(.05)  # the reads that orbax abandoned end here
      gc.collect()
  if why:
    run_identity.raise_if_newer(record.get('orbax', ''), ORBAX, path)
    raise _DamagedError(why)
  leaves |= {k: jnp.zeros(v.shape, v.dtype, device=v.sharding)
             for k, v in shapes.items() if not v.size}
  prints, _ = fingerprint.digest_leaves(leaves)
  wrong = [k for k in leaves if prints[k] != record['leaves'][k]]
  if wrong:
    raise _DamagedError(f'{wrong[0]} is not what was saved; '
                        f'{len(wrong)} of {len(leaves)} leaves differ')
  if {record['step'], int(leaves.get('step', record['step']))} != {int(path.name)}:
    raise _DamagedError(f'it holds step {record["step"]}')
  return leaves, record['meta'], record.get('run', '')


def _outcome(error: Exception | None) -> int:
  """Return which of the outcomes of a try an error means."""
  if error is None:
    return READ
  if isinstance(error, _DamagedError):
    return DAMAGED
  return MAY_PASS if passing(error) else FAILED


def _read(path: pathlib.Path, expected: dict[str, Any], part: bool, identity: RunIdentity
          ) -> Content | _DamagedError:
  """Return the content of one checkpoint, or why it is damaged.

  A checkpoint counts as damaged if all of it can be read, and it is wrong twice. All processes of
  a job read together: what one of them cannot read, all try again.

  Raises UserError INPUT_OUTPUT or OSError if the checkpoint cannot be read, and UserError
  OTHER_CONFIG if it is of another config, run or version.
  """
  was_damaged, pauses = False, list(disk.PAUSES)
  while True:
    content, failure = None, None
    try:
      content = _attempt(path, expected, part, identity)
    except Exception as error:
      failure = error
    if isinstance(failure, _DamagedError):
      try:
        disk.read_through(path)
      except OSError as error:
        failure = error
    code = describe(failure)[1] if failure else 0
    outcome, code = max(processes.gather([_outcome(failure), code]))
    if outcome == MAY_PASS and pauses:
      time.sleep(pauses.pop(0))
    elif outcome == MAY_PASS:
      raise disk.unreadable(path, passing(failure) or 'in another process')
    elif outcome == FAILED:
      raise failure or UserError(f'{path} could not be read in another process.',
                                 'Its message says why.', code)
    elif outcome == DAMAGED and not was_damaged:
      was_damaged = True
    elif outcome == DAMAGED:
      return _DamagedError(str(failure or 'in another process'))
    else:
      assert content is not None  # no process failed
      return content


def _newest(directory: pathlib.Path, abstract: Any, candidates: list[int], part: bool,
            identity: RunIdentity, reject: Callable[[pathlib.Path, str], None]
            ) -> tuple[Restored, str] | None:
  """Return the first valid checkpoint among the steps `candidates`, and the id of its run.

  reject: a function (path, why) that every process calls for each damaged checkpoint before it.
  """
  expected = fingerprint.flatten(abstract)
  for step in candidates:
    content = _read(directory / str(step), expected, part, identity)
    if not isinstance(content, _DamagedError):
      leaves, meta, run_id = content
      state = jax.tree.unflatten(jax.tree.structure(abstract), [leaves[k] for k in expected])
      return (step, state, meta), run_id
    reject(directory / str(step), str(content))
  return None


def load_checkpoint(directory: str | pathlib.Path, abstract: Any, step: int | None = None,
                    log: Callable[[str], None] = print) -> Restored:
  """Return (step, state, meta) of the newest valid checkpoint in `directory`, or of `step`.

  abstract: a tree of jax.ShapeDtypeStruct, of all or of some saved leaves. A leaf without a
            sharding is read to the first device.

  Nothing is written or moved. Raises UserError NO_CHECKPOINT if there is no valid checkpoint, and
  OTHER_CONFIG if the checkpoint does not fit `abstract`.
  """
  directory = pathlib.Path(directory).absolute()
  saved = processes.wait_until_same(f'checkpoints in {directory}', lambda: saved_steps(directory))
  if not saved:
    raise UserError(f'{directory} has no checkpoint.', 'Train first: eqssl train --config FILE '
                    f'--workdir {shlex.quote(str(directory.parent))}', NO_CHECKPOINT)
  if step is not None and step not in saved:
    raise UserError(f'{directory} has no checkpoint of step {step}.',
                    f'It has those of {", ".join(map(str, saved))}.', NO_CHECKPOINT)

  def reject(path: pathlib.Path, why: str) -> None:
    log(f'checkpoint {path.name} is damaged ({why}): left out')
  candidates = saved if step is None else [step]
  newest = _newest(directory, abstract, candidates, True, run_identity.read(directory.parent),
                   reject)
  if newest is None:
    raise UserError(f'no checkpoint in {directory} is valid; '
                    f'tried {saved if step is None else step}.',
                    'Restore a copy of it, or train again in a new --workdir.', NO_CHECKPOINT)
  return newest[0]


@contextlib.contextmanager
def open_checkpoints(directory: str | pathlib.Path, keep: int = 3,
                     log: Callable[[str], None] = print) -> Iterator[Checkpoints]:
  """Open the checkpoints of a run in `directory`, for the one job that writes them.

  keep: the number of checkpoints that are kept; the oldest are deleted.

  When the context ends, the save in flight is waited for. A checkpoint that is found damaged on
  restoring is moved to `directory`/../quarantine/<step>-<ns>, and a line goes to `log`. The run's
  id stands in `directory`/../run.json.

  Raises UserError with one of these codes: NOT_FINITE a state to save is not finite, OTHER_CONFIG
  a checkpoint is of another config, run or version (none is moved), NO_CHECKPOINT there were some
  and none is valid, INPUT_OUTPUT files cannot be read (or OSError), WATCHDOG another process is
  gone, 2 a save failed.
  """
  directory = pathlib.Path(directory).absolute()
  workdir, quarantine = directory.parent, directory.parent / 'quarantine'
  saved: set[int] = set()
  keeper = run_identity.keep(workdir)
  writer = Writer(directory, keep, saved, keeper)

  def reject(path: pathlib.Path, why: str) -> None:
    if jax.process_index() == 0:
      target = quarantine / f'{path.name}-{time.time_ns()}'
      quarantine.mkdir(exist_ok=True)
      path.rename(target)
      log(f'checkpoint {path.name} is damaged ({why}): moved to {target}')
    processes.gather(0)

  def restore(abstract: Any) -> Restored | None:
    writer.finish()
    had_some = bool(saved_steps(directory)) or quarantine.is_dir() and any(quarantine.iterdir())
    # All processes have looked before one of them renames.
    steps = processes.wait_until_same(f'checkpoints in {directory}', lambda: saved_steps(directory))
    newest = _newest(directory, abstract, steps, False, keeper.identity(), reject)
    if newest is None and had_some:
      raise UserError(f'{directory} had checkpoints, and none is valid; they are in {quarantine}.',
                      f'Put a good copy of one back into {directory}, or start again in a new '
                      '--workdir.', NO_CHECKPOINT)
    if newest is None:
      run_identity.raise_if_gone(workdir, keeper.identity())
      keeper.name_run()
      return None
    (step, *_), run_id = newest
    saved.add(step)
    keeper.name_run((step, run_id))
    return newest[0]

  try:
    yield Checkpoints(writer.save, restore, writer.latest)
  except BaseException:
    try:  # the first error is the one to show; the save in flight is waited for all the same
      writer.finish(True)
    except UserError as error:
      log(str(error))
    raise
  else:
    writer.finish(True)
  finally:
    writer.close()

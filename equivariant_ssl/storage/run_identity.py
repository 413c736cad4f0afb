"""The identity of a run: a random id that is written into its folder and into each checkpoint.

The id stands in run.json, and each checkpoint of the run has it sealed in its record.
"""
import json
import pathlib
import re
import secrets
from collections.abc import Callable
from typing import NamedTuple

from equivariant_ssl.errors import INPUT_OUTPUT, NO_CHECKPOINT, OTHER_CONFIG, UserError
from equivariant_ssl.parallel import processes
from equivariant_ssl.storage import record

FILE = 'run.json'


class RunIdentity(NamedTuple):
  """What run.json holds.

  id:      the id of the run; '' before the run has one.
  saved:   a step whose checkpoint existed once; -1 before the first checkpoint.
  unnamed: up to this step, checkpoints without an id belong to this run. Earlier versions wrote
           such checkpoints.
  """
  id: str = ''
  saved: int = -1
  unnamed: int = -1


class Keeper(NamedTuple):
  """The identity of a run for those who write into its folder.

  identity:   () -> what is known of the run.
  name_run:   (newest=None) -> the id of the run. A run without an id gets one, see `with_id`.
  note_saved: (step) notes that a checkpoint of this step exists.
  """
  identity: Callable[[], RunIdentity]
  name_run: Callable[..., str]
  note_saved: Callable[[int], None]


def read(workdir: pathlib.Path) -> RunIdentity:
  """Read the identity of the run in a folder. A missing or damaged file gives an empty identity.

  Raises UserError INPUT_OUTPUT if the file cannot be read.
  """
  try:
    values = record.read_json_object(workdir / FILE, '')
    return RunIdentity(**{k: type(v)(values[k]) for k, v in RunIdentity()._asdict().items()
                       if k in values})
  except (FileNotFoundError, ValueError, TypeError):
    return RunIdentity()
  except UserError as error:
    if error.code == INPUT_OUTPUT:  # this says nothing about the content of the file
      raise
    return RunIdentity()


def write(workdir: pathlib.Path, identity: RunIdentity) -> None:
  """Write the identity of a run into its folder."""
  record.write_atomically(workdir / FILE, json.dumps(identity._asdict()) + '\n')


def with_id(identity: RunIdentity, newest: tuple[int, str] | None) -> RunIdentity:
  """Return `identity` with an id.

  newest: (step, id) of the newest checkpoint, or None. An identity without an id takes this id; if
          there is none either, it takes a new one.
  """
  step, checkpoint_id = newest or (-1, '')
  saved = identity.saved if identity.saved >= 0 else step
  if identity.id:
    return identity._replace(saved=saved)
  return RunIdentity(checkpoint_id or secrets.token_hex(8), saved, -1 if checkpoint_id else step)


def keep(workdir: pathlib.Path) -> Keeper:
  """Return the keeper of the identity of the run in `workdir`.

  All processes of a job call its functions together; process 0 writes the file.
  """
  identity = RunIdentity(*processes.gather(read(workdir))[0])

  def update(new: RunIdentity) -> str:
    nonlocal identity
    before, identity = identity, new
    if new != before and processes.is_main():
      if not before.id:  # otherwise a folder that was removed meanwhile would come back empty
        workdir.mkdir(parents=True, exist_ok=True)
      write(workdir, new)
    return new.id

  def name_run(newest: tuple[int, str] | None = None) -> str:
    named = with_id(identity, newest)
    # A new id is random: all processes take that of process 0.
    return update(named if identity.id else RunIdentity(*processes.gather(named)[0]))

  def note_saved(step: int) -> None:
    if identity.saved < 0:
      update(identity._replace(saved=step))
  return Keeper(lambda: identity, name_run, note_saved)


def check(identity: RunIdentity, checkpoint_id: str, path: pathlib.Path) -> None:
  """Raise UserError OTHER_CONFIG if the checkpoint at `path` belongs to another run.

  checkpoint_id: the id of a run that the checkpoint holds; '' if it holds none.
  """
  unnamed = not checkpoint_id and int(path.name) <= identity.unnamed
  if identity.id and checkpoint_id != identity.id and not unnamed:
    raise UserError(f'{path} is not of this run: it is of {checkpoint_id or "one without an id"}, '
                    f'and {FILE} here says {identity.id}.',
                    f'Move it back to where it came from, out of {path.parent}; '
                    'nothing was changed.', OTHER_CONFIG)


def raise_if_gone(workdir: pathlib.Path, identity: RunIdentity) -> None:
  """Raise UserError NO_CHECKPOINT if the run in `workdir` has lost its checkpoints.

  Starting the run again would drop its log.
  """
  if identity.saved >= 0:
    cause = f'{workdir} had checkpoints, one of step {identity.saved}, and has none any more.'
  elif not identity.id and (rows := record.read_metrics(workdir)):
    cause = f'{workdir} has metrics up to step {rows[-1]["step"]}, and no checkpoint.'
  else:
    return
  raise UserError(cause, 'Put its checkpoints/ back from a copy, or start again in a new '
                  '--workdir.', NO_CHECKPOINT)


def _version(text: str) -> list[int]:
  """Return the first three numbers of a version."""
  return [int(n) for n in re.findall(r'\d+', text)[:3]]


def raise_if_newer(writer: str, installed: str, path: pathlib.Path) -> None:
  """Raise UserError OTHER_CONFIG if a newer orbax than the installed one wrote a checkpoint.

  writer, installed: versions of orbax-checkpoint. path: a checkpoint that could not be read.
  """
  if _version(writer) > _version(installed):
    raise UserError(f'{path} was written by orbax-checkpoint {writer}. The version that is '
                    f'installed, {installed}, does not read it.',
                    f'pip install "orbax-checkpoint>={writer}"; nothing was moved.', OTHER_CONFIG)

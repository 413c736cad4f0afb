"""Whose a checkpoint is: a random id, written once into a run's folder and sealed in each of its checkpoints."""
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


class Identity(NamedTuple):
  """id: '' where the folder has none yet. saved: a step whose checkpoint was there once, -1 before the first. unnamed:
  checkpoints without an id, which earlier versions wrote, are this run's up to this step."""
  id: str = ''
  saved: int = -1
  unnamed: int = -1


def read(workdir: pathlib.Path) -> Identity:
  """What the folder of a run says of it; of a missing or damaged file, nothing."""
  try:
    found = record.read_object(workdir / FILE, '')
    return Identity(**{k: type(v)(found[k]) for k, v in Identity()._asdict().items() if k in found})
  except (FileNotFoundError, ValueError, TypeError):
    return Identity()
  except UserError as error:
    if error.code == INPUT_OUTPUT:  # which says nothing about what is in it
      raise
    return Identity()


def write(workdir: pathlib.Path, own: Identity) -> None:
  record.write_whole(workdir / FILE, json.dumps(own._asdict()) + '\n')


def named(own: Identity, found: tuple[int, str] | None) -> Identity:
  """`own`, with an id where it has none: that of the newest checkpoint `found` (step, id), else a new one."""
  step, theirs = found or (-1, '')
  saved = own.saved if own.saved >= 0 else step
  if own.id:
    return own._replace(saved=saved)
  return Identity(theirs or secrets.token_hex(8), saved, -1 if theirs else step)


def keep(workdir: pathlib.Path) -> tuple[Callable[[], Identity], Callable[..., str], Callable[[int], None]]:
  """For the writers of a run, all processes together: `own()`, what is known; `known(found=None)`, the run's id, made where
  there is none (see `named`); `seen(step)`, which notes that a checkpoint was there."""
  own = Identity(*processes.gather(read(workdir))[0])

  def note(new: Identity) -> str:
    nonlocal own
    before, own = own, new
    if new != before and processes.main():
      if not before.id:  # else a folder that was removed meanwhile would come back empty
        workdir.mkdir(parents=True, exist_ok=True)
      write(workdir, new)
    return new.id

  def known(found: tuple[int, str] | None = None) -> str:
    return note(named(own, found) if own.id else Identity(*processes.gather(named(own, found))[0]))  # process 0's

  def seen(step: int) -> None:
    if own.saved < 0:
      note(own._replace(saved=step))
  return lambda: own, known, seen


def check(own: Identity, theirs: str, path: pathlib.Path) -> None:
  """UserError OTHER_CONFIG where the checkpoint at `path`, which says that it is of run `theirs`, is not of run `own`."""
  if own.id and theirs != own.id and not (not theirs and int(path.name) <= own.unnamed):
    raise UserError(f'{path} is not of this run: it is of {theirs or "one without an id"}, and {FILE} here says {own.id}.',
                    f'Move it back to where it came from, out of {path.parent}; nothing was changed.', OTHER_CONFIG)


def raise_if_gone(workdir: pathlib.Path, own: Identity) -> None:
  """UserError NO_CHECKPOINT where a run in `workdir` has no checkpoint, and had one: to start again would drop its log."""
  if own.saved >= 0:
    cause = f'{workdir} had checkpoints, one of step {own.saved}, and has none any more.'
  elif not own.id and (rows := record.read_metrics(workdir)):
    cause = f'{workdir} has metrics up to step {rows[-1]["step"]}, and no checkpoint.'
  else:
    return
  raise UserError(cause, 'Put its checkpoints/ back from a copy, or start again in a new --workdir.', NO_CHECKPOINT)


def raise_if_newer(wrote: str, here: str, path: pathlib.Path) -> None:
  """UserError OTHER_CONFIG where a newer orbax than the one here wrote a checkpoint, which cannot be read."""
  parts = lambda version: [int(n) for n in re.findall(r'\d+', version)[:3]]
  if parts(wrote) > parts(here):
    raise UserError(f'{path} was written by orbax-checkpoint {wrote}, and {here}, which is here, does not read it.',
                    f'pip install "orbax-checkpoint>={wrote}"; nothing was moved.', OTHER_CONFIG)

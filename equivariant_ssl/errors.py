"""A mistake of the user: one line with the cause, one with the fix, an exit code; never a traceback."""
import errno
import os
import re

OK, USAGE, IN_USE, NO_CHECKPOINT, OTHER_CONFIG, NOT_FINITE, BAD_DATA, WATCHDOG, PREEMPTED = 0, 2, 3, 4, 5, 6, 7, 8, 75
OTHER_DATA = 9  # the data are not those that the run knows
INPUT_OUTPUT = 10  # a disk or its mount failed; that says nothing about what is on it

# What a disk, a network file system or a full machine says that may be well the next moment.
PASSING = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EREMOTEIO, errno.ENOTCONN, errno.EHOSTDOWN, errno.EMFILE,
           errno.ENFILE, errno.ENOMEM)
_NAMED = re.compile('|'.join(re.escape(os.strerror(n)) for n in PASSING), re.IGNORECASE)  # in an error of a library


class UserError(Exception):
  """`cause` in one line, `fix` in one line (what to type), and the exit `code` of the command."""

  def __init__(self, cause: str, fix: str = '', code: int = USAGE):
    super().__init__(f'{cause}\n  {fix}' if fix else cause)
    self.code = code


def passing(error: BaseException | None) -> str:
  """'Input/output error' and the like where `error`, or what it came from, is one that may pass; else ''."""
  met = []
  while error is not None and error not in met:
    met.append(error)
    if isinstance(error, OSError) and error.errno in PASSING:
      return os.strerror(error.errno)
    if not isinstance(error, UserError | OSError) and (found := _NAMED.search(str(error))):
      return found[0]
    error = error.__cause__ or error.__context__
  return ''


def told(e: Exception) -> tuple[str, int]:
  """(what to print, the exit code) for what ended a command."""
  if isinstance(e, UserError):
    return str(e), e.code
  if isinstance(e, OSError):
    return (f'{e.strerror or e}{f": {e.filename}" if e.filename else ""}.\n  '
            'Check that the folder exists, may be written, and has room; the traceback: add --debug.',
            INPUT_OUTPUT if e.errno in PASSING else USAGE)
  if isinstance(e, RuntimeError) and 'home directory' in str(e):  # pathlib's, of expanduser
    return 'there is no home folder for a path with ~: HOME is not set.\n  Give the whole path, or set HOME.', USAGE
  return (f'{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ""}\n  '
          'This is not a mistake that eqssl knows; the traceback: add --debug.', 1)

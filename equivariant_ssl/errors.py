"""Mistakes of the user: one line with the cause, one line with the fix, and an exit code."""
import errno
import os
import re

OK, USAGE, IN_USE, NO_CHECKPOINT, OTHER_CONFIG = 0, 2, 3, 4, 5
NOT_FINITE, BAD_DATA, WATCHDOG, PREEMPTED = 6, 7, 8, 75
OTHER_DATA = 9  # the data are not those that the run began with
INPUT_OUTPUT = 10  # a disk or its mount failed; that says nothing about what is on it

# A disk, a network file system or a full machine may report these, and be well the next moment.
PASSING = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EREMOTEIO, errno.ENOTCONN,
           errno.EHOSTDOWN, errno.EMFILE, errno.ENFILE, errno.ENOMEM)
# The same errors in the text of a library's error.
_NAMED = re.compile('|'.join(re.escape(os.strerror(n)) for n in PASSING), re.IGNORECASE)


class UserError(Exception):
  """A mistake that a command reports without a traceback.

  cause: what is wrong, in one line.
  fix:   what to type or change, in one line.
  code:  the exit code of the command.

  >>> try:
  ...   es.load('no/such/run')
  ... except es.UserError as error:
  ...   print(error.code, len(str(error).splitlines()))
  2 2
  """

  def __init__(self, cause: str, fix: str = '', code: int = USAGE):
    super().__init__(f'{cause}\n  {fix}' if fix else cause)
    self.code = code


def passing(error: BaseException | None) -> str:
  """The text of an error that may pass, such as 'Input/output error'; '' for every other error.

  The errors that `error` was raised from are searched too.
  """
  chain = []
  while error is not None and error not in chain:
    chain.append(error)
    if isinstance(error, OSError) and error.errno in PASSING:
      return os.strerror(error.errno)
    if not isinstance(error, UserError | OSError) and (match := _NAMED.search(str(error))):
      return match[0]
    error = error.__cause__ or error.__context__
  return ''


def describe(error: Exception) -> tuple[str, int]:
  """The text to print and the exit code, for an error that ended a command."""
  if isinstance(error, UserError):
    return str(error), error.code
  if isinstance(error, OSError):
    file = f': {error.filename}' if error.filename else ''
    return (f'{error.strerror or error}{file}.\n  Check that the folder exists, that you may write '
            'to it, and that the disk has room. Add --debug to see the traceback.',
            INPUT_OUTPUT if error.errno in PASSING else USAGE)
  if isinstance(error, RuntimeError) and 'home directory' in str(error):  # from Path.expanduser
    return ('A path begins with ~, but HOME is not set, so the home folder is unknown.\n  '
            'Give the whole path, or set HOME.', USAGE)
  first = str(error).splitlines()[0] if str(error) else ''
  return (f'{type(error).__name__}: {first}\n  '
          'eqssl does not know this error. Add --debug to see the traceback.', 1)

"""Mistakes of the user: one line with the cause, one line with the fix, and an exit code."""

OK, USAGE, IN_USE, NO_CHECKPOINT, OTHER_CONFIG = 0, 2, 3, 4, 5
NOT_FINITE, BAD_DATA, WATCHDOG, PREEMPTED = 6, 7, 8, 75
OTHER_DATA = 9  # the data are not those that the run began with


class UserError(Exception):
  """A mistake that a command reports without a traceback.

  cause: what is wrong, in one line.
  fix:   what to type or change, in one line.
  code:  the exit code of the command.
  """

  def __init__(self, cause: str, fix: str = '', code: int = USAGE):
    super().__init__(f'{cause}\n  {fix}' if fix else cause)
    self.code = code


def describe(error: Exception) -> tuple[str, int]:
  """The text to print and the exit code, for an error that ended a command."""
  if isinstance(error, UserError):
    return str(error), error.code
  if isinstance(error, OSError):
    file = f': {error.filename}' if error.filename else ''
    return (f'{error.strerror or error}{file}.\n  Check that the folder exists, that you may write '
            'to it, and that the disk has room. Add --debug to see the traceback.', USAGE)
  if isinstance(error, RuntimeError) and 'home directory' in str(error):  # from Path.expanduser
    return ('A path begins with ~, but HOME is not set, so the home folder is unknown.\n  '
            'Give the whole path, or set HOME.', USAGE)
  first = str(error).splitlines()[0] if str(error) else ''
  return (f'{type(error).__name__}: {first}\n  '
          'eqssl does not know this error. Add --debug to see the traceback.', 1)

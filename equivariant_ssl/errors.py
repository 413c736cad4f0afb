"""A mistake of the user: one line with the cause, one with the fix, an exit code; never a traceback."""

OK, USAGE, IN_USE, NO_CHECKPOINT, OTHER_CONFIG, NOT_FINITE, BAD_DATA, WATCHDOG, PREEMPTED = 0, 2, 3, 4, 5, 6, 7, 8, 75
OTHER_DATA = 9  # the data are not those that the run knows


class UserError(Exception):
  """`cause` in one line, `fix` in one line (what to type), and the exit `code` of the command."""

  def __init__(self, cause: str, fix: str = '', code: int = USAGE):
    super().__init__(f'{cause}\n  {fix}' if fix else cause)
    self.code = code


def told(e: Exception) -> tuple[str, int]:
  """(what to print, the exit code) for what ended a command."""
  if isinstance(e, UserError):
    return str(e), e.code
  if isinstance(e, OSError):
    return (f'{e.strerror or e}{f": {e.filename}" if e.filename else ""}.\n  '
            'Check that the folder exists, may be written, and has room; the traceback: add --debug.', USAGE)
  return (f'{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ""}\n  '
          'This is not a mistake that eqssl knows; the traceback: add --debug.', 1)

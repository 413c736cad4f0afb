"""What orbax says of its own failures, each of which is raised and told as one line."""
import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator

# It prints each failure of its threads as a page of traceback.
logging.getLogger('absl').addFilter(lambda record: f'{os.sep}orbax{os.sep}' not in record.pathname)


@contextlib.contextmanager
def unheard() -> Iterator[None]:
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

"""Silence for what orbax prints of its own failures. Each failure is raised and reported once."""
import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator


def _not_from_orbax(record: logging.LogRecord) -> bool:
  return f'{os.sep}orbax{os.sep}' not in record.pathname


# Orbax prints each failure of its threads as a page of traceback.
logging.getLogger('absl').addFilter(_not_from_orbax)


def _nothing(record: logging.LogRecord) -> bool:
  return False


@contextlib.contextmanager
def silenced() -> Iterator[None]:
  """Hide what abandoned reads of orbax print.

  When one of its reads fails, orbax abandons the others. The errors that these raise afterwards
  reach nobody, and they are not for the user.
  """
  hook, tasks = sys.unraisablehook, logging.getLogger('asyncio')
  sys.unraisablehook = lambda unraisable: None
  tasks.addFilter(_nothing)  # 'Task exception was never retrieved'
  try:
    with warnings.catch_warnings():
      warnings.simplefilter('ignore', RuntimeWarning)  # 'coroutine ... was never awaited'
      yield
  finally:
    tasks.removeFilter(_nothing)
    sys.unraisablehook = hook

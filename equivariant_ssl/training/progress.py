"""The progress line of a run. Only the main process of a job shows it."""
import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from equivariant_ssl.training.stop import say


def _clock(seconds: float) -> str:
  """Format a duration as h:mm:ss."""
  minutes, seconds = divmod(int(seconds), 60)
  return f'{minutes // 60}:{minutes % 60:02d}:{seconds:02d}'


@contextlib.contextmanager
def progress(total: int, start: int = 0, describe: str = '', quiet: bool = False
             ) -> Iterator[Callable[..., None]]:
  """Give a function `update(step, terms, images_per_s, data_wait)` that shows progress on stderr.

  terms:     {name: loss}.
  data_wait: the share of the time in which the devices waited for data. Both are None where there
             was only the first step.

  A terminal has one line that is rewritten; anything else gets a line every 5 s. The first and the
  last step are always shown. The numbers are fetched from the device only when they are shown.
  """
  from rich.console import Console
  from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
  from rich.table import Column

  console = Console(stderr=True)
  live = console.is_terminal and not console.is_dumb_terminal and not quiet
  began, last_shown = time.monotonic(), None
  # A long note is cut and never wrapped: a wrapped live line flickers.
  line = Column(ratio=1, no_wrap=True, overflow='ellipsis')
  bar = Progress(TextColumn('{task.description}', markup=False), BarColumn(20),
                 MofNCompleteColumn(),
                 TextColumn('{task.fields[note]}', markup=False, table_column=line),
                 console=console, refresh_per_second=4, expand=True, disable=not live)
  task = bar.add_task(describe, total=total, completed=start, note='compiling')

  def update(step: int, terms: dict[str, Any], images_per_s: float | None,
             data_wait: float | None) -> None:
    nonlocal last_shown
    now = time.monotonic()
    pause = .2 if live else 5.
    if quiet or last_shown is not None and step < total and now - last_shown < pause:
      return
    last_shown = now
    left = _clock((now - began) / max(step - start, 1) * (total - step))
    speed = [] if images_per_s is None or data_wait is None else [
        f'{images_per_s:.0f} images/s', f'{100 * data_wait:.0f} % data wait']
    note = '  '.join([f'{left} left', *speed,
                      *(f'{k} {float(v):.4g}' for k, v in terms.items())])
    if live:
      with contextlib.suppress(OSError):
        bar.update(task, completed=step, note=note)
    else:
      say(f'{describe}  {step}/{total}  {note}'.strip())

  with contextlib.suppress(OSError):  # the run goes on when its terminal is closed
    bar.start()
  try:
    yield update
  finally:
    with contextlib.suppress(OSError):
      bar.stop()

"""What a run says of its steps while it runs. Only the main process of a job calls this."""
import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from equivariant_ssl.training.stop import say


def _clock(seconds: float) -> str:
  minutes, seconds = divmod(int(seconds), 60)
  return f'{minutes // 60}:{minutes % 60:02d}:{seconds:02d}'


@contextlib.contextmanager
def progress(total: int, start: int = 0, describe: str = '', quiet: bool = False) -> Iterator[Callable[..., None]]:
  """`update(step, terms, images_per_s, data_wait)` on stderr: one live line on a terminal, else a line each 5 s.

  terms: {name: loss}. data_wait: share of the time spent waiting for data. The first and the last step are always
  said; numbers are fetched only when shown.
  """
  from rich.console import Console
  from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
  from rich.table import Column

  console = Console(stderr=True)
  live = console.is_terminal and not console.is_dumb_terminal and not quiet
  began, shown = time.monotonic(), None  # when the last line was shown
  line = Column(ratio=1, no_wrap=True, overflow='ellipsis')  # cut, never wrapped: a wrapped live line flickers
  bar = Progress(TextColumn('{task.description}', markup=False), BarColumn(20), MofNCompleteColumn(),
                 TextColumn('{task.fields[note]}', markup=False, table_column=line),
                 console=console, refresh_per_second=4, expand=True, disable=not live)
  task = bar.add_task(describe, total=total, completed=start, note='compiling')

  def update(step: int, terms: dict[str, Any], images_per_s: float, data_wait: float) -> None:
    nonlocal shown
    now = time.monotonic()
    if quiet or shown is not None and step < total and now - shown < (.2 if live else 5.):
      return
    shown = now
    left = _clock((now - began) / max(step - start, 1) * (total - step))
    note = '  '.join([f'{left} left', f'{images_per_s:.0f} images/s', f'{100 * data_wait:.0f} % data wait',
                      *(f'{k} {float(v):.4g}' for k, v in terms.items())])
    if live:
      with contextlib.suppress(OSError):
        bar.update(task, completed=step, note=note)
    else:
      say(f'{describe}  {step}/{total}  {note}'.strip())

  with contextlib.suppress(OSError):  # a terminal may be closed under a run, which then goes on without it
    bar.start()
  try:
    yield update
  finally:
    with contextlib.suppress(OSError):
      bar.stop()

"""Asked to stop: what a scheduler, a user or a closing terminal sends, heard from the first line of a command to its last.

A handler only notes what came. The loop asks after each step; what is slow before it calls `check` between its parts; and
where the main thread is in a long call of C (a compilation), a thread ends the process instead, as nothing would be lost.
"""
import contextlib
import errno
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from equivariant_ssl.errors import PREEMPTED, UserError

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGINT)
GRACE = 5.  # seconds until a process that has nothing to save is ended by the thread
EARLY = 'stopped before there was anything to save; nothing is lost.', 'The same command goes on.'
SHOW_CURSOR = b'\r\x1b[?25h'


class _Heard:
  """came: the signals so far. idle: whether ending at once would lose nothing. early: what to say then. shared: whether
  jax, which asks all processes of a job, is told instead."""

  def __init__(self, early: tuple[str, str]):
    self.came, self.idle, self.early, self.shared = [], True, early, False

  def __call__(self) -> bool:
    return bool(self.came) and not self.shared


_now: list[_Heard] = []  # of the `heard` that is open, or nothing


def listened() -> list[int]:
  """The signals of SIGNALS that this process does not ignore; nohup, and & in a script, ask for that."""
  return [s for s in SIGNALS if signal.getsignal(s) is not signal.SIG_IGN]


def _end(mine: _Heard, over: threading.Event) -> None:
  if not over.wait(GRACE) and mine() and mine.idle:
    with contextlib.suppress(OSError):
      os.write(2, (SHOW_CURSOR if os.isatty(2) else b'') + f'eqssl: {UserError(*mine.early)}\n'.encode())
    os._exit(PREEMPTED)


def _watch(mine: _Heard, pipe: int) -> None:
  """Note the signals whose numbers come through `pipe`, and end the process GRACE after one, where it is idle then."""
  over = threading.Event()
  while numbers := os.read(pipe, 64):
    for number in numbers:
      if number in SIGNALS:  # the handler itself waits for the main thread to come back from C
        mine.came.append(number)
        threading.Thread(target=_end, args=(mine, over), daemon=True).start()
  over.set()
  os.close(pipe)


@contextlib.contextmanager
def _closed() -> Iterator[None]:
  """Who prints to a terminal that is gone fails with EIO; where HUP came of it, that is a stop."""
  try:
    yield
  except OSError as error:
    if error.errno == errno.EIO:
      check()
    raise


@contextlib.contextmanager
def heard(early: tuple[str, str] = EARLY) -> Iterator[Callable[[], bool]]:
  """`asked()`: whether one of SIGNALS has come; a second SIGINT (Ctrl-C) raises KeyboardInterrupt.

  early: the cause and the fix of a stop before there is anything to save. Within another `heard` it is that one's `asked`.
  The handlers there were before come back on leaving. Outside the main thread nothing is ever asked.
  """
  if _now or threading.current_thread() is not threading.main_thread():
    with _closed():
      yield _now[0] if _now else lambda: False
    return
  mine, handled = _Heard(early), []

  def handle(number: int, frame: Any) -> None:
    if number == signal.SIGINT and number in handled:
      raise KeyboardInterrupt
    handled.append(number)
    mine.came.append(number)

  reader, writer = os.pipe()
  os.set_blocking(writer, False)
  before = {s: signal.signal(s, handle) for s in listened()}
  waker = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
  threading.Thread(target=_watch, args=(mine, reader), daemon=True, name='eqssl signals').start()
  _now.append(mine)
  try:
    with _closed():
      yield mine
  finally:
    _now.clear()
    signal.set_wakeup_fd(waker)
    os.close(writer)
    for number, handler in before.items():
      signal.signal(number, signal.SIG_DFL if handler is None else handler)


def check() -> None:
  """UserError PREEMPTED where this process was asked to stop; to be called where it has nothing to save."""
  for mine in _now:
    if mine():
      raise UserError(*mine.early, PREEMPTED)


@contextlib.contextmanager
def saving() -> Iterator[Callable[[], None]]:
  """`begin()`: from now on there may be something to save, and only who asks `heard` ends the process; until leaving."""
  def begin() -> None:
    for mine in _now:
      mine.idle = False
  try:
    yield begin
  finally:
    for mine in _now:
      mine.idle = True


def share() -> None:
  """Of several processes: hand each signal to jax as SIGTERM, the one that it tells the others of; what came before, too."""
  for number in listened():
    if number != signal.SIGTERM:  # which is jax's own since it was initialised
      signal.signal(number, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
  for mine in _now:
    mine.shared = True
    if mine.came:
      os.kill(os.getpid(), signal.SIGTERM)


def deafen() -> None:
  """What has done its work is not told to stop while it ends."""
  for mine in _now:
    mine.idle = False
  for number in listened():
    signal.signal(number, signal.SIG_IGN)


def say(line: str, stream: TextIO | None = None) -> None:
  """Print on stderr, if that still leads anywhere: a terminal that was closed is no reason to lose a run."""
  with contextlib.suppress(OSError):
    print(line, file=stream or sys.stderr, flush=True)


def flush() -> None:
  """Write out what was printed; into nothing, where it leads nowhere any more, which would change the exit code."""
  for stream in (sys.stdout, sys.stderr):
    try:
      stream.flush()
    except OSError:
      os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())

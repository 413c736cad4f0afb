"""Stopping a command when a scheduler, a user or a closing terminal asks for it.

A signal handler only notes which signal came. The training loop looks after each step; the slow
parts before the loop call `raise_if_stopped` between them. Where the main thread is in a long call
of C code (a compilation) and nothing would be lost, a thread ends the process instead.
"""
import contextlib
import errno
import functools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TextIO

from equivariant_ssl.errors import PREEMPTED, UserError

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGINT)
GRACE = 5.  # seconds until the thread ends a process that has nothing to save
AFTER_STEP = 'stopping after this step, with everything saved.'  # the answer of a training
AGAIN = ' Ctrl-C again ends it at once.'
EARLY = ('stopped before there was anything to save; nothing is lost.',
         'Type the same command again to go on.')
SHOW_CURSOR, CLEAR_LINE = b'\x1b[?25h', b'\r\x1b[2K'


class _Listener:
  """The signals that have come since listening began.

  arrived: the numbers of these signals.
  idle:    whether the process has nothing to save, so that it may end at once.
  going:   what the process does before it ends, where it is not idle; '' prints nothing.
  early:   the cause and the fix to print when it ends at once.
  shared:  whether jax passes the signals to all processes of the job and decides when to stop.
  answered: whether a line has said that a signal came.
  """

  def __init__(self, early: tuple[str, str]):
    self.arrived: list[int] = []
    self.idle = True
    self.going = ''
    self.early = early
    self.shared = False
    self.answered = False

  def __call__(self) -> bool:
    """Return whether this process alone has been asked to stop."""
    return bool(self.arrived) and not self.shared


_open_listeners: list[_Listener] = []  # the one of the `listen` that is open, or nothing


def handled_signals() -> list[int]:
  """Return the members of SIGNALS that this process does not ignore.

  `nohup`, and `&` in a script, make a process ignore some of them.
  """
  return [s for s in SIGNALS if signal.getsignal(s) is not signal.SIG_IGN]


def _write(text: str, before: bytes = b'') -> None:
  """Write a line to stderr from any thread, whatever the main thread does.

  No lock of Python's is taken, and a line of progress on a terminal is replaced.
  before: what a terminal gets first.
  """
  cursor = before + CLEAR_LINE if os.isatty(2) else b''
  with contextlib.suppress(OSError):
    os.write(2, cursor + f'eqssl: {text}\n'.encode())


def _answer(listener: _Listener, number: int) -> None:
  """Say that the first signal was heard, and what the process does now."""
  text = 'stopping; nothing is lost.' if listener.idle else listener.going
  if text:
    _write(text + AGAIN * (number == signal.SIGINT))


def _end_if_idle(listener: _Listener, closed: threading.Event) -> None:
  """Wait for GRACE seconds, then end the process if it still has nothing to save."""
  if not closed.wait(GRACE) and listener() and listener.idle:
    _end(str(UserError(*listener.early)), PREEMPTED)


def _watch(listener: _Listener, pipe: int) -> None:
  """Note the signals whose numbers come through `pipe`, and end an idle process after each."""
  closed = threading.Event()
  while numbers := os.read(pipe, 64):
    for number in numbers:
      if number in SIGNALS:  # the handler itself waits until the main thread returns from C code
        if not listener.answered:  # in a thread: a terminal that was stopped (Ctrl-S) blocks it
          listener.answered = True
          threading.Thread(target=_answer, args=(listener, number), daemon=True).start()
        listener.arrived.append(number)
        threading.Thread(target=_end_if_idle, args=(listener, closed), daemon=True).start()
  closed.set()
  os.close(pipe)


@contextlib.contextmanager
def _pass_signals_to(watch: Callable[[int], None], name: str) -> Iterator[None]:
  """Let a thread hear of the signals also while the main thread is in C code.

  watch: is called in the thread `name` with a pipe, which gives the number of each signal that this
         process handles; it ends, and closes the pipe, when there are no more.
  """
  reader, writer = os.pipe()
  os.set_blocking(writer, False)
  wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
  threading.Thread(target=watch, args=(reader,), daemon=True, name=name).start()
  try:
    yield
  finally:
    signal.set_wakeup_fd(wakeup)
    os.close(writer)


def _end(text: str, code: int) -> NoReturn:
  """Print a text and end the process at once, whatever the main thread does."""
  _write(text, SHOW_CURSOR)
  os._exit(code)


@contextlib.contextmanager
def _stop_if_hung_up() -> Iterator[None]:
  """Turn the error EIO into a stop, if the process was asked to stop.

  Printing to a terminal that was closed fails with EIO. The same closing sends SIGHUP.
  """
  try:
    yield
  except OSError as error:
    if error.errno == errno.EIO:
      raise_if_stopped()
    raise


@contextlib.contextmanager
def listen(early: tuple[str, str] = EARLY) -> Iterator[Callable[[], bool]]:
  """Listen to SIGNALS. The context gives a function that says whether one of them has come.

  early: the cause and the fix to print when the process is stopped before it has anything to save.

  A line on stderr answers the first signal. A second SIGINT (Ctrl-C) raises KeyboardInterrupt, with
  a sentence where the process has nothing to save, and a third ends the process. Inside another
  `listen` the context gives the outer function. The handlers from before return when the context
  ends. Outside the main thread the function is always false.
  """
  if _open_listeners or threading.current_thread() is not threading.main_thread():
    with _stop_if_hung_up():
      yield _open_listeners[0] if _open_listeners else lambda: False
    return
  listener, handled = _Listener(early), []

  def handle(number: int, frame: Any) -> None:
    handled.append(number)
    if number == signal.SIGINT and handled.count(number) > 2:  # the second exception was lost
      signal.signal(number, signal.SIG_DFL)
      signal.raise_signal(number)
    if number == signal.SIGINT and handled.count(number) == 2:
      raise KeyboardInterrupt(*([' '.join(listener.early)] if listener.idle else []))
    listener.arrived.append(number)

  before = {s: signal.signal(s, handle) for s in handled_signals()}
  try:
    with _pass_signals_to(functools.partial(_watch, listener), 'eqssl signals'):
      _open_listeners.append(listener)
      try:
        with _stop_if_hung_up():
          yield listener
      finally:
        _open_listeners.clear()
  finally:
    for number, handler in before.items():
      signal.signal(number, signal.SIG_DFL if handler is None else handler)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
  """Let Ctrl-C end a command that has nothing to save, also where its KeyboardInterrupt is lost.

  Python prints and drops an exception in a hook of its garbage collector, and a long call of C code
  delays it. GRACE seconds after a SIGINT a thread ends the process with code 130; a second SIGINT
  ends it at once. Inside `listen`, outside the main thread, and where SIGINT is ignored or another
  program has a handler of its own, the context does nothing.
  """
  before = signal.getsignal(signal.SIGINT)
  if (_open_listeners or threading.current_thread() is not threading.main_thread()
      or before not in (signal.SIG_DFL, signal.default_int_handler)):
    yield
    return
  closed = threading.Event()

  def end() -> None:
    if not closed.wait(GRACE):
      _end('interrupted.', 128 + signal.SIGINT)

  def watch(pipe: int) -> None:
    while numbers := os.read(pipe, 64):
      if signal.SIGINT in numbers:  # a handler waits until the main thread returns from C code
        threading.Thread(target=end, daemon=True).start()
    os.close(pipe)

  def handle(number: int, frame: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    raise KeyboardInterrupt

  signal.signal(signal.SIGINT, handle)
  try:
    with _pass_signals_to(watch, 'eqssl interrupt'):
      try:
        yield
      finally:
        closed.set()
  finally:
    signal.signal(signal.SIGINT, before)


def raise_if_stopped() -> None:
  """Raise UserError PREEMPTED if this process was asked to stop.

  Call this only where the process has nothing to save.
  """
  for listener in _open_listeners:
    if listener():
      raise UserError(*listener.early, PREEMPTED)


@contextlib.contextmanager
def saving(going: str = '') -> Iterator[Callable[[], None]]:
  """Give a function that says: from now on, until the context ends, there may be something to save.

  After it was called, the thread does not end the process; only the code that asks `listen` does.

  going: the line that answers a signal from then on: what is saved before the process ends.
  """
  def begin() -> None:
    for listener in _open_listeners:
      listener.idle, listener.going = False, going
  try:
    yield begin
  finally:
    for listener in _open_listeners:
      listener.idle = True


@contextlib.contextmanager
def explain_interrupt(explain: Callable[[], str]) -> Iterator[None]:
  """Give a KeyboardInterrupt that has no words a sentence: what was saved, and what to type."""
  try:
    yield
  except KeyboardInterrupt as interrupt:
    raise KeyboardInterrupt(str(interrupt) or explain()) from None


def forward_to_jax() -> None:
  """In a job of several processes: pass every signal to jax as SIGTERM, also those already here.

  jax tells the other processes of a SIGTERM, so that all of them stop at the same step.
  """
  for number in handled_signals():
    if number != signal.SIGTERM:  # jax has handled SIGTERM itself since it was initialized
      signal.signal(number, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
  for listener in _open_listeners:
    listener.shared = True
    if listener.arrived:
      os.kill(os.getpid(), signal.SIGTERM)


def ignore_signals() -> None:
  """Ignore all SIGNALS from now on: the work is done, and the process is about to end."""
  for listener in _open_listeners:
    listener.idle = False
  for number in handled_signals():
    signal.signal(number, signal.SIG_IGN)


def say(line: str, stream: TextIO | None = None) -> None:
  """Print a line on stderr, or on `stream`. A terminal that was closed must not end a run."""
  with contextlib.suppress(OSError):
    print(line, file=stream or sys.stderr, flush=True)


def flush_output() -> None:
  """Flush stdout and stderr.

  A stream whose reader is gone is replaced by /dev/null: an error at exit would change the exit
  code.
  """
  for stream in (sys.stdout, sys.stderr):
    try:
      stream.flush()
    except OSError:
      os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())

# PYTHON_ARGCOMPLETE_OK
"""The first lines of `eqssl` and of `python -m equivariant_ssl`.

While modules are imported, Ctrl-C ends the process: Python's own handler raises an exception, which
a hook of the garbage collector may print and drop. `cli.py` then says what a signal does.
"""
import signal


def entry() -> None:
  """Run the console script."""
  if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
  from equivariant_ssl import cli
  cli.entry()


if __name__ == '__main__':
  entry()

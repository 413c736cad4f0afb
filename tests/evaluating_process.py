"""`eqssl eval` or `eqssl embed` as one of several processes: python evaluating_process.py eval DIR ...

It says on stderr how many images it decoded for features. In $EQSSL_TEST_SETTINGS are names and values of constants, as JSON, and under
'unreadable' a name of an image that this process alone cannot read, under 'wait' the seconds that a decoded image takes.
"""
import atexit
import importlib
import json
import os
import sys
import time

import jax
import tiny  # noqa: F401 (the ResNet of depth 4)
from jax._src import cache_key

from equivariant_ssl import cli
from equivariant_ssl.data import stream
from equivariant_ssl.errors import BAD_DATA, UserError
from equivariant_ssl.evaluate import features

if __name__ == '__main__':
  # With jax 0.10 the key of a CPU program differs from process to process, so that each would compile all.
  cache_key._hash_accelerator_config = lambda *args: None
  settings = json.loads(os.environ['EQSSL_TEST_SETTINGS'])
  broken, wait, decoded, one, share = settings.pop('unreadable', None), settings.pop('wait', 0.), [], stream.Canvases.one, features._read_share
  for name, value in settings.items():
    module, _, constant = name.rpartition('.')
    setattr(importlib.import_module(f'equivariant_ssl.{module}'), constant, value)

  def counted(canvases, i):
    decoded.append(i)
    time.sleep(wait)
    if i == broken:
      raise UserError(f'image {i} cannot be read.', 'Take another.', BAD_DATA)
    return one(canvases, i)

  def read_share(*arguments):  # what is read of the data when the run is opened does not count
    stream.Canvases.one = counted
    try:
      return share(*arguments)
    finally:
      stream.Canvases.one = one
  features._read_share = read_share
  # At the end of the interpreter or, for the processes that do not wait for the others, before they end.
  say, end = lambda: print(f'decoded {len(decoded)}', file=sys.stderr, flush=True), os._exit
  os._exit = lambda code: (say(), end(code))
  atexit.register(say)
  jax.config.update('jax_share_binary_between_hosts', True)
  cli.entry()

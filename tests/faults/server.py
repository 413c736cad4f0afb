"""A process that has imported everything and started nothing: each line on its stdin is a job, done in a fork of it.

A job is a process of its own, that can be killed, at the price of a fork. {'do': light | real | cli, 'workdir', 'config':
overrides, 'argv', 'env', 'fault': [mode, at, of reads], 'die_at': a step, 'log', 'out'}. Answers: its pid, then its status
when it has ended.
"""
import ctypes
import json
import mmap  # noqa: F401 (imported late by others, when a job may be a user who cannot read it)
import os
import pathlib
import signal
import sys
import traceback
import types

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import jax  # noqa: E402
import numpy as np  # noqa: E402
import one_process  # noqa: E402
import rich.progress  # noqa: E402, F401
from jax._src import cache_key  # noqa: E402

from equivariant_ssl import cli
from equivariant_ssl.config import load_config  # noqa: E402
from equivariant_ssl.data.card import Card, SplitFacts  # noqa: E402
from equivariant_ssl.errors import describe  # noqa: E402
from equivariant_ssl.parallel import sharding
from equivariant_ssl.storage import fingerprint
from equivariant_ssl.training import loop, stop  # noqa: E402
from equivariant_ssl.training.state import TrainState  # noqa: E402
from equivariant_ssl.training.step_clock import StepClock  # noqa: E402

CONFIG = one_process.__file__
CARD = Card('x', {}, SplitFacts(16), None, None, 8, (0., 0., 0.), (1., 1., 1.), 16)
COUNT, KILL, EIO, ENOSPC = range(4)


def state(step: int) -> TrainState:
  """What a light run has learnt after so many steps."""
  return TrainState(np.int32(step), {'w': np.full((8, 4), 1 / 3 + step, np.float32)}, {}, (), {'m': np.float32(step)})


def lighten() -> None:
  """All that a training does with files, and nothing that is learnt: no program is compiled."""
  def opened(config, start, mesh, say, accept):
    recipe = types.SimpleNamespace(steps=config.steps, steps_per_epoch=10, batch=config.batch, equivariances={})
    return loop.Run(config, None, recipe, sharding.mesh(), None, start.data_card or CARD), None

  def fit(run, now, on_step):
    clock = StepClock()
    for n in range(int(now.step) + 1, run.recipe.steps + 1):
      now = state(n)
      if on_step(now, n, {'loss': np.float32(n), 'invariance': np.float32(n), 'std': np.float32(1)}, clock):
        break
    return now
  like = lambda run, rule: jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding.replicated_sharding(run.mesh)), state(0))
  for name, value in {'_open': opened, 'fit': fit, 'abstract_state': like, 'initial_state': lambda run, rule: state(0),
                      'warmup_warning': lambda *args: ''}.items():
    assert hasattr(loop, name), name
    setattr(loop, name, value)


def learn(job: dict) -> tuple[int, dict]:
  """(exit code, fingerprints of what was learnt) of a training."""
  def hook(run, now, n):
    if n == job.get('die_at'):
      os._exit(9)
  try:
    config = load_config(CONFIG, {k: str(v) for k, v in job['config'].items()})
    return 0, fingerprint.fingerprints(loop.train(config, job['workdir'], 'test', (hook,), sharding.mesh(), quiet=True))
  except Exception as error:
    traceback.print_exc()
    print(describe(error)[0], file=sys.stderr)
    return describe(error)[1], {}


def do(job: dict) -> int:
  """A job, in the fork."""
  os.environ.update(job.get('env', {}))
  log = os.open(job['log'], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
  os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
  os.dup2(log, 1)
  os.dup2(log, 2)
  if 'EQSSL_PROCESS' in job.get('env', {}):  # as tests/one_process.py: one process compiles for all
    cache_key._hash_accelerator_config = lambda *args: None
    jax.config.update('jax_share_binary_between_hosts', True)
  if job['do'] == 'cli':
    sys.argv = ['eqssl', *job['argv']]
    cli.entry()
  if job['do'] == 'light':
    lighten()
    jax.devices()  # before anything is counted
  if job.get('user'):
    learn({**job, 'workdir': job['out'] + '.first'})  # all is imported, by one who may read it
    os.seteuid(job['user'])
  shim = ctypes.CDLL(None) if job.get('fault') else None
  if shim:
    shim.fault_arm(job['workdir'].encode(), *job['fault'])
  code, found = learn(job)
  if job.get('user'):
    os.seteuid(0)
  out = {'code': code, 'prints': found}
  if shim:
    shim.fault_disarm()
    out['seen'] = shim.fault_seen()
    if job.get('again') and code:  # the fault is over, and the same process goes on
      out['again'], out['prints'] = learn(job)
  pathlib.Path(job['out']).write_text(json.dumps(out))
  return code


def serve() -> None:
  for number in stop.SIGNALS:
    signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
  load_config(CONFIG, {})
  for line in sys.stdin:
    pid = os.fork()
    if not pid:
      code = 1
      try:
        code = do(json.loads(line))
      except SystemExit as end:
        code = end.code or 0
      except BaseException:
        traceback.print_exc()
      finally:
        sys.stdout.flush()
        os._exit(code)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == '__main__':
  serve()

"""What the tests of faults share: how many of each, a row of the summary, and processes that can be killed cheaply."""
import json
import os
import pathlib
import subprocess
import sys
import time
from typing import NamedTuple

import jax

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent.parent
FULL = os.environ.get('EQSSL_FAULTS') == 'full'
FOUND = pathlib.Path(os.environ.get('EQSSL_FAULTS_OUT', ROOT / '.cache' / 'faults'))  # of a full run, as it comes
FIELDS = ('fault', 'points', 'survived', 'lost', 'wrong', 'seconds')
ROWS = []


def many(full: int, few: int) -> int:
  return full if FULL else few


class Row(NamedTuple):
  """One fault of the summary. survived: the run went on to the right end, or the damage was seen and nothing taken for it.
  lost: work is gone, or a person is needed. wrong: something wrong passed for right, hung, or was executed."""
  fault: str
  counts: dict
  said: list
  start: float

  def add(self, outcome: str, said: str = '') -> None:
    self.counts[outcome] = self.counts.get(outcome, 0) + 1
    if outcome != 'survived':
      self.said.append(said)
    if FULL:
      self.keep()

  def keep(self) -> None:
    FOUND.mkdir(parents=True, exist_ok=True)
    (FOUND / f'{self.fault.replace("/", " ")}.json').write_text(json.dumps(self.about(), indent=1))

  def about(self) -> dict:
    of = {k: self.counts.get(k, 0) for k in ('survived', 'lost', 'wrong')}
    return {'fault': self.fault, 'points': sum(of.values()), **of, 'seconds': round(time.time() - self.start),
            'said': self.said[:20], 'done': self.counts.get('done', False)}


def table(rows) -> str:
  """The summary, as text that is a table of Markdown too."""
  cells = [[str(r[k]) for k in FIELDS] for r in rows]
  wide = [max(len(c[i]) for c in [list(FIELDS), *cells]) for i in range(len(FIELDS))]
  pad = lambda c: [v.rjust(w) if i else v.ljust(w) for i, (v, w) in enumerate(zip(c, wide, strict=True))]
  line = lambda c: '| ' + ' | '.join(pad(c)) + ' |'
  rule = '|' + '|'.join('-' * (w + 1) + (':' if i else '-') for i, w in enumerate(wide)) + '|'
  return '\n'.join([line(FIELDS), rule, *map(line, cells)])


class Server:
  """tests/faults/server.py, and the job that it is at."""

  def __init__(self, folder, preload=''):
    cache = jax.config.jax_compilation_cache_dir
    env = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': '1', 'JAX_COMPILATION_CACHE_DIR': cache,
           'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0', 'EQSSL_CACHE': '', 'LD_PRELOAD': str(preload),
           'PYTHONPATH': os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')])}
    self.folder, self.count = folder, 0
    self.process = subprocess.Popen([sys.executable, str(HERE / 'server.py')], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                    text=True, env=env, cwd=ROOT)

  def start(self, **job) -> int:
    """Begin a job; its pid."""
    self.count += 1
    self.out, self.log = self.folder / f'{self.count}.json', self.folder / f'{self.count}.txt'
    self.process.stdin.write(json.dumps({'out': str(self.out), 'log': str(self.log), 'config': {}, **job}) + '\n')
    self.process.stdin.flush()
    pid = int(self.process.stdout.readline())
    while not self.log.exists():  # it has begun
      time.sleep(.005)
    return pid

  def wait(self) -> tuple[int, dict, str]:
    """(status, what it left, what it said) of the job, when it has ended."""
    status = int(self.process.stdout.readline())
    said = self.log.read_text(errors='replace') if self.log.exists() else ''
    return status, json.loads(self.out.read_text()) if self.out.exists() else {}, said

  def do(self, **job):
    self.start(**job)
    return self.wait()

  def close(self) -> None:
    self.process.stdin.close()
    self.process.wait()
    self.process.stdout.close()

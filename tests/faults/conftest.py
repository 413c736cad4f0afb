"""The matrix of faults: few of each in `make test`, all of them in `make faults`, each with a row of the summary."""
import shutil
import subprocess
import sys
import time

import matrix
import pytest


@pytest.fixture
def row(request):
  """`row(fault, points)`: the row of a fault that so many points are asked of; all of them must be survived."""
  made = []

  def make(fault, points):
    made.append((matrix.Row(fault, {}, [], time.time()), points))
    return made[-1][0]
  yield make
  for one, points in made:
    one.counts['done'] = True
    about = one.about()
    matrix.ROWS.append(about)
    if matrix.FULL:
      one.keep()
    assert about['points'] >= points, (one.fault, about['points'], points, one.said[:5])
    assert about['survived'] == about['points'], one.said[:5]


def pytest_terminal_summary(terminalreporter):
  if matrix.ROWS:
    terminalreporter.write_line('')
    terminalreporter.write_line(matrix.table(matrix.ROWS))


@pytest.fixture(scope='session')
def shim(tmp_path_factory):
  """The file system that fails on purpose, compiled; a test that asks for it is skipped where there is no C compiler."""
  compiler = next(filter(None, map(shutil.which, ('cc', 'gcc', 'clang'))), None)
  if compiler is None or sys.platform != 'linux':
    pytest.skip('no C compiler (apt-get install gcc), or no Linux: file operations cannot be made to fail one by one')
  out = tmp_path_factory.mktemp('shim') / 'shim.so'
  flags = '-shared', '-fPIC', '-O1', '-w', '-D_LARGEFILE64_SOURCE'
  subprocess.run([compiler, *flags, '-o', out, matrix.HERE / 'shim.c', '-ldl'], check=True)
  return out


@pytest.fixture(scope='module')
def server(tmp_path_factory):
  made = matrix.Server(tmp_path_factory.mktemp('jobs'))
  yield made
  made.close()


@pytest.fixture(scope='module')
def failing(tmp_path_factory, shim):
  """The server with the shim in it."""
  made = matrix.Server(tmp_path_factory.mktemp('jobs'), shim)
  yield made
  made.close()

"""Hostile and odd images: each is read right or refused with a line, in time and in little memory."""
import json
import os
import subprocess
import sys

import matrix
from matrix import many


def test_hostile_and_odd_images(row):
  count = many(600, 120)
  one = row('hostile and odd images', count)
  env = {**os.environ, 'PYTHONPATH': os.pathsep.join([str(matrix.ROOT), os.environ.get('PYTHONPATH', '')])}
  argv = [sys.executable, str(matrix.HERE / 'images.py'), str(count)]
  done = subprocess.run(argv, capture_output=True, text=True, env=env)
  lines = [json.loads(line) for line in done.stdout.splitlines()]
  for found in lines:
    if 'outcome' in found:
      one.add(found['outcome'], f'{found["name"]}: {found["said"]}')
  last = lines[-1] if lines else {}
  if 'peak' not in last:  # killed by its alarm, or crashed
    one.add('wrong', f'{last.get("name")}: {done.returncode} {done.stderr[-500:]}')
  elif last['peak'] >= 1 << 30:
    one.add('wrong', f'{last["peak"] / 2 ** 30:.2f} GiB at the peak')

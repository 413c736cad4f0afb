"""`eqssl study` at work: it does every run of a study once, in processes side by side."""
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from equivariant_ssl import dotted
from equivariant_ssl.errors import IN_USE, PREEMPTED, UserError
from equivariant_ssl.storage import record
from equivariant_ssl.study.recommend import unread_runs
from equivariant_ssl.study.study_plan import PlannedRun, forget_failures, is_done, runs
from equivariant_ssl.study.study_results import results, table
from equivariant_ssl.training import stop

POLL_SECONDS = .2   # between two looks at the processes
RETRY_SECONDS = 5.  # until a run is tried again that another process held, or that was stopped
SLURM = '''#!/bin/bash
#SBATCH --job-name=eqssl-study
#SBATCH --array=0-{last}%{most}
#SBATCH --output={folder}/slurm-%a.txt
#SBATCH --requeue
#SBATCH --signal=USR1@120
# Site-specific: partition, account, time, and what a run needs of a node.
##SBATCH --partition=gpu --gres=gpu:1 --cpus-per-task=8 --time=12:00:00
export SRUN_CPUS_PER_TASK="${{SLURM_CPUS_PER_TASK:-1}}" # srun does not take it from sbatch any more
code=0
export {variables}
srun {python} -m equivariant_ssl.study.worker {folder} "$SLURM_ARRAY_TASK_ID" || code=$?
if [ "$code" -eq 75 ]; then # stopped, and resumable
  scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID"
fi
exit "$code"
'''

Say = Callable[[str], None]  # prints a line


class Worker(NamedTuple):
  """A process that does `run` on the device `slot`."""
  process: subprocess.Popen
  run: PlannedRun
  slot: int


def isolated_environment() -> dict[str, str]:
  """Return environment variables for a Python that imports nothing from the current folder.

  That folder may be a study which somebody else has sent.
  """
  root, paths = str(pathlib.Path(__file__).parents[2]), os.environ.get('PYTHONPATH', '')
  installed = sys.path[0] != root or root in sys.path[1:]  # else a clone, run from its folder
  path = {} if installed else {'PYTHONPATH': os.pathsep.join(filter(None, (root, paths)))}
  return {'PYTHONSAFEPATH': '1', **path}


def devices() -> tuple[dict[str, Any], int]:
  """Return `environment.environment()` and how many runs fit side by side.

  One run fits on a GPU, and one on a core of a CPU; the chips of a TPU work on one run together.
  Another process finds this out, because this one must not hold the devices of its workers.
  """
  code = ('import jax, json; from equivariant_ssl.storage import record; '
          'print(json.dumps(record.environment()))')
  printed = subprocess.run([sys.executable, '-c', code], capture_output=True, check=True,
                           env={**os.environ, **isolated_environment()}).stdout
  environment = json.loads(printed)
  fits = {'gpu': len(environment['devices']), 'cpu': environment['cores']}
  return environment, fits.get(environment['backend'], 1)


def _worker_variables(kind: str, slot: int, workers: int) -> dict[str, str]:
  """Return the environment variables that give one of several `workers` its device, or thread.

  slot: the number of the device among those that this process may use.
  """
  if workers == 1:
    return {}
  if kind == 'gpu':
    visible = os.environ.get('CUDA_VISIBLE_DEVICES')
    return {'CUDA_VISIBLE_DEVICES': visible.split(',')[slot] if visible else str(slot)}
  # A thread for each: runs side by side must not wait for each other's cores.
  flags = f'{os.environ.get("XLA_FLAGS", "")} --xla_cpu_multi_thread_eigen=false'
  return {'XLA_FLAGS': flags, 'JAX_PLATFORMS': 'cpu'} if kind == 'cpu' else {}


def allowed_modules(plan: dict[str, Any]) -> dict[str, str]:
  """Return the environment variable for the modules of other packages that a study's arms name.

  This process has imported them: the user has named or allowed them.
  """
  names = [name for arm in plan['made'] for name in dotted.names_in(arm['config'])]
  return dotted.environment(list(dict.fromkeys(names)))


def _start(folder: pathlib.Path, plan: dict[str, Any], number: int, kind: str, slot: int,
           workers: int, part: str = 'found') -> Worker:
  """Start a process that does a part of run `number`, 'found' or 'test'."""
  run = runs(plan)[number]
  (folder / run.workdir).mkdir(parents=True, exist_ok=True)
  command = [sys.executable, '-m', 'equivariant_ssl.study.worker', str(folder), str(number),
             *([] if part == 'found' else [part])]
  variables = {**os.environ, **isolated_environment(), **_worker_variables(kind, slot, workers),
               **allowed_modules(plan), 'EQSSL_STUDY': 'local'}
  path = folder / run.workdir / 'log.txt'
  with open(path, 'wb') if part == 'found' else open(path, 'ab') as log:
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log,
                               env=variables)
  return Worker(process, run, slot)


def _failure(folder: pathlib.Path, run: PlannedRun, code: int) -> str:
  """Return the line of a run's log that says why it ended with `code`."""
  text = (folder / run.workdir / 'log.txt').read_text(encoding='utf-8', errors='replace')
  lines = text.splitlines()
  causes = [line for line in lines if line.startswith('eqssl: ')]
  causes = causes or [line for line in lines
                      if re.match(r'[\w.]*(Error|Exception|Interrupt|Exit)\b', line)]
  causes = causes or [line for line in lines if line.strip()]
  if not causes:
    return f'the process ended with code {code} and printed nothing'
  return causes[-1].removeprefix('eqssl: ')


def execute(folder: pathlib.Path, plan: dict[str, Any], kind: str, workers: int,
            say: Say) -> dict[str, str]:
  """Do every run that is not done, `workers` at a time on devices of `kind`.

  Then the recommended arm's runs are read out on the test split. Returns {run's name: why it
  failed}. After each run, results.json and table.csv hold all that is known. Raises UserError
  PREEMPTED where the study was asked to stop.
  """
  names = [run.name for run in runs(plan)]
  forget_failures(folder, plan)
  again = f'Go on: eqssl study --resume {shlex.quote(str(folder))}'
  with stop.explain_interrupt(lambda: f'interrupted; the runs that are done are kept. {again}'):
    failed = _do(folder, plan, kind, workers, say, names, 'found', {})
    recommended = unread_runs(results(folder, plan, failed))
    if recommended:
      say(f'Reading out on the test split: {", ".join(recommended)}.')
    return failed | _do(folder, plan, kind, workers, say, recommended, 'test', failed)


def _do(folder: pathlib.Path, plan: dict[str, Any], kind: str, workers: int, say: Say,
        names: list[str], part: str, failed_before: dict[str, str]) -> dict[str, str]:
  """Do a part, 'found' or 'test', of the runs `names` in which it is not done yet.

  Returns {run's name: why it failed}. failed_before: the runs that failed in an earlier part.
  """
  every = runs(plan)
  waiting = [(number, run) for number, run in enumerate(every)
             if run.name in names and not is_done(folder, run, part)]
  failed: dict[str, str] = {}
  if not waiting:
    return failed
  running: list[Worker] = []
  retries: list[tuple[float, tuple[int, PlannedRun]]] = []
  free, total, start = list(range(min(workers, len(waiting)))), len(waiting), time.perf_counter()
  if part == 'found':
    say(f'{len(every) - total} of {len(every)} runs are done; {len(free)} side by side.')
  going = 'stopping: the runs that have begun are saved first.'
  with stop.listen() as stop_requested, stop.saving(going) as begin_saving:
    begin_saving()  # the runs are saved before this process ends
    while (waiting or running or retries) and not stop_requested():
      while retries and retries[0][0] < time.perf_counter():
        waiting.append(retries.pop(0)[1])
      while waiting and free:
        number, _ = waiting.pop(0)
        running.append(_start(folder, plan, number, kind, free.pop(0), workers, part))
      time.sleep(POLL_SECONDS)
      for worker in [worker for worker in running if worker.process.poll() is not None]:
        worker.process.communicate()  # closes the pipe by which it would notice our end
        running.remove(worker)
        free.append(worker.slot)
        run, code = worker.run, worker.process.returncode
        if not is_done(folder, run, part):
          if code in (IN_USE, PREEMPTED):  # a killed study's process may still be saving it
            retries.append((time.perf_counter() + RETRY_SECONDS, (every.index(run), run)))
            continue
          failed[run.name] = _failure(folder, run, code)
        over = total - len(waiting) - len(running) - len(retries)
        seconds = time.perf_counter() - start
        say(f'{over}/{total} {run.name}: {failed.get(run.name) or "done"}; {seconds / 60:.1f} min, '
            f'about {seconds / over * (total - over) / 60:.0f} min left')
        write_results(folder, results(folder, plan, failed_before | failed))
    for worker in running:
      worker.process.terminate()
    for worker in running:
      worker.process.wait()
      worker.process.communicate()
  if waiting or running or retries:
    done = sum(is_done(folder, run) for run in every)
    raise UserError(f'the study was stopped; {done} of {len(every)} runs are done.',
                    f'Go on: eqssl study --resume {shlex.quote(str(folder))}', PREEMPTED)
  return failed


def write_results(folder: pathlib.Path, content: dict[str, Any]) -> None:
  """Write results.json and table.csv."""
  record.write_atomically(folder / 'results.json', json.dumps(content, indent=1) + '\n')
  record.write_atomically(folder / 'table.csv', table(content))


def slurm(folder: pathlib.Path, plan: dict[str, Any], most: int, say: Say) -> None:
  """Write slurm.sh, an array of the runs, and submit it where there is sbatch.

  most: how many runs may run at once, 0 for 32.
  """
  forget_failures(folder, plan)
  script = folder / 'slurm.sh'
  variables = ' '.join(f'{name}={shlex.quote(value)}' for name, value in
                       {**isolated_environment(), **allowed_modules(plan)}.items())
  record.write_atomically(script, SLURM.format(
      variables=variables, last=len(runs(plan)) - 1, most=most or 32,
      folder=shlex.quote(str(folder)), python=shlex.quote(sys.executable)))
  if shutil.which('sbatch'):
    submitted = subprocess.run(['sbatch', str(script)], capture_output=True, encoding='utf-8')
    if submitted.returncode:
      raise UserError(f'sbatch: {submitted.stderr.strip() or submitted.stdout.strip()}',
                      f'Edit {script}, and sbatch it.')
    say(submitted.stdout.strip())
  else:
    say(f'There is no sbatch here. Edit {script} for your site, and submit it: '
        f'sbatch {shlex.quote(str(script))}')
  say('For the table and the report of what is done, at any time: '
      f'eqssl study --resume {shlex.quote(str(folder))} --collect')

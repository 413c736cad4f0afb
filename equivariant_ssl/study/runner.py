"""The open question as one command: runs side by side, each done once, and a table, a CSV, sentences and a page."""
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import time
from typing import Any, NamedTuple

import jax
from rich.console import Console
from rich.table import Table

from equivariant_ssl.errors import IN_USE, PREEMPTED, UserError
from equivariant_ssl.parallel import sharding
from equivariant_ssl.storage import record
from equivariant_ssl.study import effects, recommend
from equivariant_ssl.study import study_plan as plans
from equivariant_ssl.study.study_plan import Settings
from equivariant_ssl.training import runs as prepared
from equivariant_ssl.training import stop

BUSY = .2  # seconds between looks at the processes
AGAIN = 5.  # seconds until a run is tried again that another process still held, or that was told to stop
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
if [ "$code" -eq 75 ]; then scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID"; fi # stopped and resumable
exit "$code"
'''


class Worker(NamedTuple):
  """A process that does `run` on device `slot`."""
  process: subprocess.Popen
  run: plans.Run
  slot: int


def safe() -> dict[str, str]:
  """The environment of a Python that imports nothing from the folder one is in, which may be a study that one was sent."""
  root, paths = str(pathlib.Path(__file__).parents[2]), os.environ.get('PYTHONPATH', '')
  found = sys.path[0] != root or root in sys.path[1:]  # else this is a clone, run from its folder
  return {'PYTHONSAFEPATH': '1', **({} if found else {'PYTHONPATH': os.pathsep.join(filter(None, (root, paths)))})}


def devices() -> tuple[dict[str, Any], int]:
  """(record.environment, how many runs fit side by side): one a GPU, one a core of a CPU; a TPU's chips work on one run
  together. Asked of another process: this one must not hold what its workers need."""
  code = ('import jax, json; from equivariant_ssl.storage import record; '
          'print(json.dumps(record.environment()))')
  found = json.loads(subprocess.run([sys.executable, '-c', code], capture_output=True, check=True,
                                    env={**os.environ, **safe()}).stdout)
  return found, {'gpu': len(found['devices']), 'cpu': found['cores']}.get(found['backend'], 1)


def _own(kind: str, slot: int, workers: int) -> dict[str, str]:
  """The environment of one of several `workers`: the device `slot` of those that this process may see, or a thread."""
  if workers == 1:
    return {}
  if kind == 'gpu':
    seen = os.environ.get('CUDA_VISIBLE_DEVICES')
    return {'CUDA_VISIBLE_DEVICES': seen.split(',')[slot] if seen else str(slot)}
  # A thread each: runs side by side must not wait for each other's cores.
  flags = f'{os.environ.get("XLA_FLAGS", "")} --xla_cpu_multi_thread_eigen=false'
  return {'XLA_FLAGS': flags, 'JAX_PLATFORMS': 'cpu'} if kind == 'cpu' else {}


def _start(folder: pathlib.Path, number: int, run: plans.Run, kind: str, slot: int, workers: int, what: str = '') -> Worker:
  (folder / run.workdir).mkdir(parents=True, exist_ok=True)
  log = folder / run.workdir / 'log.txt'
  with open(log, 'ab') if what else open(log, 'wb') as out:
    process = subprocess.Popen([sys.executable, '-m', 'equivariant_ssl.study.worker', str(folder), str(number), what],
                               stdin=subprocess.PIPE, stdout=out, stderr=out,
                               env={**os.environ, **safe(), **_own(kind, slot, workers), 'EQSSL_STUDY': 'local'})
  return Worker(process, run, slot)


def _why(folder: pathlib.Path, run: plans.Run, code: int) -> str:
  """The line of a run's log that says why it ended with `code`."""
  lines = (folder / run.workdir / 'log.txt').read_text(encoding='utf-8', errors='replace').splitlines()
  said = [line for line in lines if line.startswith('eqssl: ')]
  said = said or [line for line in lines if re.match(r'[\w.]*(Error|Exception|Interrupt|Exit)\b', line)]
  said = said or [line for line in lines if line.strip()]
  return said[-1].removeprefix('eqssl: ') if said else f'ended with code {code} and said nothing'


def execute(folder: pathlib.Path, plan: dict[str, Any], kind: str, workers: int, say) -> dict[str, str]:
  """Do every run that is not done, `workers` at a time on devices of `kind`, then read out on the test split those of the
  arm that is recommended; {run: why it failed}. After each, results.json and table.csv say all that is known. Raises
  UserError PREEMPTED where it was asked to stop."""
  failed = _do(folder, plan, kind, workers, say, [r.name for r in plans.runs(plan)], '', {})
  chosen = recommend.untested(plans.results(folder, plan, failed))
  if chosen:
    say(f'Reading out on the test split: {", ".join(chosen)}.')
  return failed | _do(folder, plan, kind, workers, say, chosen, 'test', failed)


def _do(folder: pathlib.Path, plan: dict[str, Any], kind: str, workers: int, say, which: list[str], what: str,
        before: dict[str, str]) -> dict[str, str]:
  """Those of the runs `which` of which `what` ('': training and the read-out, or 'test') is not done; {run: why it failed}.
  before: what failed in an earlier part."""
  every, done = plans.runs(plan), lambda r: plans.done(folder, r, what)
  todo = [(i, r) for i, r in enumerate(every) if r.name in which and not done(r)]
  failed, running = {}, []
  if not todo:
    return failed
  free, total, start = list(range(min(workers, len(todo)))), len(todo), time.perf_counter()
  later: list[tuple[float, tuple[int, plans.Run]]] = []
  if not what:
    say(f'{len(every) - total} of {len(every)} runs are done; {len(free)} side by side.')
  with stop.heard() as asked, stop.saving() as begun:
    begun()  # the runs are saved before this ends
    while (todo or running or later) and not asked():
      while later and later[0][0] < time.perf_counter():
        todo.append(later.pop(0)[1])
      while todo and free:
        number, run = todo.pop(0)
        running.append(_start(folder, number, run, kind, free.pop(0), workers, *([what] if what else [])))
      time.sleep(BUSY)
      for w in [w for w in running if w.process.poll() is not None]:
        running.remove(w)
        free.append(w.slot)
        if not done(w.run):
          if w.process.returncode in (IN_USE, PREEMPTED):  # a killed study's process may still be saving it
            later.append((time.perf_counter() + AGAIN, (every.index(w.run), w.run)))
            continue
          failed[w.run.name] = _why(folder, w.run, w.process.returncode)
        over = total - len(todo) - len(running) - len(later)
        spent = time.perf_counter() - start
        say(f'{over}/{total} {w.run.name}: {failed.get(w.run.name) or "done"}; '
            f'{spent / 60:.1f} min, about {spent / over * (total - over) / 60:.0f} left')
        _keep(folder, plans.results(folder, plan, before | failed))
    for w in running:
      w.process.terminate()
    for w in running:
      w.process.wait()
  if todo or running or later:
    raise UserError(f'stopped; {sum(plans.done(folder, r) for r in every)} of {len(every)} runs are done.',
                    f'Go on: eqssl study --resume {shlex.quote(str(folder))}', PREEMPTED)
  return failed


def _keep(folder: pathlib.Path, found: dict[str, Any]) -> None:
  record.write_whole(folder / 'results.json', json.dumps(found, indent=1) + '\n')
  record.write_whole(folder / 'table.csv', plans.table(found))


def slurm(folder: pathlib.Path, plan: dict[str, Any], most: int, say) -> None:
  """Write slurm.sh, an array of the runs, and submit it where there is sbatch."""
  script = folder / 'slurm.sh'
  variables = ' '.join(f'{k}={shlex.quote(v)}' for k, v in safe().items())
  record.write_whole(script, SLURM.format(variables=variables, last=len(plans.runs(plan)) - 1, most=most or 32,
                                          folder=shlex.quote(str(folder)), python=shlex.quote(sys.executable)))
  again = f'eqssl study --resume {shlex.quote(str(folder))}'
  after = f'For the table and the report of what is done, at any time: {again} --collect'
  if shutil.which('sbatch'):
    done = subprocess.run(['sbatch', str(script)], capture_output=True, encoding='utf-8')
    if done.returncode:
      raise UserError(f'sbatch: {done.stderr.strip() or done.stdout.strip()}', f'Edit {script}, and sbatch it.')
    say(done.stdout.strip())
  else:
    say(f'There is no sbatch here. Edit {script} for your site, and: sbatch {shlex.quote(str(script))}')
  say(after)


def show(found: dict[str, Any], console: Console) -> None:
  """The table of arms, and a sentence a contrast of the first read-out."""
  names = list(dict.fromkeys(row['readout'] for row in found['table']))
  cells = {(row['arm'], row['readout']): row for row in found['table']}
  on = found['readout']
  table = Table(title=f'accuracy on the {on} images, %: mean ± standard deviation over seeds')
  for column in ('arm', *names, 'n'):
    table.add_column(column, justify='left' if column == 'arm' else 'right', overflow='fold')
  for name in ('chance', 'untrained'):
    table.add_row(name, *(f'{100 * found[name][n]:.1f}' if n in found[name] else '' for n in names), '')
  for arm in dict.fromkeys(row['arm'] for row in found['table']):
    of = [cells.get((arm, n)) for n in names]
    spread = lambda c: f' ± {100 * c["std"]:.1f}' if c['std'] is not None else ''
    table.add_row(arm, *(f'{100 * c["mean"]:.1f}{spread(c)}' if c else '' for c in of), str(max(c['n'] for c in of if c)))
  if names:
    console.print(table)
  for line in [*found['recommendation'], *found['verdict']]:
    console.print(line, markup=False)
  for e in found['effects']:
    if e['readout'] == names[0]:
      console.print(e['sentence'], markup=False)
  for p in found['proxies']:
    if p['readout'] == names[0]:
      within = f' [{p["low"]:.2f}, {p["high"]:.2f}]' if p['low'] is not None else ''
      effects_too = f', the effects with {p["effects"]:.2f}' if p['effects'] is not None else ''
      console.print(f'{p["budget"]:g} of the budget ranks the {p["n"]} arms, on the {on} images, as all of it does with a '
                    f'correlation of {p["rank"]:.2f}{within}{effects_too}.', markup=False)


def study(folder: pathlib.Path, settings: Settings | None, command: str, launcher: str = 'local', workers: int = 0,
          collect: bool = False, console: Console | None = None) -> dict[str, Any]:
  """Do the study that `settings` ask for in `folder` (None: the one that is there), print what it found and write
  results.json, table.csv and report.html; what is done already is not done again. collect: start nothing. Returns the
  results."""
  console = console or Console(soft_wrap=True, width=None if sys.stdout.isatty() else 120)
  if launcher not in ('local', 'slurm'):
    raise UserError(f'--launcher {launcher} is not known.', 'Give local or slurm.')
  if workers < 0:
    raise UserError(f'--workers {workers}: runs side by side, 0: as many as fit.')
  start, folder = time.perf_counter(), pathlib.Path(folder).absolute()
  say = lambda text: console.print(text, markup=False, highlight=False)
  jax.config.update('jax_platforms', 'cpu')  # the devices are the workers'
  plan = plans.make(settings, command, {}) if settings else plans.read(folder)  # a mistake is said before any wait
  environment, fit = devices()
  plan |= {'environment': environment} if settings else {}
  if workers > fit and environment['backend'] != 'cpu' and launcher == 'local':
    raise UserError(f'--workers {workers}: {environment["backend"]}s for {fit} are here.', 'One run a device.')
  every = plans.runs(plan)
  first = plans.config(plan, every[0])
  if not collect:
    whole = prepared.prepare(first, sharding.mesh(jax.devices()[:1]))  # what no run could do is said before any starts
    plans.check_steps(plan, whole.recipe.steps_per_epoch)
  with record.lock(folder):
    plans.write(folder, plan)
    length = f'{first.steps} steps' if first.steps else f'{first.epochs:g} epochs'
    say(f'{len(plan["made"])} arms x {effects.seeds(len(plan["seeds"]))}, {length}, equal {plan["equal"]}, read out on '
        f'{plans.read_on(plan)}: {len(every)} runs')
    if launcher == 'slurm' and not collect:
      slurm(folder, plan, workers, say)
      return plans.results(folder, plan, {})
    failed = {} if collect else execute(folder, plan, environment['backend'], workers or fit, say)
    found = plans.results(folder, plan, failed)
    _keep(folder, found)
  show(found, console)
  for name, why in failed.items():
    say(f'failed: {name}: {why}')
  from equivariant_ssl import report
  page = report.report([folder])
  say(f'{(time.perf_counter() - start) / 60:.1f} minutes. Report: {page}  Table: {folder / "table.csv"}')
  if failed:
    raise UserError(f'{len(failed)} of {len(every)} runs failed, {next(iter(failed))} so: {next(iter(failed.values()))}',
                    f'Their logs: log.txt in {folder}/runs/. To try them again: '
                    f'eqssl study --resume {shlex.quote(str(folder))}')
  return found

"""One run of a study in its own process: python -m equivariant_ssl.study.worker FOLDER NUMBER."""
import contextlib
import json
import os
import pathlib
import signal
import sys
import threading
import time
from typing import Any

from equivariant_ssl.errors import IN_USE, INPUT_OUTPUT, OK, PREEMPTED, WATCHDOG, UserError
from equivariant_ssl.evaluate.protocols import PROTOCOLS
from equivariant_ssl.evaluate.statistics import mean_std, mean_value
from equivariant_ssl.parallel import processes
from equivariant_ssl.study import study_plan
from equivariant_ssl.study.recommend import unread_runs
from equivariant_ssl.study.study_plan import READOUTS, PlannedRun, is_done
from equivariant_ssl.study.study_results import results
from equivariant_ssl.training import stop

# Protocols whose numbers stand in fields of their own in found.json, not under 'more'.
OWN_FIELDS = ('profile', 'gains', 'retrieval', 'transfer')


def _end_with_parent() -> None:
  """Stop, with everything saved, when the study that started this process has ended.

  The end of standard input shows that it has.
  """
  def watch() -> None:
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGTERM)
  threading.Thread(target=watch, daemon=True).start()


def _accuracies(evaluated: dict[str, dict]) -> dict[str, tuple[str, str]]:
  """Return {read-out: (protocol, row)} of the accuracies in results of `evaluate`."""
  names = {protocol: name for name, protocol in READOUTS.items()} | {'linear': 'linear probe'}
  numbers = {protocol: result['trained'][0]['numbers'] for protocol, result in evaluated.items()
             if PROTOCOLS[protocol].needs == 'labels'}
  accuracies = {names.get(protocol, protocol): (protocol, 'top1')
                for protocol in (*READOUTS.values(), *numbers)
                if 'top1' in numbers.get(protocol, ())}
  return accuracies | {row: ('episodes', row) for row in numbers.get('episodes', ())}


def readouts(evaluated: dict[str, dict], network: str) -> dict[str, float]:
  """Return {read-out: fraction} of results of `evaluate`, a mean over the evaluation's seeds.

  network: 'trained' or 'untrained'.
  """
  values = {name: mean_std([mean_value(result['numbers'][row])
                            for result in evaluated[protocol][network]])[0]
            for name, (protocol, row) in _accuracies(evaluated).items()
            if network in evaluated[protocol]}
  if network in evaluated.get('transfer', ()):
    numbers = evaluated['transfer'][network][0]['numbers']
    values |= {f'transfer {row}': mean_std([mean_value(result['numbers'][row])
                                            for result in evaluated['transfer'][network]])[0]
               for row in numbers}
  return values


def summary(evaluated: dict[str, dict]) -> dict[str, Any]:
  """Return what a study keeps of a run's results, with their controls.

  That is the read-outs and chance, drifts, gains, retrieval, and the other protocols asked for.
  """
  def result(protocol: str) -> dict[str, Any]:
    empty = {'trained': [{'numbers': {}, 'controls': {}}]}
    return evaluated.get(protocol, empty).get('trained', empty['trained'])[0]

  def with_controls(protocol: str) -> dict[str, dict]:
    controls = result(protocol)['controls']
    return {row: {'true': mean_value(value),
                  **{name: mean_value(control) for name, control in controls.get(row, {}).items()}}
            for row, value in result(protocol)['numbers'].items()}
  chance = {name: result(protocol)['controls'][row]['chance']
            for name, (protocol, row) in _accuracies(evaluated).items()}
  more = [protocol for protocol in evaluated
          if PROTOCOLS[protocol].needs != 'labels' and protocol not in OWN_FIELDS]
  return {'readouts': readouts(evaluated, 'trained'),
          'untrained': readouts(evaluated, 'untrained'), 'chance': chance,
          'profile': {op: mean_value(v) for op, v in result('profile')['numbers'].items()},
          'gains': with_controls('gains'),
          'retrieval': {row: values for row, values in with_controls('retrieval').items()
                        if row.endswith('mrr')},
          'more': {protocol: with_controls(protocol) for protocol in more}}


def run(folder: pathlib.Path, number: int) -> None:
  """Train and read out the run `number` of the study in `folder`, and write its found.json.

  A run that was begun goes on from its newest checkpoint. In a job of several processes all of them
  train and evaluate, and process 0 writes.
  """
  from rich.console import Console

  from equivariant_ssl.evaluate import evaluation
  from equivariant_ssl.evaluate.protocols import Options
  from equivariant_ssl.storage import record
  from equivariant_ssl.training.loop import train
  from equivariant_ssl.training.runs import keep_compiled_programs
  keep_compiled_programs()
  plan = study_plan.read(folder)
  planned, start = study_plan.runs(plan)[number], time.perf_counter()
  if processes.from_main(lambda: is_done(folder, planned)):  # a job of SLURM's, submitted again
    return
  workdir = folder / planned.workdir
  train(study_plan.run_config(plan, planned), workdir,
        f'{plan["command"]} # run {planned.name}', quiet=True)
  stop.raise_if_stopped()
  options = Options(targets=tuple(plan['transfer']), root=plan['root'], readout=plan['readout'])
  protocols = [*study_plan.PROTOCOLS, *plan['protocols'],
               *(['transfer'] if plan['transfer'] else [])]
  evaluated = evaluation.evaluate(workdir, protocols, options=options,
                                  console=Console(quiet=True), strict=False,
                                  untrained=planned.arm == plan['made'][0]['name'])
  if not processes.is_main():
    return
  log = record.read_metrics(workdir)
  environment = json.loads((workdir / 'env.json').read_text(encoding='utf-8'))
  content = summary(evaluated) | {'spread': log[-1].get('std') if log else None,
                                  'git': environment['git'],
                                  'seconds': time.perf_counter() - start}
  record.write_atomically(workdir / 'found.json', json.dumps(content, indent=1) + '\n')


def read_test_split(folder: pathlib.Path, plan: dict[str, Any], planned: PlannedRun) -> None:
  """Read out a run of the recommended arm on the test split, once, and write its test.json."""
  from rich.console import Console

  from equivariant_ssl.evaluate import evaluation
  from equivariant_ssl.evaluate.protocols import Options
  from equivariant_ssl.storage import record
  from equivariant_ssl.training.runs import keep_compiled_programs
  keep_compiled_programs()
  workdir = folder / planned.workdir
  protocols = [*(protocol
                 for protocol in evaluation.protocol_names([*READOUTS.values(), *plan['protocols']])
                 if PROTOCOLS[protocol].needs == 'labels'),
               *(['transfer'] if plan['transfer'] else [])]
  options = Options(targets=tuple(plan['transfer']), root=plan['root'], readout='test')
  with contextlib.ExitStack() as until_written:  # the last jobs of an array may end together
    processes.from_main(lambda: bool(until_written.enter_context(record.lock_folder(workdir))))
    if processes.from_main(lambda: is_done(folder, planned, 'test')):
      return
    evaluated = evaluation.evaluate(workdir, protocols, console=Console(quiet=True), strict=False,
                                    untrained=False, options=options)
    content = {'readouts': readouts(evaluated, 'trained')}
    if processes.is_main():
      record.write_atomically(workdir / 'test.json', json.dumps(content, indent=1) + '\n')


def end_of_array(folder: pathlib.Path, plan: dict[str, Any]) -> None:
  """Read out the recommended arm on the test split, if every run of the study is over.

  Each job of an array calls this at its end, so the last one finds that all are over.
  """
  names = processes.from_main(lambda: list(unread_runs(results(folder, plan, {}))))
  for planned in [planned for planned in study_plan.runs(plan) if planned.name in names]:
    try:
      read_test_split(folder, plan, planned)
    except UserError as error:
      if error.code != IN_USE:  # another job was as late, and reads it out
        raise


def run_of_array(folder: pathlib.Path, plan: dict[str, Any], number: int, local: bool) -> None:
  """Do `run`; if it fails for good, write its failed.json, which says why.

  A job of an array then goes on to `end_of_array`, as it may be the last one.
  """
  import jax

  from equivariant_ssl.storage import record
  failed = folder / study_plan.runs(plan)[number].workdir / 'failed.json'
  try:
    if processes.is_main():
      failed.unlink(missing_ok=True)  # of an earlier try
    run(folder, number)
  except UserError as error:
    if error.code in (IN_USE, PREEMPTED, WATCHDOG, INPUT_OUTPUT) or not processes.is_main():
      raise
    failed.parent.mkdir(parents=True, exist_ok=True)
    record.write_atomically(failed, json.dumps({'error': str(error).splitlines()[0]}) + '\n')
    if not local and jax.process_count() == 1:  # other processes may not have come so far
      end_of_array(folder, plan)
    raise
  if not local:
    end_of_array(folder, plan)


def main() -> int:
  """Do what the command line says; return the exit code."""
  folder, number = pathlib.Path(sys.argv[1]), int(sys.argv[2])
  local = os.environ.get('EQSSL_STUDY') == 'local'
  if local:
    _end_with_parent()
  try:
    if not local:
      processes.initialize()  # `srun` may start several processes for one run
    with stop.listen(), processes.explain_lost_process():
      plan = study_plan.read(folder)
      if sys.argv[3:] == ['test']:
        read_test_split(folder, plan, study_plan.runs(plan)[number])
        return OK
      run_of_array(folder, plan, number, local)
  except UserError as error:
    stop.say(f'eqssl: {error}')
    return error.code
  return OK


if __name__ == '__main__':
  code = main()
  stop.flush_output()
  os._exit(code)  # the thread that reads standard input would keep a clean exit waiting

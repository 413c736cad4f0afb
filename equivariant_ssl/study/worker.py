"""One run of a study in a process of its own: python -m equivariant_ssl.study.worker FOLDER NUMBER."""
import json
import os
import pathlib
import signal
import sys
import threading
import time

from equivariant_ssl.errors import IN_USE, OK, UserError
from equivariant_ssl.evaluate.protocols import PROTOCOLS
from equivariant_ssl.evaluate.statistics import mean_std, plain
from equivariant_ssl.study import recommend
from equivariant_ssl.study import study_plan as plans
from equivariant_ssl.training import stop


def _end_with_parent() -> None:
  """Stop, with everything saved, when the study that started this process is gone: its end of stdin closes."""
  def watch() -> None:
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGTERM)
  threading.Thread(target=watch, daemon=True).start()


def _accuracies(found: dict[str, dict]) -> dict[str, tuple[str, str]]:
  """{read-out: (protocol, row)} of the accuracies in results of `evaluate.run`."""
  named = {p: name for name, p in plans.READOUTS.items()} | {'linear': 'linear probe'}
  rows = {p: f['trained'][0]['numbers'] for p, f in found.items() if PROTOCOLS[p].needs == 'labels'}
  out = {named.get(p, p): (p, 'top1') for p in (*plans.READOUTS.values(), *rows) if 'top1' in rows.get(p, ())}
  return out | {row: ('episodes', row) for row in rows.get('episodes', ())}


def readouts(found: dict[str, dict], who: str) -> dict[str, float]:
  """{read-out: fraction} of results of `evaluate.run`, of the 'trained' or 'untrained' network: the mean over the
  evaluation's seeds."""
  over = lambda p, row: mean_std([plain(one['numbers'][row]) for one in found[p][who]])[0]
  out = {name: over(p, row) for name, (p, row) in _accuracies(found).items() if who in found[p]}
  if who in found.get('transfer', ()):
    out |= {f'transfer {row}': over('transfer', row) for row in found['transfer'][who][0]['numbers']}
  return out


def read(found: dict[str, dict]) -> dict:
  """What the study keeps of a run's results: read-outs and chance, drifts, gains, retrieval and whatever else was asked
  for, with their controls."""
  of = lambda name: found.get(name, {}).get('trained', [{'numbers': {}, 'controls': {}}])[0]
  controlled = lambda name: {row: {'true': plain(v), **{k: plain(c) for k, c in of(name)['controls'].get(row, {}).items()}}
                             for row, v in of(name)['numbers'].items()}
  chance = {name: of(p)['controls'][row]['chance'] for name, (p, row) in _accuracies(found).items()}
  more = [p for p in found if PROTOCOLS[p].needs != 'labels' and p not in ('profile', 'gains', 'retrieval', 'transfer')]
  return {'readouts': readouts(found, 'trained'), 'untrained': readouts(found, 'untrained'), 'chance': chance,
          'profile': {op: plain(v) for op, v in of('profile')['numbers'].items()}, 'gains': controlled('gains'),
          'retrieval': {k: v for k, v in controlled('retrieval').items() if k.endswith('mrr')},
          'more': {p: controlled(p) for p in more}}


def run(folder: pathlib.Path, number: int) -> None:
  """Train and read out run `number` of the study in `folder`, from where it was; what it found, in found.json."""
  from rich.console import Console

  from equivariant_ssl.evaluate import evaluation as evaluations
  from equivariant_ssl.evaluate.protocols import Options
  from equivariant_ssl.storage import record
  from equivariant_ssl.training.loop import train
  from equivariant_ssl.training.runs import keep_programs
  keep_programs()
  plan = plans.read(folder)
  mine, start = plans.runs(plan)[number], time.perf_counter()
  if plans.done(folder, mine):  # a job of SLURM's that was submitted again
    return
  workdir = folder / mine.workdir
  train(plans.config(plan, mine), workdir, f'{plan["command"]} # run {mine.name}', quiet=True)
  stop.check()
  options = Options(targets=tuple(plan['transfer']), root=plan['root'], readout=plan['readout'])
  asked = [*plans.PROTOCOLS, *plan['protocols'], *(['transfer'] if plan['transfer'] else [])]
  found = evaluations.evaluate(workdir, asked, options=options, console=Console(quiet=True), strict=False,
                               untrained=mine.arm == plan['made'][0]['name'])
  log = record.read_metrics(workdir)
  kept = read(found) | {'spread': log[-1].get('std') if log else None,
                        'git': json.loads((workdir / 'env.json').read_text(encoding='utf-8'))['git'],
                        'seconds': time.perf_counter() - start}
  record.write_whole(workdir / 'found.json', json.dumps(kept, indent=1) + '\n')


def test(folder: pathlib.Path, plan: dict, mine: plans.Run) -> None:
  """Read out a run, of the arm that is recommended, on the test split, once; what it found, in test.json."""
  from rich.console import Console

  from equivariant_ssl.evaluate import evaluation as evaluations
  from equivariant_ssl.evaluate.protocols import Options
  from equivariant_ssl.storage import record
  from equivariant_ssl.training.runs import keep_programs
  keep_programs()
  workdir, every = folder / mine.workdir, evaluations.chosen([*plans.READOUTS.values(), *plan['protocols']])
  asked = [*(p for p in every if PROTOCOLS[p].needs == 'labels'), *(['transfer'] if plan['transfer'] else [])]
  with record.lock(workdir):  # the last jobs of an array may end together
    if plans.done(folder, mine, 'test'):
      return
    found = evaluations.evaluate(workdir, asked, console=Console(quiet=True), strict=False, untrained=False, options=Options(
        targets=tuple(plan['transfer']), root=plan['root'], readout='test'))
    record.write_whole(workdir / 'test.json', json.dumps({'readouts': readouts(found, 'trained')}, indent=1) + '\n')


def last(folder: pathlib.Path, plan: dict) -> None:
  """What the last job of an array does, when its own run is done: read out the recommended arm on the test split."""
  todo = recommend.untested(plans.results(folder, plan, {}))
  for mine in [r for r in plans.runs(plan) if r.name in todo]:
    try:
      test(folder, plan, mine)
    except UserError as e:
      if e.code != IN_USE:  # another job was as late, and is at it
        raise


def main() -> int:
  folder, number, local = pathlib.Path(sys.argv[1]), int(sys.argv[2]), os.environ.get('EQSSL_STUDY') == 'local'
  if local:
    _end_with_parent()
  try:
    with stop.heard():
      plan = plans.read(folder)
      if sys.argv[3:] == ['test']:
        test(folder, plan, plans.runs(plan)[number])
        return OK
      run(folder, number)
      if not local:
        last(folder, plan)
  except UserError as e:
    stop.say(f'eqssl: {e}')
    return e.code
  return OK


if __name__ == '__main__':
  code = main()
  stop.flush()
  os._exit(code)  # the thread that reads stdin would keep a clean exit waiting

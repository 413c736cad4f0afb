"""Evaluate checkpoints of runs: every number has its protocol's name, the untrained network and its
controls beside it."""
import functools
import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from rich.console import Console

from equivariant_ssl.data import card, holdout
from equivariant_ssl.errors import BAD_DATA, USAGE, UserError
from equivariant_ssl.evaluate import evaluation_plan, inputs
from equivariant_ssl.evaluate.frozen import Frozen, frozen
from equivariant_ssl.evaluate.panel_protocols import panel_features
from equivariant_ssl.evaluate.protocols import GROUPS, PROTOCOLS, labeled_features
from equivariant_ssl.evaluate.result_files import as_json, definition, stored_result, weights_digest
from equivariant_ssl.evaluate.result_table import table
from equivariant_ssl.evaluate.statistics import few_images_warning, images_classified
from equivariant_ssl.evaluate.subject import (
  Options,
  Protocol,
  Subject,
  config_of,
  process_state,
  source_of,
)
from equivariant_ssl.parallel import processes
from equivariant_ssl.registry import unknown_name
from equivariant_ssl.storage import checkpoint, record
from equivariant_ssl.training import runs
from equivariant_ssl.training.state import TrainState

WIDTH = 120  # the width of tables that go into a file, in characters


def protocol_names(names: list[str]) -> list[str]:
  """Return the protocols that `names` (protocols or groups; none means the default ones) stand for;
  UserError for an unknown name."""
  protocols = []
  for name in names or ['default']:
    if name not in PROTOCOLS and name not in GROUPS:
      raise unknown_name('protocol', name, [*PROTOCOLS, *GROUPS])
    protocols += [n for n in GROUPS.get(name, (name,)) if n not in protocols]
  return protocols


def _data_text(config: Any) -> str:
  """Return what a message calls the data of a config: 'the data (PATH)'."""
  return f'the data ({config.data.get("path") or config.data.get("dataset") or config.data.name})'


def unmet_need(run: runs.Run, needs: str) -> tuple[str, str] | None:
  """Return (cause, fix) where the run lacks what a protocol `needs`, else None."""
  source, config = source_of(run), config_of(run)
  labels = source.bank.labels
  if needs == 'labels' and labels is not None and source.test is None:
    return (f'{_data_text(config)} have no test split',
            'Train with --config.data.test=.1 (a share of a folder) or --config.data.test=SPLIT '
            '(of a TFDS data set); --protocol equivariance needs none.')
  if needs == 'labels' and (labels is None or source.test is None or source.test.labels is None):
    return (f'{_data_text(config)} have no labels',
            'Train on class folders, or with --config.data.labeled=SPLIT of a TFDS data set; '
            '--protocol equivariance needs none.')
  if needs == 'target' and not any(
      e.predicts == 'target' for e in run.recipe.equivariances.values()):
    return ('the run has no objective that predicts an embedding',
            'Train with --config.equivariance=equimod.')


def _path(workdir: pathlib.Path, name: str, options: Options) -> pathlib.Path:
  """Return the result file of protocol `name`, which names the options that it was given."""
  settings = (('epochs', options.epochs), ('batch', options.batch),
              ('', pathlib.Path(options.images).stem), ('', options.readout))
  suffix = ''.join(f'-{k}{v}' for k, v in settings if v)
  return workdir / 'eval' / f'{name}{suffix}.json'


def _subjects(run: runs.Run, states: dict[str, Callable], options: Options
              ) -> Callable[[str, int], Subject]:
  """Return (network, seed) -> Subject, for the networks 'trained' and 'untrained'.

  What several protocols read is computed once. states: {network: () -> its state}.
  """
  functions = frozen(run.recipe, run.config)

  def once(compute: Callable, network: str) -> Callable[[], Any]:
    return functools.cache(lambda: compute(run, functions, states[network]()))

  def panel_alone(run: runs.Run, functions: Frozen, state: TrainState) -> Any:
    return panel_features(run, functions, process_state(state))
  labeled = {network: once(labeled_features, network) for network in states}
  panel = {network: once(panel_alone, network) for network in states}
  return lambda network, seed: Subject(run, functions, states[network](), labeled[network],
                                       panel[network], jax.random.key(seed), options)


def _write(path: pathlib.Path, run: runs.Run, result: dict, readout: str, console: Console,
           strict: bool) -> dict:
  """Write a result to its file, and return it as the file holds it.

  What the result misses is printed; strict: UserError where nothing was measured. readout: which
  images it is read out on.
  """
  result = as_json({**result, 'steps': run.recipe.steps, 'seed': run.config.seed,
                    'readout': readout, 'environment': record.environment()})
  for line in result['trained'][0]['missing']:
    console.print(line)
  if not result['trained'][0]['numbers'] and strict:
    raise UserError(f'{result["protocol"]}: nothing that it needs is on disk.',
                    'Each line above ends with the command that makes what is missing.', BAD_DATA)
  path.parent.mkdir(exist_ok=True)
  record.write_atomically(path, json.dumps(result, indent=1) + '\n')
  return result


class Evaluation(NamedTuple):
  """One evaluation of one checkpoint: what all of its protocols share.

  states: {network: () -> its state}. subject: (network, seed) -> Subject. about: the fields that
  all result files have. seeds: the seeds of the protocols' own draws.
  options: the options that the user gave.
  """
  workdir: pathlib.Path
  run: runs.Run
  states: dict[str, Callable]
  subject: Callable[[str, int], Subject]
  about: dict[str, Any]
  seeds: tuple[int, ...]
  options: Options
  console: Console
  strict: bool


def _measure(protocol: Protocol, s: Subject) -> Any:
  """Return what a protocol measures of a network, in each process of a job."""
  if protocol.together:
    return protocol.measure(s)
  if protocol.reads == 'features':
    s.labeled_features()  # all processes compute them; process 0 alone would wait for ever
  return processes.from_main(lambda: as_json(protocol.measure(s.alone)))


def _result(e: Evaluation, name: str, protocol: Protocol) -> dict:
  """Return the result of protocol `name`: the stored one where it is valid, else a new one."""
  seeds = list(e.seeds if protocol.seeded else e.seeds[:1])
  about = e.about | {'protocol': name, 'seeds': seeds, 'definition': definition(protocol)}
  about |= {'data': processes.from_main(lambda: as_json(protocol.data(e.run, e.options)))}
  path = _path(e.workdir, name, e.options)
  result = processes.from_main(lambda: stored_result(path, about, e.states, e.console.print))
  if result is not None:
    return result
  numbers = {network: [_measure(protocol, e.subject(network, seed)) for seed in seeds]
             for network in e.states}
  return processes.from_main(lambda: _write(path, e.run, about | numbers, e.about['readout'],
                                            e.console, e.strict))


def _open(workdir: pathlib.Path, run: runs.Run, step: int | None, seeds: tuple[int, ...],
          options: Options, readout: str, console: Console, strict: bool, untrained: bool
          ) -> Evaluation:
  """Return the Evaluation of the newest valid checkpoint of a run, or of that of `step`."""
  number, state = checkpoint.load_checkpoint(workdir / 'checkpoints', runs.abstract_state(run),
                                             step, console.print)[:2]
  states: dict[str, Callable] = {'trained': lambda: state}
  if untrained:
    states['untrained'] = functools.cache(lambda: runs.initial_state(run))
  cache = options.cache or str(workdir / 'eval' / 'features')
  run_inputs = inputs.split_inputs(run.recipe.size, source_of(run).train)
  about = {'checkpoint': number, 'digest': weights_digest(state), 'options': as_json(options),
           'readout': readout, 'inputs': inputs.definition(run_inputs)}
  return Evaluation(workdir, run, states, _subjects(run, states, options._replace(cache=cache)),
                    about, seeds, options, console, strict)


def _without_lacking(run: runs.Run, names: list[str], console: Console, strict: bool) -> list[str]:
  """Return the protocols of `names` that the run can have; what it cannot have is printed.

  strict: UserError where a protocol that `names` lists by its own name is among the latter.
  """
  reasons = {n: unmet_need(run, PROTOCOLS[n].needs) for n in protocol_names(names)}
  for n, reason in reasons.items():
    if reason and n in names and strict:
      raise UserError(f'{n}: {reason[0]}.', reason[1])
    if reason:
      console.print(f'{n} left out: {reason[0]}')
  return [n for n, reason in reasons.items() if not reason]


def _affordable(e: Evaluation, names: list[str]) -> list[str]:
  """Return those of `names` that the size of the data allows; the others are printed."""
  reasons = evaluation_plan.too_costly(e.subject('trained', e.seeds[0]), names)
  for name, reason in reasons.items():
    e.console.print(f'{name} left out: {reason}. To measure it anyway: --protocol {name}')
  return [name for name in names if name not in reasons]


def _print_plan(e: Evaluation, names: list[str]) -> dict[str, dict]:
  """Print what an evaluation costs; it has no results."""
  plan = evaluation_plan.make_plan(e.subject('trained', e.seeds[0]), names)
  for line in evaluation_plan.lines(plan, len(e.states)):
    e.console.print(line, highlight=False)
  return {}


def _print_warnings(results: dict[str, dict], console: Console) -> None:
  """Print once where the results classify few test images."""
  warnings = map(few_images_warning, map(images_classified, results.values()))
  for line in dict.fromkeys(filter(None, warnings)):
    console.print(line)


def evaluate(workdir: pathlib.Path, names: list[str], step: int | None = None,
             seeds: tuple[int, ...] = (0,), options: Options = Options(),
             console: Console | None = None, strict: bool = True, untrained: bool = True,
             data_request: runs.DataRequest = runs.DataRequest(), plan: bool = False
             ) -> dict[str, dict]:
  """Evaluate the newest valid checkpoint (or that of `step`) of a run under protocols.

  It prints tables, writes eval/PROTOCOL.json, and returns {protocol: what was written}. A stored
  result of the same weights, data, pixels, protocol and options is read, not computed again; where
  it is computed again, a line says why.

  names: protocols of PROTOCOLS or GROUPS; [] means the group of default ones. Of a group, what the
  run cannot have, and what would take too long, is left out with a line. seeds: the seeds of the
  protocols' own draws. strict: raise UserError where a protocol that is listed by name cannot be
  measured (where the data are the reason, after the other protocols); else it is left out.
  untrained: measure the network at its initialization too. data_request: what the user says of the
  data, where these have moved or differ from what the run knows (UserError OTHER_DATA). plan: print
  what it costs, and stop.

  In a job of several processes each calls this; process 0 prints and writes.
  """
  console = console or Console(soft_wrap=True, width=None if sys.stdout.isatty() else WIDTH)
  if not processes.is_main():
    console = Console(quiet=True)
  protocol_names(names)  # an unknown name is reported before the data are read
  processes.agree('the argument', {'DIR': str(workdir), 'protocol': names, 'step': step,
                                   'seeds': seeds, **as_json(options)})
  run = runs.reopen_run(workdir, None, console.print,
                        data_request._replace(readout=options.readout))
  processes.agree("the data's", card.card_facts(run.card))
  validation = config_of(run).validation
  readout = holdout.readout_name(validation, options.readout)
  # '' means: as the run says.
  options = options._replace(readout='test' if readout == 'test' and validation else '')
  measurable = _without_lacking(run, names, console, strict)
  e = _open(workdir, run, step, seeds, options, readout, console, strict, untrained)
  if plan:
    return _print_plan(e, measurable)
  affordable = _affordable(e, [name for name in measurable if name not in names])
  measurable = [name for name in measurable if name in names or name in affordable]
  results, failed = {}, {}
  for name in measurable:
    try:
      results[name] = _result(e, name, PROTOCOLS[name])
    except UserError as error:
      if error.code != USAGE:  # with USAGE it cannot be measured on these data, but others can
        raise
      failed[name] = error
      console.print(f'{name} left out: {str(error).splitlines()[0]}')
      continue
    step_text = f'step {e.about["checkpoint"]} of {run.recipe.steps}'
    title = f'{workdir.name}, {step_text}, on the {readout} images'
    console.print(table(results[name], title))
  _print_warnings(results, console)
  console.print(f'Written to {workdir / "eval"}')
  for name in [n for n in failed if n in names and strict]:
    raise UserError(f'{name}: {failed[name]}')
  return results

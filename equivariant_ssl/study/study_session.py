"""One call of `eqssl study`: it plans or reads a study, does its runs, and prints what they say."""
import pathlib
import shlex
import sys
import time
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from equivariant_ssl.errors import UserError
from equivariant_ssl.parallel.sharding import mesh
from equivariant_ssl.storage import record
from equivariant_ssl.study import study_plan
from equivariant_ssl.study.effect_sentences import seed_count
from equivariant_ssl.study.runner import Say, devices, execute, slurm, write_results
from equivariant_ssl.study.study_plan import Settings
from equivariant_ssl.study.study_results import results
from equivariant_ssl.training.runs import prepare_run


def show(content: dict[str, Any], console: Console) -> None:
  """Print the table of arms, the recommendation, and a sentence for each effect and proxy.

  The sentences are those on the first read-out. content: the content of results.json.
  """
  names = list(dict.fromkeys(row['readout'] for row in content['table']))
  if names:
    console.print(_arm_table(content, names))
  for line in [*content['recommendation'], *content['verdict']]:
    console.print(line, markup=False)
  for effect in content['effects']:
    if effect['readout'] == names[0]:
      console.print(effect['sentence'], markup=False)
  for proxy in content['proxies']:
    if proxy['readout'] == names[0]:
      console.print(_proxy_sentence(proxy, content['readout']), markup=False)


def _arm_table(content: dict[str, Any], names: list[str]) -> Table:
  """Return the accuracies of chance, of the untrained network, and of each arm."""
  cells = {(row['arm'], row['readout']): row for row in content['table']}
  table = Table(title=f'accuracy on the {content["readout"]} images, %: '
                      'mean ± standard deviation over seeds')
  for column in ('arm', *names, 'n'):
    table.add_column(column, justify='left' if column == 'arm' else 'right', overflow='fold')
  for reference in ('chance', 'untrained'):
    values = content[reference]
    table.add_row(reference, *(f'{100 * values[name]:.1f}' if name in values else ''
                               for name in names), '')

  def accuracy(row: dict[str, Any] | None) -> str:
    if row is None:
      return ''
    deviation = f' ± {100 * row["std"]:.1f}' if row['std'] is not None else ''
    return f'{100 * row["mean"]:.1f}{deviation}'
  for arm in dict.fromkeys(row['arm'] for row in content['table']):
    rows = [cells.get((arm, name)) for name in names]
    table.add_row(arm, *map(accuracy, rows), str(max(row['n'] for row in rows if row)))
  return table


def _proxy_sentence(proxy: dict[str, Any], images: str) -> str:
  interval = f' [{proxy["low"]:.2f}, {proxy["high"]:.2f}]' if proxy['low'] is not None else ''
  effects = (f', and the effects with {proxy["effects"]:.2f}'
             if proxy['effects'] is not None else '')
  return (f'{proxy["budget"]:g} of the budget ranks the {proxy["n"]} arms, on the {images} images, '
          f'as the full budget does with a correlation of {proxy["rank"]:.2f}{interval}{effects}.')


def _check_arguments(launcher: str, workers: int) -> None:
  if launcher not in ('local', 'slurm'):
    raise UserError(f'--launcher {launcher} is not known.', 'Give local or slurm.')
  if workers < 0:
    raise UserError(f'--workers {workers} is not a number of runs side by side.',
                    'Give 0 for as many as fit, or leave it out.')


def study(folder: pathlib.Path, settings: Settings | None, command: str, launcher: str = 'local',
          workers: int = 0, collect: bool = False,
          console: Console | None = None) -> dict[str, Any]:
  """Do the study of `settings` in `folder`, or, where they are None, go on with the one in it.

  Prints what the study found and writes results.json, table.csv and report.html. What is done
  already is not done again. collect: start no run. Returns the content of results.json.
  """
  console = console or Console(soft_wrap=True, width=None if sys.stdout.isatty() else 120)
  _check_arguments(launcher, workers)
  start, folder = time.perf_counter(), pathlib.Path(folder).absolute()

  def say(text: str) -> None:
    console.print(text, markup=False, highlight=False)
  jax.config.update('jax_platforms', 'cpu')  # the devices are the workers'
  # A mistake in the settings is reported before anything that takes time.
  plan = study_plan.make_plan(settings, command, {}) if settings else study_plan.read(folder)
  environment, fit = devices()
  plan |= {'environment': environment} if settings else {}
  backend = environment['backend']
  if workers > fit and backend != 'cpu' and launcher == 'local':
    raise UserError(f'--workers {workers}: this machine has {backend} devices for {fit} runs.',
                    f'Run one on each device: --workers {fit}')
  runs = study_plan.runs(plan)
  config = study_plan.run_config(plan, runs[0])
  if not collect:  # what no run could do is reported before any run starts
    prepared = prepare_run(config, mesh(jax.devices()[:1]))
    study_plan.check_steps(plan, prepared.recipe.steps_per_epoch)
  with record.lock_folder(folder):
    study_plan.write(folder, plan)
    length = f'{config.steps} steps' if config.steps else f'{config.epochs:g} epochs'
    say(f'{len(plan["made"])} arms x {seed_count(len(plan["seeds"]))}, {length}, equal '
        f'{plan["equal"]}, read out on {study_plan.readout_images(plan)}: {len(runs)} runs')
    if launcher == 'slurm' and not collect:
      slurm(folder, plan, workers, say)
      return results(folder, plan, {})
    failed = {} if collect else execute(folder, plan, backend, workers or fit, say)
    content = results(folder, plan, failed)
    write_results(folder, content)
  show(content, console)
  _report(folder, failed, len(runs), start, say)
  return content


def _report(folder: pathlib.Path, failed: dict[str, str], runs: int, start: float,
            say: Say) -> None:
  """Write report.html and print where it is; raise UserError where runs failed.

  start: when the study began, in seconds of time.perf_counter.
  """
  for name, why in failed.items():
    say(f'failed: {name}: {why}')
  from equivariant_ssl import report
  page = report.report([folder])
  minutes = (time.perf_counter() - start) / 60
  say(f'{minutes:.1f} minutes. Report: {page}  Table: {folder / "table.csv"}')
  if failed:
    name, why = next(iter(failed.items()))
    raise UserError(f'{len(failed)} of {runs} runs failed, the first of them {name}: {why}',
                    f'Their logs are log.txt in {folder}/runs/. To try them again: '
                    f'eqssl study --resume {shlex.quote(str(folder))}')

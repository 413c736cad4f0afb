"""Evaluate checkpoints of runs: every number with its protocol's name, the untrained network and controls beside it."""
import functools
import json
import pathlib
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
from rich.console import Console, ConsoleOptions
from rich.table import Table

from equivariant_ssl.data import holdout
from equivariant_ssl.errors import BAD_DATA, USAGE, UserError
from equivariant_ssl.evaluate import inputs
from equivariant_ssl.evaluate.frozen import frozen
from equivariant_ssl.evaluate.protocols import DEFAULT, GROUPS, PROTOCOLS, Options, Subject, applied, arrays
from equivariant_ssl.evaluate.result_files import as_json, definition, digest, kept
from equivariant_ssl.evaluate.statistics import Interval, mean_std, plain, show
from equivariant_ssl.registry import unknown_name
from equivariant_ssl.storage import checkpoint, record
from equivariant_ssl.training import runs

WIDTH = 120  # of tables that go into a file
HEAD = 10    # letters in a line of a narrow column's head


def chosen(names: list[str]) -> list[str]:
  """The protocols that `names` (protocols, groups, none for the default) mean; UserError for an unknown one."""
  found = []
  for name in names or DEFAULT:
    if name not in PROTOCOLS and name not in GROUPS:
      raise unknown_name('protocol', name, [*PROTOCOLS, *GROUPS])
    found += [n for n in GROUPS.get(name, (name,)) if n not in found]
  return found


def lacks(run: runs.Run, needs: str) -> tuple[str, str] | None:
  """(cause, fix) where the run cannot have a protocol of these `needs`."""
  source, labels = run.source, run.source.bank.labels
  if needs == 'labels' and labels is not None and source.test is None:
    return (f'{run.config.data.name} has no test split', 'Train with --config.data.test=.1 (a share of a folder) or '
            '--config.data.test=SPLIT (of a TFDS data set); --protocol equivariance needs none.')
  if needs == 'labels' and (labels is None or source.test is None or source.test.labels is None):
    return (f'{run.config.data.name} has no labels', 'Train on class folders, or with --config.data.labelled=SPLIT of a '
            'TFDS data set; --protocol equivariance needs none.')
  if needs == 'target' and not any(e.predicts == 'target' for e in run.recipe.equivariances.values()):
    return ('the run has no objective that predicts an embedding', 'Train with --config.equivariance.name=equimod.')


def _path(workdir: pathlib.Path, name: str, options: Options) -> pathlib.Path:
  listed = pathlib.Path(options.images).stem
  given = ('epochs', options.epochs), ('batch', options.batch), ('', listed), ('', options.readout)
  changed = ''.join(f'-{k}{v}' for k, v in given if v)
  return workdir / 'eval' / f'{name}{changed}.json'


def _number(value: Any, scale: float) -> str:
  """A value of a result file: '46.10', or with its interval."""
  if isinstance(value, dict):
    return show(Interval(**value), scale, sign=False)
  return f'{scale * value:.2f}'


def _over_seeds(found: list[dict], row: str, scale: float) -> str:
  """One seed's value of a row, or the mean ± std of several."""
  values = [f['numbers'][row] for f in found]
  if len(values) == 1:
    return _number(values[0], scale)
  mean, std = mean_std([plain(v) for v in values])
  return f'{scale * mean:.2f} ± {scale * std:.2f}'


class Fitting(NamedTuple):
  """The first of `tables` that is no wider than the console; the last, its cells folded, where none is."""
  tables: tuple[Table, ...]

  def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table]:
    endless = options.update(max_width=10_000)
    fit = (t for t in self.tables if console.measure(t, options=endless).maximum <= options.max_width)
    yield next(fit, self.tables[-1])


def _laid(title: str, columns: Iterable[str], rows: Iterable[Iterable[str]]) -> Table:
  """Rows under `columns`, the first to the left; a cell that does not fit is folded, not cut."""
  out = Table(title=title)
  for i, column in enumerate(columns):
    out.add_column(column, justify='right' if i else 'left', overflow='fold')
  for row in rows:
    out.add_row(*row)
  return out


def table(found: dict, title: str) -> Fitting:
  """A result file as a table: a row a number, a column a control; on a narrow console an interval is under its mean, on
  a narrower one what is beside a number is under it."""
  percent, first = PROTOCOLS[found['protocol']].percent, found['trained'][0]
  scale = 100. if percent else 1.
  controls = dict.fromkeys(c for row in first['controls'].values() for c in row)
  who = [w for w in ('trained', 'untrained') if w in found]
  cells = {row: {**{w: _over_seeds(found[w], row, scale) for w in who},  # the controls' intervals are in the file
                 **{c: _number(plain(v), 1. if c.startswith('ratio') else scale)
                    for c, v in first['controls'].get(row, {}).items()}} for row in first['numbers']}
  heads, title = [*who, *controls], f'{title}: {first["name"]}{", %" if percent else ""}'
  wide = [(row, *(of.get(h, '') for h in heads)) for row, of in cells.items()]
  under = [(row, *(cell.replace(' [', '\n[') for cell in of)) for row, *of in wide]
  beneath = [(f'{row}, {h}' if h == who[0] else f'  {h}', of[h]) for row, of in cells.items() for h in heads if h in of]
  return Fitting((_laid(title, ['', *heads], wide),
                  _laid(title, ['', *('\n'.join(textwrap.wrap(h, HEAD)) for h in heads)], under),
                  _laid(title, ['number', 'value'], beneath)))


def _subjects(run: runs.Run, of: dict[str, Callable], options: Options) -> Callable[[str, int], Subject]:
  """(who, seed) -> Subject; what several protocols read is computed once. of: {who: () -> its state}."""
  fixed = frozen(run.recipe, run.config)
  read, moved = ({who: functools.cache(lambda who=who, f=f: f(run, fixed, of[who]())) for who in of}
                 for f in (arrays, applied))
  return lambda who, seed: Subject(run, fixed, of[who](), read[who], moved[who], jax.random.key(seed), options)


def _written(path: pathlib.Path, run: runs.Run, found: dict, on: str, console: Console, strict: bool) -> dict:
  """A result in its file, as that holds it; what it misses is said, and a UserError where that is all. on: the images
  that it is read out on."""
  found = as_json({**found, 'steps': run.recipe.steps, 'seed': run.config.seed, 'readout': on,
                  'environment': record.environment()})
  for line in found['trained'][0]['missing']:
    console.print(line)
  if not found['trained'][0]['numbers'] and strict:
    raise UserError(f'{found["protocol"]}: nothing that it needs is on disk.', 'Each line above ends with what makes it.',
                    BAD_DATA)
  path.parent.mkdir(exist_ok=True)
  record.write_whole(path, json.dumps(found, indent=1) + '\n')
  return found


def evaluate(workdir: pathlib.Path, names: list[str], step: int | None = None, seeds: tuple[int, ...] = (0,),
             options: Options = Options(), console: Console | None = None, strict: bool = True, untrained: bool = True,
             asked: runs.Asked = runs.Asked()) -> dict[str, dict]:
  """Evaluate the newest valid checkpoint (or that of `step`) of a run under protocols, print tables, write
  eval/PROTOCOL.json; {protocol: what was written}. A result of the same weights, data, pixels, protocol and options is read,
  not computed again; why another is not, is said.

  names: of PROTOCOLS or GROUPS; [] the default ones that the run can have (what it cannot is said). seeds: of the
  protocols' own draws. strict: raise UserError where a protocol that was asked for cannot be (on these data: when the others
  are done); else it is left out. untrained: measure the network at its initialisation too. asked: of the data, where they
  are not where the run says, or not what it knows (UserError OTHER_DATA).
  """
  console = console or Console(soft_wrap=True, width=None if sys.stdout.isatty() else WIDTH)
  which, failed = chosen(names), {}
  run = runs.reopen(workdir, None, console.print, asked._replace(readout=options.readout))
  on = holdout.named(run.config.validation, options.readout)
  options = options._replace(readout='test' if on == 'test' and run.config.validation else '')  # '': as the run says
  missing = {n: lacks(run, PROTOCOLS[n].needs) for n in which}
  for n, why in missing.items():
    if why and n in names and strict:
      raise UserError(f'{n}: {why[0]}.', why[1])
    if why:
      console.print(f'{n} left out: {why[0]}')
  number, state = checkpoint.load(workdir / 'checkpoints', runs.abstract(run), step, console.print)[:2]
  of = {'trained': lambda: state} | ({'untrained': functools.cache(lambda: runs.initial(run))} if untrained else {})
  subject = _subjects(run, of, options._replace(cache=options.cache or str(workdir / 'eval' / 'features')))
  about = {'checkpoint': number, 'digest': digest(state), 'options': as_json(options), 'readout': on,
           'inputs': inputs.definition(inputs.of(run.recipe.size, run.source.train))}
  results = {}
  for name in [n for n in which if not missing[n]]:
    protocol = PROTOCOLS[name]
    drawn = list(seeds if protocol.seeded else seeds[:1])
    here = about | {'protocol': name, 'seeds': drawn, 'definition': definition(protocol)}
    try:
      here |= {'data': as_json(protocol.data(run, options))}
      found = kept(_path(workdir, name, options), here, of, console.print)
      if found is None:
        numbers = {who: [protocol.find(subject(who, seed)) for seed in drawn] for who in of}
        found = _written(_path(workdir, name, options), run, here | numbers, on, console, strict)
    except UserError as e:
      if e.code != USAGE:  # else it cannot be on these data, and the others can
        raise
      failed[name] = e
      console.print(f'{name} left out: {str(e).splitlines()[0]}')
      continue
    results[name] = found
    console.print(table(found, f'{workdir.name}, step {number} of {run.recipe.steps}, on the {on} images'))
  console.print(f'Written to {workdir / "eval"}')
  for name in [n for n in failed if n in names and strict]:
    raise UserError(f'{name}: {failed[name]}')
  return results

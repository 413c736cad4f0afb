"""Evaluate checkpoints of runs: every number with its protocol's name, the untrained network and controls beside it."""
import functools
import hashlib
import json
import pathlib
import sys
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from equivariant_ssl import checkpoint, fingerprint, record, runs
from equivariant_ssl import config as configs
from equivariant_ssl.errors import UserError
from equivariant_ssl.evaluate.frozen import frozen, variables
from equivariant_ssl.evaluate.protocols import DEFAULT, GROUPS, PROTOCOLS, Options, Subject, applied, arrays
from equivariant_ssl.evaluate.statistics import Interval, mean_std, plain, show
from equivariant_ssl.modules import unknown
from equivariant_ssl.state import TrainState

WIDTH = 120  # of tables that go into a file


def as_json(value: Any) -> Any:
  """NamedTuples as objects, arrays as lists, for a result file."""
  if hasattr(value, '_asdict'):
    return {k: as_json(v) for k, v in value._asdict().items()}
  if isinstance(value, dict):
    return {k: as_json(v) for k, v in value.items()}
  if isinstance(value, (list, tuple)):
    return [as_json(v) for v in value]
  if isinstance(value, np.ndarray):
    return value.tolist()
  if isinstance(value, np.generic):
    return value.item()
  return value


def digest(state: TrainState) -> str:
  """A fingerprint of the weights and statistics of a state: what a result is valid for."""
  leaves = fingerprint.of(variables(state))
  return hashlib.sha256(json.dumps(leaves, sort_keys=True).encode()).hexdigest()[:16]


def chosen(names: list[str]) -> list[str]:
  """The protocols that `names` (protocols, groups, none for the default) mean; UserError for an unknown one."""
  found = []
  for name in names or DEFAULT:
    if name not in PROTOCOLS and name not in GROUPS:
      raise unknown('protocol', name, [*PROTOCOLS, *GROUPS])
    found += [n for n in GROUPS.get(name, (name,)) if n not in found]
  return found


def lacks(run: runs.Run, needs: str) -> tuple[str, str] | None:
  """(cause, fix) where the run cannot have a protocol of these `needs`."""
  source = run.source
  if needs == 'labels' and (source.train.labels is None or source.test is None or source.test.labels is None):
    return f'{run.config.data.name} has no labels', 'Class folders give labels; --protocol equivariance needs none.'
  if needs == 'target' and not any(e.predicts == 'target' for e in run.recipe.equivariances.values()):
    return ('the run has no objective that predicts an embedding', 'Train with --config.equivariance.name=equimod.')


def _path(workdir: pathlib.Path, name: str, options: Options) -> pathlib.Path:
  listed = pathlib.Path(options.images).stem
  changed = ''.join(f'-{k}{v}' for k, v in (('epochs', options.epochs), ('batch', options.batch), ('', listed)) if v)
  return workdir / 'eval' / f'{name}{changed}.json'


def _cached(path: pathlib.Path, about: dict, who: Iterable[str]) -> dict | None:
  """The result in `path` where it is complete, of `who`, and of the same checkpoint under the same conditions."""
  try:
    found = json.loads(path.read_text())
  except (OSError, json.JSONDecodeError):
    return None
  whole = not any(f.get('missing') for f in found.get('trained', ()))
  return found if whole and set(who) <= found.keys() and all(found.get(k) == v for k, v in about.items()) else None


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


def table(found: dict, title: str) -> Table:
  """A result file as a table: a row a number, a column a control."""
  percent = PROTOCOLS[found['protocol']].percent
  scale = 100. if percent else 1.
  controls = list(dict.fromkeys(c for row in found['trained'][0]['controls'].values() for c in row))
  out = Table(title=f'{title}: {found["trained"][0]["name"]}{", %" if percent else ""}')
  who = [w for w in ('trained', 'untrained') if w in found]
  for column in ('', *who, *controls):
    out.add_column(column, justify='right' if column else 'left')
  for row in found['trained'][0]['numbers']:
    beside = found['trained'][0]['controls'].get(row, {})
    out.add_row(row, *(_over_seeds(found[w], row, scale) for w in who),
                *(_number(plain(beside[c]), 1. if c.startswith('ratio') else scale) if c in beside else ''
                  for c in controls))  # their intervals are in the file
  return out


def evaluate(workdir: pathlib.Path, names: list[str], step: int | None = None, seeds: tuple[int, ...] = (0,),
             options: Options = Options(), console: Console | None = None, strict: bool = True, untrained: bool = True
             ) -> dict[str, dict]:
  """Evaluate the newest valid checkpoint (or that of `step`) of a run under protocols, print tables, write
  eval/PROTOCOL.json; {protocol: what was written}. A result of the same checkpoint and options is read, not computed again.

  names: of PROTOCOLS or GROUPS; [] the default ones that the run can have (what it cannot is said). seeds: of the
  protocols' own draws. strict: raise UserError where a protocol that was asked for cannot be; else it is left out.
  untrained: measure the network at its initialisation too.
  """
  console = console or Console(soft_wrap=True, width=None if sys.stdout.isatty() else WIDTH)
  which = chosen(names)
  config = configs.read(workdir / 'config.json')
  run = runs.prepare(config, runs.mesh_for(config), console.print)
  missing = {n: lacks(run, PROTOCOLS[n].needs) for n in which}
  for n, why in missing.items():
    if why and n in names and strict:
      raise UserError(f'{n}: {why[0]}.', why[1])
    if why:
      console.print(f'{n} left out: {why[0]}')
  number, state = checkpoint.load(workdir / 'checkpoints', runs.abstract(run), step, console.print)[:2]
  fixed, base = frozen(run.recipe, run.config), functools.cache(lambda: runs.initial(run))
  of = {'trained': lambda: state} | ({'untrained': base} if untrained else {})
  # What several protocols read is computed once.
  read, moved = ({who: functools.cache(lambda who=who, f=f: f(run, fixed, of[who]())) for who in of}
                 for f in (arrays, applied))
  about = {'checkpoint': number, 'digest': digest(state), 'options': options._asdict() | {'targets': list(options.targets)}}
  options = options._replace(cache=options.cache or str(workdir / 'eval' / 'features'))
  results = {}
  for name in [n for n in which if not missing[n]]:
    protocol = PROTOCOLS[name]
    drawn = list(seeds if protocol.seeded else seeds[:1])
    path, here = _path(workdir, name, options), {**about, 'protocol': name, 'seeds': drawn}
    found = _cached(path, here, of)
    if found is None:
      subject = lambda who, seed: Subject(run, fixed, of[who](), read[who], moved[who], jax.random.key(seed), options)
      found = as_json({**here, 'steps': run.recipe.steps, 'seed': run.config.seed, 'environment': record.environment(),
                       **{who: [protocol.find(subject(who, seed)) for seed in drawn] for who in of}})
      path.parent.mkdir(exist_ok=True)
      record.write_whole(path, json.dumps(found, indent=1) + '\n')
    results[name] = found
    for line in found['trained'][0]['missing']:
      console.print(line)
    console.print(table(found, f'{workdir.name}, step {number} of {run.recipe.steps}'))
  console.print(f'Written to {workdir / "eval"}')
  return results

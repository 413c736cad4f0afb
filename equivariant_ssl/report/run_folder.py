"""What a run left in its folder, read for a report: config, commands, environment, log and results."""
import contextlib
import json
import pathlib
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from equivariant_ssl import config as configs
from equivariant_ssl import shipped
from equivariant_ssl.errors import UserError
from equivariant_ssl.evaluate.comparison import method
from equivariant_ssl.evaluate.protocols import PROTOCOLS
from equivariant_ssl.storage import record
from equivariant_ssl.training import stop

ROWS = 500  # of the log, in a page's data


class Left(NamedTuple):
  """rows: of the log. results: {its file's stem: a protocol's result file}. unread: result files of another form."""
  workdir: pathlib.Path
  config: ConfigDict
  env: dict[str, Any]
  commands: list[str]
  rows: list[dict[str, Any]]
  results: dict[str, dict]
  unread: list[str]

  @property
  def name(self) -> str:
    return self.workdir.absolute().name

  @property
  def method(self) -> str:
    return method(self.config)

  def command(self, verb: str, rest: str = '') -> str:
    """'eqssl VERB WORKDIR REST'."""
    return f'eqssl {verb} {shlex.quote(str(self.workdir))} {rest}'.strip()


def _json(path: pathlib.Path) -> Any:
  with contextlib.suppress(OSError, ValueError):
    return json.loads(path.read_text(encoding='utf-8', errors='replace'))


def _whole(found: Any) -> bool:
  """Whether a file's JSON is a result as `eqssl eval` writes it; a study's runs leave the untrained network out."""
  if not isinstance(found, dict) or not isinstance(found.get('protocol'), str) or found['protocol'] not in PROTOCOLS:
    return False
  number = lambda v: isinstance(v.get('mean') if isinstance(v, dict) else v, int | float)
  one = lambda f: isinstance(f, dict) and all(isinstance(f.get(k), dict) for k in ('numbers', 'controls')) and all(
      map(number, f['numbers'].values()))
  return {'trained', 'checkpoint'} <= found.keys() and all(
      isinstance(found[who], list) and found[who] and all(map(one, found[who]))
      for who in ('trained', 'untrained') if who in found)


def read(workdir: pathlib.Path) -> Left:
  """What the run in `workdir` left; UserError where there is no config.json, or none that can be read."""
  config, results, unread = configs.read(workdir / 'config.json'), {}, []
  for path in sorted((workdir / 'eval').glob('*.json')):
    found = _json(path)
    if _whole(found):
      results[path.stem] = found
    else:
      unread.append(path.name)
  order = list(PROTOCOLS)
  results = dict(sorted(results.items(), key=lambda item: order.index(item[1]['protocol'])))
  commands = workdir / 'command.txt'
  return Left(workdir, config, _json(workdir / 'env.json') or {},
              commands.read_text(encoding='utf-8', errors='replace').splitlines() if commands.exists() else [],
              record.read_metrics(workdir, stop.say), results, unread)


def leaves(config: Mapping[str, Any]) -> dict[str, str]:
  """{dotted key: its value as text} of a config as JSON."""
  return {k: v if isinstance(v, str) else json.dumps(v) for k, v in record.leaves(config).items()}


def base(left: Left) -> tuple[str, dict[str, str]] | None:
  """(the shipped config that the run was started from, its leaves), None where its command names none. Whatever else is
  named there is not opened: a config is a program, and a run's folder may come from anyone."""
  words = []
  with contextlib.suppress(ValueError, IndexError):
    words = shlex.split(left.commands[0])
  names = [word.removeprefix('--config=') for word in words if word.startswith('--config=')]
  names += [after for word, after in zip(words, words[1:], strict=False) if word == '--config']
  for name in names[:1]:
    name = re.sub(r'^(.*/)?configs/(\w+)\.py$', r'\2', name)
    if path := shipped.config(name):
      with contextlib.suppress(UserError):
        return name, leaves(configs.as_json(configs.load(name, path=path)))


def changed(left: Left) -> list[tuple[str, str, str]]:
  """(field, as shipped, of the run) where they differ; 'absent' where one has no such field. [] without a base too."""
  found, own = base(left), leaves(configs.as_json(left.config))
  if not found:
    return []
  return [(k, found[1].get(k, 'absent'), own.get(k, 'absent')) for k in sorted({**found[1], **own})
          if found[1].get(k) != own.get(k)]


def thinned(rows: Sequence[Any]) -> list[Any]:
  """At most ROWS + 1 of them, evenly, the last among them."""
  every = -(-len(rows) // ROWS) or 1
  return [*rows[:-1:every], *rows[-1:]]


def data(left: Left) -> dict[str, Any]:
  """The run as JSON, for a page: its log thinned, its results without what is one value an image."""
  brief = lambda found: {k: found.get(k) for k in ('name', 'numbers', 'controls', 'missing')}
  results = {stem: {**{k: f.get(k) for k in ('protocol', 'checkpoint', 'steps', 'seeds', 'options', 'environment')},
                    **{who: [brief(one) for one in f.get(who, ())] for who in ('trained', 'untrained')}}
             for stem, f in left.results.items()}
  return {'workdir': str(left.workdir), 'method': left.method, 'config': configs.as_json(left.config),
          'commands': left.commands, 'environment': left.env, 'metrics': thinned(left.rows), 'results': results}

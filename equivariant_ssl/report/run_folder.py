"""The folder of a run, read for a report: its config, commands, environment, log and results."""
import contextlib
import json
import pathlib
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from equivariant_ssl import config, shipped
from equivariant_ssl.config_fields import SECTIONS, factory_names, section_schema
from equivariant_ssl.data import card
from equivariant_ssl.errors import UserError
from equivariant_ssl.evaluate.comparison import method
from equivariant_ssl.evaluate.protocols import PROTOCOLS
from equivariant_ssl.storage import record
from equivariant_ssl.training import stop

ROWS = 500  # the data of a page hold about so many rows of the log


class RunFolder(NamedTuple):
  """What a report reads in a run's folder.

  config: the resolved config.
  log: the rows of metrics.jsonl.
  results: {a result file's name without its ending: what `eqssl eval` wrote to it}.
  unread: the names of result files that have another form.
  labeled, tested: whether the data have labels, and images that are not trained on; None where the
          run's folder does not say it.
  """
  workdir: pathlib.Path
  config: Any
  env: dict[str, Any]
  commands: list[str]
  log: list[dict[str, Any]]
  results: dict[str, dict]
  unread: list[str]
  labeled: bool | None = None
  tested: bool | None = None

  @property
  def name(self) -> str:
    """The name of the folder."""
    return self.workdir.absolute().name

  @property
  def method(self) -> str:
    """What the run's objectives are called: 'simclr + equimod'."""
    return method(self.config)

  def command(self, verb: str, rest: str = '') -> str:
    """Return 'eqssl VERB WORKDIR REST'."""
    return f'eqssl {verb} {shlex.quote(str(self.workdir))} {rest}'.strip()


def _json(path: pathlib.Path) -> Any:
  """Return the content of a JSON file, or None where it cannot be read."""
  with contextlib.suppress(OSError, ValueError):
    return json.loads(path.read_text(encoding='utf-8', errors='replace'))


def _is_seed(seed: Any) -> bool:
  """Return whether `seed` has the numbers and the controls that a protocol writes for one seed."""
  if not isinstance(seed, dict) or not all(isinstance(seed.get(k), dict)
                                           for k in ('numbers', 'controls')):
    return False
  means = (v.get('mean') if isinstance(v, dict) else v for v in seed['numbers'].values())
  return all(isinstance(mean, int | float) for mean in means)


def _is_result(content: Any) -> bool:
  """Return whether the content of a file is a result as `eqssl eval` writes it.

  The runs of a study have no numbers of the untrained network.
  """
  if not isinstance(content, dict) or not {'trained', 'checkpoint'} <= content.keys():
    return False
  if not isinstance(content.get('protocol'), str) or content['protocol'] not in PROTOCOLS:
    return False
  networks = [content[network] for network in ('trained', 'untrained') if network in content]
  return all(isinstance(seeds, list) and seeds and all(map(_is_seed, seeds)) for seeds in networks)


def read(workdir: pathlib.Path) -> RunFolder:
  """Read the folder of a run. Raises UserError where it has no config.json that can be read."""
  resolved, results, unread = config.read_config(workdir / 'config.json'), {}, []
  for path in sorted((workdir / 'eval').glob('*.json')):
    content = _json(path)
    if _is_result(content):
      results[path.stem] = content
    else:
      unread.append(path.name)
  order = list(PROTOCOLS)
  results = dict(sorted(results.items(), key=lambda item: order.index(item[1]['protocol'])))
  file = workdir / 'command.txt'
  commands = (file.read_text(encoding='utf-8', errors='replace').splitlines()
              if file.exists() else [])
  known = _card(workdir)
  return RunFolder(workdir, resolved, _json(workdir / 'env.json') or {}, commands,
                   record.read_metrics(workdir, stop.say), results, unread,
                   card.has_labels(known) if known else None,
                   bool(known.test or resolved.validation) if known else None)


def _card(workdir: pathlib.Path) -> card.Card | None:
  """Return the data card of a run; None where it has none that can be read."""
  try:
    return card.read_card(workdir)
  except UserError:
    return None


def leaves(config: Mapping[str, Any]) -> dict[str, str]:
  """Return {dotted key: value as text} of a config as JSON."""
  return {k: v if isinstance(v, str) else json.dumps(v)
          for k, v in record.config_leaves(config).items()}


def base(folder: RunFolder) -> tuple[str, dict[str, str]] | None:
  """Return the name and the leaves of the shipped config that the run was started from.

  None means that the run's command names no shipped config. No other file that the command names is
  opened: a config is a program, and a run's folder may come from anyone.
  """
  words = []
  with contextlib.suppress(ValueError, IndexError):
    words = shlex.split(folder.commands[0])
  names = [word.removeprefix('--config=') for word in words if word.startswith('--config=')]
  names += [after for word, after in zip(words, words[1:], strict=False) if word == '--config']
  for name in names[:1]:
    name = re.sub(r'^(.*/)?configs/(\w+)\.py$', r'\2', name)
    if path := shipped.shipped_config(name):
      with contextlib.suppress(UserError):
        return name, leaves(config.config_to_json(config.load_config(name, path=path)))


def _defaults(fields: Mapping[str, str], section: str) -> dict[str, str]:
  """Return {field: its default as text} of a section of a config that names a factory."""
  package, name = SECTIONS.get(section.partition('.')[0]), fields.get(f'{section}.name')
  if package is None or name not in factory_names(package):
    return {}
  return leaves(json.loads(json.dumps(section_schema(package, name))))


def added_whole(key: str, configs: Sequence[Mapping[str, str]]) -> bool:
  """Return whether a field differs only because its section is another: 'equivariance.dim' where
  one config has equimod and one has none.

  configs: the leaves of each config. A field that some config sets to another value than its
  default is not left out.
  """
  section, _, field = key.rpartition('.')
  names = {fields.get(f'{section}.name') for fields in configs}
  having = [fields for fields in configs if key in fields]
  return (field != 'name' and len(names) > 1 and len(having) < len(configs)
          and all(_defaults(fields, section).get(field) == fields[key] for fields in having))


def changed(folder: RunFolder) -> list[tuple[str, str, str]]:
  """Return (field, its value as shipped, its value in the run) of each field that differs.

  A field that one of the two configs lacks is 'absent' in it; the defaults of an objective that one
  of them lacks are left out. A run without a `base` has none.
  """
  named = base(folder)
  if not named:
    return []
  shipped_fields, run_fields = named[1], leaves(config.config_to_json(folder.config))
  return [(k, shipped_fields.get(k, 'absent'), run_fields.get(k, 'absent'))
          for k in sorted({**shipped_fields, **run_fields})
          if shipped_fields.get(k) != run_fields.get(k)
          and not added_whole(k, (shipped_fields, run_fields))]


def thinned(rows: Sequence[Any]) -> list[Any]:
  """Return at most ROWS + 1 of the rows, evenly spaced, with the last row among them."""
  every = -(-len(rows) // ROWS) or 1
  return [*rows[:-1:every], *rows[-1:]]


def data(folder: RunFolder) -> dict[str, Any]:
  """Return the run as JSON for a page.

  Its log is thinned, and its results lack the detail that has one value per image.
  """
  def brief(result: dict) -> dict:
    return {k: result.get(k) for k in ('name', 'numbers', 'controls', 'missing')}

  about = ('protocol', 'checkpoint', 'steps', 'seeds', 'options', 'environment')
  results = {stem: {**{k: file.get(k) for k in about},
                    **{network: [brief(one) for one in file.get(network, ())]
                       for network in ('trained', 'untrained')}}
             for stem, file in folder.results.items()}
  return {'workdir': str(folder.workdir), 'method': folder.method,
          'config': config.config_to_json(folder.config), 'commands': folder.commands,
          'environment': folder.env, 'metrics': thinned(folder.log), 'results': results}

"""Overrides of a config: the command line's `--config.a.b=text`."""
from typing import Any

from ml_collections import ConfigDict

from equivariant_ssl import augment, invariance, nets, registry, renamed
from equivariant_ssl.config_fields import (
    DICT_SECTION,
    HEADS,
    OPTIONAL_SECTION,
    SECTIONS,
    TOP,
    USUAL_ORDER,
    is_factory,
    section_schema,
)
from equivariant_ssl.dotted import is_dotted, short_name
from equivariant_ssl.errors import UserError
from equivariant_ssl.registry import Text, fit, flag, literal, unknown_name


def objective_section(value: Any) -> Any:
  """Return an objective as a section. It may be given by its name alone, or as a dict.

  Several objectives become a list of sections.
  """
  if isinstance(value, (list, tuple)):
    return [objective_section(v) for v in value]
  value = {'name': value} if isinstance(value, str) else value
  return ConfigDict(value) if isinstance(value, dict) else value


def name_modules(fields: Any) -> None:
  """Give each op that the order of a section config.augment names by a dotted path its section.

  The section stands under the last part of the path, and says in `module` which module it is of.
  """
  order = literal(fields.get('order', ()))
  for path in filter(is_dotted, order if isinstance(order, (list, tuple)) else (order,)):
    name = short_name(path)
    if name not in fields:
      fields[name] = ConfigDict()
    if hasattr(fields[name], 'keys'):  # else `resolve_config` says that it needs fields
      fields[name]['module'] = path


def spell_out(config: Any) -> None:
  """Replace objectives by sections, and old names by today's, and begin ops' sections, in place."""
  readers = {'invariance': objective_section, 'augment': renamed.augmentations,
             'equivariance': lambda value: renamed.objective(objective_section(value)),
             'data': renamed.data}
  for k, read in readers.items():
    if k in config:
      value = read(config[k])
      del config[k]  # a ConfigDict lets no field change its type otherwise
      config[k] = value
  if hasattr(config.get('augment'), 'keys'):
    name_modules(config.augment)


def _add_ops(config: Any, overrides: dict[str, str]) -> list[str]:
  """Give the ops that get a role, and are not in the order, their usual place in it.

  An order that the overrides give themselves stays as it is. Returns a line for each such op.
  """
  fields, lines = config.get('augment'), []
  if not hasattr(fields, 'keys') or 'augment.order' in overrides:
    return lines
  for key in overrides:
    section, _, rest = key.partition('.')
    name, _, field = rest.partition('.')
    if (section, field) != ('augment', 'role') or name in fields or (
        name not in registry.names(augment)):
      continue
    order = list(fields.get('order', ()))
    before = USUAL_ORDER[:USUAL_ORDER.index(name)] if name in USUAL_ORDER else order
    place = max((i + 1 for i, op in enumerate(order) if op in before), default=0)
    fields.order = (*order[:place], name, *order[place:])
    fields[name] = ConfigDict()
    lines.append(f'{name} is added to the augmentations: {", ".join(fields.order)} '
                 '(--config.augment.order=... gives it another place)')
  return lines


def apply_overrides(config: Any, overrides: dict[str, str]) -> list[str]:
  """Set the fields at the keys 'a.b' of a config to what the texts say, in place.

  Returns lines for the user: which augmentations were added to the order.

  Names of factories go first: they decide which fields a section has. So does the order of the
  ops, whose dotted paths begin sections.
  """
  overrides = {renamed.key(key): text for key, text in overrides.items()}
  overrides = dict(sorted(overrides.items(), key=lambda item: item[0] != 'augment.order'))
  lines = _add_ops(config, overrides)
  for key, text in overrides.items():
    if key.endswith('.name'):
      _rename(config, key.split('.')[:-1], text)
  for key, text in overrides.items():
    _override(config, key, text)
    spell_out(config)
  return lines


def _child(node: Any, part: str) -> Any:
  """Return the field or the list item `part` of a node, or None."""
  if isinstance(node, list):
    return node[int(part)] if part.isdecimal() and int(part) < len(node) else None
  return node.get(part)


def _rename(config: Any, path: list[str], name: Any) -> None:
  """Prepare the section at `path` for another factory `name`.

  The fields in the config file that the new factory cannot have are dropped.
  """
  node, package = config.get(path[0]), SECTIONS.get(path[0])
  for part in path[1:]:
    node = _child(node, part) if isinstance(node, list) else None
  if package is None or not isinstance(node, ConfigDict) or name == node.get('name'):
    return
  if not is_factory(package, name):
    return
  # The 50 layers of one network mean nothing to another: its fields are not kept.
  schema = {} if package is nets else section_schema(package, name)
  if package is invariance:
    objective = registry.make(invariance, name)
    schema |= {head: {} for head in HEADS if getattr(objective, head) is not None}
  for k in list(node.keys()):
    try:
      fit(k, node[k], schema[k])
    except (KeyError, UserError):
      del node[k]


def _no_fields(node: Any, path: str, part: str, rest: str, text: str) -> UserError:
  """Return the error for an override whose `part`, in `node` at `path`, has no fields.

  rest: the keys of the override below `part`. text: its value.
  """
  if isinstance(node, list):
    return UserError(f'{path} has {len(node)} objectives, 0 to {len(node) - 1}; '
                     f'{part!r} does not say which.',
                     f'e.g. {flag(f"{path}.0.{rest}".rstrip("."), text)}')
  if part.isdecimal() and path == 'config.equivariance':
    return UserError(f'{path} has one objective, which takes no number.',
                     f'e.g. {flag(f"{path}.{rest}", text)}')
  if path == 'config.augment' and part not in node and part in registry.names(augment):
    return UserError(f'{part} is not among the augmentations, which are '
                     f'{", ".join(node.get("order", ()))}.',
                     f'A role adds it: --{path}.{part}.role=invariant')
  value = literal(node.get(part, TOP.get(part) if path == 'config' else None))
  sections = [k for k, v in node.items() if isinstance(v, ConfigDict)]
  if value is None and (sections or path == 'config'):
    known = {*TOP, *SECTIONS, 'augment'} if path == 'config' else sections
    return unknown_name(path, part, known)
  example = f'e.g. {flag(f"{path}.{part}", text)}'
  if value is None:
    return UserError(f'{path}.{part} has no fields.', example)
  is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
  number = 'a number, ' if is_number else ''
  return UserError(f'{path}.{part} is {number}{value!r}: it has no fields.', example)


def _override(config: Any, key: str, text: str) -> None:
  """Set the field at `key` to what `text` says.

  key: 'a.b', or 'a.0.b' for the first of several objectives.
  """
  *parents, last = key.split('.')
  node, path, value = config, 'config', Text(text)
  for i, part in enumerate(parents):
    if (isinstance(node, ConfigDict) and part not in node
        and OPTIONAL_SECTION.fullmatch(f'{path}.{part}')):
      node[part] = ConfigDict()
    child = _child(node, part)
    if not isinstance(child, (ConfigDict, list)):
      raise _no_fields(node, path, part, '.'.join([*parents[i + 1:], last]), text)
    node, path = child, f'{path}.{part}'
  if isinstance(node, list) or DICT_SECTION.fullmatch(f'{path}.{last}'):
    value = literal(value)
  if isinstance(node, list):
    if _child(node, last) is None:
      raise _no_fields(node, path, last, '' if last.isdecimal() else last, text)
    node[int(last)] = value
    return
  if last in node:  # the value is replaced, not merged; `resolve_config` checks its type
    del node[last]
  node[last] = ConfigDict(value) if isinstance(value, dict) else value

"""The overrides of the config on the command line, `--config.a.b=text`, and their near misses."""
import difflib
import shlex
from collections.abc import Iterable

from equivariant_ssl.errors import USAGE, UserError


def parse_overrides(arguments: list[str], has_config: bool, options: Iterable[str] = ()
                    ) -> dict[str, str]:
  """Return {'a.b': 'text'} of the arguments `--config.a.b=text`; a space may stand for the `=`.

  has_config: whether the command takes such arguments.
  options:    the options that the command has.

  Raises UserError for another argument, with the one that was probably intended.
  """
  overrides, rest = {}, list(arguments)
  while rest:
    argument = rest.pop(0)
    if not has_config or not argument.startswith('--config.'):
      raise _unknown_argument(argument, rest, has_config, options)
    name, sign, value = argument.removeprefix('--config.').partition('=')
    if not sign:
      if not rest or rest[0].startswith('--'):
        raise UserError(f'{argument} needs a value.', f'e.g. {argument}=VALUE')
      value = rest.pop(0)
    overrides[name] = value
  return overrides


def _unknown_argument(argument: str, rest: list[str], has_config: bool, options: Iterable[str]
                      ) -> UserError:
  """Return the error for an argument that the command does not have.

  rest: the arguments after it.
  """
  option, sign, value = argument.partition('=')
  if not sign and rest and not rest[0].startswith('-'):
    sign, value = '=', rest[0]
  suggestion = ''
  if has_config and option.startswith('--') and not option.startswith('--conf'):
    from equivariant_ssl.config_fields import find_field
    if field := find_field(option.removeprefix('--')):
      suggestion = f'--config.{field}={shlex.quote(value) if sign else "VALUE"}'
  elif has_config and option.startswith('--conf') and '.' in option:
    suggestion = f'--config.{argument.partition(".")[2]}'
  if not suggestion and (near := difflib.get_close_matches(option, options, n=1, cutoff=.7)):
    suggestion = near[0] + (f'={shlex.quote(value)}' if sign else '')
  advice = 'See eqssl COMMAND --help' + (
    '; a field of the config is set by --config.FIELD=VALUE.' if has_config else '.')
  return UserError(f'unknown argument {argument!r}.',
                   f'Did you mean {suggestion}? {advice}' if suggestion else advice, USAGE)

"""What the sections of a config say to the factories that they name."""
from typing import Any

from equivariant_ssl import nets, registry
from equivariant_ssl.errors import UserError
from equivariant_ssl.types import Config


def factory_arguments(section: Config, *drop: str) -> dict:
  """The fields of a section of a config, without its name and without those to `drop`."""
  return {k: v for k, v in section.items() if k not in ('name', *drop)}


def op_settings(section: Config) -> dict:
  """The fields of an op's section of a config that are arguments of its factory."""
  return {k: v for k, v in section.items() if k not in ('role', 'module')}


def build_encoder(config: Config) -> Any:
  """The encoder, a flax module. Raises UserError where it cannot compute in the config's dtype."""
  name, arguments = config.encoder.name, factory_arguments(config.encoder)
  if 'dtype' in registry.schema(nets, name):
    arguments['dtype'] = config.dtype
  elif config.dtype != 'float32':
    raise UserError(f'config.dtype is {config.dtype}, and {name}.make takes no dtype.',
                    "Leave it out, or write: def make(..., dtype: str = 'float32').")
  return registry.make(nets, name, **arguments)

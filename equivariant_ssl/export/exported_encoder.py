"""The encoder of a folder that `eqssl export` wrote, read back as a network of this package."""
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from equivariant_ssl import nets, registry
from equivariant_ssl.errors import UserError
from equivariant_ssl.export import timm, torchvision, weight_files
from equivariant_ssl.export.export_folder import FAMILIES, SECTION, WEIGHTS, read_facts
from equivariant_ssl.export.importing import facts_beside
from equivariant_ssl.nets.network import Network


class ExportedEncoder(NamedTuple):
  """An encoder without heads.

  variables: its weights and BatchNorm statistics, as `network.apply` takes them.
  size, canvas: the sides, in pixels, of the images that it was trained on, and of the stored ones.
  step: of the checkpoint that was exported.
  """
  network: Network
  variables: dict
  size: int
  canvas: int
  step: int


def is_export(folder: pathlib.Path) -> bool:
  """Return whether `eqssl export` wrote the folder."""
  return SECTION in read_facts(folder)


def read_export(folder: pathlib.Path) -> ExportedEncoder:
  """Return the encoder of an export.

  Raises UserError where a file is missing, damaged, or not the file that was exported.
  """
  tensors = weight_files.read(folder / WEIGHTS)
  facts: Any = facts_beside(folder / WEIGHTS)[SECTION]
  kind = 'vit' if any(name.endswith(timm.MARK) for name in tensors) else 'resnet'
  try:
    encoder = registry.make(nets, kind, **facts['encoder'], dtype='float32')
    mean, std = (tuple(map(float, facts[k])) for k in ('mean', 'std'))
    size, step = int(facts['size']), int(facts['step'])
    canvas = int(facts.get('canvas', size))  # exports of an older version do not say it
  except (KeyError, TypeError, ValueError, UserError) as error:
    raise UserError(f'{folder / "config.json"} does not describe an encoder: {error}.',
                    'Export it again.') from error
  network = Network(encoder, None, None, heads={}, mean=mean, std=std)
  image = jnp.zeros((1, size, size, 3))
  shapes: Any = jax.eval_shape(lambda key: network.init(key, image, method='encode'),
                               jax.random.key(0))
  like = shapes['params']['encoder'], shapes.get('batch_stats', {}).get('encoder', {})
  (params, stats), _ = torchvision.from_torch(tensors, like, FAMILIES[kind].to_torch)
  variables = jax.tree.map(jnp.asarray, {'params': {'encoder': params},
                                         'batch_stats': {'encoder': stats} if stats else {}})
  return ExportedEncoder(network, variables, size, canvas, step)

"""`eqssl export` writes a run's encoder as files that torch and timm read."""
import contextlib
import json
import os
import pathlib
import shlex
import tempfile
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import numpy as np
from jax.tree_util import Partial
from safetensors.numpy import save

from equivariant_ssl import __version__
from equivariant_ssl.config import read_config
from equivariant_ssl.data.source import Split
from equivariant_ssl.errors import UserError
from equivariant_ssl.evaluate import inputs
from equivariant_ssl.evaluate.features import in_batches
from equivariant_ssl.evaluate.frozen import frozen
from equivariant_ssl.export import torchvision, weight_files
from equivariant_ssl.export.export_folder import (
  FACTS,
  FAMILIES,
  SECTION,
  WEIGHTS,
  Architecture,
  check_folder,
  digest,
  inputs_in_words,
)
from equivariant_ssl.parallel import sharding
from equivariant_ssl.storage import checkpoint
from equivariant_ssl.training import runs

IMAGES = 8  # images whose features are compared
# Features may differ by this share of the largest feature. Sums in float32 differ far less when
# their order changes.
CLOSE = 1e-3


def _config_name(workdir: pathlib.Path) -> str:
  """Return the name of the config that a run was started with, '' where its command has none."""
  try:
    text = (workdir / 'command.txt').read_text(encoding='utf-8')
    words = shlex.split(text.replace('--config=', '--config '))
  except (OSError, ValueError):
    return ''
  return dict(zip(words, words[1:], strict=False)).get('--config', '')


def _family(run: runs.Run) -> ModuleType:
  """Return the module that names and builds the weights of a run's encoder."""
  config: Any = run.config
  return FAMILIES[config.encoder.name]


def _facts(run: runs.Run, architecture: Architecture, workdir: pathlib.Path, step: int,
           sha256: str) -> dict:
  """Return the content of config.json: the fields of timm, and the SECTION of this package.

  step: the step of the checkpoint. sha256: the SHA-256 of the file of weights.
  """
  network, size, family = run.recipe.network, run.recipe.size, _family(run)
  section = {'version': __version__, 'run': workdir.absolute().name,
             'config': _config_name(workdir), 'step': step, 'encoder': architecture._asdict(),
             'size': size, 'canvas': run.recipe.canvas, 'mean': network.mean, 'std': network.std,
             'sha256': sha256,
             'standard': architecture.standard,
             'build': family.build_code(architecture, WEIGHTS).splitlines()}
  if architecture.note:
    section['note'] = architecture.note
  model_args = {'model_args': architecture.model_args} if architecture.model_args else {}
  return {'architecture': architecture.name, 'num_classes': 0,
          'num_features': network.encoder.dim, **model_args, 'global_pool': family.POOL,
          SECTION: section, 'pretrained_cfg': {
              'num_classes': 0, 'input_size': [3, size, size], 'mean': network.mean,
              'std': network.std, 'first_conv': family.FIRST, 'classifier': family.CLASSIFIER}}


def _sample_images(size: int) -> np.ndarray:
  """Return uint8 images [IMAGES size size 3] of coarse patches under fine noise.

  They are the same every time, so that a comparison of features needs no data.
  """
  draws, coarse = np.random.default_rng(0), -(-size // 4)
  patches = draws.integers(0, 192, (IMAGES, 4, 4, 3)).repeat(coarse, 1).repeat(coarse, 2)
  patches = patches[:, :size, :size]
  return (patches + draws.integers(0, 64, patches.shape)).astype(np.uint8)


def _features(encode: Callable, encoder: tuple, images: np.ndarray) -> np.ndarray:
  """Return the features [N D] of images by an encoder (params, stats).

  encode: the function `encode` of the recipe's frozen functions.
  """
  params, stats = encoder
  values = {'params': {'encoder': params}, 'batch_stats': {'encoder': stats}}
  return in_batches(Partial(encode, values), images, IMAGES)


def _compare(run: runs.Run, encoder: tuple, path: pathlib.Path, architecture: Architecture
             ) -> list[str]:
  """Return lines that say how far the features of the file `path` are from the checkpoint's.

  encoder: the (params, stats) of the checkpoint.
  Raises UserError where the features differ by more than rounding.
  """
  state, family = weight_files.read(path), _family(run)
  read_back, _ = torchvision.from_torch(state, encoder, family.to_torch)
  size, network = run.recipe.size, run.recipe.network
  split = Split(_sample_images(size), np.full((IMAGES, 2), size, np.float32), None)
  images = inputs.pixels(split, inputs.uncropped_inputs(size, split))
  encode = frozen(run.recipe).encode
  with jax.default_matmul_precision('highest'):
    features = _features(encode, encoder, images)
    others = {'read back': _features(encode, read_back, images)}
  largest = float(np.abs(features).max())
  with contextlib.suppress(ImportError):
    mean, std = (np.array(values, np.float32) for values in (network.mean, network.std))
    normalized = (images - mean) / std
    others['in plain torch'] = family.torch_features(architecture)(state, normalized)
  lines = []
  for reader, other in others.items():
    difference = float(np.abs(features - other).max())
    lines.append(f'{reader}: features of {len(features)} images differ by at most '
                 f'{difference:.2g}, the largest is {largest:.2g}.')
    if not difference <= CLOSE * largest:
      raise UserError(f'{lines[-1]} Nothing was exported.',
                      'Check the disk. If the disk is well, this is a bug: please report it.')
  if 'in plain torch' not in others:
    lines.append('torch is not installed, so the features were not compared with torch\'s.')
  return lines


def _write(out: pathlib.Path, content: bytes, compare: Callable[[pathlib.Path], list[str]],
           facts: dict) -> list[str]:
  """Write the two files of an export to `out`, and return the lines of `compare`.

  compare: reads the file of weights, and raises UserError where it is wrong. Then `out` keeps the
  files that it had.
  """
  out.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(dir=out, prefix='.new-') as scratch:
    new = pathlib.Path(scratch)
    (new / WEIGHTS).write_bytes(content)
    lines = compare(new / WEIGHTS)
    (new / FACTS).write_text(json.dumps(facts, indent=1) + '\n', encoding='utf-8')
    for name in (FACTS, WEIGHTS):
      os.replace(new / name, out / name)
  return lines


def export(workdir: pathlib.Path, out: pathlib.Path | None = None, step: int | None = None,
           say: Callable[[str], None] = print, place: str = '') -> pathlib.Path:
  """Write the encoder of a run's checkpoint to a folder, and return the folder.

  The folder has model.safetensors, with the names of torchvision or timm, and config.json. Before
  the files take their place, the weights are read back, and their features are compared with the
  checkpoint's features, and with those that plain torch computes where torch is installed. `say`
  gets the lines that tell how torch loads the weights.

  out: the folder; None means `export` in the run's folder.
  step: the step of the checkpoint; None means the newest valid one.
  place: where the data of a run without a data card are now.
  Raises UserError where the encoder is no ResNet or ViT, and where a file that is no export would
  be replaced.
  """
  workdir, out = pathlib.Path(workdir), pathlib.Path(out or pathlib.Path(workdir, 'export'))
  config: Any = read_config(workdir / 'config.json')
  family = FAMILIES.get(config.encoder.name)
  if family is None:
    raise UserError(f'{workdir} has an encoder {config.encoder.name!r}, and only a resnet or a vit '
                    'can be exported.', 'Train with --config.encoder.name=resnet.')
  check_folder(out)
  # The weights of a bfloat16 run are float32, and another program computes in float32.
  run = runs.reopen_run(workdir, sharding.mesh(jax.devices()[:1]), say, runs.DataRequest(place),
                        needs_data=False, changes={'dtype': 'float32'})
  train_state = runs.abstract_state(run)._asdict()
  shapes = {part: {k: v for k, v in train_state[part].items() if k == 'encoder'}
            for part in ('params', 'stats')}
  number, loaded, _ = checkpoint.load_checkpoint(workdir / 'checkpoints', shapes, step, say)
  architecture = family.Architecture(*(config.encoder[k] for k in family.Architecture._fields))
  encoder = tuple(loaded[part].get('encoder', {}) for part in shapes)
  state = {k: np.array(v, order='C') for k, v in family.to_torch(*encoder).items()}
  content = weight_files.sealed(save(state, {'format': 'pt'}))  # torch and timm require 'format'
  facts = _facts(run, architecture, workdir, number, digest(content))

  def compare(path: pathlib.Path) -> list[str]:
    return _compare(run, encoder, path, architecture)

  lines = _write(out, content, compare, facts)
  megabytes = sum(v.nbytes for v in state.values()) / 1e6
  say(f'{workdir.name}, step {number}: {architecture.name}, {len(state)} tensors, '
      f'{megabytes:.1f} MB, written to {out / WEIGHTS}, and {FACTS} beside it.')
  note = [architecture.note] if architecture.note else []
  usage = f'# of x [N 3 H W] = (pixels in [0, 1] - mean) / std; {inputs_in_words(run)}'
  for line in [*lines, *note, '', usage, family.build_code(architecture, str(out / WEIGHTS))]:
    say(line)
  return out

"""`eqssl import` makes a run of a file of weights."""
import contextlib
import os
import pathlib
import shlex
import tempfile
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import jax

from equivariant_ssl.config import config_to_json, load_config
from equivariant_ssl.data import card
from equivariant_ssl.errors import UserError
from equivariant_ssl.export import timm, torchvision, weight_files
from equivariant_ssl.export.export_folder import (
  FACTS,
  FAMILIES,
  SECTION,
  WEIGHTS,
  Architecture,
  digest,
  inputs_in_words,
  read_facts,
)
from equivariant_ssl.export.torchvision import COUNTER
from equivariant_ssl.export.weight_files import State
from equivariant_ssl.parallel import sharding
from equivariant_ssl.storage import checkpoint, record
from equivariant_ssl.training import runs
from equivariant_ssl.training.run_config import next_command
from equivariant_ssl.training.state import TrainState

SMALL_STEMS = ('cifar', 'half', 'solo')  # the stems that have a 3x3 convolution
# The mean and std of the inputs of torchvision's weights.
IMAGENET = (.485, .456, .406), (.229, .224, .225)


class Weights(NamedTuple):
  """A file of weights that was read.

  tensors: the tensors of the encoder. prefix: what precedes their names in the file.
  others: the names of all other tensors in the file.
  """
  file: pathlib.Path
  tensors: State
  prefix: str
  others: list[str]


def facts_beside(file: pathlib.Path) -> dict:
  """Return the content of the config.json beside a file of weights.

  Raises UserError where it says that the file is not the file that was exported.
  """
  facts = read_facts(file.parent)
  sha256 = facts.get(SECTION, {}).get('sha256')
  if sha256 and file.name == WEIGHTS and sha256 != digest(file.read_bytes()):
    raise UserError(f'{file} is not what was exported: the {FACTS} beside it has another SHA-256.',
                    'Export or copy it again.')
  return facts


def _normalization(facts: dict) -> tuple[tuple, tuple, str]:
  """Return the mean and std of the inputs that weights were trained with, and where they come from.

  They come from a config.json, of this package or of timm; else they are those of ImageNet.
  """
  for section in (facts.get(SECTION, {}), facts.get('pretrained_cfg', {}), facts):
    if section.get('mean') and section.get('std'):
      return tuple(section['mean']), tuple(section['std']), f'from the {FACTS} beside the file'
  return *IMAGENET, ('those of ImageNet, because the file has no others; change them with '
                     '--config.mean=R,G,B --config.std=R,G,B')


def _small_stem(facts: dict, name: str, encoder: Any) -> tuple[str, str]:
  """Return the stem of a network with a 3x3 first convolution, and where the name comes from.

  The weights do not say its stride and padding. The name comes from a config.json, else from the
  config.

  name: the name of the config. encoder: the config's encoder.
  """
  stem = facts.get(SECTION, {}).get('encoder', {}).get('stem')
  if stem in SMALL_STEMS:
    return stem, f'from the {FACTS} beside the file'
  stem, origin = SMALL_STEMS[0], 'the usual one'
  if encoder.get('stem') in SMALL_STEMS:
    stem, origin = encoder.stem, f'from the config {name}'
  others = ' or '.join(s for s in SMALL_STEMS if s != stem)
  return stem, (f'{origin}, because the weights do not say it; change it with '
                f'--config.encoder.stem={others}')


@contextlib.contextmanager
def _about(file: pathlib.Path) -> Iterator[None]:
  """Begin a UserError that is raised inside with the name of the file."""
  try:
    yield
  except UserError as e:
    raise UserError(f'{file}: {e}', code=e.code) from e


def _with_encoders(trees: Any, encoders: tuple) -> tuple:
  """Return (params, stats) with these encoders. An encoder without BatchNorm has no statistics."""
  return tuple({**tree, 'encoder': encoder} if encoder else tree
               for tree, encoder in zip(trees, encoders, strict=True))


def _first_state(run: runs.Run, family: ModuleType, tensors: State) -> tuple[TrainState, int]:
  """Return a run's initial state with these tensors in its encoder, and how many tensors were used.

  The encoder of the target network gets them too.
  """
  first = runs.initial_state(run)
  like = first.params['encoder'], first.stats.get('encoder', {})
  encoders, count = torchvision.from_torch(tensors, like, family.to_torch)
  encoders = sharding.place(encoders, sharding.replicated_sharding(run.mesh))
  params, stats = _with_encoders((first.params, first.stats), encoders)
  target = _with_encoders(first.target, encoders) if first.target else ()
  return first._replace(params=params, stats=stats, target=target), count


def _weights(file: pathlib.Path, state: State, family: ModuleType) -> Weights:
  """Return the Weights in a file. family: the module of `export` for the network's kind."""
  with _about(file):
    tensors, prefix, others = family.backbone(state)
    torchvision.check_numbers(tensors)
  return Weights(file, tensors, prefix, others)


def _matched(weights: Weights, count: int, architecture: Architecture) -> str:
  """Return the line that says how many tensors of the encoder matched, and which were left out."""
  heads = [k for k in weights.others if not k.endswith(COUNTER)]
  more = f' and {len(heads) - 5} more' if len(heads) > 5 else ''
  left_out = [', '.join(heads[:5]) + more] if heads else []
  counters = sum(k.endswith(COUNTER) for k in (*weights.tensors, *weights.others))
  left_out += [f'{counters} {COUNTER}'] if counters else []
  total = len(weights.tensors) + len(weights.others)
  prefix = f', under {weights.prefix!r}' if weights.prefix else ''
  names = f' ({"; ".join(left_out)})' if left_out else ''
  return (f'{weights.file}: {architecture.name}{prefix}: {count} of {count} tensors of the encoder '
          f'matched; {total - count} of the file were left out{names}.')


def _save(run: runs.Run, state: TrainState, file: pathlib.Path, workdir: pathlib.Path,
          command: str, say: Callable[[str], None]) -> None:
  """Make `workdir` a run whose checkpoint of step 0 is `state`. A failure leaves nothing behind."""
  config: Any = run.config
  workdir.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(dir=workdir.parent, prefix='.import-') as scratch:
    new = pathlib.Path(scratch, workdir.name)
    record.start_record(new, config_to_json(config), command)
    card.write_card(new, run.card)
    with checkpoint.open_checkpoints(new / 'checkpoints', config.keep, say) as saver:
      saver.save(0, state, {'imported': str(file), 'data': card.card_to_json(run.card)}, wait=True)
    os.replace(new, workdir)


def import_weights(file: pathlib.Path, workdir: pathlib.Path, config: str = 'cifar10_quick',
                   overrides: dict[str, str] | None = None, command: str = '',
                   say: Callable[[str], None] = print) -> pathlib.Path:
  """Make `workdir` a run of a config whose encoder comes from a file of weights; return `workdir`.

  The weights are the run's checkpoint of step 0. All other parts of the state are as at the start
  of a run. The inputs are normalized as those of the file (see `_normalization`).

  file: a ResNet of torchvision or a ViT of timm, as .safetensors or as a .pth that torch saved.
  config: the name of the config. overrides: {field: value as text}.
  command: what the user typed, which the run's folder keeps.
  Raises UserError where `workdir` is not empty, and where the file lacks a part of the network. It
  then leaves nothing behind.
  """
  file, workdir = pathlib.Path(file), pathlib.Path(workdir).absolute()
  overrides = overrides or {}
  if workdir.exists() and (not workdir.is_dir() or any(workdir.iterdir())):
    raise UserError(f'{workdir} is not empty.', 'Use another --workdir.')
  content, facts = weight_files.read(file), facts_beside(file)
  base: Any = load_config(config, overrides)
  small_stem, stem_origin = _small_stem(facts, config, base.encoder)
  kind = 'vit' if any(k.endswith(timm.MARK) for k in content) else 'resnet'
  family = FAMILIES[kind]
  mean, std, origin = _normalization(facts)
  if base.mean:
    mean, std, origin = base.mean, base.std, 'as the config says'
  weights = _weights(file, content, family)
  with _about(file):
    architecture = family.architecture(weights.tensors, small_stem)
  encoder = {**(base.encoder if base.encoder.name == kind else {'name': kind}),
             **architecture._asdict()}
  resolved: Any = load_config(config, {'encoder': repr(encoder), 'mean': repr(mean),
                                       'std': repr(std), **overrides})
  architecture = family.Architecture(*(resolved.encoder[k] for k in architecture._fields))
  run = runs.prepare_run(resolved, sharding.mesh(jax.devices()[:1]), say)
  with _about(file):
    state, count = _first_state(run, family, weights.tensors)
  command = command or shlex.join(['eqssl', 'import', str(file), '--workdir', str(workdir),
                                   '--config', config])
  _save(run, state, file, workdir, command, say)
  say(_matched(weights, count, architecture))
  say(f'The mean and std of the inputs: {inputs_in_words(run)}, {origin}.')
  if getattr(architecture, 'stem', None) in SMALL_STEMS:
    stem_origin = 'as --config.encoder.stem says' if 'encoder.stem' in overrides else stem_origin
    say(f'Stem: {architecture.stem}, {stem_origin}.')
  say(f'Written to {workdir}, as step 0 of config {config}; the heads are untrained. '
      f'Next: {next_command(workdir, card.has_labels(run.card))}')
  return workdir

"""`eqssl export`: a run's encoder as files that torch and timm read; `eqssl import`: such a file as a run."""
import contextlib
import hashlib
import json
import os
import pathlib
import shlex
import tempfile
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np
from jax.tree_util import Partial
from ml_collections import ConfigDict
from safetensors.numpy import save

from equivariant_ssl import __version__
from equivariant_ssl import config as configs
from equivariant_ssl.data import card as cards
from equivariant_ssl.data.source import Split
from equivariant_ssl.errors import UserError
from equivariant_ssl.evaluate import inputs
from equivariant_ssl.evaluate.features import in_batches
from equivariant_ssl.evaluate.frozen import frozen
from equivariant_ssl.export import timm, torchvision, weight_files
from equivariant_ssl.export.torchvision import COUNTER
from equivariant_ssl.parallel import sharding
from equivariant_ssl.storage import checkpoint, record
from equivariant_ssl.training import runs
from equivariant_ssl.training.state import TrainState

WEIGHTS, FACTS, OURS = 'model.safetensors', 'config.json', 'equivariant_ssl'
FAMILIES = {'resnet': torchvision, 'vit': timm}  # encoder: who names and builds it
SMALL = ('cifar', 'half', 'solo')  # stems of a 3x3 convolution
IMAGENET = (.485, .456, .406), (.229, .224, .225)  # mean, std of torchvision's own weights
IMAGES = 8  # whose features are compared
CLOSE = 1e-3  # of the largest feature: what float32 in another order of sums stays far below


def _said(folder: pathlib.Path) -> dict:
  """What the config.json in `folder` says, {} where there is none; under 'equivariant_ssl' where `export` wrote it."""
  try:
    found = json.loads((folder / FACTS).read_text(encoding='utf-8'))
  except (OSError, ValueError):
    return {}
  return found if isinstance(found, dict) else {}


def _digest(content: bytes) -> str:
  return hashlib.sha256(content).hexdigest()


def _folder(out: pathlib.Path) -> None:
  """UserError where `out` cannot be written to without loss: only what was exported is replaced."""
  if out.exists() and not out.is_dir():
    raise UserError(f'{out} is a file.', 'Give a folder: --out FOLDER')
  ours = _said(out).get(OURS)
  for name in (FACTS, WEIGHTS):
    path = out / name
    if path.exists() and (ours is None or name == WEIGHTS and _digest(path.read_bytes()) != ours.get('sha256')):
      raise UserError(f'{path} is there and was not exported by eqssl.', 'Use another --out, or move it away.')


def _config_name(workdir: pathlib.Path) -> str:
  """The config that the run was started with, '' where its command does not say."""
  try:
    words = shlex.split((workdir / 'command.txt').read_text(encoding='utf-8').replace('--config=', '--config '))
  except (OSError, ValueError):
    return ''
  return dict(zip(words, words[1:], strict=False)).get('--config', '')


def _facts(run: runs.Run, made: NamedTuple, workdir: pathlib.Path, step: int, digest: str) -> dict:
  """What config.json says: timm's fields, and our own under 'equivariant_ssl'."""
  mean, std, family = run.recipe.network.mean, run.recipe.network.std, FAMILIES[run.config.encoder.name]
  own = {'version': __version__, 'run': workdir.absolute().name, 'config': _config_name(workdir), 'step': step,
         'encoder': made._asdict(), 'size': run.recipe.size, 'mean': mean, 'std': std, 'sha256': digest,
         'standard': made.standard, 'build': family.building(made, WEIGHTS).splitlines()}
  if not made.standard and not made.model_args:
    own['note'] = (f'{made.name} is neither in timm nor in torchvision (depth {made.depth}, stem {made.stem}, width '
                   f'{made.width}); the names of its tensors are torchvision\'s, and "build" makes it in torch.')
  return {'architecture': made.name, 'num_classes': 0, 'num_features': run.recipe.network.encoder.dim,
          **({'model_args': made.model_args} if made.model_args else {}),
          'global_pool': family.POOL, OURS: own, 'pretrained_cfg': {
              'num_classes': 0, 'input_size': [3, run.recipe.size, run.recipe.size], 'mean': mean, 'std': std,
              'first_conv': family.FIRST, 'classifier': family.CLASSIFIER}}


def _pictures(size: int) -> np.ndarray:
  """uint8 [IMAGES size size 3]: coarse patches under fine noise, the same each time, so that no data are needed."""
  draws, coarse = np.random.default_rng(0), -(-size // 4)
  patches = draws.integers(0, 192, (IMAGES, 4, 4, 3)).repeat(coarse, 1).repeat(coarse, 2)[:, :size, :size]
  return (patches + draws.integers(0, 64, patches.shape)).astype(np.uint8)


def _compare(run: runs.Run, encoder: tuple, path: pathlib.Path, made: NamedTuple) -> list[str]:
  """Lines that say how far the features of the file `path` are from those of the checkpoint's `encoder`.
  Raises UserError where that is more than rounding."""
  state, family = weight_files.read(path), FAMILIES[run.config.encoder.name]
  again, _ = torchvision.from_torch(state, encoder, family.to_torch)
  size = run.recipe.size
  some = Split(_pictures(size), np.full((IMAGES, 2), size, np.float32), None)
  images, encode = inputs.pixels(some, inputs.whole(size, some)), frozen(run.recipe).encode
  of = lambda params, stats: in_batches(
      Partial(encode, {'params': {'encoder': params}, 'batch_stats': {'encoder': stats}}), images, IMAGES)
  with jax.default_matmul_precision('highest'):
    ours, back = of(*encoder), of(*again)
  largest, others = float(np.abs(ours).max()), {'read back': back}
  with contextlib.suppress(ImportError):
    x = (images - np.float32(run.recipe.network.mean)) / np.float32(run.recipe.network.std)
    others['in plain torch'] = family.torch_features(made)(state, x)
  lines = []
  for who, theirs in others.items():
    apart = float(np.abs(ours - theirs).max())
    lines.append(f'{who}: features of {len(ours)} images differ by at most {apart:.2g}, the largest is {largest:.2g}.')
    if not apart <= CLOSE * largest:
      raise UserError(f'{lines[-1]} Nothing was exported.', 'Check the disk; else this is a bug, please report it.')
  return lines if len(lines) == 2 else [*lines, 'torch is not installed: not compared with it.']


def export(workdir: pathlib.Path, out: pathlib.Path | None = None, step: int | None = None,
           say: Callable[[str], None] = print, place: str = '') -> pathlib.Path:
  """Write the encoder of a run's newest valid checkpoint (or that of `step`) to the folder `out` (DIR/export), as
  model.safetensors under torchvision's or timm's names and config.json, and say how torch loads it; the folder.

  Before it takes its place, the file is read back, and its features compared with ours (and with plain torch's, where
  torch is installed). place: where the data of a run without a data card are now. Raises UserError where the encoder is no
  ResNet or ViT, or a file of another origin is in the way.
  """
  workdir, out = pathlib.Path(workdir), pathlib.Path(out or pathlib.Path(workdir, 'export'))
  config = configs.read(workdir / 'config.json')
  family = FAMILIES.get(config.encoder.name)
  if family is None:
    raise UserError(f'{workdir} has an encoder {config.encoder.name!r}, and a resnet or a vit alone can be exported.',
                    'Train with --config.encoder.name=resnet.')
  _folder(out)
  # What a bfloat16 run keeps is float32, and that is what another program computes in.
  run = runs.reopen(workdir, sharding.mesh(jax.devices()[:1]), say, runs.Asked(place), needs_data=False,
                    over={'dtype': 'float32'})
  whole = runs.abstract(run)._asdict()
  wanted = {part: {k: v for k, v in whole[part].items() if k == 'encoder'} for part in ('params', 'stats')}
  number, found, _ = checkpoint.load(workdir / 'checkpoints', wanted, step, say)
  made = family.Architecture(*(config.encoder[k] for k in family.Architecture._fields))
  encoder = tuple(found[part].get('encoder', {}) for part in wanted)
  state = {k: np.array(v, order='C') for k, v in family.to_torch(*encoder).items()}
  out.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(dir=out, prefix='.new-') as scratch:
    new = pathlib.Path(scratch)
    content = weight_files.sealed(save(state, {'format': 'pt'}))  # torch and timm look for that key
    (new / WEIGHTS).write_bytes(content)
    lines = _compare(run, encoder, new / WEIGHTS, made)
    facts = _facts(run, made, workdir, number, _digest(content))
    (new / FACTS).write_text(json.dumps(facts, indent=1) + '\n', encoding='utf-8')
    for name in (FACTS, WEIGHTS):
      os.replace(new / name, out / name)
  size = sum(v.nbytes for v in state.values()) / 1e6
  say(f'{workdir.name}, step {number}: {made.name}, {len(state)} tensors, {size:.1f} MB, written to {out / WEIGHTS}, '
      f'and {FACTS} beside it.')
  inputs = f'# of x [N 3 H W] = (pixels in [0, 1] - mean) / std; {_shown(run)}'
  note = [facts[OURS]['note']] if 'note' in facts[OURS] else []
  for line in [*lines, *note, '', inputs, family.building(made, str(out / WEIGHTS))]:
    say(line)
  return out


def _shown(run: runs.Run) -> str:
  return ', '.join(f'{k} ({", ".join(f"{v:.4g}" for v in getattr(run.recipe.network, k))})' for k in ('mean', 'std'))


def _beside(file: pathlib.Path) -> dict:
  """What the config.json beside a file of weights says; UserError where it says that the file is not what was exported."""
  facts = _said(file.parent)
  digest = facts.get(OURS, {}).get('sha256')
  if digest and file.name == WEIGHTS and digest != _digest(file.read_bytes()):
    raise UserError(f'{file} is not what was exported: its SHA-256 is not that in {FACTS} beside it.',
                    'Export or copy it again.')
  return facts


def _normalisation(facts: dict) -> tuple[tuple, tuple, str]:
  """(mean, std, whose) of the inputs that the weights know: of config.json, ours or timm's; else ImageNet's."""
  for section in (facts.get(OURS, {}), facts.get('pretrained_cfg', {}), facts):
    if section.get('mean') and section.get('std'):
      return tuple(section['mean']), tuple(section['std']), f'of the {FACTS} beside it'
  return *IMAGENET, 'of ImageNet, since nothing says another; change it with --config.mean=R,G,B --config.std=R,G,B'


def _small(facts: dict, name: str, encoder: ConfigDict) -> tuple[str, str]:
  """(stem, whose) of a 3x3 one, whose stride and padding the weights do not tell: of config.json, else of the config's."""
  stem = facts.get(OURS, {}).get('encoder', {}).get('stem')
  if stem in SMALL:
    return stem, f'of the {FACTS} beside it'
  stem, whose = (encoder.stem, f'of config {name}') if encoder.get('stem') in SMALL else (SMALL[0], 'the usual one')
  others = ' or '.join(s for s in SMALL if s != stem)
  return stem, f'{whose}, since the weights do not say; others: --config.encoder.stem={others}'


def _filled(run: runs.Run, state: dict[str, np.ndarray]) -> tuple[TrainState, int]:
  """The run's initial state, its encoder (and that of its target) of the tensors `state`; and how many these are."""
  first = runs.initial(run)
  part, count = torchvision.from_torch(state, (first.params['encoder'], first.stats.get('encoder', {})),
                                       FAMILIES[run.config.encoder.name].to_torch)
  part = sharding.place(part, sharding.replicated_sharding(run.mesh))
  fill = lambda trees: tuple({**tree, 'encoder': own} if own else tree for tree, own in zip(trees, part, strict=True))
  params, stats = fill((first.params, first.stats))
  return first._replace(params=params, stats=stats, target=fill(first.target) if first.target else ()), count


@contextlib.contextmanager
def _about(file: pathlib.Path) -> Iterator[None]:
  """A UserError within says the file's name first."""
  try:
    yield
  except UserError as e:
    raise UserError(f'{file}: {e}', code=e.code) from e


def _matched(file: pathlib.Path, names: list[str], prefix: str, left: list[str], count: int, made: NamedTuple) -> str:
  """The line that says which of the tensors `names` were used: `left` were not."""
  counters, heads = sum(k.endswith(COUNTER) for k in names), [k for k in left if not k.endswith(COUNTER)]
  out = [', '.join(heads[:5]) + (f' and {len(heads) - 5} more' if len(heads) > 5 else '')] if heads else []
  out += [f'{counters} {COUNTER}'] if counters else []
  under, rest = f', under {prefix!r}' if prefix else '', f' ({"; ".join(out)})' if out else ''
  return (f'{file}: {made.name}{under}: {count} of {count} tensors of the encoder matched; {len(names) - count} of the '
          f'file were left out{rest}.')


def import_(file: pathlib.Path, workdir: pathlib.Path, config: str = 'cifar10_quick',
            overrides: dict[str, str] | None = None, command: str = '', say: Callable[[str], None] = print
            ) -> pathlib.Path:
  """Make `workdir` a run of the named config whose encoder is the torchvision ResNet or timm ViT in `file` (.safetensors, or
  torch's .pth), as a checkpoint of step 0, all else as at its start; the workdir.

  Its inputs are normalised as the file's were (see `_normalisation`). Raises UserError where `workdir` is not empty, or
  the file is not the whole of one; nothing is left behind then.
  """
  file, workdir, overrides = pathlib.Path(file), pathlib.Path(workdir).absolute(), overrides or {}
  if workdir.exists() and (not workdir.is_dir() or any(workdir.iterdir())):
    raise UserError(f'{workdir} is not empty.', 'Use another --workdir.')
  whole, facts = weight_files.read(file), _beside(file)
  asked = configs.load(config, overrides)
  small, whose = _small(facts, config, asked.encoder)
  kind = 'vit' if any(k.endswith(timm.MARK) for k in whole) else 'resnet'
  family = FAMILIES[kind]
  mean, std, of = (asked.mean, asked.std, 'as the config says') if asked.mean else _normalisation(facts)
  with _about(file):
    state, prefix, left = family.backbone(whole)
    torchvision.check_numbers(state)
    made = family.architecture(state, small)
  encoder = {**(asked.encoder if asked.encoder.name == kind else {'name': kind}), **made._asdict()}
  resolved = configs.load(config, {'encoder': repr(encoder), 'mean': repr(mean), 'std': repr(std), **overrides})
  made = family.Architecture(*(resolved.encoder[k] for k in made._fields))
  run = runs.prepare(resolved, sharding.mesh(jax.devices()[:1]), say)
  with _about(file):
    filled, count = _filled(run, state)
  workdir.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(dir=workdir.parent, prefix='.import-') as scratch:
    new = pathlib.Path(scratch, workdir.name)
    command = command or shlex.join(['eqssl', 'import', str(file), '--workdir', str(workdir), '--config', config])
    record.start(new, configs.as_json(run.config), command)
    cards.write(new, run.card)
    with checkpoint.open(new / 'checkpoints', resolved.keep, say) as saved:
      saved.save(0, filled, {'imported': str(file), 'data': cards.as_json(run.card)}, wait=True)
    os.replace(new, workdir)
  say(_matched(file, list(whole), prefix, left, count, made))
  say(f'Inputs: {_shown(run)}, {of}.')
  if getattr(made, 'stem', None) in SMALL:
    say(f'Stem: {made.stem}, {"as asked" if "encoder.stem" in overrides else whose}.')
  say(f'Written to {workdir}, as step 0 of config {config}; the heads are untrained. '
      f'Next: eqssl eval {shlex.quote(str(workdir))}')
  return workdir

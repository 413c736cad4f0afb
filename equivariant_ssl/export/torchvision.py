"""Torchvision's ResNets: their weights as files have them, what they are, and how torch builds and computes them."""
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from equivariant_ssl.errors import UserError
from equivariant_ssl.export.weight_files import State
from equivariant_ssl.nets.resnet import DEPTHS, STEMS, to_torch

COUNTER = 'num_batches_tracked'  # torch counts steps with it; nothing here reads it
VARIANCE = 'running_var'
LARGEST = 1e18  # of a weight: what float32 can still square
AVERAGES = ('encoder_k', 'momentum', 'teacher', 'target', 'ema')  # a second copy of the network, not the trained one
MARK = 'layer1.0.conv1.weight'
OWN = ('conv1', 'bn1', 'layer1', 'layer2', 'layer3', 'layer4')  # the modules of the encoder
FIRST, CLASSIFIER, POOL = 'conv1', 'fc', 'avg'  # as timm's configs call them
BUILD = '''import torch
from safetensors.torch import load_file
from torchvision.models.resnet import {block}, ResNet
{narrow}
net = {net}({block}, {blocks})
{changes}net.fc = torch.nn.Identity()
net.load_state_dict(load_file('{path}'))
net.eval()'''
NARROW = '''
class Narrow(ResNet):
  def _make_layer(self, block, planes, *rest, **more):
    if planes == 64:
      self.inplanes = {width}
    return super()._make_layer(block, planes * {width} // 64, *rest, **more)
'''


class Architecture(NamedTuple):
  """A ResNet: the arguments of `nets.resnet.make`."""
  depth: int
  stem: str
  width: int

  @property
  def standard(self) -> bool:
    """Whether torchvision and timm have it, as 'resnet18' and so on."""
    return self.depth != 10 and self.stem == 'imagenet' and self.width == 64

  @property
  def name(self) -> str:
    return f'resnet{self.depth}' + ('' if self.standard else f'-{self.stem}-width{self.width}')

  @property
  def model_args(self) -> dict:
    """Nothing: what is not `standard` is not built by timm."""
    return {}


def backbone(state: State, mark: str = MARK, own: tuple[str, ...] = OWN, what: str = 'ResNet'
             ) -> tuple[State, str, list[str]]:
  """(the encoder's tensors, the prefix that they had, the names of all others) of a state dict.

  mark: the name of one of its tensors; own: of its modules. Raises UserError where it has none, or there are several.
  """
  found = sorted(k.removesuffix(mark) for k in state if k == mark or k.endswith('.' + mark))
  trained = [p for p in found if not any(word in p for word in AVERAGES)] or found
  if not found:
    raise UserError(f'none of its {len(state)} tensors is called {mark}: it is no ResNet of torchvision, nor a ViT of timm.',
                    'Give a resnet18, 34, 50, 101 or 152 under torchvision\'s names, or a vit_tiny, small or base under '
                    'timm\'s.')
  if len(trained) > 1:
    raise UserError(f'it holds {len(trained)} {what}s: {", ".join(map(repr, trained[:4]))}.', 'Save one of them alone.')
  prefix = trained[0]
  found = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
  found = {k: v for k, v in found.items() if k.partition('.')[0] in own}
  return found, prefix, [k for k in state if not k.startswith(prefix) or k.removeprefix(prefix) not in found]


def blocks(state: State) -> tuple[int, ...]:
  """The number of blocks of each stage."""
  return tuple(len({k.split('.')[1] for k in state if k.startswith(f'layer{stage}.')}) for stage in range(1, 5))


def architecture(state: State, small: str) -> Architecture:
  """What the encoder's tensors are, from their names and shapes. small: the stem of a 3x3 one, whose stride and padding
  they do not tell. Raises UserError where it is none that `nets.resnet` has."""
  counts, deep = blocks(state), 'layer1.0.conv3.weight' in state
  depth = next((d for d, known in DEPTHS.items() if known == (counts, deep)), None)
  if depth is None:
    raise UserError(f'its stages have {counts} {"bottleneck" if deep else "basic"} blocks: no ResNet has these.',
                    f'Known depths: {", ".join(map(str, DEPTHS))}.')
  first = state.get('conv1.weight')
  if first is None:
    raise UserError('conv1.weight is missing.', 'Give the whole of a torchvision ResNet.')
  kernel = first.shape[-1] if first.ndim == 4 else 0
  if kernel not in (3, 7):
    raise UserError(f'its conv1.weight is {list(first.shape)}.', 'A first convolution of 7x7 or 3x3 pixels is known.')
  return Architecture(depth, 'imagenet' if kernel == 7 else small, first.shape[0])


def check_numbers(state: State) -> None:
  """UserError where some tensors hold what no trained network does."""
  for what, bad in (('not of floating point', lambda k, v: not np.issubdtype(v.dtype, np.floating)),
                    ('not finite', lambda k, v: not np.isfinite(v).all()),
                    (f'beyond {LARGEST:g}', lambda k, v: np.abs(v).max(initial=0.) > LARGEST),
                    ('negative, a variance', lambda k, v: k.endswith(VARIANCE) and v.min(initial=0.) < 0)):
    if broken := [k for k, v in state.items() if not k.endswith(COUNTER) and bad(k, v)]:
      raise UserError(f'{len(broken)} of its tensors are {what}: {", ".join(broken[:3])}.', 'Give other weights.')


def from_torch(state: State, like: Any, to_torch: Callable[..., State] = to_torch) -> tuple[Any, int]:
  """The inverse of `to_torch`: (params, stats) with the values of `state`, and the number of tensors that were matched.

  like: (params, stats) of the network that it writes, arrays or their shapes. `state` is all of it and no more,
  counters apart; else UserError.
  """
  leaves, form = jax.tree.flatten(jax.tree.map(lambda a: np.zeros(a.shape, np.float32), like))
  wanted = {k: v.shape for k, v in to_torch(*jax.tree.unflatten(form, leaves)).items() if not k.endswith(COUNTER)}
  there = {k: v for k, v in state.items() if not k.endswith(COUNTER)}
  wrong = [f'{k} is missing' if k not in there else f'{k} is {list(there[k].shape)}, not {list(shape)}'
           for k, shape in wanted.items() if k not in there or there[k].shape != shape]
  wrong += [f'{k} is not one of them' for k in there if k not in wanted]
  if wrong:
    raise UserError(f'{len(wrong)} tensors do not fit the {len(wanted)} of the encoder: {"; ".join(wrong[:3])}'
                    + (f'; and {len(wrong) - 3} more.' if len(wrong) > 3 else '.'),
                    'Nothing was loaded: give the whole of the network.')
  check_numbers({k: there[k] for k in wanted})
  layouts = {4: (2, 3, 1, 0), 2: (1, 0)}
  back = [there[k].transpose(layouts.get(len(shape), range(len(shape)))) for k, shape in wanted.items()]
  return jax.tree.unflatten(form, [np.array(a, np.float32, order='C') for a in back]), len(wanted)


def building(a: Architecture, path: str) -> str:
  """Python that builds the network in torch and loads `path`: as timm does where it is a standard one."""
  if a.standard:
    return f"import timm\nnet = timm.create_model('local-dir:{pathlib.PurePath(path).parent}', pretrained=True).eval()"
  counts, deep = DEPTHS[a.depth]
  kernel, stride, padding = STEMS[a.stem]
  changes = f'net.conv1 = torch.nn.Conv2d(3, {a.width}, {kernel}, {stride}, {padding}, bias=False)\n'
  changes += f'net.bn1 = torch.nn.BatchNorm2d({a.width})\n' if a.width != 64 else ''
  changes += 'net.maxpool = torch.nn.Identity()\n' if a.stem != 'imagenet' else ''
  narrow = NARROW.format(width=a.width) if a.width != 64 else ''
  return BUILD.format(block='Bottleneck' if deep else 'BasicBlock', narrow=narrow, net='Narrow' if narrow else 'ResNet',
                      blocks=list(counts), changes=changes, path=path)


def torch_features(a: Architecture) -> Callable[[State, np.ndarray], np.ndarray]:
  """(state, normalised images [N H W 3] float32) -> features [N D], by plain torch. ImportError where it is missing."""
  import torch
  import torch.nn.functional as F  # noqa: N812

  def conv(state: dict, x, name: str, norm: str, stride: int, padding: int | None = None):
    kernel = state[f'{name}.weight']
    x = F.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2 if padding is None else padding)
    return F.batch_norm(x, *(state[f'{norm}.{w}'] for w in ('running_mean', 'running_var', 'weight', 'bias')))

  def block(state: dict, x, name: str, stride: int):
    strides, h = (1, stride, 1) if f'{name}.conv3.weight' in state else (stride, 1), x
    for i, s in enumerate(strides, 1):
      h = conv(state, F.relu(h) if i > 1 else h, f'{name}.conv{i}', f'{name}.bn{i}', s)
    if f'{name}.downsample.0.weight' in state:
      x = conv(state, x, f'{name}.downsample.0', f'{name}.downsample.1', stride)
    return F.relu(x + h)

  @torch.no_grad()
  def features(state: State, images: np.ndarray) -> np.ndarray:
    values = {k: torch.from_numpy(np.array(v)) for k, v in state.items()}
    x = F.relu(conv(values, torch.from_numpy(images).permute(0, 3, 1, 2), 'conv1', 'bn1', *STEMS[a.stem][1:]))
    x = F.max_pool2d(x, 3, 2, 1) if a.stem == 'imagenet' else x
    for stage, count in enumerate(blocks(state), 1):
      for i in range(count):
        x = block(values, x, f'layer{stage}.{i}', 2 if stage > 1 and i == 0 else 1)
    return x.mean((2, 3)).numpy()
  return features

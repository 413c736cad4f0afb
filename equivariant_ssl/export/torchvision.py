"""torchvision's ResNets: the names of their weights, their architecture, and torch code."""
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from equivariant_ssl.errors import UserError
from equivariant_ssl.export.weight_files import State
from equivariant_ssl.nets.resnet import DEPTHS, STEMS, to_torch

COUNTER = 'num_batches_tracked'  # torch counts steps in these tensors; nothing here reads them
VARIANCE = 'running_var'
LARGEST = 1e18  # the largest weight that is accepted: float32 can still square it
# Words in the names of a second copy of the network, which is not the trained copy.
AVERAGES = ('encoder_k', 'momentum', 'teacher', 'target', 'ema')
MARK = 'layer1.0.conv1.weight'  # the name of a tensor that every ResNet has
MODULES = ('conv1', 'bn1', 'layer1', 'layer2', 'layer3', 'layer4')  # the modules of the encoder
FIRST, CLASSIFIER, POOL = 'conv1', 'fc', 'avg'  # what timm's configs call them
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
    """Whether torchvision and timm have it, under a name like 'resnet18'."""
    return self.depth != 10 and self.stem == 'imagenet' and self.width == 64

  @property
  def name(self) -> str:
    """Its name: torchvision's where it is standard."""
    return f'resnet{self.depth}' + ('' if self.standard else f'-{self.stem}-width{self.width}')

  @property
  def model_args(self) -> dict:
    """{}, because timm builds no ResNet that is not `standard`."""
    return {}

  @property
  def note(self) -> str:
    """A sentence about how torch builds a ResNet that is not `standard`; else ''."""
    if self.standard:
      return ''
    return (f'{self.name} is neither in timm nor in torchvision (depth {self.depth}, stem '
            f'{self.stem}, width {self.width}). Its tensors have torchvision\'s names, and the '
            'code under "build" makes the network in torch.')


def backbone(state: State, mark: str = MARK, modules: tuple[str, ...] = MODULES,
             kind: str = 'ResNet') -> tuple[State, str, list[str]]:
  """Return the encoder's tensors in a state dict, their prefix, and the names of the other tensors.

  The names of the encoder's tensors are returned without the prefix.

  mark: the name of a tensor of every such network. modules: the modules of the encoder.
  Raises UserError where the state dict has no such network, or several.
  """
  prefixes = sorted(k.removesuffix(mark) for k in state if k == mark or k.endswith('.' + mark))
  trained = [p for p in prefixes if not any(word in p for word in AVERAGES)] or prefixes
  if not trained:
    raise UserError(f'none of its {len(state)} tensors is called {mark}: it is no ResNet of '
                    'torchvision, nor a ViT of timm.',
                    'Give a resnet18, 34, 50, 101 or 152 under torchvision\'s names, or a '
                    'vit_tiny, small or base under timm\'s.')
  if len(trained) > 1:
    raise UserError(f'it holds {len(trained)} {kind}s: {", ".join(map(repr, trained[:4]))}.',
                    'Save one of them alone.')
  prefix = trained[0]
  tensors = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
  tensors = {k: v for k, v in tensors.items() if k.partition('.')[0] in modules}
  others = [k for k in state
            if not k.startswith(prefix) or k.removeprefix(prefix) not in tensors]
  return tensors, prefix, others


def blocks(state: State) -> tuple[int, ...]:
  """Return the number of blocks of each of the four stages."""
  return tuple(len({k.split('.')[1] for k in state if k.startswith(f'layer{stage}.')})
               for stage in range(1, 5))


def architecture(state: State, small_stem: str) -> Architecture:
  """Return the architecture that the names and shapes of the encoder's tensors have.

  small_stem: the stem of a 3x3 convolution, whose stride and padding the tensors do not say.
  Raises UserError where `nets.resnet` has no such architecture.
  """
  counts, deep = blocks(state), 'layer1.0.conv3.weight' in state
  depth = next((d for d, known in DEPTHS.items() if known == (counts, deep)), None)
  if depth is None:
    raise UserError(f'its stages have {counts} {"bottleneck" if deep else "basic"} blocks, and no '
                    'ResNet has these.', f'Known depths are {", ".join(map(str, DEPTHS))}.')
  first = state.get('conv1.weight')
  if first is None:
    raise UserError('conv1.weight is missing.', 'Give all tensors of a torchvision ResNet.')
  kernel = first.shape[-1] if first.ndim == 4 else 0
  if kernel not in (3, 7):
    raise UserError(f'its conv1.weight is {list(first.shape)}.',
                    'Give a network whose first convolution has 7x7 or 3x3 pixels.')
  return Architecture(depth, 'imagenet' if kernel == 7 else small_stem, first.shape[0])


# {what is wrong with a tensor: (its name, its values) -> whether that is so}
FAULTS: dict[str, Callable[[str, np.ndarray], Any]] = {
    'not of floating point': lambda k, v: not np.issubdtype(v.dtype, np.floating),
    'not finite': lambda k, v: not np.isfinite(v).all(),
    f'beyond {LARGEST:g}': lambda k, v: np.abs(v).max(initial=0.) > LARGEST,
    'negative, a variance': lambda k, v: k.endswith(VARIANCE) and v.min(initial=0.) < 0}


def check_numbers(state: State) -> None:
  """Raise UserError where tensors hold numbers that no trained network holds."""
  for fault, has_fault in FAULTS.items():
    if broken := [k for k, v in state.items() if not k.endswith(COUNTER) and has_fault(k, v)]:
      raise UserError(f'{len(broken)} of its tensors are {fault}: {", ".join(broken[:3])}.',
                      'Give other weights.')


def from_torch(state: State, like: Any, to_torch: Callable[..., State] = to_torch
               ) -> tuple[Any, int]:
  """Return (params, stats) with the values of `state`, and the number of tensors that were used.

  It is the inverse of `to_torch`.

  like: the (params, stats) that `to_torch` reads, as arrays or as their shapes.
  Raises UserError where `state` lacks a tensor or has another one; counters are ignored.
  """
  leaves, form = jax.tree.flatten(jax.tree.map(lambda a: np.zeros(a.shape, np.float32), like))
  shapes = {k: v.shape for k, v in to_torch(*jax.tree.unflatten(form, leaves)).items()
            if not k.endswith(COUNTER)}
  tensors = {k: v for k, v in state.items() if not k.endswith(COUNTER)}
  wrong = [f'{k} is missing' if k not in tensors
           else f'{k} is {list(tensors[k].shape)}, not {list(shape)}'
           for k, shape in shapes.items() if k not in tensors or tensors[k].shape != shape]
  wrong += [f'{k} is not one of them' for k in tensors if k not in shapes]
  if wrong:
    more = f'; and {len(wrong) - 3} more.' if len(wrong) > 3 else '.'
    raise UserError(f'{len(wrong)} tensors do not fit the {len(shapes)} of the encoder: '
                    f'{"; ".join(wrong[:3])}{more}',
                    'Nothing was loaded. Give all tensors of the network.')
  check_numbers({k: tensors[k] for k in shapes})
  layouts = {4: (2, 3, 1, 0), 2: (1, 0)}
  arrays = [tensors[k].transpose(layouts.get(len(shape), range(len(shape))))
            for k, shape in shapes.items()]
  arrays = [np.array(a, np.float32, order='C') for a in arrays]
  return jax.tree.unflatten(form, arrays), len(shapes)


def build_code(architecture: Architecture, path: str) -> str:
  """Return Python code that builds the network in torch and loads `path`.

  timm builds a standard network, from the config.json in the same folder.
  """
  if architecture.standard:
    return ('import timm\n'
            f"net = timm.create_model('local-dir:{pathlib.PurePath(path).parent}', "
            'pretrained=True).eval()')
  (counts, deep), width, stem = DEPTHS[architecture.depth], architecture.width, architecture.stem
  kernel, stride, padding = STEMS[stem]
  changes = (f'net.conv1 = torch.nn.Conv2d(3, {width}, {kernel}, {stride}, {padding}, '
             'bias=False)\n')
  changes += f'net.bn1 = torch.nn.BatchNorm2d({width})\n' if width != 64 else ''
  changes += 'net.maxpool = torch.nn.Identity()\n' if stem != 'imagenet' else ''
  narrow = NARROW.format(width=width) if width != 64 else ''
  return BUILD.format(block='Bottleneck' if deep else 'BasicBlock', narrow=narrow,
                      net='Narrow' if narrow else 'ResNet', blocks=list(counts), changes=changes,
                      path=path)


def torch_features(architecture: Architecture) -> Callable[[State, np.ndarray], np.ndarray]:
  """Return a function (state, normalized images [N H W 3] float32) -> features [N D].

  It computes in plain torch. Raises ImportError where torch is missing.
  """
  import torch  # pyright: ignore[reportMissingImports]  (torch is optional)
  import torch.nn.functional as F  # noqa: N812  # pyright: ignore[reportMissingImports]  (as above)

  def conv(state: dict, x, name: str, norm: str, stride: int, padding: int | None = None):
    kernel = state[f'{name}.weight']
    padding = kernel.shape[-1] // 2 if padding is None else padding
    x = F.conv2d(x, kernel, stride=stride, padding=padding)
    words = ('running_mean', 'running_var', 'weight', 'bias')
    return F.batch_norm(x, *(state[f'{norm}.{word}'] for word in words))

  def block(state: dict, x, name: str, stride: int):
    strides = (1, stride, 1) if f'{name}.conv3.weight' in state else (stride, 1)
    h = x
    for i, s in enumerate(strides, 1):
      h = conv(state, F.relu(h) if i > 1 else h, f'{name}.conv{i}', f'{name}.bn{i}', s)
    if f'{name}.downsample.0.weight' in state:
      x = conv(state, x, f'{name}.downsample.0', f'{name}.downsample.1', stride)
    return F.relu(x + h)

  @torch.no_grad()
  def features(state: State, images: np.ndarray) -> np.ndarray:
    values = {k: torch.from_numpy(np.array(v)) for k, v in state.items()}
    x = torch.from_numpy(images).permute(0, 3, 1, 2)
    x = F.relu(conv(values, x, 'conv1', 'bn1', *STEMS[architecture.stem][1:]))
    x = F.max_pool2d(x, 3, 2, 1) if architecture.stem == 'imagenet' else x
    for stage, count in enumerate(blocks(state), 1):
      for i in range(count):
        x = block(values, x, f'layer{stage}.{i}', 2 if stage > 1 and i == 0 else 1)
    return x.mean((2, 3)).numpy()
  return features

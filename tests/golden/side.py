"""What the drivers of torch code share: a small ResNet of our own, widths made small, weights by name, stubs, the result."""
import contextlib
import os
import sys
import tempfile
import types
from collections.abc import Iterator

import arrays
import numpy as np
import torch
from torch import nn

torch.set_default_dtype(torch.float64)
WIDTH = 8


class Block(nn.Module):
  def __init__(self):
    super().__init__()
    self.conv1, self.conv2 = (nn.Conv2d(WIDTH, WIDTH, 3, 1, 1, bias=False) for _ in range(2))
    self.bn1, self.bn2 = nn.BatchNorm2d(WIDTH), nn.BatchNorm2d(WIDTH)

  def forward(self, x):
    h = torch.relu(self.bn1(self.conv1(x)))
    return torch.relu(x + self.bn2(self.conv2(h)))


class Small(nn.Module):
  """A torchvision ResNet of one basic block, by its names and in its order; its maximum pooling is none."""

  def __init__(self, num_classes: int = 10, padding: int = 1, **kw):
    super().__init__()
    self.conv1, self.bn1, self.relu = nn.Conv2d(3, WIDTH, 3, 1, padding, bias=False), nn.BatchNorm2d(WIDTH), nn.ReLU()
    self.maxpool, self.layer1 = nn.Identity(), nn.Sequential(Block())
    self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(WIDTH, num_classes)

  def forward(self, x):
    x = self.layer1(self.maxpool(self.relu(self.bn1(self.conv1(x)))))
    return self.fc(torch.flatten(self.avgpool(x), 1))


def headless(**kw) -> Small:
  net = Small(**kw)
  net.fc = nn.Identity()
  return net


@contextlib.contextmanager
def widths(sizes: dict[int, int]) -> Iterator[None]:
  """Layers that are built within have sizes[n] in place of n features: the same network, narrow."""
  def narrow(kind: type) -> type:
    class Narrow(kind):
      def __init__(self, *features, **kw):
        super().__init__(*(sizes.get(n, n) if isinstance(n, int) else n for n in features), **kw)
    return Narrow
  kinds = {name: getattr(nn, name) for name in ('Linear', 'BatchNorm1d', 'LayerNorm', 'Conv2d')}
  for name, kind in kinds.items():
    setattr(nn, name, narrow(kind))
  yield
  for name, kind in kinds.items():
    setattr(nn, name, kind)


class Stub(types.ModuleType):
  """A module that has whatever class one asks of it; an instance keeps what it was made with."""
  __path__ = []

  def __getattr__(self, name: str):
    if name.startswith('__'):
      raise AttributeError(name)
    made = type(name, (), {'__init__': lambda self, *a, **kw: setattr(self, 'given', a)})
    setattr(self, name, made)
    return made


def stub(*names: str) -> None:
  for name in names:
    sys.modules[name] = Stub(name)


class Nothing:
  """Takes every call, and is iterated, returned and divided without anything happening."""
  def __getattr__(self, name):
    return lambda *a, **kw: self


def on_this_cpu() -> None:
  for kind in (torch.Tensor, nn.Module):
    kind.cuda = lambda self, *a, **kw: self


def alone() -> None:
  """A process group of this process."""
  path = os.path.join(tempfile.mkdtemp(), 'meet')
  torch.distributed.init_process_group('gloo', init_method=f'file://{path}', rank=0, world_size=1)


def caught() -> list[float]:
  """The losses whose gradients are asked for from here on."""
  losses, backward = [], torch.Tensor.backward
  def remember(self, *a, **kw):
    losses.append(self.item())
    return backward(self, *a, **kw)
  torch.Tensor.backward = remember
  return losses


def encoder(net: nn.Module, path: str = 'encoder') -> dict:
  """{path in our network: its parameter}."""
  block = net.layer1[0]
  found = {f'{path}/conv1/kernel': net.conv1.weight, f'{path}/bn1/scale': net.bn1.weight, f'{path}/bn1/bias': net.bn1.bias}
  for i in (1, 2):
    conv, norm = getattr(block, f'conv{i}'), getattr(block, f'bn{i}')
    found |= {f'{path}/layer1_0/conv{i}/kernel': conv.weight, f'{path}/layer1_0/bn{i}/scale': norm.weight,
              f'{path}/layer1_0/bn{i}/bias': norm.bias}
  return found


def mlp(layers: nn.Module, path: str) -> dict:
  """The same of linear layers and norms in a row."""
  found, i = {}, -1
  for layer in layers.modules():
    if isinstance(layer, nn.Linear):
      i += 1
      found[f'{path}/linear_{i}/kernel'], found[f'{path}/linear_{i}/bias'] = layer.weight, layer.bias
    elif isinstance(layer, (nn.BatchNorm1d, nn.LayerNorm)):
      found[f'{path}/norm_{i}/scale'], found[f'{path}/norm_{i}/bias'] = layer.weight, layer.bias
  return {k: p for k, p in found.items() if p is not None}


def ours(a: np.ndarray) -> np.ndarray:
  return a.transpose({4: (2, 3, 1, 0), 2: (1, 0)}.get(a.ndim, range(a.ndim)))


def theirs(a: np.ndarray) -> np.ndarray:
  return a.transpose({4: (3, 2, 0, 1), 2: (1, 0)}.get(a.ndim, range(a.ndim)))


@torch.no_grad()
def fill(named: dict, at: str = '') -> None:
  """Every weight from its name, below `at`."""
  for path, p in named.items():
    p.copy_(torch.from_numpy(theirs(arrays.weight(at + path, ours(p.detach().numpy()).shape)).copy()))


def image(name: str, views: int = 2, side: int = arrays.SIDE) -> list[torch.Tensor]:
  """The views, each [B 3 side side]."""
  return [torch.from_numpy(x.transpose(0, 3, 1, 2).copy()) for x in np.moveaxis(arrays.images(name, views, side), 1, 0)]


def gradients(named: dict) -> dict[str, np.ndarray]:
  return {path: ours(p.grad.numpy()) for path, p in named.items()}

"""The head after each step of three epochs of the linear evaluation that official code runs, on features of arrays.py.

  python tests/golden/make_probe.py equimod|essl REPOSITORY     (torch, torchvision; see README.md)
"""
import contextlib
import pathlib
import sys
from argparse import Namespace

import arrays
import numpy as np
import side
import torch
from torch import nn


class Loader:
  """The batches of one epoch after the other; EndError where there are no more."""
  epoch = 0

  def __len__(self):
    return arrays.PER_EPOCH

  def __iter__(self):
    if self.epoch == arrays.EPOCHS:
      raise EndError
    for step in range(self.epoch * arrays.PER_EPOCH, (self.epoch + 1) * arrays.PER_EPOCH):
      yield (torch.from_numpy(arrays.probed(step)), torch.from_numpy(arrays.probe_labels()[arrays.probe_rows(step)]))
    self.epoch += 1


class EndError(Exception):
  pass


class Head(nn.Linear):
  def __init__(self, *features, **kw):
    super().__init__(arrays.D, arrays.K)
    side.fill({'kernel': self.weight, 'bias': self.bias}, 'probe/')
    Head.made = self


def recorded() -> list:
  """The kernel and the bias after each step."""
  heads, step = [], torch.optim.SGD.step
  def remember(self, *a, **kw):
    found = step(self, *a, **kw)
    heads.append((Head.made.weight.detach().numpy().T.copy(), Head.made.bias.detach().numpy().copy()))
    return found
  torch.optim.SGD.step = remember
  return heads


def equimod():
  side.stub('torch.utils.tensorboard', 'idr_torch')
  import main
  main.tracker = side.Nothing()
  main.get_nbclasses = lambda name: arrays.K
  model, heads, nn.Linear = Namespace(resnet=lambda x: x, h_dim=arrays.D, eval=lambda: None), recorded(), Head
  args = Namespace(dataset_name='', hardware='cpu', lr_init_clsf=.2, momentum_clsf=.9, weight_decay_clsf=0.,
                   precision='full', nb_epochs_clsf=arrays.EPOCHS)
  main.linear_eval(args, model, Loader(), [], None, None, None, 0, 0, 1, False, torch.device('cpu'))
  return heads


def essl():
  side.on_this_cpu()
  import main
  main.torchvision.datasets.CIFAR10 = lambda *a, **kw: None
  main.torch.utils.data.DataLoader = lambda dataset, **kw: Loader()
  main.args, heads, nn.Linear = Namespace(num_workers=0, fp16=False), recorded(), Head
  with contextlib.suppress(EndError):
    main.eval_loop(nn.Identity(), None)
  return heads


if __name__ == '__main__':
  name, repository = sys.argv[1:]
  sys.path.insert(0, str(pathlib.Path(repository).resolve() / {'equimod': 'src', 'essl': 'cifar10'}[name]))
  kernels, biases = map(np.stack, zip(*{'equimod': equimod, 'essl': essl}[name](), strict=True))
  np.savez_compressed(pathlib.Path(__file__).parent / f'probe_{name}.npz', kernel=kernels, bias=biases)
  print(name, kernels.shape, np.abs(kernels[-1]).max())

"""The views of SimCLR on CIFAR-10 as EquiMod's official code makes them: torchvision on CPU workers.

They are alone in a file because each worker imports it, and there must be no jax in it. The settings are those of
configs/cifar10_simclr.py.
"""
import numpy as np
import torch
from PIL import Image
from torchvision import transforms


def chain(side: int) -> transforms.Compose:
  jitter = transforms.RandomApply([transforms.ColorJitter(.4, .4, .4, .1)], p=.8)
  crop = transforms.RandomResizedCrop(side, scale=(.2, 1.), interpolation=transforms.InterpolationMode.BICUBIC)
  return transforms.Compose([crop, transforms.RandomHorizontalFlip(), jitter, transforms.RandomGrayscale(p=.2),
                             transforms.ToTensor()])


class TwoViews(torch.utils.data.Dataset):
  """Two views [2 3 S S] float32 in [0, 1] of each of the uint8 `images` [N S S 3]."""

  def __init__(self, images: np.ndarray):
    self.images, self.chain = images, chain(images.shape[1])

  def __len__(self) -> int:
    return len(self.images)

  def __getitem__(self, i: int) -> torch.Tensor:
    image = Image.fromarray(self.images[i])
    return torch.stack([self.chain(image), self.chain(image)])


def one_thread(worker: int) -> None:
  torch.set_num_threads(1)


def loader(images: np.ndarray, batch: int, workers: int, pin: bool) -> torch.utils.data.DataLoader:
  return torch.utils.data.DataLoader(
      TwoViews(images), batch, shuffle=True, drop_last=True, num_workers=workers, persistent_workers=True, pin_memory=pin,
      prefetch_factor=1, multiprocessing_context='spawn', worker_init_fn=one_thread)

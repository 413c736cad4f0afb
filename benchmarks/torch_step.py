"""The SimCLR step in plain PyTorch: torchvision's ResNet-18 with the CIFAR stem, EquiMod's projector, NT-Xent, LARS."""
import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn


class Block(nn.Module):
  def __init__(self, inside: int, out: int, stride: int):
    super().__init__()
    self.conv1, self.bn1 = nn.Conv2d(inside, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
    self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
    self.downsample = nn.Sequential(nn.Conv2d(inside, out, 1, stride, bias=False), nn.BatchNorm2d(out)) if (
        stride != 1 or inside != out) else None

  def forward(self, x):
    h = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
    return F.relu(h + (x if self.downsample is None else self.downsample(x)))


class ResNet18(nn.Module):
  def __init__(self, width: int):
    super().__init__()
    self.conv1, self.bn1 = nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
    inside = width
    for stage in range(4):
      out = width * 2 ** stage
      setattr(self, f'layer{stage + 1}', nn.Sequential(
          Block(inside, out, 1 if stage == 0 else 2), Block(out, out, 1)))
      inside = out

  def forward(self, x):
    x = F.relu(self.bn1(self.conv1(x)))
    for stage in range(1, 5):
      x = getattr(self, f'layer{stage}')(x)
    return x.mean((2, 3))


def projector(dim: int, hidden: int, out: int) -> nn.Sequential:
  return nn.Sequential(nn.Linear(dim, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(),
                       nn.Linear(hidden, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(),
                       nn.Linear(hidden, out, bias=False), nn.BatchNorm1d(out, affine=False))


def nt_xent(a, b, temperature: float):
  z = F.normalize(torch.cat([a, b]), dim=1)
  logits = (z @ z.T / temperature).fill_diagonal_(-torch.inf)
  return F.cross_entropy(logits, (torch.arange(len(z), device=z.device) + len(a)) % len(z))


class Lars(torch.optim.Optimizer):
  """LARS: g + wd w, scaled by trust |w| / |g + wd w|, with the rate inside the momentum. One-dimensional w have plain
  momentum."""

  def __init__(self, params, lr: float, momentum: float = .9, weight_decay: float = 1e-6, trust: float = 1e-3):
    super().__init__(params, {'lr': lr, 'momentum': momentum, 'weight_decay': weight_decay, 'trust': trust})

  @torch.no_grad()
  def step(self):
    for group in self.param_groups:
      for p in group['params']:
        g = p.grad
        if p.ndim > 1:
          g = g.add(p, alpha=group['weight_decay'])
          w, n = p.norm(), g.norm()
          g = g * torch.where((w > 0) & (n > 0), group['trust'] * w / n, torch.ones_like(w))
        buffer = self.state[p].setdefault('momentum', torch.zeros_like(p))
        buffer.mul_(group['momentum']).add_(g, alpha=group['lr'])
        p.sub_(buffer)


class Step:
  """The model, its optimizer, and one step on views [B 2 H W C] float32, which are normalized as by the network."""

  def __init__(self, state: dict[str, np.ndarray], heads: list[np.ndarray], width: int, temperature: float, lr: float,
               mean, std, device: str, dtype: torch.dtype = torch.float32):
    self.encoder = ResNet18(width)
    self.encoder.load_state_dict({k: torch.from_numpy(np.array(v)) for k, v in state.items()})
    self.projector = projector(heads[0].shape[0], heads[0].shape[1], heads[2].shape[1])
    for layer, kernel in zip([m for m in self.projector if isinstance(m, nn.Linear)], heads, strict=True):
      layer.weight.data = torch.from_numpy(np.array(kernel.T))
    self.encoder.to(device, memory_format=torch.channels_last).train()
    self.projector.to(device).train()
    self.temperature, self.device, self.dtype = temperature, device, dtype
    self.mean, self.std = (torch.tensor(x, dtype=torch.float64, device=device)[:, None, None] for x in (mean, std))
    self.params = [*self.encoder.parameters(), *self.projector.parameters()]
    self.optimizer = Lars(self.params, lr)

  def double(self) -> 'Step':
    """Return itself, in float64."""
    self.encoder.double()
    self.projector.double()
    return self

  def place(self, views: np.ndarray):
    """[B 2 H W C] -> both views as one channels-last tensor [2B C H W]."""
    x = torch.from_numpy(np.concatenate([views[:, 0], views[:, 1]])).permute(0, 3, 1, 2).to(self.device)
    return x.contiguous(memory_format=torch.channels_last)

  def loss(self, x):
    x = (x - self.mean.to(x)) / self.std.to(x)
    with torch.autocast(self.device, self.dtype, enabled=self.dtype != torch.float32):
      z = self.projector(self.encoder(x))
    a, b = (z if z.dtype == torch.float64 else z.float()).chunk(2)
    return nt_xent(a, b, self.temperature)

  def __call__(self, x) -> float:
    self.optimizer.zero_grad()
    loss = self.loss(x)
    loss.backward()
    self.optimizer.step()
    return loss.detach()

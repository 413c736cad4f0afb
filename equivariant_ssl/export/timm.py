"""timm's Vision Transformers: their weights as files have them, what they are, and how torch builds and computes them."""
import math
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from equivariant_ssl.errors import UserError
from equivariant_ssl.export import torchvision
from equivariant_ssl.export.weight_files import State
from equivariant_ssl.nets.vit import DEPTH, EPSILON, VARIANTS, to_torch  # noqa: F401

MARK = 'blocks.0.attn.qkv.weight'
OWN = ('cls_token', 'pos_embed', 'patch_embed', 'blocks', 'norm')  # the modules of the encoder
FIRST, CLASSIFIER, POOL = 'patch_embed.proj', 'head', 'token'  # as timm's configs call them


class Architecture(NamedTuple):
  """A ViT: the arguments of `nets.vit.make`. timm builds every one, those that are not `standard` by `model_args`."""
  variant: str
  patch: int
  size: int
  depth: int

  @property
  def standard(self) -> bool:
    """Whether it is what its `name` means in timm."""
    return not self.model_args

  @property
  def name(self) -> str:
    return f'vit_{self.variant}_patch16_224'

  @property
  def model_args(self) -> dict:
    """What differs from what timm calls `name`."""
    own = {'patch_size': (self.patch, 16), 'img_size': (self.size, 224), 'depth': (self.depth, DEPTH)}
    return {k: value for k, (value, usual) in own.items() if value != usual}


def backbone(state: State) -> tuple[State, str, list[str]]:
  """As `torchvision.backbone`, of a ViT."""
  return torchvision.backbone(state, MARK, OWN, 'ViT')


def architecture(state: State, small: str = '') -> Architecture:
  """What the encoder's tensors are, from their names and shapes; UserError where it is none that `nets.vit` has."""
  shapes = {k: state[k].shape if k in state else () for k in ('cls_token', 'pos_embed', f'{FIRST}.weight')}
  wrong = [k for k, ndim in zip(shapes, (3, 3, 4), strict=True) if len(shapes[k]) != ndim]
  if wrong:
    raise UserError(f'{wrong[0]} is missing, or has another shape.', 'Give the whole of a timm ViT with a class token.')
  width, patch = shapes['cls_token'][-1], shapes[f'{FIRST}.weight'][-1]
  variant = next((name for name, (D, _) in VARIANTS.items() if D == width), None)
  side = math.isqrt(max(shapes['pos_embed'][1] - 1, 0))
  if variant is None or side * side != shapes['pos_embed'][1] - 1:
    raise UserError(f'it is {width} wide, with {shapes["pos_embed"][1]} positions: no ViT here is so.',
                    f'Known widths: {", ".join(str(D) for D, _ in VARIANTS.values())}; the patches fill a square.')
  depth = len({k.split('.')[1] for k in state if k.startswith('blocks.')})
  return Architecture(variant, patch, side * patch, depth)


def building(a: Architecture, path: str) -> str:
  """Python that builds the network in timm, by the config.json beside it, and loads `path`."""
  return f"import timm\nnet = timm.create_model('local-dir:{pathlib.PurePath(path).parent}', pretrained=True).eval()"


def torch_features(a: Architecture) -> Callable[[State, np.ndarray], np.ndarray]:
  """(state, normalised images [N S S 3] float32) -> features [N D], by plain torch. ImportError where it is missing."""
  import torch
  import torch.nn.functional as F  # noqa: N812

  @torch.no_grad()
  def features(state: State, images: np.ndarray) -> np.ndarray:
    values = {k: torch.from_numpy(np.array(v)) for k, v in state.items()}
    of = lambda name: (values[f'{name}.weight'], values[f'{name}.bias'])
    norm = lambda x, name: F.layer_norm(x, x.shape[-1:], *of(name), eps=EPSILON)
    linear = lambda x, name: F.linear(x, *of(name))
    x = F.conv2d(torch.from_numpy(images).permute(0, 3, 1, 2), *of(FIRST), stride=a.patch).flatten(2).transpose(1, 2)
    x = torch.cat([values['cls_token'].expand(len(x), -1, -1), x], 1) + values['pos_embed']
    for i in range(a.depth):
      own = f'blocks.{i}'
      qkv = linear(norm(x, f'{own}.norm1'), f'{own}.attn.qkv').unflatten(2, (3, VARIANTS[a.variant][1], -1))
      h = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4)).transpose(1, 2).flatten(2)
      x = x + linear(h, f'{own}.attn.proj')
      x = x + linear(F.gelu(linear(norm(x, f'{own}.norm2'), f'{own}.mlp.fc1')), f'{own}.mlp.fc2')
    return norm(x, 'norm')[:, 0].numpy()
  return features

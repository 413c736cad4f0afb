"""timm's Vision Transformers: the names of their weights, their architecture, and torch code."""
import math
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from equivariant_ssl.errors import UserError
from equivariant_ssl.export import torchvision
from equivariant_ssl.export.weight_files import State
from equivariant_ssl.nets.vit import DEPTH, EPSILON, VARIANTS, to_torch  # noqa: F401

MARK = 'blocks.0.attn.qkv.weight'  # the name of a tensor that every ViT has
MODULES = ('cls_token', 'pos_embed', 'patch_embed', 'blocks', 'norm')  # the modules of the encoder
FIRST, CLASSIFIER, POOL = 'patch_embed.proj', 'head', 'token'  # what timm's configs call them


class Architecture(NamedTuple):
  """A ViT: the arguments of `nets.vit.make`.

  timm builds every ViT; one that is not `standard` needs `model_args`.
  """
  variant: str
  patch: int
  size: int
  depth: int

  @property
  def standard(self) -> bool:
    """Whether it is what `name` means in timm."""
    return not self.model_args

  @property
  def name(self) -> str:
    """The name of the nearest architecture that timm has."""
    return f'vit_{self.variant}_patch16_224'

  @property
  def model_args(self) -> dict:
    """The settings in which it differs from what timm calls `name`."""
    settings = {'patch_size': (self.patch, 16), 'img_size': (self.size, 224),
                'depth': (self.depth, DEPTH)}
    return {k: value for k, (value, usual) in settings.items() if value != usual}

  @property
  def note(self) -> str:
    """'', because timm builds every ViT."""
    return ''


def backbone(state: State) -> tuple[State, str, list[str]]:
  """Do for a ViT what `torchvision.backbone` does for a ResNet."""
  return torchvision.backbone(state, MARK, MODULES, 'ViT')


def architecture(state: State, small_stem: str = '') -> Architecture:
  """Return the architecture that the names and shapes of the encoder's tensors have.

  small_stem: is not used; `torchvision.architecture` needs it.
  Raises UserError where `nets.vit` has no such architecture.
  """
  names = ('cls_token', 'pos_embed', f'{FIRST}.weight')
  shapes: dict[str, tuple[int, ...]] = {k: state[k].shape if k in state else () for k in names}
  wrong = [k for k, ndim in zip(shapes, (3, 3, 4), strict=True) if len(shapes[k]) != ndim]
  if wrong:
    raise UserError(f'{wrong[0]} is missing, or has another shape.',
                    'Give all tensors of a timm ViT with a class token.')
  width, patch = shapes['cls_token'][-1], shapes[f'{FIRST}.weight'][-1]
  positions = shapes['pos_embed'][1]
  variant = next((name for name, (D, _) in VARIANTS.items() if D == width), None)
  side = math.isqrt(max(positions - 1, 0))
  if variant is None or side * side != positions - 1:
    widths = ', '.join(str(D) for D, _ in VARIANTS.values())
    raise UserError(f'it is a ViT of width {width} with {positions} positions, and no such ViT is '
                    'known here.', f'Known widths are {widths}; the patches must fill a square.')
  depth = len({k.split('.')[1] for k in state if k.startswith('blocks.')})
  return Architecture(variant, patch, side * patch, depth)


def build_code(architecture: Architecture, path: str) -> str:
  """Return Python code that builds the network in timm and loads `path`.

  timm reads the architecture from the config.json in the same folder.
  """
  return ('import timm\n'
          f"net = timm.create_model('local-dir:{pathlib.PurePath(path).parent}', "
          'pretrained=True).eval()')


def torch_features(architecture: Architecture) -> Callable[[State, np.ndarray], np.ndarray]:
  """Return a function (state, normalized images [N S S 3] float32) -> features [N D].

  It computes in plain torch. Raises ImportError where torch is missing.
  """
  import torch  # pyright: ignore[reportMissingImports]  (torch is optional)
  import torch.nn.functional as F  # noqa: N812  # pyright: ignore[reportMissingImports]  (as above)

  @torch.no_grad()
  def features(state: State, images: np.ndarray) -> np.ndarray:
    values = {k: torch.from_numpy(np.array(v)) for k, v in state.items()}

    def weights(name: str) -> tuple:
      return values[f'{name}.weight'], values[f'{name}.bias']

    def norm(x, name: str):
      return F.layer_norm(x, x.shape[-1:], *weights(name), eps=EPSILON)

    def linear(x, name: str):
      return F.linear(x, *weights(name))

    x = torch.from_numpy(images).permute(0, 3, 1, 2)
    x = F.conv2d(x, *weights(FIRST), stride=architecture.patch).flatten(2).transpose(1, 2)
    x = torch.cat([values['cls_token'].expand(len(x), -1, -1), x], 1) + values['pos_embed']
    heads = VARIANTS[architecture.variant][1]
    for i in range(architecture.depth):
      block = f'blocks.{i}'
      qkv = linear(norm(x, f'{block}.norm1'), f'{block}.attn.qkv').unflatten(2, (3, heads, -1))
      h = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4)).transpose(1, 2).flatten(2)
      x = x + linear(h, f'{block}.attn.proj')
      h = F.gelu(linear(norm(x, f'{block}.norm2'), f'{block}.mlp.fc1'))
      x = x + linear(h, f'{block}.mlp.fc2')
    return norm(x, 'norm')[:, 0].numpy()
  return features

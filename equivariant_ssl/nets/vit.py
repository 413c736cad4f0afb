"""Vision Transformers as timm computes and names them.

Sources: Dosovitskiy et al. 2021; Touvron et al. 2021 for the small ones.
"""
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from equivariant_ssl.errors import UserError
from equivariant_ssl.nets.conv import DTYPES, Conv
from equivariant_ssl.registry import unknown_name
from equivariant_ssl.types import Array

# variant: (width, heads); a head is 64 wide.
VARIANTS = {'tiny': (192, 3), 'small': (384, 6), 'base': (768, 12)}
DEPTH = 12      # blocks
RATIO = 4       # the width of an MLP's hidden layer, over the width of its input
EPSILON = 1e-6  # what LayerNorm adds to the variance

normal = nn.initializers.normal(.02)  # timm truncates at +-2, a hundred standard deviations


def _norm(x: Array, name: str) -> Array:
  norm = nn.LayerNorm(EPSILON, dtype='float32', use_fast_variance=False, name=name)
  return norm(x.astype(jnp.float32)).astype(x.dtype)


class Block(nn.Module):
  """x + attention(norm(x)), then x + MLP(norm(x)): [N T D] -> [N T D]."""
  heads: int
  dtype: str

  @nn.compact
  def __call__(self, x: Array) -> Array:
    D, dense = x.shape[-1], functools.partial(nn.Dense, dtype=self.dtype, kernel_init=normal)
    qkv = dense(3 * D, name='attn_qkv')(_norm(x, 'norm1'))
    qkv = qkv.reshape(*x.shape[:2], 3, self.heads, D // self.heads)
    # The softmax of bfloat16 inputs is computed in float32.
    with jax.numpy_dtype_promotion('standard'):
      h = jax.nn.dot_product_attention(*(qkv[:, :, i] for i in range(3))).reshape(x.shape)
    x = x + dense(D, name='attn_proj')(h)
    h = nn.gelu(dense(RATIO * D, name='mlp_fc1')(_norm(x, 'norm2')), approximate=False)
    return x + dense(D, name='mlp_fc2')(h)


class ViT(nn.Module):
  """A Vision Transformer; see `make`.

  `dims` holds the number of features of each block, and `dim` that of the last, which a call
  returns. All are the same.
  """
  variant: str
  patch: int
  size: int
  depth: int
  dtype: str
  remat: bool

  @property
  def dim(self) -> int:
    return VARIANTS[self.variant][0]

  @property
  def dims(self) -> tuple[int, ...]:
    return (self.dim,) * self.depth

  def _positions(self, rows: int, columns: int) -> Array:
    """The position embeddings [1 1+T D].

    Those of the patches are resized where the grid is another one, as timm does.
    """
    side = self.size // self.patch
    table = self.param('pos_embed', normal, (1, 1 + side * side, self.dim))
    if (rows, columns) == (side, side):
      return table
    grid = table[:, 1:].reshape(1, side, side, self.dim)
    grid = jax.image.resize(grid, (1, rows, columns, self.dim), 'bicubic',
                            precision=jax.lax.Precision.HIGHEST)
    return jnp.concatenate([table[:, :1], grid.reshape(1, rows * columns, self.dim)], axis=1)

  @nn.compact
  def stages(self, x: Array, train: bool) -> tuple[Array, ...]:
    """The class token [N D] float32 after each block, through the last norm, for x [N H W C]."""
    if any(side % self.patch for side in x.shape[1:3]):
      raise UserError(f'Images of {x.shape[1]} x {x.shape[2]} pixels cannot be cut into patches of '
                      f'{self.patch}.', 'Change the size of the views, or --config.encoder.patch.')
    x = Conv(self.dim, self.patch, self.patch, dtype=self.dtype, bias=True,
             name='patch_embed_proj')(x)
    token = self.param('cls_token', nn.initializers.normal(1e-6), (1, 1, self.dim))
    positions = self._positions(*x.shape[1:3])
    token = jnp.broadcast_to(token, (len(x), 1, self.dim)).astype(x.dtype)
    x = jnp.concatenate([token, x.reshape(len(x), -1, self.dim)], axis=1)
    x = x + positions.astype(x.dtype)
    block: Any = nn.remat(Block) if self.remat else Block
    tokens = []
    for i in range(self.depth):
      x = block(VARIANTS[self.variant][1], self.dtype, name=f'blocks_{i}')(x)
      tokens.append(x[:, 0])
    # LayerNorm treats tokens apart, so the class tokens of all blocks are normalized at once.
    normalized = _norm(jnp.stack(tokens, axis=1).astype(jnp.float32), 'norm')
    return tuple(normalized[:, i] for i in range(self.depth))

  def __call__(self, x: Array, train: bool, tap: int | None = None) -> Array:
    """The features [N D] float32 of x [N H W C]: of the last block, or of block `tap`, from 1."""
    return self.stages(x, train)[-1 if tap is None else tap - 1]


def make(variant: str = 'small', patch: int = 16, size: int = 224, depth: int = DEPTH,
         dtype: str = 'float32', remat: bool = False) -> ViT:
  """A ViT whose features are those of the class token.

  variant: 'tiny', 'small' or 'base', of width 192, 384 or 768.
  patch:   the side of a patch, in pixels.
  size:    the side of the images that the positions are for, as a rule config.size (CIFAR: size 32,
           patch 4). For views of another size the positions are resized.
  depth:   the number of blocks.
  dtype:   the dtype of the computation. Weights, LayerNorm, softmax and output stay float32.
  remat:   keep only the input of each block, and compute the block again in the backward pass: a
           third more work for much less memory.

  It has learned positions, LayerNorm before each part of a block, and the exact GELU. Raises
  UserError for an unknown variant or dtype, or a size that is no multiple of the patch.
  """
  for what, name, known in (('vit.variant', variant, VARIANTS), ('vit.dtype', dtype, DTYPES)):
    if name not in known:
      raise unknown_name(what, name, known)
  if patch < 1 or size < patch or size % patch or depth < 1:
    raise UserError(f'vit.size is {size}, vit.patch is {patch} and vit.depth is {depth}.',
                    'The size must be a multiple of the patch, and the depth at least 1, as in '
                    'size 224, patch 16, depth 12.')
  return ViT(variant, patch, size, depth, dtype, remat)


def to_torch(params: Any, stats: Any = None) -> dict[str, np.ndarray]:
  """The state dict of timm: weights under its names and in its layouts.

  params: the 'params' of a ViT. There is no classifier `head`.
  """
  words, layouts = {'kernel': 'weight', 'scale': 'weight'}, {4: (3, 2, 0, 1), 2: (1, 0)}
  state = {}
  leaves: Any = jax.tree_util.tree_leaves_with_path(params)
  for path, leaf in leaves:
    *modules, word = (part.key for part in path)
    name = '.'.join(modules).replace('_', '.').replace('patch.embed', 'patch_embed')
    array = np.asarray(leaf)
    name = f'{name}.{words.get(word, word)}' if name else word
    state[name] = array.transpose(layouts.get(array.ndim, tuple(range(array.ndim))))
  return state

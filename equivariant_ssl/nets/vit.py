"""Vision Transformers as timm computes and names them (Dosovitskiy et al. 2021; the small ones: Touvron et al. 2021)."""
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from equivariant_ssl.errors import UserError
from equivariant_ssl.nets.conv import DTYPES, Conv
from equivariant_ssl.registry import unknown
from equivariant_ssl.types import Array

VARIANTS = {'tiny': (192, 3), 'small': (384, 6), 'base': (768, 12)}  # width, heads; a head is 64 wide
DEPTH, RATIO, EPSILON = 12, 4, 1e-6  # blocks; of an MLP's hidden layer to its input; of LayerNorm

normal = nn.initializers.normal(.02)  # timm truncates at +-2, which is a hundred deviations


def _norm(x: Array, name: str) -> Array:
  return nn.LayerNorm(EPSILON, dtype='float32', use_fast_variance=False, name=name)(x.astype(jnp.float32)).astype(x.dtype)


class Block(nn.Module):
  """x + attention(norm(x)), then x + MLP(norm(x)): [N T D] -> [N T D]."""
  heads: int
  dtype: str

  @nn.compact
  def __call__(self, x: Array) -> Array:
    D, dense = x.shape[-1], functools.partial(nn.Dense, dtype=self.dtype, kernel_init=normal)
    qkv = dense(3 * D, name='attn_qkv')(_norm(x, 'norm1')).reshape(*x.shape[:2], 3, self.heads, D // self.heads)
    with jax.numpy_dtype_promotion('standard'):  # it takes bfloat16 to a float32 softmax and back
      h = jax.nn.dot_product_attention(*(qkv[:, :, i] for i in range(3))).reshape(x.shape)
    x = x + dense(D, name='attn_proj')(h)
    h = nn.gelu(dense(RATIO * D, name='mlp_fc1')(_norm(x, 'norm2')), approximate=False)
    return x + dense(D, name='mlp_fc2')(h)


class ViT(nn.Module):
  """See `make`. `dims`: the features of each block, `dim`: of the last, what a call returns; all of one width."""
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
    """The position embeddings [1 1+T D]; those of the patches resized to another grid, as timm does."""
    side = self.size // self.patch
    table = self.param('pos_embed', normal, (1, 1 + side * side, self.dim))
    if (rows, columns) == (side, side):
      return table
    grid = table[:, 1:].reshape(1, side, side, self.dim)
    grid = jax.image.resize(grid, (1, rows, columns, self.dim), 'bicubic', precision='highest')
    return jnp.concatenate([table[:, :1], grid.reshape(1, rows * columns, self.dim)], axis=1)

  @nn.compact
  def stages(self, x: Array, train: bool) -> tuple[Array, ...]:
    """x [N H W C] -> the class token after each block, through the last norm: [N D] float32."""
    if any(side % self.patch for side in x.shape[1:3]):
      raise UserError(f'images of {x.shape[1]} x {x.shape[2]} pixels cannot be cut into patches of {self.patch}.',
                      'Change the size of the views, or --config.encoder.patch.')
    x = Conv(self.dim, self.patch, self.patch, dtype=self.dtype, bias=True, name='patch_embed_proj')(x)
    token = self.param('cls_token', nn.initializers.normal(1e-6), (1, 1, self.dim))
    positions = self._positions(*x.shape[1:3])
    token = jnp.broadcast_to(token, (len(x), 1, self.dim)).astype(x.dtype)
    x = jnp.concatenate([token, x.reshape(len(x), -1, self.dim)], axis=1) + positions.astype(x.dtype)
    block = nn.remat(Block) if self.remat else Block
    tokens = []
    for i in range(self.depth):
      x = block(VARIANTS[self.variant][1], self.dtype, name=f'blocks_{i}')(x)
      tokens.append(x[:, 0])
    # LayerNorm treats tokens apart, so the others need not be normalised, nor the blocks one after the other.
    tokens = _norm(jnp.stack(tokens, axis=1).astype(jnp.float32), 'norm')
    return tuple(tokens[:, i] for i in range(self.depth))

  def __call__(self, x: Array, train: bool, tap: int | None = None) -> Array:
    """x [N H W C] float -> features [N D] float32 of the last block, or of block `tap` (from 1)."""
    return self.stages(x, train)[-1 if tap is None else tap - 1]


def make(variant: str = 'small', patch: int = 16, size: int = 224, depth: int = DEPTH, dtype: str = 'float32',
         remat: bool = False) -> ViT:
  """A ViT: `variant` 'tiny', 'small' or 'base' (192, 384 or 768 wide), of `depth` blocks, on squares of `patch` pixels.

  Class token, learned positions, pre-norm LayerNorm, exact GELU; the features are the class token's. size: of the images
  that the positions are for, config.size as a rule (CIFAR: size 32, patch 4); for views of another size they are
  resized. dtype: of the computation; weights, LayerNorm, softmax and output stay float32. remat: keep each block's input
  alone and compute the block again on the way back, a third more work for much less memory. Raises UserError for an
  unknown variant or dtype, or a size that is no multiple of `patch`.
  """
  for what, name, known in (('vit.variant', variant, VARIANTS), ('vit.dtype', dtype, DTYPES)):
    if name not in known:
      raise unknown(what, name, known)
  if patch < 1 or size < patch or size % patch or depth < 1:
    raise UserError(f'vit.size is {size}, vit.patch {patch} and vit.depth {depth}.',
                    'The size is a multiple of the patch, and there is a block at least: e.g. size 224, patch 16, depth 12.')
  return ViT(variant, patch, size, depth, dtype, remat)


def to_torch(params: Any, stats: Any = None) -> dict[str, np.ndarray]:
  """Weights under the names and in the layouts of timm's state dict; params: a ViT's. The classifier `head` is not there."""
  words, layouts = {'kernel': 'weight', 'scale': 'weight'}, {4: (3, 2, 0, 1), 2: (1, 0)}
  state = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    *modules, word = (part.key for part in path)
    name = '.'.join(modules).replace('_', '.').replace('patch.embed', 'patch_embed')
    array = np.asarray(leaf)
    state[f'{name}.{words.get(word, word)}' if name else word] = array.transpose(layouts.get(array.ndim, range(array.ndim)))
  return state

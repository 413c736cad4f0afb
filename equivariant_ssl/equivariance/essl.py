"""E-SSL (Dangovski et al. 2022): say which of a few transformations was applied, from one image."""
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from equivariant_ssl.augment import class_of
from equivariant_ssl.equivariance.pairing import flat
from equivariant_ssl.errors import UserError
from equivariant_ssl.nets import mlp
from equivariant_ssl.types import Action, Array, Equivariance, Group, Key, Op, Pair, Size, Wiring


class Head(nn.Module):
  """Logits [N, classes of all ops]; of the source too where the answer is relative to it."""
  classify: nn.Module
  relative: bool

  def embed(self, features: Array, train: bool) -> Array:
    return features

  def __call__(self, pair: Pair, train: bool) -> Array:
    shown = jnp.concatenate([pair.source, pair.target], axis=-1) if self.relative else pair.target
    return self.classify(shown, train)


def still(op: Op, names: tuple[str, ...]) -> Op:
  """The chain in which the ops `names` keep their identity action and the others draw."""
  def sample(key: Key, size: Size) -> Action:
    identity = op.identity(size)
    return {**op.sample(key, size), **{name: identity[name] for name in names}}
  return op._replace(sample=sample)


def make(size: int = 0, crop_scale: tuple[float, ...] = (), relative: bool = False, hidden: tuple[int, ...] = (2048, 2048),
         hidden_activation_last: bool = True) -> Callable[[Wiring], Equivariance]:
  """The cross-entropy of the class of each discrete op that it is told (four-fold rotation, as published, but also a flip,
  jigsaw, inversion, blur level, ...), summed over these ops.

  Role `sensitive`: one small view of its own an image, shown under every choice of the op (of the first, where several
  are sensitive), as the official code does. Role `both`: the invariance's views and the choices they drew.
  size: side of its own views in pixels, 0 half of the others'. crop_scale: the area of its own crops, () that of the others
  (ImageNet: (.05, .14)). relative: the pairwise form, told apart from a view of the same image without the ops, which
  stays well-posed where the data already hold transformed images: the source is the invariance's first view or, with role
  `both`, a view of its own. hidden: Linear, LayerNorm, ReLU each; hidden_activation_last: the last ReLU, which E-SSL's SimCLR
  has and its SimSiam has not. Published weights: .4 (SimCLR, SimSiam CIFAR-10), .08 (SimSiam ImageNet), 8 (Barlow
  Twins). Raises UserError where it is told no discrete op.
  """
  def wire(wiring: Wiring) -> Equivariance:
    choices = wiring.told.choices
    if not choices:
      raise UserError(f'{wiring.name} predicts discrete ops, and is told none.',
                      'e.g. --config.augment.rotate.role=sensitive (others: flip, vflip, jigsaw, invert, blur_levels).')
    visible = wiring.seen[0].name.split('+')
    sensitive = [name for name in choices if name not in visible]
    side = size or wiring.size // 2
    own = wiring.build(side, {'crop': {'scale': crop_scale}} if crop_scale else {})[0]
    groups, uses = {}, ['views']
    if sensitive:
      groups[wiring.name], uses = Group((own,), side, all_of=sensitive[0]), [wiring.name]
    if relative:
      source = 'views' if sensitive else f'{wiring.name} still'
      if not sensitive:
        groups[source] = Group((still(wiring.own[0], tuple(choices)),), wiring.size)
      uses.append(source)

    def pairs(embedded: dict[str, Array], actions: dict[str, Action]) -> Pair:
      target, after = embedded[uses[0]], actions[uses[0]]
      if not relative:
        return Pair(*(flat(x) for x in (target, target, after, after)))
      first = jax.tree.map(lambda a: a[:, :1], (embedded[uses[1]], actions[uses[1]]))
      source, before = flat(first, target.shape[1])
      return Pair(source, flat(target), before, flat(after))

    counts = {name: len(jax.tree.leaves(c)[0]) for name, c in choices.items()}

    def loss(answer: Array, pair: Pair, embeddings=None) -> Array:
      total, start = jnp.zeros(()), 0
      for name, K in counts.items():
        label = jax.vmap(lambda action, c=choices[name]: class_of(c, action))(pair.after[name])
        logits = answer[:, start:start + K].astype(jnp.float32)
        total, start = total + optax.softmax_cross_entropy_with_integer_labels(logits, label).mean(), start + K
      return total

    classify = mlp.make(hidden, sum(counts.values()), bias=True, norm='layer', last_bias=True,
                        hidden_activation_last=hidden_activation_last, dtype=wiring.dtype)
    return Equivariance(Head(classify, relative), loss, groups, tuple(uses), pairs, predicts='action')

  return wire

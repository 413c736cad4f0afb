"""E-SSL (Dangovski et al. 2022): say which of a few transformations was applied, from one image."""
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from equivariant_ssl.augment import class_of, only
from equivariant_ssl.equivariance.pairing import flat
from equivariant_ssl.errors import UserError
from equivariant_ssl.nets import mlp
from equivariant_ssl.types import Action, Array, Equivariance, Group, Pair, Wiring


class Head(nn.Module):
  """Logits [N, classes of all ops]; of the source too where the answer is relative to it."""
  classify: nn.Module
  relative: bool

  def embed(self, features: Array, train: bool) -> Array:
    return features

  def __call__(self, pair: Pair, train: bool) -> Array:
    shown = jnp.concatenate([pair.source, pair.target], axis=-1) if self.relative else pair.target
    return self.classify(shown, train)


def make(weight: float = .4, size: int = 0, crop_scale: tuple[float, ...] = (), relative: bool = False,
         hidden: tuple[int, ...] = (2048, 2048), hidden_activation_last: bool = True
         ) -> Callable[[Wiring], Equivariance]:
  """The cross-entropy of the class of each discrete op that it is told (four-fold rotation, as published, but also a flip,
  jigsaw, inversion, blur level, ...), summed over these ops: sum_op mean_n -log softmax(g(h_n))_op[class].

  Role `sensitive`: one small view of its own an image, shown under every choice of the op (of the first, where several
  are sensitive; the others draw), as the official code does. Role `both`: the invariance's views and the choices they drew.
  size: side of its own views in pixels, 0 half of the others' (16 of 32; ImageNet: 96 of 224). crop_scale: the area of
  its own crops, () that of the others (ImageNet: (.05, .14)). relative: the pairwise form, g([h of the same image
  without the ops, h]), which stays well-posed where the data already hold transformed images: the source is the
  invariance's first view where that never has them, else a view of its own. hidden: Linear, LayerNorm, ReLU each (ImageNet:
  (2048, 2048, 128)); hidden_activation_last: the last ReLU, which E-SSL's SimCLR has and its SimSiam has not. Published
  weights: .4 (SimCLR, SimSiam CIFAR-10), .08 (SimSiam ImageNet), 8 (Barlow Twins). The official code turns the finished
  view: give rotate last in the order. Raises UserError where it is told no discrete op.
  """
  def wire(wiring: Wiring) -> Equivariance:
    choices = wiring.told.choices
    if not choices:
      raise UserError(f'{wiring.name} predicts discrete ops, and is told none.',
                      'e.g. --config.augment.rotate.role=sensitive (others: flip, vflip, jigsaw, invert, blur_levels).')
    order = wiring.own[0].name.split('+')
    sensitive = [name for name in choices if name not in wiring.seen[0].name.split('+')]
    side = size or wiring.size // 2
    groups, uses = {}, ('views',)
    if sensitive:
      own = wiring.build(side, {'crop': {'scale': crop_scale}} if crop_scale else {})[0]
      groups[wiring.name], uses = Group((own,), side, all_of=sensitive[0]), (wiring.name,)
    if relative and len(sensitive) == len(choices):
      uses += ('views',)
    elif relative:
      uses += (f'{wiring.name} still',)
      groups[uses[1]] = Group((only(wiring.own[0], *(name for name in order if name not in choices)),), wiring.size)

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
    return Equivariance(Head(classify, relative), loss, groups, uses, pairs, predicts='action', weight=weight)

  return wire

"""E-SSL (Dangovski et al. 2022): say which of a few transformations one image received."""
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from equivariant_ssl.augment import class_of, only
from equivariant_ssl.equivariance.pairing import flatten
from equivariant_ssl.errors import UserError
from equivariant_ssl.nets import mlp
from equivariant_ssl.types import Action, Array, Equivariance, Group, Pair, Wiring


class EsslHead(nn.Module):
  """Logits [N, classes of all ops] of the target's features.

  relative: the head reads the source's features too.
  """
  classify: nn.Module
  relative: bool

  def embed(self, features: Array, train: bool) -> Array:
    return features

  def __call__(self, pair: Pair, train: bool) -> Array:
    inputs = pair.target
    if self.relative:
      inputs = jnp.concatenate([pair.source, pair.target], axis=-1)
    return self.classify(inputs, train)


def classification_loss(choices: dict[str, Action]) -> Callable[..., Array]:
  """(logits [N, classes of all ops], pair) -> the cross-entropies of the ops' classes, summed.

  choices: {op: all its actions}, in the order of the logits.
  """
  counts = {name: len(jax.tree.leaves(c)[0]) for name, c in choices.items()}

  def classes(name: str, actions: Action) -> Array:
    return jax.vmap(lambda action: class_of(choices[name], action))(actions[name])

  def loss(answer: Array, pair: Pair, embeddings=None) -> Array:
    total, start = jnp.zeros(()), 0
    for name, K in counts.items():
      logits = answer[:, start:start + K].astype(jnp.float32)
      losses = optax.softmax_cross_entropy_with_integer_labels(logits, classes(name, pair.after))
      total, start = total + losses.mean(), start + K
    return total
  return loss


def choose_groups(wiring: Wiring, side: int, crop_scale: tuple[float, ...], relative: bool
                  ) -> tuple[tuple[str, ...], dict[str, Group]]:
  """(uses, groups): the views that are classified, and with `relative` their sources."""
  choices = wiring.conditioning.choices or {}
  sensitive = [name for name in choices if name not in wiring.view_chains[0].name.split('+')]
  groups, uses = {}, ['views']
  if sensitive:
    changes = {'crop': {'scale': crop_scale}} if crop_scale else {}
    chain = wiring.build_own_chains(side, changes)[0]
    groups[wiring.name] = Group((chain,), side, all_of=sensitive[0])
    uses = [wiring.name]
  if relative and len(sensitive) == len(choices):
    uses.append('views')
  elif relative:
    others = [name for name in wiring.own_chains[0].name.split('+') if name not in choices]
    source = f'{wiring.name} still'  # a group's name is part of the keys that it draws with
    groups[source] = Group((only(wiring.own_chains[0], *others),), wiring.size)
    uses.append(source)
  return tuple(uses), groups


def make(weight: float = .4, size: int = 0, crop_scale: tuple[float, ...] = (),
         relative: bool = False, hidden: tuple[int, ...] = (2048, 2048),
         hidden_activation_last: bool = True) -> Callable[[Wiring], Equivariance]:
  """E-SSL: the cross-entropy of the class of each discrete op, summed over the ops.

    sum_op mean_n -log softmax(g(h_n))_op[class]

  The ops are the discrete ones of the objective's augmentations: four-fold rotation, as published,
  but also a flip, jigsaw, inversion, blur level and others.

  With the role `sensitive`, each image has one small view of its own under every choice of the op,
  as in the official code. With several sensitive ops, the first has every choice, and the others
  draw.
  With the role `both`, the invariance's views are classified by the choices that they drew.

  size:       the side of its own views in pixels; 0 is half of the others' (16 of 32; ImageNet: 96
              of 224).
  crop_scale: the range of the area of its own crops; () is that of the others (ImageNet: (.05,
              .14)).
  relative:   the pairwise form g([h of the same image without the ops, h]). It stays well-posed
              where the data already hold transformed images. The source is the invariance's first
              view where that never has the ops, else a view of its own.
  hidden:     the widths of Linear, LayerNorm and ReLU layers (ImageNet: (2048, 2048, 128)).
  hidden_activation_last: the last ReLU, which E-SSL's SimCLR has and its SimSiam has not.

  Published weights: .4 (SimCLR, SimSiam CIFAR-10), .08 (SimSiam ImageNet), 8 (Barlow Twins). The
  official code turns the finished view: put rotate last in the order. Raises UserError where no
  augmentation is discrete.
  """
  def wire(wiring: Wiring) -> Equivariance:
    choices = wiring.conditioning.choices
    if not choices:
      raise UserError(f'{wiring.name} predicts discrete augmentations, and has none.',
                      'e.g. --config.augment.rotate.role=sensitive (others: flip, vflip, jigsaw, '
                      'invert, blur_levels).')
    uses, groups = choose_groups(wiring, size or wiring.size // 2, crop_scale, relative)

    def pairs(embedded: dict[str, Array], actions: dict[str, Action]) -> Pair:
      target, after = embedded[uses[0]], actions[uses[0]]
      if not relative:
        return Pair(*(flatten(x) for x in (target, target, after, after)))
      first = jax.tree.map(lambda a: a[:, :1], (embedded[uses[-1]], actions[uses[-1]]))
      source, before = flatten(first, target.shape[1])
      return Pair(source, flatten(target), before, flatten(after))

    classes = sum(len(jax.tree.leaves(c)[0]) for c in choices.values())
    classify = mlp.make(hidden, classes, bias=True, norm='layer', last_bias=True,
                        hidden_activation_last=hidden_activation_last, dtype=wiring.dtype)
    return Equivariance(EsslHead(classify, relative), classification_loss(choices), groups, uses,
                        pairs, predicts='action', weight=weight)

  return wire

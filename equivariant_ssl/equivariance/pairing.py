"""Which embeddings are paired, for the objectives that share it."""
from collections.abc import Callable

import jax
import jax.numpy as jnp

from equivariant_ssl.augment import reference
from equivariant_ssl.types import Action, Array, Group, Pair, Wiring

Pairs = Callable[[dict[str, Array], dict[str, Action]], Pair]


def flat(tree, views: int | None = None):
  """Arrays [B V ...] (or [B 1 ...], repeated to `views`) as [B V ...] -> [N ...], B-major."""
  def one(a: Array) -> Array:
    a = a if views is None else jnp.broadcast_to(a, (a.shape[0], views, *a.shape[2:]))
    return a.reshape(-1, *a.shape[2:])
  return jax.tree.map(one, tree)


def home(wiring: Wiring) -> tuple[str, dict[str, Group]]:
  """The group of an objective that needs no other views than its roles say, and the groups to ask for it: the
  invariance's views, or its own where an op is sensitive."""
  if wiring.sensitive:
    return wiring.name, {wiring.name: Group(wiring.own, wiring.size)}
  return 'views', {}


def from_reference(wiring: Wiring, side: float = 1.) -> tuple[tuple[str, ...], dict[str, Group], Pairs]:
  """(uses, groups, pairs): from the un-augmented image to each view, N = B V."""
  group, groups = home(wiring)
  groups['reference'] = Group((reference(wiring.own[0], side),), wiring.size)
  V = len(wiring.own)

  def pairs(embedded: dict[str, Array], actions: dict[str, Action]) -> Pair:
    return Pair(flat(embedded['reference'], V), flat(embedded[group]), flat(actions['reference'], V), flat(actions[group]))
  return ('reference', group), groups, pairs


def between_views(wiring: Wiring, both: bool = False) -> tuple[tuple[str, ...], dict[str, Group], Pairs]:
  """(uses, groups, pairs): from the first view to the second, N = B; with `both` also back, N = 2B, side by side."""
  group, groups = home(wiring)

  def pairs(embedded: dict[str, Array], actions: dict[str, Action]) -> Pair:
    there, back = (embedded[group], actions[group]), jax.tree.map(lambda a: a[:, ::-1], (embedded[group], actions[group]))
    (source, before), (target, after) = (there, back) if both else jax.tree.map(lambda a: a[:, :1], (there, back))
    return Pair(*(flat(x) for x in (source, target, before, after)))
  return (group,), groups, pairs

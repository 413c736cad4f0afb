"""The pairs of embeddings that several objectives share."""
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from equivariant_ssl.augment import reference
from equivariant_ssl.types import Action, Array, Group, Pair, Wiring

Pairs = Callable[[dict[str, Array], dict[str, Action]], Pair]


def flatten(tree: Any, views: int | None = None) -> Any:
  """Arrays [B V ...] as [N ...], B-major.

  views: repeat arrays [B 1 ...] to this number of views first.
  """
  def flatten_array(a: Array) -> Array:
    a = a if views is None else jnp.broadcast_to(a, (a.shape[0], views, *a.shape[2:]))
    return a.reshape(-1, *a.shape[2:])
  return jax.tree.map(flatten_array, tree)


def views_group(wiring: Wiring) -> tuple[str, dict[str, Group]]:
  """(the name of the group whose views are paired, the groups to ask for).

  It is an objective's own group where it needs views of its own, else the invariance's views.
  """
  if wiring.has_own_views:
    return wiring.name, {wiring.name: Group(wiring.own_chains, wiring.size)}
  return 'views', {}


def from_reference(wiring: Wiring, side: float = 1.
                   ) -> tuple[tuple[str, ...], dict[str, Group], Pairs]:
  """(uses, groups, pairs) from the reference to each view, N = B V.

  side: the side of the reference; see `augment.reference`.
  """
  group, groups = views_group(wiring)
  groups['reference'] = Group((reference(wiring.own_chains[0], side),), wiring.size)
  V = len(wiring.own_chains)

  def pairs(embedded: dict[str, Array], actions: dict[str, Action]) -> Pair:
    return Pair(flatten(embedded['reference'], V), flatten(embedded[group]),
                flatten(actions['reference'], V), flatten(actions[group]))
  return ('reference', group), groups, pairs


def between_views(wiring: Wiring, both: bool = False
                  ) -> tuple[tuple[str, ...], dict[str, Group], Pairs]:
  """(uses, groups, pairs) from the first view of an image to its second, N = B.

  both: there are pairs from the second to the first too, N = 2B. The two pairs of an image are
        neighbors.
  """
  group, groups = views_group(wiring)

  def pairs(embedded: dict[str, Array], actions: dict[str, Action]) -> Pair:
    forward = embedded[group], actions[group]
    backward = jax.tree.map(lambda a: a[:, ::-1], forward)
    if not both:
      forward, backward = jax.tree.map(lambda a: a[:, :1], (forward, backward))
    (source, before), (target, after) = forward, backward
    return Pair(*(flatten(x) for x in (source, target, before, after)))
  return (group,), groups, pairs

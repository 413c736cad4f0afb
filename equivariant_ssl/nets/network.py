"""The whole network: encoder, the invariance's projector and predictor, and one head an equivariance objective."""
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from equivariant_ssl.types import Array, Embeddings, Equivariance, Outputs, Pair, Views

Features = dict[str, Array]  # {group: [B V D]}


def split(together: Array, counts: dict[str, int]) -> Features:
  """[B V ...] as {group: [B v ...]}, the groups of `counts` in order."""
  parts, start = {}, 0
  for name, count in counts.items():
    parts[name] = together[:, start:start + count]
    start += count
  return parts


def tapped(objectives: dict[str, Equivariance]) -> tuple[int, ...]:
  """The stages of the encoder that are read: the last (0), and those that the objectives tap."""
  return tuple(sorted({0, *(o.tap for o in objectives.values())}))


def actions(views: dict[str, Views]) -> dict:
  """{group: [B V ...]}."""
  return {name: v.actions for name, v in views.items()}


class Network(nn.Module):
  """mean, std: of the inputs, a channel. joint: views of one size share one pass through the encoder and the heads,
  and so their BatchNorm statistics (EquiMod); else a pass for each view (BYOL, SimSiam, Barlow Twins, VICReg, CARE), and one
  for each of the groups `together` (E-SSL's turned views). projector, predictor: None where the invariance has none."""
  encoder: nn.Module
  projector: nn.Module | None
  predictor: nn.Module | None
  heads: dict[str, nn.Module]
  mean: tuple[float, ...] = (0., 0., 0.)
  std: tuple[float, ...] = (1., 1., 1.)
  joint: bool = True
  together: tuple[str, ...] = ()

  def stages(self, images: Array, train: bool, taps: tuple[int, ...]) -> list[Array]:
    """Features [... D] float32 of each stage of `taps` (0: the last) of `images` [... H W C] in [0, 1]."""
    channel = lambda values: jnp.array(values, jnp.float32)[None, None, None]
    x = (images.reshape(-1, *images.shape[-3:]) - channel(self.mean)) / channel(self.std)
    found = [self.encoder(x, train)] if taps == (0,) else [self.encoder.stages(x, train)[tap - 1] for tap in taps]
    return [h.reshape(*images.shape[:-3], -1) for h in found]

  def encode(self, images: Array, train: bool = False, tap: int = 0) -> Array:
    """Features [... D] float32 of `images` [... H W C] in [0, 1]."""
    return self.stages(images, train, (tap,))[0]

  def by_view(self, f: Callable, x, apart: bool = True) -> Array:
    """f of a tree of [B V ...], a view at a time where statistics are not joint and the views are `apart`."""
    if self.joint or not apart:
      return f(x)
    V = jax.tree.leaves(x)[0].shape[1]
    return jnp.concatenate([f(jax.tree.map(lambda a: a[:, v:v + 1], x)) for v in range(V)], axis=1)

  def features(self, views: dict[str, Views], train: bool, taps: tuple[int, ...] = (0,)) -> dict[int, Features]:
    """{tap: {group: [B V D]}}."""
    size = {n: v.images.shape[2] for n, v in views.items()}
    passes = [[n for n in views if size[n] == s] for s in sorted(set(size.values()))] if self.joint else [[n] for n in views]
    found = {tap: {} for tap in taps}
    for names in passes:
      images = jnp.concatenate([views[n].images for n in names], axis=1)  # on V: no shard of B moves
      counts = {n: views[n].images.shape[1] for n in names}
      V = 1 if self.joint or names[0] in self.together else images.shape[1]
      stages = [self.stages(part, train, taps) for part in jnp.split(images, V, axis=1)]
      for i, tap in enumerate(taps):
        found[tap] |= split(jnp.concatenate([s[i] for s in stages], axis=1), counts)
    return found

  def project(self, features: Features, actions: dict, objectives: dict[str, Equivariance], train: bool) -> Array:
    """The invariance's embeddings [B V E] of its views: of what the objectives feed its projector. With `features`, what
    a target network computes."""
    if self.projector is None:
      return features['views'] if 'views' in features else next(iter(features.values()))
    fed = features['views']
    for name, objective in objectives.items():
      if objective.feeds:
        fed = self.by_view(lambda x, head=self.heads[name]: head.feed(*x, train), (fed, actions['views']))
    return self.by_view(lambda h: self.projector(h, train), fed)

  def outputs(self, features: dict[int, Features], actions: dict, objectives: dict[str, Equivariance], train: bool
              ) -> Outputs:
    """What follows from the `features` of each tapped stage and the `actions` {group: [B V ...]}: all but the encoder."""
    projected = self.project(features[0], actions, objectives, train)
    predicted = self.by_view(lambda z: self.predictor(z, train), projected) if self.predictor else projected
    answers = {}
    for name, objective in objectives.items():
      pair = self.pair(name, objectives, features[objective.tap], actions, train)
      answers[name] = (self.heads[name](pair, train), pair)
    return Outputs(features[0], Embeddings(projected, predicted, projected), answers)

  def __call__(self, views: dict[str, Views], objectives: dict[str, Equivariance], train: bool) -> Outputs:
    return self.outputs(self.features(views, train, tapped(objectives)), actions(views), objectives, train)

  def target(self, views: dict[str, Views], objectives: dict[str, Equivariance], train: bool) -> Array:
    """The invariance's embeddings [B V E] of `views` alone, for the weights of a target network."""
    return self.project(self.features(views, train)[0], actions(views), objectives, train)

  def pair(self, name: str, objectives: dict[str, Equivariance], features: Features, actions: dict, train: bool) -> Pair:
    """The pairs of objective `name`: its groups embedded (in one pass, for a joint BatchNorm), then paired."""
    objective = objectives[name]
    embed = lambda h: self.embed(name, objectives, h, train)
    if self.joint:
      together = jnp.concatenate([features[g] for g in objective.uses], axis=1)
      embedded = split(embed(together), {g: features[g].shape[1] for g in objective.uses})
    else:
      embedded = {g: self.by_view(embed, features[g], apart=g not in self.together) for g in objective.uses}
    return objective.pairs(embedded, actions)

  def embed(self, name: str, objectives: dict[str, Equivariance], features: Array, train: bool) -> Array:
    """Embeddings [B V E] of features [B V D] as objective `name` embeds: by its head, or by the invariance's projector."""
    shared = objectives[name].shares and self.projector is not None and not any(o.feeds for o in objectives.values())
    return self.projector(features, train) if shared else self.heads[name].embed(features, train)

  def answer(self, name: str, pair: Pair, train: bool = False):
    """What head `name` answers to a pair, for evaluation."""
    return self.heads[name](pair, train)

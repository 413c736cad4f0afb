"""The whole network: an encoder, the invariance's projector and predictor, and the heads."""
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from equivariant_ssl.types import Array, Embeddings, Equivariance, Outputs, Pair, Views

Features = dict[str, Array]  # {group: [B V D]}


def split_groups(together: Array, counts: dict[str, int]) -> Features:
  """{group: [B v ...]} of the array [B V ...], in the order of `counts`, {group: v}."""
  parts, start = {}, 0
  for name, count in counts.items():
    parts[name] = together[:, start:start + count]
    start += count
  return parts


def tapped_stages(objectives: dict[str, Equivariance]) -> tuple[int, ...]:
  """The stages of the encoder that are read: the last (0), and those that the objectives tap."""
  return tuple(sorted({0, *(o.tap for o in objectives.values())}))


def actions(views: dict[str, Views]) -> dict:
  """{group: actions [B V ...]} of the views."""
  return {name: v.actions for name, v in views.items()}


class Network(nn.Module):
  """The encoder and all that reads its features.

  projector, predictor: None where the invariance has none.
  heads:     {objective: head}.
  mean, std: the mean and the standard deviation of the inputs, for each channel.
  joint:     views of one size share one pass through the encoder and the heads, and so their
             BatchNorm statistics (EquiMod). Else each view has a pass of its own (BYOL, SimSiam,
             Barlow Twins, VICReg, CARE).
  together:  the groups whose views share one pass although `joint` is off (E-SSL's turned views).
  """
  encoder: Any
  projector: nn.Module | None
  predictor: nn.Module | None
  heads: dict[str, nn.Module]
  mean: tuple[float, ...] = (0., 0., 0.)
  std: tuple[float, ...] = (1., 1., 1.)
  joint: bool = True
  together: tuple[str, ...] = ()

  def stages(self, images: Array, train: bool, taps: tuple[int, ...]) -> list[Array]:
    """The features [... D] float32 of each stage of `taps` (0 is the last).

    images: [... H W C] in [0, 1].
    """
    def channel(values: tuple[float, ...]) -> Array:
      return jnp.array(values, jnp.float32)[None, None, None]
    x = (images.reshape(-1, *images.shape[-3:]) - channel(self.mean)) / channel(self.std)
    if taps == (0,):
      features = [self.encoder(x, train)]
    else:
      features = [self.encoder.stages(x, train)[tap - 1] for tap in taps]
    return [h.reshape(*images.shape[:-3], -1) for h in features]

  def encode(self, images: Array, train: bool = False, tap: int = 0) -> Array:
    """The features [... D] float32 of `images` [... H W C] in [0, 1]."""
    return self.stages(images, train, (tap,))[0]

  def by_view(self, f: Callable[[Any], Array], x: Any, apart: bool = True) -> Array:
    """f of a tree of arrays [B V ...]: [B V ...].

    f sees one view at a time where the statistics are not joint and the views are `apart`.
    """
    if self.joint or not apart:
      return f(x)
    V = jax.tree.leaves(x)[0].shape[1]
    return jnp.concatenate([f(jax.tree.map(lambda a: a[:, v:v + 1], x)) for v in range(V)], axis=1)

  def features(self, views: dict[str, Views], train: bool, taps: tuple[int, ...] = (0,)
               ) -> dict[int, Features]:
    """{tap: {group: [B V D]}} of the views."""
    size = {n: v.images.shape[2] for n, v in views.items()}
    if self.joint:
      passes = [[n for n in views if size[n] == s] for s in sorted(set(size.values()))]
    else:
      passes = [[n] for n in views]
    features = {tap: {} for tap in taps}
    for names in passes:
      # Concatenated on V: no part of a sharded B moves.
      images = jnp.concatenate([views[n].images for n in names], axis=1)
      counts = {n: views[n].images.shape[1] for n in names}
      V = 1 if self.joint or names[0] in self.together else images.shape[1]
      stages = [self.stages(part, train, taps) for part in jnp.split(images, V, axis=1)]
      for i, tap in enumerate(taps):
        together = jnp.concatenate([s[i] for s in stages], axis=1)
        features[tap] |= split_groups(together, counts)
    return features

  def project(self, features: Features, actions: dict, objectives: dict[str, Equivariance],
              train: bool) -> Array:
    """The invariance's embeddings [B V E] of its views.

    The projector reads what the objectives feed it, else the features. A target network computes
    its embeddings by this method too.
    """
    projector = self.projector
    if projector is None:
      return features['views'] if 'views' in features else next(iter(features.values()))
    inputs = features['views']
    for name, objective in objectives.items():
      if objective.feeds:
        inputs = self._feed(self.heads[name], inputs, actions['views'], train)
    return self.by_view(lambda h: projector(h, train), inputs)

  def _feed(self, head: Any, inputs: Array, actions: Any, train: bool) -> Array:
    return self.by_view(lambda x: head.feed(*x, train), (inputs, actions))

  def outputs(self, features: dict[int, Features], actions: dict,
              objectives: dict[str, Equivariance], train: bool) -> Outputs:
    """All that follows the encoder.

    features: {tap: {group: [B V D]}}.
    actions:  {group: [B V ...]}.
    """
    projected = self.project(features[0], actions, objectives, train)
    predictor, predicted = self.predictor, projected
    if predictor is not None:
      predicted = self.by_view(lambda z: predictor(z, train), projected)
    answers = {}
    for name, objective in objectives.items():
      pair = self.pair(name, objectives, features[objective.tap], actions, train)
      answers[name] = (self.heads[name](pair, train), pair)
    return Outputs(features[0], Embeddings(projected, predicted, projected), answers)

  def __call__(self, views: dict[str, Views], objectives: dict[str, Equivariance], train: bool
               ) -> Outputs:
    features = self.features(views, train, tapped_stages(objectives))
    return self.outputs(features, actions(views), objectives, train)

  def target(self, views: dict[str, Views], objectives: dict[str, Equivariance], train: bool
             ) -> Array:
    """The target embeddings [B V E] of `views`, for the weights of a target network."""
    return self.project(self.features(views, train)[0], actions(views), objectives, train)

  def pair(self, name: str, objectives: dict[str, Equivariance], features: Features, actions: dict,
           train: bool) -> Pair:
    """The pairs of objective `name`: its groups are embedded, and then paired.

    For a joint BatchNorm all groups are embedded in one pass.
    """
    objective = objectives[name]

    def embed(h: Array) -> Array:
      return self.embed(name, objectives, h, train)
    if self.joint:
      together = jnp.concatenate([features[g] for g in objective.uses], axis=1)
      counts = {g: features[g].shape[1] for g in objective.uses}
      embedded = split_groups(embed(together), counts)
    else:
      embedded = {g: self.by_view(embed, features[g], apart=g not in self.together)
                  for g in objective.uses}
    return objective.pairs(embedded, actions)

  def embed(self, name: str, objectives: dict[str, Equivariance], features: Array, train: bool
            ) -> Array:
    """The embeddings [B V E] of features [B V D] for objective `name`.

    Its head computes them, or the invariance's projector where the objective shares it.
    """
    fed = any(o.feeds for o in objectives.values())
    if objectives[name].shares and self.projector is not None and not fed:
      return self.projector(features, train)
    head: Any = self.heads[name]
    return head.embed(features, train)

  def answer(self, name: str, pair: Pair, train: bool = False) -> Any:
    """The answer of head `name` to a pair, for an evaluation."""
    return self.heads[name](pair, train)

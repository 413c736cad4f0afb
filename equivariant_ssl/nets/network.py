"""The whole network: encoder, the invariance's projector and predictor, and one head an equivariance objective."""
import flax.linen as nn
import jax.numpy as jnp

from equivariant_ssl.types import Array, Embeddings, Equivariance, Outputs, Pair, Views


class Network(nn.Module):
  """mean, std: of the inputs, a channel. joint: views of one size share one pass through the encoder, and so
  their BatchNorm statistics (EquiMod); else a pass a view (BYOL, SimSiam)."""
  encoder: nn.Module
  projector: nn.Module
  predictor: nn.Module | None
  heads: dict[str, nn.Module]
  mean: tuple[float, ...] = (0., 0., 0.)
  std: tuple[float, ...] = (1., 1., 1.)
  joint: bool = True

  def encode(self, images: Array, train: bool = False) -> Array:
    """Features [... D] float32 of `images` [... H W C] in [0, 1]."""
    x = images.reshape(-1, *images.shape[-3:])
    channel = lambda values: jnp.array(values, jnp.float32)[None, None, None]
    features = self.encoder((x - channel(self.mean)) / channel(self.std), train)
    return features.reshape(*images.shape[:-3], -1)

  def features(self, views: dict[str, Views], train: bool) -> dict[str, Array]:
    """{group: [B V D]}."""
    found = {}
    for size in sorted({v.images.shape[2] for v in views.values()}):
      names = [n for n, v in views.items() if v.images.shape[2] == size]
      images = jnp.concatenate([views[n].images for n in names], axis=1)  # on V: no shard of B moves
      V = images.shape[1]
      if self.joint:
        h = self.encode(images, train)
      else:
        h = jnp.concatenate([self.encode(images[:, v:v + 1], train) for v in range(V)], axis=1)
      start = 0
      for n in names:
        end = start + views[n].images.shape[1]
        found[n], start = h[:, start:end], end
    return found

  def __call__(self, views: dict[str, Views], objectives: dict[str, Equivariance], train: bool) -> Outputs:
    features = self.features(views, train)
    actions = {name: v.actions for name, v in views.items()}
    fed = features['views']
    for objective in objectives.values():
      fed = objective.feed(fed, actions['views'])
    projected = self.projector(fed, train)
    predicted = self.predictor(projected, train) if self.predictor else projected
    answers = {}
    for name, objective in objectives.items():
      pair = self.pair(name, objective, features, actions, train)
      answers[name] = (self.heads[name](pair, train), pair)
    return Outputs(features, Embeddings(projected, predicted, projected), answers)

  def pair(self, name: str, objective: Equivariance, features: dict[str, Array], actions: dict, train: bool) -> Pair:
    """The pairs of objective `name`: its groups embedded in one pass (joint BatchNorm), then paired."""
    together = jnp.concatenate([features[g] for g in objective.uses], axis=1)
    embedded = self.heads[name].embed(together, train)
    parts, start = {}, 0
    for g in objective.uses:
      end = start + features[g].shape[1]
      parts[g], start = embedded[:, start:end], end
    return objective.pairs(parts, actions)

  def answer(self, name: str, pair: Pair, train: bool = False) -> Array:
    """What head `name` answers to a pair, for evaluation."""
    return self.heads[name](pair, train)

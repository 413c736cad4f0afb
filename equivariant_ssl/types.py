"""The nouns of the package: NamedTuples of arrays, and NamedTuples of pure functions."""
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

Array = jax.Array
Key = jax.Array      # a typed key: jax.random.key(seed), folded with keys.key_for
Size = jax.Array     # [2] float32: the true (height, width) of an image, in pixels
Action = Any         # a pytree of arrays: what an op drew and applied; {op.name: action} for a chain

# Of an augmentation: not used; seen by the invariance's views; told to the equivariance head, in its own view group
# only; or seen and told.
ROLES = ('off', 'invariant', 'sensitive', 'both')


class Image(NamedTuple):
  """One image: `pixels` [H W C] float32 in [0, 1], and its true `size` [2] (a canvas may be squashed)."""
  pixels: Array
  size: Size


class Views(NamedTuple):
  """Views of a batch: `images` [B V H W C] float32 in [0, 1], and the `actions` [B V ...] that made them."""
  images: Array
  actions: Action


class Op(NamedTuple):
  """An augmentation as four pure functions of one image (`vmap` makes them functions of a batch).

  identity: size -> the action that does nothing; `apply(identity, x)` is x, `encode(identity)` is 0.
  sample:   (key, size) -> action. Sees no pixels, so a draw can be replayed.
  apply:    (action, image) -> image. Sees no key, so it can be tested.
  encode:   action -> [A] float32, what a network is told.
  choices:  of a discrete op, all its actions stacked [K ...]; the class is the index. Else None.
  relative: (before, after) -> [A] float32, what a network is told of the way from one view to another:
            relative(a, a) is 0 and relative(identity, a) is encode(a). None: encode(after) - encode(before), which is
            wrong for turns and flips.
  """
  name: str
  identity: Callable[[Size], Action]
  sample: Callable[[Key, Size], Action]
  apply: Callable[[Action, Image], Image]
  encode: Callable[[Action], Array]
  choices: Action | None = None
  relative: Callable[[Action, Action], Array] | None = None


class Group(NamedTuple):
  """Views of one size: a chain a view. `share` neighbouring images get one draw; `all_of` names a discrete
  op whose every choice is taken in turn (V = chains x K, the other draws shared by the K)."""
  chains: tuple[Op, ...]
  size: int
  share: int = 1
  all_of: str | None = None


class Embeddings(NamedTuple):
  """What an invariance loss reads, each [B V E] float32; `target` carries no gradient."""
  projected: Array
  predicted: Array
  target: Array


class Pair(NamedTuple):
  """N (source, target) embeddings [N E] and the raw actions [N ...] behind them; the objective encodes these."""
  source: Array
  target: Array
  before: Action
  after: Action


class Outputs(NamedTuple):
  """One forward pass: `features` {group: [B V D]}, `embeddings`, `answers` {objective: (answer, Pair)}."""
  features: dict[str, Array]
  embeddings: Embeddings | None
  answers: dict[str, tuple[Array, Pair]]


class Invariance(NamedTuple):
  """An invariance objective; the published heads travel with the method.

  loss: Embeddings -> scalar float32. projector, predictor: keyword arguments of `nets.mlp.make` (None: there is
  none, and an embedding is the features, a prediction the embedding). decay: initial decay of the target network's
  moving average, 1 at the end of a cosine (None: the target is the online network). update: the average is taken
  'after' the optimiser's step, of the new weights, or 'before' the next forward pass. constant: the parts of the
  network ('predictor') whose learning rate stays at its peak.
  """
  loss: Callable[[Embeddings], Array]
  projector: dict | None
  predictor: dict | None = None
  decay: float | None = None
  update: str = 'after'
  constant: tuple[str, ...] = ()


class Wiring(NamedTuple):
  """What the roles of the augmentations say to one equivariance objective.

  name: the objective's own view group is called so. seen: the chain of each of the invariance's views.
  own: the same with the sensitive ops too. told: the chain of the ops whose actions it is told, its `encode` and
  `relative` normalised, its `choices` {op: all actions} of the discrete ones. sensitive: some told op is not seen, so
  an own view group is needed. size: side of the views. batch: global. build: (size, {op: {field: value}}) -> `own`
  for views of another size, with those fields of its ops changed. dtype: what the head computes in.
  """
  name: str
  seen: tuple[Op, ...]
  own: tuple[Op, ...]
  told: Op
  sensitive: bool
  size: int
  batch: int
  build: Callable[[int, dict[str, dict]], tuple[Op, ...]]
  dtype: str = 'float32'


class Equivariance(NamedTuple):
  """An equivariance objective, wired. A factory returns `Wiring -> Equivariance`.

  head:     a module with `embed(features [B V D], train) -> [B V E]`, over all its groups at once, and
            `__call__(pair, train) -> answer`: arrays [N ...].
  loss:     (answer, pair, embeddings) -> scalar float32; the embeddings are the invariance's.
  groups:   {name: Group} it needs beside the invariance's 'views'.
  uses:     the groups whose features it embeds, in order; what `head.embed` sees concatenated on V.
  pairs:    ({group: [B V E]}, {group: actions [B V ...]}) -> Pair.
  predicts: what the answer estimates: 'target' (the pair's, [N E]), 'action' (what was done), or None.
  feeds:    whether the head has `feed(features [B V D], actions [B V ...], train)`: what the invariance's projector
            (and its target's) reads of 'views', in place of the features.
  tap:      the encoder's stage whose features it embeds, from 1; 0: the last.
  shares:   whether it embeds with the invariance's projector, where there is one and nothing else is fed to it.
  weight:   of its loss in the sum.
  """
  head: Any
  loss: Callable[[Any, Pair, Embeddings | None], Array]
  groups: dict[str, Group]
  uses: tuple[str, ...]
  pairs: Callable[[dict[str, Array], dict[str, Action]], Pair]
  predicts: str | None = None
  feeds: bool = False
  tap: int = 0
  shares: bool = False
  weight: float = 1.

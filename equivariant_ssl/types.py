"""The nouns of the package: NamedTuples of arrays, and NamedTuples of pure functions.

`docs/glossary.md` has one sentence for each of these words, and the rest of the words.
"""
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

Array = jax.Array | np.ndarray  # constants of the operations are NumPy arrays, results are jax's
Key = jax.Array      # a typed key: jax.random.key(seed), folded with keys.key_for
Size = Array         # [2] float32: the true (height, width) of an image, in pixels
Action = Any         # a pytree of arrays, which an op drew and applied; of a chain {op: action}
Config = Any         # a resolved ConfigDict, whose fields exist at run time only

# What an augmentation is used for:
#   off        it is not used;
#   invariant  it makes the invariance's views;
#   sensitive  an equivariance head is conditioned on it, and only that head's own views have it;
#   both       it makes the invariance's views, and an equivariance head is conditioned on it.
ROLES = ('off', 'invariant', 'sensitive', 'both')


class Image(NamedTuple):
  """One image.

  pixels: [H W C] float32 in [0, 1]; the image may have been squashed to a square canvas.
  size:   [2] float32, the true height and width in pixels.
  """
  pixels: Array
  size: Size


class Views(NamedTuple):
  """The views of a batch.

  images:  [B V H W C] float32 in [0, 1].
  actions: arrays [B V ...], the actions that made the views.
  """
  images: Array
  actions: Action


class Op(NamedTuple):
  """An augmentation, as four pure functions of one image. `vmap` makes them functions of a batch.

  identity: size -> the action that does nothing. `apply(identity, x)` is x, and
            `encode(identity)` is 0.
  sample:   (key, size) -> action. The function sees no pixels, so a draw can be repeated.
  apply:    (action, image) -> image. The function sees no key, so it can be tested.
  encode:   action -> [A] float32, the vector that a network is conditioned on.
  choices:  all actions of a discrete op, stacked [K ...]; the class of an action is its index.
            Other ops have None.
  relative: (before, after) -> [A] float32, the vector for the way from one view to another.
            relative(a, a) is 0, and relative(identity, a) is encode(a). None stands for
            encode(after) - encode(before), which is wrong for turns and flips.
  """
  name: str
  identity: Callable[[Size], Action]
  sample: Callable[[Key, Size], Action]
  apply: Callable[[Action, Image], Image]
  encode: Callable[[Action], Array]
  choices: Action | None = None
  relative: Callable[[Action, Action], Array] | None = None


class Group(NamedTuple):
  """A view group: views of one size.

  chains: one chain for each view.
  size:   the side of the square views, in pixels.
  share:  this many neighboring images of the batch receive the same draw.
  all_of: the name of a discrete op whose K choices are all applied, one after the other. The
          group then has chains x K views, and the K views of a chain share its other draws.
  """
  chains: tuple[Op, ...]
  size: int
  share: int = 1
  all_of: str | None = None


class Embeddings(NamedTuple):
  """What an invariance loss compares, each [B V E] float32. `target` carries no gradient."""
  projected: Array
  predicted: Array
  target: Array


class Pair(NamedTuple):
  """N pairs of embeddings, source and target [N E], and the actions [N ...] behind them.

  `before` made the source and `after` made the target. The actions are not encoded yet: each
  objective encodes them in its own way.
  """
  source: Array
  target: Array
  before: Action
  after: Action


class Outputs(NamedTuple):
  """The result of one forward pass.

  features:   {group: [B V D]}.
  embeddings: the embeddings of the invariance's views.
  answers:    {objective: (answer of its head, Pair)}.
  """
  features: dict[str, Array]
  embeddings: Embeddings
  answers: dict[str, tuple[Any, Pair]]


class Invariance(NamedTuple):
  """An invariance objective, with the head that was published with it.

  loss:      Embeddings -> scalar float32.
  projector: keyword arguments of `nets.mlp.make`, or None. Without a projector an embedding is
             the features.
  predictor: the same. Without a predictor a prediction is the embedding.
  decay:     the first decay of the target network's moving average; the decay rises to 1 by a
             cosine. None: there is no target network, and the online network gives the targets.
  update:    when the average moves: 'after' the optimizer's step, towards the new weights, or
             'before' the next forward pass.
  constant:  the parts of the network ('predictor') whose learning rate stays at its peak.
  """
  loss: Callable[[Embeddings], Array]
  projector: dict | None
  predictor: dict | None = None
  decay: float | None = None
  update: str = 'after'
  constant: tuple[str, ...] = ()


class Wiring(NamedTuple):
  """What the roles of the augmentations mean for one equivariance objective.

  name:             the objective's name, which is also the name of its own view group.
  view_chains:      the chain of each of the invariance's views.
  own_chains:       the chain of each of the objective's views: the view chains, with the
                    objective's sensitive ops added.
  conditioning:     the chain of the objective's augmentations. Its `encode` and `relative` give
                    the head's conditioning, in units of their spread; its `choices` are
                    {op: all actions} of the discrete ones.
  has_own_views:    whether one of these augmentations is missing from the view chains, so that
                    the objective needs views of its own.
  size:             the side of the views, in pixels.
  batch:            the number of images of the global batch.
  build_own_chains: (size, {op: {field: value}}) -> the own chains for views of another size, with
                    these fields of their ops changed.
  dtype:            the dtype that the head computes in.
  """
  name: str
  view_chains: tuple[Op, ...]
  own_chains: tuple[Op, ...]
  conditioning: Op
  has_own_views: bool
  size: int
  batch: int
  build_own_chains: Callable[[int, dict[str, dict]], tuple[Op, ...]]
  dtype: str = 'float32'


class Equivariance(NamedTuple):
  """An equivariance objective for one wiring. A factory returns `Wiring -> Equivariance`.

  head:     a module with `embed(features [B V D], train) -> [B V E]`, which sees all groups of the
            objective at once, and `__call__(pair, train) -> answer`, arrays [N ...].
  loss:     (answer, pair, embeddings) -> scalar float32; `embeddings` are the invariance's.
  groups:   {name: Group} that the objective needs beside the invariance's 'views'.
  uses:     the groups whose features the head embeds; `embed` sees them concatenated on V.
  pairs:    ({group: [B V E]}, {group: actions [B V ...]}) -> Pair.
  predicts: what the answer estimates: 'target' (the pair's, [N E]), 'action', or None.
  feeds:    whether the head has `feed(features [B V D], actions [B V ...], train)`, which gives
            the invariance's projector, and its target's, an input in place of the features.
  tap:      the encoder's stage whose features the head embeds, counted from 1; 0 is the last.
  shares:   whether the invariance's projector embeds for this objective. It does where there is
            one and no head feeds it.
  weight:   the weight of this loss in the sum.
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

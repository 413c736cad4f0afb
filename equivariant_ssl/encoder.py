"""A trained encoder as a function of images, with what its run knows of it."""
import functools
import pathlib
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from equivariant_ssl.data import card
from equivariant_ssl.data.arrays import to_rgb_array
from equivariant_ssl.errors import UserError
from equivariant_ssl.evaluate.features import check_finite, in_batches
from equivariant_ssl.evaluate.frozen import variables
from equivariant_ssl.evaluate.inputs import array_pixels, canvas_inputs
from equivariant_ssl.evaluate.predicted_embeddings import complete_action, embed, predict
from equivariant_ssl.export.exported_encoder import is_export, read_export
from equivariant_ssl.nets.network import Network
from equivariant_ssl.parallel import processes, sharding
from equivariant_ssl.registry import unknown_name
from equivariant_ssl.storage import checkpoint
from equivariant_ssl.training import runs
from equivariant_ssl.training.recipe import Recipe
from equivariant_ssl.training.state import TrainState
from equivariant_ssl.types import Action, Array

BATCH = 256


class OpenRun(NamedTuple):
  """A run that was opened without its data, and the state of one of its checkpoints.

  run: its card is that of the checkpoint. step: the number of the checkpoint.
  """
  run: runs.Run
  step: int
  state: TrainState


def open_run(workdir: pathlib.Path, step: int | None = None, place: str = '') -> OpenRun:
  """Return a run with its newest valid checkpoint, or with the checkpoint of `step`.

  place: where the data of a run without a data card are now; '' for where they were.
  """
  def say(line: str) -> None:
    if processes.is_main():
      print(line, file=sys.stderr)

  run = runs.reopen_run(workdir, None, say, runs.DataRequest(place), needs_data=False)
  number, state, meta = checkpoint.load_checkpoint(workdir / 'checkpoints',
                                                   runs.abstract_state(run), step, say)
  data_card = card.card_from_json(meta['data']) if 'data' in meta else run.card
  return OpenRun(run._replace(card=data_card), number, state)


class Classifier(NamedTuple):
  """An encoder with a linear head.

  variables: {'encoder': its variables, 'head': {'kernel': [D K], 'bias': [K]}}, float32.
  apply:     (variables, images [B H W 3]) -> logits [B K] float32, a pure function that can be
             differentiated. The BatchNorm statistics stay those of the encoder.

  >>> head = es.load('runs/mine').fine_tune_head(classes=10)
  >>> head.variables['head']['kernel'].shape[1]
  10
  """
  variables: dict
  apply: Callable[[dict, Array], Array]


@functools.lru_cache(16)
def _network_functions(recipe: Recipe) -> tuple[Callable, Callable]:
  """Return (encode, predict) of a recipe; the same objects each time, which key the programs."""
  return _make_encode(recipe.network, recipe.size, recipe.canvas), jax.jit(
      functools.partial(predict, recipe), static_argnums=0)


def _make_encode(network: Network, size: int, canvas: int) -> Callable:
  """Return the function (layer, variables, images [B H W 3]) -> features [B D] float32."""
  run_inputs = canvas_inputs(size, canvas)

  def encode(layer: int, values: dict, images: Array) -> Array:
    features: Any = network.apply(values, array_pixels(run_inputs, images), False, layer,
                                  method='encode')
    return features.astype(jnp.float32)
  return encode


class Encoder(NamedTuple):
  """A trained encoder. `load` makes it; a call computes features of images.

  folder:    the run or the export that it is from.
  step:      the number of its checkpoint.
  size:      the side, in pixels, of what its network is given of an image.
  variables: its weights and BatchNorm statistics, as `apply` takes them: {'params': ...,
             'batch_stats': ...} of arrays.
  network:   the flax module.
  encode:    (layer, variables, images) -> features; see `apply`.
  recipe:    everything of the run that does not change while it trains; None for an export.

  >>> encoder = es.load('runs/mine')
  >>> encoder.step, encoder.size
  (2, 16)
  """
  folder: pathlib.Path
  step: int
  size: int
  variables: dict
  network: Network
  encode: Callable[[int, dict, Array], Array]
  recipe: Recipe | None = None

  def __repr__(self) -> str:
    return f'Encoder({str(self.folder)!r}, step={self.step}, size={self.size}, dim={self.dim})'

  @property
  def dim(self) -> int:
    """D, the number of features of an image."""
    image = jax.ShapeDtypeStruct((1, self.size, self.size, 3), jnp.uint8)
    return jax.eval_shape(_rows_of(self.encode, 0), self.variables, (image,)).shape[-1]

  def __call__(self, images: Any, batch: int = BATCH) -> np.ndarray:
    """The features [N D] float32 of images [N H W 3]; see `features`."""
    return self.features(images, batch=batch)

  def features(self, images: Any, layer: int = 0, batch: int = BATCH) -> np.ndarray:
    """The features [N D] float32 of images [N H W 3] of any size H x W.

    images: uint8, or floats in [0, 1]; an array of NumPy or jax. The network is given of them what
            evaluations give it of the run's own images: the shorter side is resized, and the
            central square is cut (`evaluate/inputs.py`).
    layer:  0 for the last features; 1, 2, ... for the mean features of a stage of the encoder.
    batch:  how many images are computed at a time, split over all devices.

    Raises UserError for other shapes and kinds of numbers (floats from 0 to 255 among them), for a
    layer that is not there, and where a feature is not finite.

    >>> encoder = es.load('runs/mine')
    >>> encoder.features(np.zeros((3, 40, 30, 3), 'uint8'), layer=1).shape
    (3, 4)
    """
    self._check_layer(layer)
    rows = to_rgb_array(images)
    fits = min(batch, 2 ** (len(rows) - 1).bit_length())  # few shapes, so few compilations
    program = Partial(_rows_of(self.encode, layer), self.variables)
    values = in_batches(program, (rows,), fits, sharding.mesh())
    check_finite(values)
    return values

  def apply(self, variables: dict, images: Array, layer: int = 0) -> Array:
    """The features [B D] float32, as a pure function for a jax program of one's own.

    It can be jitted, mapped, and differentiated by `variables` and by `images` [B H W 3], which are
    uint8, or floats in [0, 1]: their values cannot be checked here. BatchNorm uses its statistics.

    >>> encoder = es.load('runs/mine')
    >>> loss = lambda variables, x: (encoder.apply(variables, x) ** 2).mean()
    >>> gradient = jax.jit(jax.grad(loss, argnums=1))
    >>> gradient(encoder.variables, np.full((2, 16, 16, 3), .5, 'float32')).shape
    (2, 16, 16, 3)
    """
    self._check_layer(layer)
    if images.ndim != 4 or images.shape[3] != 3:
      raise UserError(f'images have the shape {images.shape}, not [B H W 3].',
                      'A single image is images[None].')
    return self.encode(layer, variables, images)

  def embed(self, features: Any, objective: str = '') -> Array:
    """The embeddings [N E] of features [N D], in the space in which `predict` predicts.

    objective: the label of the run's equivariance objective; '' where there is one. Its `tap_layer`
               says of which layer the features are; 0 is the last. Raises UserError as `predict`.

    >>> encoder = es.load('runs/mine')
    >>> encoder.embed(encoder(np.zeros((3, 16, 16, 3), 'uint8'))).shape
    (3, 8)
    """
    recipe, name = self._objective(objective)
    return embed(recipe, name, self.variables, jnp.asarray(features))

  def predict(self, features: Any, action: Action, objective: str = '') -> Array:
    """Where an action will move the embeddings: the predicted embeddings [N E] float32.

    features:  [N D], of the images before the action.
    action:    {op: its action}, as `views` returns it, or {op: {field: value}}; of each image
               [N ...], or one for all. Ops that are left out do nothing.
    objective: as in `embed`.

    Raises UserError where the run has no objective that predicts embeddings (EquiMod, SIE and SEN
    do; E-SSL and AugSelf predict the action), and for an op or field that the objective's views do
    not have.

    >>> encoder = es.load('runs/mine')
    >>> h = encoder(np.zeros((3, 16, 16, 3), 'uint8'))
    >>> encoder.predict(h, {'rotate': {'turns': 1}}).shape
    (3, 8)
    """
    recipe, name = self._objective(objective)
    features = jnp.asarray(features)
    complete = complete_action(recipe, name, action, features.shape[0])
    return _network_functions(recipe)[1](name, self.variables, features, complete)

  def fine_tune_head(self, classes: int, seed: int = 0) -> Classifier:
    """A classifier of `classes` classes on this encoder, to be trained by one's own optimizer.

    The kernel is drawn from N(0, .01), the bias is 0. `eqssl eval --protocol finetune10` fine-tunes
    by a published schedule.

    >>> head = es.load('runs/mine').fine_tune_head(classes=10)
    >>> head.apply(head.variables, np.zeros((2, 16, 16, 3), 'uint8')).shape
    (2, 10)
    """
    kernel = .01 * jax.random.normal(jax.random.key(seed), (self.dim, classes))
    head = {'kernel': kernel, 'bias': jnp.zeros(classes)}

    def apply(values: dict, images: Array) -> Array:
      features = self.apply(values['encoder'], images)
      logits = jnp.matmul(features, values['head']['kernel'], precision='highest')
      return logits + values['head']['bias'][None]
    return Classifier({'encoder': self.variables, 'head': head}, apply)

  def _check_layer(self, layer: int) -> None:
    stages = len(getattr(self.network.encoder, 'dims', ()))
    if layer and not 1 <= layer <= stages:
      raise UserError(f'layer is {layer}, and this encoder has {stages} stages.',
                      'Give 0 for the last features'
                      + (f', or a stage from 1 to {stages}.' if stages else '.'))

  def _objective(self, name: str) -> tuple[Recipe, str]:
    """Return the recipe, and the label of the objective that predicts embeddings."""
    recipe = self.recipe
    names = [n for n, e in (recipe.equivariances if recipe else {}).items()
             if e.predicts == 'target']
    if recipe is None or not names:
      kind = 'is an export, which is the encoder alone' if recipe is None else (
          'has no objective that predicts an embedding')
      raise UserError(f'{self.folder} {kind}.',
                      'Load a run that was trained with --config.equivariance=equimod.')
    if name not in names and (name or len(names) > 1):
      raise unknown_name('objective', name, names)
    return recipe, name or names[0]


@functools.lru_cache(64)
def _rows_of(encode: Callable, layer: int) -> Callable:
  """Return (variables, (images,)) -> features; the same object each time."""
  return lambda values, rows: encode(layer, values, rows[0])


def load_encoder(folder: pathlib.Path, step: int | None = None) -> Encoder:
  """The encoder of a run or of an export; see `api.load`."""
  if is_export(folder):
    if step is not None:
      raise UserError(f'{folder} is an export, which has one step.', 'Leave out the step.')
    exported = read_export(folder)
    encode = _make_encode(exported.network, exported.size, exported.canvas)
    return Encoder(folder, exported.step, exported.size, exported.variables, exported.network,
                   encode)
  opened = open_run(folder, step)
  recipe = opened.run.recipe
  # On no device in particular, so that they go with the arrays of any program.
  values = jax.tree.map(lambda a: jnp.asarray(np.asarray(a)), variables(opened.state))
  return Encoder(folder, opened.step, recipe.size, values, recipe.network,
                 _network_functions(recipe)[0], recipe)

"""The pixels that a network is given in an evaluation: one definition for every protocol, monitor,
picture and exported file.

Data are canvases: whole images squashed to a square, with their true (height, width) beside them. A
network is given them at the `size` at which it is trained, in their true aspect:

  a canvas of that size or smaller   the shorter side is resized to `size`, then the central square
                                     is cut;
  a larger canvas (photographs)      the shorter side is resized to 256/224 of `size`, then the
                                     central `size` is cut: on ImageNet torchvision's Resize(256)
                                     and CenterCrop(224), to the pixel.

A square image that is stored at that size is given as it is. Protocols that test on a central crop
(`with_center_crop`) resize the first kind to 36/32 of `size` before they cut. `uncropped_inputs`
treats every canvas as the first kind: it serves other data sets (transfer) and any image (embed).
Probes and fine-tuning train on `training_views`. Resampling is bicubic and antialiased throughout.
"""
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.tree_util import Partial

from equivariant_ssl import augment, registry
from equivariant_ssl.augment.pixels import resample
from equivariant_ssl.data.source import Split
from equivariant_ssl.data.stream import is_stream
from equivariant_ssl.evaluate.features import as_partial, check_finite, check_images, in_batches
from equivariant_ssl.types import Action, Array, Group, Image, Key, Op, Size

VERSION = 1  # raise it when other pixels reach a network: results are then computed again
# The shorter side before a central crop, as a multiple of the crop's side; the second serves
# canvases that are stored at the size of the crop.
PHOTOGRAPH, CENTER_MULTIPLE = 256 / 224, 36 / 32


class Inputs(NamedTuple):
  """How canvases become the pixels that a network is given.

  size: the side of what reaches the encoder, in pixels. canvas: the side of the stored images.
  short: what the shorter side is resized to before the central `size` is cut. square: whether all
  images are known to be square and stored at `size`.
  """
  size: int
  canvas: int
  short: int
  square: bool = False

  @property
  def stored(self) -> bool:
    """Whether the images are stored at the size at which a network is given them."""
    return self.canvas == self.size


def canvas_inputs(size: int, canvas: int) -> Inputs:
  """Return the Inputs of a run's own canvases (side `canvas`), its network trained at `size`."""
  return Inputs(size, canvas, size if canvas <= size else round(size * PHOTOGRAPH))


def split_inputs(size: int, split: Split) -> Inputs:
  """Return the Inputs of a split of a run's own data, for a network trained at `size`."""
  return _with_square(canvas_inputs(size, split.images.shape[1]), split)


def uncropped_inputs(size: int, split: Split) -> Inputs:
  """Return the Inputs that cut nothing but what is not square: Resize(size), CenterCrop(size)."""
  return _with_square(Inputs(size, split.images.shape[1], size), split)


def _with_square(inputs: Inputs, split: Split) -> Inputs:
  """Return `inputs` with `square` set by the sizes of the images; streamed sizes are not read."""
  if not inputs.stored or is_stream(split.sizes):
    return inputs._replace(square=False)
  return inputs._replace(square=bool((split.sizes[:, 0] == split.sizes[:, 1]).all()))


def with_center_crop(inputs: Inputs) -> Inputs:
  """Return `inputs` for a protocol that tests on a central crop, which photographs have anyway."""
  if inputs.short != inputs.size:
    return inputs
  return inputs._replace(short=round(inputs.size * CENTER_MULTIPLE))


def box(inputs: Inputs, true: Size) -> tuple[Array, Array, Array, Array]:
  """Return the box (top, left, height, width) that is cut out of an image of size `true`.

  It is in fractions of the image, and on torchvision's whole pixels of the resized image.
  """
  sides = jnp.round(true).astype(jnp.int32)
  resized = inputs.short * sides // jnp.min(sides)
  free = resized - inputs.size
  start = free // 2
  start = jnp.where(free % 2 == 0, start, start + start % 2)  # Python's round: half to even
  start, length = start / resized, inputs.size / resized.astype(jnp.float32)
  return start[0], start[1], length[0], length[1]


def resized_center(pixels: Array, short: int) -> Array:
  """Return the central square [S S C] of a square image [S S C] that is resized to side `short`."""
  side, zero, one = pixels.shape[0], jnp.zeros(()), jnp.ones(())
  start = round((short - side) / 2)
  resized = resample(pixels, zero, zero, one, one, short, 'bicubic')
  return resized[start:start + side, start:start + side]


def _stored_pixels(inputs: Inputs, pixels: Array) -> Array:
  """Return what a network is given of a square image [size size C] that is stored at that size."""
  return pixels if inputs.short == inputs.size else resized_center(pixels, inputs.short)


def input_pixels(inputs: Inputs, image: Image) -> Array:
  """Return the pixels [size size C] that a network is given of an image's canvas."""
  if inputs.square:
    return _stored_pixels(inputs, image.pixels)
  cut = resample(image.pixels, *box(inputs, image.size), inputs.size, 'bicubic', cut=False)
  if not inputs.stored:
    return cut
  square = image.size[0] == image.size[1]
  return jnp.where(square, _stored_pixels(inputs, image.pixels), cut)


def input_image(inputs: Inputs, image: Image) -> Image:
  """Return `input_pixels` as an image of its own size."""
  return Image(input_pixels(inputs, image), jnp.full(2, inputs.size, jnp.float32))


def input_action(inputs: Inputs, chain: Op, true: Size) -> Action:
  """Return the action of `chain` that does no more than an evaluation does.

  It is the identity, but that its crop keeps the box that a network is given.
  """
  action = chain.identity(true)
  if 'crop' not in action:
    return action
  fields = dict(zip(('top', 'left', 'height', 'width'), box(inputs, true), strict=True))
  return {**action, 'crop': action['crop']._replace(**fields)}


def batch_pixels(inputs: Inputs, images: Array, sizes: Array | None) -> Array:
  """Return the pixels [B size size C] that a network is given of images [B h w C] in [0, 1].

  sizes: their true sizes [B 2]; None where all are square and stored at the network's size.
  """
  if sizes is not None:
    return jax.vmap(functools.partial(input_pixels, inputs))(Image(images, sizes))
  return jax.vmap(functools.partial(_stored_pixels, inputs))(images)


def array_pixels(inputs: Inputs, images: Array) -> Array:
  """Return the pixels [B size size C] that a network is given of images that are not squashed.

  inputs: those of the run's own canvases. images: [B H W C] of any size, uint8, or floats in
  [0, 1]. They are resized and cut as canvases of these true sizes are.
  """
  height, width = images.shape[1:3]
  square = height == width == inputs.size
  inputs = inputs._replace(canvas=height if height == width else 0, square=square)
  in_bytes = images.dtype == jnp.uint8
  images = images.astype(jnp.float32) / 255. if in_bytes else images.astype(jnp.float32)
  sizes = jnp.broadcast_to(jnp.array([height, width], jnp.float32), (len(images), 2))
  return batch_pixels(inputs, images, None if square else sizes)


@functools.lru_cache
def _program(inputs: Inputs) -> Callable:
  """Return (encode, arrays of a split) -> features; the same object for equal Inputs."""
  def f(encode: Callable[[Array], Array], rows: tuple[Array, ...]) -> Array:
    images = rows[0].astype(jnp.float32) / 255.
    images = batch_pixels(inputs, images, None if inputs.square else rows[1])
    return encode(images).astype(jnp.float32)
  return f


def split_arrays(inputs: Inputs, split: Split) -> tuple[Any, ...]:
  """Return what `features.in_batches` reads of a split: its images and their sizes.

  The sizes are left out where all images are square and stored at the network's size.
  """
  return (split.images,) if inputs.square else (split.images, split.sizes)


def unchecked_features(encode: Callable[[Array], Array], split: Split, inputs: Inputs,
                       batch: int = 256, mesh: Mesh | None = None) -> np.ndarray:
  """Return the `features` of a split, whether or not they are finite."""
  check_images(split.images)
  program = Partial(_program(inputs), as_partial(encode))
  return in_batches(program, split_arrays(inputs, split), batch, mesh)


def features(encode: Callable[[Array], Array], split: Split, inputs: Inputs, batch: int = 256,
             mesh: Mesh | None = None) -> np.ndarray:
  """Return the features [N D] float32 of the images of a split, every image once, on any number of
  devices.

  encode: a frozen encoder in eval mode, [B size size C] float32 in [0, 1] -> [B D]; best a Partial
  (see `features.in_batches`). Raises UserError (NOT_FINITE) where a feature is not finite,
  ValueError where images are not uint8.
  """
  h = unchecked_features(encode, split, inputs, batch, mesh)
  check_finite(h)
  return h


def central_features(encode: Callable[[Array], Array], split: Split, size: int, batch: int = 256,
                     mesh: Mesh | None = None) -> np.ndarray:
  """Return the `features` of a split's central squares, at `size` pixels.

  See `uncropped_inputs`.
  """
  return features(encode, split, uncropped_inputs(size, split), batch, mesh)


def pixels(split: Split, inputs: Inputs) -> np.ndarray:
  """Return the pixels [N size size C] float32 in [0, 1] that a network is given of a split.

  They serve callers that encode the pixels elsewhere.
  """
  return unchecked_features(lambda images: images, split, inputs, len(split.images))


def crop_and_flip(size: int) -> Op:
  """Return the chain that training images of a labeled protocol go through.

  It is a random resized crop of scale (.08, 1) to `size`, and a flip.
  """
  crop = registry.make(augment, 'crop', size=size, scale=(.08, 1.), method='bicubic')
  return augment.chain(crop, registry.make(augment, 'flip', p=.5))


def training_views(op: Op, size: int, key: Key, name: str, images: Array, sizes: Array) -> Array:
  """Return a view [B size size C] by `op` of each uint8 canvas [B S S C] of true `sizes` [B 2].

  name: the name under which the draws are folded into `key`.
  """
  canvases = Image(images.astype(jnp.float32) / 255., sizes)
  return augment.views({name: Group((op,), size)}, key, canvases)[name].images[:, 0]


def definition(inputs: Inputs) -> dict[str, Any]:
  """Return what a result file says of the pixels that its numbers were measured on.

  Files have an older name for the multiple: with another, stored results would be computed again.
  """
  return {'version': VERSION, 'size': inputs.size, 'canvas': inputs.canvas, 'short': inputs.short,
          'centre': CENTER_MULTIPLE}

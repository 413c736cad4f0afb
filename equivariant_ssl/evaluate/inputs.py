"""What a network is shown in an evaluation: one definition, for every protocol, monitor, picture and exported file.

Data are canvases: whole images squashed to a square, their true (height, width) beside them. A network is shown them at the
`size` at which it is trained, in their true aspect:

  stored at that size, or smaller   the central square of the image, its shorter side `size` pixels;
  stored larger: photographs        its shorter side resized to 256/224 of `size`, then the central `size`: on ImageNet
                                    torchvision's Resize(256) and CenterCrop(224), to the pixel.

A square image that is stored at that size is shown as it is. Protocols that test on a central crop (`centred`) resize the
first kind to 36/32 of `size` before they cut. `whole` is the first kind whatever the canvas: of other data sets (transfer)
and of any image (embed). Probes and fine-tuning train on `augmented`. Bicubic, antialiased, throughout.
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
from equivariant_ssl.data.stream import lazy
from equivariant_ssl.evaluate.features import as_partial, check_finite, in_batches
from equivariant_ssl.types import Action, Array, Group, Image, Key, Op, Size

VERSION = 1                            # raise it when other pixels reach a network: results are then computed again
PHOTOGRAPH, CENTRE = 256 / 224, 36 / 32  # the shorter side before a central crop, of the crop's


class Inputs(NamedTuple):
  """size: side of what reaches the encoder, pixels. canvas: side of the stored images. short: what the shorter side is
  resized to before the central `size` is cut. square: whether all images are known to be square and stored at `size`."""
  size: int
  canvas: int
  short: int
  square: bool = False

  @property
  def stored(self) -> bool:
    """Whether the images are stored at the size at which they are shown."""
    return self.canvas == self.size


def at(size: int, canvas: int) -> Inputs:
  """How the canvases of a run's own data are shown to its network, which is trained at `size`."""
  return Inputs(size, canvas, size if canvas <= size else round(size * PHOTOGRAPH))


def of(size: int, split: Split) -> Inputs:
  """`at`, of a split of a run's own data."""
  return _known(at(size, split.images.shape[1]), split)


def whole(size: int, split: Split) -> Inputs:
  """How images are shown of which nothing is cut but what is not square: Resize(size), CenterCrop(size)."""
  return _known(Inputs(size, split.images.shape[1], size), split)


def _known(inputs: Inputs, split: Split) -> Inputs:
  square = inputs.stored and not lazy(split.sizes) and bool((split.sizes[:, 0] == split.sizes[:, 1]).all())
  return inputs._replace(square=square)


def centred(inputs: Inputs) -> Inputs:
  """The same for a protocol that tests on a central crop, which photographs have anyway."""
  return inputs._replace(short=round(inputs.size * CENTRE)) if inputs.short == inputs.size else inputs


def box(inputs: Inputs, true: Size) -> tuple[Array, Array, Array, Array]:
  """(top, left, height, width) of what is shown, in fractions of an image of `true` size; torchvision's whole pixels."""
  sides = jnp.round(true).astype(jnp.int32)
  resized = inputs.short * sides // jnp.min(sides)
  free = resized - inputs.size
  start = free // 2
  start = jnp.where(free % 2 == 0, start, start + start % 2)  # Python's round: half to even
  start, length = start / resized, inputs.size / resized.astype(jnp.float32)
  return start[0], start[1], length[0], length[1]


def centre(pixels: Array, short: int) -> Array:
  """A square image [S S C] resized to `short`, and the central S of it."""
  side, zero, one = pixels.shape[0], jnp.zeros(()), jnp.ones(())
  start = round((short - side) / 2)
  return resample(pixels, zero, zero, one, one, short, 'bicubic')[start:start + side, start:start + side]


def one(inputs: Inputs, image: Image) -> Array:
  """What is shown [size size C] of an image's canvas."""
  if inputs.stored:
    still = image.pixels if inputs.short == inputs.size else centre(image.pixels, inputs.short)
    if inputs.square:
      return still
  found = resample(image.pixels, *box(inputs, image.size), inputs.size, 'bicubic', cut=False)
  return jnp.where(image.size[0] == image.size[1], still, found) if inputs.stored else found


def shown(inputs: Inputs, image: Image) -> Image:
  """`one`, as an image of its own size."""
  return Image(one(inputs, image), jnp.full(2, inputs.size, jnp.float32))


def still(inputs: Inputs, chain: Op, true: Size) -> Action:
  """The action of `chain` that does no more than an evaluation does: its crop keeps what is shown."""
  action = chain.identity(true)
  if 'crop' not in action:
    return action
  return {**action, 'crop': action['crop']._replace(**dict(zip(('top', 'left', 'height', 'width'), box(inputs, true),
                                                               strict=True)))}


@functools.lru_cache
def _program(inputs: Inputs) -> Callable:
  def f(encode: Callable[[Array], Array], rows: tuple[Array, ...]) -> Array:
    images = rows[0].astype(jnp.float32) / 255.
    if not inputs.square:
      return encode(jax.vmap(functools.partial(one, inputs))(Image(images, rows[1]))).astype(jnp.float32)
    still = lambda pixels: one(inputs, Image(pixels, None))
    return encode(images if inputs.short == inputs.size else jax.vmap(still)(images)).astype(jnp.float32)
  return f


def rows(inputs: Inputs, split: Split) -> tuple[Any, ...]:
  """What `features.in_batches` reads of a split: of square images stored at their size, not even their sizes."""
  return (split.images,) if inputs.square else (split.images, split.sizes)


def encoded(encode: Callable[[Array], Array], split: Split, inputs: Inputs, batch: int = 256, mesh: Mesh | None = None
            ) -> np.ndarray:
  """`features`, also where they are not finite."""
  if split.images.dtype != np.uint8 or split.images.ndim != 4:
    raise ValueError(f'expected uint8 images [N S S C], got {split.images.dtype} {split.images.shape}')
  return in_batches(Partial(_program(inputs), as_partial(encode)), rows(inputs, split), batch, mesh)


def features(encode: Callable[[Array], Array], split: Split, inputs: Inputs, batch: int = 256, mesh: Mesh | None = None
             ) -> np.ndarray:
  """Features [N D] float32 of the images of a split as they are shown, every image once, on any number of devices.

  encode: a frozen encoder in eval mode, [B size size C] float32 in [0, 1] -> [B D]; best a Partial (see
  `features.in_batches`). Raises UserError (NOT_FINITE) where a feature is not finite, ValueError where images are not uint8.
  """
  found = encoded(encode, split, inputs, batch, mesh)
  check_finite(found)
  return found


def central(encode: Callable[[Array], Array], split: Split, size: int, batch: int = 256, mesh: Mesh | None = None
            ) -> np.ndarray:
  """`features` of the `whole` images of a split, at `size` pixels."""
  return features(encode, split, whole(size, split), batch, mesh)


def pixels(split: Split, inputs: Inputs) -> np.ndarray:
  """What is shown [N size size C] float32 in [0, 1], for who encodes it elsewhere."""
  return encoded(lambda images: images, split, inputs, len(split.images))


def crop_and_flip(size: int) -> Op:
  """What training images of a labelled protocol go through: random resized crop (.08, 1) to `size`, and flip."""
  return augment.chain(registry.make(augment, 'crop', size=size, scale=(.08, 1.), method='bicubic'),
                       registry.make(augment, 'flip', p=.5))


def augmented(op: Op, size: int, key: Key, name: str, images: Array, sizes: Array) -> Array:
  """A view [B size size C] of each of uint8 canvases [B S S C] of true `sizes` [B 2], by `op`; name: of the draws."""
  shown = Image(images.astype(jnp.float32) / 255., sizes)
  return augment.views({name: Group((op,), size)}, key, shown)[name].images[:, 0]


def definition(inputs: Inputs) -> dict[str, Any]:
  """What a result says of the pixels that it was measured on."""
  return {'version': VERSION, 'size': inputs.size, 'canvas': inputs.canvas, 'short': inputs.short, 'centre': CENTRE}

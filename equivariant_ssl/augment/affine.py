"""Affine maps: rotation, scale, translation and shear."""
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from equivariant_ssl.augment.algebra import sometimes
from equivariant_ssl.augment.pixels import REACH, disc, total, warp
from equivariant_ssl.augment.turn import direction, rotation
from equivariant_ssl.errors import UserError
from equivariant_ssl.types import Array, Image, Key, Op, Size


class Affine(NamedTuple):
  """The map that moves the picture.

  applied:     bool, whether the picture is moved, and treated as `make` says.
  angle:       degrees counter-clockwise.
  scale:       factor of size.
  down, right: shift of the picture, as a fraction of its side.
  shear:       degrees, of the columns against the rows.
  """
  applied: Array
  angle: Array
  scale: Array
  down: Array
  right: Array
  shear: Array


CONTRAST = .2  # standard deviation of a treated view, as a fraction of white


def source_matrix(action: Affine) -> Array:
  """[2 2]: the matrix from offsets (rows, columns) in the view to offsets in the picture."""
  slope, one, zero = jnp.tan(jnp.deg2rad(action.shear)), jnp.ones(()), jnp.zeros(())
  sheared = jnp.stack([jnp.stack([one, zero]), jnp.stack([-slope, one])])
  turned = jnp.einsum('ij,jk->ik', sheared, rotation(action.angle), precision='highest')
  return turned / action.scale


def set_contrast(pixels: Array, inside: np.ndarray) -> Array:
  """`pixels` [H W 3] with the same mean and the standard deviation CONTRAST.

  Both are taken over the pixels and channels `inside`, bool [H W 1].
  """
  values = jnp.where(inside, pixels, 0.).reshape(-1)
  count = 1. / (3 * inside.sum())
  mean = total(values) * count
  spread = total(jnp.where(inside, jnp.square(pixels - mean), 0.).reshape(-1)) * count
  return jnp.clip(mean + (pixels - mean) * (CONTRAST * jax.lax.rsqrt(spread + 1e-6)), 0., 1.)


def disc_radius(side: int, scale: float, translate: float, shear: float) -> float:
  """The radius, in pixels, of the disc that shows only the picture under every map.

  side:      the side of the image, in pixels.
  scale:     the smallest factor of size.
  translate: the largest shift, as a fraction of the side.
  shear:     the largest shear, in degrees.

  Raises ValueError where the disc is too small to show anything.
  """
  stretch = 1. + np.tan(np.deg2rad(shear))  # the most that the shear stretches an offset
  free = side * (.5 - np.sqrt(2) * translate) - REACH + 1
  radius = min(scale / stretch * free, side / 2)
  if radius < side / 8:
    raise ValueError(f'affine leaves a disc of {radius:.1f} pixels of an image of {side}; give a '
                     'smaller translate or shear, or a larger scale.')
  return radius


def encode_scale_shift_shear(action: Affine) -> Array:
  """[4]: log scale, down, right, and shear in units of 45 degrees. It is 0 for the identity."""
  return jnp.stack([jnp.log(action.scale), action.down, action.right, action.shear / 45.])


def encode(action: Affine) -> Array:
  """[7]: applied, the direction of the angle, and `encode_scale_shift_shear`."""
  applied = action.applied.astype(jnp.float32)[None]
  return jnp.concatenate([applied, direction(action.angle), encode_scale_shift_shear(action)])


def relative(before: Affine, after: Affine) -> Array:
  """[7]: the way from one map to another, in the layout of `encode`."""
  applied = after.applied.astype(jnp.float32) - before.applied.astype(jnp.float32)
  others = encode_scale_shift_shear(after) - encode_scale_shift_shear(before)
  return jnp.concatenate([applied[None], direction(after.angle - before.angle), others])


def make(p: float = 1., degrees: float = 180., scale: tuple[float, float] = (1.1, 1.5),
         translate: float = .08, shear: float = 5., sigma: float = 1., fill: float = .5) -> Op:
  """With probability `p`, move the picture by a random affine map about its center.

  degrees:   the picture turns by up to this angle either way, at most 180.
  scale:     it is enlarged by a factor that is log-uniform in this range.
  translate: it shifts by up to this fraction of its side either way.
  shear:     it shears by up to this many degrees.
  sigma:     the standard deviation of the resampling Gaussian, in pixels of the view.
  fill:      the value around the disc, as a fraction of white.

  The ranges are those of torchvision's RandomAffine. An action must not be readable from the traces
  of resampling, so every map is treated alike. It shows a disc that lies within the picture for
  every map that can be drawn. It is resampled by the same Gaussian. Its contrast is set to a
  standard deviation of .2, since an enlarged noise has more contrast. Only the identity action,
  which is not applied, leaves the picture as it is. A sheared 1/f noise is no longer isotropic;
  only a rotation by any angle hides that, so with less than 180 `degrees` keep the shear small.

  dm_pix.affine_transform is not called, since it interpolates linearly.

  Raises UserError for ranges that leave nothing to show, and ValueError at trace time where the
  image is not square, or is too small for the disc.
  """
  if not 0 < scale[0] <= scale[1]:
    raise UserError(f'affine.scale = {scale} is not a range above 0.',
                    'Give (low, high), as in (1.1, 1.5).')
  if not (0 <= degrees <= 180 and 0 <= shear <= 45 and sigma >= .5):
    raise UserError(f'affine.degrees = {degrees}, shear = {shear} and sigma = {sigma} are out of '
                    'range.', 'Give degrees up to 180, shear up to 45, and a sigma of at least .5 '
                    'pixels.')
  low = np.array([-degrees, np.log(scale[0]), -translate, -translate, -shear], np.float32)
  high = np.array([degrees, np.log(scale[1]), translate, translate, shear], np.float32)

  def apply(action: Affine, image: Image) -> Image:
    h, w, _ = image.pixels.shape
    if h != w:
      raise ValueError(f'An affine map needs a square image, but this one has {(h, w)} pixels; '
                       'crop or resize it first.')
    shift = -h * jnp.stack([action.down, action.right])
    inside = disc(h, disc_radius(h, scale[0], translate, shear))
    warped = warp(image.pixels, source_matrix(action), shift, sigma / action.scale)
    view = jnp.where(inside, set_contrast(warped, inside), jnp.float32(fill))
    return image._replace(pixels=jnp.where(action.applied, view, image.pixels))

  def sample(key: Key, size: Size) -> Affine:
    draws = jax.random.uniform(key, low.shape, minval=low, maxval=high)
    return Affine(jnp.ones((), bool), draws[0], jnp.exp(draws[1]), *draws[2:])

  def identity(size: Size) -> Affine:
    return Affine(jnp.zeros((), bool), jnp.zeros(()), jnp.ones(()), *[jnp.zeros(())] * 3)

  return sometimes(p, Op('affine', identity, sample, apply, encode, relative=relative))

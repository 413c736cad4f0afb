"""Rotation by any angle."""
from typing import NamedTuple

import jax
import jax.numpy as jnp

from equivariant_ssl.augment.algebra import sometimes
from equivariant_ssl.augment.pixels import REACH, disc, warp
from equivariant_ssl.errors import UserError
from equivariant_ssl.types import Array, Image, Key, Op, Size


class Turn(NamedTuple):
  """The rotation of a picture.

  applied: bool, whether the picture is turned, and treated as `make` says.
  angle:   degrees counter-clockwise.
  """
  applied: Array
  angle: Array


def rotation(angle: Array) -> Array:
  """[2 2]: the matrix from offsets (rows, columns) in a turned picture to offsets in the picture.

  angle: the rotation of the picture, in degrees.
  """
  c, s = jnp.cos(jnp.deg2rad(angle)), jnp.sin(jnp.deg2rad(angle))
  return jnp.stack([jnp.stack([c, s]), jnp.stack([-s, c])])


def direction(angle: Array) -> Array:
  """[2]: (sin, cos - 1) of an angle in degrees. It is 0 for no turn, and for a full one."""
  return jnp.stack([jnp.sin(jnp.deg2rad(angle)), jnp.cos(jnp.deg2rad(angle)) - 1.])


def make(p: float = 1., degrees: float = 180., sigma: float = .8, fill: float = .5) -> Op:
  """With probability `p`, turn about the center by an angle uniform in [-degrees, degrees].

  sigma: the standard deviation of the resampling Gaussian, in pixels.
  fill:  the value around the disc, as a fraction of white.

  The angle must not be readable from the traces of resampling, so every turn is treated alike, also
  a turn by 0. It is resampled by a round Gaussian, which smooths alike in all directions. It shows
  a disc that lies within the picture at every angle. Only the identity action, which is not
  applied, leaves the picture as it is.

  dm_pix.rotate is not called, since it interpolates linearly.

  Raises UserError for an angle outside 0..180 or a sigma below .5, and ValueError at trace time
  where the image is not square.
  """
  if not 0 < degrees <= 180:
    raise UserError(f'turn.degrees = {degrees} is out of range.',
                    'Give the largest angle, above 0 and at most 180.')
  if sigma < .5:
    raise UserError(f'turn.sigma = {sigma} is too small to hide where the pixels lie.',
                    'Give at least .5 pixels, as in .8.')

  def apply(action: Turn, image: Image) -> Image:
    h, w, _ = image.pixels.shape
    if h != w:
      raise ValueError(f'A turn needs a square image, but this one has {(h, w)} pixels; crop or '
                       'resize it first.')
    turned = warp(image.pixels, rotation(action.angle), jnp.zeros(2), jnp.float32(sigma))
    turned = jnp.where(disc(h, h / 2 - REACH + 1), turned, jnp.float32(fill))
    return image._replace(pixels=jnp.where(action.applied, turned, image.pixels))

  def encode(action: Turn) -> Array:
    return jnp.concatenate([action.applied.astype(jnp.float32)[None], direction(action.angle)])

  def relative(before: Turn, after: Turn) -> Array:
    applied = (after.applied.astype(jnp.float32) - before.applied.astype(jnp.float32))[None]
    return jnp.concatenate([applied, direction(after.angle - before.angle)])

  def sample(key: Key, size: Size) -> Turn:
    angle = jax.random.uniform(key, (), minval=-degrees, maxval=degrees)
    return Turn(jnp.ones((), bool), angle)

  return sometimes(p, Op(
      name='turn',
      identity=lambda size: Turn(jnp.zeros((), bool), jnp.zeros(())),
      sample=sample,
      apply=apply,
      encode=encode,
      relative=relative))

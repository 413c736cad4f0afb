"""Affine maps: rotation, scale, translation, shear."""
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
  """applied: bool, whether it is moved (and treated: see `make`). angle: degrees counter-clockwise. scale: factor of size.
  down, right: shift of the picture, fraction of its side. shear: degrees, of the columns against the rows."""
  applied: Array
  angle: Array
  scale: Array
  down: Array
  right: Array
  shear: Array


CONTRAST = .2  # standard deviation of a treated view, a fraction of white


def back(action: Affine) -> Array:
  """[2 2]: offsets (rows, columns) in the moved picture -> offsets in the picture."""
  slope, one, zero = jnp.tan(jnp.deg2rad(action.shear)), jnp.ones(()), jnp.zeros(())
  sheared = jnp.stack([jnp.stack([one, zero]), jnp.stack([-slope, one])])
  return jnp.einsum('ij,jk->ik', sheared, rotation(action.angle), precision='highest') / action.scale


def contrasted(pixels: Array, inside: np.ndarray) -> Array:
  """`pixels` with the standard deviation CONTRAST over the pixels and channels `inside`, about the same mean."""
  values = jnp.where(inside, pixels, 0.).reshape(-1)
  count = 1. / (3 * inside.sum())
  mean = total(values) * count
  spread = total(jnp.where(inside, jnp.square(pixels - mean), 0.).reshape(-1)) * count
  return jnp.clip(mean + (pixels - mean) * (CONTRAST * jax.lax.rsqrt(spread + 1e-6)), 0., 1.)


def rest(action: Affine) -> Array:
  """[4]: log scale, down, right, shear in units of 45 degrees: 0 for the identity."""
  return jnp.stack([jnp.log(action.scale), action.down, action.right, action.shear / 45.])


def make(p: float = 1., degrees: float = 180., scale: tuple[float, float] = (1.1, 1.5), translate: float = .08,
         shear: float = 5., sigma: float = 1., fill: float = .5) -> Op:
  """With probability `p`, move the picture: turn by up to `degrees`, enlarge by a factor log-uniform in `scale`, shift by up
  to `translate` of the side either way, shear by up to `shear` degrees (torchvision's RandomAffine, about the centre).

  What was done must not be readable off the way it was done: every map shows a disc that lies within the picture for all
  maps that can be drawn (`fill` around it), resampled by a Gaussian of `sigma` pixels of the view, and its contrast is set
  to a standard deviation of .2 (an enlarged noise is a stronger one). Only the identity action, not applied, leaves the
  picture as it is. A sheared 1/f noise is truly no longer isotropic: what hides the shear is that the view is turned by
  any angle, so with less than 180 `degrees` let it be small. Raises UserError for ranges that leave nothing to show,
  ValueError at trace time where the image is not square.
  """
  if not 0 < scale[0] <= scale[1]:
    raise UserError(f'affine.scale = {scale} is not a range above 0.', 'Give (low, high), as in (1.1, 1.5).')
  if not (0 <= degrees <= 180 and 0 <= shear <= 45 and sigma >= .5):
    raise UserError(f'affine.degrees = {degrees}, shear = {shear}, sigma = {sigma} are out of range.',
                    'Give degrees up to 180, shear up to 45, and a sigma of at least .5 pixels.')
  low = np.array([-degrees, np.log(scale[0]), -translate, -translate, -shear], np.float32)
  high = np.array([degrees, np.log(scale[1]), translate, translate, shear], np.float32)
  stretch = 1. + np.tan(np.deg2rad(shear))  # at most, of a source offset by the shear

  def shown(side: int) -> float:
    radius = min(scale[0] / stretch * (side * (.5 - np.sqrt(2) * translate) - REACH + 1), side / 2)
    if radius < side / 8:
      raise ValueError(f'affine leaves a disc of {radius:.1f} pixels of an image of {side}; give a smaller translate or '
                       'shear, or a larger scale')
    return radius

  def apply(action: Affine, image: Image) -> Image:
    h, w, _ = image.pixels.shape
    if h != w:
      raise ValueError(f'an affine map needs a square image, got {(h, w)}; crop or resize it first')
    shift = -h * jnp.stack([action.down, action.right])
    inside = disc(h, shown(h))
    moved = contrasted(warp(image.pixels, back(action), shift, sigma / action.scale), inside)
    moved = jnp.where(inside, moved, jnp.float32(fill))
    return image._replace(pixels=jnp.where(action.applied, moved, image.pixels))

  def sample(key: Key, size: Size) -> Affine:
    draws = jax.random.uniform(key, low.shape, minval=low, maxval=high)
    return Affine(jnp.ones((), bool), draws[0], jnp.exp(draws[1]), *draws[2:])

  def relative(before: Affine, after: Affine) -> Array:
    applied = (after.applied.astype(jnp.float32) - before.applied.astype(jnp.float32))[None]
    return jnp.concatenate([applied, direction(after.angle - before.angle), rest(after) - rest(before)])

  return sometimes(p, Op(
      name='affine',
      identity=lambda size: Affine(jnp.zeros((), bool), jnp.zeros(()), jnp.ones(()), *[jnp.zeros(())] * 3),
      sample=sample,
      apply=apply,
      encode=lambda action: jnp.concatenate(
          [action.applied.astype(jnp.float32)[None], direction(action.angle), rest(action)]),
      relative=relative))

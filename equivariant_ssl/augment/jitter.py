"""Color jitter."""
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from equivariant_ssl.augment import levels
from equivariant_ssl.augment.algebra import sometimes
from equivariant_ssl.augment.pixels import luma, total
from equivariant_ssl.errors import UserError
from equivariant_ssl.types import Array, Image, Key, Op, Size

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
OFFSETS = 0., 4 / 6, 2 / 6  # of red, green and blue on the color circle


class Jitter(NamedTuple):
  """Four changes of color; neutral where not applied: order 0 1 2 3, factors 1, hue 0.

  applied:    bool, whether colors change.
  order:      [4] int32; position k holds the id of the k-th change (0 brightness, 1 contrast,
              2 saturation, 3 hue).
  brightness, contrast, saturation: factors, 1 for no change.
  hue:        shift, in turns of the color circle.
  """
  applied: Array
  order: Array
  brightness: Array
  contrast: Array
  saturation: Array
  hue: Array


def blend(pixels: Array, change: Array, factor: Array) -> Array:
  """factor x pixels + (1 - factor) x another image, clipped to [0, 1].

  change: 0 blends with black, 1 with the image's mean luma, 2 with the luma of each pixel.

  They are torchvision's brightness, contrast and saturation. dm_pix.adjust_brightness is not called
  since it adds a number, nor dm_pix.adjust_contrast since it blends with the mean of each channel,
  nor dm_pix.adjust_saturation since it works in HSV.
  """
  gray = luma(pixels)
  mean = total(gray.reshape(-1)) * (1. / gray.size)
  other = blended_with(gray, change, mean)
  return jnp.clip(factor * pixels + (1. - factor) * other[..., None], 0., 1.)


def blended_with(gray: Array, change: Array, mean: Array) -> Array:
  """The other image of `blend`: black, the mean luma, or the luma [h w] of each pixel."""
  return jnp.where(change == BRIGHTNESS, 0., jnp.where(change == CONTRAST, mean, gray))


def shift_hue(pixels: Array, turns: Array) -> Array:
  """Turn the hue of colors [h w 3] by `turns` of the HSV circle; value and saturation stay.

  dm_pix.adjust_hue is not called: it finds the largest channel by equality, which a channel that
  XLA computes twice with different roundings fails, and it rounds differently.
  """
  low, span, sixths = hue_of(pixels[..., 0], pixels[..., 1], pixels[..., 2])
  return turned(low[..., None], span[..., None], sixths[..., None], turns,
                jnp.array(OFFSETS)[None, None])


def hue_of(red: Array, green: Array, blue: Array) -> tuple[Array, Array, Array]:
  """(smallest channel, largest - smallest, hue in sixths of the circle), each [h w]."""
  top = jnp.maximum(jnp.maximum(red, green), blue)
  low = jnp.minimum(jnp.minimum(red, green), blue)
  span = top - low
  safe = jnp.where(span > 1e-7, span, 1.)  # a gray has no hue; the gradient must stay finite
  # By order, not by `top == red`: XLA may compute `red` twice with different roundings, and then
  # no channel is the top.
  sixths = jnp.where((red >= green) & (red >= blue), (green - blue) / safe, jnp.where(
      green >= blue, (blue - red) / safe + 2., (red - green) / safe + 4.))
  return low, span, sixths


def turned(low: Array, span: Array, sixths: Array, turns: Array, offset: Array | float) -> Array:
  """The channel at `offset` of a color whose hue is turned; the others are those of `hue_of`."""
  around = sixths / 6. + turns + offset
  share = jnp.clip(jnp.abs((around - jnp.floor(around)) * 6. - 3.) - 1., 0., 1.)
  return jnp.clip(low + span * share, 0., 1.)


def changed(action: Jitter, pixels: Array, blend: Callable, shift: Callable[[Array], Array]
            ) -> Array:
  """The pixels after the four changes, in the action's order.

  The hue is the costly one, so it is computed once. The other changes stand before it and after it,
  with factor 1, which is exactly no change, where it is not their turn. The last of the four is
  never before the hue, and the first never after it, so each side has three.
  """
  turn, factors, k = jnp.argmax(action.order == HUE), ordered_factors(action), jnp.arange(4)

  def blends(pixels: Array, active: Array, part: slice) -> Array:
    changes = action.order[part], jnp.where(active, factors, 1.)[part]
    # A scan is compiled once, and its steps are not fused.
    return jax.lax.scan(lambda x, change: (blend(x, *change), None), pixels, changes)[0]
  return blends(shift(blends(pixels, k < turn, slice(3))), k > turn, slice(1, 4))


def changed_at_once(action: Jitter, pixels: Array) -> Array:
  """`changed` by `blend` and `shift_hue` in two passes over the pixels, for accelerators.

  There a scan runs several kernels for each of its steps, which read and write all pixels. Here the
  changes before the contrast are computed once for the mean luma that the contrast needs, and all
  of them once more with it. Nothing else in the four changes goes beyond a pixel. Each channel is
  an array of its own, so that XLA can fuse a pass.
  """
  turn, contrast = (jnp.argmax(action.order == change) for change in (HUE, CONTRAST))
  factors = ordered_factors(action)

  def blend_planes(planes: list[Array], k: int, active: Array, mean: Array) -> list[Array]:
    factor = jnp.where(active, factors[k], 1.)
    other = (1. - factor) * blended_with(gray_of(planes), action.order[k], mean)
    return [jnp.clip(factor * x + other, 0., 1.) for x in planes]

  def gray_of(planes: list[Array]) -> Array:
    return .299 * planes[0] + .587 * planes[1] + .114 * planes[2]

  def changes(end: Array | int, mean: Array) -> list[Array]:
    planes = [pixels[..., i] for i in range(3)]
    for k in range(3):
      planes = blend_planes(planes, k, (k < turn) & (k < end), mean)
    parts, is_turned = hue_of(*planes), (turn < end) & (action.hue != 0)
    planes = [jnp.where(is_turned, turned(*parts, action.hue, offset), x)
              for x, offset in zip(planes, OFFSETS, strict=True)]
    for k in range(1, 4):
      planes = blend_planes(planes, k, (k > turn) & (k < end), mean)
    return planes
  mean = gray_of(changes(contrast, jnp.zeros(()))).mean()
  return jnp.stack(changes(4, mean), axis=-1)


def ordered_factors(action: Jitter) -> Array:
  """[4]: the factors of the changes in the action's order; that of the hue is 1."""
  factors = jnp.stack([action.brightness, action.contrast, action.saturation, jnp.ones(())])
  return factors[action.order]


def apply(action: Jitter, image: Image) -> Image:
  def changed_by_scans(action: Jitter, pixels: Array) -> Array:
    shift = lambda x: jnp.where(action.hue == 0, x, shift_hue(x, action.hue))
    return changed(action, pixels, blend, shift)
  # The branch is taken at lowering. On CPU the steps of a scan are bitwise the same for every size
  # of batch, as they are not fused.
  return image._replace(pixels=jax.lax.platform_dependent(
      action, image.pixels, cpu=changed_by_scans, default=changed_at_once))


def apply_quantized(hue: bool, action: Jitter, image: Image) -> Image:
  """The four changes on 8-bit levels, exactly as Pillow computes them.

  hue: whether the op draws a hue. Where it does, even a hue shift of 0 passes through Pillow's
  conversions, which round.
  """
  shift = lambda x: levels.shift_hue(x, action.hue) if hue else x
  pixels = levels.pixels(changed(action, levels.of(image.pixels), levels.blend, shift))
  return image._replace(pixels=jnp.where(action.applied, pixels, image.pixels))


def encode(action: Jitter) -> Array:
  """[9]: applied, order - (0 1 2 3), factors - 1, hue.

  It is EquiMod's layout (Devillers & Lefort 2022), minus its values for the identity.
  """
  return jnp.concatenate([
      action.applied.astype(jnp.float32)[None],
      (action.order - jnp.arange(4)).astype(jnp.float32),
      jnp.stack([action.brightness - 1., action.contrast - 1., action.saturation - 1.,
                 action.hue])])


def make(p: float = .8, brightness: float = .4, contrast: float = .4, saturation: float = .4,
         hue: float = .1, quantize: bool = False) -> Op:
  """With probability `p`, change the colors, as torchvision's ColorJitter does.

  brightness, contrast, saturation: the factor of each is uniform in [max(0, 1 - x), 1 + x].
  hue: the shift is uniform in [-hue, hue] turns.
  quantize: the pixels are rounded to 8 bits before, between and after the changes, exactly as in
    Pillow, which cuts off the fraction. The views are then darker by one level (1/255) in the mean,
    and have no gradient.

  The order of the changes is drawn for each image, and each change is clipped to [0, 1]. Raises
  UserError for a negative strength, or a hue above half a turn.
  """
  strengths = {'brightness': brightness, 'contrast': contrast, 'saturation': saturation}
  for name, strength in {**strengths, 'hue': hue}.items():
    if strength < 0 or (name == 'hue' and strength > .5):
      raise UserError(f'jitter.{name} = {strength} is out of range.',
                      'Give at least 0; for the hue at most .5 (turns).')

  # One draw: four uniform numbers, whose ranks are the order, and then the amounts.
  low = np.array([0.] * 4 + [max(0., 1. - x) for x in strengths.values()] + [-hue], np.float32)
  high = np.array([1.] * 4 + [1. + x for x in strengths.values()] + [hue], np.float32)

  def sample(key: Key, size: Size) -> Jitter:
    draws = jax.random.uniform(key, low.shape, minval=low, maxval=high)
    return Jitter(jnp.ones((), bool), jnp.argsort(draws[:4]).astype(jnp.int32), *draws[4:])

  def identity(size: Size) -> Jitter:
    one = jnp.ones(())
    return Jitter(jnp.zeros((), bool), jnp.arange(4), one, one, one, jnp.zeros(()))

  act = functools.partial(apply_quantized, hue > 0) if quantize else apply
  return sometimes(p, Op('jitter', identity, sample, act, encode))

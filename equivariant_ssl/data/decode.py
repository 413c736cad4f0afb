"""Encoded images to uint8 canvases, safe on hostile files: everything that fails is a `BadImage`.

There is one judgment of damage. An image is good where every decoder that looks at it says so. For
a PNG these are the CRC of each chunk and Pillow's decoder; for a JPEG it is libjpeg, without a
warning; for any other format it is Pillow's decoder.
"""
import io
import os
import stat
from typing import NamedTuple, cast

import numpy as np
from PIL import Image, ImageColor

from equivariant_ssl.data.image_header import (
  LINK,
  NO_FILE,
  PIXELS,
  TOO_LARGE,
  BadImage,
  one_line,
  open_image,
)
from equivariant_ssl.data.room import Room
from equivariant_ssl.errors import UserError, passing
from equivariant_ssl.storage import disk

try:
  import simplejpeg
except ImportError:  # there is no wheel of it for this machine
  simplejpeg = None

FILE_BYTES = 256 * 2**20   # the most bytes of one encoded image
SCANS = 256                # the most scans of a progressive JPEG: each covers the whole image
LARGE = 2**20              # pixels from which an image waits for its room among the PIXELS
ORIENTATION = 0x0112       # the EXIF tag
UPRIGHT = {                # what undoes each of its values
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90}
SIDES_SWAPPED = UPRIGHT[5], UPRIGHT[6], UPRIGHT[7], UPRIGHT[8]


class PixelRules(NamedTuple):
  """How pixels become 8-bit RGB.

  background: (red, green, blue) under what is transparent.
  bits:       the number of bits that gray images of 16 bits use, 8 to 16.
  """
  background: tuple[int, int, int] = (0, 0, 0)
  bits: int = 16


def pixel_rules(background: str = 'black', bits: int = 16) -> PixelRules:
  """The PixelRules with a background as CSS writes colors. Raises UserError."""
  if not 8 <= bits <= 16:
    raise UserError(f'bits is {bits}, but images of 16 bits use 8 to 16 of them.',
                    'e.g. --config.data.bits=12')
  try:
    color = ImageColor.getcolor(background, 'RGB')
  except ValueError:
    raise UserError(f'background is {background!r}, which is not a color.',
                    "e.g. --config.data.background=white, or '#808080'") from None
  return PixelRules(cast(tuple[int, int, int], color), bits)


def open_file(path: str, root: str) -> io.BufferedReader:
  """Open a regular file whose real path lies in the real path of `root`.

  It never waits: a pipe is refused.
  """
  try:
    real, base = os.path.realpath(path, strict=True), os.path.realpath(root)
    if os.path.commonpath([real, base]) != base:
      raise BadImage('a link that leads out of the folder', LINK)
    fd = os.open(real, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
  except (OSError, ValueError) as error:
    if passing(error):
      raise
    raise BadImage(f'cannot be opened: {one_line(error)}') from error
  status = os.fstat(fd)
  regular = stat.S_ISREG(status.st_mode)
  if not regular or status.st_size > FILE_BYTES:
    os.close(fd)
    if regular:
      raise BadImage('larger than 256 MiB', TOO_LARGE)
    raise BadImage('not a regular file', NO_FILE)
  return os.fdopen(fd, 'rb')


def read_file(path: str, root: str) -> bytes:
  """The bytes of a file that `open_file` accepts.

  A disk that fails is tried again. Where it keeps failing, the error is a UserError and not a
  BadImage, because the image is not damaged by that.
  """
  def once() -> bytes:
    with open_file(path, root) as file:
      return file.read(FILE_BYTES + 1)
  try:
    return disk.retry(once, path)
  except OSError as error:
    raise BadImage(f'cannot be read: {one_line(error)}') from error


def read_header(path: str, root: str) -> tuple[int, int]:
  """The (height, width) that a file's header declares. The pixels are not decoded."""
  def once() -> tuple[int, int]:
    with open_file(path, root) as file, open_image(file) as image:
      return image.height, image.width
  return disk.retry(once, path)


_ROOM = Room(PIXELS, LARGE)


def decode(data: bytes | BadImage, size: int | None, rules: PixelRules = PixelRules()
           ) -> tuple[np.ndarray, tuple[int, int]]:
  """The whole image squashed to uint8 [size size 3], upright, and its true (height, width).

  The image is antialiased. With `size=None` the pixels stay as they are. A JPEG is scaled while it
  is decoded, as long as it stays at least twice the size of the canvas. An image that shrinks on
  both sides is resized with Pillow's Hamming filter, which is half the work of its bicubic filter;
  that one serves all other images. Raises BadImage; where `data` is a BadImage, that is raised.
  """
  if isinstance(data, BadImage):
    raise data
  image = open_image(io.BytesIO(data))
  pixels = image.width * image.height
  if pixels >= LARGE:
    image = None  # so that `_decoded` alone holds it, and can let go of it
  with _ROOM.reserve(pixels):
    try:
      return _decoded(image or open_image(io.BytesIO(data)), data, size, rules)
    except BadImage:
      raise
    except Exception as error:
      raise BadImage(f'cannot be decoded: {one_line(error)}') from error


def _decoded(image: Image.Image, data: bytes, size: int | None, rules: PixelRules
             ) -> tuple[np.ndarray, tuple[int, int]]:
  width, height = image.size
  if image.format in ('JPEG', 'MPO'):
    turn = _upright(image)
    if 'progressive' in image.info and data.count(b'\xff\xda') > SCANS:
      raise BadImage(f'a JPEG of more than {SCANS} scans', TOO_LARGE)
    if size:
      image.draft(None, (2 * size, 2 * size))
    image = decode_jpeg(image, data)
  else:
    tiles = getattr(image, 'tile', None)
    raw = str(tiles[0][3]) if tiles else ''
    if image.format == 'PNG':
      Image.open(io.BytesIO(data), formats=('PNG',)).verify()
    # Loaded before its EXIF block is read, which would load the image too and hide its faults.
    image.load()
    turn, (width, height) = _upright(image), image.size  # a loaded TIFF is already upright
    image = to_rgb(image, rules, raw)
  if turn is not None:
    image = image.transpose(turn)
    if turn in SIDES_SWAPPED:
      width, height = height, width
  return np.asarray(squash(image, size) if size else image), (height, width)


def squash(image: Image.Image, size: int) -> Image.Image:
  """The whole image resized to size x size, by the filters that `decode` says."""
  if image.size == (size, size):
    return image
  shrinks, filters = min(image.size) >= size, Image.Resampling
  return image.resize((size, size), filters.HAMMING if shrinks else filters.BICUBIC)


def decode_jpeg(image: Image.Image, data: bytes) -> Image.Image:
  """The JPEG `data` in RGB. `image` is the same JPEG, opened, and perhaps scaled by `draft`.

  simplejpeg decodes it. Its pixels are Pillow's, in two thirds of the time, and it accepts no
  damage, where Pillow invents what a torn scan lacks. Pillow decodes what simplejpeg has no colors
  for (CMYK) or cannot read at all, and every JPEG where simplejpeg is not installed; damage within
  a scan then passes.
  """
  if simplejpeg:
    width, height = image.size
    try:
      pixels = simplejpeg.decode_jpeg(data, 'RGB', min_height=height, min_width=width, strict=True)
      if image.mode in ('RGB', 'L'):
        return Image.fromarray(pixels)
    except ValueError as error:
      if 'subsampling' not in str(error):  # turbojpeg lacks unusual ones, which are no damage
        raise
  return to_rgb(image)


def to_rgb(image: Image.Image, rules: PixelRules = PixelRules(), raw: str = '') -> Image.Image:
  """The first frame in 8-bit RGB.

  What is transparent shows the background. 16-bit gray is read by its high byte, where Pillow
  would clip.
  raw: the kind of pixels in the file, by Pillow's name; a loaded image no longer has it.
  """
  if image.mode.startswith('I'):
    return _gray_to_rgb(image, rules)
  if 'transparency' in image.info or image.mode in ('RGBA', 'LA', 'PA', 'La', 'RGBa'):
    _fit_transparent_color(image, raw)
    image = image if image.mode == 'RGBA' else image.convert('RGBA')
    canvas = Image.new('RGB', image.size, rules.background)
    canvas.paste(image, None, image.getchannel('A'))
    return canvas
  return image if image.mode == 'RGB' else image.convert('RGB')


def _gray_to_rgb(image: Image.Image, rules: PixelRules) -> Image.Image:
  """A gray image of up to 16 bits in 8-bit RGB."""
  values = np.asarray(image)
  least, most = int(values.min()), int(values.max())
  if least < 0 or most >= 2**rules.bits:
    raise BadImage(f'its values are {least:,} to {most:,}, which are not of {rules.bits} bits')
  high = np.empty(values.shape, np.uint8)
  np.right_shift(values, rules.bits - 8, out=high, casting='unsafe')
  pixels = Image.fromarray(high).convert('RGB')
  transparent = image.info.get('transparency')
  if isinstance(transparent, int):
    mask = Image.fromarray((values == transparent).astype(np.uint8) * 255)
    pixels.paste(rules.background, None, mask)
  return pixels


def _fit_transparent_color(image: Image.Image, raw: str) -> None:
  """Convert the one transparent color of a PNG to 8 bits, as its pixels are by now.

  Pillow leaves it in the bits of the file, but newer versions do not where that is one bit.
  """
  color = image.info.get('transparency')
  if isinstance(color, tuple) and '16' in raw:
    image.info['transparency'] = tuple(value >> 8 for value in color)
  elif isinstance(color, int) and raw in ('1', 'L;2', 'L;4'):
    image.info['transparency'] = min(255, color * {'1': 255, 'L;2': 85, 'L;4': 17}[raw])


def _upright(image: Image.Image) -> Image.Transpose | None:
  """What turns an image upright, as its EXIF block says, or None."""
  try:
    return UPRIGHT.get(cast(int, image.getexif().get(ORIENTATION)))
  except Exception:  # a broken EXIF block does not make the pixels unreadable
    return None

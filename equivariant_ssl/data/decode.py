"""Encoded images to uint8 canvases, safe on hostile files: everything that can go wrong is a `BadImage`.

One judgement of damage: an image is good where every decoder that looks at it says so (PNG: each chunk's CRC, then Pillow's
decoder; JPEG: libjpeg without a warning; all else: Pillow's decoder).
"""
import io
import os
import stat
import warnings
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageColor, UnidentifiedImageError

from equivariant_ssl.data.room import Room
from equivariant_ssl.errors import UserError, passing
from equivariant_ssl.storage import disk

try:
  import simplejpeg
except ImportError:  # a machine without a wheel of it
  simplejpeg = None

FILE_BYTES = 256 * 2**20   # of one encoded image
PIXELS = 64 * 10**6        # of one decoded image, and of all that are decoded at the same time
SIDE = 30_000
SCANS = 256                # of a progressive JPEG, whose every scan goes over all of the image
LARGE = 2**20              # pixels from which an image waits for its room among those PIXELS
FORMATS = 'JPEG, PNG, WebP, GIF, BMP, TIFF or PPM'
DAMAGED, TOO_LARGE, LINK, NO_FILE = 'damaged', 'too large', 'links out of the folder', 'not regular files'
ORIENTATION = 0x0112       # the EXIF tag, and what undoes each of its values
UPRIGHT = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
           5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
           8: Image.Transpose.ROTATE_90}

# Not per call: catch_warnings is not safe in threads. Pillow only warns between one and two times its own limit.
warnings.filterwarnings('error', category=Image.DecompressionBombWarning)
# Tags of a TIFF, or second pictures in a JPEG, that break a rule are common and say nothing of the pixels.
warnings.filterwarnings('ignore', category=UserWarning, module=r'PIL\.')

# Pillow's blocks of 16 MiB stay with each thread that has freed some (glibc's arenas); those beyond 32 MiB go back at once.
Image.core.set_block_size(64 * 2**20)


class BadImage(Exception):  # noqa: N818
  """An image that cannot be read; the message says why in one line, `reason` what kind of fault it is."""

  def __init__(self, why: str, reason: str = DAMAGED):
    super().__init__(why)
    self.reason = reason


class Reading(NamedTuple):
  """How pixels become 8-bit RGB. background: (red, green, blue) under what is transparent. bits: those that grey images of
  16 bits use, 8 to 16."""
  background: tuple[int, int, int] = (0, 0, 0)
  bits: int = 16


def reading(background: str = 'black', bits: int = 16) -> Reading:
  """A Reading of a colour as CSS writes it. Raises UserError."""
  if not 8 <= bits <= 16:
    raise UserError(f'bits is {bits}; images of 16 bits use 8 to 16 of them.', 'e.g. --config.data.bits=12')
  try:
    return Reading(ImageColor.getcolor(background, 'RGB'), bits)
  except ValueError:
    raise UserError(f'background is {background!r}, which is no colour.',
                    "e.g. --config.data.background=white, or '#808080'") from None


def sniff(head: bytes) -> str | None:
  """The format that the first 12 bytes announce, by Pillow's name; None if it is not one that is read here."""
  if head[:8] == b'\x89PNG\r\n\x1a\n':
    return 'PNG'
  if head[:3] == b'\xff\xd8\xff':
    return 'JPEG'
  if head[:6] in (b'GIF87a', b'GIF89a'):
    return 'GIF'
  if head[:4] == b'RIFF' and head[8:12] == b'WEBP':
    return 'WEBP'
  if head[:4] in (b'II*\0', b'MM\0*', b'II+\0', b'MM\0+'):
    return 'TIFF'
  if head[:1] == b'P' and head[1:2] in b'123456' and head[2:3] in (b' ', b'\t', b'\n', b'\r', b'#'):
    return 'PPM'
  return 'BMP' if head[:2] == b'BM' else None


def open_image(file: io.IOBase) -> Image.Image:
  """The image in a binary file, its header read and its declared size checked, its pixels not yet decoded."""
  try:
    head = file.read(12)
    file.seek(0)
  except OSError as e:
    if passing(e):
      raise
    raise BadImage(f'cannot be read: {_line(e)}') from e
  if not head:
    raise BadImage('empty file')
  kind = sniff(head)
  if kind is None:
    raise BadImage(f'not a {FORMATS} image')
  try:
    image = Image.open(file, formats=(kind,))
  except (Image.DecompressionBombError, Image.DecompressionBombWarning) as e:
    raise BadImage(f'{kind} header: {_line(e)}', TOO_LARGE) from e
  except UnidentifiedImageError as e:
    raise BadImage(f'{kind} header: damaged') from e
  except Exception as e:  # Pillow raises whatever a format's parser trips over
    raise BadImage(f'{kind} header: {_line(e)}') from e
  width, height = image.size
  if not (width > 0 and height > 0):
    raise BadImage(f'{width}x{height} pixels')
  if kind == 'TIFF':  # libtiff makes room for whole tiles
    width, height = (max(n, tile) for n, tile in zip((width, height), _tile(image), strict=True))
  if not (width <= SIDE and height <= SIDE and width * height <= PIXELS):
    raise BadImage(f'{width}x{height} pixels is beyond the limits ({SIDE:,} a side, {PIXELS:,} in all)', TOO_LARGE)
  if image.mode == 'F':
    raise BadImage('its pixels are floating-point numbers, of no known range: save it with 8 or 16 bits')
  return image


def _tile(image: Image.Image) -> tuple[int, int]:
  """(width, height) of the tiles of a TIFF, 0 where it has none."""
  try:
    return tuple(int(image.tag_v2.get(tag, 0)) for tag in (322, 323))
  except (TypeError, ValueError) as e:
    raise BadImage('TIFF header: tiles of no size') from e


def open_file(path: str, root: str) -> io.BufferedReader:
  """Open a regular file whose real path lies under the real path of `root`; never waits (a pipe is refused)."""
  try:
    real, base = os.path.realpath(path, strict=True), os.path.realpath(root)
    if os.path.commonpath([real, base]) != base:
      raise BadImage('a link that leads out of the folder', LINK)
    fd = os.open(real, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
  except (OSError, ValueError) as e:
    if passing(e):
      raise
    raise BadImage(f'cannot be opened: {_line(e)}') from e
  info = os.fstat(fd)
  if not stat.S_ISREG(info.st_mode) or info.st_size > FILE_BYTES:
    os.close(fd)
    large = stat.S_ISREG(info.st_mode)
    raise BadImage('larger than 256 MiB' if large else 'not a regular file', TOO_LARGE if large else NO_FILE)
  return os.fdopen(fd, 'rb')


def read_file(path: str, root: str) -> bytes:
  """The bytes of a file that `open_file` accepts. A disk that fails is tried again, then a UserError: no image is damaged by
  that."""
  def once() -> bytes:
    with open_file(path, root) as file:
      return file.read(FILE_BYTES + 1)
  try:
    return disk.again(once, path)
  except OSError as e:
    raise BadImage(f'cannot be read: {_line(e)}') from e


def header(path: str, root: str) -> tuple[int, int]:
  """The (height, width) that a file's header declares, without decoding its pixels."""
  def once() -> tuple[int, int]:
    with open_file(path, root) as file, open_image(file) as image:
      return image.height, image.width
  return disk.again(once, path)


_ROOM = Room(PIXELS, LARGE)


def rgb(image: Image.Image, how: Reading = Reading(), raw: str = '') -> Image.Image:
  """The first frame in 8-bit RGB: transparency over the background, 16-bit grey by its high byte (Pillow would clip it).
  raw: the kind of pixels in the file, by Pillow's name, which `image` forgets when it is loaded."""
  if image.mode.startswith('I'):
    return _grey(image, how)
  if 'transparency' in image.info or image.mode in ('RGBA', 'LA', 'PA', 'La', 'RGBa'):
    _to_8_bits(image, raw)
    image = image if image.mode == 'RGBA' else image.convert('RGBA')
    under = Image.new('RGB', image.size, how.background)
    under.paste(image, None, image.getchannel('A'))
    return under
  return image if image.mode == 'RGB' else image.convert('RGB')


def _grey(image: Image.Image, how: Reading) -> Image.Image:
  values = np.asarray(image)
  least, most = int(values.min()), int(values.max())
  if least < 0 or most >= 2**how.bits:
    raise BadImage(f'its values are {least:,} to {most:,}, not of {how.bits} bits')
  high = np.right_shift(values, how.bits - 8, out=np.empty(values.shape, np.uint8), casting='unsafe')
  pixels = Image.fromarray(high).convert('RGB')
  key = image.info.get('transparency')
  if isinstance(key, int):
    pixels.paste(how.background, None, Image.fromarray((values == key).astype(np.uint8) * 255))
  return pixels


def _to_8_bits(image: Image.Image, raw: str) -> None:
  """The one transparent colour of a PNG in the 8 bits that its pixels have by now; Pillow leaves it in the file's
  (newer ones not where that is one bit)."""
  key = image.info.get('transparency')
  if isinstance(key, tuple) and '16' in raw:
    image.info['transparency'] = tuple(k >> 8 for k in key)
  elif isinstance(key, int) and raw in ('1', 'L;2', 'L;4'):
    image.info['transparency'] = min(255, key * {'1': 255, 'L;2': 85, 'L;4': 17}[raw])


def jpeg(image: Image.Image, data: bytes) -> Image.Image:
  """The JPEG `data`, which `image` has opened and may have scaled, in RGB: by simplejpeg, whose pixels are Pillow's in two
  thirds of the time, and which takes no damage (Pillow makes up what a torn scan lacks). By Pillow what simplejpeg has no
  colours for (CMYK) or cannot read at all, and where it is not installed: damage within a scan then passes."""
  if simplejpeg:
    width, height = image.size
    try:
      pixels = simplejpeg.decode_jpeg(data, 'RGB', min_height=height, min_width=width, strict=True)
      if image.mode in ('RGB', 'L'):
        return Image.fromarray(pixels)
    except ValueError as e:
      if 'subsampling' not in str(e):  # an unusual one is none of turbojpeg's, and no damage
        raise
  return rgb(image)


def _upright(image: Image.Image) -> Image.Transpose | None:
  """What turns a loaded image as its EXIF block says."""
  try:
    return UPRIGHT.get(image.getexif().get(ORIENTATION))
  except Exception:  # a broken EXIF block does not make the pixels unreadable
    return None


def decode(data: bytes | BadImage, size: int | None, how: Reading = Reading()) -> tuple[np.ndarray, tuple[int, int]]:
  """The whole image squashed to uint8 [size size 3], antialiased, and its true (height, width), upright.

  `size=None` keeps the pixels as they are. A JPEG is scaled while decoding where that leaves at least twice the
  canvas. Shrunk on both sides by Pillow's Hamming filter, which is half the work of its bicubic, the filter of all
  else. Raises BadImage; given one, raises it.
  """
  if isinstance(data, BadImage):
    raise data
  image = open_image(io.BytesIO(data))
  pixels = image.width * image.height
  if pixels >= LARGE:
    image = None  # held by `_decoded` alone, which lets go of it
  with _ROOM.of(pixels):
    try:
      return _decoded(image or open_image(io.BytesIO(data)), data, size, how)
    except BadImage:
      raise
    except Exception as e:
      raise BadImage(f'cannot be decoded: {_line(e)}') from e


def _decoded(image: Image.Image, data: bytes, size: int | None, how: Reading) -> tuple[np.ndarray, tuple[int, int]]:
  width, height = image.size
  if image.format in ('JPEG', 'MPO'):
    turn = _upright(image)
    if 'progressive' in image.info and data.count(b'\xff\xda') > SCANS:
      raise BadImage(f'a JPEG of more than {SCANS} scans', TOO_LARGE)
    if size:
      image.draft(None, (2 * size, 2 * size))
    image = jpeg(image, data)
  else:
    raw = str(image.tile[0][3]) if image.tile else ''
    if image.format == 'PNG':
      Image.open(io.BytesIO(data), formats=('PNG',)).verify()
    image.load()  # before its EXIF block, whose reading loads the image too and would hide the fault of it
    turn, (width, height) = _upright(image), image.size  # a TIFF is upright by now
    image = rgb(image, how, raw)
  if turn is not None:
    image = image.transpose(turn)
    if turn in (UPRIGHT[5], UPRIGHT[6], UPRIGHT[7], UPRIGHT[8]):
      width, height = height, width
  if size and image.size != (size, size):
    shrinks = min(image.size) >= size
    image = image.resize((size, size), Image.Resampling.HAMMING if shrinks else Image.Resampling.BICUBIC)
  return np.asarray(image), (height, width)


def _line(error: Exception) -> str:
  """An error in one line, without the path that an OSError repeats and without a stop."""
  text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
  return ' '.join((text or type(error).__name__).split()).removesuffix('.')

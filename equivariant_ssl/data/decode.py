"""Encoded images to uint8 canvases, safe on hostile files: everything that can go wrong is a `BadImage`."""
import io
import os
import stat
import warnings

import numpy as np
from PIL import Image

try:
  import simplejpeg
except ImportError:  # a machine without a wheel of it
  simplejpeg = None

FILE_BYTES = 256 * 2**20   # of one encoded image
PIXELS = 64 * 10**6        # of one decoded image
SIDE = 30_000
ORIENTATION = 0x0112       # the EXIF tag, and what undoes each of its values
UPRIGHT = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
           5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
           8: Image.Transpose.ROTATE_90}

# Not per call: catch_warnings is not safe in threads. Pillow only warns between one and two times its own limit.
warnings.filterwarnings('error', category=Image.DecompressionBombWarning)


class BadImage(Exception):  # noqa: N818
  """An image that cannot be read; the message says why in one line."""


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
  return 'BMP' if head[:2] == b'BM' else None


def open_image(file: io.IOBase) -> Image.Image:
  """The image in a binary file, its header read and its declared size checked, its pixels not yet decoded."""
  try:
    head = file.read(12)
    file.seek(0)
  except OSError as e:
    raise BadImage(f'cannot be read: {_line(e)}') from e
  if not head:
    raise BadImage('empty file')
  kind = sniff(head)
  if kind is None:
    raise BadImage('not a JPEG, PNG, WebP, GIF or BMP image')
  try:
    image = Image.open(file, formats=(kind,))
  except Exception as e:  # Pillow raises whatever a format's parser trips over
    raise BadImage(f'{kind} header: {_line(e)}') from e
  width, height = image.size
  if not (0 < width <= SIDE and 0 < height <= SIDE and width * height <= PIXELS):
    raise BadImage(f'{width}x{height} pixels is beyond the limits ({SIDE:,} a side, {PIXELS:,} in all)')
  return image


def open_file(path: str, root: str) -> io.BufferedReader:
  """Open a regular file whose real path lies under the real path of `root`; never waits (a pipe is refused)."""
  try:
    real, base = os.path.realpath(path, strict=True), os.path.realpath(root)
    if os.path.commonpath([real, base]) != base:
      raise BadImage('a link that leads out of the folder')
    fd = os.open(real, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
  except (OSError, ValueError) as e:
    raise BadImage(f'cannot be opened: {_line(e)}') from e
  info = os.fstat(fd)
  if not stat.S_ISREG(info.st_mode) or info.st_size > FILE_BYTES:
    os.close(fd)
    raise BadImage('larger than 256 MiB' if stat.S_ISREG(info.st_mode) else 'not a regular file')
  return os.fdopen(fd, 'rb')


def read_file(path: str, root: str) -> bytes:
  """The bytes of a file that `open_file` accepts."""
  with open_file(path, root) as file:
    try:
      return file.read(FILE_BYTES + 1)
    except OSError as e:
      raise BadImage(f'cannot be read: {_line(e)}') from e


def header(path: str, root: str) -> tuple[int, int]:
  """The (height, width) that a file's header declares, without decoding its pixels."""
  with open_file(path, root) as file, open_image(file) as image:
    return image.height, image.width


def rgb(image: Image.Image) -> Image.Image:
  """The first frame in 8-bit RGB: alpha over black, 16-bit grey by its high byte (Pillow would clip it)."""
  if image.mode.startswith('I'):
    return Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8)).convert('RGB')
  if 'transparency' in image.info or image.mode in ('RGBA', 'LA', 'PA', 'La', 'RGBa'):
    image = image.convert('RGBA')
    return Image.composite(image.convert('RGB'), Image.new('RGB', image.size), image.getchannel('A'))
  return image.convert('RGB')


def jpeg(image: Image.Image, data: bytes) -> Image.Image:
  """The JPEG `data`, which `image` has opened and may have scaled, in RGB: by simplejpeg, whose pixels are Pillow's in two
  thirds of the time; by Pillow where that is not here or refuses it (CMYK, a torn file)."""
  if simplejpeg and image.mode in ('RGB', 'L'):
    width, height = image.size
    try:
      return Image.fromarray(simplejpeg.decode_jpeg(data, 'RGB', min_height=height, min_width=width, strict=True))
    except ValueError:
      pass
  return rgb(image)


def decode(data: bytes | BadImage, size: int | None) -> tuple[np.ndarray, tuple[int, int]]:
  """The whole image squashed to uint8 [size size 3], antialiased, and its true (height, width), upright.

  `size=None` keeps the pixels as they are. A JPEG is scaled while decoding where that leaves at least twice the
  canvas. Shrunk on both sides by Pillow's Hamming filter, which is half the work of its bicubic, the filter of all
  else. Raises BadImage; given one, raises it.
  """
  if isinstance(data, BadImage):
    raise data
  image = open_image(io.BytesIO(data))
  try:
    turn = UPRIGHT.get(image.getexif().get(ORIENTATION))
  except Exception:  # a broken EXIF block does not make the pixels unreadable
    turn = None
  width, height = image.size
  try:
    if size and image.format == 'JPEG':
      image.draft(None, (2 * size, 2 * size))
    image = rgb(image) if image.format != 'JPEG' else jpeg(image, data)
    if turn is not None:
      image = image.transpose(turn)
      if turn in (UPRIGHT[5], UPRIGHT[6], UPRIGHT[7], UPRIGHT[8]):
        width, height = height, width
    if size and image.size != (size, size):
      shrinks = min(image.size) >= size
      image = image.resize((size, size), Image.Resampling.HAMMING if shrinks else Image.Resampling.BICUBIC)
    return np.asarray(image), (height, width)
  except Exception as e:
    raise BadImage(f'cannot be decoded: {_line(e)}') from e


def _line(error: Exception) -> str:
  """An error in one line, without the path that an OSError repeats and without a stop."""
  text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
  return ' '.join((text or type(error).__name__).split()).removesuffix('.')

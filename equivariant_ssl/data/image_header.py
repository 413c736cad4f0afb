"""Opening an image safely: its header is read and its size checked before pixels are decoded.

Everything that can be wrong with an image is a `BadImage`.
"""
import warnings
from typing import IO, Any, cast

from PIL import Image, UnidentifiedImageError

from equivariant_ssl.errors import passing

PIXELS = 64 * 10**6        # the most pixels of one image, and of all that are decoded at a time
SIDE = 30_000              # pixels
FORMATS = 'JPEG, PNG, WebP, GIF, BMP, TIFF or PPM'
DAMAGED, TOO_LARGE = 'damaged', 'too large'
LINK, NO_FILE = 'links out of the folder', 'not regular files'
TIFF_TILE_TAGS = 322, 323  # width, height

# Not per call: catch_warnings is not safe in threads. Between one and two times its own limit
# Pillow only warns.
warnings.filterwarnings('error', category=Image.DecompressionBombWarning)
# Tags of a TIFF, or second pictures in a JPEG, often break a rule; that says nothing of the pixels.
warnings.filterwarnings('ignore', category=UserWarning, module=r'PIL\.')

# Each thread that has freed blocks of Pillow's usual 16 MiB keeps some of them (glibc's arenas).
# Blocks of more than 32 MiB go back to the system at once.
Image.core.set_block_size(64 * 2**20)


class BadImage(Exception):  # noqa: N818
  """An image that cannot be read. The message says why in one line; `reason` is its kind."""

  def __init__(self, why: str, reason: str = DAMAGED):
    super().__init__(why)
    self.reason = reason


def one_line(error: Exception) -> str:
  """An error's text in one line, without the path that an OSError repeats, and without a stop."""
  text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
  return ' '.join((text or type(error).__name__).split()).removesuffix('.')


def sniff(head: bytes) -> str | None:
  """The format that the first 12 bytes announce, by Pillow's name, or None for any other format."""
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


def open_image(file: IO[bytes]) -> Image.Image:
  """The image in a binary file. Its header is read and its size is checked; nothing is decoded."""
  try:
    head = file.read(12)
    file.seek(0)
  except OSError as error:
    if passing(error):
      raise
    raise BadImage(f'cannot be read: {one_line(error)}') from error
  if not head:
    raise BadImage('empty file')
  kind = sniff(head)
  if kind is None:
    raise BadImage(f'not a {FORMATS} image')
  try:
    image = Image.open(file, formats=(kind,))
  except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
    raise BadImage(f'{kind} header: {one_line(error)}', TOO_LARGE) from error
  except UnidentifiedImageError as error:
    raise BadImage(f'{kind} header: damaged') from error
  except Exception as error:  # Pillow raises whatever the parser of a format raises
    raise BadImage(f'{kind} header: {one_line(error)}') from error
  width, height = image.size
  if not (width > 0 and height > 0):
    raise BadImage(f'{width}x{height} pixels')
  if kind == 'TIFF':  # libtiff makes room for whole tiles
    tile_width, tile_height = _tile(image)
    width, height = max(width, tile_width), max(height, tile_height)
  if not (width <= SIDE and height <= SIDE and width * height <= PIXELS):
    raise BadImage(f'{width}x{height} pixels are beyond the limits ({SIDE:,} a side, {PIXELS:,} in '
                   'all)', TOO_LARGE)
  if image.mode == 'F':
    raise BadImage('its pixels are floating-point numbers, which have no known range: save it with '
                   '8 or 16 bits')
  return image


def _tile(image: Image.Image) -> tuple[int, int]:
  """The (width, height) of the tiles of a TIFF, 0 where it has none."""
  tags = cast(Any, image).tag_v2  # of a TiffImageFile
  width, height = TIFF_TILE_TAGS
  try:
    return int(tags.get(width, 0)), int(tags.get(height, 0))
  except (TypeError, ValueError) as error:
    raise BadImage('TIFF header: tiles without a size') from error

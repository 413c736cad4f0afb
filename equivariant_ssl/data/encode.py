"""Images as they are written.

An image stays as it is where TFDS's readers can read it. Others become a PNG of their pixels, or a
JPEG. A JPEG is also what an image becomes that is made smaller.
"""
import io

import numpy as np
from PIL import Image

from equivariant_ssl.data.decode import BadImage, PixelRules, decode
from equivariant_ssl.data.image_header import open_image

CANVAS = 32    # the side to which an image is decoded as a test: enough to meet every damaged byte
QUALITY = 95   # the quality of a JPEG that is made smaller
TFDS_QUALITY = 100   # the quality of a JPEG that TFDS makes from CMYK


def encode_jpeg(image: Image.Image, quality: int) -> bytes:
  """An RGB image as a JPEG."""
  out = io.BytesIO()
  image.save(out, 'JPEG', quality=quality)
  return out.getvalue()


def png(pixels: np.ndarray) -> bytes:
  """[H W 3] uint8 as a PNG."""
  out = io.BytesIO()
  Image.fromarray(pixels).save(out, 'PNG')
  return out.getvalue()


def shrunk_jpeg(data: bytes | BadImage, side: int, rules: PixelRules = PixelRules()) -> bytes:
  """The image as a JPEG in RGB, with a short side of at most `side` pixels.

  An image is never enlarged. Raises BadImage.
  """
  pixels, _ = decode(data, None, rules)
  image, short = Image.fromarray(pixels), min(pixels.shape[:2])
  if short > side:
    width, height = (round(n * side / short) for n in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
  return encode_jpeg(image, QUALITY)


def readable(data: bytes | BadImage, rules: PixelRules = PixelRules()) -> bytes:
  """The image as it is, or, where TFDS's readers do not read it as RGB, as another format.

  CMYK becomes a JPEG of TFDS's own quality; TIFF and PPM become a PNG. Raises BadImage where the
  image cannot be decoded.
  """
  if isinstance(data, BadImage):
    raise data
  decode(data, CANVAS, rules)
  with open_image(io.BytesIO(data)) as image:
    kind, mode = image.format, image.mode
  if kind in ('TIFF', 'PPM'):
    return png(decode(data, None, rules)[0])
  if mode == 'CMYK':
    return encode_jpeg(Image.fromarray(decode(data, None)[0]), TFDS_QUALITY)
  return data

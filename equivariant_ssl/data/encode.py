"""Images as they are written: a PNG of pixels, a smaller JPEG of an image, or the image as it is if that can be read."""
import io

import numpy as np
from PIL import Image

from equivariant_ssl.data.decode import BadImage, Reading, decode, open_image

CANVAS = 32    # to which an image is decoded to see that it can be: enough to meet every damaged byte
QUALITY = 95   # of a JPEG that is encoded anew


def jpeg(image: Image.Image, quality: int) -> bytes:
  out = io.BytesIO()
  image.save(out, 'JPEG', quality=quality)
  return out.getvalue()


def png(pixels: np.ndarray) -> bytes:
  """[H W 3] uint8 as a PNG."""
  out = io.BytesIO()
  Image.fromarray(pixels).save(out, 'PNG')
  return out.getvalue()


def shrunk(data: bytes | BadImage, side: int, how: Reading = Reading()) -> bytes:
  """The image in RGB with its short side `side` at most, as a JPEG; only ever smaller. Raises BadImage."""
  pixels, _ = decode(data, None, how)
  image, short = Image.fromarray(pixels), min(pixels.shape[:2])
  if short > side:
    image = image.resize([round(n * side / short) for n in image.size], Image.Resampling.BICUBIC)
  return jpeg(image, QUALITY)


def whole(data: bytes | BadImage, how: Reading = Reading()) -> bytes:
  """The image as it is, but for what TFDS's readers do not read as RGB: CMYK becomes a JPEG at TFDS's own quality, TIFF and
  PPM a PNG. Raises BadImage if it cannot be decoded."""
  decode(data, CANVAS, how)
  with open_image(io.BytesIO(data)) as image:
    kind, mode = image.format, image.mode
  if kind in ('TIFF', 'PPM'):
    return png(decode(data, None, how)[0])
  return data if mode != 'CMYK' else jpeg(Image.fromarray(decode(data, None)[0]), 100)

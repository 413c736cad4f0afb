"""Images as they are written: a PNG of pixels, a smaller JPEG of an image, or the image as it is if it can be decoded."""
import io

import numpy as np
from PIL import Image

from equivariant_ssl.data.decode import BadImage, decode

CANVAS = 32    # to which an image is decoded to see that it can be: enough to meet every damaged byte
QUALITY = 95   # of a JPEG that is encoded anew


def png(pixels: np.ndarray) -> bytes:
  """[H W 3] uint8 as a PNG."""
  out = io.BytesIO()
  Image.fromarray(pixels).save(out, 'PNG')
  return out.getvalue()


def shrunk(data: bytes | BadImage, side: int) -> bytes:
  """The image in RGB with its short side `side` at most, as a JPEG; only ever smaller. Raises BadImage."""
  pixels, _ = decode(data, None)
  image, short = Image.fromarray(pixels), min(pixels.shape[:2])
  if short > side:
    image = image.resize([round(n * side / short) for n in image.size], Image.Resampling.BICUBIC)
  out = io.BytesIO()
  image.save(out, 'JPEG', quality=QUALITY)
  return out.getvalue()


def whole(data: bytes | BadImage) -> bytes:
  """The image as it is. Raises BadImage if it cannot be decoded."""
  decode(data, CANVAS)
  return data

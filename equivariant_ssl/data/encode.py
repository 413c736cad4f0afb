"""Images as they are written: a PNG of pixels, a smaller JPEG of an image, or the image as it is if that can be read."""
import io

import numpy as np
from PIL import Image

from equivariant_ssl.data.decode import BadImage, decode, open_image

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


def shrunk(data: bytes | BadImage, side: int) -> bytes:
  """The image in RGB with its short side `side` at most, as a JPEG; only ever smaller. Raises BadImage."""
  pixels, _ = decode(data, None)
  image, short = Image.fromarray(pixels), min(pixels.shape[:2])
  if short > side:
    image = image.resize([round(n * side / short) for n in image.size], Image.Resampling.BICUBIC)
  return jpeg(image, QUALITY)


def whole(data: bytes | BadImage) -> bytes:
  """The image as it is, but for CMYK, which becomes RGB at TFDS's own quality: its readers would show four channels of it.
  Raises BadImage if it cannot be decoded."""
  decode(data, CANVAS)
  if open_image(io.BytesIO(data)).mode != 'CMYK':
    return data
  return jpeg(Image.fromarray(decode(data, None)[0]), 100)

"""Hostile and odd images, and what the reader of images makes of each: run as a program by test_images.py.

python images.py COUNT: a line of JSON an image, its name before it is read, its outcome after; at last the peak of memory.
"""
import io
import json
import random
import signal
import struct
import sys
import warnings
import zlib

import numpy as np
import simplejpeg
from PIL import Image, ImageOps

from equivariant_ssl.data.decode import BadImage, decode

PATIENCE = 60  # seconds of one image, on a busy machine
NEAR = 1.      # mean difference of the pixels of two decoders of JPEG, of 255
SIDE = 48


def noise(rng, mode='RGB', size=(SIDE, SIDE - 7)):
  """An image that no format can make small, in any mode of Pillow."""
  bands = np.frombuffer(rng.randbytes(size[0] * size[1] * 4), np.uint8).reshape(size[1], size[0], 4)
  smooth = np.asarray(Image.fromarray(bands[::8, ::8]).resize(size, Image.Resampling.BILINEAR))
  if mode == 'I;16':
    return Image.fromarray(smooth[..., 0].astype(np.uint16) * 257)
  return Image.fromarray(smooth, 'RGBA').convert(mode)


def encoded(image, kind, **how):
  out = io.BytesIO()
  image.save(out, kind, **how)
  return out.getvalue()


def chunk(kind, data):
  return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))


def png(width, height, *chunks, depth=8, color=2):
  head = struct.pack('>IIBBBBB', width, height, depth, color, 0, 0, 0)
  return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', head) + b''.join(chunk(*c) for c in chunks) + chunk(b'IEND', b'')


def turned(image, orientation):
  exif = Image.Exif()
  exif[0x0112] = orientation
  return encoded(image, 'JPEG', exif=exif, quality=95)


def good(rng):
  """{name: data} of images that are odd, and right."""
  rgb, frames = noise(rng), [noise(rng) for _ in range(3)]
  found = {f'png {m}': encoded(noise(rng, m), 'PNG') for m in ('RGB', 'RGBA', 'L', 'LA', '1', 'P', 'I;16')}
  found |= {f'jpeg {m}': encoded(noise(rng, m), 'JPEG') for m in ('RGB', 'L', 'CMYK')}
  found |= {f'jpeg {k}': encoded(rgb, 'JPEG', **how) for k, how in {
      'progressive': {'progressive': True}, '4:4:4': {'subsampling': 0}, '4:2:2': {'subsampling': 1}, 'q1': {'quality': 1},
      'optimized': {'optimize': True}, 'icc': {'icc_profile': b'x' * 999}, 'comment': {'comment': b'x' * 999}}.items()}
  found |= {f'exif {i}': turned(rgb, i) for i in (*range(1, 9), 99)}
  found |= {'webp': encoded(rgb, 'WEBP', lossless=True), 'webp alpha': encoded(noise(rng, 'RGBA'), 'WEBP', lossless=True),
            'gif': encoded(noise(rng, 'P'), 'GIF'), 'bmp': encoded(rgb, 'BMP'), 'bmp 1': encoded(noise(rng, '1'), 'BMP'),
            'gif moving': encoded(frames[0], 'GIF', save_all=True, append_images=frames[1:]),
            'png moving': encoded(frames[0], 'PNG', save_all=True, append_images=frames[1:]),
            'png one pixel': encoded(rgb.resize((1, 1)), 'PNG'), 'png 1 x 999': encoded(rgb.resize((1, 999)), 'PNG'),
            'png transparent color': encoded(rgb, 'PNG', transparency=(1, 2, 3)),
            'png palette with alpha': encoded(noise(rng, 'P'), 'PNG', transparency=bytes(range(256)))}
  return found


def bad(rng, whole):
  """{name: data} of what is no whole image."""
  kinds = {k: whole[k] for k in ('png RGB', 'jpeg RGB', 'jpeg progressive', 'webp', 'gif', 'bmp', 'png I;16')}
  found = {f'{k} cut at {n} %': data[:len(data) * n // 100] for k, data in kinds.items() for n in (1, 10, 50, 90)}
  found |= {f'{n} bytes of {k}': data[:n] for k, data in kinds.items() for n in (3, 12, 20)}
  pixels = zlib.compress(bytes(3 * 8 * 8 + 8))
  damaged = bytearray(whole['png RGB'])
  damaged[-20] ^= 1  # the checksum of its last chunk of pixels
  found |= {
      'nothing': b'', 'a byte': b'\x89', 'text': b'hello, I am a cat', 'html': b'<html><img src=x onerror=alert(1)>',
      'svg': b'<svg xmlns="http://www.w3.org/2000/svg"/>', 'pdf': b'%PDF-1.7\n1 0 obj', 'elf': b'\x7fELF' + bytes(99),
      'zip': b'PK\3\4' + bytes(99), 'npy': b'\x93NUMPY' + bytes(99), 'eps': b'%!PS-Adobe-3.0 EPSF\n', 'pickle': b'\x80\4.',
      'zeros': bytes(999), 'noise': rng.randbytes(999), 'ico': b'\0\0\1\0' + bytes(99), 'psd': b'8BPS' + bytes(99),
      'png of no pixels': png(8, 8), 'png of size 0': png(0, 8, (b'IDAT', pixels)), 'png checksum': bytes(damaged),
      'png beyond the limits': png(60_000, 60_000, (b'IDAT', pixels)), 'png 2^31': png(2**31 - 1, 1, (b'IDAT', pixels)),
      'png 60000 x 1': png(60_000, 1, (b'IDAT', pixels)), 'png too few pixels': png(500, 500, (b'IDAT', pixels)),
      'png not deflated': png(8, 8, (b'IDAT', b'x' * 99)), 'png of no colors': png(8, 8, (b'IDAT', pixels), color=5),
      'png of 3 bits': png(8, 8, (b'IDAT', pixels), depth=3), 'jpeg of nothing': b'\xff\xd8\xff\xd9' + bytes(99),
      'jpeg in jpeg': b'\xff\xd8\xff\xe0' + struct.pack('>H', 60_000) + whole['jpeg RGB'],
      'gif 65535 x 65535': b'GIF89a' + struct.pack('<HH', 65535, 65535) + bytes(99),
      'bmp of negative size': b'BM' + bytes(12) + struct.pack('<Iii', 40, -99, 8) + bytes(99),
      'bmp 2^30': b'BM' + bytes(12) + struct.pack('<IiiHH', 40, 2**30, 2**30, 1, 24) + bytes(99),
      'webp of nothing': b'RIFF' + struct.pack('<I', 4) + b'WEBP', 'webp lies': b'RIFF\xff\xff\xff\xffWEBPVP8L' + bytes(99)}
  return found


def bombs():
  """{name: data} of files that are small and would be large; they may be refused, or read in little memory."""
  text = zlib.compress(bytes(1 << 28))
  row = zlib.compressobj(9)
  flat = b''.join(row.compress(bytes(1 + 7990 * 3)) for _ in range(7990)) + row.flush()
  return {'png of 7990 x 7990': png(7990, 7990, (b'IDAT', flat)),
          'png with 256 MiB of text': png(8, 8, (b'zTXt', b'a\0\0' + text), (b'IDAT', zlib.compress(bytes(25 * 8)))),
          'png with a profile of 256 MiB': png(8, 8, (b'iCCP', b'a\0\0' + text), (b'IDAT', zlib.compress(bytes(25 * 8))))}


def fuzzed(rng, whole):
  """(name, data) of an image with some bytes changed."""
  name = rng.choice(sorted(whole))
  data = bytearray(whole[name])
  how = rng.choice(('flip', 'flip', 'flips', 'cut', 'zero', 'splice', 'insert', 'drop'))
  at = rng.randrange(len(data))
  if how in ('flip', 'flips'):
    for _ in range(1 if how == 'flip' else rng.randrange(2, 30)):
      data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
  elif how == 'cut':
    del data[at:]
  elif how == 'zero':
    data[at:at + 64] = bytes(len(data[at:at + 64]))
  elif how == 'splice':
    data[at:] = whole[rng.choice(sorted(whole))][at:]
  elif how == 'insert':
    data[at:at] = rng.randbytes(rng.randrange(1, 64))
  else:
    del data[at:at + rng.randrange(1, 64)]
  return f'{name}, {how} at {at}', bytes(data)


def reference(data):
  """The pixels by Pillow alone, read by the rules that are documented; an exception where it, or simplejpeg, sees damage."""
  image = Image.open(io.BytesIO(data))
  if image.format == 'PNG':
    image.verify()
    image = Image.open(io.BytesIO(data))
  if image.format == 'JPEG' and image.mode in ('RGB', 'L'):
    try:
      simplejpeg.decode_jpeg(data, 'RGB', strict=True)
    except ValueError as error:
      if 'subsampling' not in str(error):
        raise
  image.load()
  try:
    image = ImageOps.exif_transpose(image)
  except Exception:  # a broken EXIF block does not make the pixels unreadable
    pass
  if image.mode.startswith('I'):
    return np.repeat((np.asarray(image).astype(int) >> 8).astype(np.uint8)[..., None], 3, axis=2)
  if 'transparency' in image.info or image.mode in ('RGBA', 'LA', 'PA'):
    rgba = np.asarray(image.convert('RGBA')).astype(int)
    return ((rgba[..., :3] * rgba[..., 3:] + 127) // 255).astype(np.uint8)
  return np.asarray(image.convert('RGB'))


def judge(data, must):
  """(outcome, what there is to say) of one image. must: 'read', 'refuse', or '' where either may be right."""
  try:
    got, refused = decode(data, None)[0], ''
    decode(data, 16)
  except BadImage as error:
    got, refused = None, str(error)
    if '\n' in refused or not refused:
      return 'wrong', 'its reason is not a line'
  except BaseException as error:
    return 'wrong', f'{type(error).__name__}: {error}'
  if got is None:
    return ('wrong', f'refused: {refused}') if must == 'read' else ('survived', refused)
  if must == 'refuse':
    return 'wrong', 'accepted'
  try:
    want = reference(data)
  except Exception as error:
    return 'wrong', f'accepted, and a decoder says {type(error).__name__}: {error}'
  if got.shape != want.shape:
    return 'wrong', f'{got.shape} for {want.shape}'
  apart = np.abs(got.astype(int) - want.astype(int))
  near = apart.mean() <= NEAR if data[:2] == b'\xff\xd8' else apart.max() <= 1  # of alpha
  return ('survived', '') if near else ('wrong', f'pixels differ by up to {apart.max()}, {apart.mean():.2f} in the mean')


def main(count):
  warnings.simplefilter('ignore')  # of what is read as a reference
  warnings.filterwarnings('error', category=Image.DecompressionBombWarning)
  rng = random.Random(5)
  whole = good(rng)
  named = [(k, v, 'read') for k, v in whole.items()] + [(k, v, 'refuse') for k, v in bad(rng, whole).items()]
  named += [(k, v, None) for k, v in bombs().items()] if count > len(named) + 100 else []
  named += [(*fuzzed(rng, whole), '') for _ in range(max(count - len(named), 20))]
  for name, data, must in named:
    print(json.dumps({'name': name}), flush=True)
    signal.alarm(PATIENCE)
    if must is None:
      try:
        decode(data, 16)
        found = 'survived', ''
      except BadImage as error:
        found = 'survived', str(error)
    else:
      found = judge(data, must)
    signal.alarm(0)
    print(json.dumps({'name': name, 'outcome': found[0], 'said': found[1]}), flush=True)
  # Not ru_maxrss: a process inherits it from the one that started it.
  peak = next(line for line in open('/proc/self/status') if line.startswith('VmHWM'))
  print(json.dumps({'peak': int(peak.split()[1]) * 1024}), flush=True)


if __name__ == '__main__':
  main(int(sys.argv[1]))

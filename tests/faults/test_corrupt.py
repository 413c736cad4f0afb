"""Damage to every file of a checkpoint, and to any bit of an array_record file: seen, or harmless, never taken for good."""
import functools
import io
import random
import shutil

import jax
import numpy as np
import pytest
from matrix import many
from PIL import Image

from equivariant_ssl import errors
from equivariant_ssl.data import tfds, writer
from equivariant_ssl.data.decode import BadImage
from equivariant_ssl.storage import checkpoint, disk

WHAT = np.random.default_rng(0)
PARTS = {'conv': WHAT.normal(size=(3, 3, 8, 8)).astype(np.float32), 'bn': np.linspace(0, 1, 8, dtype=np.float32),
         'half': WHAT.normal(size=(7, 5)).astype(jax.numpy.bfloat16), 'count': np.arange(5, dtype=np.int32),
         'on': np.array(True)}
LIKE = {**PARTS, 'step': np.int32(0)}


def state(step):
  return {k: v if v.dtype == bool else (v + v.dtype.type(step)) for k, v in PARTS.items()} | {'step': np.int32(step)}


def same(got, want):
  bits = lambda tree: {k: (np.asarray(v).dtype, np.asarray(v).shape, np.asarray(v).tobytes()) for k, v in tree.items()}
  return bits(got) == bits(want)


def damage(kind, data, other, rng):
  """The bytes of a file after one of KINDS; None: it is gone. other: the same file of another step."""
  at, size = rng.randrange(max(len(data), 1)), len(data)
  flipped = lambda: data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1:] if data else b'\0'
  return {'flip': flipped,
          'cut': lambda: data[:at], 'empty': lambda: b'', 'gone': lambda: None, 'zero': lambda: bytes(size),
          'longer': lambda: data + rng.randbytes(rng.randrange(1, 99)),
          'noise': lambda: data[:at] + rng.randbytes(size - at),
          'hole': lambda: data[:at] + bytes(min(512, size - at)) + data[at + 512:], 'other': lambda: other}[kind]()


KINDS = ('flip', 'flip', 'flip', 'flip', 'cut', 'empty', 'gone', 'zero', 'longer', 'noise', 'hole', 'other')


@pytest.fixture(autouse=True)
def _at_once(monkeypatch):
  monkeypatch.setattr(disk, 'PAUSES', (0.,))


def test_damage_to_every_file_of_a_checkpoint(row, tmp_path):
  count, rng = many(800, 30), random.Random(3)
  with checkpoint.open_checkpoints(tmp_path / 'checkpoints') as saved:
    for step in (1, 2):
      saved.save(step, state(step), {'at': step})
  newest, older = tmp_path / 'checkpoints/2', tmp_path / 'checkpoints/1'
  files = sorted((p for p in newest.rglob('*') if p.is_file()), key=lambda p: p.stat().st_size)
  names = [p.relative_to(newest) for p in files]
  one = row(f'damage to each of {len(names)} files of a checkpoint', count)
  for i in range(count):
    # Each file in turn with each kind; every third time the one that holds the weights.
    path = newest / (names[-1] if i % 3 == 0 else names[i % len(names)])
    good, kind = path.read_bytes(), rng.choice(KINDS)
    twin = older / path.relative_to(newest)
    bad = damage(kind, good, twin.read_bytes() if twin.exists() else b'', rng)
    path.write_bytes(bad) if bad is not None else path.unlink()
    try:
      step, got, meta = checkpoint.load_checkpoint(tmp_path / 'checkpoints', LIKE, log=lambda line: None)
      right = same(got, state(step)) and meta == {'at': step}
      one.add('survived' if right else 'wrong', f'{path.name} {kind}: step {step}')
    except errors.UserError as error:  # refused with everything in its place: another version, says its format
      version = error.code == errors.OTHER_CONFIG and 'format' in str(error)
      one.add('survived' if version else 'lost', f'{path} {kind}: {error}')
    except Exception as error:
      one.add('lost', f'{path} {kind}: {type(error).__name__} {error}')
    path.write_bytes(good)


def picture(i):
  out = io.BytesIO()
  Image.fromarray(np.random.default_rng(i).integers(0, 256, (12, 12, 3), np.uint8)).save(out, 'PNG')
  return out.getvalue()


def read(path):
  """Every record of a prepared data set: (bytes or BadImage, label)."""
  builder = tfds.open_directory(path)
  found = tfds.split_records(builder, 'train', *tfds.image_and_label('x', builder.info))
  images = list(found.read(range(found.count)))
  return [(image, int(label)) for image, label in zip(images, found.labels, strict=True)]


def test_flipped_bits_of_array_record(row, tmp_path):
  count, rng = many(300, 15), random.Random(4)
  examples = [writer.Example(i, picture(i), i % 3) for i in range(40)]
  data = writer.Dataset('x', '1.0.0', ('a', 'b', 'c'), {'train': lambda: iter(examples)})
  path = writer.write(data, tmp_path / 'root', log=lambda line: None)
  file, = path.glob('*.array_record*')
  good, want = file.read_bytes(), read(path)
  assert sorted(image for image, _ in want) == sorted(e.data for e in examples)
  one = row('flipped bits of array_record', count)
  for i in range(count):
    copy = shutil.copytree(path, tmp_path / f'{i}' / 'x' / '1.0.0')
    at = rng.randrange(len(good))
    (copy / file.name).write_bytes(good[:at] + bytes([good[at] ^ 1 << rng.randrange(8)]) + good[at + 1:])
    try:
      found = read(copy)
      bad = [k for k, (a, b) in enumerate(zip(found, want, strict=True)) if not isinstance(a[0], BadImage) and a != b]
      one.add('wrong' if bad else 'survived', f'{at}: records {bad}')
    except errors.UserError:  # the file is refused as a whole
      one.add('survived')
    except Exception as error:
      one.add('lost', f'{at}: {type(error).__name__}: {error}')
    shutil.rmtree(tmp_path / f'{i}')


def test_the_test_can_see_damage(tmp_path):
  """What is judged above is judged right: another state is not the same."""
  assert same(state(1), state(1)) and not same(state(1), state(2))
  assert not same({**state(1), 'half': state(1)['half'].astype(np.float32)}, state(1))
  assert all(functools.partial(damage, k)(b'abcdef', b'other', random.Random(0)) != b'abcdef' for k in KINDS)

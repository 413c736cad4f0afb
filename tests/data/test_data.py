"""Data sources: their contents, broken input, and a CIFAR-10 that plain TFDS reads."""
import gzip
import hashlib
import io
import json
import os
import pathlib
import struct
import subprocess
import sys
import tarfile
import zlib

import jax
import numpy as np
import pytest
from PIL import Image

from equivariant_ssl import data, registry
from equivariant_ssl.data import (
  archives,
  cache,
  channel_moments,
  cifar10,
  folder,
  prepare,
  source,
  tfds,
)
from equivariant_ssl.data.check import check
from equivariant_ssl.data.decode import BadImage, decode, read_file
from equivariant_ssl.data.image_header import PIXELS
from equivariant_ssl.data.order import epoch_order
from equivariant_ssl.data.tfds_folders import prepare_command
from equivariant_ssl.errors import BAD_DATA, USAGE, UserError

BATCH = 4


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))


def encoded(pixels, kind='PNG', **kw):
  out = io.BytesIO()
  (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(out, kind, **kw)
  return out.getvalue()


def photo(seed, height=40, width=60):
  return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def write(path, content):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(content)
  return path


def album(root, classes=('cat', 'dog'), each=30):
  """A folder of `each` images a class, the left half of every one of a color of its own."""
  for c, name in enumerate(classes):
    for i in range(each):
      pixels = np.full((8, 12, 3), (c * 100, i, 7), np.uint8)
      pixels[:, 6:] = (*(pixels[0, 0, :2] // 2 + 90), 200)
      write(root / name / f'{i:03d}.png', encoded(pixels))
  return root


def same(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


# ---- the registry, digits, the order of an epoch

def test_a_config_can_name_the_sources_and_nothing_else():
  assert registry.names(data) == ['arrays', 'cifar10', 'digits', 'folder', 'tfds']


def test_digits_are_the_scans():
  from sklearn.datasets import load_digits
  scans, labels = load_digits(return_X_y=True)
  order = np.random.RandomState(0).permutation(1797)
  made = registry.make(data, 'digits')
  assert made.train.images.shape == (1000, 16, 16, 3) and made.test.images.shape == (797, 16, 16, 3)
  images, given = (
    np.concatenate(pair) for pair in zip(made.train[::2], made.test[::2], strict=True)
  )
  np.testing.assert_array_equal(given, labels[order])
  for channel in range(3):
    back = images[:, :, :, channel].reshape(-1, 8, 2, 8, 2)
    assert (back == back[:, :, :1, :, :1]).all()
    np.testing.assert_array_equal(
      np.rint(back[:, :, 0, :, 0] / 255.0 * 16), scans[order].reshape(-1, 8, 8)
    )
  assert images.dtype == np.uint8 and images.max() == 255 and given.dtype == np.int32
  x = made.train.images / 255.
  np.testing.assert_allclose(
    [made.mean, made.std], [x.mean((0, 1, 2)), x.std((0, 1, 2))], rtol=1e-9
  )
  assert (made.train.sizes == 16).all() and made.problems == ()


def test_the_order_is_a_function_of_key_and_epoch(key):
  first, again = epoch_order(key, 0, 1000), jax.jit(lambda e: epoch_order(key, e, 1000))(0)
  np.testing.assert_array_equal(first, again)
  np.testing.assert_array_equal(np.sort(first), np.arange(1000))
  assert first.dtype == np.int32
  for other in (epoch_order(key, 1, 1000), epoch_order(jax.random.key(1), 0, 1000)):
    assert (np.asarray(other) != np.asarray(first)).mean() > .9


# ---- decoding

def test_decoding_keeps_the_whole_image_upright():
  ramp = np.zeros((40, 80, 3), np.uint8)
  ramp[:, 40:], ramp[20:, :, 1] = (200, 0, 0), 100
  for kind in ('PNG', 'JPEG', 'WEBP'):
    exif = Image.Exif()
    exif[0x0112] = 6   # the camera was turned: the picture is to be shown turned clockwise
    plain, size = decode(encoded(ramp, kind, quality=95), 16)
    turned, swapped = decode(encoded(ramp, kind, quality=95, exif=exif), 16)
    assert size == (40, 80) and swapped == (80, 40) and plain.shape == (16, 16, 3)
    np.testing.assert_allclose(turned.astype(int), np.rot90(plain, -1).astype(int), atol=12)
    assert plain[2, 13, 0] > 180 and plain[2, 2, 0] < 20 and plain[13, 2, 1] > 80
  np.testing.assert_array_equal(decode(encoded(ramp), None)[0], ramp)


@pytest.mark.parametrize(('image', 'expected'), [
    (Image.fromarray(np.full((4, 4), 0x7fff, np.uint16)), (127, 127, 127)),
    (Image.new('RGBA', (4, 4), (200, 100, 50, 128)), (100, 50, 25)),
    (Image.new('LA', (4, 4), (200, 0)), (0, 0, 0)),
    (Image.new('1', (4, 4), 1), (255, 255, 255)),
    (Image.new('L', (4, 4), 9), (9, 9, 9)),
    (Image.new('RGB', (4, 4), (1, 2, 3)).quantize(2), (1, 2, 3)),
])
def test_every_kind_of_pixel_becomes_rgb(image, expected):
  np.testing.assert_allclose(decode(encoded(image), None)[0][1, 1].astype(int), expected, atol=1)


def test_cmyk_and_animations_are_read():
  cmyk = decode(encoded(Image.new('CMYK', (16, 16), (0, 255, 255, 0)), 'JPEG'), 8)[0]
  assert (cmyk[4, 4] > (200, -1, -1)).all() and cmyk[4, 4, 2] < 60
  frames = [Image.new('RGB', (8, 8), color) for color in ('red', 'blue')]
  assert tuple(
    decode(encoded(frames[0], 'GIF', save_all=True, append_images=frames[1:]), 8)[0][0, 0]
  ) == (255, 0, 0)


def lying_png(width, height):
  def chunk(name, body):
    return struct.pack('>I', len(body)) + name + body + struct.pack('>I', zlib.crc32(name + body))

  parts = (
    chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)),
    chunk(b'IDAT', zlib.compress(b'\0')),
  )
  return b''.join((b'\x89PNG\r\n\x1a\n', *parts, chunk(b'IEND', b'')))


@pytest.mark.parametrize(
  'bad',
  [
    b'',
    b'x',
    b'<html>',
    b'%PDF-1.4',
    b'\x89PNG\r\n\x1a\n',
    b'\xff\xd8\xff',
    b'BM',
    b'RIFF0000WEBP',
    b'GIF89a',
    encoded(photo(0), 'TGA'),
    encoded(photo(0), 'PNG')[:900],
    encoded(photo(0), 'JPEG')[:900],
    encoded(photo(0), 'WEBP', lossless=True)[:900],
    lying_png(60_000, 1),
    lying_png(20_000, 20_000),
    lying_png(9_000, 9_000),
    lying_png(0, 5),
    lying_png(50, 50),
  ],
)
def test_what_is_no_image_is_a_bad_image(bad):
  with pytest.raises(BadImage) as e:
    decode(bad, 8)
  assert len(str(e.value).splitlines()) == 1


def test_damaged_bytes_raise_nothing_but_bad_image():
  rng, escaped = np.random.default_rng(0), 0
  for kind in ('PNG', 'JPEG', 'WEBP', 'GIF', 'BMP', 'TIFF', 'PPM'):
    whole = np.frombuffer(encoded(photo(1, 20, 30), kind), np.uint8)
    for _ in range(60):
      damaged = whole.copy()
      damaged[rng.integers(0, min(200, len(whole)), 3)] = rng.integers(0, 256, 3)
      try:
        canvas, size = decode(damaged.tobytes(), 8)
        escaped += 1
        assert canvas.shape == (8, 8, 3) and 0 < size[0] * size[1] <= PIXELS
      except BadImage:
        pass
  assert escaped > 0   # so that the test has seen both ends


# ---- folders

def test_a_folder_with_classes(tmp_path):
  made = folder.make(str(album(tmp_path)), size=4, test=.2)
  assert made.classes == ('cat', 'dog') and made.problems == ()
  for split in (made.train, made.test):
    assert (split.sizes == (8, 12)).all() and split.images.shape[1:] == (4, 4, 3)
    np.testing.assert_array_equal(split.images[:, 0, 0, 0], split.labels * 100)
  seen = [
    set(zip(s.labels.tolist(), s.images[:, 0, 0, 1].tolist(), strict=True))
    for s in (made.train, made.test)
  ]
  assert len(seen[0]) + len(seen[1]) == 60 and not seen[0] & seen[1] and 4 <= len(seen[1]) <= 22
  album(tmp_path, ('ant',))   # more images move none
  more = folder.make(str(tmp_path), size=4, test=.2)
  np.testing.assert_array_equal(more.test.images[more.test.labels > 0], made.test.images)
  assert folder.make(str(tmp_path), size=4, test=0.).test is None


def test_a_folder_with_splits_and_one_without_classes(tmp_path):
  album(tmp_path / 'train', ('b', 'a'), 3)
  album(tmp_path / 'test', ('a', 'c'), 2)
  made = folder.make(str(tmp_path), size=4)
  assert made.classes == ('a', 'b', 'c') and len(made.train.images) == len(made.names) == 6
  assert all(name.startswith(('a/', 'b/')) for name in made.names)
  assert made.test.labels.tolist() == [0, 0, 2, 2]
  album(tmp_path / 'val', ('a',), 1)
  assert len(folder.make(str(tmp_path), size=4).test.images) == 1
  album(tmp_path / 'flat', ('.',), 4)
  flat = folder.make(str(tmp_path / 'flat'), size=4)
  assert flat.classes is None and flat.train.labels is None
  assert [line[:32] for line in flat.problems] == ['no class folders, so no labels: ']
  album(tmp_path / 'flat', ('x',), 4)
  assert 'no class folder' in folder.make(str(tmp_path / 'flat'), size=4).problems[0]


def test_broken_files_are_left_out_and_said(tmp_path):
  outside = write(tmp_path / 'elsewhere' / 'x.png', encoded(photo(0)))
  root = album(tmp_path / 'album', each=220)
  write(root / 'cat' / 'zero.jpg', b'')
  write(root / 'cat' / 'text.png', b'not an image at all')
  write(root / 'cat' / 'new\nline\udcff.jpg', b'?')
  write(root / 'cat' / 'really_a_jpeg.png', encoded(photo(0), 'JPEG'))
  write(root / 'cat' / 'notes.txt', b'.')
  write(root / 'cat' / '._junk.jpg', b'?')
  os.mkfifo(root / 'dog' / 'pipe.png')
  (root / 'dog' / 'out.png').symlink_to(outside)
  (root / 'dog' / 'in.png').symlink_to(root / 'dog' / '000.png')
  (root / 'dog' / 'loop.png').symlink_to(root / 'dog' / 'loop.png')
  (root / 'linked').symlink_to(outside.parent)
  made = folder.make(str(root), size=4, test=0.)
  assert len(made.train.images) == 440 + 2 and made.problems[0] == (
    'left out: damaged 4, .txt 1, links out of the folder 1, not regular files 1, '
    'links to folders 1; 442 images are read'
  )
  assert made.problems[1:3] == (
    'links are followed with --config.data.links=True',
    '4 damaged, left out:',
  )
  assert made.left_out == {
    'damaged': 4,
    '.txt': 1,
    'links out of the folder': 1,
    'not regular files': 1,
    'links to folders': 1,
  }
  text = '\n'.join(made.problems)
  for name in (
    'zero.jpg: empty',
    'text.png: not a',
    r'new\nline\xff.jpg',
    'loop.png: cannot be opened',
  ):
    assert name in text
  assert all(len(line.splitlines()) == 1 for line in made.problems)
  report = check(str(root))
  assert not report.ok and '4 damaged:' in report.lines and 'in.png' in str(report.lines)  # a copy
  assert (
    report.lines[1] == made.problems[0]
    and '3 not read, because they are links, too large, or not files:' in report.lines
  )
  text = '\n'.join(report.lines)
  assert all(
    name in text for name in ('pipe.png: not a regular', 'linked: a link', 'out.png: a link that')
  )


def test_a_file_that_breaks_later_is_replaced(tmp_path, monkeypatch):
  root = album(tmp_path, each=100)
  whole = folder.make(str(root), size=4)
  broken = root / 'cat' / '050.png'
  real = folder.read_file

  def read(path, base):  # it was whole when it was indexed
    return (
      real(path, base)[:45] if path.endswith(os.path.join('cat', '050.png')) else real(path, base)
    )

  with monkeypatch.context() as patch:
    patch.setattr(folder, 'read_file', read)
    made, again = folder.make(str(root), size=4), folder.make(str(root), size=4)
  same(made[1:3], again[1:3])
  assert (
    made.problems[0].startswith('1 unreadable when decoded')
    and 'cat/050.png: cannot be' in made.problems[1]
  )
  changed = [(split, i) for split in ('train', 'test') for i in np.flatnonzero(
      (getattr(made, split).images != getattr(whole, split).images).any((1, 2, 3)))]
  (split, i), = changed
  new, old = getattr(made, split), getattr(whole, split)
  others = (old.images[:, 0, 0] == new.images[i, 0, 0]).all(1)
  assert (
    others.sum() == 1 and not others[i] and new.labels[i] == old.labels[others.argmax()]
  )  # its label came along
  assert len(new.images) == len(old.images)
  for name in ('050', '051', '052'):
    write(broken.with_stem(name), broken.read_bytes()[:45])
  with pytest.raises(UserError, match='3 of 200 images cannot be decoded') as e:
    folder.make(str(root), size=4)
  assert e.value.code == BAD_DATA
  report = check(str(root))
  assert not report.ok and '3 cannot be decoded:' in report.lines


def test_the_replacement_depends_on_the_record_alone():
  assert source.substitutes([3], 100)[3] == source.substitutes([3, 98], 100)[3]
  assert (
    set(source.substitutes(range(99), 100).values()) == {99} and source.substitutes([0], 1) == {}
  )


def test_a_folder_that_is_none(tmp_path):
  for path, words in (
    ('', 'path'),
    (str(tmp_path / 'no'), 'not a folder'),
    (str(tmp_path), 'no images'),
  ):
    with pytest.raises(UserError, match=words) as e:
      folder.make(path)
    assert e.value.code == USAGE
  write(tmp_path / 'a.csv', b'')
  write(tmp_path / 'b.csv', b'')
  write(tmp_path / 'c.jpg', b'')
  with pytest.raises(
    UserError, match=r'2 \.csv, 1 unreadable images \(the first: c.jpg: empty file\)'
  ):
    folder.make(str(tmp_path))
  with pytest.raises(UserError, match='cannot be decoded'):   # a single image, and it is broken
    write(tmp_path / 'd' / 'd.png', encoded(photo(0))[:500])
    folder.make(str(tmp_path / 'd'), test=0.)


def test_reading_stops_at_the_folder(tmp_path):
  inside, outside = write(tmp_path / 'a' / 'x.png', b'.'), write(tmp_path / 'x.png', b'.')
  assert read_file(str(inside), str(inside.parent)) == b'.'
  for path in (str(inside.parent / '..' / 'x.png'), str(outside)):
    with pytest.raises(BadImage, match='leads out'):
      read_file(path, str(inside.parent))


def test_check_of_what_is_not_there_says_so(tmp_path, monkeypatch):
  image, root = write(tmp_path / 'x.png', encoded(photo(0))), str(tmp_path / 'root')
  monkeypatch.chdir(tmp_path)
  for what, words in (
    (str(tmp_path / 'no'), 'no. is not there'),
    ('./no', "'./no' is not there"),
    (str(image), 'a file, not a folder'),
    ('x.png', 'a file, not a folder'),
    ('mine', "'mine' is no folder here.*\n.*--root DIR.*eqssl data prepare mine --src FOLDER --root {root}$"),
    ('mnist', "Prepare it once: in Python.*, data_dir='{root}'\\)"),
    ('cifar10', 'Prepare it once: eqssl data prepare cifar10 .* --root {root};'),
  ):
    with pytest.raises(UserError, match=words.format(root=root)):
      check(what, root)
  assert prepare_command('cifar100') == 'eqssl data prepare cifar100 --src ARCHIVE'
  assert prepare_command('mnist').endswith("file_format='array_record').download_and_prepare()")
  assert prepare_command('mine', 'a b') == "eqssl data prepare mine --src FOLDER --root 'a b'"
  with pytest.raises(
    UserError, match='a folder, but it holds no prepared data set.\n.*data.name=folder'
  ):
    tfds.make(str(tmp_path))


def test_many_broken_images_name_the_folder_to_check(tmp_path):
  root = album(tmp_path / 'my album', each=4)
  for name in ('a.png', 'b.png'):
    write(root / 'cat' / name, encoded(photo(0))[:100])
  with pytest.raises(
    UserError, match=f"Run `eqssl data check '{root}'` to list the broken images"
  ) as e:
    folder.make(str(root), size=4, test=0.)
  assert '..' not in str(e.value)


def test_check_sees_copies_and_odd_shapes(tmp_path):
  for split, count in (('train', 5), ('val', 2)):
    for i in range(count):
      write(tmp_path / split / f'{i}.png', encoded(photo(i if split == 'train' else i + 4)))
  write(tmp_path / 'train' / 'thin.png', encoded(photo(9, 8, 90)))
  report = check(str(tmp_path))
  text = '\n'.join(report.lines)
  assert (
    report.ok
    and '6 train, 2 validation' in text
    and 'thin.png: 8x90' in text
    and '4.png = 0.png' in text
  )
  assert '1 of these are in train and in validation' in text and report.lines[-1] == 'ok'
  assert check('digits').ok


# ---- CIFAR-10: prepare, and read by plain TFDS

def batches(seed=0, count=BATCH):
  """The six files of the archive, with `count` records each, every label once or more."""
  rng = np.random.default_rng(seed)
  files = {}
  for name in (name for names in prepare.BATCHES.values() for name in names):
    records = rng.integers(0, 256, (count, prepare.RECORD), np.uint8)
    records[:, 0] %= 10
    files[name] = records
  return files


def archive(path, files, mode='w:gz', folder=prepare.FOLDER):
  with tarfile.open(path, mode) as tar:
    for name, content in files.items():
      content = content if isinstance(content, bytes) else content.tobytes()
      info = tarfile.TarInfo(folder + name)
      info.size = len(content)
      tar.addfile(info, io.BytesIO(content))
  return str(path)


@pytest.fixture(scope='module')
def tiny(tmp_path_factory):
  """(root, files): a prepared CIFAR-10 of 24 records, and what was in its archive."""
  root, files = tmp_path_factory.mktemp('tfds'), batches()
  path = archive(root / 'a.tar.gz', {'batches.meta.txt': b'x', **files})
  prepare.prepare(path, root, BATCH, lambda line: None)
  return root, files


def compare_with_archive(root, files):
  """Plain TFDS gives every record of the archive: its image, label, id."""
  import tensorflow_datasets
  for split, names in prepare.BATCHES.items():
    records = np.concatenate([files[name] for name in names])
    rows = tensorflow_datasets.data_source('cifar10', data_dir=root, split=split, download=False)
    assert len(rows) == len(records) and rows.dataset_info.features['label'].names == list(
      prepare.NAMES
    )
    assert rows.dataset_info.full_name == 'cifar10/3.0.2'
    seen = set()
    for row in rows:
      kind, _, index = row['id'].decode().partition('_')
      record = records[int(index)]
      seen.add(int(index))
      assert kind == split and row['label'] == record[0]
      np.testing.assert_array_equal(row['image'], record[1:].reshape(3, 32, 32).transpose(1, 2, 0))
    assert seen == set(range(len(records)))


def test_plain_tfds_reads_what_was_prepared(tiny):
  compare_with_archive(*tiny)
  info = json.loads((tiny[0] / 'cifar10' / '3.0.2' / 'dataset_info.json').read_text())
  assert [s['shardLengths'] for s in info['splits']] == [['20'], ['4']] and info[
    'fileFormat'
  ] == 'array_record'
  assert info['downloadSize'] == str(prepare.SIZE)


def test_cifar10_gives_the_records_of_the_archive(tiny):
  root, files = tiny
  made = cifar10.make(str(root))
  assert (
    made.classes == prepare.NAMES and made.mean == (0.4914, 0.4822, 0.4465) and made.problems == ()
  )
  for split, names in (('train', prepare.BATCHES['train']), ('test', prepare.BATCHES['test'])):
    records, got = np.concatenate([files[n] for n in names]), getattr(made, split)
    planes = got.images.transpose(0, 3, 1, 2).reshape(len(records), -1)
    back = np.concatenate([got.labels.astype(np.uint8)[:, None], planes], axis=1)
    np.testing.assert_array_equal(back[np.lexsort(back.T)], records[np.lexsort(records.T)])
    assert (got.sizes == 32).all() and got.images.dtype == np.uint8 and got.labels.dtype == np.int32
  measured = registry.make(data, 'tfds', root=str(root), train='train[:50%]', test='', size=8)
  assert measured.train.images.shape == (10, 8, 8, 3) and measured.test is None
  np.testing.assert_allclose(
    measured.mean, (measured.train.images / 255.0).mean((0, 1, 2)), rtol=1e-9
  )


def test_the_cache_is_keyed_by_content_and_survives_damage(tiny, monkeypatch):
  first = cifar10.make(str(tiny[0]))
  kept, = cache.cache_folder().iterdir()
  with monkeypatch.context() as patch:
    patch.setattr(tfds, 'decode_splits', None)   # decoding now would fail
    same(cifar10.make(str(tiny[0])), first)
  for damage in (
    lambda b: b[:-700],
    lambda b: b[:3000] + bytes([b[3000] ^ 1]) + b[3001:],
    lambda b: b'',
  ):
    kept.write_bytes(damage(kept.read_bytes()))
    same(cifar10.make(str(tiny[0])), first)
    assert list(cache.cache_folder().iterdir()) == [kept]
  tfds.make('cifar10', str(tiny[0]), test='')
  assert len(list(cache.cache_folder().iterdir())) == 2
  monkeypatch.setenv('XDG_CACHE_HOME', '/dev/null')   # nowhere to write: done without
  same(cifar10.make(str(tiny[0])), first)


def test_two_processes_at_once_and_no_tensorflow(tiny, tmp_path):
  decoy = write(
    tmp_path / 'decoy' / 'tensorflow' / '__init__.py', b''
  )  # an import would succeed and be seen
  script = (
    'import sys, hashlib; from equivariant_ssl.data import cifar10, check, prepare; '
    "made = cifar10.make(sys.argv[1]); check.check('cifar10', sys.argv[1]); "
    "prepare.prepare(sys.argv[1] + '/a.tar.gz', prepare.default_root(sys.argv[2]), 4, print); "
    "print(hashlib.sha256(made.train.images.tobytes()).hexdigest(), 'tensorflow' in sys.modules)"
  )
  env = {**os.environ, 'PYTHONPATH': str(decoy.parent.parent)}
  both = [
    subprocess.Popen(
      [sys.executable, '-c', script, str(tiny[0]), str(tmp_path / 'new')],
      env=env,
      text=True,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
    )
    for _ in range(2)
  ]
  said = [p.communicate(timeout=120) for p in both]
  digest = hashlib.sha256(cifar10.make(str(tiny[0])).train.images.tobytes()).hexdigest()
  assert [out.splitlines()[-1] for out, _ in said] == [f'{digest} False'] * 2, said
  prepare.verify(tmp_path / 'new' / 'cifar10' / '3.0.2', BATCH)
  assert os.listdir(tmp_path / 'new') == ['cifar10'] and os.listdir(
    tmp_path / 'new' / 'cifar10'
  ) == ['3.0.2']


def test_a_prepared_data_set_is_kept_if_it_is_whole(tiny, tmp_path):
  said = []
  assert (
    prepare.prepare('no such archive', tiny[0], BATCH, said.append) == tiny[0] / 'cifar10' / '3.0.2'
  )
  assert 'stays as it is' in said[0]
  copy = tmp_path / 'cifar10' / '3.0.2'
  for damage in ('truncate', 'remove', 'metadata', 'count'):
    subprocess.run(['rm', '-rf', str(copy.parent)], check=True)
    subprocess.run(['cp', '-r', str(tiny[0] / 'cifar10'), str(tmp_path)], check=True)
    shard, = copy.glob('cifar10-train*')
    if damage == 'truncate':
      os.truncate(shard, shard.stat().st_size // 2)
    elif damage == 'remove':
      shard.unlink()
    elif damage == 'metadata':
      (copy / 'dataset_info.json').write_text('{')
    with pytest.raises(UserError, match='not a'):
      prepare.prepare('no such archive', tmp_path, BATCH + (damage == 'count'), said.append)
    assert copy.is_dir()   # not ours to delete


def test_nothing_half_written_is_taken_for_a_data_set(tmp_path, monkeypatch):
  path = archive(tmp_path / 'a.tar.gz', batches())
  for stage in ('examples', 'verify', 'publish'):
    def killed(*a):
      raise KeyboardInterrupt
    with monkeypatch.context() as patch:
      patch.setattr(prepare, stage, killed)
      with pytest.raises(KeyboardInterrupt):
        prepare.prepare(path, tmp_path / 'root', BATCH, str)
    assert not list((tmp_path / 'root').rglob('dataset_info.json'))
    with pytest.raises(UserError, match='eqssl data prepare cifar10'):
      cifar10.make(str(tmp_path / 'root'))
  (tmp_path / 'file').write_bytes(b'')
  with pytest.raises(UserError, match='cannot be written'):
    prepare.prepare(path, tmp_path / 'file' / 'root', BATCH, str)


def bad_archives():
  whole = batches()
  last = 'test_batch.bin'
  label = whole[last].copy()
  label[2, 0] = 10
  return {
      'it lacks': {n: whole[n] for n in whole if n != last},
      'bytes instead of': {**whole, last: whole[last][:-1]},
      'label 10, but': {**whole, last: label},
      'unpacks to more than': {'zeros': bytes(2 * 10**6), **whole},
  }


@pytest.mark.parametrize('words', bad_archives())
def test_a_wrong_archive_is_refused(tmp_path, monkeypatch, words):
  monkeypatch.setitem(archives.UNPACKED, 'cifar10', 10**6)
  path = archive(tmp_path / 'a.tar.gz', bad_archives()[words])
  with pytest.raises(UserError, match=words):
    prepare.prepare(path, tmp_path / 'root', BATCH, str)
  assert os.listdir(tmp_path / 'root') == []


def test_the_archive_is_found_in_a_folder(tmp_path):
  archive(tmp_path / 'cifar-10-binary.tar.gz', batches())
  assert prepare.prepare(str(tmp_path), tmp_path / 'root', BATCH, str).is_dir()
  with pytest.raises(UserError, match='cifar-10-binary.tar.gz. does not exist'):
    prepare.prepare(str(tmp_path / 'root'), tmp_path / 'other', BATCH, str)


def test_a_torn_archive_is_refused_and_a_plain_tar_taken(tmp_path):
  whole = pathlib.Path(archive(tmp_path / 'a.tar.gz', batches())).read_bytes()
  flipped = bytearray(whole)
  flipped[len(whole) // 2] ^= 1
  link = io.BytesIO()
  with tarfile.open(fileobj=link, mode='w') as tar:
    info = tarfile.TarInfo(prepare.FOLDER + 'test_batch.bin')
    info.type, info.linkname = tarfile.SYMTYPE, '/etc/passwd'
    tar.addfile(info)
  for content in (
    whole[:5000],
    bytes(flipped),
    b'',
    b'<html>',
    gzip.compress(b'hello' * 999),
    link.getvalue(),
  ):
    torn = write(tmp_path / 'torn', content)
    with pytest.raises(UserError, match='not the binary archive') as e:
      prepare.read_archive(str(torn), BATCH)
    assert 'https://' in str(e.value) and e.value.code == USAGE
  with pytest.raises(UserError, match='No such file'):
    prepare.read_archive(str(tmp_path / 'none'), BATCH)
  found = prepare.read_archive(
    archive(tmp_path / 'plain.tar', batches(), 'w', './' + prepare.FOLDER), BATCH
  )
  np.testing.assert_array_equal(found['test'][0], batches()['test_batch.bin'])


def test_a_download_is_verified(tmp_path, monkeypatch):
  path = archive(tmp_path / 'a.tar.gz', batches())
  content = pathlib.Path(path).read_bytes()
  url, digest, to = f'file://{path}', hashlib.sha256(content).hexdigest(), str(tmp_path / 'got')
  prepare.download(to, url, len(content), digest)
  assert pathlib.Path(to).read_bytes() == content
  for size, checksum, words in (
    (len(content), '0' * 64, 'wrong SHA-256'),
    (len(content) + 1, digest, 'instead of'),
    (len(content) - 1, digest, 'more than'),
  ):
    with pytest.raises(UserError, match=words) as e:
      prepare.download(to, url, size, checksum)
    assert '--archive FILE' in str(e.value)
  with pytest.raises(UserError, match='failed after 0 bytes'):
    prepare.download(to, 'file:///no/such/file', 1, digest)

  class Broken(io.BytesIO):
    def read(self, n=-1):
      if self.tell():
        raise ConnectionResetError('reset by peer')
      return super().read(100)

  with pytest.raises(UserError, match='failed after 100 bytes: reset'):
    prepare.download(to, url, len(content), digest, lambda url, timeout: Broken(content))
  # The whole command, from a server that has cut the file short: nothing is left.
  with monkeypatch.context() as patch:
    patch.setattr(prepare.download, '__defaults__', (url, *prepare.download.__defaults__[1:]))
    with pytest.raises(UserError, match=f'gave {len(content):,} bytes instead of 170,052,171'):
      prepare.cifar10(None, str(tmp_path / 'root'), str)
  assert os.listdir(tmp_path / 'root') == []


# ---- other TFDS data, hostile and broken ones

def small_tfds(root, shape, label=True, first=0, count=6):
  """A prepared TFDS data set `small` of its own builder, with `count` gray or color PNGs."""
  import tensorflow_datasets
  from tensorflow_datasets.core.registered import skip_registration
  features = tensorflow_datasets.features
  with skip_registration():
    class Small(tensorflow_datasets.core.GeneratorBasedBuilder):
      VERSION = tensorflow_datasets.core.Version('1.0.0')

      def _info(self):
        kinds = {
          'picture': features.Image(shape=shape),
          **(
            {'kind': features.Scalar(np.int64)}
            if not label
            else {'label': features.ClassLabel(names=['a', 'b'])}
          ),
        }
        return tensorflow_datasets.core.DatasetInfo(
            builder=self, features=features.FeaturesDict(kinds), disable_shuffling=True)

      def _split_generators(self, manager):
        return {'train': self._generate_examples()}

      def _generate_examples(self):
        for i in range(count):
          mode = Image.new(
            'L' if shape[-1] == 1 else 'RGB', (shape[1] or 5 + i, shape[0] or 5), i * 20
          )
          yield (
            i,
            {'picture': encoded(mode), 'label' if label else 'kind': (first if i == 0 else i % 2)},
          )

  Small(data_dir=root, file_format='array_record').download_and_prepare(
      download_config=tensorflow_datasets.download.DownloadConfig(try_download_gcs=False))
  return root / 'small' / '1.0.0'


def test_other_tfds_data(tmp_path):
  path = small_tfds(tmp_path / 'gray', (6, 6, 1), first=-1)
  made = tfds.make('small', str(tmp_path / 'gray'), test='')
  assert (
    made.train.images.shape == (6, 6, 6, 3) and made.train.labels is None and made.name == 'small'
  )
  assert (made.train.images == (np.arange(6) * 20)[:, None, None, None]).all() and made.test is None
  same(tfds.make(str(path), test='').train, made.train)   # a directory is named as well as a name
  report = check(str(path))
  assert report.ok and 'train classes: a 2, b 3, none 1' in report.lines
  for kw, words in (({}, "no split 'test'.*\n.*It has: train"),
                    ({'dataset': 'small:2.0.0'}, 'there are versions 1.0.0'),
                    ({'dataset': 'mnist'}, "mnist', file_format='array_record'")):
    with pytest.raises(UserError, match=words):
      tfds.make(**{'dataset': 'small', 'root': str(tmp_path / 'gray'), **kw})
  with pytest.raises(UserError, match='config.data.test=train.80%:'):
    tfds.make('small', str(tmp_path / 'gray'))
  small_tfds(tmp_path / 'wide', (None, None, 3), label=False)
  with pytest.raises(UserError, match='data.size=64'):
    tfds.make('small', str(tmp_path / 'wide'), test='')
  wide = tfds.make('small', str(tmp_path / 'wide'), test='', size=4)
  assert wide.train.sizes.tolist() == [[5, 5 + i] for i in range(6)] and wide.classes is None
  assert wide.train.labels is None


def test_a_damaged_record_is_replaced(tmp_path):
  path = small_tfds(tmp_path, (9, 9, 3))
  whole, (shard,) = tfds.make('small', str(tmp_path), test=''), path.glob('*array_record*')
  content, wrong = shard.read_bytes(), 0
  used = [i for i in range(len(content)) if content[i]]
  for at in np.random.default_rng(0).choice(used, 12, replace=False):
    shard.write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1:])
    try:
      made = tfds.make('small', str(tmp_path), test='')
    except UserError:
      wrong += 1
      continue
    differs = (made.train.images != whole.train.images).any((1, 2, 3))
    assert differs.sum() <= 1 and differs.any() == (
      made.problems != whole.problems
    )  # never another image in silence
    wrong += differs.any()
  assert wrong > 0


def hostile(form):
  image = {
    'pythonClassName': 'tensorflow_datasets.core.features.image_feature.Image',
    'image': {'dtype': 'uint8'},
  }
  top = 'tensorflow_datasets.core.features.features_dict.FeaturesDict'
  evil = 'evil_module.Feature'
  return {
    'current': {
      'pythonClassName': top,
      'featuresDict': {'features': {'x': {**image, 'pythonClassName': evil}}},
    },
    'snake': {
      'python_class_name': top,
      'features_dict': {'features': {'x': {**image, 'python_class_name': evil}}},
    },
    'legacy': {'type': top, 'content': {'x': {'type': evil, 'content': {}}}},
    'string': {
      'type': top,
      'content': json.dumps({'features': {'x': {'pythonClassName': evil}}}),
      'proto_cls': 'tensorflow_datasets.FeaturesDict',
    },
    'json': {
      'pythonClassName': top,
      'jsonFeature': {'json': json.dumps({'x': {'type': evil, 'content': {}}})},
    },
  }[form]


@pytest.mark.parametrize('form', ['current', 'snake', 'legacy', 'string', 'json'])
def test_features_that_would_import_code_are_refused(tiny, tmp_path, monkeypatch, form):
  subprocess.run(['cp', '-r', str(tiny[0] / 'cifar10'), str(tmp_path)], check=True)
  features = tmp_path / 'cifar10' / '3.0.2' / 'features.json'
  features.write_text(json.dumps(hostile(form)))
  write(tmp_path / 'evil_module.py', b'')
  monkeypatch.syspath_prepend(str(tmp_path))
  with pytest.raises(UserError, match='evil_module.Feature'):
    cifar10.make(str(tmp_path))
  assert 'evil_module' not in sys.modules
  features.write_text('[' * 100_000)
  with pytest.raises(UserError, match='features.json'):
    cifar10.make(str(tmp_path))


# ---- the real thing

@pytest.mark.slow
def test_the_real_archive(tmp_path):
  """All of CIFAR-10 through the function of the command.

  It needs the real data (EQSSL_REAL_DATA or ../shared/data).
  """
  place = pathlib.Path(
    os.environ.get('EQSSL_REAL_DATA') or pathlib.Path(__file__).parents[3] / 'shared' / 'data'
  )
  if not (place / 'unpack.py').is_file():
    pytest.skip(f'no real data in {place}')
  subprocess.run(
    [sys.executable, str(place / 'unpack.py'), str(tmp_path / 'real')],
    check=True,
    capture_output=True,
  )
  tar = tmp_path / 'real' / 'cifar-10-binary.tar.gz'
  prepare.cifar10(str(tar), str(tmp_path / 'tfds'), str)
  with np.load(tmp_path / 'real' / 'cifar10.npz') as real:
    made = cifar10.make(str(tmp_path / 'tfds'))
    for split in ('train', 'test'):
      images, labels = real[f'{split}_images'], real[f'{split}_labels']
      got = getattr(made, split)
      def digests(images, labels):
        return sorted(
          (hashlib.sha256(x.tobytes()).digest(), int(y))
          for x, y in zip(images, labels, strict=True)
        )
      assert digests(got.images, got.labels) == digests(images, labels)
  np.testing.assert_allclose(
    channel_moments.moments(made.train.images), (made.mean, made.std), atol=6e-4
  )
  files = {name: part for split, parts in prepare.read_archive(str(tar), prepare.BATCH).items()
           for name, part in zip(prepare.BATCHES[split], parts, strict=True)}
  compare_with_archive(tmp_path / 'tfds', files)
  assert check('cifar10', str(tmp_path / 'tfds')).ok

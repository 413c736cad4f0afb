"""Transfer: the right squares, splits and metrics, a cache that knows what it keeps, and what is missing said."""
import io
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from PIL import Image as Pillow

from equivariant_ssl import errors
from equivariant_ssl.data import digits, tfds
from equivariant_ssl.data.source import Records
from equivariant_ssl.evaluate import inputs, target_data, targets, transfer
from equivariant_ssl.evaluate.logistic import logistic, mean_per_class
from equivariant_ssl.parallel import sharding
from equivariant_ssl.types import Image

SIZE = 8


def color(weight, images):
  return images.mean((1, 2)) @ weight


def square(images, sizes, size):
  shows = inputs.Inputs(size, images.shape[1], size)
  return jax.vmap(lambda pixels, true: inputs.input_pixels(shows, Image(pixels, true)))(images, sizes)


SQUARE = jax.jit(square, static_argnums=2)
ENCODE = Partial(color, 3. * jnp.eye(3))


def album(root, counts, kind='train', seed=0):
  """root/kind/CLASS/i.png: images of one noisy color, `counts` {class: how many}; 12 x 8 and 8 x 12 in turn."""
  random = np.random.RandomState(seed)
  for c, (name, count) in enumerate(counts.items()):
    (root / kind / name).mkdir(parents=True, exist_ok=True)
    for i in range(count):
      pixels = np.full((12, 8, 3) if i % 2 else (8, 12, 3), 80, np.uint8) + random.randint(0, 60, 3).astype(np.uint8)
      pixels[..., c] += np.uint8(60)
      Pillow.fromarray(pixels).save(root / kind / name / f'{i:02d}.png')
  return root


@pytest.fixture(scope='module')
def albums(tmp_path_factory):
  """Two folders of images: two classes of 20, and three classes of which one is rare, with images to choose on."""
  root = tmp_path_factory.mktemp('albums')
  album(album(root / 'pairs', {'r': 20, 'g': 20}), {'r': 9, 'g': 9}, 'test', 1)
  for kind, n in (('train', 10), ('val', 5), ('test', 12)):
    album(root / 'rare', {'r': n, 'g': n, 'b': max(n // 4, 1)}, kind, n)
  return root


@pytest.fixture(autouse=True)
def no_data(tmp_path, monkeypatch):
  monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path / 'tfds'))


@pytest.fixture
def calls(monkeypatch):
  """The number of images given to the encoder, in each call of `central_features`."""
  seen, real = [], transfer.central_features
  monkeypatch.setattr(transfer, 'central_features', lambda encode, split, *a, **kw: (
      seen.append(len(split.images)), real(encode, split, *a, **kw))[1])
  return seen


def one(encode, name, **kw):
  return transfer.transfer(encode, (str(name),), SIZE, **kw)


def test_the_square_is_pillows_resize_and_center_crop():
  random = np.random.RandomState(0)
  small = random.randint(0, 256, (6, 9, 3)).astype(np.uint8)
  smooth = Pillow.fromarray(small).resize((90, 60), Pillow.Resampling.BICUBIC)
  for true in (smooth, smooth.transpose(Pillow.Transpose.TRANSPOSE)):
    w, h = true.size
    scale = 16 / min(w, h)
    big = true.resize((round(w * scale), round(h * scale)), Pillow.Resampling.BICUBIC)
    left, top = (big.width - 16) // 2, (big.height - 16) // 2
    want = np.asarray(big.crop((left, top, left + 16, top + 16)), np.float32)
    canvas = np.asarray(true.resize((48, 48), Pillow.Resampling.BICUBIC), np.float32)
    found = SQUARE(jnp.asarray(canvas[None] / 255), jnp.array([[h, w]], jnp.float32), 16)[0] * 255
    squashed = np.asarray(true.resize((16, 16), Pillow.Resampling.BICUBIC), np.float32)
    assert np.abs(found - want)[1:-1, 1:-1].mean() < 2. < 8. < np.abs(squashed - want).mean()
  whole = jnp.asarray(random.rand(1, 48, 48, 3), jnp.float32)
  np.testing.assert_allclose(SQUARE(whole, jnp.full((1, 2), 48.), 48), whole, atol=1e-6)


def test_two_folders_the_digits_and_what_is_missing(albums, tmp_path):
  names = (str(albums / 'pairs'), 'digits', 'pets', 'mit67', 'cars', 'cifar100', 'plant_village')
  rows, missing = transfer.transfer(ENCODE, names, 16, root=str(tmp_path))
  assert [r.name for r in rows] == list(names[:2])
  pairs, scans = rows
  assert pairs.metric == 'top1' and pairs.value == pairs.top1 >= .8
  assert pairs.protocol == 'logistic, center 16' and pairs.note == '36 + 4 / 18'
  source = digits.make()
  carved = sum(n // 10 for n in np.bincount(source.train.labels))
  assert scans.note == f'{1000 - carved} + {carved} / 797'
  x, xt = (np.asarray(s.images, np.float64).mean((1, 2)) / 255 * 3 for s in (source.train, source.test))
  want = logistic(x.astype(np.float32), source.train.labels, xt.astype(np.float32), source.test.labels, 10)
  assert scans.top1 == pytest.approx(want.top1, abs=.01)
  assert [m.name for m in missing] == list(names[2:])
  assert missing[0].command.startswith(f'tfds build oxford_iiit_pet --file_format=array_record --data_dir={tmp_path} ')
  assert 'indoorCVPR_09.tar' in missing[1].command and f'{tmp_path}/cars/train' in missing[2].command
  assert missing[3].command.startswith(f'eqssl data prepare cifar100 --src ARCHIVE --root {tmp_path} ')
  assert 'tfds build plant_village ' in missing[4].command
  assert [r.metric for r in rows] == ['top1', 'top1']
  assert all('\n' not in m.command for m in missing)


def test_unknown_targets_are_a_line_before_anything_is_read(tmp_path):
  transfer.check_targets(('digits', 'pets', 'plant_village', 'sun397/standard-part1-120k', str(tmp_path)))
  for name, words in (('cifar1O', "'cifar1O' is no folder here.*\n.*mean 'cifar10'.*sun397"), ('folder', 'no folder here'),
                      ('./no', 'not there')):
    for f in (lambda: transfer.check_targets(('digits', name)), lambda: transfer.transfer(None, ('digits', name), SIZE)):
      with pytest.raises(errors.UserError, match=words):
        f()


def test_the_table_has_the_published_metrics():
  of = {name: t.metric for name, t in transfer.DATASETS.items()}
  assert len(of) == 12
  assert {n for n, m in of.items() if m == 'per_class'} == {'pets', 'flowers', 'caltech101', 'aircraft'}
  for name, count in (('pets', 740 / 3680), ('mit67', 670 / 5360), ('sun397', 3970 / 19850), ('cars', 1650 / 8144),
                      ('food101', 7575 / 75750), ('cifar10', .1)):
    assert transfer.DATASETS[name].held == pytest.approx(count, abs=2e-3)
  rows, missing = transfer.transfer(ENCODE, (), SIZE)
  assert not rows and [m.name for m in missing] == list(transfer.DATASETS)


def test_a_mean_per_class_is_chosen_and_reported(albums, monkeypatch):
  target = targets.Target('', valid='val', metric='per_class')
  monkeypatch.setitem(transfer.DATASETS, 'rare', target)
  seen, real = {}, transfer.logistic
  monkeypatch.setattr(transfer, 'logistic', lambda *a, **kw: seen.setdefault('found', real(*a, **kw)))
  rows, _ = transfer.transfer(Partial(color, jnp.full((3, 3), .5)), ('rare',), SIZE, root=str(albums))
  labels = np.repeat([0, 1, 2], [3, 12, 12])  # b, g, r
  assert rows[0].metric == 'per_class' and rows[0].note == '22 + 11 / 27'  # val/ is given, not carved
  assert rows[0].value == mean_per_class(seen['found'].predictions, labels) != rows[0].top1
  assert rows[0].top1 == np.mean(seen['found'].predictions == labels)


def test_features_are_kept_and_only_for_the_same_network_and_images(albums, tmp_path, calls):
  root = album(album(tmp_path / 'own', {'r': 10, 'g': 10}), {'r': 3, 'g': 3}, 'test')
  kw = {'cache': str(tmp_path / 'cache')}
  first = one(ENCODE, root, **kw)
  files = sorted((tmp_path / 'cache').iterdir())
  assert calls == [20, 6] and len(files) == 2
  again = [np.load(f)['features'] for f in files]
  assert one(ENCODE, root, **kw) == first and calls == [20, 6]  # kept
  assert one(ENCODE, root, mesh=sharding.mesh(jax.devices()[:2]), **kw) == first and calls == [20, 6]
  one(Partial(color, 3.1 * jnp.eye(3)), root, **kw)  # other weights
  assert calls == [20, 6] * 2
  one(lambda images: images.mean((1, 2)) @ (2 * jnp.eye(3)), root, **kw)  # a closure: other constants
  one(lambda images: images.mean((1, 2)) @ (4 * jnp.eye(3)), root, **kw)
  assert calls == [20, 6] * 4
  transfer.transfer(ENCODE, (str(root),), SIZE + 1, **kw)  # another size
  assert calls == [20, 6] * 5
  files[1].write_bytes(files[1].read_bytes()[:-40])  # truncated
  files[0].write_bytes(b'')
  assert one(ENCODE, root, **kw) == first and calls == [20, 6] * 6
  for file, features in zip(files, again, strict=True):
    np.testing.assert_array_equal(np.load(file)['features'], features)  # bitwise
  album(root, {'r': 1}, 'test', 5)  # one image of the test split changes
  one(ENCODE, root, **kw)
  assert calls == [20, 6] * 6 + [6]
  assert not [f for f in (tmp_path / 'cache').iterdir() if f.suffix != '.npz']


def test_what_cannot_be_classified_is_said_in_a_line(albums, tmp_path):
  nan = Partial(color, jnp.full((3, 3), jnp.nan))
  single = album(album(tmp_path / 'single', {'r': 20}), {'r': 2}, 'test')
  loose = album(album(tmp_path / 'loose', {'r': 10, 'g': 10}), {'r': 2}, 'test')
  (loose / 'train' / 'r' / '00.png').rename(loose / 'train' / 'x.png')
  cache = tmp_path / 'cache'
  for encode, name, match, code in ((nan, albums / 'pairs', 'of 40 of 40 images are not finite', errors.NOT_FINITE),
                                    (ENCODE, single, 'of one class', errors.USAGE),
                                    (ENCODE, loose, 'no class folder', errors.USAGE)):
    with pytest.raises(errors.UserError, match=match) as e:
      one(encode, name, cache=str(cache))
    assert str(e.value).startswith(f'{name}: ') and str(e.value).count('\n') == 1 and e.value.code == code
  assert not list(cache.glob('pairs*'))  # no feature that is not finite is kept


def test_records_are_decoded_in_pieces_and_few_may_be_broken(monkeypatch):
  monkeypatch.setattr(target_data, 'CHUNK', 30)

  def png(i):
    file = io.BytesIO()
    Pillow.fromarray(np.full((4, 6, 3), i, np.uint8)).save(file, 'PNG')
    return file.getvalue()

  def pieces(bad):
    records = Records(lambda i: f'record {i}', lambda rows: [b'no' if i in bad else png(i) for i in rows],
                      np.arange(70, dtype=np.int32), 70)
    return list(target_data._decoded(records, SIZE, pathlib.Path('my photographs')))
  found = pieces({31})
  assert [len(s.images) for s in found] == [30, 30, 10]
  images, labels = (np.concatenate([getattr(s, k) for s in found]) for k in ('images', 'labels'))
  np.testing.assert_array_equal(images[:, 0, 0, 0], labels)  # the broken one has the image and label of another
  assert labels[31] != 31 and np.sum(labels != np.arange(70)) == 1
  with pytest.raises(errors.UserError, match="record 3[12]: .*\n.*check 'my photographs'` to") as e:
    pieces({31, 32})
  assert e.value.code == errors.BAD_DATA


def test_a_prepared_tfds_data_set_is_read(tmp_path, monkeypatch):
  """Its builder stands in: two splits of `Records`; what is asked of it are the target's splits."""
  asked, source = [], digits.make()

  class Label(tuple):
    names = tuple('0123456789')
  builder = type('B', (), {'info': type('I', (), {'splits': ('train', 'validation'), 'features': {'label': Label()}})})
  monkeypatch.setattr(tfds, 'find_version', lambda dataset, *a: tmp_path)
  monkeypatch.setattr(tfds, 'open_directory', lambda path: builder)
  monkeypatch.setattr(tfds, 'image_and_label', lambda dataset, info: ('image', 'label'))

  def records(builder, split, image, label):
    asked.append(split)
    part = source.train if split == 'train' else source.test
    def read(rows):
      for i in rows:
        file = io.BytesIO()
        Pillow.fromarray(part.images[i]).save(file, 'PNG')
        yield file.getvalue()
    return Records(str, read, part.labels[:200], 200)
  monkeypatch.setattr(tfds, 'split_records', records)
  rows, missing = one(ENCODE, 'food101')
  assert asked == ['train', 'validation'] and not missing
  assert rows[0].note.endswith(' / 200; published 68,175 + 7,575 / 25,250')

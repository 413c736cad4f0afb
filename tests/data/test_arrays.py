"""Arrays as data: what a program gives, what a .npz file holds, and what is wrong with either."""
import zipfile

import numpy as np
import pytest

from equivariant_ssl.data import arrays, digits, folder
from equivariant_ssl.data.source import Source, Split
from equivariant_ssl.errors import UserError

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (30, 8, 8, 3), np.uint8)
LABELS = np.arange(30) % 3


class Sequence:
  """A random-access source of examples, as grain's and TFDS's are."""

  def __init__(self, examples):
    self.examples = examples

  def __len__(self):
    return len(self.examples)

  def __getitem__(self, i):
    return self.examples[i]


@pytest.mark.parametrize('data', [
    (IMAGES, LABELS), {'train': (IMAGES, LABELS)}, (IMAGES / 255., LABELS), (list(IMAGES), LABELS.tolist()),
    Sequence([{'image': i, 'label': y} for i, y in zip(IMAGES, LABELS, strict=True)]),
    Sequence(list(zip(IMAGES, LABELS, strict=True))), (IMAGES, np.array(['a', 'b', 'c'])[LABELS]),
], ids=['arrays', 'splits', 'floats', 'list', 'dicts', 'tuples', 'names'])
def test_forms_of_the_same_images(data):
  source = arrays.to_source(data, 8)
  assert np.array_equal(source.train.images, IMAGES) and source.train.images.dtype == np.uint8
  assert np.array_equal(source.train.labels, LABELS) and source.train.labels.dtype == np.int32
  assert (source.train.sizes == 8).all() and source.test is None
  assert source.classes in (('0', '1', '2'), ('a', 'b', 'c'))


def test_grain_is_a_sequence():
  grain = pytest.importorskip('grain')
  data = grain.MapDataset.range(30).map(lambda i: {'image': IMAGES[i], 'label': LABELS[i]})
  assert np.array_equal(arrays.to_source(data, 8).train.images, IMAGES)


def test_without_labels_and_with_a_test_split():
  source = arrays.to_source({'train': IMAGES[:20], 'test': (IMAGES[20:], LABELS[20:])}, 8)
  assert source.train.labels is None and np.array_equal(source.test.labels, LABELS[20:])
  assert arrays.to_source(Sequence(list(IMAGES)), 8).train.labels is None


def test_images_that_are_not_square_become_canvases_with_their_true_sizes():
  tall = RNG.integers(0, 256, (4, 12, 8, 3), np.uint8)
  split = arrays.to_split(tall, 0)
  assert split.images.shape == (4, 8, 8, 3) and np.array_equal(split.sizes, np.tile([12., 8.], (4, 1)))
  mixed = arrays.to_split([tall[0], IMAGES[0], IMAGES[1, :, :, 0]], 6)
  assert mixed.images.shape == (3, 6, 6, 3) and mixed.sizes.tolist() == [[12, 8], [8, 8], [8, 8]]


@pytest.mark.parametrize('data, words', [
    (IMAGES.astype(np.float32), 'floats from 0 to 255'), (IMAGES.astype(np.int64), 'int64'), ((IMAGES, LABELS[:5]), 'labels'),
    (IMAGES[..., :2], 'the shape'), ({'train': IMAGES, 'tets': IMAGES}, 'the splits'), ([], 'no images'),
    (IMAGES[:0], 'no images|shape'), (iter(IMAGES), 'no sequence'), ((IMAGES, LABELS - 1), 'a label is -1'), (3, 'no sequence'),
    ({'train': IMAGES, 'test': IMAGES[:, :4, :4]}, 'of .4, 8. pixels')])
def test_what_is_no_data(data, words):
  with pytest.raises(UserError, match=words) as raised:
    arrays.to_source(data, 8)
  assert len(str(raised.value).splitlines()) == 2


def test_a_file_gives_what_was_saved(tmp_path):
  """Bitwise, also of a source with sizes, classes and moments of its own; and the same file each time."""
  for source in (digits.make(), arrays.to_source({'train': (IMAGES, LABELS), 'test': (IMAGES[:9], LABELS[:9])}, 8)):
    path = arrays.save(source, tmp_path)
    assert arrays.save(source, tmp_path) == path
    again = arrays.make(str(path))
    assert again.classes == source.classes and (again.mean, again.std) == (source.mean, source.std)
    for name in ('train', 'test'):
      for a, b in zip(getattr(again, name), getattr(source, name), strict=True):
        assert np.array_equal(a, b) and a.dtype == b.dtype
    assert again.place == (('path', str(path)),)


def test_a_share_is_held_out_where_there_is_no_test_split(tmp_path):
  path = arrays.save(arrays.to_source((IMAGES, LABELS), 8), tmp_path)
  source = arrays.make(str(tmp_path))  # the one file of the folder
  assert (len(source.train.images), len(source.test.images)) == (27, 3) and set(source.test.labels) == {0, 1, 2}
  assert arrays.make(str(path), test=0.).test is None


def test_a_file_in_the_home_folder_is_recorded_where_it_is(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  np.savez(tmp_path / 'x.npz', images=IMAGES)
  assert arrays.make('~/x.npz').place == (('path', str(tmp_path / 'x.npz')),)


def test_a_file_of_ones_own(tmp_path):
  np.savez(tmp_path / 'a.npz', images=IMAGES, labels=np.array(['x', 'y', 'z'])[LABELS], test_images=IMAGES[:3])
  source = arrays.make(str(tmp_path / 'a.npz'))
  assert source.classes == ('x', 'y', 'z') and len(source.test.images) == 3 and isinstance(source, Source)


def test_what_is_wrong_with_a_file(tmp_path, monkeypatch):
  def refused(words, **content):
    path = tmp_path / 'a.npz'
    np.savez(path, **content)
    with pytest.raises(UserError, match=words) as raised:
      arrays.make(str(path))
    assert len(str(raised.value).splitlines()) == 2
  refused('train', labels=LABELS)
  refused('labels of shape', images=IMAGES, labels=LABELS[:4])
  refused('sizes has the shape', images=IMAGES, sizes=np.zeros((30, 2)))
  refused('damaged or no .npz', images=np.array([{}], object))
  refused('not a file of images', images=IMAGES, labels=LABELS, classes=np.array(['a']), mean=np.array(['x']))
  (tmp_path / 'a.npz').write_bytes(b'PK')
  with pytest.raises(UserError, match='damaged or no .npz'):
    arrays.make(str(tmp_path / 'a.npz'))
  for path in ('', str(tmp_path / 'b.npz'), str(tmp_path)):
    (tmp_path / 'c.npz').write_bytes(b'')  # a second file in the folder
    with pytest.raises(UserError, match='npz'):
      arrays.make(path)
  with zipfile.ZipFile(tmp_path / 'bomb.npz', 'w', zipfile.ZIP_DEFLATED) as file:
    file.writestr('images.npy', bytes(2**20))
  monkeypatch.setattr(arrays, 'MEMORY', 2**19)
  with pytest.raises(UserError, match='at most 524,288'):
    arrays.make(str(tmp_path / 'bomb.npz'))


def test_a_stream_is_not_in_memory(tmp_path):
  from PIL import Image
  for i in range(4):
    Image.fromarray(IMAGES[i]).save(tmp_path / f'{i}.png')
  with pytest.raises(UserError, match='streams'):
    arrays.to_source(folder.make(str(tmp_path), size=8, stream=True), 8)
  assert isinstance(arrays.to_source(folder.make(str(tmp_path), size=8), 8).train, Split)

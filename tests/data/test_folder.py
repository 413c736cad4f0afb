"""Folders of images, through the command line: splits, classes, and what is left out."""
import errno
import io
import json
import os
import shlex
import struct
import threading
import unicodedata
import zlib

import numpy as np
import pytest
import tiny
from PIL import Image

import equivariant_ssl.data
from equivariant_ssl import cli, registry
from equivariant_ssl.config import load_config
from equivariant_ssl.data import archives, decode, folder, folder_index, image_header, unpack
from equivariant_ssl.data.decode import BadImage, PixelRules
from equivariant_ssl.data.room import Room
from equivariant_ssl.errors import BAD_DATA, INPUT_OUTPUT, OTHER_CONFIG, USAGE, UserError
from equivariant_ssl.evaluate import finetune, transfer
from equivariant_ssl.run_arguments import config_of_data
from equivariant_ssl.storage import disk


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path_factory.mktemp('cache')))
  monkeypatch.setattr(cli, '_cache', lambda: None)


def encoded(pixels, kind='PNG', **kw):
  out = io.BytesIO()
  (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(out, kind, **kw)
  return out.getvalue()


def picture(seed, shape=(10, 12, 3)):
  return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def album(root, counts, kind='PNG', ending='png', start=0):
  """root/FOLDER/i.ENDING, `counts` {folder: how many} of noise."""
  for name, count in counts.items():
    (root / name).mkdir(parents=True, exist_ok=True)
    for _ in range(count):
      start += 1
      (root / name / f'{start:03d}.{ending}').write_bytes(encoded(picture(start), kind))
  return root


def check(root, *options, code=0, capsys=None):
  """The lines of `eqssl data check`."""
  assert cli.main(['data', 'check', str(root), *options]) == code
  out, err = capsys.readouterr()
  return (out + err).splitlines()


def prepare(root, *options, code=0, capsys=None, name='mine'):
  """The lines of `eqssl data prepare`, into a folder beside `root`."""
  assert (
    cli.main(['data', 'prepare', name, '--src', str(root), '--root', f'{root}-tfds', *options])
    == code
  )
  out, err = capsys.readouterr()
  return (out + err).splitlines()


def both(root, *options, code=0, capsys):
  """(check's lines, prepare's)."""
  return tuple(f(root, *options, code=code, capsys=capsys) for f in (check, prepare))


# ---- splits and classes

@pytest.mark.parametrize(
  'names', [('train', 'valid', 'test'), ('Training', 'VALIDATION', 'testing')]
)
def test_splits_have_any_of_their_names(tmp_path, capsys, names):
  root = tmp_path / 'photos'
  for name, n in zip(names, (5, 3, 2), strict=True):
    album(root / name, {'cat': n, 'dog': n}, start=100 * n)
  checked, prepared = both(root, capsys=capsys)
  assert checked[0].endswith(': 10 train, 6 validation, 4 test') and checked[-2] == 'ok' and 'Next' in checked[-1]
  assert [line for line in checked if 'classes:' in line] == [
    'train classes: cat 5, dog 5',
    'validation classes: cat 3, dog 3',
    'test classes: cat 2, dog 2',
  ]
  assert [line for line in prepared if line.startswith('mine ')] == [
      'mine train: 10 images', 'mine validation: 6 images', 'mine test: 4 images']
  assert '--config.data.test=validation' in prepared[-1]   # what is chosen on is not the test split
  made = folder.make(str(root), size=8)
  assert (len(made.train.images), len(made.test.images), made.classes) == (10, 6, ('cat', 'dog'))
  assert made.problems == ('test: its 4 images are not used here, because validation is held out',)
  found = transfer.open_target(str(root))
  assert found.classes == 2 and {
    k: sum(len(s.images) for s in part.read(8)) for k, part in found.parts.items()
  } == {'train': 10, 'valid': 6, 'test': 4}


def test_train_alone_is_split_by_a_share_and_has_the_classes(tmp_path, capsys):
  root = album(tmp_path / 'photos' / 'train', {'cat': 40, 'dog': 40}).parent
  checked, prepared = both(root, capsys=capsys)
  made = folder.make(str(root), size=8, test=.1)
  assert made.classes == ('cat', 'dog') and len(made.train.images) + len(
    made.test.images
  ) == 80 > 4 * len(made.test.images)
  assert checked[0].endswith(f': {len(made.train.images)} train, {len(made.test.images)} test')
  assert 'mine train: 80 images' in prepared


def test_every_class_has_test_images():
  counts = {'ant': 20, 'bee': 20, 'cat': 14, 'dog': 15, 'eel': 2, 'fox': 1}
  paths = [os.path.join(name, f'{i}.png') for name, count in counts.items() for i in range(count)]

  def held(share, paths=paths):
    return folder.hold_out(paths, share)

  def of_class(held):
    return [sum(path.startswith(name) for path in held) for name in counts]
  assert of_class(held(.1)) == [2, 2, 1, 2, 1, 0] and of_class(held(.99)) == [19, 19, 13, 14, 1, 0]
  assert held(.1) < held(.5) and held(.1) == held(.1, paths[::-1])
  assert len(held(.1, [f'{i}.png' for i in range(25)])) == 3   # without labels: a share of all
  for added in ('ant/x.png', 'cat/x.png', 'gnu/x.png'):   # one more image moves at most one other
    moved = held(.1, [*paths, added]) ^ held(.1)
    assert len(moved - {added}) <= 1 and all(path.startswith(added[:3]) for path in moved)
  former = folder.hold_out(paths, .1, 'all')
  assert former == {path for path in paths if folder._hash_share(path) < .1} != held(.1)


def test_what_the_share_is_of_is_a_word(tmp_path):
  album(tmp_path, {'cat': 10, 'dog': 10})
  assert np.bincount(folder.make(str(tmp_path), size=8).test.labels).tolist() == [1, 1]
  with pytest.raises(UserError, match="test_of is 'each', neither class nor all") as e:
    folder.make(str(tmp_path), size=8, test_of='each')
  assert e.value.code == USAGE


@pytest.mark.parametrize('wrap', ['images', 'archive/data set/images'])
def test_a_folder_that_wraps_others_is_seen_through(tmp_path, capsys, wrap):
  root = tmp_path / 'photos'
  album(root / wrap / 'train', {'cat': 4, 'dog': 4})
  album(root / wrap / 'val', {'cat': 2, 'dog': 2}, start=90)
  (root / 'labels').mkdir()
  (root / 'labels' / 'a.txt').write_text('0 0 0 1 1')
  checked, prepared = both(root, capsys=capsys)
  for lines in (checked, prepared):
    assert lines[:3].count(f'{wrap}/ is the only folder, so the folders in it are read') == 1
  assert checked[0].endswith(': 8 train, 4 validation') and 'mine validation: 4 images' in prepared
  assert 'left out: .txt 1; 12 images are read' in checked[1] and prepared[0] == checked[1]
  assert folder.make(str(root), size=8).classes == ('cat', 'dog')


def test_each_split_may_have_its_wrapper(tmp_path, capsys):
  """Kaggle packs train/train/cat, and detectors have train/images without classes.

  A folder that is a class of another split does not wrap anything.
  """
  album(tmp_path / 'a' / 'train' / 'train', {'cat': 4, 'dog': 4})
  album(tmp_path / 'a' / 'test' / 'test', {'cat': 2, 'dog': 2}, start=90)
  assert check(tmp_path / 'a', capsys=capsys)[0].endswith(': 8 train, 4 test')
  assert folder.read_folder(tmp_path / 'a').classes == ('cat', 'dog')
  album(tmp_path / 'b' / 'train', {'images': 4})
  album(tmp_path / 'b' / 'valid', {'images': 2}, start=90)
  counts, note, *_ = check(tmp_path / 'b', capsys=capsys)
  assert (
    counts.endswith(': 4 train, 2 validation')
    and "one class, the folder 'images', so there are no labels" in note
  )
  album(tmp_path / 'c' / 'train', {'cat/old': 4, 'cat/new': 2, 'dog': 2})
  album(tmp_path / 'c' / 'test', {'cat/old': 2, 'cat/new': 2}, start=90)
  assert folder.read_folder(tmp_path / 'c').classes == ('cat', 'dog')


@pytest.mark.parametrize(
  ('counts', 'words'),
  [
    (
      {'train/a': 2, 'Training/a': 2, 'val/a': 1},
      "more than one folder for the train split: 'Training', 'train'",
    ),
    ({'valid/a': 2, 'test/a': 2}, "has 'test', 'valid', and no train/ to train on"),
    ({'cat': 2, 'dog': 2, 'test': 2}, "has 'test' beside 'cat', 'dog', and no train/"),
    (
      {'bus': 2, 'car': 2, 'train': 2},
      "has 'train' beside 'bus', 'car'. This may be a split, or a class with the name of a split",
    ),
    ({'train2017': 2, 'val2017': 2}, "the classes would be 'train2017', 'val2017'"),
    ({'training_set/cat': 2, 'test_set/cat': 2}, 'have names like a split'),
  ],
)
def test_folders_that_can_be_read_in_two_ways_are_an_error_with_the_remedy(
  tmp_path, capsys, counts, words
):
  root = album(tmp_path / 'photos', counts)
  trained = pytest.raises(UserError, folder.make, str(root), size=8)
  for lines in (*both(root, code=USAGE, capsys=capsys), str(trained.value).splitlines()):
    assert (
      len(lines) == 2
      and words in lines[0]
      and 'train/, val/ and test/' in lines[1]
      and '--no-splits' in lines[1]
    )
  names = sorted({name.split('/')[0] for name in counts})
  checked, prepared = both(root, '--no-splits', capsys=capsys)
  assert any(line.startswith(f'train classes: {names[0]} ') for line in checked)
  assert f'mine train: {sum(counts.values())} images' in prepared
  assert folder.make(str(root), size=8, splits=False).classes == tuple(names)


def test_a_class_in_splits_may_have_the_name_of_one(tmp_path, capsys):
  root = album(
    tmp_path / 'photos', {'train/control': 3, 'train/test': 3, 'val/control': 2, 'val/test': 2}
  )
  for lines in both(root, capsys=capsys):
    assert "classes that are named like splits: 'test'" in lines
  assert folder.make(str(root), size=8).classes == ('control', 'test')


def test_images_beside_the_splits_are_said(tmp_path, capsys):
  root = album(
    tmp_path / 'photos', {'train/a': 3, 'train/b': 3, 'val/a': 2, 'val/b': 2, 'unlabeled': 5}
  )
  (root / 'preview.png').write_bytes(encoded(picture(0)))
  for lines in both(root, capsys=capsys):
    assert "6 images are beside the splits and not used: in 'unlabeled'" in lines


def test_one_class_is_no_label_and_trains(tmp_path, capsys):
  root = album(tmp_path / 'photos', {'all of them': 30})
  checked, prepared = both(root, capsys=capsys)
  note = ("all images are of one class, the folder 'all of them', so there are no labels; "
          'labels need two class folders or more')
  assert note in checked and note in prepared and 'mine is prepared without labels' in prepared
  made = folder.make(str(root), size=8)
  assert made.classes is None and made.train.labels is None and note in made.problems
  with pytest.raises(UserError, match='of one class') as e:
    transfer.open_target(str(root))
  assert e.value.code == USAGE


def test_class_names_are_compared_as_they_are_read(tmp_path, capsys):
  root, name = tmp_path / 'photos', 'caf\u00e9'
  album(root / 'train', {name: 3, 'Tea': 3, 'tea': 3, 'water ': 3, 'water': 3})
  other = unicodedata.normalize('NFD', name)
  album(root / 'test', {other: 2, 'Tea': 2, 'tea': 2, 'water ': 2, 'water': 2, 'milk': 1}, start=90)
  album(root / 'train', {'juice': 2}, start=200)
  checked, prepared = both(root, capsys=capsys)
  for lines in (checked, prepared):
    text = '\n'.join(lines)
    assert "kept apart: 'Tea' and 'tea'" in text and "kept apart: 'water' and 'water '" in text
    assert f"the form of their Unicode are one class: '{name}'" in text
    assert "1 class in test without training images (1 image): 'milk'" in text
    assert "1 class without images in test (2 images): 'juice'" in text
  assert f'test classes: Tea 2, {name} 2' in '\n'.join(checked)
  assert folder.make(str(root), size=8).classes == tuple(
    sorted((name, 'Tea', 'tea', 'water', 'water ', 'milk', 'juice'))
  )


def test_all_test_classes_are_others_is_said(tmp_path, capsys):
  root = album(tmp_path / 'photos', {'train/cat': 3, 'train/dog': 3, 'test/Cat': 3, 'test/Dog': 3})
  lines = check(root, capsys=capsys)
  assert "2 classes in test without training images (6 images): 'Cat', 'Dog'" in lines
  assert "classes that differ only by case or spaces, and are kept apart: 'Cat' and 'cat'" in lines


# ---- what is left out

def test_what_is_left_out_is_counted_by_reason_in_the_first_lines(tmp_path, capsys, monkeypatch):
  root, outside = album(tmp_path / 'photos', {'a': 60, 'b': 60}), tmp_path / 'x.png'
  outside.write_bytes(encoded(picture(0)))
  for i in range(7):
    (root / 'a' / f'{i}.HEIC').write_bytes(b'.')
  (root / 'notes').write_text('x')
  (root / 'b' / 'cut.png').write_bytes(encoded(picture(9))[:30])
  (root / 'b' / 'wide.png').write_bytes(png(40_000, 1))
  (root / 'b' / 'out.png').symlink_to(outside)
  (root / 'a' / '.hidden.png').write_bytes(b'.')
  (root / 'a' / '._mac.png').write_bytes(b'.')
  (root / 'more').symlink_to(tmp_path)
  for place in ('@eaDir', 'a/@eaDir', '#recycle'):
    album(root, {f'{place}/001.png': 2})
  reasons = {
    '.heic': 7,
    'folders of the file system': 3,
    'links out of the folder': 1,
    'too large': 1,
    'damaged': 1,
    'without extension': 1,
    'hidden': 1,
    'links to folders': 1,
  }
  checked, prepared = check(root, code=BAD_DATA, capsys=capsys), prepare(root, capsys=capsys)
  counts, read = checked[1].removeprefix('left out: ').split('; ')
  assert (
    set(counts.split(', ')) == {f'{why} {n}' for why, n in reasons.items()}
    and read == '120 images are read'
  )
  assert (
    counts.startswith('.heic 7, ')
    and checked[2] == 'links are followed with --links'
    and prepared[:2] == checked[1:3]
  )
  made = folder.make(str(root), size=8)
  assert made.left_out == reasons and made.problems[0] == checked[1] and made.classes == ('a', 'b')
  rows = [line for line in checked if line.startswith('  ')]
  assert [
    words
    for words in (
      'cut.png: PNG',
      'wide.png: 40000x1 pixels are beyond',
      'out.png: a link that',
      'more: a link',
    )
    if not any(words in r for r in rows)
  ] == []
  assert (
    'left out, because they cannot be read' in '\n'.join(prepared)
    and 'mine train: 120 images' in prepared
  )


@pytest.mark.parametrize('times', [1, 9])
def test_a_disk_that_fails_to_list_a_folder_for_a_moment_costs_no_class(times, tmp_path, monkeypatch):
  root, scandir, failures = album(tmp_path / 'photos', {'cats': 2, 'dogs': 3}), os.scandir, []

  def fail(path):
    if os.path.basename(path) == 'cats' and len(failures) < times:
      failures.append(path)
      raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), path)
    return scandir(path)
  monkeypatch.setattr(disk, 'PAUSES', (0., 0., 0.))
  monkeypatch.setattr(os, 'scandir', fail)
  if times > 1:
    with pytest.raises(UserError, match='photos could not be read in 4 tries: Stale') as caught:
      folder_index.index_folder(str(root))
    assert caught.value.code == INPUT_OUTPUT
  else:
    index = folder_index.index_folder(str(root))
    assert len(index.paths) == 5 and not index.bad and failures
  monkeypatch.undo()


def test_a_folder_of_other_files_says_so(tmp_path, capsys):
  for i in range(3):
    (tmp_path / f'{i}.heic').write_bytes(b'.')
  lines = check(tmp_path, code=USAGE, capsys=capsys)
  assert 'it has: 3 .heic' in lines[0] and '.tiff' in lines[1]


def png(width, height, bits=8, color=2, key=(), rows=b'\0'):
  def chunk(name, body):
    return struct.pack('>I', len(body)) + name + body + struct.pack('>I', zlib.crc32(name + body))

  return b''.join(
    (
      b'\x89PNG\r\n\x1a\n',
      chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, bits, color, 0, 0, 0)),
      *((chunk(b'tRNS', struct.pack(f'>{len(key)}H', *key)),) if key else ()),
      chunk(b'IDAT', zlib.compress(rows)),
      chunk(b'IEND', b''),
    )
  )


def test_other_formats_are_read(tmp_path, capsys):
  root = tmp_path / 'photos'
  noise = Image.fromarray(picture(0))
  kinds = {
    'tif': ('TIFF', {}),
    'TIFF': ('TIFF', {'compression': 'tiff_lzw'}),
    'ppm': ('PPM', {}),
    'jfif': ('JPEG', {}),
    'pgm': ('PPM', {}),
    'bmp': ('BMP', {}),
    'webp': ('WEBP', {'lossless': True}),
    'gif': ('GIF', {}),
  }
  for k in ('a', 'b'):
    (root / k).mkdir(parents=True)
    for ending, (kind, kw) in kinds.items():
      (root / k / f'1.{ending}').write_bytes(
        encoded(noise.convert('L') if ending == 'pgm' else noise, kind, **kw)
      )
  checked, prepared = both(root, capsys=capsys)
  assert (
    checked[0].count(' train') == 1 and checked[-2] == 'ok' and 'Next' in checked[-1] and 'mine train: 16 images' in prepared
  )
  import tensorflow_datasets as tfds

  rows = {
    r['file_name'].decode(): r['image']
    for r in tfds.data_source('mine', data_dir=f'{root}-tfds', split='train')
  }
  for name in ('a/1.tif', 'a/1.TIFF', 'a/1.ppm'):
    np.testing.assert_array_equal(rows[name], picture(0))   # plain TFDS reads them too


def test_links_are_followed_on_request_each_folder_once(tmp_path, capsys):
  store, root = album(tmp_path / 'store', {'cats': 4, 'dogs': 3}), tmp_path / 'photos'
  root.mkdir()
  (root / 'cat').symlink_to(store / 'cats')
  (root / 'dog').mkdir()
  for file in (store / 'dogs').iterdir():
    (root / 'dog' / file.name).symlink_to(file)
  (root / 'dog' / 'again').symlink_to(root / 'dog')
  (root / 'up').symlink_to(tmp_path)
  (root / 'system').symlink_to('/proc')
  (root / 'twin').symlink_to(store / 'cats')
  lines = check(root, code=USAGE, capsys=capsys)
  assert (
    'has no images' in lines[0] and '--links' in lines[1] and '--config.data.links=True' in lines[1]
  )
  checked, prepared = both(root, '--links', capsys=capsys)
  assert (
    'left out: links to folders 4; 7 images are read' in checked
    and 'mine train: 7 images' in prepared
  )
  text = '\n'.join(checked)
  assert (
    'up: a link to a folder that holds this one' in text
    and 'twin: a link to a folder that is already read' in text
  )
  made = folder.make(str(root), size=8, links=True, test=0.)
  assert made.classes == ('cat', 'dog') and np.bincount(made.train.labels).tolist() == [4, 3]


# ---- pixels that say nothing

def test_icons_in_transparency_are_said_and_drawn_on_a_background(tmp_path, capsys):
  root = tmp_path / 'icons'
  for k in ('a', 'b'):
    (root / k).mkdir(parents=True)
    for i in range(4):
      pixels = np.zeros((12, 12, 4), np.uint8)
      pixels[2 + i:7, 3:8, 3] = 255   # black on nothing
      (root / k / f'{i}.png').write_bytes(encoded(Image.fromarray(pixels)))
  lines = check(root, capsys=capsys)
  said = [line for line in lines if 'show nothing' in line]
  assert (
    said[0].startswith('8 of 8 images have one color throughout')
    and '--background=white' in said[0]
  )
  assert not [
    line for line in check(root, '--background', 'white', capsys=capsys) if 'show nothing' in line
  ]
  made, drawn = (folder.make(str(root), size=12, test=0., background=c) for c in ('black', 'white'))
  said = cli.parse_overrides(
    [
      '--config.data.name=folder',
      f'--config.data.path={root}',
      '--config.data.size=12',
      '--config.data.test=0.',
      '--config.data.background=#ff8000',
    ],
    has_config=True,
  )
  data = load_config('smoke', said).data
  typed = registry.make(
    equivariant_ssl.data, data.name, **{k: v for k, v in data.items() if k != 'name'}
  )
  assert typed.train.images[0, 0, 0].tolist() == [255, 128, 0]
  assert not made.train.images.any() and '--config.data.background=white' in '\n'.join(
    made.problems
  )
  assert drawn.train.images[0, 0, 0].tolist() == [255, 255, 255] and drawn.train.images[
    0, 3, 4
  ].tolist() == [0, 0, 0]
  assert cli.main(['data', 'check', str(root), '--background', 'whitish']) == USAGE
  assert "'whitish', which is not a color" in capsys.readouterr().err
  prepared = prepare(root, '--background', 'white', capsys=capsys)
  assert '--config.data.background=white' in prepared[-1]


def test_the_background_changes_no_opaque_image():
  for kind in ('PNG', 'JPEG', 'WEBP', 'GIF', 'TIFF', 'PPM'):
    data = encoded(picture(1), kind)
    np.testing.assert_array_equal(
      decode.decode(data, 8)[0], decode.decode(data, 8, PixelRules((255, 0, 255)))[0]
    )


def train(root, workdir, *more):
  return cli.main(
    [
      'train',
      '--config',
      tiny.NAME,
      '--workdir',
      str(workdir),
      '--config.data.name=folder',
      f'--config.data.path={root}',
      '--config.data.size=16',
      '--config.batch=8',
      '--config.steps=2',
      *more,
    ]
  )


def test_a_channel_that_is_constant_trains_and_is_said(tmp_path, capsys):
  root = tmp_path / 'photos'
  for i in range(16):
    pixels = picture(i, (16, 16, 3))
    pixels[..., 2] = 0
    (root / 'ab'[i % 2]).mkdir(parents=True, exist_ok=True)
    (root / 'ab'[i % 2] / f'{i}.png').write_bytes(encoded(pixels))
  (root / 'a' / 'x.heic').write_bytes(b'.')
  said = (
    'the blue channel is nearly the same in all pixels; the standard deviation is taken as 1/255, '
    'because the measured one is nearly 0'
  )
  assert said in check(root, capsys=capsys)
  assert train(root, tmp_path / 'run', '--config.data.test=0.') == 0
  out, err = capsys.readouterr()
  lines = (out + err).splitlines()
  at = [
    next(i for i, line in enumerate(lines) if words in line)
    for words in ('left out: .heic 1', said)
  ]
  assert at[0] < at[1] < 8  # the first lines
  rows = [
    json.loads(line) for line in (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()
  ]
  assert len(rows) == 2 and all(np.isfinite(r['loss']) for r in rows)
  older = json.loads(
    (tmp_path / 'run' / 'config.json').read_text()
  )  # of a version without some fields goes on
  for field in ('background', 'bits', 'links', 'splits'):
    del older['data'][field]
  (tmp_path / 'run' / 'config.json').write_text(json.dumps(older))
  assert (
    train(root, tmp_path / 'run', '--config.data.test=0.', '--config.data.background=white')
    == OTHER_CONFIG
  )
  assert 'data.background' in capsys.readouterr().err
  assert cli.main(['resume', str(tmp_path / 'run')]) == 0


def test_12_bits_in_16_are_said_and_scaled(tmp_path, capsys):
  root = tmp_path / 'scans'
  for k in ('a', 'b'):
    (root / k).mkdir(parents=True)
    for i in range(3):
      values = np.random.default_rng(i).integers(0, 4096, (40, 40)).astype(np.uint16)
      (root / k / f'{i}.png').write_bytes(encoded(values))
      (root / k / f'{i}.tif').write_bytes(encoded(values, 'TIFF'))
  line = next(line for line in check(root, capsys=capsys) if 'no pixel is brighter' in line)
  assert line.split(', ')[1].startswith('--bits=12')
  assert not [line for line in check(root, '--bits', '12', capsys=capsys) if 'brighter' in line]
  made = folder.make(str(root), size=40, test=0., bits=12)
  first = np.random.default_rng(0).integers(0, 4096, (40, 40))
  np.testing.assert_array_equal(made.train.images[0, ..., 0], first >> 4)
  np.testing.assert_array_equal(made.train.images[0], made.train.images[1])   # the TIFF
  assert '--config.data.bits=12' in '\n'.join(folder.make(str(root), size=40).problems)
  assert check(root, '--bits', '10', code=BAD_DATA, capsys=capsys)[-1].startswith(
    'not ok'
  )  # there is more in them


@pytest.mark.parametrize(
  ('data', 'expected'),
  [
    (png(2, 1, 16, 0, (1000,), b'\0' + struct.pack('>2H', 1000, 40_000)), [(9, 8, 7), (156,) * 3]),
    (
      png(
        2, 1, 16, 2, (1000, 40_000, 5), b'\0' + struct.pack('>6H', 1000, 40_000, 5, 256, 512, 768)
      ),
      [(9, 8, 7), (1, 2, 3)],
    ),
    (png(2, 1, 4, 0, (3,), b'\0\x3f'), [(9, 8, 7), (255,) * 3]),
    (png(2, 1, 1, 0, (1,), b'\0\x80'), [(9, 8, 7), (0,) * 3]),
    (png(2, 1, 8, 0, (200,), b'\0\xc8\x64'), [(9, 8, 7), (100,) * 3]),
  ],
)
def test_one_transparent_color_at_any_depth(data, expected):
  assert decode.decode(data, None, PixelRules((9, 8, 7)))[0][0].tolist() == [list(e) for e in expected]


def test_values_of_no_known_range_are_refused():
  for values, words in (
    (np.random.default_rng(0).random((4, 4)).astype(np.float32), 'floating-point'),
    (np.full((4, 4), 70_000, np.int32), '70,000'),
    (np.full((4, 4), -1, np.int32), '-1 to -1'),
  ):
    with pytest.raises(BadImage, match=words):
      decode.decode(encoded(values, 'TIFF'), 4)


# ---- damage

def damaged(kind, count, **kw):
  """`count` damaged files: cut short, or with one or two bits turned in their pixels."""
  rng = np.random.default_rng(0)
  for i in range(count):
    smooth = Image.fromarray(picture(i, (6, 6, 3))).resize((56, 48), Image.Resampling.BICUBIC)
    data = bytearray(encoded(smooth, kind, **kw))
    if i % 3 == 0:
      yield bytes(data[:rng.integers(len(data) // 8, len(data) - 1)])
      continue
    for _ in range(i % 3):
      data[rng.integers(60 if kind == 'PNG' else 620, len(data))] ^= 1 << rng.integers(8)
    yield bytes(data)


def accepts(function, *args, **kw):
  try:
    function(*args, **kw)
    return True
  except Exception:
    return False


def test_no_damaged_png_is_accepted():
  """Of those that Pillow refuses, or of which a checksum is wrong."""
  files = list(damaged('PNG', 120))
  opened = lambda d: Image.open(io.BytesIO(d))
  wrong = [
    not (accepts(lambda d=d: opened(d).load()) and accepts(lambda d=d: opened(d).verify()))
    for d in files
  ]
  assert sum(wrong) > 115
  assert [not accepts(decode.decode, d, 16) for d in files] == wrong


@pytest.mark.parametrize(
  'kw', [{}, {'progressive': True}, {'subsampling': 0, 'restart_marker_blocks': 4}]
)
def test_no_damaged_jpeg_is_accepted_and_what_is_has_the_strict_decoders_pixels(kw):
  simplejpeg = pytest.importorskip('simplejpeg')
  files = list(damaged('JPEG', 120, **kw))
  wrong = [not accepts(simplejpeg.decode_jpeg, d, 'RGB', strict=True) for d in files]
  assert 30 < sum(wrong) < 120 and [not accepts(decode.decode, d, None) for d in files] == wrong
  for d in (d for d, bad in zip(files, wrong, strict=True) if not bad):
    np.testing.assert_array_equal(
      decode.decode(d, None)[0], simplejpeg.decode_jpeg(d, 'RGB', strict=True)
    )


def test_damaged_cmyk_is_not_accepted_either():
  data = bytearray(encoded(Image.fromarray(picture(0, (40, 40, 3))).convert('CMYK'), 'JPEG'))
  assert accepts(decode.decode, bytes(data), 8)
  assert not accepts(decode.decode, bytes(data[:-200]), 8)


def odd():
  """Good files with features that are seldom."""
  noise = Image.fromarray(picture(0, (20, 30, 3)))
  exif = Image.Exif()
  exif[0x0112] = 6
  frames = {'save_all': True, 'append_images': [noise.rotate(180)]}
  sampled = bytearray(encoded(Image.new('RGB', (48, 48), (128, 128, 128)), 'JPEG', keep_rgb=True))
  sampled[sampled.find(b'\xff\xc0') + 11] = 0x31
  return {
    'cmyk.jpg': encoded(noise.convert('CMYK'), 'JPEG'),
    'gray.jpg': encoded(noise.convert('L'), 'JPEG'),
    'progressive.jpg': encoded(noise, 'JPEG', progressive=True),
    'turned.jpg': encoded(noise, 'JPEG', exif=exif),
    '411.jpg': encoded(noise, 'JPEG', subsampling='4:1:1'),
    'rgb.jpg': encoded(noise, 'JPEG', keep_rgb=True),
    '311.jpg': bytes(sampled),
    'trailing.jpg': encoded(noise, 'JPEG') + bytes(300),
    'mpo.jpg': encoded(noise, 'MPO', **frames),
    '16.png': encoded(picture(0, (8, 8)).astype(np.uint16) * 257),
    'turned.png': encoded(noise, exif=exif),
    'palette.png': encoded(noise.quantize(9)),
    'key.png': encoded(noise.quantize(9), transparency=3),
    'animated.png': encoded(noise, 'PNG', **frames),
    'animated.gif': encoded(noise, 'GIF', **frames),
    'animated.webp': encoded(noise, 'WEBP', **frames),
    'alpha.webp': encoded(noise.convert('RGBA'), 'WEBP'),
    'turned.tif': encoded(noise, 'TIFF', exif=exif),
    'jpeg.tif': encoded(noise, 'TIFF', compression='jpeg'),
    'lab.tif': encoded(noise.convert('LAB'), 'TIFF'),
    'fax.tif': encoded(noise.convert('1'), 'TIFF', compression='group4'),
    'pages.tif': encoded(noise.copy(), 'TIFF', save_all=True),
    '16.pgm': encoded(picture(0, (8, 8)).astype(np.uint16) * 257, 'PPM'),
    'plain.ppm': b'P3\n# a comment\n2 1\n255\n1 2 3 4 5 6\n',
  }


def test_odd_and_good_files_are_accepted(tmp_path, capsys):
  for name, data in odd().items():
    (tmp_path / name).write_bytes(data)
  lines = check(tmp_path, capsys=capsys)
  assert lines[-2] == 'ok' and '--config photos' in lines[-1], lines
  for name in ('turned.jpg', 'turned.png', 'turned.tif'):
    assert decode.decode(odd()[name], 8)[1] == (30, 20)
  np.testing.assert_array_equal(
    decode.decode(odd()['turned.tif'], None)[0], np.rot90(picture(0, (20, 30, 3)), -1)
  )


def test_a_folder_of_torn_images_is_not_ok(tmp_path, capsys):
  """A fifth of them cut in their pixels: their headers are whole."""
  root = album(tmp_path / 'photos', {'a': 10, 'b': 10})
  for name in ('a/001.png', 'a/004.png', 'b/012.png', 'b/015.png'):
    (root / name).write_bytes((root / name).read_bytes()[:-60])
  lines = check(root, code=BAD_DATA, capsys=capsys)
  assert '4 cannot be decoded:' in lines and lines[-1].startswith('not ok')
  assert (
    '4 of 20 images cannot be decoded, which is more than 1 %'
    in prepare(root, code=BAD_DATA, capsys=capsys)[-2]
  )


@pytest.mark.parametrize('share', [.75, .02])
def test_unreadable_headers_count_as_damage(tmp_path, capsys, share):
  """Zero bytes above all: where they are more than 1 % nothing goes on, wherever they are read."""
  root = album(tmp_path / 'photos', {'a': 50, 'b': 50})
  for file in sorted(root.rglob('*.png'))[:: int(1 / share + 0.5) if share < 0.5 else 1][
    : int(100 * share)
  ]:
    file.write_bytes(b'')
  words = f'{100 * share:.0f} of 100 images cannot be decoded, which is more than 1 %'
  assert check(root, code=BAD_DATA, capsys=capsys)[-1].startswith('not ok')
  assert words in '\n'.join(prepare(root, code=BAD_DATA, capsys=capsys))
  assert train(root, tmp_path / 'run') == BAD_DATA
  assert words in capsys.readouterr().err
  for call in (
    lambda: folder.make(str(root), size=8, stream=True),
    lambda: transfer.open_target(str(root)),
  ):
    with pytest.raises(UserError, match=words) as e:
      call()
    assert e.value.code == BAD_DATA


def test_damage_in_headers_and_in_pixels_is_one_sum(tmp_path):
  root = album(tmp_path, {'a': 150, 'b': 150})
  files = sorted(root.rglob('*.png'))
  for file in files[:2]:
    file.write_bytes(b'')
  for file in files[2:4]:
    file.write_bytes(file.read_bytes()[:-60])
  with pytest.raises(UserError, match='4 of 300 images cannot be decoded'):
    folder.make(str(root), size=8)
  assert folder.read_folder(root).index.left_out == {'damaged': 2}
  with pytest.raises(UserError, match='4 of 300 images cannot be decoded') as e:
    folder.make(str(root), size=8, stream=True, test=0.)   # as it reads some to measure their mean
  assert e.value.code == BAD_DATA


def test_what_was_replaced_is_counted(tmp_path):
  root = album(tmp_path, {'a': 60, 'b': 60})
  file = root / 'a' / '003.png'
  file.write_bytes(file.read_bytes()[:-60])
  assert folder.make(str(root), size=8).left_out == {'damaged, replaced': 1}


def test_a_jpeg_of_endless_scans_is_beyond_the_limits():
  data = encoded(picture(0), 'JPEG', progressive=True)
  at = data.find(b'\xff\xda')
  assert accepts(decode.decode, data, 8)
  with pytest.raises(BadImage, match='more than 256 scans'):
    decode.decode(data[:at] + data[at:at + 12] * 300 + data[at:], 8)


# ---- limits

def test_large_images_wait_for_their_room(monkeypatch):
  """The pixels in work at the same time stay under the limit, in however many threads."""
  data, most, used, lock = encoded(picture(0, (40, 50, 3))), [], [0], threading.Lock()
  monkeypatch.setattr(decode, 'LARGE', 1000)
  monkeypatch.setattr(image_header, 'PIXELS', 2 * 40 * 50)
  monkeypatch.setattr(decode, '_ROOM', Room(2 * 40 * 50, 1000))
  real = decode._decoded

  def slow(image, *rest):
    with lock:
      used[0] += image.width * image.height
      most.append(used[0])
    threading.Event().wait(.02)
    with lock:
      used[0] -= 40 * 50
    return real(image, *rest)
  monkeypatch.setattr(decode, '_decoded', slow)
  threads = [threading.Thread(target=decode.decode, args=(data, 8)) for _ in range(8)]
  for t in threads:
    t.start()
  for t in threads:
    t.join()
  assert len(most) == 8 and max(most) == 2 * 40 * 50 and decode._ROOM.used == 0
  with pytest.raises(BadImage, match='beyond the limits') as e:
    decode.decode(png(101, 40), 8)
  assert e.value.reason == image_header.TOO_LARGE


def test_a_tiff_of_huge_tiles_is_beyond_the_limits():
  tags = {
    256: 64,
    257: 64,
    258: 8,
    259: 5,
    262: 1,
    277: 1,
    322: 28_992,
    323: 28_992,
    324: 8,
    325: 9,
  }  # LZW
  data = (
    b'II*\0'
    + struct.pack('<IH', 8, len(tags))
    + b''.join(struct.pack('<HHII', k, 4, 1, v) for k, v in tags.items())
  )
  with pytest.raises(BadImage, match='28992x28992 pixels are beyond') as e:
    decode.decode(data + bytes(99), 8)
  assert e.value.reason == image_header.TOO_LARGE


def test_a_count_that_no_file_can_hold_is_refused(tmp_path, capsys):
  root = album(tmp_path / 'photos', {'a': 4, 'b': 4})
  prepare(root, capsys=capsys)
  path = next((tmp_path / 'photos-tfds' / 'mine').iterdir()) / 'dataset_info.json'
  said = json.loads(path.read_text())
  for count in (10**10, 10**18):
    said['splits'][0]['shardLengths'] = [str(count)]
    path.write_text(json.dumps(said))
    lines = check(path.parent, code=USAGE, capsys=capsys)
    assert len(lines) == 2 and f'claims {count:,} records, more than the' in lines[0]
    more = [f'--config.data.{k}={v}' for k, v in (('dataset', path.parent), ('test', ''))]
    assert (
      cli.main(
        [
          'train',
          '--config',
          tiny.NAME,
          '--workdir',
          str(tmp_path / 'run'),
          '--config.data.name=tfds',
          '--config.data.size=16',
          *more,
        ]
      )
      == USAGE
    )
    assert f'claims {count:,} records' in capsys.readouterr().err


@pytest.mark.parametrize(
  ('name', 'file', 'member'),
  [
    ('cifar100', 'cifar-100-binary.tar.gz', 'cifar-100-binary/train.bin'),
    ('stl10', 'stl10_binary.tar.gz', 'stl10_binary/train_y.bin'),
    ('cifar10', 'cifar-10-binary.tar.gz', 'zeros'),
  ],
)
@pytest.mark.parametrize('limit', ['total', 'member'])
def test_an_archive_gives_no_more_than_an_honest_one(
  tmp_path, capsys, monkeypatch, name, file, member, limit
):
  import tarfile
  monkeypatch.setitem(archives.UNPACKED, name, 10**6 if limit == 'total' else 10**8)
  monkeypatch.setattr(unpack, 'READ_AT_ONCE', 10**8 if limit == 'total' else 10**6)
  with tarfile.open(tmp_path / file, 'w:gz') as tar:
    for one in ('first', member):
      info = tarfile.TarInfo(one)
      info.size = 2 * 10**6
      tar.addfile(info, io.BytesIO(bytes(info.size)))
  assert (tmp_path / file).stat().st_size < 10**5
  assert (
    cli.main(['data', 'prepare', name, '--src', str(tmp_path), '--root', str(tmp_path / 'root')])
    == USAGE
  )
  lines = capsys.readouterr().err.splitlines()
  words = {
    'total': 'it unpacks to more than 1,000,000 bytes',
    'member': '2,000,000 bytes, which is more than 1,000,000',
  }[limit]
  assert len(lines) == 2 and (
    words in lines[0] or (name == 'cifar10' and limit == 'member' and 'for it lacks' in lines[0])
  )


def test_a_bom_is_no_name(tmp_path):
  (tmp_path / 'list.txt').write_bytes('\ufeffa.png\r\nb.png\n'.encode())
  assert finetune.read_list(tmp_path / 'list.txt') == ['a.png', 'b.png']
  assert unpack.split_names('\ufeffn02 n01'.encode()) == ['n02', 'n01']


def test_what_is_said_to_be_next_takes_the_options_along(tmp_path, capsys):
  root = album(tmp_path / 'photos', {'a': 20, 'b': 20})
  line = prepare(root, '--bits', '12', capsys=capsys)[-1]
  assert '--config.data.bits=12' in shlex.split(line)
  assert (
    '--config.data.bits=12'
    not in prepare(root, '--shrink', '8', '--bits', '12', name='less', capsys=capsys)[-1]
  )
  assert not os.path.exists(root / 'nothing')


# ---- what is missing is said

def test_a_mistyped_folder_is_no_folder(tmp_path, capsys, monkeypatch):
  monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path / 'tfds'))
  monkeypatch.chdir(tmp_path)
  line, fix, *_ = check('PHOTOS', code=2, capsys=capsys)
  assert line == f"eqssl: 'PHOTOS' is no folder here, and no data set that is prepared under {tmp_path / 'tfds'}."
  assert '--root DIR' in fix and 'eqssl data prepare PHOTOS --src FOLDER' in fix
  assert "'cifar10' is not prepared under" in check('cifar10', code=2, capsys=capsys)[0]
  assert "'PHOTOS' does not exist" in prepare('PHOTOS', code=2, capsys=capsys)[0]
  for fails in (lambda: transfer.check_targets(['PHOTOS']), lambda: config_of_data('smoke', {}, 'PHOTOS', tmp_path),
                lambda: folder.make('PHOTOS')):
    with pytest.raises(UserError, match="^'PHOTOS' is (no|not a) folder"):
      fails()


def test_a_folder_without_class_folders_says_so(tmp_path, capsys):
  root = album(tmp_path / 'flat', {'.': 20})
  says = 'no class folders, so no labels: training, embed, neighbors and report work; protocols with accuracies do not'
  assert check(root, capsys=capsys).count(says) == 1 and folder.make(str(root), size=8).problems == (says,)
  assert says in prepare(root, capsys=capsys)


def test_classes_without_test_images_are_named(tmp_path, capsys):
  root = album(tmp_path / 'photos', {'cat': 4, 'dog': 4, 'fox': 1})
  assert check(root, capsys=capsys).count("1 class without images in test (1 image): 'fox'") == 1
  root = tmp_path / 'splits'   # as prepared records
  album(root / 'train', {'cat': 4, 'dog': 4})
  album(root / 'test', {'cat': 4}, start=50)
  prepare(root, capsys=capsys)
  lines = check('mine', '--root', f'{root}-tfds', capsys=capsys)
  assert lines.count("1 class without images in test (4 images): 'dog'") == 1

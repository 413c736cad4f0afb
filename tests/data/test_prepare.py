"""`eqssl data prepare`: it reads official layouts, and writes what TFDS reads.

One test goes from a tar of photographs to an evaluated network.
"""
import io
import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile

import jax
import numpy as np
import pytest
import tensorflow_datasets
import tiny  # noqa: F401 (the ResNet of depth 4)
from PIL import Image

import equivariant_ssl.data
from equivariant_ssl import cli, registry
from equivariant_ssl.config import load_config
from equivariant_ssl.data import archive_files, archives, card, source, stream, tfds, writer
from equivariant_ssl.errors import UserError
from equivariant_ssl.evaluate import evaluation, online
from equivariant_ssl.parallel import sharding
from equivariant_ssl.storage import record
from equivariant_ssl.training import runs

ROOT = pathlib.Path(__file__).parents[2]
SHARED = ROOT.parent / 'shared' / 'data' / 'imagewoof320.tar'


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path_factory.mktemp('cache')))
  monkeypatch.setattr(cli, '_cache', lambda: None)


def encoded(seed: int, kind: str = 'JPEG', mode: str = 'RGB', size=(22, 18)) -> bytes:
  out = io.BytesIO()
  Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)).convert(
    mode
  ).save(out, kind)
  return out.getvalue()


def tar_of(path, files: dict[str, bytes], mode: str = 'w') -> bytes:
  with tarfile.open(path, mode) as tar:
    for name, data in files.items():
      member = tarfile.TarInfo(name)
      member.size = len(data)
      tar.addfile(member, io.BytesIO(data))
  return pathlib.Path(path).read_bytes()


SYNSETS, HELD = (
  tensorflow_datasets.core.tfds_path(f'datasets/imagenet2012/{n}.txt').read_text().split()
  for n in ('labels', 'validation_labels')
)
FIRST, SECOND = SYNSETS[:2]


def ilsvrc(
  folder, classes: dict[str, dict[str, bytes]], val: list[tuple[bytes, str]]
) -> pathlib.Path:
  """The two official tars; each validation image under a number that has its class."""
  folder.mkdir(exist_ok=True)
  inner = {f'{w}.tar': tar_of(folder / 'one.tar', files) for w, files in classes.items()}
  tar_of(folder / 'ILSVRC2012_img_train.tar', inner)
  numbers = {w: [i for i, v in enumerate(HELD, 1) if v == w] for _, w in val}
  tar_of(
    folder / 'ILSVRC2012_img_val.tar',
    {f'ILSVRC2012_val_{numbers[w].pop():08d}.JPEG': d for d, w in val},
  )
  return folder


def prepare(*argv) -> int:
  return cli.main(['data', 'prepare', *map(str, argv)])


def test_imagenet_from_its_official_tars(tmp_path, capsys):
  """The original has a CMYK JPEG, and a PNG named as a JPEG. An image cut short is left out."""
  short = encoded(6, size=(90, 90))[:2000]
  classes = {
    SECOND: {'2_1.JPEG': encoded(0), '2_2.JPEG': encoded(1, mode='CMYK'), '2_3.JPEG': short},
    FIRST: {'1_9.JPEG': encoded(2, 'PNG'), '../1_8.JPEG': encoded(9)},
  }
  src = ilsvrc(
    tmp_path / 'src', classes, [(encoded(3), SECOND), (encoded(4), FIRST), (encoded(5), SECOND)]
  )
  assert prepare('imagenet', '--src', src, '--root', tmp_path) == 0
  out = capsys.readouterr().out
  assert (
    'train/2_3.JPEG: cannot be decoded' in out
    and '3 images of 1,281,167 that were published' in out
  )
  found = tensorflow_datasets.data_source('imagenet2012', data_dir=tmp_path)
  label = found['train'].dataset_info.features['label']
  rows = {r['file_name'].decode(): r for r in found['train']}
  assert {n: label.int2str(int(r['label'])) for n, r in rows.items()} == {
      '1_9.JPEG': FIRST, '2_1.JPEG': SECOND, '2_2.JPEG': SECOND}
  assert sorted(r['label'] for r in found['validation']) == [0, 1, 1] and label.num_classes == 1000
  assert all(
    HELD[int(r['file_name'][15:23]) - 1] == SYNSETS[r['label']] for r in found['validation']
  )
  assert {r['image'].shape for r in rows.values()} == {(22, 18, 3)}  # CMYK too
  made = tfds.make('imagenet2012', str(tmp_path), test='validation', size=8, stream=True)
  assert (
    stream.is_stream(made.train.images)
    and made.classes == tuple(SYNSETS)
    and made.mean == (0.485, 0.456, 0.406)
  )
  assert dict(zip(made.names, made.train.labels, strict=True)) == {
    '1_9.JPEG': 0,
    '2_1.JPEG': 1,
    '2_2.JPEG': 1,
  }
  whole = tfds.make('imagenet2012', str(tmp_path), test='validation', size=8)
  np.testing.assert_array_equal(whole.train.images, np.asarray(made.train.images))
  assert whole.names == made.names
  assert prepare('imagenet', '--src', src, '--root', tmp_path) == 0
  assert 'already there' in capsys.readouterr().out
  assert cli.main(['data', 'check', 'imagenet2012', '--root', str(tmp_path)]) == 0


def test_imagenet_from_folders_is_the_same(tmp_path, capsys):
  """train/ unpacked; val/ flat as the tar has it, in class folders, or still the tar."""
  classes = {w: {f'{w}_{i}.JPEG': encoded(i) for i in range(3)} for w in (SECOND, FIRST)}
  src = ilsvrc(tmp_path / 'tars', classes, [(encoded(3), SECOND), (encoded(4), FIRST)])
  for layout in ('flat', 'sorted'):
    for w, files in classes.items():
      (tmp_path / layout / 'train' / w).mkdir(parents=True)
      for name, data in files.items():
        (tmp_path / layout / 'train' / w / name).write_bytes(data)
    with tarfile.open(src / 'ILSVRC2012_img_val.tar') as tar:
      for member in tar:
        place = (
          tmp_path
          / layout
          / 'val'
          / (HELD[int(member.name[15:23]) - 1] if layout == 'sorted' else '')
        )
        place.mkdir(parents=True, exist_ok=True)
        (place / member.name).write_bytes(tar.extractfile(member).read())
  said = {}
  for layout in (
    src,
    tmp_path / 'flat',
    tmp_path / 'sorted',
    f'{tmp_path}/flat/,{src}/ILSVRC2012_img_val.tar',
  ):
    root = tmp_path / f'root{len(said)}'
    assert prepare('imagenet', '--src', layout, '--root', root) == 0
    said[layout] = {
      f.name: f.read_bytes() for f in (root / 'imagenet2012' / '5.1.0').glob('*array_record*')
    }
  first, *others = said.values()
  assert len(first) == 2 and all(other == first for other in others)
  (tmp_path / 'flat' / 'val' / 'mine.JPEG').write_bytes(encoded(1))
  assert prepare('imagenet', '--src', tmp_path / 'flat', '--root', tmp_path / 'no') == 2
  assert 'mine.JPEG is not in one of the 1,000 classes' in capsys.readouterr().err


def test_the_order_and_the_metadata_are_tfds_own(tmp_path):
  """They are those of TFDS's builder, which needs TensorFlow for more than a gigabyte.

  That holds too where a split takes many files.
  """
  from tensorflow_datasets.core.registered import skip_registration
  from tensorflow_datasets.core.utils import shard_utils

  classes = {
    SECOND: {f'2_{i}.JPEG': encoded(i) for i in range(30)},
    FIRST: {f'1_{i}.JPEG': encoded(i) for i in range(30)},
  }
  src = ilsvrc(tmp_path / 'src', classes, [(encoded(3), SECOND)])
  official = tensorflow_datasets.builder_cls('imagenet2012')
  with skip_registration():
    class Imagenet2012(official):
      __module__ = official.__module__

      def _split_generators(self, manager):
        return {'train': ((name, {'image': data, 'label': w, 'file_name': name})
                          for w, files in classes.items() for name, data in files.items())}
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(
      shard_utils.ShardConfig, 'calculate_number_shards', classmethod(lambda cls, *a: 4)
    )
    Imagenet2012(data_dir=tmp_path / 'theirs', file_format='array_record').download_and_prepare(
        download_config=tensorflow_datasets.download.DownloadConfig(try_download_gcs=False))
    data = archives.imagenet(str(src))
    writer.write(
      data._replace(splits={'train': data.splits['train']}),
      tmp_path / 'ours',
      log=lambda line: None,
    )
  ours, theirs = (
    {f.name: f.read_bytes() for f in (tmp_path / who / 'imagenet2012' / '5.1.0').iterdir()}
    for who in ('ours', 'theirs')
  )
  assert ours.keys() == theirs.keys() and len([n for n in ours if 'array_record' in n]) == 4
  assert all(ours[n] == theirs[n] for n in ours if n != 'dataset_info.json')
  told = [json.loads(files['dataset_info.json']) for files in (ours, theirs)]
  assert {k: v for k, v in told[0].items() if told[1].get(k) != v} == {}
  half = tensorflow_datasets.data_source(
    'imagenet2012', data_dir=tmp_path / 'ours', split='train[:50%]'
  )
  assert 8 <= sum(r['label'] == 0 for r in half) <= 22   # not a class after the other


def test_labels_of_a_stream_are_read_once(tmp_path, capsys, monkeypatch):
  """They are kept beside the data, where other machines find them.

  `data prepare` does so where there are many.
  """
  src = ilsvrc(
    tmp_path / 'src', {FIRST: {f'{i}.JPEG': encoded(i) for i in range(4)}}, [(encoded(3), FIRST)]
  )
  writer.write(archives.imagenet(str(src)), tmp_path, log=lambda line: None)
  for times in (2, 0):  # train and validation
    tfds.make('imagenet2012', str(tmp_path), test='validation', size=8, stream=True)
    assert capsys.readouterr().err.count('labels, once') == times
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'another machine'))
  monkeypatch.setattr(tfds, 'MOST', 0)
  for path in (tmp_path / 'imagenet2012').glob('*/.eqssl-*'):
    path.unlink()
  tfds.keep_labels(next((tmp_path / 'imagenet2012').iterdir()))
  capsys.readouterr()
  made = tfds.make('imagenet2012', str(tmp_path), test='validation', size=8, stream=True)
  assert (
    not capsys.readouterr().err and (made.train.labels == 0).all() and len(made.train.labels) == 4
  )


def test_shrunk_images_are_small_rgb_jpegs(tmp_path):
  src = tmp_path / 'photographs'
  for i, (mode, size) in enumerate((('RGB', (90, 60)), ('L', (64, 128)), ('RGB', (20, 30)))):
    (src / 'train' / 'a').mkdir(parents=True, exist_ok=True)
    (src / 'train' / 'a' / f'{i}.png').write_bytes(encoded(i, 'PNG', mode, size))
  (src / 'val' / 'a').mkdir(parents=True)
  (src / 'val' / 'a' / 'x.png').write_bytes(encoded(7, 'PNG'))
  assert (
    cli.main(
      ['data', 'prepare', 'mine', '--src', str(src), '--root', str(tmp_path), '--shrink', '32']
    )
    == 0
  )
  rows = tensorflow_datasets.data_source(
    'mine', data_dir=tmp_path, decoders={'image': tensorflow_datasets.decode.SkipDecoding()}
  )
  assert (
    all(r['image'][:3] == b'\xff\xd8\xff' for r in rows['train']) and len(rows['validation']) == 1
  )
  sizes = {r['file_name'].decode(): Image.open(io.BytesIO(r['image'])).size for r in rows['train']}
  assert sizes == {'a/0.png': (32, 48), 'a/1.png': (64, 32), 'a/2.png': (30, 20)}


def photographs(src, *splits) -> pathlib.Path:
  """Class folders, in the folders of `splits`; names and a class that are not UTF-8."""
  for split in splits:
    for k, name in enumerate(
      ('b/1.jpg', 'b/2.jpg', 'b/bad\udcff.jpg', 'cl\udcffass/1.jpg', 'cl\udcffass/2.jpg')
    ):
      (src / split / name).parent.mkdir(parents=True, exist_ok=True)
      (src / split / name).write_bytes(encoded(k))
  return src


def test_names_that_are_not_utf8_are_escaped(tmp_path, capsys):
  src = photographs(tmp_path / 'src', '')
  (src / 'b' / 'link\udcff.jpg').symlink_to('/nowhere')
  assert prepare('mine', '--src', src, '--root', tmp_path / 'root') == 0
  assert r'  b/link\xff.jpg: cannot be opened' in capsys.readouterr().out   # not train/b
  rows = tensorflow_datasets.data_source('mine', data_dir=tmp_path / 'root', split='train')
  assert {r['file_name'].decode(): int(r['label']) for r in rows} == {
      'b/1.jpg': 0, 'b/2.jpg': 0, r'b/bad\xff.jpg': 0, r'cl\xffass/1.jpg': 1, r'cl\xffass/2.jpg': 1}
  assert rows.dataset_info.features['label'].names == ['b', r'cl\xffass']
  assert cli.main(['data', 'check', 'mine', '--root', str(tmp_path / 'root')]) == 0
  assert cli.main(['data', 'check', str(src)]) == source.BAD_DATA
  assert r'cl\xffass 2' in capsys.readouterr().out


@pytest.mark.parametrize('splits', [('',), ('train', 'val'), ('train', 'test')])
def test_what_is_said_to_be_next_works(tmp_path, capsys, splits):
  src = photographs(tmp_path / 'src', *splits)
  assert prepare('mine', '--src', src, '--root', tmp_path / 'a root') == 0
  line, = (line for line in capsys.readouterr().out.splitlines() if line.startswith('Next: '))
  eqssl, train, flag, name, _, _, *overrides = shlex.split(line.removeprefix('Next: '))
  assert (eqssl, train, flag) == ('eqssl', 'train', '--config')
  config = load_config(name, cli.parse_overrides(overrides, has_config=True))
  made = registry.make(
    equivariant_ssl.data, config.data.name, **{k: v for k, v in config.data.items() if k != 'name'}
  )
  assert (len(made.train.images), len(made.test.images)) == ((4, 1) if splits == ('',) else (5, 5))
  assert config.fit_batch and config.size == 64 and made.train.images.shape[1] == 80


def test_what_is_next_names_the_version_where_a_newer_one_is_there(tmp_path, capsys):
  """TFDS has a data set of this name in the root already."""
  root, src = tmp_path / 'root', photographs(tmp_path / 'src', '')
  command = ['food101', '--src', src, '--root', root]
  assert prepare(*command) == 0
  assert '--config.data.dataset=food101 ' in capsys.readouterr().out
  shutil.move(root / 'food101' / '1.0.0', root / 'food101' / '2.0.0')
  assert prepare(*command) == 0
  overrides = shlex.split(capsys.readouterr().out.splitlines()[-1])[6:]
  overrides = [word for word in overrides if word.startswith('--config.data.')]
  data = load_config('photos', cli.parse_overrides(overrides, has_config=True)).data
  assert data.dataset == 'food101:1.0.0'
  assert tfds.find_version(data.dataset, data.root) == root / 'food101' / '1.0.0'


def test_cifar100_and_stl10(tmp_path):
  rng = np.random.default_rng(0)
  fine, coarse = [f'f{i}' for i in range(100)], [f'c{i}' for i in range(20)]
  drawn = lambda n: np.concatenate(
    [rng.integers(0, m, (n, k)) for m, k in ((20, 1), (100, 1), (256, 3072))], axis=1
  )
  records = {s: drawn(n).astype(np.uint8) for s, n in (('train', 6), ('test', 3))}
  tar_of(tmp_path / 'cifar-100-binary.tar.gz', {
      **{f'cifar-100-binary/{s}.bin': r.tobytes() for s, r in records.items()},
      'cifar-100-binary/fine_label_names.txt': '\n'.join(fine).encode(),
      'cifar-100-binary/coarse_label_names.txt': '\n'.join(coarse).encode()}, 'w:gz')
  assert (
    cli.main(['data', 'prepare', 'cifar100', '--src', str(tmp_path), '--root', str(tmp_path)]) == 0
  )
  found = tensorflow_datasets.data_source('cifar100', data_dir=tmp_path)
  for row in found['train']:
    r = records['train'][int(row['id'][-5:])]
    assert (row['coarse_label'], row['label']) == (r[0], r[1])
    np.testing.assert_array_equal(row['image'], r[2:].reshape(3, 32, 32).transpose(1, 2, 0))
  assert (
    len({row['id'] for row in found['train']}) == 6
    and found['train'].dataset_info.features['label'].names == fine
  )
  assert tfds.make('cifar100', str(tmp_path)).train.images.shape == (6, 32, 32, 3)  # its own size
  images = {
    s: rng.integers(0, 256, (2, 3, 96, 96), np.uint8) for s in ('train', 'test', 'unlabeled')
  }
  tar_of(
    tmp_path / 'stl10_binary.tar.gz',
    {
      **{f'stl10_binary/{s}_X.bin': x.tobytes() for s, x in images.items()},
      **{f'stl10_binary/{s}_y.bin': bytes([10, 1]) for s in ('train', 'test')},
      'stl10_binary/class_names.txt': b'airplane\nbird\ncar\ncat\ndeer\n'
      b'dog\nhorse\nmonkey\nship\ntruck\n',
    },
    'w:gz',
  )
  assert (
    cli.main(
      [
        'data',
        'prepare',
        'stl10',
        '--src',
        str(tmp_path / 'stl10_binary.tar.gz'),
        '--root',
        str(tmp_path),
      ]
    )
    == 0
  )
  found = tensorflow_datasets.data_source('stl10', data_dir=tmp_path)
  assert [sorted(r['label'] for r in found[s]) for s in ('train', 'unlabelled')] == [
    [0, 9],
    [-1, -1],
  ]
  by_label = {r['label']: r['image'] for r in found['test']}
  np.testing.assert_array_equal(by_label[0], images['test'][1].transpose(2, 1, 0))
  assert found['test'].dataset_info.features['image'].shape == (96, 96, 3)
  assert cli.main(['data', 'check', 'stl10', '--root', str(tmp_path)]) == 0
  # A run on all of it, of which half has no labels, is evaluated with those of the labeled split.
  config = load_config(
    'stl10_simclr_augself', {'data.root': str(tmp_path), 'batch': '2', 'encoder.width': '4'}
  )
  run = runs.prepare_run(config, sharding.mesh(jax.devices()[:1]))
  assert run.source.train.labels is None and len(run.source.train.images) == 4
  assert sorted(run.source.bank.labels) == [0, 9] and run.source.bank.images.shape == (2, 96, 96, 3)
  assert evaluation.unmet_need(run, 'labels') is None and online.monitor(run)
  without = run._replace(source=run.source._replace(labeled=None))
  assert card.has_labels(run.card) and not run.card.classes
  assert not card.has_labels(card.make_card(without.source, config))
  assert '--config.data.labeled=SPLIT' in evaluation.unmet_need(without, 'labels')[1]
  other = card.make_card(
    run.source._replace(labeled=run.source.labeled._replace(labels=np.array([1, 1]))), config
  )
  assert (
    card.data_mark(other) != card.data_mark(run.card) == card.data_mark(card.card_from_json(card.card_to_json(run.card)))
  )
  assert card.card_differences(run.card, other) == ['the labeled images have other labels']


def test_tiny_imagenet(tmp_path):
  with zipfile.ZipFile(tmp_path / 'tiny-imagenet-200.zip', 'w') as z:
    z.writestr('tiny-imagenet-200/wnids.txt', 'n02\nn01\n')
    for w in ('n01', 'n02'):
      z.writestr(f'tiny-imagenet-200/train/{w}/images/{w}_0.JPEG', encoded(1))
    z.writestr('tiny-imagenet-200/val/val_annotations.txt', 'val_0.JPEG\tn02\t0\t0\t62\t57\n')
    z.writestr('tiny-imagenet-200/val/images/val_0.JPEG', encoded(2))
    z.writestr('tiny-imagenet-200/test/images/test_0.JPEG', encoded(2))
  assert (
    cli.main(['data', 'prepare', 'tiny-imagenet', '--src', str(tmp_path), '--root', str(tmp_path)])
    == 0
  )
  found = tensorflow_datasets.data_source('tiny_imagenet', data_dir=tmp_path)
  assert sorted(r['label'] for r in found['train']) == [0, 1] and [
    r['label'] for r in found['validation']
  ] == [1]


@pytest.mark.parametrize(
  ('argv', 'words'),
  [
    (('imagenet',), '--src says where'),
    (('imagenet', '--src', '.'), 'has neither'),
    (('cifar100', '--src', '/none'), 'does not exist'),
    (('Mine!', '--src', '.'), 'cannot be the name'),
    (('mine', '--src', 'setup.cfg'), 'not a folder'),
    (('mine', '--src', '.', '--shrink', '-1'), 'is not a side'),
    (('mine', '--src', 'tests,docs'), '--src names 2 paths, and mine is made from one'),
    (('stl10', '--src', 'tests,docs'), '--src names 2 paths, and stl10 is made from one'),
    (('mine', '--src', ' , '), '--src names nothing'),
  ],
)
def test_mistakes_are_a_line(argv, words, capsys, tmp_path, monkeypatch):
  monkeypatch.chdir(pathlib.Path(__file__).parents[2])
  assert cli.main(['data', 'prepare', *argv, '--root', str(tmp_path)]) == 2
  assert words in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_folder_may_have_a_comma_in_its_name(tmp_path):
  photographs(tmp_path / 'Paris, 2019', '')
  (tmp_path / 'Paris').mkdir()
  path, = archive_files.source_paths(f'{tmp_path}/Paris, 2019')
  assert path == tmp_path / 'Paris, 2019' and archives.named_dataset('mine', str(path)).splits
  both = archive_files.source_paths(f'{tmp_path}/Paris, {tmp_path}')
  assert both == [tmp_path / 'Paris', tmp_path]


def test_a_broken_archive_or_a_full_disk_leaves_nothing(tmp_path, capsys, monkeypatch):
  classes = {w: {f'{w}_{i}.JPEG': encoded(i) for i in range(20)} for w in (FIRST, SECOND)}
  src = ilsvrc(tmp_path / 'src', classes, [(encoded(3), FIRST)])
  root = tmp_path / 'root'
  monkeypatch.setattr(writer.shutil, 'disk_usage', lambda path: type('Usage', (), {'free': 10})())
  assert cli.main(['data', 'prepare', 'imagenet', '--src', str(src), '--root', str(root)]) == 2
  err = capsys.readouterr().err
  assert (
    '--shrink' in err and '0.0 KiB left' in err and 'KiB, and' in err and not list(root.iterdir())
  )
  monkeypatch.undo()
  torn = src / 'ILSVRC2012_img_train.tar'
  with tarfile.open(torn) as tar:
    between = tar.getmembers()[1].offset
  for cut, why in (
    (between, 'it is cut short'),
    (9000, 'unexpected end'),
  ):  # tarfile takes the first for a whole one
    torn.write_bytes(torn.read_bytes()[:cut])
    with pytest.raises(UserError, match=f'cannot be read as imagenet: {why}'):
      writer.write(archives.imagenet(str(src)), root, log=lambda line: None)
  assert not list(root.iterdir())
  many = {FIRST: {f'{i}.JPEG': encoded(i) if i > 2 else b'' for i in range(20)}}
  with pytest.raises(UserError, match='3 of 20 images cannot be decoded') as e:
    writer.write(
      archives.imagenet(str(ilsvrc(src, many, [(encoded(3), FIRST)]))), root, log=lambda line: None
    )
  assert e.value.code == source.BAD_DATA and not list(root.iterdir())


def test_what_a_killed_process_left_goes(tmp_path):
  """And what another process is at stays."""
  src = ilsvrc(tmp_path / 'src', {FIRST: {'1_1.JPEG': encoded(0)}}, [(encoded(3), SECOND)])
  dead, alive = (
    tmp_path / 'root' / f'.preparing-imagenet2012-{name}' for name in ('dead', 'alive')
  )
  for folder in (dead, alive):
    (folder / 'imagenet2012' / '5.1.0').mkdir(parents=True)
  with record.lock_folder(alive):
    for folder in (dead, alive):
      os.utime(folder, (0, 0))
    writer.write(archives.imagenet(str(src)), tmp_path / 'root', log=lambda line: None)
  assert {p.name for p in (tmp_path / 'root').iterdir()} == {'imagenet2012', alive.name}


# -- from tar to result

def woof(tmp_path, train: int, val: int) -> pathlib.Path:
  """The real photographs in ImageNet's official files: so many of each of ten classes."""
  if not SHARED.exists():
    pytest.skip('the photographs of ../shared/data are not here')
  classes, held = {}, []
  with tarfile.open(SHARED) as tar:
    for member in sorted(
      (m for m in tar if m.isfile() and m.name.endswith('.JPEG')), key=lambda m: m.name
    ):
      _, split, wnid, name = member.name.split('/')
      mine = classes.setdefault(wnid, {})
      if split == 'train' and len(mine) < train:
        mine[name] = tar.extractfile(member).read()
      elif split == 'val' and sum(w == wnid for _, w in held) < val:
        held.append((tar.extractfile(member).read(), wnid))
  return ilsvrc(tmp_path / 'official', classes, held)


def path_of_imagenet(
  tmp_path, train: int, val: int, name: str, *config: str, main=cli.main
) -> tuple[dict, list[dict]]:
  """Tar to result on the command line; (kNN's result, the rows of the log)."""
  src = woof(tmp_path, train, val)
  assert (
    main(
      ['data', 'prepare', 'imagenet', '--src', str(src), '--root', str(tmp_path), '--shrink', '160']
    )
    == 0
  )
  data = {
    'name': 'tfds',
    'dataset': 'imagenet2012',
    'root': str(tmp_path),
    'test': 'validation',
    'stream': True,
  }
  where, run = (
    [f'--config.data.{k}={v}' for k, v in data.items() if k != 'name'],
    str(tmp_path / 'run'),
  )
  assert main(['train', '--config', name, '--workdir', run, *where, *config, '--quiet']) == 0
  assert main(['eval', run, '--protocol', 'knn']) == 0
  found = json.loads((tmp_path / 'run' / 'eval' / 'knn.json').read_text())['trained'][0]
  return found, [
    json.loads(line) for line in (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()
  ]


def test_the_imagenet_path_in_miniature(tmp_path):
  found, rows = path_of_imagenet(
    tmp_path,
    4,
    1,
    'imagenet_simclr',
    '--config.size=32',
    '--config.data.size=40',
    '--config.batch=8',
    '--config.steps=3',
    '--config.log_every=1',
    '--config.dtype=float32',
    *(f'--config.augment.{op}.role=off' for op in ('jitter', 'gray', 'blur')),
    "--config.encoder={'name':'resnet','depth':4,'stem':'half','width':4}",
    "--config.invariance={'name':'simclr','projector':{'hidden':(8,),'out':8}}",
  )
  assert [r['step'] for r in rows] == [1, 2, 3] and all(
    np.isfinite(r['loss']) and ('data_wait' in r) == (r['step'] > 1) for r in rows
  )
  assert 0 <= found['numbers']['top1'] <= 1 and found['controls']['top1'][
    'chance'
  ] == pytest.approx(0.1)


@pytest.mark.slow
def test_the_imagenet_path_on_all_the_photographs(tmp_path):
  def main(args: list[str]) -> int:  # as a user's: a process of its own, with XLA's optimization
    env = {**os.environ, 'XLA_FLAGS': ''}
    return subprocess.run(
      [sys.executable, '-m', 'equivariant_ssl.cli', *args], cwd=ROOT, env=env
    ).returncode

  found, rows = path_of_imagenet(
    tmp_path,
    55,
    20,
    'imagenet_simclr_equimod',
    '--config.size=64',
    '--config.data.size=72',
    '--config.batch=50',
    '--config.epochs=5',
    '--config.log_every=11',
    '--config.dtype=float32',
    "--config.encoder={'name':'resnet','depth':18,'stem':'imagenet','width':64}",
    "--config.optimizer={'name':'adamw','lr':1e-3,'warmup_epochs':1.}",
    main=main,
  )
  assert rows[-1]['step'] == 55 and rows[-1]['loss'] < rows[0]['loss']
  print(found['numbers'], found['controls'])

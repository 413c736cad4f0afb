"""Embedding files: every form has the evaluation's features, images that cannot be read are listed,
and neighbors are those of a brute-force search."""

import functools
import html
import importlib.util
import os
import pathlib
import shlex
import shutil

import jax
import numpy as np
import pytest
from jax.tree_util import Partial
from PIL import Image as Pillow

from equivariant_ssl import cli
from equivariant_ssl.config import config_to_json, load_config
from equivariant_ssl.data import source
from equivariant_ssl.data.decode import decode
from equivariant_ssl.errors import BAD_DATA, USAGE, UserError
from equivariant_ssl.evaluate.frozen import frozen, variables
from equivariant_ssl.evaluate.transfer import central_features
from equivariant_ssl.parallel import sharding
from equivariant_ssl.report import embed, embeddings
from equivariant_ssl.report.embeddings import ImageFeatures
from equivariant_ssl.storage import checkpoint, record
from equivariant_ssl.training import runs

ENCODER = functools.cache(embed._encoder)  # a second each
FORMS = ('npz', 'csv', 'parquet')
NAMES = ('a/0.png', 'a/1.png', 'a/2.jpg', 'b/3.png', 'b/4, "5".png', 'b/6\n.png', 'top.gif')


@pytest.fixture(autouse=True)
def one_encoder(monkeypatch):
  monkeypatch.setattr(embed, '_encoder', ENCODER)


def started(workdir, **overrides):
  """A run on the digits that has a checkpoint of its first state."""
  config = load_config('smoke', overrides)
  run = runs.prepare_run(config, sharding.mesh(jax.devices()[:1]))
  record.start_record(workdir, config_to_json(config), 'eqssl train')
  with checkpoint.open_checkpoints(workdir / 'checkpoints') as saved:
    saved.save(0, runs.initial_state(run), {}, wait=True)
  return run


@pytest.fixture(scope='module')
def world(tmp_path_factory):
  """The folder of a run, the run, and a folder of images.

  Seven images are wide or high; three files cannot be read.
  """
  root = tmp_path_factory.mktemp('world')
  run = started(root / 'run')
  photos, random = root / 'photos', np.random.RandomState(0)
  for i, name in enumerate(NAMES):
    (photos / name).parent.mkdir(parents=True, exist_ok=True)
    noise = random.randint(0, 256, (4, 4 + i, 3)).astype(np.uint8).repeat(6, 0).repeat(6, 1)
    Pillow.fromarray(noise if i % 2 else noise.swapaxes(0, 1)).save(photos / name)
  (photos / 'a' / 'no.png').write_bytes(b'no')
  png = (photos / 'a' / '0.png').read_bytes()
  (photos / 'b' / 'torn.png').write_bytes(png[: len(png) // 2])
  (photos / 'b' / 'notes.txt').write_text('not an image')
  os.symlink(root / 'run', photos / 'away')
  return root / 'run', run, photos


@pytest.fixture(scope='module')
def written(world):
  """The same embeddings in each form: {form: file}."""
  workdir, _, photos = world
  files = {form: workdir.parent / f'all.{form}' for form in FORMS}
  embed.embed(workdir, str(photos), str(files['npz']))
  for form in FORMS[1:]:
    embeddings.save(files[form], embeddings.read(files['npz']))
  return files


def by_evaluation(world, paths):
  workdir, run, photos = world
  canvases = [decode((photos / p).read_bytes(), run.recipe.size) for p in paths]
  split = source.Split(
    np.stack([c for c, _ in canvases]), np.array([s for _, s in canvases], np.float32), None
  )
  state = checkpoint.load_checkpoint(workdir / 'checkpoints', runs.abstract_state(run))[1]
  return central_features(Partial(frozen(run.recipe).encode, variables(state)), split, run.recipe.size)


def test_features_are_the_evaluations(world, written):
  stored = embeddings.read(written['npz'])
  assert (
    stored.paths == [str(world[2] / name) for name in sorted(NAMES)]
    and stored.features.dtype == np.float32
  )
  np.testing.assert_allclose(
    stored.features, by_evaluation(world, sorted(NAMES)), rtol=1e-4, atol=1e-5
  )
  assert np.ptp(stored.features, axis=0).max() > 0.01


def test_every_form_says_the_same(world, written):
  stored = [embeddings.read(written[form]) for form in FORMS]
  for one in stored:
    assert one.paths == stored[0].paths
    np.testing.assert_array_equal(one.features, stored[0].features)  # bitwise
    folders = [pathlib.Path(path).parent for path in one.paths]
    assert one.classes == [folder.name if folder != world[2] else '' for folder in folders]
  with np.load(written['npz']) as archive:
    assert set(archive) == {'paths', 'classes', 'features', 'run', 'step', 'digest', 'mark'}
  assert (
    stored[0].origin == stored[2].origin == ENCODER(world[0], None, '').origin
    and stored[1].origin is None
  )
  assert written['csv'].read_text().startswith('path,class,f0,f1,')
  import pyarrow.parquet

  column = pyarrow.parquet.read_table(written['parquet']).schema.field('features').type
  assert (
    str(column).startswith('fixed_size_list<') and column.list_size == stored[0].features.shape[1]
  )


def test_a_csv_with_columns_of_text(tmp_path):
  """One that this version wrote, one of an older version, and one of another program."""
  for head, rows in (('path,class,f0,f1', ('a.png,cat,1,2', 'b.png,,3,4')), ('path,f0,f1', ('a.png,1,2', 'b.png,3,4')),
                     ('name,kind,0,note,1', ('a.png,cat,1,good,2', 'b.png,dog,3,bad,4'))):
    (tmp_path / 'e.csv').write_text('\n'.join((head, *rows)) + '\n')
    stored = embeddings.read(tmp_path / 'e.csv')
    assert stored.paths == ['a.png', 'b.png'] and stored.features.tolist() == [[1., 2.], [3., 4.]]
    assert stored.classes == (['cat', ''] if 'class' in head else None)
  assert embed.find_neighbors(str(tmp_path / 'e.csv'), 'a.png')[0][0] == 'b.png'
  (tmp_path / 'e.csv').write_text('path,note\na.png,good\n')
  with pytest.raises(UserError, match='no embeddings'):
    embeddings.read(tmp_path / 'e.csv')


def test_in_pieces_and_what_cannot_be_read_is_said(world, written, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(embed, 'CHUNK', 3)
  monkeypatch.setattr(embed, 'BATCH', 4)
  workdir, _, photos = world
  counts, real = [], source.decode_records
  monkeypatch.setattr(
    source, 'decode_records', lambda records, size: (counts.append(records.count), real(records, size))[1]
  )
  assert embed.embed(workdir, str(photos), str(tmp_path / 'e.csv')) == 3
  assert max(counts) == 3 and len(counts) == 3  # canvases at a time
  out, err = capsys.readouterr()
  lines = err.splitlines()
  assert lines[:2] == [
    'left out: .txt 1, damaged 1, links to folders 1; 8 images are read',
    'links are followed with --links',
  ]
  lines = lines[2:]
  assert len(lines) == 3 and all(
    any(name in line for line in lines) for name in ('a/no.png', 'b/torn.png', 'away')
  )
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(cli, '_cache', lambda: None)
  words = shlex.split(out.splitlines()[-1])
  assert words[:3] == ['Next:', 'eqssl', 'neighbors'] and cli.main(words[2:]) == 0
  assert (tmp_path / 'nearest.html').exists() and 'rank  cosine' in capsys.readouterr().out
  assert '3 left out' in out and '7 images' in out and '6 of 8 images' in out
  at_once, pieces = embeddings.read(written['npz']), embeddings.read(tmp_path / 'e.csv')
  assert pieces.paths == at_once.paths
  np.testing.assert_allclose(pieces.features, at_once.features, rtol=1e-4, atol=1e-5)


def test_one_image(world, tmp_path):
  workdir, _, photos = world
  os.symlink(photos / 'a' / '1.png', tmp_path / 'link.png')
  assert embed.embed(workdir, str(tmp_path / 'link.png'), str(tmp_path / 'one.npz')) == 0
  stored = embeddings.read(tmp_path / 'one.npz')
  assert stored.paths == [str(tmp_path / 'link.png')]
  np.testing.assert_allclose(
    stored.features, by_evaluation(world, ['a/1.png']), rtol=1e-4, atol=1e-5
  )
  with pytest.raises(UserError, match='no image that can be read') as e:
    embed.embed(workdir, str(photos / 'b' / 'torn.png'), str(tmp_path / 'none.npz'))
  assert e.value.code == BAD_DATA and not (tmp_path / 'none.npz').exists()


def test_mistakes_are_found_before_anything_is_computed(world, tmp_path, monkeypatch):
  workdir, _, photos = world
  monkeypatch.setattr(embed, '_encoder', lambda *args: pytest.fail('it began to compute'))
  (tmp_path / 'empty').mkdir()
  real = importlib.util.find_spec
  monkeypatch.setattr(
    importlib.util, 'find_spec', lambda name, *a: None if name == 'pyarrow' else real(name, *a)
  )
  (tmp_path / 'torn').mkdir()
  (tmp_path / 'torn' / 'x.png').write_bytes(b'no image')
  for images, out, match in (
    (photos, 'e.json', r"'\.json'"),
    (photos, 'e', 'form of embeddings'),
    (photos, 'e.parquet', 'pip install pyarrow'),
    (photos, 'nowhere/e.npz', 'mkdir -p'),
    (tmp_path / 'empty', 'e.npz', 'no image'),
    (tmp_path / 'torn', 'e.npz', 'no image'),
    (tmp_path / 'nowhere', 'e.npz', 'no folder'),
  ):
    with pytest.raises(UserError, match=match) as e:
      embed.embed(workdir, str(images), str(tmp_path / out))
    assert len(str(e.value).splitlines()) == 2
    assert e.value.code == (BAD_DATA if images == tmp_path / 'torn' else USAGE)
  assert sorted(p.name for p in tmp_path.iterdir()) == ['empty', 'torn']


@pytest.mark.parametrize('form', FORMS)
def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch, form):
  path, old = tmp_path / f'e.{form}', ImageFeatures(['a'], np.ones((1, 2), np.float32))
  embeddings.save(path, old)
  before, kind = path.read_bytes(), embeddings.FORMS[f'.{form}']

  def torn(target, stored):
    kind.write(target, stored)
    target.write_bytes(target.read_bytes()[:10])
    raise OSError('disk full')

  monkeypatch.setitem(embeddings.FORMS, f'.{form}', kind._replace(write=torn))
  for target in (path, tmp_path / f'new.{form}'):
    with pytest.raises(OSError, match='disk full'):
      embeddings.save(target, old)
  assert [p.name for p in tmp_path.iterdir()] == [f'e.{form}'] and path.read_bytes() == before
  path.write_bytes(before[: len(before) // 2])
  with pytest.raises(UserError, match=f'e.{form}'):
    embeddings.read(path)


def test_a_name_that_is_no_text_is_kept_readable(tmp_path):
  name = embed.as_text('b\udce9.png')
  for form in FORMS:
    embeddings.save(tmp_path / f'e.{form}', ImageFeatures([name], np.ones((1, 2), np.float32)))
    assert embeddings.read(tmp_path / f'e.{form}').paths == ['b\\xe9.png']


@pytest.fixture
def random_file(tmp_path):
  """A file of 30 random embeddings, two of them parallel."""
  h = np.random.RandomState(0).randn(30, 5).astype(np.float32)
  h[20] = 3 * h[7]
  stored = ImageFeatures([f'photos/{i}.png' for i in range(30)], h)
  embeddings.save(tmp_path / 'e.npz', stored)
  return str(tmp_path / 'e.npz'), stored


def test_neighbors_are_brute_force(random_file, capsys, monkeypatch):
  file, (paths, h, *_) = random_file
  x = h.astype(np.float64) / np.linalg.norm(h.astype(np.float64), axis=1, keepdims=True)
  for query in (7, 20, 3):
    cosines = x @ x[query]
    cosines[query] = -2.0
    expected = np.argsort(-cosines, kind='stable')[:29]
    near = embed.find_neighbors(file, paths[query], 29)
    assert [p for p, _ in near] == [paths[i] for i in expected]
    np.testing.assert_allclose([c for _, c in near], cosines[expected], atol=1e-12)
    lines = capsys.readouterr().out.splitlines()
    assert lines.pop(0) == 'rank  cosine of the features (1 is the same direction), and image'
    assert (
      lines[0].split() == ['1', f'{cosines[expected[0]]:.3f}', paths[expected[0]]]
      and len(lines) == 29
    )
  assert embed.find_neighbors(file, paths[20], 1)[0] == (paths[7], pytest.approx(1.0))
  assert embed.find_neighbors(file, './photos/../photos/20.png', 1)[0][0] == paths[7]


def test_mistakes_of_a_query_are_one_line(random_file, world, tmp_path):
  file, (paths, *_) = random_file
  (tmp_path / 'no.png').write_bytes(b'no')
  for args, match in (
    ((file, 'photos/x.png'), 'not among the 30 images'),
    ((file, paths[0], 30), 'has 29 other images'),
    ((file, paths[0], 0), 'Give a number from 1 to 29'),
    ((file, 'photos/x.png', 3, world[0]), 'is no file'),
    ((file, str(tmp_path / 'no.png'), 3, world[0]), 'not a JPEG'),
    ((file, str(world[2] / 'top.gif'), 3, world[0]), 'has 5 features per image'),
    ((str(tmp_path / 'none.npz'), 'x'), 'cannot be read'),
  ):
    with pytest.raises(UserError, match=match) as e:
      embed.find_neighbors(*args)
    assert len(str(e.value).splitlines()) == 2, e.value


def test_any_image_may_be_asked_with_the_run(world, written, tmp_path, capsys):
  workdir, _, photos = world
  (tmp_path / 'copy.png').write_bytes((photos / 'b' / '3.png').read_bytes())
  near = embed.find_neighbors(
    str(written['csv']), str(tmp_path / 'copy.png'), 7, workdir, str(tmp_path / 'near.html')
  )
  assert near[0] == (str(photos / 'b' / '3.png'), pytest.approx(1.0, abs=1e-5)) and len(near) == 7
  text = html.unescape((tmp_path / 'near.html').read_text())
  assert (
    text.count('<img ') == 8
    and '://' not in text
    and f'1. cosine {near[0][1]:.3f}; {near[0][0]}"' in text
  )
  assert str(tmp_path / 'near.html') in capsys.readouterr().out


def test_another_run_is_refused(world, written, tmp_path):
  """A run of the same width is refused; a copy of the run that made the file is accepted."""
  workdir, _, photos = world
  (tmp_path / 'copy.png').write_bytes((photos / 'b' / '3.png').read_bytes())
  started(tmp_path / 'other', seed='1')
  with pytest.raises(
    UserError, match=r'all.npz was made by step 0 of .*run, and step 0 of .*other has other weights'
  ) as e:
    embed.find_neighbors(str(written['npz']), str(tmp_path / 'copy.png'), 3, str(tmp_path / 'other'))
  assert len(str(e.value).splitlines()) == 2 and f'--run {workdir};' in str(e.value)
  shutil.copytree(workdir, tmp_path / 'moved')
  assert embed.find_neighbors(
    str(written['npz']), str(tmp_path / 'copy.png'), 1, str(tmp_path / 'moved')
  )


def test_fewer_images_than_are_shown_of_themselves(random_file, tmp_path, capsys):
  few = ImageFeatures([f'{i}.png' for i in range(4)], random_file[1].features[:4])
  embeddings.save(tmp_path / 'few.npz', few)
  assert (
    len(embed.find_neighbors(str(tmp_path / 'few.npz'), '0.png'))
    == 3
    == len(capsys.readouterr().out.splitlines()[1:])
  )
  with pytest.raises(UserError, match='few.npz has 3 other images'):
    embed.find_neighbors(str(tmp_path / 'few.npz'), '0.png', 4)
  embeddings.save(tmp_path / 'one.npz', ImageFeatures(['0.png'], few.features[:1]))
  with pytest.raises(UserError, match='no other image than'):
    embed.find_neighbors(str(tmp_path / 'one.npz'), '0.png')
  with pytest.raises(UserError, match='is a folder, not a file'):
    embed.find_neighbors(str(tmp_path / 'few.npz'), '0.png', out=str(tmp_path))


def test_a_picture_that_is_gone_is_said_on_the_page(random_file, tmp_path):
  embed.find_neighbors(random_file[0], 'photos/3.png', 2, out=str(tmp_path / 'near.html'))
  assert (
    html.unescape((tmp_path / 'near.html').read_text()).count('not shown: cannot be opened') == 6
  )  # alt and line

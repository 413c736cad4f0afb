"""A run's data card, through the command line.

What the card says stays, changes of the data are reported, and data that moved are found.
"""
import json
import os
import shutil

import jax
import numpy as np
import one_process
import pytest
from PIL import Image

from equivariant_ssl import cli
from equivariant_ssl.config import config_to_json, load_config, read_config
from equivariant_ssl.data import tfds
from equivariant_ssl.data.card import (
  card_differences,
  card_from_json,
  card_to_json,
  data_mark,
  read_card,
)
from equivariant_ssl.errors import NO_CHECKPOINT, OTHER_CONFIG, OTHER_DATA
from equivariant_ssl.parallel import sharding
from equivariant_ssl.report import embeddings
from equivariant_ssl.storage import checkpoint, record
from equivariant_ssl.training import runs

IMAGES, STEPS = 60, 9  # three epochs of three steps


def photos(folder, start, stop, shade=0):
  """Images number start to stop, of two classes, of noise over a color of their class."""
  for i in range(start, stop):
    place = folder / 'ab'[i % 2]
    place.mkdir(parents=True, exist_ok=True)
    noise = (
      np.random.default_rng(i).integers(shade, 128 + shade, (12, 10, 3))
      + np.array([[60, 0, 0], [0, 0, 60]])[i % 2]
    )
    Image.fromarray(noise.astype(np.uint8)).save(place / f'{i:03d}.png')


def command(folder, workdir, *more):
  return (
    'train',
    '--config',
    one_process.__file__,
    '--workdir',
    workdir,
    '--quiet',
    '--config.data.name=folder',
    f'--config.data.path={folder}',
    '--config.data.size=8',
    '--config.data.test=.2',
    '--config.steps=0',
    '--config.epochs=3',
    *more,
  )


def eqssl(capsys, *argv):
  """(exit code, stdout and stderr) of a command."""
  code = cli.main([str(a) for a in argv])
  return code, ''.join(capsys.readouterr())


@pytest.fixture(autouse=True)
def _no_cache(monkeypatch):
  monkeypatch.setattr(cli, '_cache', lambda: None)


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """A folder with the run `run`, finished, and the `photos` that it was trained on."""
  world, before = tmp_path_factory.mktemp('card'), os.getcwd()
  photos(world / 'photos', 0, IMAGES)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(cli, '_cache', lambda: None)
    patch.chdir(world)
    assert cli.main([str(a) for a in command('photos', 'run')]) == 0  # relative paths
  assert os.getcwd() == before
  return world


@pytest.fixture
def world(trained, tmp_path):
  """A copy of it that may be changed, its config too: as if it had been made there."""
  shutil.copytree(trained, tmp_path / 'w')
  config = tmp_path / 'w' / 'run' / 'config.json'
  config.write_text(config.read_text().replace(str(trained), str(tmp_path / 'w')))
  return tmp_path / 'w'


def rows(workdir):
  return record.read_metrics(workdir)


def sealed(workdir):
  """The card in the newest checkpoint."""
  return card_from_json(
    checkpoint.load_checkpoint(workdir / 'checkpoints', {'step': jax.ShapeDtypeStruct((), 'int32')})[2]['data']
  )


def rewind(workdir):
  """The run as it was at an earlier step, one that an epoch does not end at."""
  steps = checkpoint.saved_steps(workdir / 'checkpoints')
  shutil.rmtree(workdir / 'checkpoints' / str(steps[0]))
  return steps[1]


def test_a_run_keeps_what_it_knows_beside_its_config_and_in_each_checkpoint(trained):
  run = trained / 'run'
  card, config = read_card(run), json.loads((run / 'config.json').read_text())
  assert sealed(run) == card and config['data']['path'] == str(trained / 'photos')
  assert (
    card.classes == ('a', 'b')
    and card.train.count + card.test.count == IMAGES
    and card.images == card.train.count
  )
  assert (
    card.canvas == 8
    and card.train.files
    and card.train.labels
    and card.train.pixels
    and card.since == 0
  )
  again = runs.prepare_run(read_config(run / 'config.json'), sharding.mesh(jax.devices()[:1]))
  assert data_mark(again.card) == data_mark(card) and again.card.mean == card.mean
  assert data_mark(card) != data_mark(card._replace(std=(1., 1., 1.)))
  assert data_mark(card) == data_mark(card._replace(name='elsewhere', settings={}))


def test_a_card_of_an_older_version_has_the_same_mark():
  """It says `labelled`. Its mark stands in results that an older version wrote."""
  train = {'count': 8, 'files': 'a', 'labels': '', 'pixels': 'b'}
  bank = {'count': 4, 'files': 'c', 'labels': 'd', 'pixels': 'e'}
  old = {'name': 'stl10', 'settings': {'name': 'tfds', 'labelled': 'train'}, 'train': train,
         'test': None, 'classes': None, 'canvas': 96, 'mean': [.5] * 3, 'std': [.25] * 3,
         'images': 8, 'labelled': bank}
  card = card_from_json(old)
  assert card.labeled.count == 4 and card.settings == {'name': 'tfds', 'labeled': 'train'}
  assert data_mark(card) == '93765e08a730e973'
  assert card_from_json(card_to_json(card)) == card


def test_added_images_change_no_feature_and_no_export(world, capsys):
  """Bar 4."""
  run, shown = world / 'run', world / 'shown'
  shutil.copytree(world / 'photos', shown)
  card = read_card(run)
  assert eqssl(capsys, 'embed', run, shown, '--out', world / 'before.npz')[0] == 0
  photos(world / 'photos', 200, 260, shade=64)
  assert eqssl(capsys, 'embed', run, shown, '--out', world / 'after.npz')[0] == 0
  code, said = eqssl(capsys, 'export', run)
  assert code == 0, said
  facts = json.loads((run / 'export' / 'config.json').read_text())
  assert (
    tuple(facts['equivariant_ssl']['mean']) == tuple(facts['pretrained_cfg']['mean']) == card.mean
  )
  assert tuple(facts['equivariant_ssl']['std']) == tuple(facts['pretrained_cfg']['std']) == card.std
  code, said = eqssl(capsys, 'eval', run, '--protocol', 'knn')
  assert code == OTHER_DATA == 9 and not (run / 'eval').exists()
  code, said = eqssl(capsys, 'eval', run, '--protocol', 'knn', '--accept-data')
  assert code == 0 and (run / 'eval' / 'knn.json').exists(), said
  assert read_card(run) == card == sealed(run)
  assert eqssl(capsys, 'embed', run, shown, '--out', world / 'later.npz')[0] == 0
  before, *others = (
    embeddings.read(world / f'{name}.npz') for name in ('before', 'after', 'later')
  )
  assert before.origin.mark == data_mark(card)
  for other in others:
    assert other.paths == before.paths and other.origin == before.origin
    np.testing.assert_array_equal(other.features, before.features)  # bitwise


def test_features_and_export_need_no_training_data(world, capsys):
  shutil.move(world / 'photos', world / 'shown')
  run, image = world / 'run', world / 'shown' / 'a' / '000.png'
  assert eqssl(capsys, 'embed', run, world / 'shown' / 'a', '--out', world / 'e.npz')[0] == 0
  code, said = eqssl(
    capsys, 'neighbors', world / 'e.npz', world / 'shown' / 'b' / '001.png', '--run', run, '--k', 2
  )
  assert code == 0 and said.startswith('rank  cosine') and len(said.splitlines()) == 3, said
  assert eqssl(capsys, 'export', run)[0] == 0
  made = embeddings.read(world / 'e.npz')
  embeddings.save(world / 'other.npz', made._replace(origin=made.origin._replace(mark='0' * 16)))
  code, said = eqssl(
    capsys, 'neighbors', world / 'other.npz', world / 'shown' / 'b' / '001.png', '--run', run
  )
  assert code == 2 and 'another data card' in said and 'eqssl embed' in said
  assert eqssl(capsys, 'neighbours', world / 'other.npz', image, '--k', 2)[0] == 0  # its old name


def padded(folder):
  for path in folder.rglob('*.png'):
    path.write_bytes(path.read_bytes() + bytes(7))


def darker(folder):
  """Overwrite files in place: they keep their names and sizes in bytes, and get other pixels."""
  for path in sorted(folder.rglob('*.png')):
    old, image = path.stat().st_size, Image.open(path).point(lambda v: v // 4)
    image.save(path)
    path.write_bytes(path.read_bytes() + bytes(max(0, old - path.stat().st_size)))
    assert path.stat().st_size == old


OTHERS = {  # what happens to the folder: what is said
  'added': (lambda folder: photos(folder, 200, 230), 'training images in place of'),
  'removed': (
    lambda folder: [p.unlink() for p in sorted(folder.glob('a/*'))[:3]],
    'images in place of',
  ),
  'renamed': (
    lambda folder: (folder / 'b').rename(folder / 'c'),
    "class 'c' is new; class 'b' is gone",
  ),
  'padded': (padded, 'other names or sizes'),
  'darker': (darker, 'the training images have other pixels'),
  'unlabeled': (lambda folder: shutil.copy(folder / 'a' / '000.png', folder), 'no labels'),
}


def test_what_is_known_of_both_is_compared(trained):
  card = read_card(trained / 'run')
  labels = card._replace(train=card.train._replace(labels='0', files=''))
  assert card_differences(card, card) == [] == card_differences(card, card._replace(mean=(0., 0., 0.)))
  assert card_differences(card, labels) == ['the training images have other labels']
  streamed = card._replace(
    train=card.train._replace(labels='0', pixels='')
  )  # a broken record took another's label
  assert card_differences(card, streamed) == []
  assert card_differences(card._replace(test=None), card)[0].endswith('test images in place of 0')
  assert card_differences(card, card._replace(canvas=16)) == ['canvases of side 16 in place of 8']
  assert card_differences(card, card._replace(classes=('b', 'a'))) == [
    'the classes are in another order'
  ]


@pytest.mark.parametrize('what', OTHERS)
def test_other_data_stop_eval_and_resume_and_say_what_changed(world, what, capsys):
  change, words = OTHERS[what]
  run, before = world / 'run', (world / 'run' / 'config.json').read_text()
  change(world / 'photos')
  for argv in (('eval', run, '--protocol', 'knn'), ('resume', run), command(world / 'photos', run)):
    code, said = eqssl(capsys, *argv)
    last = said[said.index('eqssl: '):]
    assert (
      code == OTHER_DATA and words in said and '--accept-data' in said and '--data-path' in said
    ), said
    assert len(last.strip().splitlines()) == 2 and 'Traceback' not in said
  assert (run / 'config.json').read_text() == before and not (run / 'eval').exists()


def test_a_report_says_so_in_place_of_its_pictures(world, capsys):
  photos(world / 'photos', 200, 230)
  code, said = eqssl(capsys, 'report', world / 'run')
  page = (world / 'run' / 'report.html').read_text()
  assert code == 0 and 'training images in place of' in page and '--accept-data' in page


@pytest.mark.parametrize('more', [True, False], ids=['more', 'fewer'])
def test_a_resumed_run_on_other_data_keeps_its_steps_its_rate_and_its_normalization(
  world, trained, more, capsys
):
  run, straight = world / 'run', rows(trained / 'run')
  step, known = rewind(run), read_card(run)
  if more:
    photos(world / 'photos', 200, 270, shade=64)
  else:  # an epoch of them is shorter than the run's
    for path in sorted((world / 'photos').rglob('*.png'))[:24]:
      path.unlink()
  code, said = eqssl(capsys, 'resume', run, '--accept-data')
  assert code == 0 and f'resuming at step {step} of {STEPS}' in said, said
  assert [r['step'] for r in rows(run)] == [r['step'] for r in straight] and rows(run)[-1][
    'step'
  ] == STEPS
  assert [(r['lr'], r['epoch']) for r in rows(run)] == [(r['lr'], r['epoch']) for r in straight]
  assert [r['loss'] for r in rows(run)][step:] != [r['loss'] for r in straight][step:]
  card = read_card(run)
  assert (card.mean, card.std, card.images) == (known.mean, known.std, known.images) and sealed(
    run
  ) == card
  assert card.train.count != known.train.count and len(card.changes) == 1
  assert (
    f'from step {step}: {card.train.count} training images in place of {known.train.count}'
    in card.changes[0]
  )
  assert eqssl(capsys, 'resume', run, '--quiet')[0] == 0  # they are its data now
  assert read_card(run) == card


def test_what_cannot_be_taken_even_on_purpose(world, capsys):
  run = world / 'run'
  config = json.loads((run / 'config.json').read_text())
  (run / 'config.json').write_text(json.dumps(config | {'probe': True}))
  (world / 'photos' / 'b').rename(world / 'photos' / 'c')
  code, said = eqssl(capsys, 'resume', run, '--accept-data')
  assert code == OTHER_DATA and 'probe of its own classes' in said
  (run / 'config.json').write_text(json.dumps(config))
  for path in sorted((world / 'photos').rglob('*.png'))[:50]:
    path.unlink()
  code, said = eqssl(capsys, 'resume', run, '--accept-data')
  assert code == OTHER_DATA and 'fewer than a batch of the run, 16' in said
  (run / 'config.json').write_text(json.dumps(config | {'data': {**config['data'], 'size': 16}}))
  code, said = eqssl(capsys, 'eval', run, '--accept-data')
  assert code == OTHER_DATA and 'Canvases of another side cannot be taken' in said


def test_data_that_moved_are_no_dead_end(world, trained, capsys, monkeypatch):
  run, new = world / 'run', world / 'elsewhere' / 'pictures'
  new.parent.mkdir()
  shutil.move(world / 'photos', new)
  monkeypatch.chdir(world / 'elsewhere')
  for argv in (('eval', run, '--protocol', 'knn'), ('resume', run), command(world / 'photos', run)):
    code, said = eqssl(capsys, *argv)
    assert code == 2 and '--data-path DIR' in said and '--config.data' not in said, said
  code, said = eqssl(capsys, 'report', run)
  assert code == 0 and '--data-path DIR' in (run / 'report.html').read_text()
  assert eqssl(capsys, 'eval', run, '--protocol', 'knn', '--data-path', 'pictures')[0] == 0
  for verb in (('export', run), ('embed', run, new, '--out', world / 'e.npz')):
    assert eqssl(capsys, *verb, '--data-path', 'pictures')[0] == 0
  rewind(run)
  code, said = eqssl(capsys, 'resume', run, '--data-path', 'pictures')
  assert code == 0 and [r['loss'] for r in rows(run)] == [
    r['loss'] for r in rows(trained / 'run')
  ], said
  assert json.loads((run / 'config.json').read_text())['data']['path'] == str(new)
  monkeypatch.chdir(world)
  code, said = eqssl(capsys, 'eval', run, '--protocol', 'knn')  # found without being told again
  assert code == 0, said
  assert data_mark(read_card(run)) == data_mark(read_card(trained / 'run'))


def test_the_same_data_as_a_stream_are_the_same_data(world, capsys):
  run, card = world / 'run', read_card(world / 'run')
  code, said = eqssl(capsys, *command(world / 'photos', run, '--config.data.stream=True'))
  assert code == 0 and read_card(run) == card, said
  assert json.loads((run / 'config.json').read_text())['data']['stream'] is True
  photos(world / 'photos', 200, 230)
  code, said = eqssl(capsys, 'resume', run)
  assert code == OTHER_DATA and 'training images in place of' in said


@pytest.mark.parametrize('loss', ['missing', 'damaged'])
def test_a_card_that_is_lost_comes_back_from_a_checkpoint(world, loss, capsys):
  run, card = world / 'run', read_card(world / 'run')
  (run / 'data.json').unlink() if loss == 'missing' else (run / 'data.json').write_text(
    '{"name": 1}'
  )
  code, said = eqssl(capsys, 'embed', run, world / 'photos' / 'a', '--out', world / 'e.npz')
  assert code == 0 and f'data.json is {loss}: taken from the checkpoint of step {STEPS}' in said
  code, said = eqssl(capsys, 'resume', run)
  assert code == 0 and read_card(run) == card, said


def old(workdir, config, log=()):
  """A run of a version without data cards, at step 4 of its first state."""
  run = runs.prepare_run(config, sharding.mesh())
  record.start_record(workdir, config_to_json(config), 'eqssl train')
  (workdir / 'metrics.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in log))
  with checkpoint.open_checkpoints(workdir / 'checkpoints') as saved:
    saved.save(4, runs.initial_state(run)._replace(step=jax.numpy.int32(4)), {}, wait=True)
  return run


@pytest.mark.parametrize('verb', ['eval', 'embed', 'resume'])
def test_a_run_of_before_gets_a_card_and_is_told_so(world, verb, tmp_path, capsys):
  """Its log counts two steps an epoch, where its images now make three; the end stays."""
  config = read_config(world / 'run' / 'config.json')
  run = old(tmp_path / 'old', config, [{'step': 4, 'epoch': 2., 'loss': 1.}])
  argv = {
    'eval': ('eval', tmp_path / 'old', '--protocol', 'knn'),
    'resume': ('resume', tmp_path / 'old'),
    'embed': ('embed', tmp_path / 'old', world / 'photos' / 'a', '--out', tmp_path / 'e.npz'),
  }[verb]
  code, said = eqssl(capsys, *argv)
  assert code == 0 and 'has no data card' in said and 'before step 4 is not known' in said, said
  assert 'counts 2 steps an epoch' in said
  card = read_card(tmp_path / 'old')
  assert (
    (card.since, card.images) == (4, 32)
    and card.train == run.card.train
    and card.mean == run.card.mean
  )
  if verb == 'resume':
    assert rows(tmp_path / 'old')[-1]['step'] == 6
  assert 'no data card' not in eqssl(capsys, *argv)[1]


def test_a_finished_run_is_trained_longer_in_a_new_workdir(world, capsys):
  run, more, longer = world / 'run', world / 'longer', ('train', '--from', world / 'run', '--quiet')
  code, said = eqssl(capsys, *longer, '--workdir', more)
  assert (
    code == 2
    and f'at step {STEPS}, and {STEPS} steps are asked for' in said
    and '--config.epochs=6' in said
  )
  assert not more.exists(), 'a refused run leaves nothing behind'
  code, said = eqssl(
    capsys, *longer, '--workdir', more, '--config.epochs=4', '--config.checkpoint_every=1000'
  )
  assert code == 0, said
  card = read_card(more)
  assert card.start == {'run': str(run), 'data': data_mark(read_card(run)), 'step': STEPS}
  assert data_mark(card) == data_mark(read_card(run)) and sealed(more) == card
  assert [r['step'] for r in rows(more)] == [10, 11, 12] and rows(more)[-1]['epoch'] == 4.
  assert checkpoint.saved_steps(more / 'checkpoints') == [12, 9]
  before = [r['loss'] for r in rows(more)]
  for lost in ('checkpoints/12', 'checkpoints'):  # killed before its last one, and before its first
    shutil.rmtree(more / lost)
    if lost == 'checkpoints':
      for name in ('run.json', 'metrics.jsonl'):
        (more / name).unlink()
    code, said = eqssl(
      capsys, *longer, '--workdir', more, '--config.epochs=4', '--config.checkpoint_every=1000'
    )
    assert code == 0 and [r['loss'] for r in rows(more)] == before and read_card(more) == card, said
  shutil.rmtree(more / 'checkpoints')
  code, said = eqssl(capsys, 'resume', more)
  assert code == NO_CHECKPOINT and 'has none any more' in said, (
    'nor again from its start, which would drop its log'
  )
  for name in ('run.json', 'metrics.jsonl'):
    (more / name).unlink()
  shutil.rmtree(run)
  code, said = eqssl(capsys, 'resume', more)
  assert code == NO_CHECKPOINT and str(run) in said, 'it never starts from nothing'


def test_what_a_longer_training_is_not(world, capsys):
  run = world / 'run'
  for argv, words, wanted in (
    (
      ('train', '--from', run, '--config', 'smoke', '--workdir', world / 'x'),
      'one of --config NAME and --from DIR',
      2,
    ),
    (('train', '--from', world / 'photos', '--workdir', world / 'x'), 'config.json is missing', 2),
    (
      ('train', '--from', run, '--workdir', run, '--config.epochs=4'),
      'another config',
      OTHER_CONFIG,
    ),
    (('train', '--from', run, '--workdir', run), 'did not start from', OTHER_CONFIG),
    (
      (
        'train',
        '--from',
        run,
        '--workdir',
        world / 'x',
        '--config.epochs=4',
        '--config.encoder.width=8',
      ),
      'tensors match',
      OTHER_CONFIG,
    ),
    (
      (
        'train',
        '--from',
        run,
        '--workdir',
        world / 'x',
        '--config.mean=.5,.5,.5',
        '--config.std=1,1,1',
      ),
      'the run knows',
      OTHER_CONFIG,
    ),
  ):
    code, said = eqssl(capsys, *argv)
    assert code == wanted and words in said and not (world / 'x').exists(), said
  photos(world / 'photos', 200, 230)
  code, said = eqssl(
    capsys, 'train', '--from', run, '--workdir', world / 'y', '--config.epochs=4', '--quiet'
  )
  assert code == OTHER_DATA and 'training images in place of' in said and not (world / 'y').exists()
  assert '--config.data.path=DIR' in said and '--data-path' not in said, (
    'hints name what the command has'
  )


def test_a_tfds_data_set_is_found_again_without_its_variable_and_elsewhere(
  tmp_path, capsys, monkeypatch
):
  photos(tmp_path / 'src' / 'train', 0, 40)
  photos(tmp_path / 'src' / 'test', 40, 60)
  monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path / 'tfds'))
  code, said = eqssl(capsys, 'data', 'prepare', 'tiny_photos', '--src', tmp_path / 'src')
  assert code == 0, said
  run = tmp_path / 'run'
  code, said = eqssl(
    capsys,
    'train',
    '--config',
    one_process.__file__,
    '--workdir',
    run,
    '--quiet',
    '--config.data.name=tfds',
    '--config.data.dataset=tiny_photos',
    '--config.data.size=8',
    '--config.steps=1',
  )
  assert code == 0, said
  monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path / 'nowhere'))
  assert json.loads((run / 'config.json').read_text())['data']['root'] == str(tmp_path / 'tfds')
  assert eqssl(capsys, 'resume', run, '--quiet')[0] == 0
  card = read_card(run)
  assert (
    card.train.count == 40
    and card.test.count == 20
    and card.train.files
    and card.train.files != card.test.files
  )
  shutil.move(tmp_path / 'tfds', tmp_path / 'moved')
  code, said = eqssl(capsys, 'eval', run, '--protocol', 'knn')
  assert code == 2 and '--data-path DIR' in said and '--config.data' not in said, said
  version = next((tmp_path / 'moved' / 'tiny_photos').iterdir())
  for place in (tmp_path / 'moved', version):
    assert eqssl(capsys, 'resume', run, '--quiet', '--data-path', place)[0] == 0
  assert read_card(run) == card and json.loads((run / 'config.json').read_text())['data'][
    'dataset'
  ] == str(version)
  shutil.move(
    tmp_path / 'moved', tmp_path / 'again'
  )  # now it is named by the folder of its version
  assert eqssl(capsys, 'resume', run, '--quiet')[0] == 2
  assert eqssl(capsys, 'resume', run, '--quiet', '--data-path', tmp_path / 'again')[0] == 0
  code, said = eqssl(capsys, 'resume', run, '--quiet')
  assert code == 0 and read_card(run) == card, said
  assert tfds.shards_digest(
    tfds.open_directory(tmp_path / 'again' / 'tiny_photos' / version.name), 'train+test[:3]'
  ) not in ('', card.train.files)


def test_data_in_no_folder_have_no_path(tmp_path, capsys):
  config = load_config(one_process.__file__)
  record.start_record(tmp_path / 'run', config_to_json(config), '')
  code, said = eqssl(capsys, 'resume', tmp_path / 'run', '--data-path', tmp_path)
  assert code == 2 and 'is in no folder' in said

"""Data that stream: decoded as they are needed, and else as data in memory, bitwise."""
import functools

import jax
import numpy as np
import pytest
import tiny
from PIL import Image

from equivariant_ssl import data, registry
from equivariant_ssl.config import load_config
from equivariant_ssl.data import folder as folders
from equivariant_ssl.data import source, stream
from equivariant_ssl.errors import BAD_DATA, UserError
from equivariant_ssl.evaluate.features import in_batches
from equivariant_ssl.parallel import sharding
from equivariant_ssl.training import loop, runs

N = 30


def photographs(folder, bad=()):
  """Two classes of small pictures of several shapes and formats, with detail at every size.

  The pictures in `bad` are torn.
  """
  rng = np.random.default_rng(0)
  for i in range(N):
    place = folder / 'train' / f'class{i % 2}'
    place.mkdir(parents=True, exist_ok=True)
    h, w = 20 + i % 7, 24 + i % 5
    file = place / f'{i:02d}.{"jpg" if i % 3 else "png"}'
    Image.fromarray(rng.integers(0, 256, (h, w, 3), np.uint8)).save(file)
    if i in bad:
      file.write_bytes(file.read_bytes()[:200])
  (folder / 'val').mkdir()
  for k in range(2):
    (folder / 'val' / f'class{k}').mkdir()
    Image.fromarray(rng.integers(0, 256, (25, 20, 3), np.uint8)).save(
      folder / 'val' / f'class{k}' / 'a.png'
    )
  return folder


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return photographs(tmp_path_factory.mktemp('photographs'))


def settings(folder, **more):
  return load_config(
    tiny.NAME,
    {
      'data': str({'name': 'folder', 'path': str(folder), 'size': 16}),
      'steps': '5',
      'batch': '8',
      'checkpoint_every': '1',
      'mean': '(.5,.5,.5)',
      'std': '(.2,.2,.2)',
      'augment.rotate.role': 'off',
      'equivariance': 'none',
      **more,
    },
  )


def rows(workdir):
  import json
  return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


def test_a_streamed_run_is_a_resident_run_bitwise_wherever_it_is_resumed(folder, tmp_path,
                                                                         monkeypatch):
  """Two epochs of three steps; the streamed one ends without warning after two and goes on.

  It goes on with other threads, which let a process decode.
  """
  mesh = sharding.mesh(jax.devices()[:1])
  class Killed(BaseException):
    pass

  def kill(run, state, n):
    if n == 2:
      raise Killed
  whole = loop.train(settings(folder), tmp_path / 'resident', mesh=mesh, quiet=True)
  streamed = settings(folder, **{'data.stream': 'True'})
  with pytest.raises(Killed):
    loop.train(streamed, tmp_path / 'streamed', hooks=(kill,), mesh=mesh, quiet=True)
  decoders = stream.Decoders(3, 1)
  monkeypatch.setattr(stream, 'batches', functools.partial(stream.batches, decoders=decoders))
  resumed = loop.train(streamed, tmp_path / 'streamed', mesh=mesh, quiet=True)
  for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(resumed), strict=True):
    np.testing.assert_array_equal(a, b)
  for name in ('resident', 'streamed'):  # the first step of a process is apart, with its compilation
    for row in rows(tmp_path / name):
      first = row['step'] == 1 or (name, row['step']) == ('streamed', 3)
      assert ('first_step_s' in row) == first == ('images_per_s' not in row)
      assert first or 0 <= row['data_wait'] <= 1
  losses = lambda name: [r['loss'] for r in rows(tmp_path / name)]
  assert losses('resident') == losses('streamed') and len(losses('streamed')) == 5


def test_canvases_index_as_arrays_do(folder):
  of = lambda on: registry.make(data, 'folder', path=str(folder), size=16, stream=on)
  here, there = of(False).train, of(True).train
  assert (
    there.images.shape == here.images.shape
    and there.images.ndim == 4
    and there.images.dtype == np.uint8
  )
  np.testing.assert_array_equal(here.labels, there.labels)
  mask = np.arange(N) % 4 == 1
  for which in (slice(3, 9), slice(None), np.array([7, 2, 2]), mask, slice(5, 5)):
    np.testing.assert_array_equal(here.images[which], there.images[which])
    np.testing.assert_array_equal(here.sizes[which], there.sizes[which])
  np.testing.assert_array_equal(here.images[-1], there.images[-1])
  np.testing.assert_array_equal(here.images[mask][1:3], there.images.part(mask)[1:3])
  np.testing.assert_array_equal(here.sizes, np.asarray(there.sizes))


def test_evaluation_reads_a_stream_batch_by_batch(folder):
  there = registry.make(data, 'folder', path=str(folder), size=16, stream=True).train
  seen = []

  class Watched(stream.Canvases):
    def read(self, rows):
      seen.append(len(np.arange(len(self))[rows]))
      return super().read(rows)
  watched = Watched('x', there.images.records, 16)
  found = in_batches(lambda x: x.astype(np.float32).mean((1, 2, 3)), watched, 8)
  np.testing.assert_allclose(found, np.asarray(there.images).mean((1, 2, 3)), rtol=1e-6)
  assert seen == [8, 8, 8, 6]


def test_an_unreadable_record_is_said_and_replaced_as_in_memory(tmp_path, capsys):
  folder = photographs(tmp_path, bad=(9,))  # a torn PNG, whose header is whole
  here, there = (
    registry.make(data, 'folder', path=str(folder), size=16, stream=on) for on in (False, True)
  )
  np.testing.assert_array_equal(here.train.images, np.asarray(there.train.images))
  assert capsys.readouterr().err.count('another record replaces it') == 1
  np.testing.assert_array_equal(here.train.labels, there.train.labels)
  assert len(there.train.images.bad) == 1 and len(here.problems) == 2


def test_the_parts_of_a_stream_have_the_label_of_what_replaces_an_image(tmp_path):
  """Parts are taken before the torn image is read, as of data of which a sample is measured."""
  part = folders.read_folder(photographs(tmp_path, bad=(9,))).parts['train']
  records = folders.folder_records(part, None)._replace(labels=np.arange(N, dtype=np.int32))
  here, ((torn, _),) = source.decode_records(records, 16)
  stream_of = lambda: stream.lazy_split('x', records, 16, records.labels.copy())
  rows = np.arange(2, N)
  half = stream.take_rows(stream_of(), rows)
  for split, chosen in ((half, rows), (stream.take_rows(half, rows[:0:-1] - 2), rows[:0:-1])):
    assert split.labels[chosen == torn] == torn, 'it is not yet read'
    np.testing.assert_array_equal(np.asarray(split.images), here.images[chosen])
    np.testing.assert_array_equal(split.labels, here.labels[chosen])
  batches = stream.batches(stream.take_rows(stream_of(), rows), lambda n: np.arange(4) + 4 * n, 0, 7)
  np.testing.assert_array_equal(np.concatenate([batch[2] for batch in batches]), here.labels[rows])


def test_data_of_which_too_much_is_unreadable_end_the_run(tmp_path):
  folder = photographs(tmp_path, bad=range(0, N, 3))
  with pytest.raises(UserError, match='more than 1 %') as e:
    loop.train(settings(folder, **{'data.stream': 'True'}), tmp_path / 'run', quiet=True)
  assert e.value.code == BAD_DATA


def test_batches_start_at_any_step_and_devices_get_their_rows(folder):
  split = registry.make(data, 'folder', path=str(folder), size=16, stream=True).train
  rows = lambda n: (np.arange(4) * 5 + n) % N
  at = {n: [a for a in batch] for n, batch in enumerate(stream.batches(split, rows, 0, 6))}
  late = list(stream.batches(split, rows, 4, 6))
  for n in (4, 5):
    for a, b in zip(at[n], late[n - 4], strict=True):
      np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(at[n][0], split.images[rows(n)])
    np.testing.assert_array_equal(at[n][2], split.labels[rows(n)])
  assert len(at) == 6 and list(stream.batches(split, rows, 3, 3)) == []
  rows = sharding.batch_sharding(sharding.mesh())
  np.testing.assert_array_equal(stream.process_rows(rows, 16), np.arange(16))
  first, *_ = stream.place_batches(iter([{'x': np.arange(16.)}, {'x': np.zeros(16)}]), rows, 16)
  assert first['x'].sharding == rows and first['x'].tolist() == list(range(16))


def test_what_does_not_fit_streams_by_itself_and_says_what_needs_it_whole(folder, monkeypatch):
  monkeypatch.setattr(source, 'MEMORY', 20 * 16 * 16 * 3)
  monkeypatch.setattr(stream, 'MOMENTS', 20)
  found = registry.make(data, 'folder', path=str(folder), size=16)
  assert stream.is_stream(found.train.images) and stream.is_stream(found.test.sizes)
  assert len(found.train.images[:20]) == 20
  with pytest.raises(UserError, match='30 decoded images in memory at once'):
    np.asarray(found.train.images)


def test_a_run_of_a_stream_measures_its_mean_on_some(folder):
  here, there = (
    registry.make(data, 'folder', path=str(folder), size=16, stream=on) for on in (False, True)
  )
  assert here.mean == there.mean and here.std == there.std  # 30 are all
  assert runs.prepare_run(settings(folder, **{'data.stream': 'True'})).source.names == here.names


@pytest.mark.slow
def test_a_probe_and_a_fine_tuning_of_a_stream_are_those_of_memory(tmp_path, monkeypatch):
  """Also where an image of the other class replaces one that was not read before."""
  from equivariant_ssl.evaluate import finetune, probe

  folder = photographs(tmp_path, bad=(24,))
  monkeypatch.setattr(stream, 'MOMENTS', 4)
  here, there = (
    registry.make(data, 'folder', path=str(folder), size=16, stream=on).train
    for on in (False, True)
  )
  assert (here.labels != there.labels).sum() == 1
  encode = lambda x: x.reshape(x.shape[0], -1)[:, ::7]
  protocol = probe.PROTOCOLS['linear']._replace(
    epochs=2, batch=8, rates=(0.1, 1.0)
  )  # 30 images: the last batch is filled up
  heads = [probe.train(protocol, encode, s, 16, 2, jax.random.key(0)) for s in (here, there)]
  for a, b in zip(*map(jax.tree.leaves, heads), strict=True):
    np.testing.assert_array_equal(a, b)
  run = loop.prepare_run(settings(folder), sharding.mesh(jax.devices()[:1]))
  state = loop.initial_state(run)
  variables = {
    'params': {'encoder': state.params['encoder']},
    'batch_stats': {'encoder': state.stats['encoder']},
  }
  tuned = [
    finetune.train(
      run.recipe.network,
      variables,
      stream.take_rows(s, np.arange(4, 28)),
      16,
      2,
      jax.random.key(0),
      2,
      batch=8,
    )
    for s in (here, there)
  ]
  np.testing.assert_array_equal(tuned[0].head.kernel, tuned[1].head.kernel)


@pytest.mark.parametrize('size', [None, 20, 200])
def test_jpegs_have_pillows_pixels_whoever_decodes_them(size, monkeypatch):
  import io

  from equivariant_ssl.data import decode
  rng = np.random.default_rng(0)
  for mode, shape in (('RGB', (130, 90)), ('L', (64, 100)), ('CMYK', (50, 70))):
    noise = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).resize(
      shape, Image.Resampling.BICUBIC
    )
    file = io.BytesIO()
    noise.convert(mode).save(file, 'JPEG')
    fast = decode.decode(file.getvalue(), size)
    with monkeypatch.context() as patch:
      patch.setattr(decode, 'decode_jpeg', lambda image, data: decode.to_rgb(image))
      np.testing.assert_array_equal(fast[0], decode.decode(file.getvalue(), size)[0])
    assert fast[1] == (shape[1], shape[0])

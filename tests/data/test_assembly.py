"""Batches of a stream: the same by any threads and processes, in order, bounded, and with an end."""
import itertools
import threading
import time

import jax
import numpy as np
import pytest
from PIL import Image

from equivariant_ssl import data, registry
from equivariant_ssl.data import assembly, decode_processes, decoders, source, stream
from equivariant_ssl.data.decoders import Decoders, DecodeTimes
from equivariant_ssl.data.image_header import BadImage
from equivariant_ssl.errors import BAD_DATA, UserError

N, SIDE = 150, 8


def canvas(index):
  return np.full((SIDE, SIDE, 3), index % 251, np.uint8)


def split(monkeypatch, read=lambda index: None, labels=True):
  """A stream of N records that are decoded for nothing. read: is called for each, and may raise."""
  def records(indices):
    for index in indices:
      read(index)
      yield index

  def decode(index, size, rules):
    return canvas(index), (index + 1, 2)
  monkeypatch.setattr(source, 'decode', decode)
  held = np.arange(N, dtype=np.int32) if labels else None
  return stream.lazy_split('free', source.Records(str, records, held, N), SIDE, held)


def rows_of(n):
  order = np.random.default_rng(n).permutation(N)
  return lambda step: order[np.arange(step * n, (step + 1) * n) % N]


def alive():
  return [t.name for t in threading.enumerate() if t.name.startswith('decoder ')]


@pytest.mark.parametrize('n,threads', [(1, 1), (3, 7), (64, 2), (130, 5)])
def test_batches_are_their_rows_in_order(monkeypatch, n, threads):
  rows, steps = rows_of(n), 5
  made = list(stream.batches(split(monkeypatch), rows, 2, 2 + steps, Decoders(threads)))
  assert len(made) == steps and not alive()
  for step, (images, sizes, labels) in enumerate(made, 2):
    np.testing.assert_array_equal(images[:, 0, 0, 0], rows(step) % 251)
    np.testing.assert_array_equal(sizes, np.stack([rows(step) + 1, np.full(n, 2)], 1))
    np.testing.assert_array_equal(labels, rows(step))
    assert labels.dtype == np.int32 and sizes.dtype == np.float32
  unlabeled = next(stream.batches(split(monkeypatch, labels=False), rows, 0, 1))
  assert not unlabeled[2].any() and not alive()


def test_memory_is_used_again_only_when_nothing_refers_to_it(monkeypatch):
  """Batches that jax holds, perhaps without a copy, stay as they were; those let go are reused."""
  rows, split_ = rows_of(70), split(monkeypatch)
  held = [(jax.device_put(images), images[3:4] if step % 2 else None) for step, (images, _, _)
          in enumerate(stream.batches(split_, rows, 0, 12, Decoders(2)))]
  for step, (placed, part) in enumerate(held):
    np.testing.assert_array_equal(np.asarray(placed)[:, 0, 0, 0], rows(step) % 251)
    assert part is None or part[0, 0, 0, 0] == rows(step)[3] % 251
  work = assembly.Assembly(split_.images, rows, range(40), Decoders(2))
  places = {work.take()[1].__array_interface__['data'][0] for _ in range(40)}
  work.close()
  assert len(places) <= 6


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """Small photographs in a folder; one of them is torn."""
  place, rng = tmp_path_factory.mktemp('photographs'), np.random.default_rng(0)
  for i in range(24):
    file = place / f'class{i % 2}' / f'{i:02d}.png'
    file.parent.mkdir(exist_ok=True)
    Image.fromarray(rng.integers(0, 256, (20 + i % 3, 24, 3), np.uint8)).save(file)
  file.write_bytes(file.read_bytes()[:200])
  return place


def test_processes_decode_the_same_bits_and_lost_ones_are_replaced(folder, capsys, monkeypatch):
  """The processes are killed after some batches: threads go on in their place, and say so once."""
  monkeypatch.setattr(assembly, 'AHEAD', 18)
  make = lambda: registry.make(data, 'folder', path=str(folder), size=16, test=0., stream=True).train
  here, there, rows = make(), make(), lambda step: (np.arange(9) * 5 + step) % 24
  for made in (here, there):
    made.images.bad.clear()  # it was met when the mean was measured
  capsys.readouterr()
  expected = list(stream.batches(here, rows, 0, 20, Decoders(1)))
  assert capsys.readouterr().err.count('another record replaces it') == 1
  work = assembly.Assembly(there.images, rows, range(20), Decoders(3, 2))
  assert len(work.processes.children) == 2 and len(work.processes.connections) == 3
  deadline = time.monotonic() + 60
  while not work.processes.ready:
    assert time.monotonic() < deadline
    time.sleep(.01)
  for step, (images, sizes, _) in enumerate(expected):
    if step == 5:
      for child in work.processes.children:
        child.kill()
    taken, mine, my_sizes = work.take()
    np.testing.assert_array_equal(mine, images)
    np.testing.assert_array_equal(my_sizes, sizes)
    np.testing.assert_array_equal(taken, rows(step))
  children = work.processes.children
  work.close()
  assert all(child.poll() is not None for child in children) and not alive()
  assert here.labels.tolist() == there.labels.tolist() and there.images.bad == here.images.bad
  said = capsys.readouterr().err
  assert said.count('another record replaces it') == 1 and said.count(decode_processes.LOST) == 1


def test_records_that_cannot_be_pickled_are_decoded_in_threads(monkeypatch):
  made = list(stream.batches(split(monkeypatch), rows_of(9), 0, 3, Decoders(2, 2)))
  np.testing.assert_array_equal(made[2][2], rows_of(9)(2))


def test_an_error_of_a_thread_comes_where_its_batch_is_due(monkeypatch):
  """Of several errors in a batch the first by its rows comes, and no thread stays."""
  def read(index):
    if index in (40, 53):
      time.sleep(.05 if index == 40 else 0.)
      raise UserError(f'record {index}', code=BAD_DATA)
  batches = stream.batches(split(monkeypatch, read), lambda s: np.arange(20) + 20 * s, 0, 6,
                           Decoders(4))
  assert next(batches)[2][0] == 0 and next(batches)[2][0] == 20
  with pytest.raises(UserError, match='record 40') as error:
    next(batches)
  assert error.value.code == BAD_DATA and not alive()


def test_an_error_of_the_order_comes_too(monkeypatch):
  def rows(step):
    if step == 1:
      raise ValueError('no order')
    return np.arange(4)
  batches = stream.batches(split(monkeypatch), rows, 0, 3)
  next(batches)
  with pytest.raises(ValueError, match='no order'):
    next(batches)
  assert not alive()


def test_too_many_unreadable_records_end_a_stream(monkeypatch):
  def read(index):
    if index % 3 == 0:
      raise BadImage('torn')
  with pytest.raises(UserError, match='more than 1 %') as error:
    list(stream.batches(split(monkeypatch, read), rows_of(16), 0, 9))
  assert error.value.code == BAD_DATA and not alive()


@pytest.mark.parametrize('n', [4, 200])
def test_a_bounded_number_of_images_is_decoded_ahead(monkeypatch, n):
  """A consumer that pauses finds two batches, or AHEAD images, and loses nothing."""
  monkeypatch.setattr(assembly, 'AHEAD', 40)
  count = itertools.count()
  done = [0]

  def read(index):
    done[0] = next(count) + 1
  batches = stream.batches(split(monkeypatch, read), rows_of(n), 0, 100, Decoders(2))
  next(batches)
  most, deadline = n + max(40, 2 * n), time.monotonic() + 20
  while done[0] < most:
    assert time.monotonic() < deadline
    time.sleep(.01)
  time.sleep(.1)
  assert done[0] == most
  np.testing.assert_array_equal(next(batches)[2], rows_of(n)(1))
  batches.close()
  assert not alive()


def test_slow_storage_gets_more_threads_and_no_stall_ends_it(monkeypatch):
  """Reads of 20 ms, and one of .4 s: more threads than cores come in, and the order stays."""
  monkeypatch.setattr(assembly, 'PERIOD', .05)
  monkeypatch.setattr(assembly, 'thread_count', lambda: 1)

  def read(index):
    time.sleep(.4 if index == 77 else .02)
  rows, work = rows_of(15), None
  work = assembly.Assembly(split(monkeypatch, read).images, rows, range(40))
  for step in range(40):
    np.testing.assert_array_equal(work.take()[0], rows(step))
  most = work.decoders.threads
  work.close()
  assert most >= 8 and not alive()


def measure(threads, images, worked, waited, busy):
  return DecodeTimes(2., images, worked * threads, waited * threads, busy * threads)


def test_the_decoders_are_chosen_by_what_was_measured():
  choose, tried = decoders.choose, {}
  fast = measure(2, 400, 2., .01, 1.9)
  assert choose(tried, Decoders(2), fast, 2) == Decoders(2)  # the cores are the limit
  assert choose({}, Decoders(8), measure(8, 400, 2., .1, .4), 8) == Decoders(8, 2)  # the interpreter
  slow, tried = measure(2, 40, 2., 1.8, .2), {}
  assert choose(tried, Decoders(2), slow, 2) == Decoders(8)  # the storage
  assert choose(tried, Decoders(8), measure(8, 160, 2., 1.8, .2), 2) == Decoders(20)
  assert choose(tried, Decoders(20), measure(20, 161, 2., 1.9, .1), 2) == Decoders(8)  # no gain
  assert choose(tried, Decoders(8), measure(8, 160, 2., 1.8, .2), 2) == Decoders(8)
  # A thread that met a stall does not make the others slow.
  stalled = DecodeTimes(7., 160, 2 * 8 + 5., 2 * 8 + 5. - 1.6, 1.6)
  assert choose({Decoders(2): 20.}, Decoders(8), stalled, 2).threads > 8

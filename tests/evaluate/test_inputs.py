"""What reaches the encoder, seen by a spy in its place: the shape and the pixels, for every protocol and monitor.

Data are small pictures whose red says where across the picture a pixel is, and green where down it: what a view shows of the
picture can be read off its pixels. Blue is texture, bright in pictures that are higher than wide.
"""
import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.tree_util import Partial
from PIL import Image as Pillow

from equivariant_ssl.config import load_config
from equivariant_ssl.data.decode import decode
from equivariant_ssl.data.source import Split
from equivariant_ssl.demo import turns
from equivariant_ssl.evaluate import frozen, inputs, online, panel_protocols, protocols
from equivariant_ssl.evaluate.linear import held_out_mask
from equivariant_ssl.evaluate.protocols import PROTOCOLS, Options, Subject
from equivariant_ssl.nets.network import Network
from equivariant_ssl.parallel import sharding
from equivariant_ssl.report import embed, maps, neighbor_tiles, pictures
from equivariant_ssl.training import run_config, runs
from equivariant_ssl.types import Image

SIZE, LARGE, N = 16, 24, 20  # of a view, of a larger canvas; images of a split
SEEN = []


class Spy(nn.Module):
  """An encoder that keeps what it is given, and answers with means: [N H W 3] -> [N 6]."""
  dim = 6

  @nn.compact
  def __call__(self, x, train):
    jax.debug.callback(lambda x: SEEN.append(np.asarray(x)), x)
    half = x[:, : x.shape[1] // 2]
    return jnp.concatenate([x.mean((1, 2)), half.mean((1, 2))], axis=1)


def picture(h, w, seed):
  down, across = np.mgrid[0:h, 0:w]
  ramp = lambda at, n: 20. + 215. * (at + .5) / n
  texture = np.random.RandomState(seed).randint(0, 100, (-(-h // 3), -(-w // 3))).repeat(3, 0).repeat(3, 1)[:h, :w]
  texture = texture + 155 * (h > w)
  return np.stack([ramp(across, w), ramp(down, h), texture], axis=2).round().astype(np.uint8)


def album(root, shape):
  """root/{train,test}/{a,b}/NN.png: pictures of `shape`, every second one turned."""
  for kind, start in (('train', 0), ('test', 100)):
    for i in range(N):
      place = root / kind / 'ab'[i % 2]
      place.mkdir(parents=True, exist_ok=True)
      h, w = shape[::-1] if i % 4 > 1 else shape
      Pillow.fromarray(picture(h, w, start + i)).save(place / f'{i:02d}.png')
  return root


class Case(NamedTuple):
  shape: tuple[int, int]
  canvas: int
  stream: bool


CASES = {'stored': Case((16, 16), SIZE, False), 'stored, streamed': Case((16, 16), SIZE, True),
         'larger': Case((40, 40), LARGE, False),
         '4:3': Case((36, 48), SIZE, False), '4:3, streamed': Case((36, 48), SIZE, True),
         'larger, 4:3': Case((36, 48), LARGE, False), 'larger, 4:3, streamed': Case((36, 48), LARGE, True)}


SLOW = ('stored, streamed', 'larger', '4:3, streamed')  # all of it is in the others too
SOME = [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in CASES]


@functools.cache
def spied_network(canvas, objective='equimod'):
  """(recipe with a spy for its encoder, its frozen functions), the same for all data of a canvas: programs are shared."""
  settings = {'data.name': 'folder', 'data.path': str(ALBUMS[(16, 16)]), 'data.size': str(canvas), 'size': str(SIZE),
              'batch': '12', 'steps': '1', 'mean': '(0.,0.,0.)', 'std': '(1.,1.,1.)', 'augment.rotate.role': 'off',
              'augment.crop.scale': '(.2,1.)', 'equivariance': objective}
  run = runs.prepare_run(load_config(tiny.NAME, settings), sharding.mesh(jax.devices()[:1]))
  network = run.recipe.network
  spy = Network(Spy(), network.projector, network.predictor, network.heads, network.mean, network.std, network.joint)
  recipe = run.recipe._replace(network=spy)
  return run._replace(recipe=recipe), frozen.frozen(recipe, views=4)


ALBUMS = {}


@pytest.fixture(scope='module', autouse=True)
def albums(tmp_path_factory):
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(frozen, 'PANEL', ('crop', 'flip'))
    patch.setattr(frozen, 'OUTSIDE', {})
    patch.setattr(panel_protocols, 'SHARED', 2)
    for shape in {c.shape for c in CASES.values()}:
      ALBUMS[shape] = album(tmp_path_factory.mktemp('album'), shape)
    yield


@functools.cache
def world(case, objective='equimod'):
  """(run, frozen functions, state) of the data of a case."""
  run, fixed = spied_network(case.canvas, objective)
  config = run_config.change_config(run.config, {'data': {'path': str(ALBUMS[case.shape]), 'stream': case.stream}})
  own = runs.prepare_run(config, run.mesh)._replace(recipe=run.recipe)
  return own, fixed, runs.initial_state(own)


def pillow(canvas, true, short, size=SIZE):
  """torchvision's Resize(short) and CenterCrop(size), of a canvas that is unsquashed on the way; bicubic, by Pillow."""
  h, w = (int(short * side / min(true)) for side in true)
  big = Pillow.fromarray(canvas).resize((w, h), Pillow.Resampling.BICUBIC)
  top, left = round((h - size) / 2.), round((w - size) / 2.)
  return np.asarray(big.crop((left, top, left + size, top + size)), np.float32) / 255


def expected_inputs(split, short):
  sizes = np.asarray(split.sizes).astype(int)
  return np.stack([pillow(c, t.tolist(), short) for c, t in zip(np.asarray(split.images), sizes, strict=True)])


def encoder_inputs(f):
  """The images [N S S 3] that reach the encoder while `f` runs."""
  SEEN.clear()
  f()
  jax.effects_barrier()
  assert {x.shape[1:] for x in SEEN} == {(SIZE, SIZE, 3)}
  return np.concatenate([np.asarray(x) for x in SEEN])


def among(images, wanted):
  """[N] which of `wanted` each image is, -1 where none: within 2 / 255."""
  apart = np.abs(images[:, None] - wanted[None]).max((2, 3, 4))
  return np.where(apart.min(1) <= 2 / 255, apart.argmin(1), -1)


def every(images, wanted):
  """All of `images` are of `wanted`, and each of these is among them."""
  found = among(images, wanted)
  assert (found >= 0).all() and set(found) == set(range(len(wanted)))


def crops(images, case, few=False):
  """Views are crops of an allowed aspect of the picture as it is, not of its canvas; no two are alike."""
  images = np.unique(images.reshape(len(images), -1), axis=0).reshape(-1, *images.shape[1:])  # a last batch is filled up
  assert len(images) > (1 if few else 10)
  red, green = images[..., 0], images[..., 1]
  spans = [np.abs(red[:, :, -2] - red[:, :, 1]).mean(1), np.abs(green[:, -2] - green[:, 1]).mean(1)]
  low, high = sorted(case.shape)
  bright = images[..., 2].mean((1, 2)) > .5
  aspect = spans[0] / spans[1] * np.where(bright, low / high, high / low)  # width / height, in pixels of the picture
  assert .75 / 1.25 < aspect.min() and aspect.max() < 4 / 3 * 1.25  # boxes of whole pixels, small ones of few
  assert few or abs(np.log(np.median(aspect))) < .15  # boxes of a 4:3 canvas would be a third off


def short_side(case):
  return SIZE if case.canvas == SIZE else round(SIZE * 256 / 224)


def subject(case, **options):
  run, fixed, state = world(case)
  read = functools.cache(lambda: protocols.labeled_features(run, fixed, state))
  moved = functools.cache(lambda: panel_protocols.panel_features(run, fixed, state))
  return Subject(run, fixed, state, read, moved, jax.random.key(0), Options(epochs=1, batch=6, **options))


READ = ('knn', 'cached', 'logistic', 'few_labels', 'episodes')
PROBES = ('equimod', 'essl', 'simclr', 'byol', 'linear')
TUNED = ('finetune1', 'finetune10', 'finetune100')
PANELS = ('regression', 'regression-mlp', 'care', 'profile', 'health')
PAIRS = ('gains', 'retrieval')


def test_every_protocol_is_watched_here():
  assert {*READ, *PROBES, *TUNED, *PANELS, *PAIRS, 'transfer'} == set(PROTOCOLS)


@pytest.mark.parametrize('name', CASES)
def test_frozen_features_and_the_online_knn(name):
  case = CASES[name]
  run, fixed, state = world(case)
  want = np.concatenate([expected_inputs(split, short_side(case)) for split in (run.source.train, run.source.test)])
  for protocol in READ:
    every(encoder_inputs(lambda protocol=protocol: PROTOCOLS[protocol].measure(subject(case))), want)
  every(encoder_inputs(lambda: online.monitor(run)(state)), want)
  if name.startswith('stored'):  # to the bit
    raw = np.concatenate([np.asarray(s.images) for s in (run.source.train, run.source.test)])
    raw = np.asarray(jax.jit(lambda images: images.astype(jnp.float32) / 255.)(raw))
    found = encoder_inputs(lambda: protocols.labeled_features(run, fixed, state))
    assert {x.tobytes() for x in found} == {x.tobytes() for x in raw}


def centered(case):
  return round(SIZE * 36 / 32) if case.canvas == SIZE else short_side(case)


@pytest.mark.parametrize('name', SOME)
def test_probes_and_fine_tuning(name):
  case = CASES[name]
  run = world(case)[0]
  tests = run.source.test
  few = ('simclr', 'equimod', 'finetune100')
  for protocol in few if name not in SLOW else (*PROBES, *TUNED):
    short = short_side(case) if protocol == 'simclr' else centered(case)
    want = expected_inputs(tests, short)
    images = encoder_inputs(lambda protocol=protocol: PROTOCOLS[protocol].measure(subject(case)))
    if protocol in ('byol', 'linear'):  # the rate is chosen on two of the training images
      out = held_out_mask(run.source.train.labels, .1)
      want = np.concatenate([want, expected_inputs(run.source.train, short)[out]])
    found = among(images, want)
    assert set(found) == {-1, *range(len(want))}
    crops(images[found < 0], case, protocol in ('finetune1', 'finetune10'))  # of two images


@pytest.mark.parametrize('name', SOME)
def test_the_panel(name):
  case = CASES[name]
  run, fixed, state = world(case)
  tests, trains = (expected_inputs(s, short_side(case)) for s in (run.source.test, run.source.train))
  for protocol in PANELS if name in SLOW else ('profile', 'care', 'regression'):
    images = encoder_inputs(lambda protocol=protocol: PROTOCOLS[protocol].measure(subject(case)))
    want = np.concatenate([tests, trains]) if protocol.startswith('regression') else tests
    whole = np.concatenate([want, want[:, :, ::-1]])  # a flip, and what it flips
    found = among(images, whole)
    assert set(range(len(want))) <= set(found)
    if protocol != 'care':  # which crops what is shown, the same box of each
      crops(images[found < 0], case)


@pytest.mark.parametrize('name', SOME)
def test_pairs_and_banks(name):
  case = CASES[name]
  run = world(case)[0]
  canvases = np.asarray(run.source.test.images)
  reference = np.stack([np.asarray(Pillow.fromarray(c).resize((SIZE, SIZE), Pillow.Resampling.BICUBIC)) for c in canvases])
  for protocol in PAIRS:
    images = encoder_inputs(lambda protocol=protocol: PROTOCOLS[protocol].measure(subject(case)))
    found = among(images, reference.astype(np.float32) / 255)  # EquiMod's reference: the whole canvas, as in training
    assert set(found) == {-1, *range(N)}
    crops(images[found < 0], case)


def test_a_bank_without_a_reference_begins_with_what_is_shown():
  case = CASES['larger, 4:3']
  run, fixed, state = world(case, '{"name": "equimod", "reference": "view"}')
  found = []
  images = encoder_inputs(lambda: found.append(frozen.bank(fixed, state, 'equimod', frozen.indexed_images(run.source.test, slice(4)), batch=4)))
  every(images.reshape(4, 4, SIZE, SIZE, 3)[:, 0], expected_inputs(run.source.test, short_side(case))[:4])
  boxes, high = found[0][1]['crop'], run.source.test.sizes[:4, 0] == 48
  np.testing.assert_allclose(boxes.height[:, 0], np.where(high, 16 / 24, 16 / 18), rtol=1e-6)  # and are told so
  np.testing.assert_allclose(boxes.width[:, 0], np.where(high, 16 / 18, 16 / 24), rtol=1e-6)


def test_retrieval_of_two_objectives_that_are_told_other_ops():
  """Each told of a sensitive op of its own; the reference that they share once knew the ops of one alone."""
  two = '[{"name": "equimod", "told": ("crop", "rotate")}, {"name": "equimod", "told": ("crop", "vflip")}]'
  settings = {'augment': '{"order": ("crop", "rotate", "vflip"), "crop": {"role": "both"}, "rotate": {"role": "sensitive"}, '
                         '"vflip": {"role": "sensitive"}}', 'size': '16', 'batch': '12', 'steps': '1', 'equivariance': two}
  run = runs.prepare_run(load_config(tiny.NAME, settings), sharding.mesh(jax.devices()[:1]))
  fixed, values = frozen.frozen(run.recipe, views=4), frozen.variables(runs.abstract_state(run))
  for name, op in (('equimod', 'rotate'), ("equimod'", 'vflip')):
    for what in ('all', 'crop', op):
      embeddings, actions = jax.eval_shape(fixed.banks[name][what], values, frozen.indexed_images(run.source.test, slice(6)))
      assert embeddings.shape[:2] == (6, 4) and set(actions) == {'crop', op}


def test_transfer_and_embed_show_the_whole_central_square(tmp_path):
  photographs = album(tmp_path / 'photographs', (36, 48))
  for case in (CASES['stored'], CASES['larger, 4:3']):  # whatever the run's own data are
    run, fixed, state = world(case)
    images = encoder_inputs(lambda case=case: PROTOCOLS['transfer'].measure(subject(case, targets=(str(photographs),))))
    files = sorted((photographs / 'train').rglob('*.png')) + sorted((photographs / 'test').rglob('*.png'))
    canvases = [decode(f.read_bytes(), SIZE) for f in files]
    want = np.stack([pillow(c, t, SIZE) for c, t in canvases])
    every(images, want)
    encoder = embed.ImageEncoder(Partial(fixed.encode, frozen.variables(state)), SIZE, run.mesh, None)
    part, _, _ = embed._list_images(str(photographs))
    every(encoder_inputs(lambda encoder=encoder, part=part: embed._encode_part(encoder, part, 8)), want)


@pytest.mark.parametrize('name', ['stored', 'larger, 4:3'])
def test_the_report_and_the_export_show_it_too(name):
  case = CASES[name]
  run, fixed, state = world(case)
  want = np.concatenate([expected_inputs(s, short_side(case)) for s in (run.source.train, run.source.test)])
  images = encoder_inputs(lambda: neighbor_tiles.neighbors(run, fixed, state, N, 3))
  every(images, want)
  found = among(encoder_inputs(lambda: maps.maps(run, fixed, state)), want)
  assert set(range(N, 2 * N)) <= set(found)
  assert encoder_inputs(lambda: pictures.strips(run, fixed, state, 2)).shape[0] >= 8
  if case.canvas == SIZE:
    arms_ = encoder_inputs(lambda: turns.readouts(Partial(fixed.encode, frozen.variables(state)), run.source, SIZE))
    of_turned = [expected_inputs(turns.turned(s), short_side(case)) for s in (run.source.train, run.source.test)]
    every(arms_, np.concatenate(of_turned))


# -- the rule itself

def smooth(h, w, seed):
  """A photograph without what a canvas of 256 could not hold: a few waves."""
  random, (down, across) = np.random.RandomState(seed), np.mgrid[0:h, 0:w]
  waves = np.zeros((h, w, 3))
  for _ in range(6):
    f, phase = random.uniform(-3, 3, 2), random.uniform(0, 6.3, 3)
    waves += np.sin(6.283 * (f[0] * down / h + f[1] * across / w))[..., None] * np.cos(phase)
  return np.uint8(np.clip(128 + 30 * waves, 0, 255))


@pytest.mark.parametrize('shape', [(300, 400), (480, 640), (500, 375), (333, 500), (256, 256), (1000, 257)])
def test_imagenets_crop_is_torchvisions(shape):
  """From a canvas of 256, as ImageNet is stored: against Pillow's Resize(256) and CenterCrop(224) of the photograph where
  the canvas holds all of it (bicubic, and torchvision's default bilinear), and of the unsquashed canvas for noise."""
  shows = inputs.canvas_inputs(224, 256)
  assert shows.short == 256
  of = jax.jit(lambda pixels, true: inputs.input_pixels(shows, Image(pixels, true)))
  def ours(canvas):
    return np.asarray(of(jnp.asarray(canvas, jnp.float32) / 255, jnp.array(shape, jnp.float32))) * 255

  h, w = (int(256 * side / min(shape)) for side in shape)
  box = [round((w - 224) / 2.), round((h - 224) / 2.)]
  def theirs(image, kernel):
    big = Pillow.fromarray(image).resize((w, h), kernel)
    return np.asarray(big.crop((*box, box[0] + 224, box[1] + 224)), np.float32)

  photograph = smooth(*shape, 0)
  squash = lambda image: np.asarray(Pillow.fromarray(image).resize((256, 256), Pillow.Resampling.BICUBIC))
  found = ours(squash(photograph))
  for kernel in (Pillow.Resampling.BICUBIC, Pillow.Resampling.BILINEAR):
    assert np.abs(np.rint(found) - theirs(photograph, kernel)).max() <= 2
  noise = np.random.RandomState(1).randint(0, 256, (256, 256, 3)).astype(np.uint8)
  assert np.abs(np.rint(ours(noise)) - theirs(noise, Pillow.Resampling.BICUBIC)).max() <= 2


def test_what_is_decided_by_size_and_canvas():
  assert inputs.canvas_inputs(224, 256) == (224, 256, 256, False) and inputs.canvas_inputs(16, 32).short == 18  # CIFAR-10 at 16 pixels
  assert inputs.canvas_inputs(32, 32).short == 32 and inputs.canvas_inputs(32, 16).short == 32
  assert inputs.with_center_crop(inputs.canvas_inputs(32, 32)).short == 36 and inputs.with_center_crop(inputs.canvas_inputs(224, 256)).short == 256
  square = Split(np.zeros((2, 8, 8, 3), np.uint8), np.array([[8, 8], [5, 5]], np.float32), None)
  assert inputs.split_inputs(8, square).square and not inputs.split_inputs(6, square).square
  assert not inputs.split_inputs(8, square._replace(sizes=np.array([[8, 8], [5, 6]], np.float32))).square

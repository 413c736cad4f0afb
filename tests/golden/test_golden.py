"""Whole steps of ours equal those of the official code in float64: loss and every gradient. tests/golden/README.md."""
import pathlib
from collections.abc import Callable
from typing import NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from golden import arrays
from wide import WIDE, float64

from equivariant_ssl import augment, registry
from equivariant_ssl.augment.blur import Blur
from equivariant_ssl.augment.crop import Crop
from equivariant_ssl.augment.flip import Flip
from equivariant_ssl.augment.gray import Gray
from equivariant_ssl.augment.jitter import Jitter
from equivariant_ssl.augment.rotate import Rotate
from equivariant_ssl.augment.solarize import Solarize
from equivariant_ssl.config import load_config
from equivariant_ssl.data.source import Split
from equivariant_ssl.equivariance import augself
from equivariant_ssl.evaluate import probe
from equivariant_ssl.training import recipe, step
from equivariant_ssl.types import Image, Views

FOLDER = pathlib.Path(__file__).parent
BOUND = 1e-10
# The units in which EquiMod's code tells; in its SimCLR branch the first 15.
EQUIMOD = np.array([3.9740, 3.9851, 4.9544, 4.9539, .5, .3993, 1.1651, 1.0210, 1.0200, 1.1669, .2066, .2068, .2066, .0517,
                    .3997, .30381, .65251, .064719])
EQUIMOD[:4] /= arrays.SIZE  # boxes are told in pixels there
SMALL = {'encoder.name': 'resnet', 'encoder.depth': '4', 'encoder.width': '8', 'encoder.stem': 'cifar', 'dtype': 'float32',
         'batch': str(arrays.B), 'size': str(arrays.SIDE), 'mean': '0,0,0', 'std': '1,1,1'}


def done(views: int = 2, **kw) -> dict:
  """The fixed actions as ours, [B views ...]."""
  a = arrays.actions(views, **kw)
  last = lambda x: np.moveaxis(x, -1, 0)
  return jax.tree.map(jnp.asarray, {
      'crop': Crop(*last(a['box'] / arrays.SIZE)), 'flip': Flip(a['flip']), 'gray': Gray(a['gray']),
      'jitter': Jitter(a['jittered'], a['order'], *last(a['factors']), a['hue']),
      'blur': Blur(a['blurred'], a['sigma']), 'solarize': Solarize(a['solarized'])})


def images(name: str, views: int = 2, side: int = arrays.SIDE):
  return jnp.asarray(arrays.images(name, views, side))


def plain_views(**kw) -> dict[str, Views]:
  return {'views': Views(images('views'), done(**kw))}


def with_reference() -> dict[str, Views]:
  return {**plain_views(), 'reference': Views(images('reference', 1), done(1))}


def with_turned() -> dict[str, Views]:
  """The third view shown all four ways by our op, classes 0 to 3."""
  rotate, third = registry.make(augment, 'rotate'), images('turned', 1, arrays.SIDE // 2)[:, 0]
  of = lambda image, k: rotate.apply(Rotate(k), Image(image, jnp.zeros(2))).pixels
  turned = jnp.stack([jax.vmap(lambda image, k=k: of(image, k))(third) for k in range(4)], axis=1)
  return {**plain_views(), 'essl': Views(turned, {'rotate': Rotate(jnp.broadcast_to(jnp.arange(4), (arrays.B, 4)))})}


def with_own() -> dict[str, Views]:
  return {**plain_views(), 'care': Views(images('care'), done())}


def numbered_views(*names: str) -> Callable[[], dict[str, Views]]:
  """Views whose actions are the numbers themselves: one array a view, or of the second alone (from the first to it)."""
  def of() -> dict[str, Views]:
    rows = [jnp.asarray(arrays.head_numbers(n, 4 if n == 'told' else 13)) for n in names]
    rows = rows if len(rows) == 2 else [jnp.zeros_like(rows[0]), *rows]
    return {'views': Views(images('views'), {'told': jnp.stack(rows, axis=1)})}
  return of


class Case(NamedTuple):
  """config and what is overridden; views: of the step; units: what is told is divided by; raw: what is told is in the
  action; zero: weights that are 0, of ours alone."""
  config: str
  over: dict[str, str]
  views: Callable[[], dict[str, Views]] = plain_views
  units: np.ndarray | float = 1.
  raw: bool = False
  zero: tuple[str, ...] = ()


def widths(hidden: tuple[int, ...], out: int, section: str = 'invariance.projector') -> dict[str, str]:
  return {f'{section}.hidden': str(hidden), f'{section}.{"out" if "invariance" in section else "dim"}': str(out)}


def equivariance(name: str, **kw) -> dict[str, str]:
  return {'equivariance.name': name, **{f'equivariance.{k}': str(v) for k, v in kw.items()}}


TWO, THREE, TWELVE = widths((8,), 6), widths((12, 12), 6), widths((12,), 6)
PREDICTOR = 'invariance.predictor'
CASES = {
    'equimod_simclr': Case('cifar10_simclr_equimod', {**THREE, **widths((12, 12), 6, 'equivariance'),
                                                      'equivariance.action_dim': '6'}, with_reference, EQUIMOD[:15]),
    'equimod_byol': Case('cifar10_byol_equimod', {
        **widths((12,), 12), **widths((12,), 12, PREDICTOR), **widths((12, 12), 6, 'equivariance'),
        'equivariance.action_dim': '6', 'steps': '100'}, with_reference, EQUIMOD),
    'essl_simclr': Case('cifar10_simclr_essl', {**widths((12,), 12), 'equivariance.hidden': '(12, 12)'}, with_turned),
    'essl_simsiam': Case('cifar10_simsiam_essl', {
        **widths((12,), 12), **widths((8,), 12, PREDICTOR), 'equivariance.hidden': '(12, 12)'}, with_turned),
    'augself': Case('stl10_simclr_augself', {**TWO, 'equivariance.hidden': '(12, 12)'}, lambda: plain_views(same_flips=True)),
    'cassle': Case('stl10_simclr_augself', {
        **TWO, **equivariance('cassle', augmentations=(), action_hidden=(6,) * 5, action_dim=6)},
                   numbered_views('told 0', 'told 1'), raw=True),
    'sie': Case('imagenet_vicreg', {
        **widths((6, 6), 6), 'invariance.similarity': '10', 'invariance.std': '0', 'invariance.cov': '0',
        **equivariance('sie', joint=True, hidden=(6, 6), dim=6)}, numbered_views('told'), raw=True, zero=('heads_sie/predict/bias',)),
    'stl': Case('stl10_simclr_stl', {
        **widths((12,), 6), **widths((12,), 6, 'equivariance'), 'equivariance.read_hidden': '6,',
        'equivariance.read_dim': '6'}, zero=('heads_stl/move/bias',)),
    'sen': Case('stl10_simclr_augself', {
        'invariance.name': 'none',
        **equivariance('sen', predictor='linear', negatives='all', hidden=(12, 12), dim=12, augmentations=())},
        numbered_views('told'), raw=True),
    'care': Case('cifar10_care', {**TWO, 'equivariance.splits': '4'}, with_own),
    'barlow': Case('imagenet_barlow', widths((12, 12), 12)),
    'vicreg': Case('imagenet_vicreg', widths((12, 12), 12)),
    'byol': Case('imagenet_byol', {**TWELVE, **widths((12,), 6, PREDICTOR), 'steps': '100'}),
    'simsiam': Case('imagenet_simsiam', {**widths((8, 8), 12), **widths((6,), 12, PREDICTOR)}),
    'solo_vicreg': Case('cifar10_vicreg', {**widths((12, 12), 12), 'encoder.stem': 'solo'}),
    'solo_barlow': Case('cifar10_barlow', {**widths((12, 12), 12), 'encoder.stem': 'solo'}),
}


def named(tree) -> dict[str, np.ndarray]:
  return {'/'.join(k.key for k in path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def filled(shapes: dict, case: Case, at: str = '') -> dict:
  def one(path, leaf):
    name = '/'.join(k.key for k in path)
    return jnp.zeros(leaf.shape) if name in case.zero else jnp.asarray(arrays.weight(at + name, leaf.shape))
  return jax.tree_util.tree_map_with_path(one, shapes)


def narrow_run(case: Case):
  """The recipe of a config whose layers are narrow, that tells in the official units."""
  config = load_config(case.config, {**SMALL, **case.over})
  config.dtype = WIDE
  of = lambda op: lambda action: op.encode(action) / case.units
  between = lambda op: lambda a, b: op.relative(a, b) / case.units
  units = lambda op, draws: op._replace(encode=of(op), relative=between(op))
  if case.raw:
    units = lambda op, draws: op._replace(encode=lambda action: action['told'], relative=lambda a, b: b['told'] - a['told'])
  with mock.patch.object(recipe.augment, 'normalized', units), mock.patch.dict('sys.modules', {tiny.__name__: tiny}):
    return recipe.make_recipe(config, 100 * arrays.B, arrays.SIZE, config.mean, config.std)


def ours(case: Case) -> tuple[float, dict[str, np.ndarray]]:
  """(loss, {path: gradient}) of a whole step, float64."""
  run, shown = narrow_run(case), case.views()
  zeros = lambda shapes: jax.tree.map(lambda s: jnp.zeros(s.shape), shapes)
  shapes = jax.eval_shape(lambda: run.network.init(jax.random.key(0), shown, run.equivariances, True))
  params, stats = filled(shapes['params'], case), zeros(shapes['batch_stats'])
  average, views = None, {'views': shown['views']}
  if run.invariance.decay is not None:
    its = jax.eval_shape(lambda: run.network.init(jax.random.key(0), views, run.equivariances, True, method='target'))
    average, still = filled(its['params'], case, 'target/'), zeros(its['batch_stats'])

  @jax.jit
  def value(params, average):
    aim = None
    if average is not None:
      moved = step.update_average(run, jnp.asarray(3), average, params) if run.invariance.update == 'before' else average
      aim = step.target_embeddings(run, moved, still, views)[0]
    (loss, _), grads = jax.value_and_grad(lambda p: step.loss(run, p, stats, shown, aim), has_aux=True)(params)
    return loss, grads
  loss, grads = value(params, average)
  return float(loss), {k: g for k, g in named(grads).items() if k not in case.zero}


def ranges(wiring, found):
  """AugSelf's: the configured ranges of the factors in place of those that many draws span (1e-4 less)."""
  asked = MEASURED(wiring, found)
  return {**asked, 'jitter': asked['jitter']._replace(span=np.array([.8, .8, .8, .2]))}


MEASURED = augself.build_questions


@pytest.mark.parametrize('name', CASES)
def test_a_whole_step_equals_the_official_code(name):
  golden = dict(np.load(FOLDER / f'{name}.npz'))
  loss = golden.pop('loss')
  with float64(), mock.patch.object(augself, 'build_questions', ranges):
    found, grads = ours(CASES[name])
  assert found == pytest.approx(loss, rel=BOUND), name
  assert set(grads) == set(golden)
  largest = max(np.abs(g).max() for g in golden.values())  # a bias before a BatchNorm has a gradient of rounding alone
  for path, wanted in golden.items():
    error = np.abs(grads[path] - wanted).max()
    assert error <= BOUND * np.abs(wanted).max() + 1e-3 * BOUND * largest, f'{path}: {error / np.abs(wanted).max():.1e}'


def fix_evaluation(monkeypatch, steps: list) -> None:
  """Our evaluation on the fixed head, orders of images and features of crops; every step's head goes to `steps`."""
  shown = jnp.asarray(np.stack([arrays.probed(s) for s in range(arrays.EPOCHS * arrays.PER_EPOCH)]))
  monkeypatch.setattr(np, 'float32', np.float64)
  monkeypatch.setattr(probe, 'epoch_order', lambda key, epoch, N: arrays.probe_order(epoch))
  monkeypatch.setattr(probe, 'torch_linear', lambda key, D, K: probe.Head(
      *(jnp.asarray(arrays.weight(f'probe/{n}', s)) for n, s in (('kernel', (D, K)), ('bias', (K,))))))
  key_for = probe.key_for
  monkeypatch.setattr(probe, 'key_for', lambda key, *path: path[1] if path[0] == 'augment' else key_for(key, *path))
  views = lambda op, size, step, *more: shown[step % len(shown)][:, None, None]
  monkeypatch.setattr(probe.inputs, 'training_views', views)
  monkeypatch.setattr(probe.sharding, 'take_canvases', lambda rows, index: rows[index])  # no pixels: `views` reads none
  made = probe._step.__wrapped__

  def remembering(*a):
    trace, step = made(*a)
    def remember(*b):
      state = step(*b)
      steps.append(jax.tree.map(np.asarray, state[0]))
      return state
    return trace, remember
  monkeypatch.setattr(probe, '_step', remembering)


@pytest.mark.parametrize('name, epochs', [('equimod', arrays.EPOCHS), ('essl', 100)])
def test_the_head_of_a_linear_evaluation_moves_as_in_the_official_code(name, epochs, monkeypatch):
  golden, steps = np.load(FOLDER / f'probe_{name}.npz'), []
  protocol = probe.PROTOCOLS[name]
  assert (protocol.epochs, protocol.batch) == ({'equimod': 90, 'essl': 100}[name], 256)
  with float64():
    fix_evaluation(monkeypatch, steps)
    images = np.zeros((arrays.N, 1, 1, arrays.D), np.uint8)  # features are given: what is in them is not read
    split = Split(images, np.ones((arrays.N, 2), np.float32), arrays.probe_labels())
    probe.train(protocol._replace(epochs=epochs, batch=arrays.BATCH), lambda x: x.reshape(len(x), -1), split, 1, arrays.K,
                jax.random.key(0))
    monkeypatch.undo()
  assert len(steps) == epochs * arrays.PER_EPOCH
  for i, (kernel, bias) in enumerate(zip(golden['kernel'], golden['bias'], strict=True)):
    np.testing.assert_allclose(steps[i].kernel[0], kernel, rtol=1e-8, atol=1e-10, err_msg=f'step {i}')
    np.testing.assert_allclose(steps[i].bias[0], bias, rtol=1e-8, atol=1e-10, err_msg=f'step {i}')

"""`eqssl train --plan`: FLOPs counted as by hand, collectives read off a program, bytes as the shapes have them."""
import itertools

import jax
import jax.numpy as jnp
import pytest
import tiny
from jax.sharding import PartitionSpec

from equivariant_ssl import cli, nets, registry, shipped
from equivariant_ssl.config import load_config
from equivariant_ssl.nets.conv import conv2d
from equivariant_ssl.parallel import sharding, step_cost, step_plan

CANVAS = 16 ** 2 * 3 + 8  # bytes of a digit's canvas with its height and width


def count(f, *shapes: tuple[int, ...]) -> float:
  return step_cost.flops(jax.make_jaxpr(f)(*(jnp.zeros(s) for s in shapes)).jaxpr)


def by_hand(size: int, k: int, stride: int, padding: int) -> int:
  """Multiply-adds of one channel of a convolution that meet a pixel."""
  outs = range((size + 2 * padding - k) // stride + 1)
  meets = sum(0 <= o * stride + i - padding < size for o, i in itertools.product(outs, range(k)))
  return meets ** 2


@pytest.mark.parametrize(('k', 'stride', 'padding'), [(3, 1, 1), (3, 2, 1), (7, 2, 3), (1, 2, 0)])
def test_convolutions_and_their_gradients_count_what_meets_a_pixel(k, stride, padding):
  x, kernel = (2, 9, 9, 5), (k, k, 5, 6)
  one = 2. * 2 * 5 * 6 * by_hand(9, k, stride, padding)
  f = lambda x, w: conv2d(x, w, stride, padding)
  assert count(f, x, kernel) == one
  gradient = jax.grad(lambda x, w: (f(x, w) ** 2).sum(), argnums=(0, 1))
  # The CPU's branch for the weights is a product over whole patches, their padding counted: the dearest is taken.
  out = (9 + 2 * padding - k) // stride + 1
  patches = 2. * 2 * 5 * 6 * out ** 2 * k ** 2
  assert count(gradient, x, kernel) == pytest.approx(2 * one + patches)


def test_products_loops_and_dead_code():
  product = 2. * 4 * 8 * 3
  assert count(lambda a, b: a @ b, (4, 8), (8, 3)) == product
  assert count(lambda a, b: jnp.stack([a @ b for _ in range(2)])[0] * 0 + a @ b, (4, 8), (8, 3)) == 3 * product
  assert count(lambda a, b: jax.lax.scan(lambda c, _: (c + a @ b, None), jnp.zeros((4, 3)), length=5)[0],
               (4, 8), (8, 3)) == 5 * product
  dead = jax.make_jaxpr(lambda a, b: (a @ b, a.sum())[1])(jnp.zeros((4, 8)), jnp.zeros((8, 3)))
  assert dead.eqns[0].primitive.name == 'dot_general' and step_cost.flops(dead.jaxpr) == 0
  assert count(jax.jit(lambda a, b: jax.lax.cond(a[0, 0] > 0, lambda: a @ b, lambda: jnp.zeros((4, 3)))),
               (4, 8), (8, 3)) == product


def test_a_resnet_50_is_as_dear_as_published():
  """4.09 G multiply-adds an image (torchvision), which count those on padding: 3.6 % more than meet a pixel."""
  net = registry.make(nets, 'resnet', depth=50, stem='imagenet', width=64)
  x = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
  variables = jax.eval_shape(lambda x: net.init(jax.random.key(0), x, False), x)
  found = step_cost.flops(jax.make_jaxpr(lambda v, x: net.apply(v, x, False))(variables, x).jaxpr)
  assert .95 < found / (2 * (4.09e9 - 2048e3)) < 1


def test_a_loops_collectives_count_every_round():
  mesh = sharding.mesh(jax.devices()[:2])

  def f(x):
    with sharding.use_mesh(mesh):
      one = lambda total, part: (total + jax.lax.with_sharding_constraint(part.sum(0), jax.P()), None)
      return jax.lax.scan(one, x[0].sum(0), x)[0]
  x = jax.ShapeDtypeStruct((5, 4, 3), jnp.float32, sharding=jax.NamedSharding(mesh, jax.P(None, 'data')))
  found = step_cost.collectives(jax.jit(f).lower(x).compile().as_text())
  assert sum(n for n, _ in found.values()) in (5, 6), found  # and the first sum's, where it is not one with them
  start = '  %s = (f32[4], f32[8]) all-gather-start(f32[4] %x), dimensions={0}'
  assert step_cost.collectives(start) == {'all-gather': (1, 32)}


def test_collectives_of_a_program():
  mesh = sharding.mesh()
  x = jax.device_put(jnp.zeros((16, 8)), sharding.batch_sharding(mesh))
  f = jax.shard_map(lambda x: (jax.lax.psum(x.sum(0, keepdims=True), 'data'), jax.lax.all_gather(x, 'data', tiled=True)),
                    mesh=mesh, in_specs=PartitionSpec('data'), out_specs=PartitionSpec(), check_vma=False)
  found = step_cost.collectives(jax.jit(f).lower(x).compile().as_text())
  assert found == {'all-reduce': (1, 8 * 4), 'all-gather': (1, 16 * 8 * 4)}
  text = '%a = (bf16[4,2]{1,0}, f32[]) all-reduce-start(%x, %y), replica_groups={}\n%b = s32[3] add(%all-reduce.1, %c)'
  assert step_cost.collectives(text) == {'all-reduce': (1, 4 * 2 * 2 + 4)}


def test_the_plan_of_a_config_in_words_and_bytes(capsys):
  found = step_plan.run(load_config(tiny.NAME), 0, print)
  said = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines() if not line.startswith(' '))
  assert said['devices'] == '8 x cpu, batch 16 = 8 x 2' and said['fits'].startswith('ask the compiler')
  assert said['steps'].startswith('8 = ') and said['collectives'].count('all-') >= 1
  all_reduces = found.statistics['all-reduce'][0]
  assert 0 < all_reduces < found.collectives['all-reduce'][0]
  assert said['batchnorm'].startswith(f'statistics over the 16 images of the batch; of these collectives: {all_reduces} all-red')
  for groups, words in ((2, 'each of 2 groups of 8 images; one is on 4 devices; '),
                        (8, 'each of 8 groups of 2 images; a device holds 1; ')):
    line = next(x for x in step_plan.lines(found._replace(groups=groups, statistics={})) if x.startswith('batchnorm'))
    assert line == f'batchnorm    statistics over {words}of these collectives: none'
  assert found.params > 4 * found.parameters and (found.images, found.views, found.steps) == (16, 3, 8)
  assert found.batch == 2 * CANVAS and found.data % CANVAS == 0 < found.data
  # Only what must exist: no guess at what another compiler keeps for the gradient.
  assert found.need == found.params + found.optimizer + found.batch + found.data


@pytest.mark.parametrize(('dataset', 'train', 'found'), [
    ('stl10', 'train+unlabelled', (105_000, 0)), ('stl10', 'unlabelled + train', (105_000, 0)),
    ('stl10', 'unlabelled', (100_000, 0)), ('stl10:1.0.0', 'train', (5_000, 10)),
    ('cifar10', 'train[:80%]', None), ('mine', 'train', None)])
def test_what_is_known_of_data_that_are_not_prepared(dataset, train, found):
  config = load_config('smoke', {'data.name': 'tfds', 'data.dataset': dataset, 'data.train': train})
  assert step_plan.known_data(config) == found


def test_images_that_are_held_out_of_a_labeled_split_are_trained_on():
  """As `holdout.hold_out` does: STL-10's 105,000 training images stay, and 1,000 of the 5,000 with labels are not read out."""
  whole, held = (load_config('stl10_simclr_augself', {'validation': str(share)}) for share in (0., .2))
  assert step_plan._train_count(whole) == step_plan._train_count(held) == 105_000
  assert step_plan._train_count(load_config('cifar10_simclr', {'validation': '.2'})) == 40_000


@pytest.mark.parametrize('name', sorted(p.stem for p in shipped.folders()[0].glob('*.py')))
def test_the_training_images_of_every_shipped_config_are_known(name):
  """Or they are the digits, which come with scikit-learn, or a folder of the user."""
  config = load_config(name)
  assert config.data.name in ('digits', 'folder') or step_plan.known_data(config), f'the split of {name} is not in plan.KNOWN'


@pytest.mark.parametrize('name', ['stl10_simclr_stl', 'stl10_simclr_augself'])
def test_stl_10_is_planned(name, capsys, monkeypatch, tmp_path):
  """Small, through the command line, where the data set is not prepared."""
  monkeypatch.setattr(cli, '_cache', lambda: None)
  monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path))
  small = {'size': 8, 'batch': 8, 'data.size': 8, 'encoder.name': 'mlp', 'encoder.hidden': 8}
  code = cli.main(['train', '--config', name, '--plan', *(f'--config.{k}={v}' for k, v in small.items())])
  captured = capsys.readouterr()
  assert code == 0, captured.err
  assert f'200 epochs of {105_000 // 8:,}' in captured.out


def test_an_unknown_number_of_devices(capsys):
  assert cli.main(['train', '--config', 'smoke', '--plan', '--devices', '-1']) == 2
  assert 'not a number of devices' in capsys.readouterr().err


def test_a_batch_of_65536_can_be_traced():
  """Its BatchNorm has more than 2^31 values a channel."""
  of = lambda batch: step_plan.step_flops(load_config('smoke', {
      'batch': str(batch), 'size': '224', 'data': "{'name':'tfds','dataset':'imagenet2012','size':256}"}))
  assert 4 < of(65536) / of(16384) < 4.2  # the loss alone grows faster than the batch

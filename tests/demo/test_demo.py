"""The demo: its conclusion follows the numbers, its read-outs read what was planted, and in miniature it runs."""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image as Pillow
from rich.console import Console

from equivariant_ssl import augment, cli, registry
from equivariant_ssl.config import load_config
from equivariant_ssl.data import digits
from equivariant_ssl.data.source import Split
from equivariant_ssl.demo import digits_demo, methods_demo, study_demo, turns, workers
from equivariant_ssl.demo.arms import (
  READOUTS,
  Budget,
  TrainedArm,
  arm_config,
  readout_images,
  readout_split,
  train_arm,
)
from equivariant_ssl.types import Image

NAMES = 'untrained', 'crops', 'invariant', 'both', 'sensitive'


def arms(turn: dict[str, float], digit: dict[str, float], noise: float = 0.1) -> dict[str, TrainedArm]:
  """Three seeds an arm; the turn is read in 80 % and the class in 90 %, plus what is said of an arm."""

  def readouts(name: str) -> dict[str, list[float]]:
    level = {'turn': 80.0 + turn.get(name, 0.0), 'both': 70.0 + turn.get(name, 0.0)}
    spread = noise if name == 'invariant' else 0.1
    return {
      k: [level.get(k, 90.0 + digit.get(name, 0.0)) + spread * d for d in (-1, 0, 1)] for k in READOUTS
    }

  return {name: TrainedArm(readouts(name), None, [], []) for name in NAMES}


def test_the_conclusion_follows_the_numbers():
  lead, both, more = digits_demo.conclude(arms({'invariant': -10.0}, {'invariant': -7.0}))
  assert lead.startswith('Sensitivity keeps more of the turn than the invariance: ')
  assert '80.0 %, of `invariant` in 70.0 % (+10.0 [10.0, 10.0] points' in lead
  assert 'makes no difference that these seeds can show to the class accuracy of crops' in lead
  assert 'in 70.0 % against 60.0 % (+10.0' in both
  assert 'takes from the kNN accuracy of crops alone (-7.0' in more and 'wins back some of it (+7.0' in more


def test_the_conclusion_can_be_the_opposite():
  lead, _, more = digits_demo.conclude(arms({'sensitive': -5.0}, {'sensitive': -2.0}))
  assert lead.startswith('The invariance keeps more of the turn') and '(-5.0' in lead
  assert 'sensitivity takes from the class accuracy of crops alone (-2.0' in lead
  assert 'sensitivity takes from what is kept of the turn (-5.0' in more
  lead, *_ = digits_demo.conclude(arms({'sensitive': 3.0}, {'sensitive': 3.0}, noise=5.0))
  assert lead.startswith('These seeds do not show') and 'adds to the class accuracy' in lead


def test_one_seed_shows_nothing():
  one = {
    name: arm._replace(readouts={k: v[:1] for k, v in arm.readouts.items()})
    for name, arm in arms({'invariant': -10.0}, {}).items()
  }
  assert digits_demo.conclude(one)[0].startswith('These seeds do not show')


def test_the_table_leads_with_the_turn_and_shows_every_arm(capsys):
  table = digits_demo.accuracy_table(arms({'invariant': -10.0}, {}), '797 held-out test digits')
  headers = [column.header for column in table.columns]
  assert headers[:3] == ['arm', 'turn %', 'class %']
  Console(width=130).print(table)
  out = capsys.readouterr().out
  assert all(name in out for name in (*NAMES, 'chance')) and '70.0 ± 0.1' in out
  assert '+10.0 [10.0, 10.0]' in out and '797 held-out test digits' in out


def small(split: Split, count: int) -> Split:
  return Split(*(a[:count] for a in split))


@pytest.fixture(scope='module')
def few_digits():
  source = digits.make()
  return source._replace(train=small(source.train, 160), test=small(source.test, 80))


def test_the_turned_digits_are_those_of_the_op(few_digits):
  op, images = registry.make(augment, 'rotate'), few_digits.test.images[:3]
  views = turns.turned(small(few_digits.test, 3))
  assert views.images.shape == (12, 16, 16, 3)
  assert views.labels.tolist() == np.repeat(few_digits.test.labels[:3], 4).tolist()
  for i, t in ((0, 0), (1, 1), (2, 2), (2, 3)):
    action = jax.tree.map(lambda a, t=t: a[t], op.choices)
    image = Image(jnp.asarray(images[i], jnp.float32), jnp.full(2, 16.0))
    np.testing.assert_array_equal(views.images[4 * i + t], op.apply(action, image).pixels)


def pixels(images):
  """Features that keep everything: the gray of each pixel of the scan."""
  return images[:, ::2, ::2, 0].reshape(len(images), -1)


def blind(images):
  """Features that do not change when an image is turned."""
  return sum(pixels(jnp.rot90(images, t, axes=(1, 2))) for t in range(4))


def test_the_read_outs_read_what_was_planted(few_digits):
  """The turn is read off features that keep it, and is at chance off those that are blind to it."""
  keeps, forgets = (turns.readouts(f, few_digits, 16) for f in (pixels, blind))
  assert set(keeps) == set(READOUTS)
  assert keeps['turn'] > 70 and keeps['linear'] > 75 and keeps['both'] > 40
  assert abs(forgets['turn'] - 25) < 12 and forgets['linear'] > 40
  assert keeps['both'] <= keeps['turn'] and forgets['both'] < 25


def stub_retriever(predict):
  """`turns.retriever` of a network whose embeddings are pixels, and whose head is `predict`."""
  chain = augment.chain(registry.make(augment, 'rotate'))

  def apply(variables, *arguments, method):
    x = arguments[0] if method == 'encode' else arguments[2]
    return x if method == 'embed' else jax.vmap(pixels)(x)

  recipe = types.SimpleNamespace(
    equivariances={'equimod': types.SimpleNamespace(tap=0)},
    canvas=16,
    network=types.SimpleNamespace(apply=apply),
    wirings={'equimod': types.SimpleNamespace(own_chains=(chain,))},
  )
  network = types.SimpleNamespace(answer={'equimod': predict})
  return turns.retriever(recipe, network, 'equimod')


def turn_pixels(variables, pair):
  """A perfect head: it turns the source as its action says."""
  image = pair.source.reshape(-1, 8, 8)
  choices = jnp.stack([jnp.rot90(image, t, axes=(1, 2)).reshape(len(image), -1) for t in range(4)])
  return choices[pair.after['rotate'].turns, jnp.arange(len(image))]


def test_a_perfect_head_retrieves_the_turn_and_an_ignorant_one_does_not(few_digits):
  perfect = stub_retriever(turn_pixels)({}, few_digits.test)
  ignorant = stub_retriever(lambda variables, pair: pair.source)({}, few_digits.test)
  assert perfect.turn > 75 and perfect.digit > 70 and perfect.both <= min(perfect.turn, perfect.digit)
  assert abs(perfect.turn_without - 25) < 8 and ignorant.turn == ignorant.turn_without
  assert perfect.nearest.shape == (80, 4, turns.NEAREST)
  digit = np.arange(80)[:, None, None]
  assert not (perfect.nearest // 4 == digit).any()  # views of other digits alone


def test_settings_are_chosen_on_other_digits_and_other_seeds():
  test, validation = Budget(6), Budget(3, readout='validation')
  assert not set(test.seed_numbers) & set(validation.seed_numbers)
  held_out, tested = readout_split(validation).images, readout_split(test).images
  assert len(tested) == 797 and readout_images(test) == '797 held-out test digits'
  train = digits.make().train.images.reshape(1000, -1)
  assert len(held_out) == 196
  assert all((image.ravel() == train).all(1).any() for image in held_out[:20])
  spec = digits_demo.ARMS['sensitive']
  assert arm_config(spec, validation).validation == 0.2 and arm_config(spec, test).validation == 0


def test_progress_without_a_terminal_is_lines_with_the_time_left(capsys):
  with workers.show_progress(quiet=0.0) as (report, say):
    report(0.0)
    report(0.25)
    say('crops: done')
  lines = capsys.readouterr().err.splitlines()
  assert 'compiled' in lines[0] and '25 %' in lines[1] and 'left' in lines[1]
  assert lines[2] == 'crops: done'
  assert workers.remaining(0.25, 80.0, 20.0) == '1:20 gone, about 3:00 left'
  with workers.show_progress() as (report, say):
    report(0.5)
  assert not capsys.readouterr().err  # a line every 20 s, no more


TINY = {'encoder.width': '4', 'size': '8', 'steps': '2', 'batch': '20'}


@pytest.fixture(scope='module')
def trained():
  """The arm `sensitive` in miniature, with its untrained network; two seeds of two steps."""
  done = []
  spec = digits_demo.ARMS['sensitive']._replace(untrained=True)
  spec = spec._replace(overrides={**spec.overrides, **TINY})
  with jax.numpy_dtype_promotion('standard'):  # optax raises a float to an int
    return train_arm('sensitive', spec, Budget(2, 2), done.append), done


def test_an_arm_has_every_read_out_of_every_seed(trained):
  by_name, done = trained
  assert set(by_name) == {'untrained', 'sensitive'} and by_name['untrained'].retrieved is None
  for arm in by_name.values():
    assert all(len(arm.readouts[key]) == 2 for key in READOUTS)
  arm = by_name['sensitive']
  assert [len(losses) for losses in arm.losses] == [2, 2] and len(arm.gains) == 2
  assert [r.nearest.shape for r in arm.retrieved] == [(797, 4, turns.NEAREST), (0, 4, turns.NEAREST)]
  assert sum(done) == 2 * (2 * 2 + 2 * 100)  # two seeds: two steps of double cost, two read-outs


def test_the_demo_in_miniature(trained, tmp_path, monkeypatch, capsys):
  """Everything behind the training: the table, the sentences, the figure, the page."""
  by_name, _ = trained

  def train_all(specs, budget):
    return {
      **{name: by_name['sensitive'] for name in specs},
      'crops': by_name['sensitive']._replace(gains=None, retrieved=None),
      'untrained': by_name['untrained'],
    }

  monkeypatch.setattr(digits_demo, 'train_all', train_all)
  digits_demo.run_demo(tmp_path, Budget(2, 2))
  out = capsys.readouterr().out
  results = json.loads((tmp_path / 'results.json').read_text())
  assert results['conclusion'][0] in out.replace('\n', ' ')
  assert set(results['arms']) == {'untrained', *digits_demo.ARMS} and results['seeds'] == [0, 1]
  size = (tmp_path / 'figure.png').stat().st_size
  with Pillow.open(tmp_path / 'figure.png') as figure:
    assert figure.size[0] > 1000 and 20_000 < size < 200_000
  page = (tmp_path / 'report.html').read_text()
  assert 'Training loss' in page and 'data:image/png;base64,' in page and 'seeds 0, 1' in page
  assert (tmp_path / 'table.txt').exists() and len(json.dumps(results)) < 50_000


def methods(spread: float) -> dict[str, TrainedArm]:
  """Two seeds an arm; the embeddings of `byol + essl` have `spread`, all others fill the sphere."""
  of = lambda name, knn: TrainedArm(
    {k: [knn, knn + 1.0] for k in READOUTS},
    None,
    [],
    [{'std': spread if name == 'byol + essl' else 0.9}] * 2,
  )
  names = list(methods_demo.specs())
  return {'untrained': of('', 50.0)._replace(last=[])} | {
    n: of(n, 80.0 + i) for i, n in enumerate(names)
  }


@pytest.mark.parametrize('spread, collapsed', [(0.9, False), (0.1, True)])
def test_the_table_of_methods_says_what_collapsed(spread, collapsed, capsys):
  arms = methods(spread)
  assert ('Collapsed: byol + essl.' in methods_demo.conclude(arms)) == collapsed
  assert ('No run collapsed' in methods_demo.conclude(arms)) != collapsed
  Console(width=170).print(methods_demo.table(arms, '797 held-out test digits'))
  out = capsys.readouterr().out
  assert (
    all(name in out for name in arms) and ('COLLAPSED' in out) == collapsed and '50.5 ± 0.7' in out
  )


def test_every_arm_of_the_methods_is_a_config_that_loads():
  specs = methods_demo.specs()
  assert len(specs) == 15 and sum(s.untrained for s in specs.values()) == 1
  for name, spec in specs.items():
    config = load_config(spec.config, spec.overrides)
    assert config.invariance.name == name.split()[0]
    assert config.equivariance.name == (name.split()[-1] if '+' in name else 'none')


def test_the_study_asks_the_question_of_the_demo():
  from equivariant_ssl.study import study_plan

  settings = study_demo.settings(Budget(2))
  plan = study_plan.make_plan(settings, 'eqssl demo --study', {})
  roles = {arm['name']: arm['config']['augment']['rotate']['role'] for arm in plan['made']}
  assert sorted(roles.values()) == ['both', 'invariant', 'off', 'sensitive']
  assert plan['readout'] == 'validation' and len(study_plan.runs(plan)) == 8


def test_no_seed_is_no_demo(capsys):
  assert cli.main(['demo', '--seeds', '0']) == 2
  assert 'nothing to train' in capsys.readouterr().err


@pytest.mark.slow
def test_the_command(tmp_path, monkeypatch, capsys):
  """Two seeds of four steps, in processes: everything is drawn and written."""
  monkeypatch.setattr(cli, '_cache', lambda: None)
  assert cli.main(['demo', '--out', str(tmp_path), '--seeds', '2', '--steps', '4']) == 0
  said = capsys.readouterr()
  assert 'chance 25 %' in said.out and 'sensitive: 2 seeds after' in said.err
  results = json.loads((tmp_path / 'results.json').read_text())
  assert set(results['arms']) == {'untrained', *digits_demo.ARMS} and results['environment']['jax']
  assert (tmp_path / 'figure.png').stat().st_size > 10_000 and (tmp_path / 'report.html').exists()


@pytest.mark.slow
def test_the_study_of_the_demo(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(cli, '_cache', lambda: None)
  assert cli.main(['demo', '--study', '--out', str(tmp_path), '--seeds', '1', '--steps', '4']) == 0
  assert (tmp_path / 'study' / 'report.html').exists() and 'Report:' in capsys.readouterr().out

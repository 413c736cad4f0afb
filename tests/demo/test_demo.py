"""The demo: its conclusion follows the numbers; and, slowly, the command itself."""

import json

import numpy as np
import pytest
from rich.console import Console

from equivariant_ssl import cli
from equivariant_ssl.config import load_config
from equivariant_ssl.demo import digits_demo, methods_demo
from equivariant_ssl.evaluate import gains


def arms(
  invariant: float, both: float, sensitive: float, gain: float
) -> dict[str, digits_demo.TrainedArm]:
  """Three seeds an arm: kNN 90 with crops, and so much more in the others; EquiMod's `gain`."""
  rng = np.random.default_rng(0)

  def noisy_gains():
    images = 50
    source, noise = rng.normal(size=(2, images, 8)).astype(np.float32)
    true = gains.gains(gains.per_pair(source, source + noise, source + noise))
    over = gains.interval(np.full(images, gain) + rng.normal(size=images) * 1e-3)
    return {'all': gains.Measured(true, true, true, true, over, over)}

  of = lambda move: digits_demo.TrainedArm(
    {k: [90.0 + move + d for d in (-0.1, 0.0, 0.1)] for k in digits_demo.READOUTS}, None, [], []
  )
  with_head = lambda move: of(move)._replace(gains=[noisy_gains() for _ in range(3)])
  return {
    'untrained': of(-30.0),
    'crops': of(0.0),
    'invariant': of(invariant),
    'both': with_head(both),
    'sensitive': with_head(sensitive),
  }


def test_the_conclusion_follows_the_numbers():
  text = digits_demo.conclude(arms(-10.0, -5.0, 1.0, 0.2))
  assert 'costs kNN accuracy (-10.00' in text and 'wins back some of it (+5.00' in text
  assert 'adds to crops alone (+1.00' in text and 'predictor uses' in text
  text = digits_demo.conclude(arms(2.0, 1.0, -3.0, 0.0))
  assert (
    'helps kNN' in text
    and 'loses more of' in text
    and 'takes from' in text
    and 'does not use' in text
  )
  same = arms(0.0, 0.0, 0.0, 0.2)
  same['invariant'].readouts['knn'][:] = [85.0, 90.0, 95.0]
  assert 'no difference that these seeds can show' in digits_demo.conclude(same)


def test_the_tables_show_every_arm(capsys):
  digits_demo.tables(arms(-10.0, -5.0, 1.0, 0.2), Console(width=100))
  out = capsys.readouterr().out
  assert all(name in out for name in ('untrained', *digits_demo.ARMS)) and '90.0 ± 0.1' in out


def methods(spread: float) -> dict[str, digits_demo.TrainedArm]:
  """Two seeds an arm; the embeddings of `byol + essl` have `spread`, all others fill the sphere."""
  of = lambda name, knn: digits_demo.TrainedArm(
    {k: [knn, knn + 1.0] for k in digits_demo.READOUTS},
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
  Console(width=140).print(methods_demo.table(arms))
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


def test_no_seed_is_no_demo(capsys):
  assert cli.main(['demo', '--seeds', '0']) == 2
  assert 'nothing to train' in capsys.readouterr().err


@pytest.mark.slow
def test_the_command(tmp_path, monkeypatch, capsys):
  """Two seeds of four steps: everything is drawn and written."""
  monkeypatch.setattr(cli, '_cache', lambda: None)
  assert cli.main(['demo', '--out', str(tmp_path), '--seeds', '2', '--steps', '4']) == 0
  assert 'On these digits' in capsys.readouterr().out
  results = json.loads((tmp_path / 'results.json').read_text())
  assert set(results['arms']) == {'untrained', *digits_demo.ARMS} and results['environment']['jax']
  assert (tmp_path / 'figure.png').stat().st_size > 10_000 and (tmp_path / 'table.txt').exists()

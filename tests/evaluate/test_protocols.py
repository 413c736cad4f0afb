"""`eqssl eval` and `eqssl compare` on real runs: what is written, read again, left alone and put side by side."""
import csv
import functools
import json
import pathlib
import re

import jax
import numpy as np
import pytest
import reports
import tiny
from rich.console import Console

from equivariant_ssl.config import config_to_json, load_config, read_config
from equivariant_ssl.errors import UserError
from equivariant_ssl.evaluate import (
  comparison,
  evaluation,
  frozen,
  panel_protocols,
  protocols,
  statistics,
  transfer,
)
from equivariant_ssl.parallel import sharding
from equivariant_ssl.storage import checkpoint
from equivariant_ssl.training import loop, runs
from equivariant_ssl.training.recipe import make_recipe

CHEAP = ['knn', 'few_labels', 'gains', 'profile', 'health']
BEYOND, TURN = ({op: frozen.OUTSIDE[op]} for op in ('crop', 'turn'))


def trained(folder, **overrides) -> pathlib.Path:
  config = load_config(tiny.NAME, {'steps': '3', 'checkpoint_every': '3', **overrides})
  loop.train(config, folder, mesh=sharding.mesh(jax.devices()[:1]), quiet=True)
  return folder


@pytest.fixture(scope='module', autouse=True)
def small():
  """Few ops, views and images, so that programs are few and small."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(frozen, 'PANEL', ('crop', 'flip'))
    patch.setattr(frozen, 'OUTSIDE', {})
    patch.setattr(protocols, 'BANK', 16)
    for name, value in (('PANEL_TRAIN', 64), ('PANEL_TEST', 48), ('SHARED', 2)):
      patch.setattr(panel_protocols, name, value)
    yield


@pytest.fixture(scope='module')
def evaluated(tmp_path_factory):
  """(folder of a run, what its evaluation returned, the checkpoint's files before)."""
  folder = trained(tmp_path_factory.mktemp('run') / 'a')
  before = {p: p.read_bytes() for p in (folder / 'checkpoints').rglob('*') if p.is_file()}
  return folder, evaluation.evaluate(folder, CHEAP), before


def test_every_number_has_the_untrained_network_and_its_controls(evaluated):
  folder, found, _ = evaluated
  assert set(found) == set(CHEAP) == {p.stem for p in (folder / 'eval').glob('*.json')}
  for name, result in found.items():
    after, before = result['trained'][0], result['untrained'][0]
    assert after['numbers'].keys() == before['numbers'].keys() and after['numbers'], name
    assert after['numbers'] != before['numbers'], name
    values = [v['mean'] if isinstance(v, dict) else v for v in after['numbers'].values()]
    assert np.isfinite(values).all(), name
  gains = found['gains']['trained'][0]
  assert set(gains['numbers']) == {f'equimod {op}' for op in ('all', 'crop', 'rotate')}
  assert gains['controls']['equimod all']['identity'] == 0 and 'shuffled' in gains['controls']['equimod all']
  json.dumps(found, allow_nan=False)


@pytest.mark.parametrize('name', ['gains', 'retrieval', 'knn'])
def test_a_table_loses_no_digit_at_any_width(name, capsys):
  def printed(width):
    Console(soft_wrap=True, width=width).print(evaluation.table(reports.results(gain=-1.0567)[name], 'x'))
    return capsys.readouterr().out
  digits = lambda text: sorted(c for c in text if c.isdigit())
  whole = printed(250)
  numbers = re.findall(r'-?\d+\.\d\d', whole)
  for width in range(12, 250):
    text = printed(width)
    assert '…' not in text and digits(text) == digits(whole), width
    if width >= 60:  # nor is a number broken
      assert max(map(len, text.splitlines())) <= width and sorted(re.findall(r'-?\d+\.\d\d', text)) == sorted(numbers)
  if name == 'gains':
    assert whole.count('equimod all') == 1 and 'trained' in whole.splitlines()[2]
    assert re.search(r'equimod all, trained +│ +-105.67 \[-106.67, -104.67\] │\n│   untrained ', printed(80))


@pytest.mark.parametrize(('degrees', 'is_there'), [('90', True), ('180', False)])
def test_nothing_lies_beyond_a_full_turn(degrees, is_there, monkeypatch):
  monkeypatch.setattr(frozen, 'OUTSIDE', TURN)
  config = load_config('smoke', {'augment.turn.role': 'both', 'augment.turn.degrees': degrees})
  changes = frozen.frozen(make_recipe(config, 1000, 8), config).pairs['equimod']
  assert 'turn' in changes and ('turn beyond' in changes) == is_there


@pytest.mark.slow
def test_what_costs_more_has_its_controls_too(evaluated, monkeypatch):
  monkeypatch.setattr(frozen, 'OUTSIDE', BEYOND)
  found = evaluation.evaluate(evaluated[0], ['retrieval', 'care', 'regression'])
  assert 'equimod crop beyond mrr' in found['retrieval']['trained'][0]['numbers']
  regression = found['regression']['trained'][0]
  assert {'crop absolute averaged', 'flip relative pooled'} <= set(regression['numbers'])
  assert regression['detail']['crop absolute']['true']['components'] and regression['detail']['crop absolute']['shuffled']
  beside = found['retrieval']['trained'][0]['controls']['equimod all mrr']
  assert set(beside) == {'shuffled', 'zeroed', 'identity', 'chance'}
  assert beside['identity']['mean'] == pytest.approx(beside['chance']) == pytest.approx(.08998, abs=1e-5)
  errors = found['retrieval']['trained'][0]['controls']['equimod crop STL error']
  assert set(errors) == {'shuffled', 'zeroed', 'identity', 'chance'} and 0 < errors['chance']
  assert 0 < errors['identity'] < 2 * errors['chance']  # it picks the reference, whose encoding is 0
  rows = {row for row in found['retrieval']['trained'][0]['numbers'] if 'SIE' in row}
  assert rows == {'equimod all SIE error of rotate', 'equimod rotate SIE error of rotate'}  # a crop alone does not turn
  assert {'crop gamma', 'flip relative'} <= set(found['care']['trained'][0]['numbers'])


def test_the_checkpoint_stays_and_a_result_is_read_again(evaluated, monkeypatch):
  folder, found, before = evaluated
  assert {p: p.read_bytes() for p in (folder / 'checkpoints').rglob('*') if p.is_file()} == before
  called = []
  def counting(name, protocol):
    return protocol._replace(measure=lambda s: called.append(name) or protocol.measure(s))
  counted = {n: counting(n, p) for n, p in protocols.PROTOCOLS.items()}
  monkeypatch.setattr(evaluation, 'PROTOCOLS', counted)
  assert evaluation.evaluate(folder, ['knn', 'profile']) == {n: found[n] for n in ('knn', 'profile')} and not called
  (folder / 'eval' / 'knn.json').write_text('{"torn')
  again = evaluation.evaluate(folder, ['knn', 'profile'])
  assert called == ['knn', 'knn'] and again['knn']['trained'] == found['knn']['trained']  # computed anew: the same
  other = evaluation.evaluate(folder, ['few_labels'], seeds=(0, 1))['few_labels']
  assert [len(other[who]) for who in ('trained', 'untrained')] == [2, 2] and called[2:] == ['few_labels'] * 4
  assert other['trained'][0] == found['few_labels']['trained'][0] != other['trained'][1]


def test_what_was_missing_is_sought_again(evaluated, monkeypatch, capsys):
  called, rows = [], [transfer.TransferRow('there', 'top1', .5, .5, '', '')]
  def some(*args):
    called.append(args[1])
    return rows, [transfer.MissingTarget('nosuch', 'type this')]
  monkeypatch.setattr(transfer, 'transfer', some)
  asked = functools.partial(evaluation.evaluate, evaluated[0], ['transfer'], options=protocols.Options(targets=('nosuch',)))
  for _ in range(2):
    asked()
  assert called == [('nosuch',)] * 4
  assert capsys.readouterr().out.count('nosuch left out: it is not on disk. type this') == 2  # once an evaluation
  rows.clear()
  with pytest.raises(UserError, match='nothing that it needs'):
    asked()


def test_another_checkpoint_is_evaluated_anew(evaluated, monkeypatch):
  folder, found, _ = evaluated
  loaded = runs.prepare_run(read_config(folder / 'config.json'), sharding.mesh(jax.devices()[:1]))
  state = checkpoint.load_checkpoint(folder / 'checkpoints', runs.abstract_state(loaded), None, print)[1]
  other = jax.tree.map(lambda a: a, state)
  leaf = other.params['encoder']['conv1']['kernel']
  other.params['encoder']['conv1']['kernel'] = leaf.at[0, 0, 0, 0].add(1e-6)
  assert evaluation.weights_digest(state) == found['knn']['digest'] != evaluation.weights_digest(other)


def test_asked_for_what_it_cannot_have(evaluated, tmp_path):
  folder = evaluated[0]
  with pytest.raises(UserError, match="protocol has no 'kmn'.*\n.*Did you mean 'knn'"):
    evaluation.evaluate(folder, ['kmn'])
  alone = load_config(tiny.NAME, {'equivariance': 'none'})
  (tmp_path / 'config.json').write_text(json.dumps(config_to_json(alone)))
  with pytest.raises(UserError, match='gains: the run has no objective that predicts an embedding'):
    evaluation.evaluate(tmp_path, ['gains'])
  assert evaluation.unmet_need(runs.prepare_run(alone, sharding.mesh(jax.devices()[:1])), 'labels') is None


def test_compare_pairs_by_seed(evaluated, tmp_path, capsys):
  dirs, values = [], {'simclr': [.5, .6, .4], 'simclr + equimod': [.55, .68, .49]}
  result = json.loads((evaluated[0] / 'eval' / 'knn.json').read_text())
  for name, tops in values.items():
    for seed, top in enumerate(tops):
      folder = tmp_path / f'{name}{seed}'
      (folder / 'eval').mkdir(parents=True)
      config = load_config(tiny.NAME, {'seed': str(seed), 'equivariance': 'equimod' if '+' in name else 'none'})
      (folder / 'config.json').write_text(json.dumps(config_to_json(config)))
      result['trained'][0]['numbers'] = {'top1': top}
      (folder / 'eval' / 'knn.json').write_text(json.dumps(result))
      dirs.append(folder)
  found = comparison.compare(dirs, out=tmp_path / 'c.csv')
  want = statistics.paired(values['simclr + equimod'], values['simclr'])
  assert [r.group for r in found] == list(values) and found[0].difference is None and found[1].difference == want
  assert '50.00 ± 10.00' in (out := capsys.readouterr().out) and f'+{100 * want.mean:.2f}' in out
  with open(tmp_path / 'c.csv') as file:
    lines = list(csv.DictReader(file))
  assert float(lines[1]['low']) == want.low and float(lines[1]['seed 2']) == .49 and lines[0]['low'] == ''
  with pytest.raises(UserError, match="second run of 'simclr' with seed 0"):
    comparison.compare([dirs[0], dirs[0]], out=tmp_path / 'd.csv')
  with pytest.raises(UserError, match='no results to compare'):
    (tmp_path / 'e').mkdir()
    (tmp_path / 'e' / 'config.json').write_text((dirs[0] / 'config.json').read_text())
    comparison.compare([tmp_path / 'e'], out=tmp_path / 'd.csv')
  with pytest.raises(UserError, match="no 'augment.spin' to group by"):
    comparison.compare(dirs, 'augment.spin', out=tmp_path / 'd.csv')
  assert {r.group for r in comparison.rows(dirs[:1], 'augment.rotate.role')} == {'both'}

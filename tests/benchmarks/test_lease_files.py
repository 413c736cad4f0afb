"""What travels with the calls of a GPU's lease, and what comes back: sizes, checksums, pieces, run directories."""
import json
import os
import pathlib
import re
import subprocess
import sys
import zipfile

import jax
import numpy as np
import pytest
import tiny
from leases import (
  GPU,
  ROOT,
  carried,
  encoders,
  experiment,
  fake_load,
  lease,
  pack,
  rehearse,
  restore,
  sizes,
)

from equivariant_ssl.config import config_to_json, load_config
from equivariant_ssl.parallel import sharding
from equivariant_ssl.storage import checkpoint, fingerprint, record
from equivariant_ssl.training import runs

# -- what travels

def test_half_of_the_data_is_not_the_experiment(tmp_path):
  """A machine that was lost between the calls: the second says what to repeat, at once; then nothing is missing."""
  store, said = tmp_path / 'store', []
  two = fake_load(tmp_path / 'two', 'call2')
  done = subprocess.run([sys.executable, GPU / 'lease.py', 'call2', '--store', store, '--load', two], capture_output=True,
                        text=True, env={**os.environ, 'OUT': str(tmp_path / 'out')})
  assert done.returncode == 3, done.stderr
  assert 'call1 with --only load, then call2 again' in done.stdout.splitlines()[-1]
  assert carried.missing(store) == list(carried.HALVES['call1'])
  carried.take(fake_load(tmp_path / 'one', 'call1'), store, said.append)
  assert carried.missing(store) == [] and not said


def test_a_file_that_did_not_arrive_whole_is_left_out(tmp_path):
  name, said = carried.HALVES['call1'][1], []
  carried.take(fake_load(tmp_path / 'one', 'call1', **{name: '0' * 64}), tmp_path, said.append)
  assert len(said) == 1 and name in said[0]
  assert carried.missing(tmp_path) == [name, *carried.HALVES['call2']]
  carried.take(tmp_path / 'none', tmp_path, said.append)
  assert 'carries nothing' in said[1]


def test_a_spare_wheel_is_for_a_machine_whose_own_is_too_old(monkeypatch):
  wheels = [pathlib.Path(f'{n}-9-py3-none-any.whl') for n in ('dm_pix', 'flax', 'orbax_checkpoint')]
  monkeypatch.setattr(carried.importlib.metadata, 'version', {'flax': '0.12.1', 'orbax-checkpoint': '0.9.1'}.__getitem__)
  assert [w.name.split('-')[0] for w in carried.wheels_to_install(wheels)] == ['dm_pix', 'orbax_checkpoint']


def test_what_a_wheel_needs_travels_or_is_there(tmp_path):
  wheel = tmp_path / 'some_thing-1.0-py3-none-any.whl'
  with zipfile.ZipFile(wheel, 'w') as z:
    z.writestr('some_thing-1.0.dist-info/METADATA', 'Name: some-thing\nRequires-Dist: numpy>=1\nRequires-Dist: Absent_One\n'
               'Requires-Dist: extra-one ; extra == "x"\nRequires-Dist: other; sys_platform == "win32"\n')
  page = tmp_path / 'KINDS.md'
  page.write_text('## Python packages already there\n\nkind: of it. Packages: absl-py, numpy.\n')
  assert pack.lacking([wheel], pack.on_the_machine(page)) == ['Absent_One (of some_thing)']


def test_the_loads_and_the_calls_as_they_are_typed(tmp_path):
  data = tmp_path / 'data'
  data.mkdir()
  for name in (*sum(carried.HALVES.values(), ()), 'unpack.py'):
    (data / name).write_bytes(b'x' * 1000)
  whole = [pack.load(tmp_path / call, half, data, []) for call, half in carried.HALVES.items()]
  assert all(4000 < size < 6000 for size in whole)
  (tmp_path / 'flax-9-py3-none-any.whl').write_bytes(b'x' * 3000)
  wheels, half = sorted(tmp_path.glob('*.whl')), carried.HALVES['call1']
  taken = [pack.fitted(0, tmp_path / 'call1', half, data, wheels, limit)[1] for limit in (9000, 6000)]
  assert taken == [wheels, []], 'a spare wheel stays behind where there is no room'
  readme = (GPU / 'README.md').read_text()
  for call, minutes in pack.CALLS.items():
    command = re.search('command="(.*?)"', pack.call(call, minutes, f'.gpu/{call}'))[1]
    assert len(command) <= 2000 and f'`{command}`' in readme, 'the README has the calls as they are typed'
    assert f'timeout_s={60 * minutes + pack.START:.0f}' in pack.call(call, minutes, '')
  assert '/.gpu/' in (ROOT / '.gitignore').read_text().split()


# -- what comes back

def test_a_network_in_pieces_and_back(tmp_path):
  rng = np.random.default_rng(0)
  leaves = {'params/a/kernel': rng.normal(size=(40, 50)).astype(np.float32), 'stats/a/var': rng.random(30, np.float32)}
  about = encoders.write(leaves, tmp_path, 'x.encoder', piece=1000)
  files = [tmp_path / n for n in about['files']]
  assert len(files) > 2 and max(f.stat().st_size for f in files) <= 1000
  back = encoders.read(files, about['sha256'])
  assert {k: v.dtype for k, v in back.items()} == dict.fromkeys(leaves, np.float32)
  np.testing.assert_array_equal(back['stats/a/var'], leaves['stats/a/var'])
  np.testing.assert_allclose(back['params/a/kernel'], leaves['params/a/kernel'], rtol=2**-11, atol=2**-25)
  with pytest.raises(ValueError, match='not the bytes'):
    encoders.read(files[::-1], about['sha256'])
  with pytest.raises(ValueError, match='not finite'):
    encoders.write({'params/k': np.full((2, 2), 1e6, np.float32)}, tmp_path, 'y')


def test_both_official_encoders_come_back_in_one_call():
  """8 files of 16 MiB, 64 MiB together, by the shapes of the two networks; deflation is not counted on."""
  from equivariant_ssl.parallel import step_plan
  state = runs.abstract_state(step_plan.planned_run(load_config(sizes.FOUNDING[1]), sharding.mesh(jax.devices()[:1]), print))
  sizes_of = []
  for left in ((*experiment.LEFT, 'heads_equimod'), experiment.LEFT):  # SimCLR has the same encoder
    leaves = fingerprint.flatten([{k: v for k, v in tree.items() if k not in left} for tree in (state.params, state.stats)])
    sizes_of.append(sum(v.size * (2 if len(v.shape) > 1 else 4) for v in leaves.values()) + 200 * len(leaves))
  assert sizes_of[1] > 1.3 * sizes_of[0] > 2e7, 'the head of EquiMod is half as large as the encoder'
  pieces = sum(-(-s // encoders.PIECE) for s in sizes_of)
  assert pieces <= lease.ENCODERS and sum(sizes_of) <= lease.BACK
  assert pieces + 2 <= rehearse.FILES and lease.BACK + lease.LOG <= rehearse.TOGETHER


def test_a_run_directory_is_made_of_what_came_back(tmp_path, monkeypatch, capsys):
  """The weights to float16's rounding, the statistics bitwise, the projector as at the start; metrics and config."""
  monkeypatch.setattr(experiment, 'STORE', tmp_path / 'store')
  config = load_config(tiny.NAME, {'seed': '3'})
  place = experiment.folder('smoke', 3)
  run = runs.prepare_run(config, sharding.mesh(jax.devices()[:1]))
  state = jax.device_get(runs.initial_state(run))
  moved = jax.tree.map(lambda x: x + np.asarray(.01, x.dtype), (state.params, state.stats))
  record.start_record(place, config_to_json(config), 'eqssl train --config smoke')
  (place / 'metrics.jsonl').write_text('{"step": 5, "loss": 1.5}\n')
  with checkpoint.open_checkpoints(place / 'checkpoints') as saved:
    saved.save(5, state._replace(step=np.int32(5), params=moved[0], stats=moved[1]), {}, wait=True)
  out = tmp_path / 'out'
  (tmp_path / 'store' / 'brought').mkdir()
  found = experiment.bring(sizes.SIZES['test'], print, 'smoke', 3)
  (tmp_path / 'store' / 'brought').rename(out)
  (out / 'results.json').write_text(json.dumps({'parts': {'bring smoke s3': {'state': 'done', 'found': found}}}))
  assert restore.main([str(out), '--out', str(tmp_path / 'runs')]) == 0
  workdir = tmp_path / 'runs' / 'smoke-s3'
  step, back, meta = checkpoint.load_checkpoint(workdir / 'checkpoints', runs.abstract_state(run))
  assert step == 5 and 'float16' in meta['restored']
  assert record.read_metrics(workdir) == [{'step': 5, 'loss': 1.5}]
  assert json.loads((workdir / 'config.json').read_text()) == json.loads((place / 'config.json').read_text())
  for part in ('encoder', 'heads_equimod'):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2**-11, atol=1e-7), back.params[part], moved[0][part])
    jax.tree.map(np.testing.assert_array_equal, back.stats[part], moved[1][part])
  jax.tree.map(np.testing.assert_array_equal, back.params['projector'], state.params['projector'])
  again = lambda name: (restore.main([str(out), '--out', str(tmp_path / name)]), capsys.readouterr().err)
  code, said = again('runs')
  assert code == 2 and 'is there already' in said
  (out / found['files'][0]).unlink()
  code, said = again('new')
  assert code == 7 and 'in none of the folders' in said

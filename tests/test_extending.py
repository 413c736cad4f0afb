"""A new op, invariance and equivariance objective are each one new file, and one config line (bar 4)."""
import jax
import numpy as np
import pytest
from additions import ENCODER, EQUIVARIANCE, INVARIANCE, OP, TINY, added

from equivariant_ssl import augment, config, equivariance, invariance, nets
from equivariant_ssl.parallel import sharding
from equivariant_ssl.training import loop

FILES = {'mytint': (augment, OP), 'myinvariance': (invariance, INVARIANCE), 'myequivariance': (equivariance, EQUIVARIANCE)}


@pytest.fixture(scope='module', autouse=True)
def written(tmp_path_factory):
  yield from added(tmp_path_factory, FILES | {TINY: (nets, ENCODER)})


@pytest.mark.parametrize('overrides', [
    {'augment.order': 'crop,flip,rotate,mytint', 'augment.mytint': "{'role': 'both', 'most': .3}"},
    pytest.param({'invariance': "{'name': 'myinvariance', 'margin': 2.}"}, marks=pytest.mark.slow),
    {'equivariance': "{'name': 'myequivariance', 'width': 4}"},
], ids=list(FILES))
def test_one_new_file_trains(overrides, tmp_path):
  made = config.load_config('smoke', {**overrides, 'steps': '2', 'encoder': f"{{'name': '{TINY}'}}"})
  run = loop.prepare_run(made, sharding.mesh(jax.devices()[:1]))
  seen = []
  loop.fit(run, loop.initial_state(run), lambda state, n, metrics, clock: seen.append(jax.device_get(metrics)))
  assert len(seen) == 2 and all(np.isfinite(v) for m in seen for v in m.values())

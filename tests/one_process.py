"""`eqssl train` as one of several processes, and the smallest config that has views, BatchNorm and a loss over pairs.

As a program it takes the place of `python -m equivariant_ssl.cli`; one process compiles for all.
"""
import functools
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import tiny  # noqa: F401 (the ResNet of depth 4)
from jax._src import cache_key
from ml_collections import ConfigDict

from equivariant_ssl import cli
from equivariant_ssl.data.order import epoch_order
from equivariant_ssl.parallel import processes, sharding
from equivariant_ssl.storage import fingerprint
from equivariant_ssl.training import loop
from equivariant_ssl.training.step import Batch, draw_views


def get_config() -> ConfigDict:
  return ConfigDict({
      'size': 8, 'batch': 16, 'steps': 5, 'data': {'name': 'digits'}, 'log_every': 1, 'checkpoint_every': 3,
      'encoder': {'name': 'resnet', 'depth': 4, 'stem': 'cifar', 'width': 4},
      'augment': {'order': ('crop',), 'crop': {'role': 'invariant', 'scale': (.3, 1.), 'method': 'bilinear'}},
      'invariance': {'name': 'simclr', 'projector': {'hidden': (8,), 'out': 8}},
      'optimizer': {'name': 'sgd', 'lr': .01, 'warmup_epochs': 0.},  # a rate at which rounding does not grow
  })


def train_with_views(config, workdir, *args, **kw):
  """`train.train`, that leaves the fingerprint of step 1's views in views.json, whatever process holds them."""
  def keep(run, state, n):
    if n == 1:
      data = run.source.train
      rows = epoch_order(run.key, 0, len(data.images))[:run.recipe.batch]
      batch = sharding.place(Batch(data.images[rows], data.sizes[rows]), sharding.batch_sharding(run.mesh))
      prints = fingerprint.fingerprints(jax.jit(functools.partial(draw_views, run.recipe))(run.key, jnp.int32(0), batch))
      if processes.is_main():
        (pathlib.Path(workdir) / 'views.json').write_text(json.dumps(prints))
  return TRAIN(config, workdir, *args, hooks=(keep,), **kw)


TRAIN = loop.train
if __name__ == '__main__':
  # With jax 0.10 the key of a CPU program differs from process to process, so that each would compile all.
  cache_key._hash_accelerator_config = lambda *args: None
  jax.config.update('jax_share_binary_between_hosts', True)
  loop.train = train_with_views
  sys.argv[1:3] = []
  cli.entry()

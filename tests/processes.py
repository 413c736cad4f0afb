"""`eqssl train` as one of several processes, that also leaves the fingerprint of step 1's views in its workdir."""
import functools
import json
import os
import sys

import jax
import jax.numpy as jnp

from equivariant_ssl import cli, distributed, fingerprint, shard, train
from equivariant_ssl import step as steps
from equivariant_ssl.data.order import epoch_order


def keeper(workdir):
  """A hook of `train` that writes views.json: what the devices see, whatever process holds them."""
  def keep(run, state, n):
    if n == 1:
      data = run.source.train
      rows = epoch_order(run.key, 0, len(data.images))[:run.recipe.batch]
      batch = shard.place(steps.Batch(data.images[rows], data.sizes[rows]), shard.split(run.mesh))
      shown = jax.jit(functools.partial(steps.views, run.recipe))(run.key, jnp.int32(0), batch)
      prints = fingerprint.of(shown)
      if distributed.main():
        (workdir / 'views.json').write_text(json.dumps(prints))
  return keep


if __name__ == '__main__':  # in the place of `python -m equivariant_ssl.cli`
  sys.argv[1:3] = []
  if 'VIEWS' in os.environ:
    plain = train.train
    train.train = lambda config, workdir, *args, **kw: plain(
        config, workdir, *args, hooks=(keeper(train.pathlib.Path(workdir)),), **kw)
  cli.entry()

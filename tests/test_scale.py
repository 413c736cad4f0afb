"""Batches and networks larger than a device: losses in blocks, cached gradients, sharded states (bars 4, 5 of issue 6)."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from equivariant_ssl import losses, shard

LOSSES = {'nt_xent': lambda a, b: losses.nt_xent(a, b, .1), 'siblings': lambda a, b: losses.nt_xent(a, b, .2, 2),
          'info_nce': lambda a, b: losses.info_nce(a, b, .1)}


def apart(got, want):
  """The largest absolute difference over the largest absolute value, of two trees."""
  largest = max(np.abs(x).max() for x in jax.tree.leaves(want))
  return max(np.abs(np.asarray(a) - np.asarray(b)).max() / largest
             for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True))


def compiled(loss, devices, rows, features):
  """The program of a loss of two [rows features] over `devices`, and of its gradient."""
  mesh = shard.mesh(jax.devices()[:devices])

  def both(a, b):
    with shard.within(mesh):
      return jax.value_and_grad(loss, (0, 1))(a, b)
  shape = jax.ShapeDtypeStruct((rows, features), jnp.float32, sharding=shard.split(mesh))
  out = (shard.replicated(mesh), (shard.split(mesh),) * 2)
  return jax.jit(both, out_shardings=out).lower(shape, shape).compile()


@pytest.mark.parametrize('name', LOSSES)
def test_a_loss_in_blocks_is_the_loss(name, monkeypatch):
  """Over one device and over eight, where blocks fit and where the last is not full or has nothing to sum."""
  a, b = np.random.default_rng(0).normal(size=(2, 24, 5)).astype(np.float32)
  want = jax.jit(jax.value_and_grad(LOSSES[name], (0, 1)))(a, b)
  for devices, block in ((1, 96), (8, 40), (8, 6)):  # of 24 or 48 columns: 12, 6 and a block a column
    monkeypatch.setattr(losses, 'BLOCK', block)
    program = compiled(LOSSES[name], devices, *a.shape)
    x = [shard.place(x, shard.split(shard.mesh(jax.devices()[:devices]))) for x in (a, b)]
    assert ('all-gather' in program.as_text()) == (devices > 1)
    got = program(*x)
    assert apart(got[0], want[0]) <= 1e-6 and apart(got[1], want[1]) <= 1e-5, (devices, block)


@pytest.mark.parametrize('pairs', [65536, pytest.param(2 * 65536, marks=pytest.mark.slow)])  # EquiMod's 4B rows: twice
def test_a_loss_of_65536_images_needs_less_than_a_gib(pairs):
  program = compiled(LOSSES['nt_xent'], 8, pairs, 128)
  assert program.memory_analysis().temp_size_in_bytes < 2 ** 30

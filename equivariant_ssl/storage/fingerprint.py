"""Fingerprints of trees of arrays.

Two trees with the same fingerprints hold the same bits, whether one of them is a checkpoint or lies
on other devices. A fingerprint is an error check and no signature: it stops nobody who rewrites a
checkpoint on purpose.
"""
import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from equivariant_ssl.errors import NOT_FINITE, OTHER_CONFIG, UserError

FORMAT = 1
# No number in the state of a network that learns is so large. In float32 the next larger number
# is 6e7 away.
ABSURD = 1e15


def _mix(x: jax.Array) -> jax.Array:
  """Mix the bits of uint32 numbers by the finalizer of MurmurHash3.

  The function is a bijection, and each bit of the result depends on each bit of the input.
  """
  x = (x ^ (x >> 16)) * jnp.uint32(0x85ebca6b)
  x = (x ^ (x >> 13)) * jnp.uint32(0xc2b2ae35)
  return x ^ (x >> 16)


@jax.jit
def _digest(x: jax.Array) -> jax.Array:
  """Return three uint32 numbers [3] for an array.

  The first two are sums over its elements, whose bits are mixed with their positions. The third
  is 1 if an element is not finite, or is absurdly large.

  Sums of integers do not depend on their order, and therefore not on devices or sharding. One
  reduction of three operands compiles and runs faster than three reductions.
  """
  sane = jnp.ones(x.shape, bool)
  if jnp.issubdtype(x.dtype, jnp.inexact):
    sane = jnp.abs(x) <= min(ABSURD, float(jnp.finfo(x.dtype).max))  # false for nan
  x = x.astype(jnp.uint8) if x.dtype == jnp.bool_ else x
  width = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)  # 8 bytes become 4 and 4
  bits = jax.lax.bitcast_convert_type(x, width).astype(jnp.uint32).reshape(-1)
  place = jax.lax.iota(jnp.uint32, bits.size) * jnp.uint32(0x9e3779b1) + jnp.uint32(1)
  parts = bits.size // max(sane.size, 1)
  bad = jnp.broadcast_to(~sane[..., None], (*sane.shape, parts)).reshape(-1)
  lanes = (_mix(bits ^ place), _mix(bits + place * jnp.uint32(0x85ebca6b)), bad.astype(jnp.uint32))
  return jnp.stack(jax.lax.reduce(lanes, (jnp.uint32(0),) * 3,
                                  lambda a, b: (a[0] + b[0], a[1] + b[1], a[2] | b[2]), (0,)))


def flatten(tree: Any) -> dict[str, Any]:
  """Return the leaves of a tree as {key path: leaf}.

  Host leaves become arrays of a dtype that jax keeps.
  """
  paths = jax.tree_util.tree_leaves_with_path(tree)
  leaves = {jax.tree_util.keystr(path, simple=True, separator='/'): leaf for path, leaf in paths}
  if len(leaves) < len(paths):
    raise ValueError(f'two leaves of the tree have one path; the paths are {sorted(leaves)}')
  return {k: v if isinstance(v, jax.Array | jax.ShapeDtypeStruct)
          else np.asarray(v, jax.dtypes.canonicalize_dtype(np.asarray(v).dtype))
          for k, v in leaves.items()}


def leaf_kind(leaf: Any) -> str:
  """Return the dtype and the shape of an array as text, such as 'float32[3,4]'."""
  return f'{leaf.dtype}[{",".join(map(str, leaf.shape))}]'


def digest_leaves(leaves: dict[str, Any]) -> tuple[dict[str, str], list[str]]:
  """Return the fingerprints of leaves, and the paths of those that are not finite, or absurd.

  A fingerprint is 'float32[3,4]:' and 16 hexadecimal digits. A number over ABSURD is absurd.
  """
  digests = {}
  for k, v in leaves.items():
    digests[k] = _digest(v)
    # Programs with collectives must not run at the same time: on a CPU each may hold threads that
    # the other waits for.
    if isinstance(v, jax.Array) and not v.is_fully_replicated:
      digests[k].block_until_ready()
  digests = jax.device_get(digests)
  return ({k: f'{leaf_kind(leaves[k])}:{d[0]:08x}{d[1]:08x}' for k, d in digests.items()},
          [k for k, d in digests.items() if d[2]])


def sound_leaves(step: int, state: Any, newest: int | None
                 ) -> tuple[dict[str, Any], dict[str, str]]:
  """Return the leaves of a state that is to be saved, and their fingerprints.

  newest: the step of the newest checkpoint, for the error message.

  Raises UserError NOT_FINITE if a leaf is not finite, or absurd.
  """
  leaves = flatten(state)
  if jax.process_count() > 1:
    # Orbax needs global arrays there. An array that is complete here is the same in all processes.
    leaves = {k: np.asarray(v) if getattr(v, 'is_fully_addressable', True) else v
              for k, v in leaves.items()}
  prints, broken = digest_leaves(leaves)
  if broken:
    raise UserError(
        f'the state of step {step} is not finite, or has exploded ({", ".join(broken[:3])}): '
        'it is not saved.',
        f'Last good checkpoint: {"none" if newest is None else f"step {newest}"}. '
        'Try a lower --config.optimizer.lr or a longer warm-up, in a new --workdir.', NOT_FINITE)
  return leaves, prints


def fingerprints(tree: Any) -> dict[str, str]:
  """Return the fingerprints of a tree of arrays, {key path: dtype, shape and 64-bit checksum}.

  They are the same on any devices.
  """
  return digest_leaves(flatten(tree))[0]


def differences(stored: dict[str, str], expected: dict[str, Any], part: bool) -> str:
  """Describe how stored fingerprints differ from the expected leaves; '' if they fit.

  part: whether the stored leaves may be more than the expected ones.
  """
  saved = {k: v.partition(':')[0] for k, v in stored.items()}
  needed = {k: leaf_kind(v) for k, v in expected.items()}
  wrong = [f'{k} is {saved.get(k, "not")} there and {needed.get(k, "not")} here'
           for k in {**needed, **saved}
           if saved.get(k) != needed.get(k) and not (part and k not in needed)]
  if not wrong:
    return ''
  matched = sum(saved.get(k) == v for k, v in needed.items())
  more = f'; and {len(wrong) - 3} more' if len(wrong) > 3 else ''
  return f'{matched} of {len(needed)} tensors match: ' + '; '.join(wrong[:3]) + more


def seal(step: int, prints: dict[str, str], meta: dict, **more: Any) -> dict:
  """Return the record of a checkpoint as JSON, with a checksum of the record itself.

  The record is {'step', 'leaves', 'meta'} and the items of `more`.
  """
  body = json.dumps({'step': step, 'leaves': prints, 'meta': meta, **more}, sort_keys=True)
  return {'format': FORMAT, 'body': body, 'sha256': hashlib.sha256(body.encode()).hexdigest()}


def unseal(sealed: dict | None) -> dict:
  """Return the record that `seal` was given.

  Raises ValueError if it is not what was sealed, and UserError if another version of this program
  sealed it.
  """
  sealed = sealed or {}
  body, form = sealed.get('body', ''), sealed.get('format')
  if isinstance(form, int | str) and form != FORMAT:
    raise UserError(f'its record is of format {form}, and {FORMAT} is what this version reads.',
                    'Use the version that wrote it (env.json says which). Nothing was moved.',
                    OTHER_CONFIG)
  if form != FORMAT or hashlib.sha256(body.encode()).hexdigest() != sealed.get('sha256'):
    raise ValueError('its record is missing or wrong')
  return json.loads(body)

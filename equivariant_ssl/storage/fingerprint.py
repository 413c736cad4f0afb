"""A fingerprint of a tree of arrays: what says that a checkpoint, or another device, holds the same bits."""
import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from equivariant_ssl.errors import NOT_FINITE, OTHER_CONFIG, UserError

FORMAT = 1
ABSURD = 1e15  # no number of a state that learns is so large: in float32 its neighbour is 6e7 away


def _mix(x: jax.Array) -> jax.Array:
  """A bijection of uint32 whose every output bit depends on every input bit (MurmurHash3's finaliser)."""
  x = (x ^ (x >> 16)) * jnp.uint32(0x85ebca6b)
  x = (x ^ (x >> 13)) * jnp.uint32(0xc2b2ae35)
  return x ^ (x >> 16)


@jax.jit
def _digest(x: jax.Array) -> jax.Array:
  """[3] uint32: two sums over the elements' bits mixed with their positions, and whether one is not finite, or absurd.

  Sums of integers do not depend on their order, hence not on devices or sharding. A single reduction of three
  operands compiles and runs faster than three.
  """
  sane = jnp.ones(x.shape, bool)
  if jnp.issubdtype(x.dtype, jnp.inexact):
    sane = jnp.abs(x) <= min(ABSURD, float(jnp.finfo(x.dtype).max))  # which nan is not
  x = x.astype(jnp.uint8) if x.dtype == jnp.bool_ else x
  width = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)  # 8 bytes become two of 4
  bits = jax.lax.bitcast_convert_type(x, width).astype(jnp.uint32).reshape(-1)
  place = jax.lax.iota(jnp.uint32, bits.size) * jnp.uint32(0x9e3779b1) + jnp.uint32(1)
  bad = jnp.broadcast_to(~sane[..., None], (*sane.shape, bits.size // max(sane.size, 1))).reshape(-1)
  lanes = _mix(bits ^ place), _mix(bits + place * jnp.uint32(0x85ebca6b)), bad.astype(jnp.uint32)
  return jnp.stack(jax.lax.reduce(lanes, (jnp.uint32(0),) * 3, lambda a, b: (a[0] + b[0], a[1] + b[1], a[2] | b[2]),
                                  (0,)))


def flat(tree: Any) -> dict[str, Any]:
  """{key path: leaf}. Host leaves become arrays of a dtype that jax keeps."""
  paths = jax.tree_util.tree_leaves_with_path(tree)
  named = {jax.tree_util.keystr(path, simple=True, separator='/'): leaf for path, leaf in paths}
  if len(named) < len(paths):
    raise ValueError(f'two leaves of the tree have one path; the paths are {sorted(named)}')
  return {k: v if isinstance(v, jax.Array | jax.ShapeDtypeStruct)
          else np.asarray(v, jax.dtypes.canonicalize_dtype(np.asarray(v).dtype)) for k, v in named.items()}


def kind(leaf: Any) -> str:
  """'float32[3,4]'."""
  return f'{leaf.dtype}[{",".join(map(str, leaf.shape))}]'


def survey(leaves: dict[str, Any]) -> tuple[dict[str, str], list[str]]:
  """The fingerprint of every leaf, 'float32[3,4]:' and 16 hexadecimal digits, and the paths that are not finite, or
  absurd: over ABSURD."""
  digests = {}
  for k, v in leaves.items():
    digests[k] = _digest(v)
    # Programs with collectives must not be under way together: on a CPU each may hold threads that the other waits for.
    if isinstance(v, jax.Array) and not v.is_fully_replicated:
      digests[k].block_until_ready()
  digests = jax.device_get(digests)
  return ({k: f'{kind(leaves[k])}:{d[0]:08x}{d[1]:08x}' for k, d in digests.items()},
          [k for k, d in digests.items() if d[2]])


def sound(step: int, state: Any, newest: int | None) -> tuple[dict[str, Any], dict[str, str]]:
  """The leaves of a state to save and their fingerprints; UserError NOT_FINITE. newest: the step of what is saved."""
  leaves = flat(state)
  if jax.process_count() > 1:  # orbax wants global arrays there; what is whole here is the same everywhere
    leaves = {k: np.asarray(v) if getattr(v, 'is_fully_addressable', True) else v for k, v in leaves.items()}
  prints, broken = survey(leaves)
  if broken:
    raise UserError(f'the state of step {step} is not finite, or has exploded ({", ".join(broken[:3])}): it is not saved.',
                    f'Last good checkpoint: {"none" if newest is None else f"step {newest}"}. '
                    'Try a lower --config.optimizer.lr or a longer warm-up, in a new --workdir.', NOT_FINITE)
  return leaves, prints


def of(tree: Any) -> dict[str, str]:
  """{key path: dtype, shape and a 64-bit checksum of the bits} of a tree of arrays; the same on any devices.

  An error check, not a signature: it stops no one who rewrites a checkpoint on purpose.
  """
  return survey(flat(tree))[0]


def differences(stored: dict[str, str], wanted: dict[str, Any], part: bool) -> str:
  """How the leaves of `stored` fingerprints differ from the wanted ones, '' where they fit (`part`: contain them)."""
  there, here = {k: v.partition(':')[0] for k, v in stored.items()}, {k: kind(v) for k, v in wanted.items()}
  wrong = [f'{k} is {there.get(k, "not")} there and {here.get(k, "not")} here'
           for k in {**here, **there} if there.get(k) != here.get(k) and not (part and k not in here)]
  if not wrong:
    return ''
  matched = sum(there.get(k) == v for k, v in here.items())
  return f'{matched} of {len(here)} tensors match: ' + '; '.join(wrong[:3]) + (
      f'; and {len(wrong) - 3} more' if len(wrong) > 3 else '')


def seal(step: int, prints: dict[str, str], meta: dict, **more: Any) -> dict:
  """The record {step, leaves, meta, and more} of a checkpoint as JSON, with a checksum of its own."""
  body = json.dumps({'step': step, 'leaves': prints, 'meta': meta, **more}, sort_keys=True)
  return {'format': FORMAT, 'body': body, 'sha256': hashlib.sha256(body.encode()).hexdigest()}


def unseal(sealed: dict | None) -> dict:
  """The record that `seal` was given; ValueError where it is not what was sealed, UserError where another version of this
  program sealed it."""
  sealed = sealed or {}
  body, form = sealed.get('body', ''), sealed.get('format')
  if isinstance(form, int | str) and form != FORMAT:
    raise UserError(f'its record is of format {form}, and {FORMAT} is what this version reads.',
                    'Use the version that wrote it (env.json says which); nothing was moved.', OTHER_CONFIG)
  if form != FORMAT or hashlib.sha256(body.encode()).hexdigest() != sealed.get('sha256'):
    raise ValueError('its record is missing or wrong')
  return json.loads(body)

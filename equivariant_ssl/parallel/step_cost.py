"""The cost of a program: operations counted in its jaxpr, collectives in its compiled text."""
import collections
import math
import re
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr

COLLECTIVES = ('all-reduce', 'all-gather', 'all-to-all', 'reduce-scatter', 'collective-permute')
# Bytes of one number of each dtype, as XLA names it.
BYTES = {'pred': 1, 's8': 1, 'u8': 1, 'bf16': 2, 'f16': 2, 's16': 2, 'u16': 2, 'f32': 4, 's32': 4,
         'u32': 4, 'f64': 8, 's64': 8, 'u64': 8}
Arrays = list[tuple[str, tuple[int, ...]]]  # the dtype and the shape of each


class Collective(NamedTuple):
  """One collective of a compiled program.

  kind:    one of COLLECTIVES.
  results: its results on one device.
  devices: the number of devices that take part in it together; 0 stands for all of them.
  source:  where in the traced program it comes from: names of scopes with / between them.
  """
  kind: str
  results: Arrays
  devices: int
  source: str


def flops(jaxpr: Jaxpr) -> float:
  """Count the floating-point operations of a jaxpr's matrix products and convolutions.

  A multiply-add counts as two. The most expensive branch of a condition counts, and all rounds of
  a scan, and one round of a loop without a known end.
  """
  return sum(flops_by_precision(jaxpr).values())


def flops_by_precision(jaxpr: Jaxpr) -> dict[str, float]:
  """Return what `flops` counts, by precision.

  'bfloat16' stands for products of such numbers, 'highest' for products of float32 that ask for
  precision 'highest', 'float32' for the others.
  """
  total: dict[str, float] = collections.defaultdict(float)
  live = set(map(id, jaxpr.outvars))
  for eqn in reversed(jaxpr.eqns):
    if not any(id(v) in live for v in eqn.outvars):
      continue  # the trace of a gradient leaves in the forward pass that it does not need
    live |= set(map(id, eqn.invars))
    name = eqn.primitive.name
    if name == 'dot_general':
      (contract, _), _ = eqn.params['dimension_numbers']
      left: Any = eqn.invars[0].aval
      result: Any = eqn.outvars[0].aval
      total[_precision(eqn)] += 2. * math.prod(result.shape) * math.prod(
          left.shape[d] for d in contract)
    elif name == 'conv_general_dilated':
      total[_precision(eqn)] += _convolution_flops(eqn)
    elif name == 'cond':
      branches = [flops_by_precision(branch.jaxpr) for branch in eqn.params['branches']]
      for precision, count in max(branches, key=lambda b: sum(b.values())).items():
        total[precision] += count
    else:
      rounds = eqn.params.get('length', 1) if name == 'scan' else 1
      for inner in _inner_jaxprs(eqn.params):
        for precision, count in flops_by_precision(inner).items():
          total[precision] += rounds * count
  return dict(total)


def _precision(eqn: Any) -> str:
  """Return the precision of a product or convolution; see `flops_by_precision`."""
  if eqn.invars[0].aval.dtype in (jnp.bfloat16, jnp.float16):
    return 'bfloat16'
  return 'highest' if 'HIGHEST' in str(eqn.params['precision']) else 'float32'


def _inner_jaxprs(params: dict) -> list[Jaxpr]:
  """Return the jaxprs that the parameters of an equation hold."""
  jaxprs = []
  for value in params.values():
    for v in value if isinstance(value, (tuple, list)) else (value,):
      if isinstance(v, ClosedJaxpr):
        jaxprs.append(v.jaxpr)
      elif isinstance(v, Jaxpr):
        jaxprs.append(v)
  return jaxprs


def _convolution_flops(eqn: Any) -> float:
  """Count the operations of a convolution that meet no zero of its padding or dilation."""
  lhs, rhs = (v.aval.shape for v in eqn.invars)
  params, out = eqn.params, eqn.outvars[0].aval.shape
  spec = params['dimension_numbers']
  pairs = 1
  for d, (low, _) in enumerate(params['padding']):
    size, kernel = lhs[spec.lhs_spec[2 + d]], rhs[spec.rhs_spec[2 + d]]
    outputs = out[spec.out_spec[2 + d]]
    dilation = params['lhs_dilation'][d]
    positions = (np.arange(outputs)[:, None] * params['window_strides'][d]
                 + np.arange(kernel) * params['rhs_dilation'][d] - low)
    inside = (positions >= 0) & (positions <= (size - 1) * dilation)
    pairs *= int((inside & (positions % dilation == 0)).sum())
  return 2. * pairs * out[spec.out_spec[0]] * out[spec.out_spec[1]] * rhs[spec.rhs_spec[1]]


def collectives(text: str, scope: str = '') -> dict[str, tuple[int, int]]:
  """Return {kind: (number, bytes of their results on a device)} for a compiled program's text.

  scope: count only those that come from the `jax.named_scope` of this name.
  """
  totals: dict[str, tuple[int, int]] = collections.defaultdict(lambda: (0, 0))
  for one in list_collectives(text):
    if scope in one.source:
      count, size = totals[one.kind]
      size += sum(BYTES.get(dtype, 4) * math.prod(shape) for dtype, shape in one.results)
      totals[one.kind] = count + 1, size
  return dict(totals)


def list_collectives(text: str) -> list[Collective]:
  """Return every collective of a compiled program's text.

  A collective is listed as often as it runs: those in a loop of known length, that many times.
  """
  bodies = dict(re.findall(r'^(?:ENTRY )?%?([\w.\-]+) \(.*?\) -> .*? \{\n(.*?)^\}', text,
                           re.MULTILINE | re.DOTALL))
  entry = re.search(r'^ENTRY %?([\w.\-]+)', text, re.MULTILINE)
  return _collectives_of(bodies[entry[1]] if entry and entry[1] in bodies else text, bodies)


def _participants(line: str) -> int:
  """Return how many devices the collective of a line joins; 0 for all of them.

  XLA writes a list of groups, {{0,1},{2,3}}; or the shape of that list, [2,2]<=[4]; or the axes
  of a mesh along which the devices of a group differ, mesh['a'=2,'b'=2] {'b'}.
  """
  if match := re.search(r'replica_groups=\{\{([\d, ]+)\}', line):
    return match[1].count(',') + 1
  if match := re.search(r'replica_groups=mesh\[(.*?)\] \{(.*?)\}', line):
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
    return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", match[2]))
  match = re.search(r'replica_groups=\[\d+,(\d+)\]', line)
  return int(match[1]) if match else 0


def _collectives_of(body: str, bodies: dict[str, str]) -> list[Collective]:
  """Return the collectives of one computation and of those that it calls.

  bodies: {name: text} of all computations of the program.
  """
  listed = []
  for line in body.splitlines():
    if match := re.search(rf'= (.*?) ({"|".join(COLLECTIVES)})(-start)?\(', line):
      results, kind, starts = match.groups()
      arrays = [(dtype, tuple(int(d) for d in dims.split(',') if d))
                for dtype, dims in re.findall(r'(\w+)\[([\d,]*)\]', results)]
      if starts and kind != 'all-reduce':  # the text has the operands, then the results
        arrays = arrays[len(arrays) // 2:]
      source = re.search(r'op_name="([^"]*)"', line)
      listed.append(Collective(kind, arrays, _participants(line), source[1] if source else ''))
    trips = re.search(r'known_trip_count[^}]*?"n":"(\d+)"', line)
    rounds = int(trips[1]) if trips else 1
    calls = re.findall(r'(?:body|calls|to_apply|\w+_computations?)=\{?(%[\w.\-, %]+)', line)
    for name in (name for names in calls for name in names.split(',')):
      listed += _collectives_of(bodies.get(name.strip().lstrip('%'), ''), bodies) * rounds
  return listed

"""A compiled program as XLA prints it: its instructions, how often each runs, what each moves."""
import collections
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from equivariant_ssl.parallel.step_cost import BYTES

# Instructions that do nothing when the program runs, and the ends of what began as `...-start`.
FREE = {'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'after-all',
        'partition-id', 'replica-id', 'opt-barrier', 'add-dependency', 'domain'}
PARTS_OF_ARRAY = {'dynamic-slice', 'slice', 'gather'}  # they read as much as they return
LOOPS = {'while', 'call', 'conditional', 'async-start'}  # they run other computations
HEAD = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$')
LINE = re.compile(r'^\s+(ROOT )?%?([\w.\-]+) = (.*)$')
KIND = re.compile(r' ([\w\-]+)\(')
ARRAY = re.compile(r'(\w+)\[([\d,]*)\](?:\{([^}]*)\})?')
Computation = dict[str, 'Instruction']  # {name: instruction}, in the order of the text


class Instruction(NamedTuple):
  """One instruction of a computation.

  name:     its name.
  kind:     its opcode, such as 'fusion'.
  shape:    the text of its result.
  operands: the names of its operands.
  rest:     the text after its operands: attributes and metadata.
  is_root:  whether the computation returns it.
  """
  name: str
  kind: str
  shape: str
  operands: tuple[str, ...]
  rest: str
  is_root: bool


def array_bytes(shape: str) -> int:
  """Return the bytes in a device's main memory of the arrays in the text of a shape.

  Where the layout has tiles, as a TPU's, the last two dimensions are filled up to whole ones.
  Arrays in another memory space, S(1) and higher, lie on the chip and count nothing.
  """
  total = 0
  for dtype, dims, layout in ARRAY.findall(shape):
    if re.search(r'S\([1-9]', layout):
      continue
    sizes = [int(d) for d in dims.split(',') if d]
    order, _, tiles = layout.partition(':')
    tile = re.match(r'T\(([\d,]+)\)', tiles)
    if tile and sizes and order:
      minor_first = [int(d) for d in order.split(',')]
      for axis, side in zip(minor_first, reversed(tile[1].split(',')), strict=False):
        sizes[axis] = -(-sizes[axis] // int(side)) * int(side)
    total += BYTES.get(dtype, 4 if dtype != 'token' else 0) * math.prod(sizes)
  return total


def parse_program(text: str) -> tuple[dict[str, Computation], str]:
  """Return {name: computation} of a program's text, and the name of the one that it starts with."""
  computations, entry, current = {}, '', {}
  for line in text.splitlines():
    if head := HEAD.match(line):
      current = computations[head[2]] = {}
      entry = head[2] if head[1] else entry
    elif match := LINE.match(line):
      root, name, text_after = match.groups()
      # The shape of several results is in parentheses, with others in it: those of its tiles.
      start = _closing(text_after) + 1 if text_after.startswith('(') else 0
      kind = KIND.search(text_after, start)
      if kind:
        end = kind.end() - 1 + _closing(text_after[kind.end() - 1:])
        operands = re.findall(r'%([\w.\-]+)', text_after[kind.end():end])
        current[name] = Instruction(name, kind[1], text_after[:kind.start()], tuple(operands),
                                    text_after[end + 1:], bool(root))
  return computations, entry


def _closing(text: str) -> int:
  """Return where the parenthesis that opens a text is closed."""
  depth = 0
  for match in re.finditer(r'[()]', text):
    depth += 1 if match[0] == '(' else -1
    if not depth:
      return match.start()
  return len(text)


def executed(computations: dict[str, Computation], name: str, rounds: int = 1
             ) -> Iterator[tuple[Instruction, Computation, int]]:
  """Yield the instructions that a computation executes as (instruction, its computation, rounds).

  Loops, calls and branches are entered; a fusion is one instruction. Of a conditional each branch
  counts, as the text does not say which one is taken.
  """
  computation = computations[name]
  for instruction in computation.values():
    kind = instruction.kind
    if kind in FREE or kind.endswith(('-done', '-update')):
      continue
    called = _called(instruction) if kind in LOOPS else []
    if not called:
      yield instruction, computation, rounds
    trips = re.search(r'known_trip_count[^}]*?"n":"(\d+)"', instruction.rest)
    for inner in called:
      yield from executed(computations, inner, rounds * (int(trips[1]) if trips else 1))


def _called(instruction: Instruction) -> list[str]:
  """Return the computations that a loop, a call or a conditional runs."""
  lists = re.findall(r'(?:body|calls|to_apply|\w+_computations?)=\{?((?:%[\w.\-]+(?:, )?)+)',
                     instruction.rest)
  return [name for names in lists for name in re.findall(r'%([\w.\-]+)', names)]


def moved_bytes(instruction: Instruction, computation: Computation,
                computations: dict[str, Computation]) -> int:
  """Return the bytes that an instruction reads from memory and writes to it.

  They are those of its operands and its result. Where it takes a part of an operand, or changes a
  part of it in place, the part counts.
  """
  kind = instruction.kind
  shapes = {name: computation[name].shape for name in instruction.operands if name in computation}
  if kind in PARTS_OF_ARRAY:
    return 2 * array_bytes(instruction.shape)
  if kind == 'dynamic-update-slice':
    return 2 * array_bytes(shapes.get(instruction.operands[1], ''))
  if kind in ('slice-start', 'dynamic-slice-start'):  # ((operands), the part, ...), to the chip
    results = instruction.shape[1 + _closing(instruction.shape[1:]):]
    return array_bytes(results.replace('S(1)', ''))
  if kind.endswith('-start') and kind != 'all-reduce-start':
    return array_bytes(instruction.shape)  # a tuple of the operands and the results
  called = re.search(r'calls=%([\w.\-]+)', instruction.rest)
  if kind == 'fusion' and called and called[1] in computations:
    return _fusion_bytes(instruction, computations[called[1]])
  result = instruction.shape
  if re.search(r'custom_call_target="__cu(blas|dnn)', instruction.rest):
    result = re.sub(r', [su]8\[\d+\]\{0\}\)$', '', result)  # room to work in, not a result
  return array_bytes(result) + sum(map(array_bytes, shapes.values()))


def _fusion_bytes(fusion: Instruction, body: Computation) -> int:
  """Return the bytes that a fusion moves, by the instructions of its body."""
  users = collections.defaultdict(list)
  for inner in body.values():
    for operand in inner.operands:
      users[operand].append(inner)
  root = next(i for i in body.values() if i.is_root)
  while root.kind in ('bitcast', 'copy') and root.operands and root.operands[0] in body:
    root = body[root.operands[0]]
  in_place = root.operands[0] if root.kind == 'dynamic-update-slice' else ''
  total = array_bytes(fusion.shape)
  if in_place:
    total = array_bytes(body[root.operands[1]].shape)
  for name, parameter in body.items():
    uses = users[name]
    if parameter.kind != 'parameter':
      continue
    if uses and all(u.kind in PARTS_OF_ARRAY and u.operands[0] == name for u in uses):
      total += sum(array_bytes(u.shape) for u in uses)
    elif name != in_place:
      total += array_bytes(parameter.shape)
  return total

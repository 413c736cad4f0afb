"""What a compiled step does, by part of the step: instructions, bytes, collectives."""
import re
from typing import Any, NamedTuple

from equivariant_ssl.parallel.program_text import (
    Computation,
    Instruction,
    array_bytes,
    executed,
    moved_bytes,
    parse_program,
)
from equivariant_ssl.parallel.step_cost import collectives
from equivariant_ssl.training.step import AUGMENTATION, ENCODER, OPTIMIZER

PARTS: tuple[str, ...] = ('augmentation', 'forward', 'backward', 'heads and losses',
                          'optimizer', 'other')
LARGEST = 10  # instructions that are listed one by one


class Work(NamedTuple):
  """What a program does in a step, on one device.

  instructions: {part: how many it runs}; each is a kernel or more.
  bytes_moved:  {part: bytes that they read from memory and write to it}.
  collectives:  {kind: [number, bytes of their results]}.
  largest:      the instructions that move most, as [bytes, part, kind, result, operation]; an
                instruction in a loop has the bytes of all rounds.
  """
  instructions: dict[str, int]
  bytes_moved: dict[str, int]
  collectives: dict[str, Any]
  largest: list[list]


def operation_name(instruction: Instruction, computations: dict[str, Computation]) -> str:
  """Return the name of the operation in the source that an instruction comes from, or ''.

  A fusion that has none gets that of the last instruction in it that has one.
  """
  match = re.search(r'op_name="((?:[^"\\]|\\.)*)"', instruction.rest)
  called = re.search(r'calls=%([\w.\-]+)', instruction.rest)
  if match or not called:
    return match[1] if match else ''
  names = [operation_name(inner, {}) for inner in computations.get(called[1], {}).values()]
  return next((name for name in reversed(names) if '/' in name), '')


def part_of(name: str) -> str:
  """Return the part of the step that an operation of this name belongs to, one of PARTS.

  What the encoder computes again for its gradient belongs to the way back.
  """
  scopes = set(re.findall(r'\w+', name))
  if AUGMENTATION in scopes:
    return 'augmentation'
  if OPTIMIZER in scopes:
    return 'optimizer'
  if ENCODER in scopes:
    again = 'transpose(' in name or 'rematted_computation' in scopes
    return 'backward' if again else 'forward'
  return 'heads and losses' if '/' in name else 'other'


def read_program(text: str) -> Work:
  """Return what the program of a compiled step does, from its text."""
  computations, entry = parse_program(text)
  instructions, bytes_moved = dict.fromkeys(PARTS, 0), dict.fromkeys(PARTS, 0)
  rows = []
  for instruction, computation, rounds in executed(computations, entry):
    name = operation_name(instruction, computations)
    part, size = part_of(name), rounds * moved_bytes(instruction, computation, computations)
    instructions[part] += rounds
    bytes_moved[part] += size
    rows.append([size, part, instruction.kind, _short_shape(instruction.shape), _short_name(name)])
  rows.sort(key=lambda row: -row[0])
  return Work(instructions, bytes_moved, collectives(text), rows[:LARGEST])


def _short_shape(shape: str) -> str:
  """Return the text of the largest array of a shape, without its layout."""
  arrays = re.findall(r'\w+\[[\d,]*\]', shape)
  return max(arrays, key=array_bytes, default='')


def _short_name(name: str) -> str:
  """Return the last parts of an operation's name, which say the layer and the operation."""
  return '/'.join(name.split('/')[-3:])

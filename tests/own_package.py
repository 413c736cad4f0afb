"""A package in a folder of its own, as a user has one: an op, networks, an objective and a data set, by dotted paths."""
import pathlib
import sys
from collections.abc import Iterator

from additions import ENCODER, EQUIVARIANCE, OP

NAME = 'their_pkg'
DATA = '''
"""Twenty noisy squares in two classes."""
import numpy as np
from equivariant_ssl.data.channel_moments import moments
from equivariant_ssl.data.source import Source, Split


def make(count: int = 40) -> Source:
  rng = np.random.default_rng(0)
  labels = np.arange(count, dtype=np.int32) % 2
  images = (rng.integers(0, 64, (count, 16, 16, 3)) + 128 * labels[:, None, None, None]).astype(np.uint8)
  sizes = np.full((count, 2), 16, np.float32)
  half = count // 2
  splits = [Split(images[part], sizes[part], labels[part]) for part in (slice(half), slice(half, None))]
  return Source('theirs', *splits, ('dark', 'bright'), *moments(images))
'''
BROKEN_OP = OP.replace('lambda action: action.amount[None])', 'lambda action: action.amount[None] + 1.)')
FILES = {'sepia.py': OP, 'broken.py': BROKEN_OP, 'objective.py': EQUIVARIANCE, 'squares.py': DATA, 'nets/mine.py': ENCODER,
         'nets/plain.py': ENCODER.replace("def make(dtype='float32')", 'def make()')}
DOTTED = {'augment.order': f'crop,flip,rotate,{NAME}.sepia', 'augment.sepia.role': 'both', 'augment.sepia.most': '.3',
          'equivariance': f'{NAME}.objective', 'data.name': f'{NAME}.squares', 'data.count': '36', 'steps': '2'}


def forget() -> None:
  """Python has not imported the package, as in a process of its own."""
  for name in [name for name in sys.modules if name.partition('.')[0] == NAME]:
    del sys.modules[name]


def imported() -> list[str]:
  return [name for name in sys.modules if name.partition('.')[0] == NAME]


def write(folder: pathlib.Path) -> Iterator[pathlib.Path]:
  """A fixture's body: the package is in `folder`, and nowhere else that Python looks."""
  for name, text in FILES.items():
    path = folder / NAME / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
  yield folder
  forget()

"""What the tests of adding a module share: files written into a folder that a package looks into, and one such network."""
import sys
from collections.abc import Iterator
from types import ModuleType

TINY = 'tiny_for_tests'
ENCODER = '''
"""The smallest encoder with what can go wrong: a convolution and a BatchNorm."""
import flax.linen as nn
from equivariant_ssl.nets.conv import Conv
from equivariant_ssl.nets.norm import BatchNorm


class Tiny(nn.Module):
  @nn.compact
  def __call__(self, x, train):
    return nn.relu(BatchNorm()(Conv(8, 3, 2, 1)(x), train)).mean((1, 2))


def make(dtype='float32'):
  return Tiny()
'''


def added(tmp_path_factory, files: dict[str, tuple[ModuleType, str]]) -> Iterator[None]:
  """A fixture's body: {name: (package, text)} are modules of their packages while it runs."""
  folders = []
  for name, (package, text) in files.items():
    folder = tmp_path_factory.mktemp(name)
    (folder / f'{name}.py').write_text(text)
    package.__path__.append(str(folder))
    folders.append((package, str(folder)))
  yield
  for package, folder in folders:
    package.__path__.remove(folder)
  for name, (package, _) in files.items():
    sys.modules.pop(f'{package.__name__}.{name}', None)

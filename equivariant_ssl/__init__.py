"""Self-supervised learning of images that keeps what augmentations do.

  import equivariant_ssl as es
  es.pretrain('cifar10_quick', images, 'runs/mine')    # uint8 [N H W 3]
  encoder = es.load('runs/mine')
  features = encoder(images)                           # float32 [N D]

`docs/library.md` is about the library; `equivariant_ssl/api.py` defines what is here. Importing the
package imports nothing else: the library is imported when one of its names is used.

Capital letters are dimensions, in docstrings, and as suffixes of names where the order is not
obvious (`z_BVE`):

  B  images of the global batch (always first)  V  views of one image  H W C  pixels, channels
  D  features of the encoder                    E  embedding           A      conditioning
  N  pairs (= B x V, B-major)                   K  classes             S      side of a square view

`docs/glossary.md` has one sentence for each word. The first ones: an `action` is what an
augmentation drew and applied (the parameters that it returns); a `view` is an image after an
action; the `reference` is the view whose action is the identity; a `pair` is (source, target, the
actions that made them); `params` and `stats` are the weights of the networks and their BatchNorm
statistics.
"""
import importlib
import sys
from types import ModuleType
from typing import Any

__version__ = '0.1.0'
# pyright: reportUnsupportedDunderAll=false
# The names are those of api.py, where __getattr__ looks; pyright sees them in __init__.pyi.
__all__ = [
    'Classifier', 'Encoder', 'LawError', 'Source', 'Split', 'UserError', 'check_laws', 'evaluate',
    'load', 'pretrain', 'study', 'views']
# The rooms of the package whose names are functions of the library too.
ROOMS = ('evaluate', 'study')


class CallableRoom(ModuleType):
  """A package that can be called: `es.evaluate(...)` is `api.evaluate(...)`."""

  def __call__(self, *args: Any, **kwargs: Any) -> Any:
    return self.__wrapped__(*args, **kwargs)

  @property
  def __wrapped__(self) -> Any:  # `inspect.signature` and editors look here
    return getattr(importlib.import_module(f'{__name__}.api'), self.__name__.rpartition('.')[2])


class Package(ModuleType):
  """This package. Python sets a room as its attribute when the room is imported."""

  def __setattr__(self, name: str, value: Any) -> None:
    if name in ROOMS and isinstance(value, ModuleType):
      value.__class__ = CallableRoom
    super().__setattr__(name, value)


def __getattr__(name: str) -> Any:
  if name in ROOMS:
    return importlib.import_module(f'{__name__}.{name}')
  if name in __all__:
    return getattr(importlib.import_module(f'{__name__}.api'), name)
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__() -> list[str]:
  return sorted({*globals(), *__all__})


sys.modules[__name__].__class__ = Package

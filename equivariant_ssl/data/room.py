"""Memory for large images, which threads that decode at the same time share."""
import contextlib
import threading
from collections.abc import Iterator


class Room:
  """Room for at most `most` pixels in all threads together.

  An image of `large` pixels or more waits until there is room for it.
  """

  def __init__(self, most: int, large: int):
    self.most, self.large, self.used = most, large, 0
    self.changed = threading.Condition()

  @contextlib.contextmanager
  def reserve(self, pixels: int) -> Iterator[None]:
    """Hold room for an image of so many pixels. No image may have more than `most` pixels."""
    if pixels < self.large:
      yield
      return
    with self.changed:
      self.changed.wait_for(lambda: self.used + pixels <= self.most)
      self.used += pixels
    try:
      yield
    finally:
      with self.changed:
        self.used -= pixels
        self.changed.notify_all()

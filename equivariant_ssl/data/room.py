"""Memory for large images, which threads that decode side by side share."""
import contextlib
import threading
from collections.abc import Iterator


class Room:
  """Room for `most` pixels in all threads together: an image of `large` or more waits until there is its own."""

  def __init__(self, most: int, large: int):
    self.most, self.large, self.used, self.changed = most, large, 0, threading.Condition()

  @contextlib.contextmanager
  def of(self, pixels: int) -> Iterator[None]:
    if pixels < self.large:
      yield
      return
    with self.changed:
      self.changed.wait_for(lambda: self.used + pixels <= self.most)  # no image has more itself
      self.used += pixels
    try:
      yield
    finally:
      with self.changed:
        self.used -= pixels
        self.changed.notify_all()

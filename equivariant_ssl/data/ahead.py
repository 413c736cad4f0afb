"""Long work on many images: in threads, a few images ahead, with a line on how far it is."""
import collections
import itertools
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from equivariant_ssl.data.source import thread_count

EVERY = 5.   # seconds between two lines
Item = TypeVar('Item')
Result = TypeVar('Result')


def map_in_order(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
  """`work` on each item, in threads, in the order of the items. A few items are read ahead."""
  with ThreadPoolExecutor(thread_count()) as pool:
    ahead, rest = collections.deque(), iter(items)
    for item in itertools.islice(rest, 4 * thread_count()):
      ahead.append(pool.submit(work, item))
    while ahead:
      yield ahead.popleft().result()
      ahead.extend(pool.submit(work, item) for item in itertools.islice(rest, 1))


def with_progress(title: str, items: Iterable[Item]) -> Iterator[Item]:
  """The `items`; every five seconds a line says how many there were, and how fast."""
  start = last = time.monotonic()
  for count, item in enumerate(items, 1):
    yield item
    now = time.monotonic()
    if now - last > EVERY:
      last = now
      print(f'{title}: {count:,} images, {count / (now - start):.0f} images/s', file=sys.stderr,
            flush=True)

"""Work that process 0 of a job does for all of them."""
import io
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np

from equivariant_ssl.parallel.processes import gather, is_main, raise_together

PAUSE = .5  # seconds between two questions whether process 0 has done its work


def share_arrays(compute: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
  """Return the arrays of `compute()`, which process 0 alone calls, however long it takes.

  All processes must call this. Raises UserError in all of them where `compute` raises an
  error.
  """
  if jax.process_count() == 1:
    return compute()
  from jax.experimental.multihost_utils import broadcast_one_to_all
  with ThreadPoolExecutor(1) as pool:
    future = pool.submit(compute) if is_main() else None
    while not gather(future is None or future.done())[0]:
      time.sleep(PAUSE)  # a collective alone would give up on the others within a minute
    error = future.exception() if future else None
    raise_together(error if isinstance(error, Exception) else None)
    file = io.BytesIO()
    if future:
      np.savez_compressed(file, **future.result())  # pyright: ignore[reportArgumentType]
    size = gather(file.tell())[0]
    content = np.frombuffer(file.getvalue().ljust(size, b'\0'), np.uint8)
    content = np.asarray(broadcast_one_to_all(content))
    with np.load(io.BytesIO(content.tobytes())) as arrays:
      return dict(arrays)

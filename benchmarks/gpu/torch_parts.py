"""The same SimCLR step in PyTorch and here, in turns.

The steps run on the same views, with and without torch.compile, and then with each one's own augmentation: ours on the
device, PyTorch's on CPU workers.
"""
import contextlib
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np
import sizes
import step as twins
import torch
import torch_step
from budget import middle

from equivariant_ssl.data.order import epoch_order
from equivariant_ssl.parallel import sharding
from equivariant_ssl.training import feeds, runs

ROUNDS = 2


class Turn(NamedTuple):
  """A step that is timed. advance: do one step. wait: until the device has done it. ready: what to do before a turn is
  timed."""
  advance: Callable[[], None]
  wait: Callable[[], None]
  ready: Callable[[], None] = lambda: None


def ours_given(run, first, shown) -> Turn:
  """Our update on the same views."""
  program, held = twins.ours(run, shown, True), [first]

  def advance() -> None:
    held[0] = program(held[0], shown)[0]
  return Turn(advance, lambda: jax.block_until_ready(held[0].step))


def ours_whole(run, compiled: Callable) -> Turn:
  """Our training step: the batch is picked, augmented and learned from on the device."""
  program, (_, data) = compiled(run), feeds.compiled(run)
  order = sharding.place(np.asarray(epoch_order(run.key, 0, len(data.images))), sharding.replicated_sharding(run.mesh))
  held = [runs.initial_state(run)]

  def advance() -> None:
    held[0] = program(run.key, held[0], data, order)[0]
  return Turn(advance, lambda: jax.block_until_ready(held[0].step))


def torch_given(twin: torch_step.Step, x, wait: Callable, compile_: bool, note: Callable[[str], None]) -> Turn:
  """PyTorch's step on the same views. compile_: compile the loss with its gradient, and the optimizer where that is
  possible."""
  if compile_:
    twin.loss = torch.compile(twin.loss)
    eager = twin.optimizer.step
    with contextlib.suppress(Exception):
      twin.optimizer.step = torch.compile(eager)
    try:
      twin(x)
    except Exception as e:
      note(f'the optimizer is not compiled: {type(e).__name__}: {str(e).splitlines()[0][:200]}')
      twin.optimizer.step = eager
      twin(x)
  return Turn(lambda: twin(x), wait)


def torch_whole(twin: torch_step.Step, images: np.ndarray, batch: int, workers: int, wait: Callable) -> Turn:
  """PyTorch's step on what its workers make. Before a turn is timed, the batches that they made ahead are used up."""
  import torch_views  # torchvision: without it the other steps are still compared
  cuda = twin.device == 'cuda'
  source = torch_views.loader(images, batch, workers, cuda)

  def endless() -> Iterator[torch.Tensor]:
    while True:
      yield from source
  batches = endless()

  def advance() -> None:
    views = next(batches).to(twin.device, non_blocking=cuda)  # [B 2 3 S S]
    x = torch.cat([views[:, 0], views[:, 1]]).contiguous(memory_format=torch.channels_last)
    twin(x)

  def ready() -> None:
    for _ in range(workers + 1):
      next(batches)
  return Turn(advance, wait, ready)


def turn(step: Turn, batch: int, seconds: float) -> float:
  """The images/s of one turn. The device is waited for every ten steps, and not at each."""
  step.ready()
  step.wait()
  start, count = time.perf_counter(), 0
  while time.perf_counter() - start < seconds or not count:
    for _ in range(10 if count else 1):
      step.advance()
      count += 1
    step.wait()
  return count * batch / (time.perf_counter() - start)


def compare(size: sizes.Size, say: Callable[[dict], None], described: Callable, compiled: Callable) -> dict:
  """{name: images/s of each round} for the steps that could be made; and why the others could not be made."""
  device = jax.devices()[0]
  where = 'cuda' if device.platform == 'gpu' else 'cpu'
  wait = torch.cuda.synchronize if where == 'cuda' else lambda: None
  torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = size.dtype != 'float32'
  torch.backends.cudnn.benchmark = True
  found = {'torch': torch.__version__, 'jax': jax.__version__, 'batch': size.batch, 'dtype': size.dtype, 'width': size.width,
           'workers': size.workers, 'images_per_s': {}, 'not_made': {}, 'notes': []}
  run, first, shown = twins.prepared(device, size.batch, size.width, size.dtype)
  twin = lambda: twins.torch_twin(run, first, where, getattr(torch, size.dtype))
  plain = twin()
  x = plain.place(np.asarray(shown['views'].images))
  whole = described({'batch': str(size.batch), 'dtype': size.dtype, 'encoder.width': str(size.width), 'encoder.depth': '18'})
  made = {}
  for name, make in {
      'ours, given views': lambda: ours_given(run, first, shown),
      'PyTorch, given views': lambda: torch_given(plain, x, wait, False, found['notes'].append),
      'ours, whole step': lambda: ours_whole(whole, compiled),
      'PyTorch compiled, given views': lambda: torch_given(twin(), x, wait, True, found['notes'].append),
      'PyTorch, whole step on CPU workers': lambda: torch_whole(twin(), whole.source.train.images, size.batch, size.workers,
                                                               wait)}.items():
    start = time.perf_counter()
    try:
      step = make()
      for _ in range(3):
        step.advance()
      step.wait()
      made[name] = step
      found['images_per_s'][name] = [turn(step, size.batch, size.seconds / 2)]
    except Exception as e:
      found['not_made'][name] = f'{type(e).__name__}: {(str(e).splitlines() or [""])[0][:300]}'
    found.setdefault('ready_s', {})[name] = time.perf_counter() - start
    say(found)
  for _ in range(ROUNDS):  # in turns: what drifts, drifts for all
    for name, step in made.items():
      found['images_per_s'][name].append(turn(step, size.batch, size.seconds / 2))
      found['median'] = {n: middle(values) for n, values in found['images_per_s'].items()}
      say(found)
  if where == 'cuda':
    found['memory_gib'] = {'ours': device.memory_stats()['peak_bytes_in_use'] / 2**30,
                           'PyTorch': torch.cuda.max_memory_allocated() / 2**30}
  say(found)
  if where == 'cuda':
    found['same'] = checked(device, size.width)
  return found


def checked(device, width: int) -> str:
  """Whether both steps have the same loss and gradient: ours in float32, PyTorch's in float64."""
  try:
    with jax.default_matmul_precision('highest'):
      twins.check(device, width, 'cuda')
    return 'loss to 1e-4 and gradient to 1e-3'
  except SystemExit:
    return 'FAILED: the log has both differences'

"""Images/s of the ResNet-18 SimCLR step: with the fast weight gradient, without it, and in plain PyTorch.

Command: python benchmarks/step.py [--device cpu|gpu] [--batch 128] [--widths 32,64] [--dtype float32]
First both networks receive the same weights and the same 16 views, in float64, and must have the same loss and gradient to
1e-9. In float32 they cannot be compared on noise: a ReLU whose input rounds to the other side of zero changes the gradient
by up to 1e-2 of its largest value, in PyTorch and here alike. Then the steps are timed in one process, in turns, on the same
views, in --dtype.
"""
import argparse
import functools
import pathlib
import statistics
import sys
import time

import jax
import numpy as np
import optax
import torch
import torch_step

from equivariant_ssl.config import load_config
from equivariant_ssl.nets import conv
from equivariant_ssl.nets.resnet import to_torch
from equivariant_ssl.parallel import sharding
from equivariant_ssl.storage import record
from equivariant_ssl.training import loop, state, step
from equivariant_ssl.training.recipe import make_recipe

sys.path.append(str(pathlib.Path(__file__).parents[1] / 'tests'))
import wide  # noqa: E402

CHECKED = 8    # images of the comparison in float64, which XLA convolves slowly on a CPU
BOUND = 1e-9   # of the comparison in float64, relative


def prepared(device, batch: int, width: int, dtype: str):
  """(run, its first state, views [B 2 32 32 3]) of the SimCLR step of CIFAR, on noise images."""
  config = load_config('cifar10_simclr', {'dtype': dtype, 'batch': str(batch), 'encoder.width': str(width),
                                          'data.name': 'digits', 'optimizer.warmup_epochs': '0',
                                          'optimizer.lr': '.01'})  # the same views again and again: a small rate
  run = loop.prepare_run(config, sharding.mesh([device]))
  images = np.random.default_rng(0).integers(0, 256, (batch, 32, 32, 3), np.uint8)
  data = jax.device_put(step.Batch(images, np.full((batch, 2), 32, np.float32)), device)
  shown = jax.jit(functools.partial(step.draw_views, run.recipe))(jax.device_put(run.key, device), 0, data)
  return run, loop.initial_state(run), shown


def ours(run: loop.Run, shown, fast: bool):
  """One jitted update on the same views: (state) -> (state, loss, gradient)."""
  def update(s: state.TrainState, shown):
    (loss, (stats, *_)), grads = jax.value_and_grad(functools.partial(step.loss, run.recipe), has_aux=True)(
        s.params, s.stats, shown)
    updates, opt_state = run.recipe.tx.update(grads, s.opt_state, s.params)
    return s._replace(params=optax.apply_updates(s.params, updates), stats=stats, opt_state=opt_state), loss, grads

  kept = conv.conv2d
  try:
    if not fast:
      conv.conv2d = conv.plain
    compiled = jax.jit(update).lower(loop.abstract_state(run), shown).compile()
  finally:
    conv.conv2d = kept
  return compiled


def linear_kernels(params: dict) -> list[np.ndarray]:
  """The projector's kernels, first to last."""
  found = [(jax.tree_util.keystr(k), np.asarray(v)) for k, v in jax.tree_util.tree_leaves_with_path(params['projector'])
           if v.ndim == 2]
  return [v for _, v in sorted(found)]


def torch_twin(run: loop.Run, first: state.TrainState, where: str, dtype: torch.dtype) -> torch_step.Step:
  """The PyTorch step with the same weights and settings."""
  return torch_step.Step(
      to_torch(first.params['encoder'], first.stats['encoder']), linear_kernels(first.params), run.config.encoder.width,
      run.config.invariance.temperature, run.config.optimizer.lr, run.source.mean, run.source.std, where, dtype)


def check(device, width: int, where: str) -> None:
  """Print and check that the loss and the gradient of a step are those of PyTorch's, all in float64."""
  run, first, shown = prepared(device, CHECKED, width, 'float32')
  twin = torch_twin(run, first, where, torch.float32).double()
  theirs = twin.loss(twin.place(np.asarray(shown['views'].images)).double())
  theirs.backward()
  with wide.float64():
    run.config.unlock().dtype = wide.WIDE
    recipe = make_recipe(run.config, run.card.images, run.card.canvas, run.card.mean, run.card.std)
    params, stats, shown = jax.tree.map(widened, (first.params, first.stats, shown))
    gradient = jax.jit(jax.value_and_grad(functools.partial(step.loss, recipe), has_aux=True))
    (loss, _), grads = jax.device_get(gradient(params, stats, shown))
  no_stats = jax.tree.map(np.zeros_like, first.stats['encoder'])
  mine, other = to_torch(grads['encoder'], no_stats), dict(twin.encoder.named_parameters())
  pairs = [(mine[k], p.grad.cpu().numpy()) for k, p in other.items()]
  linear = [m.weight.grad.cpu().numpy().T for m in twin.projector if isinstance(m, torch.nn.Linear)]
  pairs += list(zip(linear_kernels(grads), linear, strict=True))
  largest = max(np.abs(b).max() for _, b in pairs)
  errors = {'loss': abs(float(loss) / float(theirs.detach()) - 1),
            'gradient': max(np.abs(a - b).max() for a, b in pairs) / largest}
  good = max(errors.values()) <= BOUND
  print(f'width {width}: against PyTorch in float64, '
        + ', '.join(f'{name} {error:.1e}' for name, error in errors.items())
        + f' (each at most {BOUND:g}){"" if good else ": FAILED"}', flush=True)
  if not good:
    raise SystemExit(1)


def widened(x):
  """A float32 array in float64; others as they are."""
  return x.astype(np.float64) if x.dtype == np.float32 else x


def rates(steps: dict, batch: int, seconds: float, rounds: int) -> dict[str, list[float]]:
  """The images/s of each step, `rounds` times, in turns."""
  found = {name: [] for name in steps}
  for advance, wait in steps.values():
    advance()
    wait()
  for _ in range(rounds):
    for name, (advance, wait) in steps.items():
      start, count = time.perf_counter(), 0
      while time.perf_counter() - start < seconds or count < 1:
        advance()
        count += 1
        wait()
      found[name].append(count * batch / (time.perf_counter() - start))
  return found


def measure(device, batch: int, width: int, dtype: str, seconds: float, rounds: int) -> None:
  where = 'cuda' if device.platform == 'gpu' else 'cpu'
  check(device, width, where)
  run, first, shown = prepared(device, batch, width, dtype)
  plain = torch_twin(run, first, where, getattr(torch, dtype))
  x = plain.place(np.asarray(shown['views'].images))
  programs = {'fast gradient': ours(run, shown, True)}
  if where == 'cpu':
    programs['without'] = ours(run, shown, False)
  steps = {}
  for name, program in programs.items():
    held = [first]

    def advance(program=program, held=held):
      held[0] = program(held[0], shown)[0]
    steps[name] = advance, lambda held=held: jax.block_until_ready(held[0])
  steps['PyTorch'] = lambda: plain(x), torch.cuda.synchronize if where == 'cuda' else lambda: None
  found = rates(steps, batch, seconds, rounds)
  median = {name: statistics.median(values) for name, values in found.items()}
  for name, values in found.items():
    print(f'  {name:14s} {median[name]:9.1f} images/s   ({", ".join(f"{v:.1f}" for v in values)})')
  if 'without' in median:
    print(f'  fast / without {median["fast gradient"] / median["without"]:.2f}')
  print(f'  fast / PyTorch {median["fast gradient"] / median["PyTorch"]:.2f}', flush=True)
  if where == 'cuda':
    print(f'  memory: ours {device.memory_stats()["peak_bytes_in_use"] / 2 ** 30:.2f} GiB, PyTorch '
          f'{torch.cuda.max_memory_allocated() / 2 ** 30:.2f} GiB')


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--device', choices=('cpu', 'gpu'), default='cpu')
  parser.add_argument('--batch', type=int, default=128)
  parser.add_argument('--widths', default='32,64')
  parser.add_argument('--dtype', default='float32')
  parser.add_argument('--seconds', type=float, default=20., help='seconds of each turn')
  parser.add_argument('--rounds', type=int, default=2)
  args = parser.parse_args()
  torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.dtype != 'float32'
  if args.device == 'gpu' and args.dtype == 'float32':
    jax.config.update('jax_default_matmul_precision', 'highest')
  about = record.environment()
  print(f'{about["cpu"]}, jax {jax.__version__}, torch {torch.__version__}, batch '
        f'{args.batch} x 2 views of 32x32, {args.dtype}, torch threads {torch.get_num_threads()}')
  device = jax.devices(args.device)[0]
  for width in map(int, args.widths.split(',')):
    measure(device, args.batch, width, args.dtype, args.seconds, args.rounds)


if __name__ == '__main__':
  main()

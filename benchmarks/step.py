"""Images/s of the ResNet-18 SimCLR step: with the fast weight gradient, without it, and in plain PyTorch.

Command: python benchmarks/step.py [--device cpu|gpu] [--batch 128] [--widths 32,64] [--dtype float32]
First the PyTorch step receives the same weights and the views of 64 images, and must give the same loss to 1e-4 and
gradients to 1e-3. PyTorch computes that in float64: at 1,024 views of noise, its float32 gradient differs by 9e-3 from its
own float64 gradient on a CPU, and ours differs by 1e-6 from it. Then the three steps are timed in one process, in turns, on
the same views.
"""
import argparse
import functools
import statistics
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
  """Print and check that one float32 step of ours and PyTorch's step in float64 have the same loss and gradient."""
  run, first, shown = prepared(device, 64, width, 'float32')
  plain = torch_twin(run, first, where, torch.float32).double()
  _, loss, grads = ours(run, shown, True)(first, shown)
  theirs = plain.loss(plain.place(np.asarray(shown['views'].images)).double())
  theirs.backward()
  stats = jax.tree.map(np.zeros_like, first.stats['encoder'])
  mine, other = to_torch(grads['encoder'], stats), dict(plain.encoder.named_parameters())
  pairs = [(mine[k], p.grad.cpu().numpy()) for k, p in other.items()]
  linear = [m.weight.grad.cpu().numpy().T for m in plain.projector if isinstance(m, torch.nn.Linear)]
  pairs += list(zip(linear_kernels(grads), linear, strict=True))
  largest = max(np.abs(b).max() for _, b in pairs)
  loss_error = abs(float(loss) / float(theirs.detach()) - 1)
  gradient_error = max(np.abs(a - b).max() for a, b in pairs) / largest
  good = loss_error <= 1e-4 and gradient_error <= 1e-3
  print(f'width {width}: against PyTorch, loss {loss_error:.1e} (at most 1e-4), gradient {gradient_error:.1e} (at most 1e-3)'
        f'{"" if good else ": FAILED"}', flush=True)
  if not good:
    raise SystemExit(1)


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

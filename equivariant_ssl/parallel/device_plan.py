"""`eqssl train --plan --on DEVICES`: what the devices' own compiler says of a training step.

The step is compiled and not run, and the devices need not be there; see compilers.py.
"""
from collections.abc import Callable, Iterator
from typing import Any

from equivariant_ssl.config import override_config
from equivariant_ssl.errors import UserError
from equivariant_ssl.parallel import sharding
from equivariant_ssl.parallel.accelerators import (
    ACCELERATORS,
    Accelerator,
    PlannedDevices,
    larger_targets,
    parse_target,
    target_name,
)
from equivariant_ssl.parallel.compilers import CompiledStep, compile_step, compiler_version
from equivariant_ssl.storage.disk import size_text

PARTS_OF_BATCH = 2, 4, 8, 16  # values of config.accumulate that are tried
MOST_DEVICES = 256
Say = Callable[[str], None]  # prints a line for the user
Overrides = dict[str, str]
Compile = Callable[[Any, PlannedDevices], CompiledStep | None]


def lower_bound(step: CompiledStep, device: Accelerator) -> tuple[float, float]:
  """Return (seconds by the bytes, seconds by the FLOP) that a step cannot be faster than.

  They take the memory and the units of the device at their published peaks.
  """
  by_bytes = sum((step.work or {'bytes_moved': {}})['bytes_moved'].values()) / device.bandwidth
  return by_bytes, sum(count / device.peaks[kind] for kind, count in step.flops.items())


def least_bytes(step: CompiledStep, parts: float) -> float:
  """Return bytes that a step needs at least if its temporaries are spread over `parts`.

  This is what serves to leave out hopeless tries: views, embeddings and gradients are not spread.
  """
  fixed = step.weights + step.optimizer + step.batch + step.data
  return fixed + max(step.peak - fixed, 0) / parts


def changed_for(config: Any, overrides: Overrides, devices: int) -> Any:
  """Return the config after `overrides`; None where its batch cannot be cut for so many devices."""
  try:
    changed: Any = override_config(config.copy_and_resolve_references().unlock(), overrides)
    sharding.check_batch(changed.batch, devices, changed.accumulate, changed.batchnorm_groups)
  except UserError:
    return None
  return changed


def config_changes(config: Any, step: CompiledStep, devices: int) -> Iterator[Overrides]:
  """Yield changes of a config that may make its step fit, the smallest first.

  step: what the compiler says of the unchanged one. First come those that change no result: the
  state in shards, then blocks of the encoder that are computed again. Parts of the batch come last:
  with BatchNorm, the statistics are then those of each part.
  """
  split = (step.weights + step.optimizer) * (1 - 1 / devices)
  if config.sharding == 'replicate' and split >= step.peak - step.limit:
    yield {'sharding': 'fsdp'}
  if config.encoder.get('remat') is False:
    yield {'encoder.remat': 'True'}
  for parts in PARTS_OF_BATCH:
    overrides = {'accumulate': str(parts)}
    if parts > config.accumulate and least_bytes(step, parts) <= step.limit and changed_for(
        config, overrides, devices):
      yield overrides


def find_changes(config: Any, target: PlannedDevices, step: CompiledStep, log: Say,
                 compile_: Compile = compile_step) -> list[tuple[str, CompiledStep]]:
  """Return the smallest changes with which a step fits its devices, and what it then needs.

  They are, each as a user types it: a change of the config, and the fewest devices of the same kind
  that take the config as it is. Each is compiled. One that there is not is left out.
  """
  changes = []

  def fits(text: str, changed: Any, on: PlannedDevices) -> bool:
    tried = compile_(changed, on)
    assert tried  # no program is known
    log(f'{text}: {size_text(tried.peak)}, {"fits" if tried.fits else "does not fit"}')
    if tried.fits:
      changes.append((text, tried))
    return tried.fits

  for overrides in config_changes(config, step, target.count):
    changed = changed_for(config, overrides, target.count)
    if fits(' '.join(f'--config.{k}={v}' for k, v in overrides.items()), changed, target):
      break
  for larger in larger_targets(target, MOST_DEVICES):
    parts = larger.count / target.count
    if changed_for(config, {}, larger.count) and least_bytes(step, parts) <= step.limit and fits(
        f'--on {target_name(larger)}', config, larger):
      break
  return changes


def plan_lines(step: CompiledStep, target: PlannedDevices) -> list[str]:
  """Return the lines that describe a compiled step."""
  device = ACCELERATORS[target.kind]
  flops = sum(step.flops.values())
  share = '' if device.usable == 1. else f' ({device.usable:g} of its memory)'
  refused = '' if step.work else '; the compiler refused it, so no more is known'
  lines = [
      f'devices      {target.count} x {device.title}, batch {step.images} = {target.count} x '
      f'{step.images // target.count}; none is needed here: compiled by {step.compiler}',
      f'steps        {step.steps:,} = {step.steps / step.steps_per_epoch:g} epochs of '
      f'{step.steps_per_epoch:,}',
      f'parameters   {step.parameters / 1e6:,.2f} million',
      f'memory       {size_text(step.weights)} weights, {size_text(step.optimizer)} optimizer and '
      f'target, {size_text(step.batch)} batch, {size_text(step.data) if step.data else "no"} data'
      + (f', {size_text(step.temporaries)} temporaries' if step.work else ''),
      f'fits         {"yes" if step.fits else "NO"}: {size_text(step.peak)} at the peak, of '
      f'{size_text(step.limit)} a device{share}{refused}',
      f'a step       {step.images:,} images, {step.views} views of each; on a device '
      f'{flops / 1e12:,.3g} TFLOP (products and convolutions)',
  ]
  return lines + (_work_lines(step, device) if step.work else [])


def _work_lines(step: CompiledStep, device: Accelerator) -> list[str]:
  """Return the lines about the instructions of a compiled step."""
  assert step.work
  count, size = step.work['instructions'], step.work['bytes_moved']
  by_bytes, by_flops = lower_bound(step, device)
  exchanged = ', '.join(f'{n:,} {kind}, together {size_text(total)}'
                        for kind, (n, total) in step.work['collectives'].items())
  return [
      f'instructions {sum(count.values()):,} a step, which move {sum(size.values()) / 1e9:,.2f} GB '
      'in the memory of a device',
      *(f'             {part:17} {count[part]:6,}  {size[part] / 1e9:9,.2f} GB' for part in count),
      f'collectives  {exchanged or "none"}, as the compiler has combined them',
      f'no faster    than {max(by_bytes, by_flops):.3g} s a step, a floor (caches aside): '
      f'{by_bytes:.3g} s by the bytes, {by_flops:.3g} s by the FLOP, at the peaks of '
      f'{device.source}',
      'largest      instructions by the bytes they move',
      *(f'             {total / 1e9:6,.2f} GB  {part}: {kind} {shape} {name}'
        for total, part, kind, shape, name in step.work['largest']),
  ]


def plan_on(config: Any, on: str, log: Say) -> CompiledStep:
  """Compile the step of a config for the devices `on`, and print what their compiler says.

  Where the step does not fit, changes are tried until it does. Raises UserError for unknown devices
  and for a compiler that is missing.
  """
  target = parse_target(on)
  compiler_version(target)  # that it is missing is said at once
  log(f'compiling the step for {target_name(target)}; this takes from half a minute to several')
  step = compile_step(config, target)
  assert step  # no program is known
  print('\n'.join(plan_lines(step, target)), flush=True)
  if not step.fits:
    log('looking for a change with which it fits; each is compiled')
    changes = find_changes(config, target, step, log)
    for text, changed in changes:
      print(f'it fits with {text}: {size_text(changed.peak)} of {size_text(changed.limit)}')
    if not changes:
      print('it fits with none of the changes that were tried; what is left is a smaller '
            '--config.batch, or another kind of device')
  return step

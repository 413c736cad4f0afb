"""What the compilers of an H100 and of a TPU v5e say of the training step: bytes, instructions, memory. No device is needed.

  python benchmarks/compiled.py --config cifar10_simclr_equimod --on h100 [--config.a.b=value ...]   one program
  python benchmarks/compiled.py --record [--only cifar10]                 the eight of PROGRAMS, into benchmarks/compiled.json
  python benchmarks/compiled.py --compare [--only cifar10]                the eight, beside that file; exits with 1 if worse
  python benchmarks/compiled.py --publish                                 that file into docs/scaling.md and the configs' Planned

It needs pip install -e ".[plan-gpu,plan-tpu]". Instructions in a loop count once for each round. A program that is still the
one of the file, for the same compiler, is not compiled again. `make test-all` compares (tests/benchmarks/test_compiled.py).
"""
import argparse
import json
import pathlib
import re
import sys
import textwrap

from equivariant_ssl.config import load_config
from equivariant_ssl.errors import UserError
from equivariant_ssl.parallel.accelerators import ACCELERATORS, parse_target
from equivariant_ssl.parallel.compilers import CompiledStep, compile_step
from equivariant_ssl.parallel.device_plan import find_changes, lower_bound
from equivariant_ssl.parallel.program_report import PARTS

ROOT = pathlib.Path(__file__).parents[1]
FILE = pathlib.Path(__file__).with_suffix('.json')
MARK = '<!-- written by benchmarks/compiled.py --publish -->'
SMALL, LARGE = ('h100:1', 'v5e:2x4'), ('h100:8', 'v5e:4x8')
PROGRAMS = {'cifar10_simclr_equimod': SMALL, 'cifar10_byol_equimod': SMALL, 'imagenet_simclr': LARGE,
            'imagenet_simclr_equimod': LARGE, 'imagenet_byol': LARGE, 'imagenet_byol_equimod': LARGE,
            'imagenet_barlow': LARGE, 'imagenet_simclr_vit_s': LARGE}
WORSE = .03  # of a figure; the compilers' own choices between two versions of a program differ by less
FIGURES = 'peak', 'moved', 'instructions'


def figures(step: CompiledStep) -> dict:
  """What is kept of a program: its bytes at the peak and moved, its instructions; of the last two each part, too."""
  work, target = step.work or {'bytes_moved': {}, 'instructions': {}}, parse_target(step.target)
  return {'peak': step.peak, 'limit': step.limit, 'fits': step.fits, 'moved': sum(work['bytes_moved'].values()),
          'instructions': sum(work['instructions'].values()),
          'moved_by_part': work['bytes_moved'], 'instructions_by_part': work['instructions'],
          'seconds': max(lower_bound(step, ACCELERATORS[target.kind])) if step.work else 0.,
          'parameters': step.parameters, 'steps': step.steps, 'flops': sum(step.flops.values()) * target.count,
          'program': step.program, 'compiler': step.compiler}


def worse(old: dict, new: dict) -> list[str]:
  """What is worse: figures that grew by more than WORSE, or a program that no longer fits; in words."""
  if old.get('fits', False) and not new.get('fits', True):
    return [f'it no longer fits: {new["peak"]:,} bytes']
  return [f'{name} {old[name]:,} -> {new[name]:,} ({new[name] / old[name] - 1:+.1%})' for name in FIGURES
          if old.get(name) and new[name] > (1 + WORSE) * old[name]]


def show(step: CompiledStep) -> None:
  """Print a program's figures, by part, and the instructions that move most."""
  f = figures(step)
  print(f'{step.target}: peak {f["peak"] / 2**30:.2f} GiB of {step.limit / 2**30:.2f}, moved {f["moved"] / 1e9:.2f} GB, '
        f'{f["instructions"]:,} instructions, {sum(step.flops.values()) / 1e12:.3g} TFLOP ({step.compiler})')
  for part in PARTS if step.work else ():
    print(f'  {part:17} {f["instructions_by_part"][part]:6,} instructions {f["moved_by_part"][part] / 1e9:9.2f} GB')
  for kind, (count, size) in (step.work or {'collectives': {}})['collectives'].items():
    print(f'  {kind:17} {count:6,}              {size / 1e9:9.3f} GB')
  for size, part, kind, shape, name in (step.work or {'largest': []})['largest']:
    print(f'  {size / 1e9:7.2f} GB {part}: {kind} {shape} {name}')


def table_rows(kept: dict) -> list[str]:
  """The rows of the table of docs/scaling.md: a config and devices, its peak, what it moves, its floor, what makes it fit."""
  rows = ['| config | devices | GiB at the peak, of | fits | instructions | GB moved | floor, s | fits with |', '|' + '---|' * 8]
  for name, on in programs(''):
    if not (f := kept.get(f'{name} on {on}')):
      continue
    known = [f'{f["instructions"]:,}', f'{f["moved"] / 1e9:,.1f}', f'{f["seconds"]:.3f}'] if f['moved'] else ['-'] * 3
    changes = '; '.join(f'`{text}`: {peak / 2**30:.1f}' for text, peak in f.get('fits_with', ()))
    rows.append(f'| `{name}` | `{on}` | {f["peak"] / 2**30:.1f} of {f["limit"] / 2**30:.1f} | {"yes" if f["fits"] else "**no**"} | '
                + ' | '.join(known) + f' | {changes} |')
  return rows


def planned(name: str, kept: dict) -> str:
  """What the docstring of a config says under Planned: its size, and its memory on each of its two kinds of devices."""
  figures_on = {on: kept[f'{name} on {on}'] for on in PROGRAMS[name] if f'{name} on {on}' in kept}
  if not figures_on:
    return ''
  parts = []
  for on, f in figures_on.items():
    target = parse_target(on)
    changes = ' or '.join(f'{text.removeprefix("--")} ({peak / 2**30:.1f})' for text, peak in f.get('fits_with', ()))
    fits = 'fits' if f['fits'] else 'does not fit' + (f', but with {changes}' if changes else '')
    parts.append(f'{f["peak"] / 2**30:.1f} GiB of {f["limit"] / 2**30:.1f} on each of {target.count} x '
                 f'{ACCELERATORS[target.kind].title}: {fits}')
  first = next(iter(figures_on.values()))
  return (f'{first["parameters"] / 1e6:.2f} million parameters, {first["flops"] / 1e12:.3g} TFLOP a step, '
          f'{first["flops"] * first["steps"] / 1e18:.3g} EFLOP in all. {"; ".join(parts)} (eqssl train --config {name} '
          f'--plan --on {" or ".join(figures_on)}; {"; ".join(f["compiler"] for f in figures_on.values())}).')


def publish(kept: dict) -> None:
  """Write the table of docs/scaling.md, and what the docstrings of the ImageNet configs say under Planned."""
  page = ROOT / 'docs' / 'scaling.md'
  text = page.read_text(encoding='utf-8')
  rows = '\n'.join(table_rows(kept))
  page.write_text(re.sub(rf'({MARK}\n).*?\n\n', lambda m: f'{m[1]}{rows}\n\n', text, flags=re.DOTALL), encoding='utf-8')
  for name in PROGRAMS:
    config, said = ROOT / 'configs' / f'{name}.py', planned(name, kept)
    if name.startswith('imagenet') and said:
      text = re.sub(r'^Planned: .*?(?=^Measured: )', '', config.read_text(encoding='utf-8'), flags=re.DOTALL | re.MULTILINE)
      lines = textwrap.fill(f'Planned:   {said}', 100, subsequent_indent=' ' * 11, break_on_hyphens=False)
      config.write_text(text.replace('\nMeasured: ', f'\n{lines}\nMeasured: ', 1), encoding='utf-8')


def recorded() -> dict:
  """The figures of benchmarks/compiled.json: {'CONFIG on DEVICES': figures}."""
  return json.loads(FILE.read_text(encoding='utf-8')) if FILE.is_file() else {}


def programs(only: str) -> list[tuple[str, str]]:
  """The (config, devices) of PROGRAMS whose name has `only` in it."""
  return [(name, on) for name, targets in PROGRAMS.items() for on in targets if only in f'{name} on {on}']


def compare(name: str, on: str, old: dict) -> list[str]:
  """What is worse in a program than in its recorded figures; an unchanged program is not compiled."""
  step = compile_step(load_config(name), parse_target(on), old.get('program', ''))
  return worse(old, figures(step)) if step else []


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0], allow_abbrev=False)
  parser.add_argument('--config', default='')
  parser.add_argument('--on', default='h100')
  parser.add_argument('--record', action='store_true')
  parser.add_argument('--compare', action='store_true')
  parser.add_argument('--publish', action='store_true')
  parser.add_argument('--only', default='')
  args, rest = parser.parse_known_args()
  overrides = dict(a.removeprefix('--config.').split('=', 1) for a in rest)
  try:
    if args.config:
      step = compile_step(load_config(args.config, overrides), parse_target(args.on))
      assert step  # no program is known
      show(step)
      return 0
    code, kept = 0, recorded()
    if args.publish:
      publish(kept)
      return 0
    for name, on in programs(args.only):
      key = f'{name} on {on}'
      old = kept.get(key, {})
      step = compile_step(load_config(name), parse_target(on), old.get('program', ''))
      if step is None:
        print(f'{key}: unchanged')
        continue
      print(key)
      show(step)
      for line in worse(old, figures(step)):
        print(f'  WORSE: {line}')
        code = 1 if args.compare else 0
      if args.record:
        new = figures(step)
        if not step.fits:
          changes = find_changes(load_config(name), parse_target(on), step, print)
          new['fits_with'] = [(text, changed.peak) for text, changed in changes]
        kept = recorded() | {key: new}  # another --record may have written since
        FILE.write_text(json.dumps(kept, indent=1) + '\n', encoding='utf-8')
    return code
  except UserError as error:
    print(error, file=sys.stderr)
    return error.code


if __name__ == '__main__':
  sys.exit(main())

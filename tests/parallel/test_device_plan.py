"""`eqssl train --plan --on`: names of devices, programs read from their text, changes that make a step fit. No compiler runs."""
import importlib.metadata
import pathlib
import subprocess
import tempfile

import pytest

from equivariant_ssl import cli
from equivariant_ssl.config import load_config
from equivariant_ssl.errors import UserError
from equivariant_ssl.parallel import compilers, device_plan, launch
from equivariant_ssl.parallel.accelerators import (
    ACCELERATORS,
    PlannedDevices,
    gpu_description,
    larger_targets,
    parse_target,
    target_name,
)
from equivariant_ssl.parallel.compilers import CompiledStep, compile_step
from equivariant_ssl.parallel.program_report import PARTS, part_of, read_program
from equivariant_ssl.parallel.program_text import array_bytes

PROGRAMS = pathlib.Path(__file__).parents[1] / 'fixtures' / 'programs'


@pytest.mark.parametrize(('text', 'target', 'name'), [
    ('h100', PlannedDevices('h100', '1x1x1', 1), 'h100:1'), ('H100:8', PlannedDevices('h100', '1x1x8', 8), 'h100:8'),
    ('a100:4', PlannedDevices('a100', '1x1x4', 4), 'a100:4'), ('h200:16', PlannedDevices('h200', '1x2x8', 16), 'h200:16'),
    ('h100:4x4', PlannedDevices('h100', '1x4x4', 16), 'h100:4x4'), ('a100:12', PlannedDevices('a100', '1x2x6', 12), 'a100:12'),
    ('v5e', PlannedDevices('v5e', '1x1', 1), 'v5e:1x1'), ('v5e:4x8', PlannedDevices('v5e', '4x8', 32), 'v5e:4x8'),
    ('v5e:32', PlannedDevices('v5e', '4x8', 32), 'v5e:4x8'), ('v6e:2x4', PlannedDevices('v6e', '2x4', 8), 'v6e:2x4'),
    ('v5p:2x2x1', PlannedDevices('v5p', '2x2x1', 4), 'v5p:2x2x1'), ('v5litepod-8', PlannedDevices('v5e', '2x4', 8), 'v5e:2x4'),
    ('v4-32', PlannedDevices('v4', '2x2x4', 16), 'v4:2x2x4'), ('nvidia-tesla-a100:2x8', PlannedDevices('a100-40', '1x2x8', 16), 'a100-40:16')])
def test_names_of_devices(text, target, name):
  assert parse_target(text) == target and target_name(target) == name
  assert parse_target(name) == target


@pytest.mark.parametrize(('text', 'cause'), [
    ('p100', "--on has no 'p100'"), ('h100:0', 'no number of devices'), ('h100:many', 'no number of devices'),
    ('h100:', None), ('h100:2x16', 'at most 8'), ('v5e:3', 'no slice of v5e has 3 chips'), ('v5p:2x2', 'has 3 axes'),
    ('v5e:2x2x1', 'has 2 axes')])
def test_devices_that_there_are_not(text, cause):
  if cause is None:
    assert parse_target(text).count == 1
    return
  with pytest.raises(UserError, match=cause) as error:
    parse_target(text)
  assert '\n' in str(error.value)  # a line that says what to type


def test_more_devices_of_a_kind():
  assert [t.topology for t in larger_targets(parse_target('v5e:2x4'), 32)] == ['4x4', '4x8']
  assert [t.topology for t in larger_targets(parse_target('h100:8'), 32)] == ['1x2x8', '1x4x8']


def test_what_is_published_is_in_order():
  """By its peaks no device multiplies float32 faster than bfloat16, and none has its memory in other units than bytes."""
  for name, device in ACCELERATORS.items():
    assert device.peaks['bfloat16'] >= device.peaks['float32'] > device.peaks['highest'] > 1e13, name
    assert 15 * 2**30 < device.memory < 300 * 2**30 and 5e11 < device.bandwidth < 1e13, name
  assert 'core_count: 132' in gpu_description('h100') and 'major: 8' in gpu_description('a100')


@pytest.mark.parametrize(('shape', 'size'), [
    ('f32[3,4]{1,0}', 48), ('bf16[]', 2), ('(f32[2]{0}, s8[5]{0})', 13), ('pred[7]{0}', 7), ('token[]', 0),
    ('bf16[100,3]{1,0:T(8,128)(2,1)}', 2 * 104 * 128),      # rows to eights, columns to 128
    ('bf16[100,3]{0,1:T(4,128)(2,1)}', 2 * 128 * 4),        # the other axis is the minor one
    ('f32[64]{0:T(128)}', 4 * 128), ('f32[64]{0:T(128)S(1)}', 0), ('(f32[64]{0:T(128)S(1)}, s32[]{:S(2)})', 0)])
def test_bytes_of_an_array(shape, size):
  assert array_bytes(shape) == size


def test_a_gpus_program():
  work = read_program((PROGRAMS / 'gpu.txt').read_text(encoding='utf-8'))
  weights, rows, layer = 3 * 128 * 128 * 4, 32 * 128 * 4, 128 * 128 * 4
  # Three rounds: a layer's weights taken out and written, their product, the rows written into a larger array.
  one_round = (2 * layer + 4) + (2 * rows + layer) + (2 * rows + 4)
  assert work.bytes_moved == {'augmentation': 2 * rows, 'forward': 3 * one_round, 'backward': 4 * weights,
                        'heads and losses': 2 * rows, 'optimizer': 3 * weights, 'other': 2 * rows}
  assert work.instructions == {'augmentation': 1, 'forward': 9, 'backward': 2, 'heads and losses': 1, 'optimizer': 1,
                               'other': 1}
  assert work.collectives == {'all-reduce': (1, weights)}
  assert work.largest[0] == [3 * weights, 'optimizer', 'fusion', 'f32[3,128,128]', 'jit(step)/optimizer/sub']


def test_a_tpus_program():
  """What lies on the chip moves nothing in the memory; arrays there are in whole tiles."""
  work = read_program((PROGRAMS / 'tpu.txt').read_text(encoding='utf-8'))
  copied, part, x = 128 * 8 * 2 * 4, 128 * 4 * 2 * 4, 104 * 128 * 2
  assert work.bytes_moved == dict.fromkeys(PARTS, 0) | {'augmentation': part, 'backward': x, 'other': copied}
  assert sum(work.instructions.values()) == 4 and work.instructions['backward'] == 1


@pytest.mark.parametrize(('name', 'part'), [
    ('jit(step)/augmentation/vmap(vmap())/mul', 'augmentation'), ('jit(step)/jvp(encoder_pass)/conv1/add', 'forward'),
    ('jit(step)/encoder_pass/conv1/transpose', 'forward'), ('jit(step)/transpose(jvp(encoder_pass))/conv1/add', 'backward'),
    ('jit(step)/jvp(Network.outputs)/projector/dot_general', 'heads and losses'),
    ('jit(step)/transpose(jvp())/neg', 'heads and losses'), ('jit(step)/optimizer/jit(norm)/sqrt', 'optimizer'),
    ("state.params['encoder']['conv1']", 'other'), ('', 'other')])
def test_parts_of_a_step(name, part):
  assert part_of(name) == part


def step_of(peak: int, limit: int = 80, **fields) -> CompiledStep:
  """What a compiler would say, in bytes that are small numbers."""
  values = dict(target='h100:8', compiler='', fits=peak <= limit, limit=limit, peak=peak, weights=4, optimizer=8, batch=2,
                data=0, temporaries=peak - 14, flops={'bfloat16': 2e12}, images=64, views=3, parameters=1, steps=10,
                steps_per_epoch=5, program='', work=None)
  return CompiledStep(**{**values, **fields})


def test_the_smallest_changes_with_which_a_step_fits():
  """remat does not help here, two parts are hopeless, four fit; of more devices, 16 are too few."""
  tried, said = [], []

  def compile_(config, target):
    tried.append((config.encoder.remat, config.accumulate, target.count))
    return step_of(200 if config.encoder.remat else 14 + 240 // (config.accumulate * target.count // 8))
  config = load_config('smoke', {'batch': '64'})
  changes = device_plan.find_changes(config, parse_target('h100:8'), step_of(254), said.append, compile_)
  assert [text for text, _ in changes] == ['--config.accumulate=4', '--on h100:32']
  assert tried == [(True, 1, 8), (False, 4, 8), (False, 1, 32)] and 'does not fit' in said[0]


def test_shards_are_tried_where_they_may_suffice():
  of = lambda peak: [*device_plan.config_changes(load_config('smoke', {'batch': '64'}), step_of(peak), 8)]
  assert of(90)[0] == {'sharding': 'fsdp'} and {'sharding': 'fsdp'} not in of(92)
  assert of(92)[0] == {'encoder.remat': 'True'} and {'accumulate': '2'} in of(92)


def test_what_does_not_suit_groups_of_batchnorm_is_not_tried():
  """48 groups of 4 images: with four parts there would be 16 images for 48 groups; 32 devices hold no whole groups."""
  config = load_config('smoke', {'batch': '192', 'batchnorm_groups': '48'})
  assert [*device_plan.config_changes(config, step_of(92), 8)] == [{'encoder.remat': 'True'}, {'accumulate': '2'}]
  changes = device_plan.find_changes(config, parse_target('h100:8'), step_of(92), print,
                                     lambda config, target: step_of(90 if target.count < 64 else 10))
  assert changes == []


def test_a_plan_in_words():
  moved = dict.fromkeys(PARTS, 0) | {'backward': 67 * 10**9}
  work = {'instructions': dict.fromkeys(PARTS, 7), 'bytes_moved': moved, 'collectives': {'all-reduce': [2, 2**20]},
          'largest': [[1000_000_000, 'backward', 'fusion', 'f32[3]', 'relu']]}
  lines = device_plan.plan_lines(step_of(50 * 2**30, 71 * 2**30, work=work), parse_target('h100:8'))
  text = '\n'.join(lines)
  assert 'fits         yes: 50.00 GiB at the peak, of 71.00 GiB a device (0.9 of its memory)' in text
  assert 'no faster    than 0.02 s a step, a floor (caches aside): 0.02 s by the bytes, 0.00202 s by the FLOP' in text
  assert '42 a step, which move 67.00 GB' in text and '2 all-reduce, together 1.0 MiB' in text
  refused = '\n'.join(device_plan.plan_lines(step_of(90), parse_target('v5e:2x4')))
  assert 'fits         NO' in refused and 'refused' in refused and 'faster' not in refused


@pytest.mark.parametrize(('on', 'wheel', 'extra'), [('h100:8', 'jax-cuda13-plugin', 'plan-gpu'),
                                                    ('v5e:2x4', 'libtpu', 'plan-tpu')])
def test_a_compiler_that_is_missing_is_said_with_the_line_to_type(on, wheel, extra, capsys, monkeypatch):
  monkeypatch.setattr(compilers, 'is_installed', lambda module: False)
  assert cli.main(['train', '--config', 'smoke', '--plan', '--on', on]) == 2
  captured = capsys.readouterr()
  assert not captured.out and captured.err.count('\n') == 2
  assert f'(the wheel {wheel})' in captured.err and f'pip install -e ".[{extra}]"' in captured.err


def test_a_compiler_of_another_version_of_jax(capsys, monkeypatch):
  monkeypatch.setattr(compilers, 'is_installed', lambda module: True)
  monkeypatch.setattr(importlib.metadata, 'version', lambda name: {'jax': '0.10.2'}.get(name, '0.9.0'))
  assert cli.main(['train', '--config', 'smoke', '--plan', '--on', 'h100']) == 2
  assert 'jax-cuda13-plugin 0.9.0 is not for jax 0.10.2' in capsys.readouterr().err
  assert compilers.compiler_version(parse_target('v5e')) == 'jax 0.10.2, libtpu 0.9.0'


@pytest.mark.parametrize(('code', 'cause'), [(-9, 'was killed'), (1, 'ended with 1: XlaRuntimeError: INTERNAL')])
def test_a_compiler_that_ends_without_an_answer(code, cause, capsys, monkeypatch, tmp_path):
  """Its last line is said, and the file with all that it printed."""
  def end(argv, **kw):
    return subprocess.CompletedProcess(argv, code, 'chatter\nXlaRuntimeError: INTERNAL\n\n')
  monkeypatch.setattr(compilers, 'compiler_version', lambda target: 'any')
  monkeypatch.setattr(device_plan, 'compiler_version', lambda target: 'any')
  monkeypatch.setattr(subprocess, 'run', end)
  monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path))
  assert cli.main(['train', '--config', 'smoke', '--plan', '--on', 'h100']) == (1 if code == 1 else 2)
  captured = capsys.readouterr()
  assert cause in captured.err and 'chatter' not in captured.err and not captured.out
  assert [f.read_text().split()[0] for f in tmp_path.iterdir()] == ['chatter'] * (code == 1)


@pytest.mark.parametrize(('arguments', 'cause'), [
    (['--on', 'h100'], '--on is only for --plan'), (['--plan', '--on', 'h100', '--devices', '4'], 'name the devices twice'),
    (['--plan', '--on', 'p100'], "--on has no 'p100'")])
def test_options_that_do_not_go_together(arguments, cause, capsys):
  assert cli.main(['train', '--config', 'smoke', *arguments]) == 2
  assert cause in capsys.readouterr().err


@pytest.mark.parametrize(('where', 'settings', 'on'), [
    ('slurm', {'template': 'h100', 'nodes': '2'}, 'h100:2x8'), ('slurm', {'template': 'a100'}, 'a100:1x8'),
    ('slurm', {'template': 'h100', 'gres': 'gpu:h100:4'}, 'h100:1x4'), ('tpu', {}, 'v4-32'),
    ('tpu', {'type': 'v5litepod-32'}, 'v5litepod-32'), ('gke', {'nodes': '4'}, 'nvidia-tesla-a100:4x8'),
    ('gke', {'accelerator': 'nvidia-h100-80gb'}, 'nvidia-h100-80gb:1x8')])
def test_launch_plans_for_the_devices_it_submits_to(where, settings, on, monkeypatch, capsys):
  asked = []
  monkeypatch.setattr(launch, 'plan_on', lambda config, on, log: asked.append((config.batch, on)))
  argv = ['launch', where, '--config', 'smoke', '--plan', '--set', *(f'{k}={v}' for k, v in settings.items())]
  assert cli.main(argv if settings else argv[:-1]) == 0, capsys.readouterr().err
  assert asked == [(16, on)] and parse_target(on).count


def test_launch_says_where_it_does_not_know_the_devices(capsys):
  for template in ('train', 'v100'):
    assert cli.main(['launch', 'slurm', '--config', 'smoke', '--plan', '--set', f'template={template}']) == 2
    assert '--plan --on' in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize('on', ['h100:2', 'a100', 'v5e:2x2', 'v6e', 'v4:2x2x1'])
def test_the_compilers_themselves(on, capfd, monkeypatch):
  """What a compiler prints does not reach the user."""
  monkeypatch.delenv('XLA_FLAGS')  # the suite's, which are for the CPU
  config = load_config('smoke')
  try:
    step = compile_step(config, parse_target(on))
  except UserError as error:
    pytest.skip(str(error).replace('\n', ' '))
  assert step and step.fits and 0 < step.weights < step.peak < step.limit
  assert step.data == 1000 * (16 * 16 * 3 + 8)  # the digits, with their heights and widths
  assert all(step.work['instructions'][part] for part in PARTS[:5])
  moved = [step.work['bytes_moved'][part] for part in PARTS[:5]]
  assert all(moved) or on.startswith('v') and any(moved)  # what so small a step keeps on a TPU's chip moves nothing
  assert bool(step.work['collectives']) == (parse_target(on).count > 1)
  assert compile_step(config, parse_target(on), step.program) is None  # it is known: not compiled again
  captured = capfd.readouterr()
  assert not captured.out and not captured.err

"""The accelerators that a step can be planned for: their names, and what is published of them."""
import math
import re
from typing import NamedTuple

from equivariant_ssl.errors import UserError
from equivariant_ssl.registry import unknown_name

GPU_HOST = 8  # the most GPUs of one host, which NVLink joins
# Slices of TPUs that Google Cloud offers, by the number of their chips.
FLAT = {1: '1x1', 4: '2x2', 8: '2x4', 16: '4x4', 32: '4x8', 64: '8x8', 128: '8x16', 256: '16x16'}
DEEP = {4: '2x2x1', 8: '2x2x2', 16: '2x2x4', 32: '2x4x4', 64: '4x4x4', 128: '4x4x8', 256: '4x8x8',
        512: '8x8x8'}
EXAMPLE = 'e.g. --on h100:8, --on a100:4 or --on v5e:4x8'


class Gpu(NamedTuple):
  """What XLA's compiler asks of an NVIDIA GPU.

  capability:  (major, minor) of its compute capability.
  cores:       streaming multiprocessors; lanes: float32 units of each.
  shared, shared_block: bytes of shared memory of a multiprocessor, and of one block at most.
  cache:       bytes of the L2 cache.
  clock:       GHz.
  """
  capability: tuple[int, int]
  cores: int
  lanes: int
  shared: int
  shared_block: int
  cache: int
  clock: float


class Accelerator(NamedTuple):
  """What is published of one device. For TPUs a device is a chip, with all its cores.

  title:     its name in words.
  memory:    bytes.
  bandwidth: bytes a second between the memory and the chip.
  peaks:     FLOP a second of products of bfloat16, of float32 at the default precision (TF32, or
             one pass of bfloat16), and of float32 at precision 'highest', without sparsity.
  usable:    the share of the memory that a program may have.
  source:    who published these numbers.
  gpu:       what the compiler of GPUs asks besides; None for a TPU.
  slices:    {chips: topology} of a TPU.
  """
  title: str
  memory: int
  bandwidth: float
  peaks: dict[str, float]
  usable: float
  source: str
  gpu: Gpu | None = None
  slices: dict[int, str] = {}


class PlannedDevices(NamedTuple):
  """The devices that a step is planned for.

  kind:     a key of ACCELERATORS.
  topology: of a TPU, the chips along each axis, '4x8'; of GPUs, slices x hosts x GPUs of a host.
  count:    the number of devices.
  """
  kind: str
  topology: str
  count: int


def _peaks(bfloat16: float, float32: float, highest: float) -> dict[str, float]:
  """The peaks of a device, from TFLOP a second."""
  return {'bfloat16': bfloat16 * 1e12, 'float32': float32 * 1e12, 'highest': highest * 1e12}


def _tpu(name: str, gib: int, gigabytes: float, tflops: float, slices: dict[int, str]
         ) -> Accelerator:
  """A TPU. A float32 product at 'highest' is six passes of bfloat16 (jax.lax.Precision)."""
  return Accelerator(f'TPU {name}', gib * 2 ** 30, gigabytes * 1e9,
                     _peaks(tflops, tflops, tflops / 6), 1.,
                     f'cloud.google.com/tpu/docs/{name}', slices=slices)


def _gpu(title: str, memory: int, bandwidth: float, peaks: dict[str, float], source: str,
         gpu: Gpu) -> Accelerator:
  """An NVIDIA GPU, of whose memory eqssl lets jax have .9 (cli.py)."""
  return Accelerator(title, memory, bandwidth, peaks, .9, source, gpu)


_AMPERE = Gpu((8, 0), 108, 64, 167936, 166912, 41943040, 1.41)
_HOPPER = Gpu((9, 0), 132, 128, 233472, 232448, 52428800, 1.98)
_BLACKWELL = Gpu((10, 0), 148, 128, 233472, 232448, 132644864, 1.965)
ACCELERATORS = {
    'a100': _gpu('NVIDIA A100 SXM 80 GB', 85100068864, 2.039e12, _peaks(312., 156., 19.5),
                 'NVIDIA A100 architecture whitepaper', _AMPERE),
    'a100-40': _gpu('NVIDIA A100 SXM 40 GB', 42331013120, 1.5552e12, _peaks(312., 156., 19.5),
                    'NVIDIA A100 architecture whitepaper', _AMPERE),
    'h100': _gpu('NVIDIA H100 SXM 80 GB', 84942979072, 3.3523e12, _peaks(989.4, 494.7, 66.9),
                 'NVIDIA H100 architecture whitepaper', _HOPPER),
    'h200': _gpu('NVIDIA H200 SXM 141 GB', 151397597184, 4.8e12, _peaks(989.4, 494.7, 66.9),
                 'NVIDIA H200 datasheet', _HOPPER),
    'b200': _gpu('NVIDIA B200 180 GB', 191514411008, 8e12, _peaks(2250., 1125., 75.),
                 'NVIDIA HGX B200 datasheet', _BLACKWELL),
    'v4': _tpu('v4', 32, 1228., 275., DEEP),
    'v5e': _tpu('v5e', 16, 819., 197., FLAT),
    'v5p': _tpu('v5p', 95, 2765., 459., DEEP),
    'v6e': _tpu('v6e', 32, 1640., 918., FLAT),
}
# Names that clouds use. In the types of Cloud TPU, v4-32 and v5p-32 count cores, two of a chip.
ALIASES = {'v5litepod': 'v5e', 'v5lite': 'v5e', 'trillium': 'v6e', 'a100-80': 'a100',
           'nvidia-tesla-a100': 'a100-40', 'nvidia-a100-80gb': 'a100', 'nvidia-h100-80gb': 'h100',
           'nvidia-h100-mega-80gb': 'h100', 'nvidia-h200-141gb': 'h200', 'nvidia-b200': 'b200'}


def parse_target(text: str) -> PlannedDevices:
  """Return the devices that `text` names: 'h100:8', 'h200', 'v5e:4x8', 'v5e:32', 'v4-32'.

  GPUs are counted, or given as hosts x GPUs of each. Raises UserError for a name that is not known
  and for a number of devices that does not exist.
  """
  name, sign, size = text.strip().lower().partition(':')
  cloud_type = re.fullmatch(r'(v\d\w*)-(\d+)', name)
  if cloud_type and not sign:  # of Cloud TPU
    name, size = cloud_type.groups()
    if name in ('v4', 'v5p'):
      size = str(int(size) // 2)
  kind = ALIASES.get(name, name)
  if kind not in ACCELERATORS:
    raise unknown_name('--on', name, ACCELERATORS)
  if not re.fullmatch(r'[1-9]\d*(x[1-9]\d*)*', size or '1'):
    raise UserError(f'--on {text}: {size!r} is no number of devices.', EXAMPLE)
  sides = [int(n) for n in size.split('x')] if size else []
  return (_gpu_target if ACCELERATORS[kind].gpu else _tpu_target)(text, kind, sides)


def _gpu_target(text: str, kind: str, sides: list[int]) -> PlannedDevices:
  """Return the target of GPUs: their number, or hosts x GPUs of a host."""
  if len(sides) > 2 or len(sides) == 2 and sides[1] > GPU_HOST:
    raise UserError(f'--on {text}: GPUs are given by their number, or as hosts x GPUs of a host '
                    f'(at most {GPU_HOST}).', EXAMPLE)
  count = math.prod(sides)
  of_host = sides[1] if len(sides) == 2 else max(
      n for n in range(1, GPU_HOST + 1) if count % n == 0)
  return PlannedDevices(kind, f'1x{count // of_host}x{of_host}', count)


def _tpu_target(text: str, kind: str, sides: list[int]) -> PlannedDevices:
  """Return the target of a TPU slice: its topology, or the number of its chips."""
  slices = ACCELERATORS[kind].slices
  if not sides:
    sides = [min(slices)]
  if len(sides) == 1:
    if sides[0] not in slices:
      raise UserError(f'--on {text}: no slice of {kind} has {sides[0]} chips.',
                      f'One of: {", ".join(f"{kind}:{n}" for n in slices)}; or give its topology, '
                      f'e.g. --on {kind}:{slices[8]}')
    return PlannedDevices(kind, slices[sides[0]], sides[0])
  axes = slices[8].count('x') + 1
  if len(sides) != axes:
    raise UserError(f'--on {text}: a slice of {kind} has {axes} axes.',
                    f'e.g. --on {kind}:{slices[8]}')
  return PlannedDevices(kind, 'x'.join(map(str, sides)), math.prod(sides))


def larger_targets(target: PlannedDevices, most: int = 256) -> list[PlannedDevices]:
  """Return targets of the same kind with more devices, up to `most`, the fewest first."""
  slices = ACCELERATORS[target.kind].slices
  if slices:
    return [PlannedDevices(target.kind, s, n) for n, s in slices.items()
            if target.count < n <= most]
  doubled = [target.count * 2 ** n for n in range(1, 9)]
  return [parse_target(f'{target.kind}:{n}') for n in doubled if n <= most]


def target_name(target: PlannedDevices) -> str:
  """Return the name of a target, as `--on` takes it."""
  if ACCELERATORS[target.kind].slices:
    return f'{target.kind}:{target.topology}'
  name = f'{target.kind}:{target.count}'
  hosts_and_gpus = target.topology.removeprefix('1x')
  return name if parse_target(name) == target else f'{target.kind}:{hosts_and_gpus}'


def gpu_description(kind: str) -> str:
  """Return the description of a GPU that XLA's compiler reads: a GpuTargetConfigProto as text."""
  device = ACCELERATORS[kind]
  assert device.gpu
  gpu = device.gpu
  major, minor = gpu.capability
  return f'''
    gpu_device_info {{
      threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
      shared_memory_per_block: 49152 shared_memory_per_core: {gpu.shared}
      shared_memory_per_block_optin: {gpu.shared_block}
      registers_per_core_limit: 65536 registers_per_block_limit: 65536
      block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
      core_count: {gpu.cores} fpus_per_core: {gpu.lanes} clock_rate_ghz: {gpu.clock}
      l2_cache_size: {gpu.cache} memory_bandwidth: {round(device.bandwidth)}
      device_memory_size: {device.memory}
      cuda_compute_capability {{ major: {major} minor: {minor} }}
    }}
    platform_name: "CUDA"
    dnn_version_info {{ major: 9 minor: 10 }}
    runtime_version {{ major: 12 minor: 8 patch: 0 }}
    device_description_str: "{device.title}"'''

"""How large a lease's work is: the official size, and about a hundredth of it to rehearse on a CPU. It imports no other
module."""
import re
from typing import NamedTuple

FOUNDING = ('cifar10_simclr', 'cifar10_simclr_equimod')  # arms, in the order of their training
SPEEDS = (*FOUNDING, 'cifar10_byol')
# Of imagenet_simclr_equimod, at one device's share of eight.
IMAGENET = {'at 224': {'batch': '512'}, 'at 224, remat': {'batch': '512', 'encoder.remat': 'True'}}
LEAST = 60  # epochs that the experiment should have; warm-up is 10 of them
MOST = 800  # as published
# XLA flags that are tried in turn; the empty word turns command buffers off, a smallest graph of 1 makes all into one.
FLAGS = {
    'no command buffers': '--xla_gpu_enable_command_buffer=',
    'all into command buffers': '--xla_gpu_graph_min_graph_size=1',
    'cuDNN convolution fusions': '--xla_gpu_experimental_enable_conv_fusion=true',
    'no Triton products': '--xla_gpu_enable_triton_gemm=false',
    'cuDNN product fusions': '--xla_gpu_cudnn_gemm_fusion_level=2',
    'latency hiding': '--xla_gpu_enable_latency_hiding_scheduler=true',
}


class Arm(NamedTuple):
  """A network to train. config, changes: its config, and the changes of it. label: the name of its files."""
  label: str
  config: str
  changed: dict[str, str]


def arm(text: str) -> Arm:
  """The Arm of 'CONFIG;field=value;...'; ValueError where a change is not one."""
  config, *changes = text.split(';')
  changed = dict(c.strip().split('=', 1) for c in changes if c.strip())
  return Arm(re.sub(r'[^\w.-]+', '_', text).strip('_'), config, changed)


class Size(NamedTuple):
  """How large the work is.

  records: the number of images that are taken from each of CIFAR-10's six files.
  overrides: the overrides of every config; heads: those of a config whose name ends so.
  seconds: the seconds of each timing.
  agree: the number of images of the step that is compared with the CPU's.
  batch, width, dtype: those of the comparison with PyTorch. workers: how many workers augment for it.
  accelerator: whether there must be an accelerator.
  patience: the factor on a part's limit, which is meant for the device.
  """
  records: int
  overrides: dict[str, str]
  heads: dict[str, dict[str, str]]
  seconds: float
  agree: int
  batch: int
  width: int
  dtype: str
  workers: int
  accelerator: bool
  patience: float


_HEAD = "{'hidden': (64,), 'out': 32}"
SIZES = {
    'official': Size(10_000, {}, {}, 6., 64, 512, 64, 'bfloat16', 16, True, 1.),
    'rehearsal': Size(
        100, {'encoder.depth': '10', 'encoder.width': '8', 'batch': '64', 'dtype': 'float32', 'log_every': '7',
              'invariance.projector': _HEAD},
        {'equimod': {'equivariance.hidden': '(64,)', 'equivariance.dim': '32', 'equivariance.action_dim': '32'},
         'byol': {'invariance.predictor': _HEAD}},
        1., 4, 16, 4, 'float32', 2, False, 4.),
    # The suite's: as little as still goes through every line.
    'test': Size(
        20, {'encoder.depth': '10', 'encoder.width': '4', 'batch': '16', 'dtype': 'float32', 'log_every': '6',
             'invariance.projector': "{'hidden': (16,), 'out': 8}"},
        {'equimod': {'equivariance.hidden': '(16,)', 'equivariance.dim': '8', 'equivariance.action_dim': '8'},
         'byol': {'invariance.predictor': "{'hidden': (16,), 'out': 8}"}},
        .2, 2, 8, 4, 'float32', 1, False, 2.),
}


def overrides(size: Size, config: str, more: dict[str, str] | None = None) -> dict[str, str]:
  """The overrides of the config named `config` at this size, together with `more`."""
  own = [fields for end, fields in size.heads.items() if config.endswith(end)]
  return {**size.overrides, **{k: v for fields in own for k, v in fields.items()}, **(more or {})}

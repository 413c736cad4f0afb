"""SimCLR, or SimCLR + EquiMod, on CIFAR-10 within the budget of a laptop: a small ResNet for a few
epochs.

Command:   eqssl data prepare cifar10
           eqssl train --config cifar10_quick --workdir runs/quick
           eqssl train --config cifar10_quick --workdir runs/quick_equimod --config.equivariance=equimod
           eqssl eval runs/quick_equimod
Published: nothing at this size; the published experiment is cifar10_simclr_equimod.
Measured:  docs/results.md, section "CIFAR-10 on two CPU cores".
"""
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  return ConfigDict({
      'seed': 0,
      'size': 32,
      'batch': 256,
      'epochs': 4.,
      'data': {'name': 'cifar10'},
      'encoder': {'name': 'resnet', 'depth': 10, 'stem': 'half', 'width': 16, 'zero_init': False},
      'augment': {
          'order': ('crop', 'flip', 'jitter', 'gray'),
          'crop': {'role': 'both', 'scale': (.2, 1.), 'method': 'bicubic'},
          'flip': {'role': 'both', 'p': .5},
          'jitter': {'role': 'both', 'p': .8, 'brightness': .4, 'contrast': .4, 'saturation': .4, 'hue': .1},
          'gray': {'role': 'both', 'p': .2},
      },
      'invariance': {'name': 'simclr', 'temperature': .2, 'projector': {'hidden': (256,), 'out': 64}},
      'equivariance': {'name': 'none'},
      'optimizer': {'name': 'adamw', 'lr': 2e-3, 'weight_decay': 1e-4, 'warmup_epochs': .5},
      'log_every': 20,
  })

"""SimSiam + EquiMod on CIFAR-10: cifar10_simsiam with EquiMod's official head.

Command:   eqssl data prepare cifar10
           eqssl train --config cifar10_simsiam_equimod --workdir runs/c10_simsiam_equimod
           eqssl eval runs/c10_simsiam_equimod --protocol equimod
Published: nothing that we could read; EquiMod's code has SimCLR and BYOL only.
Measured:  docs/results.md, once a GPU has run it; benchmarks/gpu/README.md lists the runs that are
           owed.
Differs:   BatchNorm takes its statistics over all three views at once, as in EquiMod's code. The
           baseline to compare with is therefore cifar10_simsiam with --config.batchnorm=joint.
           Otherwise this config differs as cifar10_simsiam does.
"""
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  return ConfigDict({
      'seed': 0,
      'size': 32,
      'batch': 512,
      'epochs': 800.,
      'dtype': 'bfloat16',
      'data': {'name': 'cifar10'},
      'mean': (.4914, .4822, .4465),
      'std': (.2023, .1994, .2010),
      'encoder': {'name': 'resnet', 'depth': 18, 'stem': 'cifar', 'width': 64, 'zero_init': False},
      'augment': {
          'order': ('crop', 'flip', 'jitter', 'gray'),
          'crop': {'role': 'both', 'scale': (.2, 1.), 'method': 'bilinear'},
          'flip': {'role': 'both', 'p': .5},
          'jitter': {'role': 'both', 'p': .8, 'brightness': .4, 'contrast': .4, 'saturation': .4, 'hue': .1},
          'gray': {'role': 'both', 'p': .2},
      },
      'invariance': {'name': 'simsiam', 'projector': {'hidden': (2048,), 'out': 2048}},
      'equivariance': {'name': 'equimod', 'weight': 1., 'temperature': .2},
      # .03 x 512 / 256
      'optimizer': {'name': 'sgd', 'lr': .06, 'weight_decay': 5e-4, 'momentum': .9, 'decay_all': True,
                    'warmup_epochs': 10.},
      'log_every': 97,
  })

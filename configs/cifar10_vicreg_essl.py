"""VICReg + E-SSL on CIFAR-10: cifar10_vicreg, and E-SSL's small crop in all four quarter turns.

Command:   eqssl data prepare cifar10
           eqssl train --config cifar10_vicreg_essl --workdir runs/c10_vicreg_essl
           eqssl eval runs/c10_vicreg_essl --protocol essl --seeds 0,1,2,3,4
Published: nothing that we could read; E-SSL's CIFAR-10 code has SimCLR and SimSiam only. We chose
           the weight.
Measured:  docs/results.md, once a GPU has run it; benchmarks/gpu/README.md lists the runs that are
           owed.
Differs:   as cifar10_vicreg does. The evaluation of cifar10_vicreg is EquiMod's protocol, and this
           one is E-SSL's.
"""
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  return ConfigDict({
      'seed': 0,
      'size': 32,
      'batch': 256,
      'epochs': 1000.,
      'dtype': 'bfloat16',
      'batchnorm': 'view',
      'data': {'name': 'cifar10'},
      'mean': (.4914, .4822, .4465),
      'std': (.2470, .2435, .2616),
      'encoder': {'name': 'resnet', 'depth': 18, 'stem': 'solo', 'width': 64, 'zero_init': False, 'init': 'stem'},
      'augment': {
          'order': ('crop', 'flip', 'jitter', 'gray', 'solarize', 'rotate'),
          'crop': {'role': 'invariant', 'scale': (.2, 1.), 'method': 'bicubic'},
          'flip': {'role': 'invariant', 'p': .5},
          'jitter': {'role': 'invariant', 'p': .8, 'brightness': .4, 'contrast': .4, 'saturation': .2, 'hue': .1},
          'gray': {'role': 'invariant', 'p': .2},
          'solarize': {'role': 'invariant', 'p': .1},
          'rotate': {'role': 'sensitive'},
      },
      'invariance': {'name': 'vicreg', 'similarity': 25., 'std': 50., 'cov': 1.,  # std: see cifar10_vicreg
                     'projector': {'hidden': (2048, 2048), 'out': 2048, 'bias': True, 'last_bias': True}},
      'equivariance': {'name': 'essl', 'weight': 1.},
      'optimizer': {'name': 'lars', 'lr': .3, 'weight_decay': 1e-4, 'momentum': .9, 'trust': .02, 'lr_outside': True,
                    'clip': True, 'warmup_epochs': 10.},
      'log_every': 195,
  })

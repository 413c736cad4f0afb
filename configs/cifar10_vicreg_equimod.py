"""VICReg + EquiMod on CIFAR-10: cifar10_vicreg with EquiMod's official head.

Command:   eqssl data prepare cifar10
           eqssl train --config cifar10_vicreg_equimod --workdir runs/c10_vicreg_equimod
           eqssl eval runs/c10_vicreg_equimod --protocol equimod
Published: nothing that we could read; EquiMod's code has SimCLR and BYOL only.
Measured:  docs/results.md, once a GPU has run it; benchmarks/gpu/README.md lists the runs that are
           owed.
Differs:   BatchNorm takes its statistics over all three views at once, as in EquiMod's code. The
           baseline to compare with is therefore cifar10_vicreg with --config.batchnorm=joint.
           Otherwise this config differs as cifar10_vicreg does.
"""
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  return ConfigDict({
      'seed': 0,
      'size': 32,
      'batch': 256,
      'epochs': 1000.,
      'dtype': 'bfloat16',
      'data': {'name': 'cifar10'},
      'mean': (.4914, .4822, .4465),
      'std': (.2470, .2435, .2616),
      'encoder': {'name': 'resnet', 'depth': 18, 'stem': 'solo', 'width': 64, 'zero_init': False, 'init': 'stem'},
      'augment': {
          'order': ('crop', 'flip', 'jitter', 'gray', 'solarize'),
          'crop': {'role': 'both', 'scale': (.2, 1.), 'method': 'bicubic'},
          'flip': {'role': 'both', 'p': .5},
          'jitter': {'role': 'both', 'p': .8, 'brightness': .4, 'contrast': .4, 'saturation': .2, 'hue': .1},
          'gray': {'role': 'both', 'p': .2},
          'solarize': {'role': 'both', 'p': .1},
      },
      'invariance': {'name': 'vicreg', 'similarity': 25., 'std': 50., 'cov': 1.,  # std: see cifar10_vicreg
                     'projector': {'hidden': (2048, 2048), 'out': 2048, 'bias': True, 'last_bias': True}},
      'equivariance': {'name': 'equimod', 'weight': 1., 'temperature': .2},
      'optimizer': {'name': 'lars', 'lr': .3, 'weight_decay': 1e-4, 'momentum': .9, 'trust': .02, 'lr_outside': True,
                    'clip': True, 'warmup_epochs': 10.},
      'log_every': 195,
  })

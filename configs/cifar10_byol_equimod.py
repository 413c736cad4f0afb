"""BYOL + EquiMod on CIFAR-10 at the official settings: every augmentation has the role `both`.

Command:   eqssl data prepare cifar10
           eqssl train --config cifar10_byol_equimod --workdir runs/c10_byol_equimod
           eqssl eval runs/c10_byol_equimod --protocol equimod
Published: linear top-1 91.57 %, against 90.44 % without EquiMod (EquiMod's README;
           github.com/ADevillers/EquiMod, arXiv 2211.01244).
Measured:  docs/results.md, once a GPU has run it; benchmarks/gpu/README.md lists the runs that are
           owed.
Differs:   The networks compute in bfloat16; the official code computes in float16 with loss
           scaling. The head's conditioning is in units measured for these augmentations; the code's
           BYOL branch keeps the constants of augmentations with other strengths and chances. Colors
           are not rounded to 8 bits after each change (augment.jitter.quantize and
           augment.gray.quantize would do so).
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
      'encoder': {'name': 'resnet', 'depth': 18, 'stem': 'cifar', 'width': 64, 'init': 'stem'},
      'augment': {
          'order': ('crop', 'flip', 'jitter', 'gray', 'blur', 'solarize'),
          'second': {'blur': {'p': .1}, 'solarize': {'p': .2}},
          'crop': {'role': 'both', 'scale': (.2, 1.), 'method': 'bicubic'},
          'flip': {'role': 'both', 'p': .5},
          'jitter': {'role': 'both', 'p': .8, 'brightness': .4, 'contrast': .4, 'saturation': .2, 'hue': .1},
          'gray': {'role': 'both', 'p': .2},
          'blur': {'role': 'both', 'p': 1., 'kernel': 3, 'sigma': (.1, 2.)},
          'solarize': {'role': 'both', 'p': 0.},
      },
      'invariance': {'name': 'byol', 'decay': .996, 'update': 'before',
                     'projector': {'hidden': (4096,), 'out': 256, 'bias': False, 'last_bias': True},
                     'predictor': {'hidden': (4096,), 'out': 256, 'bias': False, 'last_bias': True}},
      'equivariance': {'name': 'equimod', 'weight': 1., 'temperature': .2},
      'optimizer': {'name': 'lars', 'lr': 2., 'weight_decay': 1e-6, 'momentum': .9, 'trust': 1e-3,
                    'warmup_epochs': 10., 'end': 1e-8},
      'log_every': 97,
  })

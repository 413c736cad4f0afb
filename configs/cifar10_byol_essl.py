"""BYOL + E-SSL on CIFAR-10: cifar10_byol, and E-SSL's small crop in all four quarter turns.

Command:   eqssl data prepare cifar10
           eqssl train --config cifar10_byol_essl --workdir runs/c10_byol_essl
           eqssl eval runs/c10_byol_essl --protocol essl --seeds 0,1,2,3,4
Published: nothing that we could read; E-SSL's code has no BYOL. The weight is that of their SimCLR
           and SimSiam.
Measured:  docs/results.md, once a GPU has run it; benchmarks/gpu/README.md lists the runs that are
           owed.
Differs:   the two views have changed places, because the turned crop has the chances of the first
           view: it is blurred with chance .1, as in E-SSL's ImageNet code, and solarized with
           chance .2, which is 0 there. Colors are not rounded to 8 bits after each change
           (augment.jitter.quantize and augment.gray.quantize would do so).
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
          'order': ('crop', 'flip', 'jitter', 'gray', 'blur', 'solarize', 'rotate'),
          'second': {'blur': {'p': 1.}, 'solarize': {'p': 0.}},
          'crop': {'role': 'invariant', 'scale': (.2, 1.), 'method': 'bicubic'},
          'flip': {'role': 'invariant', 'p': .5},
          'jitter': {'role': 'invariant', 'p': .8, 'brightness': .4, 'contrast': .4, 'saturation': .2, 'hue': .1},
          'gray': {'role': 'invariant', 'p': .2},
          'blur': {'role': 'invariant', 'p': .1, 'kernel': 3, 'sigma': (.1, 2.)},
          'solarize': {'role': 'invariant', 'p': .2},
          'rotate': {'role': 'sensitive'},
      },
      'invariance': {'name': 'byol', 'decay': .996, 'update': 'before',
                     'projector': {'hidden': (4096,), 'out': 256, 'bias': False, 'last_bias': True},
                     'predictor': {'hidden': (4096,), 'out': 256, 'bias': False, 'last_bias': True}},
      'equivariance': {'name': 'essl', 'weight': .4},
      'optimizer': {'name': 'lars', 'lr': 2., 'weight_decay': 1e-6, 'momentum': .9, 'trust': 1e-3,
                    'warmup_epochs': 10., 'end': 1e-8},
      'log_every': 97,
  })

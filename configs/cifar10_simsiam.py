"""SimSiam on CIFAR-10 as E-SSL's authors trained their baseline: ResNet-18, SGD, 800 epochs.

Command:   eqssl data prepare cifar10
           eqssl train --config cifar10_simsiam --workdir runs/c10_simsiam
           eqssl eval runs/c10_simsiam --protocol essl --seeds 0,1,2,3,4
Published: nothing that we could read, because the README shows its table as a picture
           (github.com/rdangovs/essl, arXiv 2111.00899, cifar10/). SimSiam's own code is for
           ImageNet only.
Measured:  docs/results.md, once a GPU has run it; benchmarks/gpu/README.md lists the runs that are
           owed.
Differs:   The networks compute in bfloat16; the official code computes in float16 with loss
           scaling. Colors are not rounded to 8 bits after each change (augment.jitter.quantize and
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
      'batchnorm': 'view',
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
      'equivariance': {'name': 'none'},
      # .03 x 512 / 256
      'optimizer': {'name': 'sgd', 'lr': .06, 'weight_decay': 5e-4, 'momentum': .9, 'decay_all': True,
                    'warmup_epochs': 10.},
      'log_every': 97,
  })

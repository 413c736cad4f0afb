"""SimCLR + CARE on CIFAR-10 at the official settings: ResNet-50, Adam at a constant rate, 400 epochs.

Command:   eqssl data prepare cifar10
           eqssl train --config cifar10_care --workdir runs/c10_care
           eqssl eval runs/c10_care --protocol equimod
Published: linear top-1 91.92 %, against 90.98 % without CARE (CARE's Table 1;
           github.com/Sharut/CARE, Gupta et al., ICLR 2024).
Measured:  docs/results.md, once a GPU has run it; benchmarks/gpu/README.md lists the runs that are
           owed.
Differs:   the weight is .03, as in scripts/cifar10.sh; the paper's is .01. Each chunk draws its own
           actions, as in the paper; in the code, as its vmaps read, the whole batch shares two
           actions. Crops are antialiased; the code's own views are not. Colors are not rounded to 8
           bits after each change (augment.jitter.quantize and augment.gray.quantize would do so).
"""
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  return ConfigDict({
      'seed': 0,
      'size': 32,
      'batch': 256,
      'epochs': 400.,
      'batchnorm': 'view',
      'data': {'name': 'cifar10'},
      'mean': (.4914, .4822, .4465),
      'std': (.2023, .1994, .2010),
      'encoder': {'name': 'resnet', 'depth': 50, 'stem': 'cifar', 'width': 64, 'zero_init': False, 'init': 'stem'},
      'augment': {
          'order': ('crop', 'flip', 'jitter', 'gray', 'blur'),
          'crop': {'role': 'both', 'scale': (.08, 1.), 'method': 'bilinear'},
          'flip': {'role': 'both', 'p': .5},
          'jitter': {'role': 'both', 'p': .8, 'brightness': .4, 'contrast': .4, 'saturation': .4, 'hue': .1},
          'gray': {'role': 'both', 'p': .2},
          'blur': {'role': 'both', 'p': .5, 'kernel': 3, 'sigma': (.1, 2.)},
      },
      'invariance': {'name': 'simclr', 'temperature': .5,
                     'projector': {'hidden': (512,), 'out': 128, 'last_bias': True, 'last_norm': 'none'}},
      'equivariance': {'name': 'care', 'weight': .03, 'splits': 16},
      # 'end' equals the rate, so the rate is constant
      'optimizer': {'name': 'adam', 'lr': 1e-3, 'weight_decay': 1e-6, 'warmup_epochs': 0., 'end': 1e-3},
      'log_every': 195,
  })
